"""README and docs: every command and flag that they name exists, links lead somewhere."""

from pathlib import Path
import re
import shlex
import subprocess
import sys

import pytest

from rrt.cli.main import COMMANDS
from rrt.train import recipe

ROOT = Path(__file__).parent.parent
PAGES = [
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  *sorted((ROOT / 'docs').glob('*.md')),
  *sorted((ROOT / 'docs').glob('*/*.md')),
]
PAGES = [p for p in PAGES if 'generated' not in p.parts]


def commands():
  """(page, words) of each `rrt COMMAND ...` and `make TARGET`."""
  for page in PAGES:
    for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.S):
      for line in block.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] in (['rrt'], ['make']):
          yield page.relative_to(ROOT), words


@pytest.mark.parametrize('name', sorted({w[1] for _, w in commands() if w[0] == 'rrt'}))
def test_every_flag_of_the_docs_exists(name):
  assert name in COMMANDS
  done = subprocess.run(
    [sys.executable, '-m', 'rrt', name, '--help'], capture_output=True, text=True, check=False
  )
  known = set(re.findall(r'--(?:\[no\])?([\w.]+)', done.stdout))
  fields = recipe.config()
  for page, words in commands():
    if words[:2] != ['rrt', name]:
      continue
    for word in words[2:]:
      assert word.startswith('--'), (page, word)
      flag = word[2:].split('=')[0]
      if flag.startswith('config.'):
        value = fields
        for part in flag.split('.')[1:]:
          assert part in value, (page, word)
          value = value[part]
      else:
        assert flag in known or flag.removeprefix('no') in known, (page, word)


def test_every_target_of_the_docs_exists():
  targets = set(re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(), re.M))
  named = {words[1] for _, words in commands() if words[0] == 'make'}
  assert named and named <= targets


def test_every_link_of_the_readme_leads_to_a_file():
  links = re.findall(r'\]\(([^)]+)\)', (ROOT / 'README.md').read_text())
  links = [link.split('#')[0] for link in links if not link.startswith('http')]
  assert len(links) > 10
  assert [link for link in links if not (ROOT / link).exists()] == []
