"""Golden checkpoints: our logits are those that Hugging Face computed."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.checkpoints.load import load, load_config
from rrt.config_checks import FAMILIES
from rrt.models import lm_head, transformer

GOLDEN = Path(__file__).parents[1] / 'golden'
NAMES = sorted(p.parent.name for p in GOLDEN.glob('*/config.json'))


def test_every_family_is_here():
  families = {load_config(GOLDEN / name).family for name in NAMES}
  # These are none of transformers: ouro_test.py and grok_test.py have their formulas.
  assert families == {*FAMILIES} - {'ouro', 'grok1'}


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  out = transformer.forward(config, params, tokens)
  return lm_head.logits(config, params, out.hidden_BxLxD, jnp.float32)


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_hugging_faces(name):
  model = load(GOLDEN / name)
  with np.load(GOLDEN / name / 'logits.npz') as stored:
    tokens, wanted = stored['tokens'], stored['logits']
  ours = _logits(model.config, model.params, tokens)
  assert np.abs(wanted).max() > 1  # The model says something.
  np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=0)
