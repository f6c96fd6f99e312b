"""The built-in text: there, English, split without overlap."""

import bz2
import re

import pytest

from rrt.data import corpus, sources
from rrt.data.sources import Source

PAGE = """{{Infobox|name=[[X]]|{{nested|1}}}}
{{Use dmy dates}}<!-- a note -->
'''Albedo''' ({{IPAc-en|x}}; from [[Latin]] ''albus'') is the [[Reflection (physics)|reflecting]] power of a surface,<ref name="a"/> measured over {{convert|100|km|mi}} and more.<ref>{{cite book|title=B}}</ref>
[[File:A.jpg|thumb|A [[cloud]] above the [[sea|ocean]], seen from very high above the ground in summer.]]
{| class="wikitable"
| a table of things that nobody reads, which is long enough to look like a line.
|}
== Terrestrial ==
* A short item
* An item that is long enough to be a whole sentence, as it goes on and on until its end.
Visit http://example.com for a paragraph with a link in it, which is left out as a whole here.
== References ==
This paragraph follows the body of the article and for that reason it is never to be taken in.
"""


def test_plain_wikitext():
  assert corpus.plain_wikitext(PAGE).split('\n\n') == [
    'Albedo (from Latin albus) is the reflecting power of a surface,'
    ' measured over 100 km and more.',
    'An item that is long enough to be a whole sentence, as it goes on and on until its end.',
  ]
  assert corpus.plain_wikitext('#REDIRECT [[Albedo]] ' + 'x' * 200) == ''


def test_split_by_characters_without_overlap():
  documents = [f'{i} ' + 'x' * (50 + i) for i in range(200)]
  train, held = corpus.split(documents, 0.1, seed=3)
  assert sorted(train + held) == sorted(documents)
  assert train == [d for d in documents if d in set(train)]
  share = sum(map(len, held)) / sum(map(len, documents))
  assert share == pytest.approx(0.1, abs=0.02)
  assert corpus.split(documents, 0.1, seed=3) == (train, held)
  assert corpus.split(documents, 0.1, seed=4) != (train, held)
  assert corpus.split(documents, 0.0) == (documents, [])


@pytest.fixture
def without_gensim(monkeypatch):
  monkeypatch.setattr(corpus, '_gensim', lambda: None)
  monkeypatch.setattr(corpus, '_DOCUMENTED', ())
  corpus._all.cache_clear()
  yield
  corpus._all.cache_clear()


def test_falls_back_on_documentation(without_gensim):
  documents = corpus.documents()
  text = corpus.builtin_text()
  assert len(documents) > 40 and len(text) > 100_000
  assert text.count(' the ') > 2000
  train, held = (corpus.documents(f'builtin:{p}') for p in ('train', 'heldout'))
  assert held and not set(train) & set(held)
  opened = sources.open_documents(Source('builtin:heldout'))
  assert [opened[i] for i in range(len(opened))] == held


def test_docstrings_give_prose(monkeypatch):
  monkeypatch.setattr(corpus, '_DOCUMENTED', ('json',))
  texts = list(corpus._docstrings())
  assert texts and all(re.search(r'[a-z]+ [a-z]+ [a-z]+', t) for t in texts)


def test_reads_the_articles_and_news_of_gensim(tmp_path, monkeypatch):
  pages = ''.join(
    f'<page><title>{i}</title><revision><text>'
    + f"'''Article {i}''' tells of many [[thing]]s at length. " * 60
    + '</text></revision></page>'
    for i in range(3)
  )
  dump = f'<mediawiki xmlns="http://wiki">{pages}</mediawiki>'
  (tmp_path / f'{corpus._WIKIPEDIA}.bz2').write_bytes(bz2.compress(dump.encode()))
  (tmp_path / 'lee_background.cor').write_text('News one.\nNews two.\n')
  monkeypatch.setattr(corpus, '_gensim', lambda: tmp_path)
  corpus._all.cache_clear()
  documents = corpus.documents()
  corpus._all.cache_clear()
  assert len(documents) == 5 and documents[3:] == ['News one.', 'News two.']
  assert documents[0].startswith('Article 0 tells of many things at length.')
