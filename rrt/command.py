"""Command lines: flags in groups, help, and errors in one line.

absl does the parsing. A command declares its flags in three groups, in
`FlagValues` of its own, so that several commands can be imported at once:

    FLAGS = command.Flags('Converts a model.', "rrt convert --source=...")
    _SOURCE = FLAGS.needed.string('source', None, 'The parent.')
    _LOOPS = FLAGS.usual.integer('loops', 2, 'Times the block runs.')
    _SEED = FLAGS.rare.integer('seed', 0, 'Of random weights.')
"""

from collections.abc import Callable, Sequence
import functools
import logging
import sys
import textwrap
from typing import Any

from absl import app, flags

from rrt import console
from rrt.errors import InputError

_WIDTH = 80


# What asks for help.
HELP = {'-h', '-help', '--help', '--helpfull'}


class Group:
  """Flags of one group; its methods are absl's DEFINE functions."""

  def __init__(self, title: str, values: flags.FlagValues):
    self.title, self.names, self._values = title, list[str](), values

  def _define(self, define, name, default, *args, **kwargs):
    self.names.append(name)
    return define(name, default, *args, flag_values=self._values, **kwargs)

  def __getattr__(self, kind: str) -> Callable[..., Any]:
    define = getattr(flags, f'DEFINE_{kind}')
    return functools.partial(self._define, define)

  def add(self, name: str) -> None:
    """Lists a flag that is defined elsewhere in the command's values."""
    self.names.append(name)


class Flags:
  """The flags of one command.

  Attributes:
    summary: what the command does, one line.
    example: a command line of two lines at most.
    values: absl's store of the flags.
    appendix: called for further lines of help, or None.
    needed, usual, rare: the groups.
  """

  def __init__(self, summary: str, example: str, values: flags.FlagValues | None = None):
    self.summary, self.example = summary, example
    self.values = flags.FlagValues() if values is None else values
    self.needed = Group('Needed', self.values)
    self.appendix: Callable[[], list[str]] | None = None
    self.usual = Group('Usual', self.values)
    self.rare = Group('Rare', self.values)

  def help(self) -> str:
    """The text of --help: an example, then the flags by group."""
    lines = [self.summary, '']
    lines += ['  ' + line for line in self.example.splitlines()]
    for group in (self.needed, self.usual, self.rare):
      if group.names:
        lines += ['', f'{group.title}:']
      for name in group.names:
        lines += _described(self.values[name])
    if self.appendix is not None:
      lines += ['', *self.appendix()]
    lines += ['', '--helpfull lists the flags of absl too.']
    return '\n'.join(lines)


def _described(flag: flags.Flag) -> list[str]:
  """Lines of help for one flag: name and default, then its description."""
  head = f'  --[no]{flag.name}' if flag.boolean else f'  --{flag.name}'
  text = ' '.join((flag.help or '').split())
  text = text.removesuffix(';repeat this option to specify a list of values')
  text = text.removesuffix('; repeat this option to specify a list of values')
  if flag.boolean and flag.default:
    text += ' On by default.'
  elif flag.default not in (None, [], '', False):
    shown = flag.default
    if isinstance(shown, (list, tuple)):
      shown = ', '.join(map(repr, shown))
    head += f'={shown}'
  wrapped = textwrap.wrap(text, width=_WIDTH - 6)
  return [head, *(f'      {line}' for line in wrapped)]


def check_effect(flag: flags.FlagHolder, holds: bool, without: str) -> None:
  """Raises InputError for a flag that is given and has no effect.

  Args:
    flag: the flag.
    holds: whether it has one.
    without: what it needs, such as '--text'.
  """
  if flag.present and not holds:
    raise InputError(f'--{flag.name} has no effect without {without}.')


def run(
  main: Callable[[Sequence[str]], Any],
  explain: Callable[[Exception], str] | None = None,
  own: Flags | None = None,
  argv: Sequence[str] | None = None,
) -> None:
  """Runs an absl program; bad input ends it with one line and status 2.

  Args:
    main: the program, given what is left of the command line.
    explain: describes an error of parsing the flags that is not absl's own.
    own: the flags of a command, which --help lists; None for flags that are
      defined in absl's global store.
    argv: the command line; None for the process's.
  """

  def parse(argv):
    if own is not None and HELP & {*argv[1:]}:
      print(own.help())
      if '--helpfull' in argv:
        print('\n' + flags.FLAGS.get_help())
      raise SystemExit(0)
    try:
      if own is not None and own.values is not flags.FLAGS:
        flags.FLAGS.append_flag_values(own.values)
      left = flags.FLAGS(argv)
      if own is not None:
        own.values.mark_as_parsed()
      return left
    except flags.Error as e:
      message = ' '.join(str(e).split())
    except SystemExit as e:  # --help has been printed.
      raise SystemExit(0) from e
    except Exception as e:
      if explain is None:
        raise
      message = explain(e)
    print(f'error: {message}', file=sys.stderr)
    raise SystemExit(2)

  def guarded(argv):
    if len(argv) > 1:
      raise InputError(f'{argv[1]!r} is not a flag; give values as --name=value.')
    return main(argv)

  def outer(argv):
    try:
      status = guarded(argv)
      sys.stdout.flush()
      error = getattr(sys.stdout, 'error', None)
      if error is None or isinstance(error, BrokenPipeError):
        return status
      print(f'error: {error}: the output is incomplete', file=sys.stderr)
      return status or 2
    except InputError as e:
      print(f'error: {e}', file=sys.stderr)
      return 2
    except OSError as e:
      # A full disk or a directory without permission.
      where = e.filename or 'a file'
      print(f'error: {e.strerror or e}: {where}', file=sys.stderr)
      return 2
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      return 130

  console.guard_streams()
  # Missing accelerator backends are not worth a warning.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
  app.run(outer, flags_parser=parse, argv=None if argv is None else list(argv))
