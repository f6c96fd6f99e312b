"""Google Cloud Storage on the local disk: what tensorstore and fsspec need of it.

Objects are files of a directory, `bucket/name`. `serve` answers tensorstore over HTTP;
`register` makes fsspec read and write the same files under gs://.
"""

import contextlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import sys
import threading
import types
from urllib.parse import parse_qs, unquote, urlparse

import fsspec
from fsspec.implementations.local import LocalFileSystem


class _Handler(BaseHTTPRequestHandler):
  root: Path

  def log_message(self, *_):
    pass

  def _answer(self, status, body=b'', headers=()):
    self.send_response(status)
    for name, value in headers:
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _asked(self):
    """(bucket's directory, object's name or '', query)."""
    url = urlparse(self.path)
    _, _, rest = url.path.partition('/b/')
    bucket, _, name = rest.partition('/o')
    return self.root / bucket, unquote(name.lstrip('/')), parse_qs(url.query)

  def _about(self, file, bucket):
    generation = str(file.stat().st_mtime_ns)
    return {
      'name': str(file.relative_to(bucket)),
      'generation': generation,
      'size': str(file.stat().st_size),
    }

  def do_GET(self):
    bucket, name, query = self._asked()
    if not name:
      prefix = query.get('prefix', [''])[0]
      files = sorted(p for p in bucket.rglob('*') if p.is_file())
      found = [self._about(p, bucket) for p in files]
      found = [item for item in found if item['name'].startswith(prefix)]
      return self._answer(200, json.dumps({'items': found}).encode())
    file = bucket / name
    if not file.is_file():
      return self._answer(404)
    data, generation = file.read_bytes(), str(file.stat().st_mtime_ns)
    headers = [('x-goog-generation', generation)]
    asked = self.headers.get('Range')
    if asked:
      first, _, last = asked.removeprefix('bytes=').partition('-')
      size = len(data)
      start, end = (int(first), int(last or size - 1)) if first else (size - int(last), size - 1)
      headers.append(('Content-Range', f'bytes {start}-{min(end, size - 1)}/{size}'))
      return self._answer(206, data[start : end + 1], headers)
    return self._answer(200, data, headers)

  def do_POST(self):
    bucket, _, query = self._asked()
    file = bucket / query['name'][0]
    data = self.rfile.read(int(self.headers['Content-Length']))
    if '0' in query.get('ifGenerationMatch', ()) and file.exists():
      return self._answer(412)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return self._answer(200, json.dumps(self._about(file, bucket)).encode())

  def do_DELETE(self):
    bucket, name, _ = self._asked()
    (bucket / name).unlink(missing_ok=True)
    return self._answer(204)


@contextlib.contextmanager
def serve(root: Path):
  """Yields the environment in which a process finds the buckets of `root`."""
  handler = type('Handler', (_Handler,), {'root': root})
  server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield {
      'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{server.server_port}',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'RRT_TEST_BUCKETS': str(root),
    }
  finally:
    server.shutdown()


def register(root: Path) -> None:
  """Makes fsspec's gs:// the buckets of `root`."""

  class Buckets(LocalFileSystem):
    protocol = ('gs', 'gcs')

    def __init__(self, *args, **kwargs):
      kwargs.pop('finalize_on_close', None)
      super().__init__(*args, auto_mkdir=True, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
      # What it lists are paths of the disk, which come back as gs:// ones.
      path = str(path).removeprefix('gs://').lstrip('/')
      path = path.removeprefix(str(root).lstrip('/')).lstrip('/')
      return f'{root}/{path}'.rstrip('/')

  for name in Buckets.protocol:
    fsspec.register_implementation(name, Buckets, clobber=True)
  _stub_google_cloud()


def _stub_google_cloud() -> None:
  """A `google.cloud.storage` that knows buckets alone: orbax asks what kind they are."""
  storage = types.ModuleType('google.cloud.storage')
  storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: object())
  cloud = sys.modules.setdefault('google.cloud', types.ModuleType('google.cloud'))
  cloud.storage = storage
  sys.modules['google.cloud.storage'] = storage
