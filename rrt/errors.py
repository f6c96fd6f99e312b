"""The one exception that bad input raises."""


class InputError(ValueError):
  """A user's mistake, reported in one sentence: field, value and remedy.

  The command lines print its message alone, without a traceback, and exit
  with status 2. Anything else that escapes is a defect of this package.
  """
