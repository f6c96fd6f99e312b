"""Live parity with transformers: chat templates and special tokens.

make parity
"""

import json

import pytest

from rrt.data.tokenizer import Tokenizer
from tests import runs
from tests.data.tokenizer_test import MESSAGES, TEMPLATES

pytestmark = pytest.mark.parity
transformers = pytest.importorskip('transformers')

CALL = {'type': 'function', 'function': {'name': 'add', 'arguments': {'b': 2, 'a': 'é<1>'}}}
CHAT = [
  {'role': 'system', 'content': 'Be <brief> & "kind".'},
  {'role': 'user', 'content': "What's 1 + 2?\n"},
  {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
  {'role': 'tool', 'name': 'add', 'content': '3'},
  {'role': 'assistant', 'content': ' Three. '},
  {'role': 'user', 'content': 'ok'},
]
TOOLS = [
  {
    'type': 'function',
    'function': {'name': 'add', 'description': "Adds 'numbers'.", 'parameters': {'z': 1, 'a': {}}},
  }
]

# The shapes of published templates: ChatML with tools, Llama 3, Mistral, Gemma,
# Zephyr, and one that marks the assistant's text.
SHAPES = {
  'chatml': """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
  'llama 3': """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
    {%- elif message.content is mapping or message.content is iterable %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- for t in tools or [] %}{{- t | tojson(indent=4) }}{%- endfor %}
""",
  'mistral': """{%- set loop_messages = messages[1:] %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {{- " [INST] " + message["content"] + " [/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
""",
  'gemma': """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{% if message['content'] is string %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
  'zephyr': """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + (message['content'] or '') + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
  'generation': """{% for m in messages %}{% set x = m.role %}{% generation %}{{ x }}{{ m.content }}{{ eos_token }}{% endgeneration %}
{% endfor %}""",
  'undefined': '{{ nothing }}{{ unk_token }}{{ pad_token }}{{ cls_token }}{{ documents }}',
}
SHAPES |= {name: template for name, (template, _) in TEMPLATES.items()}


@pytest.mark.parametrize('prompt', [True, False])
@pytest.mark.parametrize('tools', [None, TOOLS])
@pytest.mark.parametrize('name', SHAPES)
def test_templates(tmp_path, name, tools, prompt):
  runs.tokenizer().save(tmp_path)
  fields = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  fields |= {'eos_token': 'a', 'pad_token': 'b', 'bos_token': '<|endoftext|>'}
  fields['chat_template'] = SHAPES[name]
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = Tokenizer.from_directory(tmp_path)
  for messages in (MESSAGES, CHAT):
    wanted = theirs.apply_chat_template(
      messages, tokenize=False, tools=tools, add_generation_prompt=prompt
    )
    assert ours.apply_chat(messages, prompt, tools) == wanted
