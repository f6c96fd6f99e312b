"""The model card (README.md) of a directory that is written."""

from __future__ import annotations

from pathlib import Path
import re
from typing import Any

from rrt.config import ModelConfig
from rrt.model import LanguageModel
from rrt.models.count import count_params

NAME = 'README.md'
MARK = '<!-- written by rrt; a card without this line is kept -->'
_LICENSE = re.compile(r'\A---\s*\n(?:.*\n)*?license:\s*["\']?([^\s"\']+)')


def license_in(text: str) -> str:
  """The licence that the header of a model card names; '' for none."""
  found = _LICENSE.match(text)
  return found[1].lower() if found else ''


def license_of(directory: Path) -> str:
  """The licence that the card of a directory names; '' for none."""
  path = directory / NAME
  return license_in(path.read_text(encoding='utf-8', errors='replace')) if path.is_file() else ''


def kept(directory: Path) -> tuple[str, ...]:
  """The card of a directory that is about to be replaced, if it is the user's own."""
  path = directory.expanduser() / NAME
  if path.is_file() and MARK not in path.read_text(encoding='utf-8', errors='replace'):
    return (NAME,)
  return ()


def write(model: LanguageModel, load: str) -> str:
  """A model card as Markdown, with the header that model hubs read.

  Args:
    model: as it is stored; its meta tells how it was made.
    load: the lines that load it, Python or shell.
  """
  meta, c = model.meta, model.config
  source = str(meta.get('source') or meta.get('name') or 'unknown')
  header = {
    'base_model': source,
    'license': meta.get('license') or None,
    'library_name': 'transformers' if 'transformers' in load else 'rrt',
    'pipeline_tag': 'text-generation',
  }
  lines = ['---', *(f'{k}: {v}' for k, v in header.items() if v), '---', MARK, '']
  lines += [f'# {_title(c, source)}', '', *_made(meta), '']
  counts = count_params(c)
  rows = [
    ('unique parameters', f'{counts.unique:,}'),
    ('layers run', str(c.depth)),
    ('shape', shape(c)),
    ('family', c.family),
    ('relaxations', ', '.join(r.kind for r in c.relax) or 'none'),
    *_nats(meta),
    ('licence', meta.get('license') or "not stated by the parent's files; it applies here too"),
  ]
  lines += ['| | |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows), '']
  return '\n'.join([*lines, '```', load.strip(), '```', ''])


def shape(config: ModelConfig) -> str:
  """'8 + 7 x 2 + 8', or the number of layers of a vanilla model."""
  c = config
  if c.loops == 1:
    return f'{c.depth} layers'
  return f'{c.prelude_layers} + {c.block_layers} x {c.loops} + {c.coda_layers} layers'


def _title(config: ModelConfig, source: str) -> str:
  kind = 'recursive' if config.loops > 1 else 'untied'
  return f'{source}, {kind}: {shape(config)}'


def _made(meta: dict[str, Any]) -> list[str]:
  """Sentences on how the model came to be."""
  found = []
  conversion = meta.get('conversion')
  if conversion:
    dropped = conversion.get('dropped') or []
    gone = f', without the layers {", ".join(map(str, dropped))}' if dropped else ''
    found.append(
      f'Converted from {meta.get("source", "its parent")}: {conversion["shape"]}{gone}, shared '
      f'weights {conversion["init"]}, {conversion["relaxations"]}, fitted to '
      f'{conversion["calibration_tokens"]:,} tokens.'
    )
  training = meta.get('uptraining')
  if training:
    tokens = training['step'] * training['batch'] * training['length']
    found.append(
      f'Uptrained for {training["step"]:,} steps ({tokens:,} tokens) on '
      f'{training["data"]["path"]}, cross-entropy weight {training["loss"]["cross_entropy"]}, '
      f'distillation weight {training["loss"]["distillation"]}.'
    )
  return found or [f'Loaded from {meta.get("source", "elsewhere")}, not converted.']


def _nats(meta: dict[str, Any]) -> list[tuple[str, str]]:
  conversion = meta.get('conversion') or {}
  parent, child = (conversion.get(f'nll_{who}_nats') for who in ('parent', 'child'))
  if parent is None or child is None:
    return []
  held = conversion.get('held_out_tokens', 0)
  return [
    (f'nats a token of the parent ({held:,} held-out tokens)', f'{parent:.3f}'),
    ('after conversion, before training', f'{child:.3f}'),
  ]
