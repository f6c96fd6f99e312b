"""Uploads what was written to a model hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path
import re

from rrt.checkpoints import native, save_hf
from rrt.errors import InputError

_ID = re.compile(r'[\w.-]+/[\w.-]+')


def check_push(repo: str) -> None:
  """Checks, before long work, that `push_to_hub` can begin.

  Raises:
    InputError: the id is none, or huggingface_hub is missing or has no token.
  """
  if not _ID.fullmatch(repo):
    raise InputError(f'push_to_hub={repo!r}: must be a hub id, owner/name.')
  if _hub().get_token() is None:
    raise InputError(
      f'push_to_hub={repo!r}: huggingface_hub has no token; run `hf auth login`, or set HF_TOKEN.'
    )


def push_to_hub(directory: str | Path, repo: str, private: bool = False) -> str:
  """Uploads a directory that `save` or an export wrote, or a GGUF file, with its card.

  The repository is created if there is none. Its card is replaced by the directory's.

  Args:
    directory: with a model of ours: native, `save_hf`, `save_hf_tied`, `save_peft`; or
      the path of a GGUF file.
    repo: a hub id, owner/name.
    private: whether a new repository is private.

  Returns:
    The address of the commit.

  Raises:
    InputError: the directory holds something else, or the hub refuses.

  Example:
    >>> rrt.push_to_hub('child', 'someone/smollm2-recursive')
  """
  path = Path(directory).expanduser()
  check_push(repo)
  is_file = path.is_file() and path.suffix == '.gguf'
  if not is_file and not (native.is_only_native(path) or save_hf.is_export(path)):
    raise InputError(
      f'{directory}: is neither a GGUF file nor a directory that rrt wrote; nothing was uploaded.'
    )
  hub = _hub()
  try:
    api = hub.HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if is_file:
      done = api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)
    else:
      done = api.upload_folder(folder_path=path, repo_id=repo, commit_message='Upload by rrt')
  except Exception as e:  # Offline, forbidden, full: many types, one meaning.
    reason = str(e).strip().split('\n')[0] or type(e).__name__
    raise InputError(f'{repo} cannot be written on the hub ({reason}); nothing is lost.') from e
  return str(done.commit_url)


def _hub():
  try:
    import huggingface_hub
  except ImportError as e:
    raise InputError(
      'push_to_hub needs huggingface_hub: pip install "relaxed-recursive-transformers[convert]".'
    ) from e
  return huggingface_hub
