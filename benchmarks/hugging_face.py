"""Hugging Face transformers on our untied export: contenders of `serving`.

`generate` in static batches, each as long as its longest answer, with a cache
that is allocated once (`static`), one that grows (`dynamic`), or, on a GPU, the
first compiled by torch (`compiled`); and transformers' own continuous batching,
what its `generate_batch` runs, where each request ends by itself. The last is
told how large its cache may be: on a CPU it does not find out, and on a GPU it
would take all that is free.
"""

from collections.abc import Callable, Sequence

import numpy as np

# How `generate` keeps its cache.
CACHES: dict[str, dict] = {
  'static': dict(cache_implementation='static', disable_compile=True),
  'dynamic': {},
  'compiled': dict(cache_implementation='static'),
}
_PAGE = 64  # Tokens of a page of the continuous batches' cache.

Work = Sequence[tuple[list[int], int]]


def device() -> str:
  """Where torch runs: on a GPU if it has one."""
  import torch

  return 'cuda' if torch.cuda.is_available() else 'cpu'


def generate(
  loaded, part: Work, cache: str = 'static', on_step: Callable[[], None] = lambda: None
) -> list[list[int]]:
  """Greedy tokens of one static batch.

  Args:
    loaded: transformers' model.
    part: prompts, and how many tokens each is answered with.
    cache: one of `CACHES`.
    on_step: called after each token.
  """
  import torch
  import transformers

  class Step(transformers.StoppingCriteria):
    """Told of each token; never stops."""

    def __call__(self, ids, scores, **_):
      on_step()
      return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

  width = max(len(p) for p, _ in part)
  ids = np.zeros((len(part), width), np.int64)
  mask = np.zeros_like(ids)
  for row, (prompt, _) in enumerate(part):
    ids[row, width - len(prompt) :] = prompt
    mask[row, width - len(prompt) :] = 1
  longest = max(n for _, n in part)
  on_device = lambda t: torch.from_numpy(t).to(loaded.device)
  with torch.inference_mode():
    out = loaded.generate(
      on_device(ids),
      attention_mask=on_device(mask),
      do_sample=False,
      max_new_tokens=longest,
      min_new_tokens=longest,
      stopping_criteria=[Step()],
      **CACHES[cache],
    )
  return [row[width : width + n].tolist() for row, (_, n) in zip(out, part, strict=True)]


def static_batches(loaded, work: Work, slots: int, cache: str = 'static'):
  """A run of `generate` in static batches; it remembers its tokens."""
  loaded = loaded.to(device())

  def run():
    run.tokens = []
    for first in range(0, len(work), slots):
      run.tokens += generate(loaded, work[first : first + slots], cache)

  run.generate = lambda part, on_step: generate(loaded, part, cache, on_step)
  return run


def result_of(manager, timeout: float):
  """The next result, or None; raises RuntimeError for a request that failed."""
  result = manager.get_result(timeout=timeout)
  if result is None and not manager.is_running():
    raise RuntimeError('transformers stopped its continuous batching.')
  if result is not None and result.error is not None:
    raise RuntimeError(f'transformers failed: {result.error}')
  return result


def continuous(loaded, work: Work, slots: int):
  """A run of transformers' continuous batching; it remembers its tokens.

  Args:
    loaded: transformers' model.
    work: prompts, and how many tokens each is answered with.
    slots: sequences at once.
  """
  import logging

  import transformers
  from transformers.generation.continuous_batching import utils

  logging.getLogger('ContinuousBatchingLogger').setLevel(logging.ERROR)
  loaded, on_cpu = loaded.to(device()), device() == 'cpu'
  longest = max(len(p) + n for p, n in work)
  config = transformers.ContinuousBatchingConfig(
    page_size=_PAGE,
    max_requests_per_batch=slots,
    num_blocks=slots * -(-longest // _PAGE),
    max_batch_tokens=8 * slots,
  )
  hints = utils.WorkloadHints(max(len(p) for p, _ in work), max(n for _, n in work), len(work))
  greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

  run_manager = lambda: loaded.continuous_batching_context_manager(
    generation_config=greedy,
    continuous_batching_config=config,
    warmup=not on_cpu,
    persistent_manager=True,
    workload_hints=hints,
  )

  def run():
    done: dict[str, list[int]] = {}
    with run_manager() as manager:
      names = [manager.add_request(p, max_new_tokens=n) for p, n in work]
      while len(done) < len(names):
        result = result_of(manager, timeout=1)
        if result is not None and result.is_finished():
          done[result.request_id] = result.generated_tokens
    run.tokens = [done[name] for name in names]

  run.manager = run_manager
  return run
