"""llama.cpp's server on our untied export: a contender of `serving`.

The wheel of `xllamacpp` is built for any x86-64 machine, without AVX-512 or
AMX; a build for one's own machine can be faster.
"""

import concurrent.futures
import json
from pathlib import Path
import urllib.request


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
