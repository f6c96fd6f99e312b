"""llama.cpp's server on our untied export: a contender of `serving`.

The wheel of `xllamacpp` is built for any x86-64 machine, without AVX-512 or
AMX; a build for one's own machine can be faster.
"""

import concurrent.futures
import json
from pathlib import Path
import urllib.request

import numpy as np

from rrt.checkpoints.reader import interleaved_rows

_NAMES = {
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}


def write_gguf(directory: Path, out: Path, dtype: str) -> None:
  """A Hugging Face directory of a Llama as a GGUF file.

  Args:
    directory: as `rrt export` writes it.
    out: the file.
    dtype: 'float32' or 'bfloat16', of matrices; norms stay float32.
  """
  import gguf
  from safetensors import safe_open

  config = json.loads((directory / 'config.json').read_text())
  words = json.loads((directory / 'tokenizer.json').read_text())
  size = config['vocab_size']
  heads, groups = config['num_attention_heads'], config['num_key_value_heads']
  head_dim = config.get('head_dim') or config['hidden_size'] // heads
  form = gguf.GGMLQuantizationType.F32
  if dtype == 'bfloat16':
    form = gguf.GGMLQuantizationType.BF16
  file = gguf.GGUFWriter(out, 'llama')
  file.add_context_length(config['max_position_embeddings'])
  file.add_embedding_length(config['hidden_size'])
  file.add_block_count(config['num_hidden_layers'])
  file.add_feed_forward_length(config['intermediate_size'])
  file.add_head_count(heads)
  file.add_head_count_kv(groups)
  file.add_layer_norm_rms_eps(config['rms_norm_eps'])
  rope = config.get('rope_parameters') or config
  file.add_rope_freq_base(rope['rope_theta'])
  file.add_rope_dimension_count(head_dim)
  file.add_vocab_size(size)

  tokens = {i: w for w, i in words['model']['vocab'].items()}
  tokens |= {t['id']: t['content'] for t in words.get('added_tokens', ())}
  file.add_tokenizer_model('gpt2')
  file.add_tokenizer_pre('smollm')
  file.add_token_list([tokens.get(i, f'<unused{i}>') for i in range(size)])
  file.add_token_types([1] * size)
  merges = words['model']['merges']
  file.add_token_merges([m if isinstance(m, str) else ' '.join(m) for m in merges])
  file.add_bos_token_id(0)
  file.add_eos_token_id(0)

  def add(name: str, tensor: np.ndarray) -> None:
    tensor = np.ascontiguousarray(tensor, np.float32)
    kind = form if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
    file.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)

  tensors = {}
  for path in sorted(directory.glob('*.safetensors')):
    with safe_open(path, 'numpy') as part:
      tensors |= {name: part.get_tensor(name) for name in part.keys()}
  table = tensors['model.embed_tokens.weight']
  add('token_embd.weight', table)
  add('output_norm.weight', tensors['model.norm.weight'])
  add('output.weight', tensors.get('lm_head.weight', table))
  for layer in range(config['num_hidden_layers']):
    for theirs, ours in _NAMES.items():
      tensor = tensors[f'model.layers.{layer}.{theirs}.weight']
      if ours in ('attn_q', 'attn_k'):
        count = heads if ours == 'attn_q' else groups
        tensor = tensor[interleaved_rows(count, head_dim)]
      add(f'blk.{layer}.{ours}.weight', tensor)
  file.write_header_to_file()
  file.write_kv_data_to_file()
  file.write_tensors_to_file()
  file.close()


class Server:
  """llama.cpp's server with continuous batching."""

  def __init__(self, path: Path, slots: int, context: int, threads: int, dtype: str):
    """Starts it on a port of this machine alone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cont_batching = True
    kinds = {'float32': 'GGML_TYPE_F32', 'bfloat16': 'GGML_TYPE_BF16'}
    kind = getattr(xllamacpp.ggml_type, kinds[dtype])
    params.cache_type_k = params.cache_type_v = kind
    params.warmup = True
    params.verbosity = 0  # Errors alone.
    self._slots = slots
    self._server = xllamacpp.Server(params)
    self.url = self._server.listening_address

  def ask(self, prompt: list[int], count: int) -> dict:
    """The body of a request for greedy tokens."""
    return {
      'prompt': prompt,
      'n_predict': count,
      'temperature': 0,
      'top_k': 1,
      'ignore_eos': True,
      'cache_prompt': False,
      'return_tokens': True,
    }

  def complete(self, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens after a prompt."""
    request = urllib.request.Request(
      f'{self.url}/completion',
      json.dumps(self.ask(prompt, count)).encode(),
      {'Content-Type': 'application/json'},
    )
    with urllib.request.urlopen(request) as answer:
      return json.load(answer)['tokens']

  def run(self, work) -> list[list[int]]:
    """All requests, as many at once as there are slots."""
    with concurrent.futures.ThreadPoolExecutor(self._slots) as pool:
      return list(pool.map(lambda pair: self.complete(*pair), work))
