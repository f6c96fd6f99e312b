"""--config: a file with get_config(), its fields set from the command line.

ml_collections does the work; its errors become one line here.
"""

import functools
from pathlib import Path
import sys
from typing import Any

from absl import flags

from rrt.errors import InputError
from rrt.train.recipe import Recipe, config, require_ml_collections
from rrt.train.recipe_fields import unknown_field


def define_config_flag() -> None:
  """Adds --config, a file with get_config(), and --config.FIELD to absl.

  Errors in a file are raised as ConfigFileError when flags are parsed.
  """
  _, config_flags = require_ml_collections()
  holder = config_flags.DEFINE_config_file(
    'config',
    None,
    'The recipe: a file of experiments/, or your own, in Python (get_config()) or '
    'YAML. --config.FIELD=VALUE changes a field, such as --config.steps=200 or '
    '--config.optimizer.learning_rate=1e-3.',
  )
  parser: Any = flags.FLAGS[holder.name].parser
  parser.parse = functools.partial(_read_config, parser.parse)


class ConfigFileError(Exception):
  """An invalid config file; not a ValueError, which absl rewords."""


def _read_config(parse, path: str):
  """Calls get_config(); errors become one line with the file's name."""
  file = path.split(':', 1)[0]
  if not Path(file).is_file():
    raise ConfigFileError(f'--config={file}: there is no such file.')
  if Path(file).suffix in ('.yaml', '.yml'):
    return _read_yaml(file)
  try:
    found = parse(path)
    if hasattr(found, 'to_dict'):
      return found
    why = f'get_config() returns {type(found).__name__}, not a ConfigDict'
  except SystemExit:
    why = 'it ends the program'
  except Exception as e:
    # ml_collections puts a traceback into the message of these two, and holds
    # back an OSError until the config is used.
    cause: BaseException = e
    if isinstance(e, (TypeError, ValueError)) and e.__context__:
      cause = e.__context__
    elif isinstance(e, OSError) and e.__cause__:
      cause = e.__cause__
    why = f'{type(cause).__name__}: {" ".join(str(cause).split())}'
    if isinstance(cause, AttributeError) and cause.name == 'get_config':
      raise ConfigFileError(f'--config={file}: defines no function get_config().') from e
    if 'get_config() takes 0 positional arguments' in str(cause):
      variant = path.split(':', 1)[1]
      raise ConfigFileError(f'--config={file}: has no variants; leave ":{variant}" out.') from e
    why = why.split(' Did you mean', 1)[0] if len(why) > 300 else why
    why = why if len(why) <= 300 else f'{why[:300]} ...'
  raise ConfigFileError(f'--config={file}: {why}')


def _read_yaml(file: str):
  """A recipe's fields from a YAML file, as the ConfigDict of all fields."""
  import yaml

  try:
    fields = yaml.safe_load(Path(file).read_text(encoding='utf-8')) or {}
    if not isinstance(fields, dict):
      raise ConfigFileError(f'--config={file}: holds no fields, such as "steps: 200".')
    Recipe.from_dict(fields)
  except (InputError, OSError, UnicodeDecodeError, yaml.YAMLError) as e:
    raise ConfigFileError(f'--config={file}: {" ".join(str(e).split())}') from e
  found = config()
  with found.unlocked():
    found.update(fields)
  return found


def config_error(error: Exception) -> str:
  """One line for an error of parsing --config and --config.FIELD."""
  message = ' '.join(str(error).split())
  if isinstance(error, (InputError, ConfigFileError)):
    return message
  # ml_collections wraps the KeyError of an unknown field in an AttributeError.
  unknown = error.args[0] if isinstance(error, AttributeError) else None
  if isinstance(unknown, KeyError):
    return _unknown_field(str(unknown.args[0]))
  return f'--config: {message or type(error).__name__}'


def _unknown_field(message: str) -> str:
  """The error of an override; ml_collections names the last part of its path alone."""
  quoted = message.split("'")
  name = quoted[1] if len(quoted) > 2 else message.split()[0]
  for argument in sys.argv[1:]:
    path = argument.lstrip('-').partition('=')[0].removeprefix('config.')
    if argument.startswith(('--config.', '-config.')) and name in path.split('.'):
      return f'--config.{path}: {unknown_field(Recipe, path)}'
  return f'--config: {name}: {unknown_field(Recipe, name)}'
