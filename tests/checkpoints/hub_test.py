"""Uploads to a hub that runs here, over HTTP."""

import base64
import http.server
import json
import threading

import pytest

from rrt.checkpoints import hub
from rrt.checkpoints.load import save
from rrt.checkpoints.save_hf import save_hf
from rrt.errors import InputError
from tests.convert import tiny

huggingface_hub = pytest.importorskip('huggingface_hub')


class Hub(http.server.ThreadingHTTPServer):
  """Keeps repositories in memory: id -> {path: bytes}."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.repos, self.private, self.allowed = {}, {}, 'secret'


class Handler(http.server.BaseHTTPRequestHandler):
  """The calls that creating a repository and one commit take."""

  def log_message(self, *_):
    pass

  def answer(self, fields, status=200):
    data = json.dumps(fields).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def do_GET(self):
    self.answer({'sha': '0' * 40, 'id': 'x', 'siblings': []})

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    if self.headers.get('Authorization') != f'Bearer {self.server.allowed}':
      self.answer({'error': 'Invalid username or password.'}, 401)
    elif self.path == '/api/repos/create':
      fields = json.loads(body)
      name = f'{fields.get("organization") or "someone"}/{fields["name"]}'
      self.server.repos.setdefault(name, {})
      self.server.private[name] = (
        fields.get('visibility') == 'private' or fields.get('private') is True
      )
      self.answer({'url': f'http://{self.headers["Host"]}/{name}'})
    elif self.path == '/api/validate-yaml':
      assert json.loads(body)['content'].startswith('---')
      self.answer({'errors': [], 'warnings': []})
    elif self.path.endswith('/preupload/main'):
      files = json.loads(body)['files']
      plain = {'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None}
      self.answer({'files': [{'path': f['path'], **plain} for f in files]})
    elif self.path.endswith('/commit/main'):
      name = '/'.join(self.path.split('/')[3:5])
      for line in body.splitlines():
        entry = json.loads(line)
        if entry['key'] == 'file':
          value = entry['value']
          self.server.repos[name][value['path']] = base64.b64decode(value['content'])
      url = f'http://{self.headers["Host"]}/{name}/commit/{"1" * 40}'
      self.answer({'commitUrl': url, 'commitOid': '1' * 40, 'success': True})
    else:
      self.answer({'error': self.path}, 404)


@pytest.fixture
def server(monkeypatch):
  hub_server = Hub()
  threading.Thread(target=hub_server.serve_forever, daemon=True).start()
  endpoint = f'http://127.0.0.1:{hub_server.server_address[1]}'
  made = huggingface_hub.HfApi
  monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: made(endpoint=endpoint, token='secret'))
  monkeypatch.setenv('HF_TOKEN', 'secret')
  yield hub_server
  hub_server.shutdown()


def files_of(folder):
  return {
    p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()
  }


@pytest.mark.parametrize('write', [save, save_hf])
def test_a_directory_arrives_as_it_is(write, server, tmp_path):
  write(tiny.parent(), tmp_path / 'model')
  where = hub.push_to_hub(tmp_path / 'model', 'someone/tiny', private=True)
  assert server.repos['someone/tiny'] == files_of(tmp_path / 'model')
  assert 'README.md' in server.repos['someone/tiny']
  assert server.private['someone/tiny'] is True
  assert where.endswith('/someone/tiny/commit/' + '1' * 40)


def test_a_gguf_file(server, tmp_path):
  pytest.importorskip('gguf')
  from rrt.checkpoints.save_gguf import save_gguf

  out = save_gguf(tiny.parent(), tmp_path / 'tiny.gguf')
  hub.push_to_hub(out, 'someone/tiny-gguf')
  assert server.repos['someone/tiny-gguf'] == {'tiny.gguf': out.read_bytes()}


def test_what_cannot_be_uploaded(server, tmp_path, monkeypatch):
  save(tiny.parent(), tmp_path / 'model')
  with pytest.raises(InputError, match='owner/name'):
    hub.push_to_hub(tmp_path / 'model', 'tiny')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other/notes.txt').write_text('mine')
  with pytest.raises(InputError, match='nothing was uploaded'):
    hub.push_to_hub(tmp_path / 'other', 'someone/tiny')
  server.allowed = 'another'
  with pytest.raises(InputError, match=r'someone/tiny cannot be written on the hub'):
    hub.push_to_hub(tmp_path / 'model', 'someone/tiny')
  monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
  with pytest.raises(InputError, match='no token'):
    hub.push_to_hub(tmp_path / 'model', 'someone/tiny')
  assert server.repos == {}
