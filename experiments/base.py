"""What the experiments of this folder share; not an experiment itself.

A config of your own starts from here, or from `rrt.train.recipe.config()`, and sets
the fields that differ; the command line sets more: --config.steps=200. What a
field means is said in `rrt/train/recipe.py`.
"""

from rrt.errors import InputError
from rrt.train import recipe as recipe_lib


def get_config(arg: str = ''):
  """The recipe for a laptop: 2 x 512 tokens a step, on two CPU cores.

  With arg `accelerator` it is the one for a GPU or TPU chip.
  """
  if arg not in ('', 'accelerator'):
    raise InputError(f'{arg!r} is no variant; the only one is accelerator.')
  c = recipe_lib.config()
  c.data.path = 'builtin:train'
  c.heldout.path = 'builtin:heldout'
  c.heldout.every = 20

  c.steps = 40
  c.batch, c.length = 2, 512
  # Forward KL from the parent, temperature 1. So short a run learns more from
  # all of the parent's probabilities than from the one token of the text.
  c.loss.cross_entropy, c.loss.distillation = 0.0, 1.0

  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 4
  c.optimizer.schedule, c.optimizer.final_rate = 'cosine', 0.0
  c.optimizer.beta2 = 0.98

  c.convert.init = 'calibrated'
  c.convert.calibration = 'builtin:train'
  c.convert.calibration_tokens = 16_384
  c.checkpoint_every = 20
  return accelerator(c) if arg == 'accelerator' else c


def gentle_lora(c):
  """Half the learning rate for LoRA.

  The entries of a calibrated LoRA are larger than a kernel's, and so is what
  a step of one size does to the product.
  """
  c.optimizer.rules = ((r'lora_[ab]$', {'multiplier': 0.5}),)
  return c


def accelerator(c):
  """The same on an accelerator: bf16, larger batches, longer runs."""
  c.dtype = 'bfloat16'
  c.batch, c.length = 32, 1024
  c.steps = 2000
  c.loss.cross_entropy = 1.0
  c.optimizer.warmup_steps = 100
  c.loss.chunk_tokens = 8192
  c.log_every = 10
  c.heldout.every = 250
  c.checkpoint_every = 250
  return c


def paper(c):
  """The paper's uptraining (appendix E), 60 billion tokens.

  SlimPajama; context 2048; about 2 million tokens a step; AdamW, 2e-4, cosine,
  800 steps of warm-up; mixed precision on 8 H100; forward KL from the
  full-size model of the same family, uptrained on 15 billion tokens, added to
  the cross-entropy. The paper does not state betas, weight decay, the final
  learning rate, clipping, LoRA's alpha or the weight and temperature of the
  distillation: here they are this package's defaults.
  """
  c.data.path = 'hf://DKYoon/SlimPajama-6B:train'
  c.loss.cross_entropy = 1.0
  c.heldout.path = ''
  c.length = 2048
  c.batch = 1024  # 2,097,152 tokens.
  c.steps = 28_610  # 60e9 tokens.
  c.accumulate = 16
  c.dtype, c.remat = 'bfloat16', 'dots'
  c.loss.chunk_tokens = 16_384
  c.optimizer.learning_rate = 2e-4
  c.optimizer.warmup_steps = 800
  c.optimizer.schedule, c.optimizer.final_rate = 'cosine', 0.0
  c.optimizer.beta2 = 0.95
  c.mesh.data, c.mesh.fsdp = 1, -1
  # As the paper: plain means and plain SVD, norms shared by all loops.
  c.convert.init, c.convert.relax_init = 'average', 'fit'
  c.convert.loop_norms = False
  c.log_every, c.checkpoint_every, c.keep = 10, 500, 3
  return c
