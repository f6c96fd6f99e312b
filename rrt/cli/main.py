"""`rrt COMMAND`: lists the commands, or runs one of them."""

import difflib
import importlib
import os
import sys

from rrt import command, console, runtime
from rrt.errors import InputError

# Summaries stand here, so that listing the commands imports none of them.
COMMANDS = {
  'convert': ('rrt.cli.convert', 'convert a model into a recursive one'),
  'train': ('rrt.cli.train', 'uptrain a converted model'),
  'evaluate': ('rrt.cli.evaluate', 'measure cross-entropy, tasks, exits'),
  'generate': ('rrt.cli.generate', 'continue prompts'),
  'plan': ('rrt.cli.plan', 'say how much memory a run takes on which chips'),
  'export': ('rrt.cli.export', 'write a model for transformers, PEFT or llama.cpp'),
  'fit-gate': ('rrt.cli.fit_gate', 'fit and calibrate an exit gate'),
  'serve': ('rrt.cli.serve', "serve a model over OpenAI's HTTP interface"),
  'demo': ('rrt.cli.demo', 'convert, uptrain and run SmolLM2-135M'),
}


def usage() -> str:
  """The commands, a line each."""
  lines = ['rrt COMMAND [--flag=value ...]', '']
  lines += [f'  {name:<9} {text}' for name, (_, text) in COMMANDS.items()]
  lines += [
    '',
    'rrt COMMAND --help lists its flags.',
    '',
    f'Compiled programs are kept in {runtime.programs_dir()}',
    f'(up to {runtime.MOST_BYTES >> 30} GiB); {runtime.SWITCH}=0 keeps none.',
  ]
  return '\n'.join(lines)


def main() -> None:
  """The console script `rrt`, and `python -m rrt`."""
  console.guard_streams()
  name, *rest = sys.argv[1:] or ['--help']
  if name in command.HELP | {'help'}:
    print(usage())
    sys.exit(0)
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f'did you mean {near[0]}?' if near else 'they are'
    known = '' if near else f' {", ".join(COMMANDS)}.'
    print(f'error: rrt has no command {name!r}; {hint}{known}', file=sys.stderr)
    sys.exit(2)
  run(name, rest)


def run(name: str, arguments: list[str]) -> None:
  """Runs a command with these arguments; may restart the process first."""
  if not command.HELP & {*arguments}:
    runtime.prepare()
  console.guard_streams()
  module = importlib.import_module(COMMANDS[name][0])
  # As `python -m` does: a config file may import what lies beside it.
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  # ml_collections reads overrides of a config from the process's arguments.
  sys.argv = [f'rrt {name}', *arguments]
  if hasattr(module, 'define_flags'):
    try:
      module.define_flags()
    except InputError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)
  command.run(module.main, getattr(module, 'explain', None), module.FLAGS)
