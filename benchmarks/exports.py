"""A child's exports in an environment without this package: bytes, memory, speed, texts.

  python -m venv /tmp/other
  /tmp/other/bin/pip install torch transformers accelerate peft xllamacpp
  python -m benchmarks.exports --model=child --python=/tmp/other/bin/python --out=exports

Every format is loaded by a process of its own, with the other software alone. Memory is
what the process holds more after a first text than before loading, and the distinct bytes
of its parameters.
"""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys

from absl import flags

import rrt
from rrt import command, console
from rrt.errors import InputError

FLAGS = flags.FLAGS
_MODEL = flags.DEFINE_string('model', None, 'A recursive model.')
_PYTHON = flags.DEFINE_string('python', sys.executable, 'Of the other environment.')
_OUT = flags.DEFINE_string('out', None, 'Directory of the exports and of exports.json.')
_NEW = flags.DEFINE_integer('new', 48, 'Tokens to write.')
PROMPT = 'The sea is'
FORMATS = ('hf', 'hf-tied', 'peft', 'gguf f16', 'gguf q8_0', 'gguf q4_0')

WORKER = """
import importlib.util, json, sys, time
assert importlib.util.find_spec('rrt') is None, 'rrt is installed here'
kind, path, ids, new = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
def resident():
  with open('/proc/self/status') as f:
    return next(int(l.split()[1]) * 1024 for l in f if l.startswith('VmRSS'))
if kind.startswith('gguf'):
  import xllamacpp, urllib.request
  before = resident()
  p = xllamacpp.CommonParams()
  p.model.path, p.n_parallel, p.n_ctx = path, 1, 512
  p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
  p.verbosity, p.warmup = 0, True
  server = xllamacpp.Server(p)
  def run(count):
    body = dict(prompt=ids, n_predict=count, temperature=0, top_k=1, ignore_eos=True,
                cache_prompt=False, return_tokens=True)
    request = urllib.request.Request(server.listening_address + '/completion',
      json.dumps(body).encode(), {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request) as answer:
      return json.load(answer)['tokens']
  distinct = None
else:
  import torch, transformers
  transformers.logging.set_verbosity_error()
  torch.set_num_threads(2)
  load = transformers.AutoModelForCausalLM.from_pretrained
  if kind == 'peft':
    import peft
  before = resident()
  if kind == 'peft':
    model = peft.PeftModel.from_pretrained(load(path + '/base', dtype=torch.float32),
                                           path + '/adapter')
  else:
    model = load(path, dtype=torch.float32, trust_remote_code=kind == 'hf-tied')
  model.eval()
  storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
              for t in model.parameters()}
  distinct = sum(storages.values())
  def run(count):
    tokens = torch.tensor([ids])
    with torch.no_grad():
      out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens),
        max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids):].tolist()
run(4)  # Reads every weight: files are mapped.
held = resident() - before
start = time.perf_counter()
tokens = run(new)
seconds = time.perf_counter() - start
print(json.dumps(dict(held=held, distinct=distinct, tokens=tokens, per_second=new / seconds)))
"""


def main(_) -> None:
  """Writes all formats and runs each."""
  if not _MODEL.value or not _OUT.value:
    raise InputError('--model and --out are both needed; see --help.')
  out, model = Path(_OUT.value), rrt.load(_MODEL.value)
  out.mkdir(parents=True, exist_ok=True)
  if model.tokenizer is None:
    raise InputError('The model has no tokenizer.')
  ids = model.tokenizer.encode(PROMPT)
  (ours,) = rrt.complete(model, [ids], max_new_tokens=_NEW.value, ignore_eos=True)
  table = {}
  for form in FORMATS:
    kind, _, quantize = form.partition(' ')
    path = out / (form.replace(' ', '_') + ('.gguf' if quantize else ''))
    if kind == 'gguf':
      rrt.save_gguf(model, path, quantize)
    else:
      {'hf': rrt.save_hf, 'hf-tied': rrt.save_hf_tied, 'peft': rrt.save_peft}[kind](model, path)
    done = subprocess.run(
      [_PYTHON.value, '-c', WORKER, form, str(path), json.dumps(ids), str(_NEW.value)],
      capture_output=True,
      text=True,
      check=False,
      cwd='/',
    )
    if done.returncode:
      raise InputError(f'{form}: the other environment failed: {done.stderr[-400:]}')
    row = json.loads(done.stdout.strip().splitlines()[-1])
    same = [a == b for a, b in zip(row.pop('tokens'), ours.tokens, strict=True)]
    row['same_tokens'] = same.index(False) if False in same else len(same)
    files = [path] if path.is_file() else [p for p in path.rglob('*') if p.is_file()]
    row['disk'] = sum(p.stat().st_size for p in files)
    table[form] = row
    print(form, row, flush=True)
  megabytes = lambda n: None if n is None else f'{n / 1e6:,.1f}'
  console.table(
    [
      [
        k,
        *(megabytes(r[n]) for n in ('disk', 'distinct', 'held')),
        r['per_second'],
        r['same_tokens'],
      ]
      for k, r in table.items()
    ],
    ['format', 'MB on disk', 'MB of parameters', 'MB held', 'tokens/s', f'same of {_NEW.value}'],
  )
  (out / 'exports.json').write_text(json.dumps(table, indent=1) + '\n')
  console.finish(table)


if __name__ == '__main__':
  command.run(main)
