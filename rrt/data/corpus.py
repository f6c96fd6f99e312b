"""The built-in corpus: English text from installed packages, without downloads.

With `gensim` installed (it is never imported), its test data: some 60 whole
Wikipedia articles of 2016 (CC BY-SA 3.0) and 300 news items of the Lee corpus.
Without it, the language reference inside `pydoc_data` and the prose of the
docstrings of Python, numpy, scipy and jax.

Nothing is copied or redistributed: files are read in place.
"""

from __future__ import annotations

import ast
import bz2
from collections.abc import Iterator, Sequence
import functools
import html
import importlib.util
import pathlib
import re
from xml.etree import ElementTree

import numpy as np

HELDOUT = 0.05
_WIKIPEDIA = 'enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened'
_DOCUMENTED = ('numpy', 'scipy', 'jax')


def builtin_text() -> str:
  """All built-in documents, joined by blank lines."""
  return '\n\n'.join(documents())


def documents(name: str = 'builtin') -> list[str]:
  """The built-in documents, in a fixed order.

  Args:
    name: 'builtin' for all, 'builtin:train' or 'builtin:heldout' for the
      parts that `split` makes with its defaults.
  """
  every = _all()
  if name == 'builtin':
    return list(every)
  train, heldout = split(every)
  return {'builtin:train': train, 'builtin:heldout': heldout}[name]


def split(
  documents: Sequence[str], heldout_fraction: float = HELDOUT, seed: int = 0
) -> tuple[list[str], list[str]]:
  """Splits documents into (train, held out), each whole and in order.

  Random documents are held out until they hold `heldout_fraction` of the
  characters; at least one document stays for training.
  """
  wanted = heldout_fraction * sum(map(len, documents))
  held: set[int] = set()
  size = 0
  for index in np.random.default_rng(seed).permutation(len(documents)):
    # A document that goes far beyond what is wanted is passed over.
    if size < wanted and size + len(documents[index]) <= 1.5 * wanted:
      held.add(int(index))
      size += len(documents[index])
  train = [d for i, d in enumerate(documents) if i not in held]
  return train, [d for i, d in enumerate(documents) if i in held]


@functools.cache
def _all() -> tuple[str, ...]:
  found = [*_wikipedia(), *_news()] or [*_reference(), *_docstrings()]
  return tuple(found)


# --------------------------------------------------------- articles and news


def _gensim() -> pathlib.Path | None:
  """Finds gensim's test data without importing gensim."""
  spec = importlib.util.find_spec('gensim')
  if spec is None or spec.origin is None:
    return None
  return pathlib.Path(spec.origin).parent / 'test' / 'test_data'


def _wikipedia() -> Iterator[str]:
  place = _gensim()
  file = place and place / f'{_WIKIPEDIA}.bz2'
  if not file or not file.exists():
    return
  with bz2.open(file) as f:
    for _, node in ElementTree.iterparse(f):
      if node.tag.endswith('}text') and node.text:
        article = plain_wikitext(node.text)
        if len(article) > 2000:
          yield article
      if node.tag.endswith('}page'):
        node.clear()


def _news() -> Iterator[str]:
  place = _gensim()
  file = place and place / 'lee_background.cor'
  if file and file.exists():
    for line in file.read_text('utf-8').splitlines():
      if line.strip():
        yield line.strip()


_LAST_SECTIONS = re.compile(
  r'^==\s*(see also|references|notes|footnotes|citations|bibliography'
  r'|external links|further reading|sources|works cited)\s*==\s*$',
  re.IGNORECASE | re.MULTILINE,
)
_DROPPED = re.compile(
  r'<!--.*?-->'
  r'|<ref[^<>]*/>'
  r'|<(ref|math|gallery|timeline|table|source|syntaxhighlight|imagemap|score'
  r'|chem|hiero)\b[^<>]*>.*?</\1\s*>'
  r'|</?[a-zA-Z][^<>]*>',
  re.DOTALL | re.IGNORECASE,
)
# Templates whose text belongs to the sentence; all others go.
_KEPT_TEMPLATES = (
  (r'(?:convert|cvt)\|([^|{}]*)\|([^|{}]*)[^{}]*', r'\1 \2'),
  (r'(?:lang|transl)\|[^|{}]*\|([^|{}]*)[^{}]*', r'\1'),
  (r'(?:nowrap|nobr|quote|quotation|blockquote)\|([^|{}]*)[^{}]*', r'\1'),
  (r'(?:circa|c\.)\|([^|{}]*)[^{}]*', r'c. \1'),
  (r'(?:ndash|spaced ndash|snd)', ' – '),
  (r'(?:mdash|spaced mdash)', ' — '),
)
_KEPT = [(re.compile(r'\{\{\s*' + p + r'\}\}', re.IGNORECASE), new) for p, new in _KEPT_TEMPLATES]
_RUBBLE = re.compile(r'[{}|\[\]<>=]|https?:|__[A-Z]+__')


def plain_wikitext(text: str) -> str:
  """The prose of a Wikipedia page: whole paragraphs, no markup.

  Headings, tables, lists of fragments, footnotes and whatever follows the
  body (references, links) are left out. Redirects give ''.
  """
  if text.lstrip()[:9].lower() == '#redirect':
    return ''
  if last := _LAST_SECTIONS.search(text):
    text = text[: last.start()]
  text = _DROPPED.sub('', html.unescape(text))
  for pattern, new in _KEPT:
    text = pattern.sub(new, text)
  # From the inside out, as these nest.
  text = _until_stable(r'\{\{[^{}]*\}\}', '', text)
  text = _until_stable(r'\{\|(?:(?!\{\||\|\}).)*\|\}', '', text)
  link = r'\[\[(?!(?:file|image|category):)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]'
  text = _until_stable(link, r'\1', text)
  text = _until_stable(r'\[\[[^\[\]]*\]\]', '', text)
  text = re.sub(r'\[https?:[^\s\]]*\s*([^\]]*)\]', r'\1', text)
  text = re.sub(r"'{2,}", '', text)
  paragraphs = (_paragraph(line) for line in text.split('\n'))
  return '\n\n'.join(filter(None, paragraphs))


def _until_stable(pattern: str, new: str, text: str) -> str:
  compiled = re.compile(pattern, re.DOTALL | re.IGNORECASE)
  count = 1
  while count:
    text, count = compiled.subn(new, text)
  return text


def _paragraph(line: str) -> str:
  """A line as running text; '' unless it is whole sentences."""
  line = re.sub(r'^[*#:;]+\s*', '', line.replace('\xa0', ' ')).strip()
  if len(line) < 80 or _RUBBLE.search(line) or line[-1] not in '.!?"”’)':
    return ''
  line = re.sub(r'[ \t]+', ' ', line)
  # What dropped templates leave between brackets and before commas.
  line = re.sub(r'\(\s*(?:[,;:]\s*)+', '(', line)
  line = re.sub(r'(?:\s*[,;:])*\s*\)', ')', line)
  line = re.sub(r'\s*\(\s*\)', '', line)
  return re.sub(r' +([,.;:!?])(?=\s|$)', r'\1', line)


# ------------------------------------------------------------- documentation


def _reference() -> Iterator[str]:
  """The chapters of Python's language reference."""
  from pydoc_data import topics

  for _, text in sorted(topics.topics.items()):
    if chapter := _prose(text):
      yield chapter


def _docstrings() -> Iterator[str]:
  """The prose of docstrings, one document a source file; nothing is imported.

  Docstrings that two files share are taken once.
  """
  seen: set[str] = set()
  for package in _DOCUMENTED:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
      continue
    root = pathlib.Path(spec.origin).parent
    for file in sorted(root.rglob('*.py')):
      if 'tests' in file.parts:
        continue
      try:
        tree = ast.parse(file.read_text('utf-8'))
      except (OSError, ValueError, SyntaxError):
        continue
      kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
      nodes = [n for n in ast.walk(tree) if isinstance(n, kinds)]
      texts = [_prose(ast.get_docstring(n) or '') for n in nodes]
      new = [t for t in texts if t and t not in seen]
      seen.update(new)
      if new:
        yield '\n\n'.join(new)


def _prose(text: str) -> str:
  """The paragraphs of a documentation text that are whole sentences."""
  kept = []
  for paragraph in re.split(r'\n\s*\n', text):
    line = ' '.join(paragraph.split())
    line = re.sub(r':[\w:]+:`~?([^`<]*)[^`]*`', r'\1', line).replace('``', '')
    letters = sum(c.isalpha() or c.isspace() for c in line)
    whole = line[:1].isupper() and line.endswith(('.', '!', '?'))
    if len(line) >= 80 and whole and letters > 0.85 * len(line):
      kept.append(line)
  return '\n\n'.join(kept)
