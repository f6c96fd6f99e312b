"""What every command sets up before jax is imported: huge pages, compiled programs.

Two settings speed up everything on a CPU. glibc's huge pages find arrays of gigabytes
by 2 MiB instead of 4 KiB, which takes a restart of the process. Programs that XLA has
compiled are kept in the user's cache directory, by kind of processor, and used again.
`RRT_TUNE=0` turns both off; JAX's and glibc's own variables win where they are set.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
from pathlib import Path
import platform
import sys

SWITCH = 'RRT_TUNE'
MOST_BYTES = 2 << 30  # of compiled programs; the least recently used go first


def cache_root() -> Path:
  """`$RRT_CACHE`, else `$XDG_CACHE_HOME/rrt`, else `~/.cache/rrt`."""
  if own := os.environ.get('RRT_CACHE'):
    return Path(own).expanduser()
  return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'rrt'


def programs_dir() -> Path:
  """Where compiled programs are kept: they fit one kind of processor."""
  flags = ''
  try:
    for line in Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith(('model name', 'flags', 'Features')):
        flags += line
      if not line:
        break
  except OSError:
    flags = platform.processor()
  kind = hashlib.sha256(f'{platform.machine()}{flags}'.encode()).hexdigest()[:12]
  return cache_root() / f'programs-{kind}'


def prepare() -> None:
  """Sets both up; call it before jax is imported. May restart the process."""
  if sys.platform not in ('linux', 'darwin'):
    print(f'error: rrt runs on Linux and macOS, not on {sys.platform}.', file=sys.stderr)
    raise SystemExit(2)
  if os.environ.get(SWITCH) == '0':
    return
  keep = {
    'JAX_COMPILATION_CACHE_DIR': str(programs_dir()),
    'JAX_COMPILATION_CACHE_MAX_SIZE': str(MOST_BYTES),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
  }
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    for name, value in keep.items():
      os.environ.setdefault(name, value)
  use_huge_pages()


def use_huge_pages() -> None:
  """Starts the process again with glibc's huge pages, unless it has its own tunables."""
  if 'GLIBC_TUNABLES' not in os.environ and _is_glibc():
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
  try:
    return (os.confstr('CS_GNU_LIBC_VERSION') or '').startswith('glibc')
  except (AttributeError, ValueError, OSError):
    return False


def release_memory() -> None:
  """Gives memory that is free within the process back to the system (glibc)."""
  gc.collect()
  if _is_glibc():
    with contextlib.suppress(OSError, AttributeError):
      ctypes.CDLL(None).malloc_trim(0)
