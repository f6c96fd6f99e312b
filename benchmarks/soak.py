"""Ten minutes of unkind clients against the server.

    python -m benchmarks.soak --model=runs/smollm2_10x3 --minutes=10

Starts `rrt serve` and 64 clients that ask, greedily and in streams,
for texts whose tokens are known; hang up in the middle; send broken, huge and
over-long requests; and look at /health all the while. Reported: wrong texts
(none may be), answers by status, the memory of the server's process over the
time, and how long /health took. A run that finds a wrong text, an unexpected
status, a request that still runs when all clients have gone, memory that grew
by 5 %, a /health of 100 ms at the 99th percentile, or a dead server, ends with
status 1.

    python -m benchmarks.soak --model=demo/model --clients=8 --slots=12 --context=1024 \
        --calm --long_every=1 --minutes=2 --out=benchmarks/results/long_prompts.json

mixes long prompts into streams: how long a stream waits for its next tokens, and a long
prompt for its first one, beside the same prompt on an idle server. `--root=DIR` runs the
server of another clone.
"""

import collections
import concurrent.futures
import functools
import http.client
import itertools
import json
import math
import os
from pathlib import Path
import random
import subprocess
import sys
import threading
import time

from absl import flags
import numpy as np

from benchmarks import common
from rrt import command, console
from rrt.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'As rrt serve takes it.')
flags.DEFINE_float('minutes', 10.0, 'How long.')
flags.DEFINE_integer('clients', 64, 'At once.')
flags.DEFINE_integer('slots', 16, 'Of the server.')
flags.DEFINE_integer('context', 256, 'Of the server.')
flags.DEFINE_list('serve', [], 'Further flags of rrt serve.')
flags.DEFINE_bool(
  'early',
  False,
  'Half of the requests take the exits of the gate kept with the model; for '
  '--serve=--gate=stored,--lossless.',
)
flags.DEFINE_bool('calm', False, 'Clients only read streams to their end.')
flags.DEFINE_float('long_every', 0.0, 'Seconds between long prompts; 0 for none.')
flags.DEFINE_integer('long_tokens', 900, 'Tokens of a long prompt.')
flags.DEFINE_string('root', '', "Another clone, whose server is measured with this one's clients.")
flags.DEFINE_string('out', 'benchmarks/results/soak.json', 'JSON file.')

_PROMPTS = (
  'The sea is',
  'Once upon a time',
  'In 1912 the city',
  'A good teacher',
  'The first rule of',
  'Water boils when',
  'My grandmother used to',
  'The committee decided',
  'Light travels',
  'Nobody expected the',
)
_LENGTHS = (8, 17, 33, 64)
_BAD = (
  (b'{', 400),
  (b'\xff\xfe{}', 400),
  (b'[]', 400),
  (b'{"prompt": ""}', 400),
  (b'{"prompt": "a", "max_tokens": -1}', 400),
  (b'{"prompt": "a", "temperature": NaN}', 400),
  (b'{"prompt": [999999999]}', 400),
  (b'{"prompt": "a", "model": "other"}', 404),
  (b'{"prompt": "' + b'word ' * 2000 + b'"}', 400),
  (b'{"prompt": "' + b'x' * (1 << 21) + b'"}', 413),
  (b'[' * 100_000, 400),
)


class Server:
  """`rrt serve` in a process of its own."""

  def __init__(self):
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'rrt',
        'serve',
        f'--model={Path(FLAGS.model).absolute()}',
        '--port=0',
        f'--slots={FLAGS.slots}',
        f'--context={FLAGS.context}',
        *FLAGS.serve,
      ],
      stdout=subprocess.PIPE,
      text=True,
      cwd=FLAGS.root or None,
      env=os.environ | ({'PYTHONPATH': FLAGS.root} if FLAGS.root else {}),
    )
    assert self.process.stdout is not None
    for line in self.process.stdout:
      if ' at http://' in line:
        self.port = int(line.rstrip().rstrip('/').rsplit(':', 1)[1])
        break
    else:
      raise InputError('The server did not start.')

  def rss(self) -> int:
    """Bytes of its memory."""
    fields = Path(f'/proc/{self.process.pid}/statm').read_text().split()
    return int(fields[1]) * 4096

  def ask(self, method: str, path: str, body: bytes | None = None):
    """(status, response, connection)."""
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=300)
    kind = {'Content-Type': 'application/json'} if body else {}
    connection.request(method, path, body, kind)
    answer = connection.getresponse()
    return answer.status, answer, connection


Key = tuple[str, int, bool]  # Prompt, new tokens, whether exits are taken.


class Client:
  """One client; what it saw."""

  def __init__(self, server: Server, seed: int):
    self.server, self.random = server, random.Random(seed)
    self.seen: collections.Counter[str] = collections.Counter()
    self.texts: dict[Key, set[str]] = collections.defaultdict(set)
    self.gaps: list[float] = []  # Seconds between the events of a stream.

  def run(self, until: float) -> None:
    """Asks until the time comes."""
    while time.monotonic() < until:
      draw = self.random.random()
      if FLAGS.calm:
        self.complete(stream=True)
      elif draw < 0.15:
        self.bad()
      elif draw < 0.35:
        self.leave()
      else:
        self.complete(stream=draw < 0.7)

  def body(self, stream: bool) -> tuple[Key, bytes]:
    """A request, and what names its answer."""
    early = FLAGS.early and self.random.random() < 0.5
    length = _LENGTHS[-1] if FLAGS.calm else self.random.choice(_LENGTHS)
    key = self.random.choice(_PROMPTS), length, early
    asked: dict = {
      'prompt': key[0],
      'max_tokens': key[1],
      'temperature': 0,
      'stream': stream,
      'ignore_eos': True,
    }
    if FLAGS.early:
      asked['lossless'] = not early
    return key, json.dumps(asked).encode()

  def count(self, what: str, status: int) -> bool:
    """Counts an answer; whether it was good. Waits after a 429."""
    self.seen[f'{what} {status}'] += 1
    if status == 429:
      time.sleep(self.random.uniform(0.5, 1.5))
    return status == 200

  def complete(self, stream: bool) -> None:
    """A whole answer."""
    key, body = self.body(stream)
    status, answer, link = self.server.ask('POST', '/v1/completions', body)
    raw, times = read_events(answer)
    if stream:
      self.gaps += np.diff(times).tolist()
    link.close()
    if not self.count('stream' if stream else 'whole', status):
      return
    if not stream:
      text = json.loads(raw)['choices'][0]['text']
    else:
      events = [e[6:] for e in raw.split('\n\n') if e]
      if events[-1] != '[DONE]' or '"choices"' not in raw:
        self.seen['broken stream'] += 1
        return
      text = ''.join(c['text'] for e in events[:-1] for c in json.loads(e)['choices'])
    self.texts[key].add(text)

  def leave(self) -> None:
    """Hangs up in the middle of a stream, or before its first byte."""
    _, body = self.body(stream=True)
    status, answer, link = self.server.ask('POST', '/v1/completions', body)
    if self.count('left', status):
      answer.read(self.random.choice((0, 1, 300)))
    link.close()

  def bad(self) -> None:
    """Something that must be refused."""
    body, want = self.random.choice(_BAD)
    try:
      status, answer, link = self.server.ask('POST', '/v1/completions', body)
      answer.read()
      link.close()
    except (ConnectionError, http.client.HTTPException):
      # It answers a huge body before it has read it, and closes.
      status = want if want == 413 else 0
    self.seen[f'bad {status}' if status == want else f'WRONG {status}'] += 1


def read_events(answer) -> tuple[str, list[float]]:
  """The body, and when each event of it came."""
  parts, times = [], []
  while line := answer.readline():
    parts.append(line)
    if line.startswith(b'data: {'):
      times.append(time.perf_counter())
  return b''.join(parts).decode(), times


def first_token(server: Server, seed: int) -> float | None:
  """Seconds to the first token of a long prompt; None if it was refused."""
  ids = np.random.default_rng(seed).integers(5, 256, FLAGS.long_tokens).tolist()
  asked = {'prompt': ids, 'max_tokens': 4, 'temperature': 0, 'stream': True, 'ignore_eos': True}
  began = time.perf_counter()
  status, answer, link = server.ask('POST', '/v1/completions', json.dumps(asked).encode())
  _, times = read_events(answer)
  link.close()
  return times[0] - began if status == 200 else None


def send_long(server: Server, until: float, found: list[float | None]) -> None:
  """Sends a long prompt every `long_every` seconds, whatever became of those before."""
  threads = []
  for seed in itertools.count(100):
    if time.monotonic() >= until:
      break
    job = threading.Thread(target=lambda s=seed: found.append(first_token(server, s)))
    job.start()
    threads.append(job)
    time.sleep(FLAGS.long_every)
  for thread in threads:
    thread.join()


def main(_):
  if not FLAGS.model:
    raise InputError('--model is missing.')
  from rrt.checkpoints.load import load
  from rrt.infer import generate
  from rrt.infer.engine.engine import Engine

  want = {}
  model = load(FLAGS.model)
  write: dict = {False: functools.partial(generate.complete, model)}
  if FLAGS.early:
    write[True] = Engine(model, gate='stored', context=FLAGS.context).generate
  for early, complete in write.items():
    for length in _LENGTHS:
      done = complete(list(_PROMPTS), max_new_tokens=length, ignore_eos=True)
      for prompt, one in zip(_PROMPTS, done, strict=True):
        want[prompt, length, early] = one.text
  del model, write
  server = Server()
  clients = [Client(server, seed) for seed in range(FLAGS.clients)]
  until = time.monotonic() + 60 * FLAGS.minutes
  memory, health = [], []
  long: list[float | None] = []
  alone: list[float] = []
  single: float | None = None
  if FLAGS.long_every:
    first_token(server, 0)  # What is compiled on arrival is not counted.
    alone = [first_token(server, seed) or 0.0 for seed in (1, 2, 3)]
  stop = threading.Event()

  def look():
    while not stop.is_set():
      began = time.perf_counter()
      status, answer, link = server.ask('GET', '/health')
      answer.read()
      link.close()
      if status != 200:
        raise RuntimeError(f'/health: {status}')
      health.append(time.perf_counter() - began)
      memory.append(server.rss())
      stop.wait(0.5)

  with concurrent.futures.ThreadPoolExecutor(FLAGS.clients + 2) as pool:
    looks = pool.submit(look)
    if FLAGS.long_every:
      # Single long prompts among the streams, then one after the other.
      streams = [pool.submit(c.run, time.monotonic() + 30) for c in clients]
      singles = []
      for seed in range(4, 9):
        time.sleep(2)
        singles.append(first_token(server, seed) or math.nan)
      single = float(np.median(singles))
      for job in streams:
        job.result()
      for c in clients:
        c.gaps.clear()
      until = time.monotonic() + 60 * FLAGS.minutes
      pool.submit(send_long, server, until, long)
    for job in [pool.submit(c.run, until) for c in clients]:
      job.result()
    stop.set()
    looks.result()
  status, answer, link = server.ask('GET', '/metrics')
  running = [
    line
    for line in answer.read().decode().splitlines()
    if line.startswith(('vllm:num_requests_running', 'vllm:num_requests_wait'))
  ]
  link.close()
  server.process.terminate()
  ended = server.process.wait(60)

  seen = sum((c.seen for c in clients), collections.Counter())
  wrong = [key for c in clients for key, texts in c.texts.items() if texts != {want[key]}]
  checked = sum(v for k, v in seen.items() if k in ('whole 200', 'stream 200'))
  # The first tenth fills caches and pools.
  settled = memory[len(memory) // 10 :]
  tenth = max(len(settled) // 10, 1)
  growth = float(np.mean(settled[-tenth:]) / np.mean(settled[:tenth]) - 1)
  figures = {
    'machine': common.machine(1),
    'minutes': FLAGS.minutes,
    'clients': FLAGS.clients,
    'slots': FLAGS.slots,
    'model': FLAGS.model,
    'answers': dict(sorted(seen.items())),
    'texts_checked': checked,
    'wrong_texts': len(wrong),
    'rss_start': settled[0],
    'rss_end': settled[-1],
    'rss_growth': growth,
    'health_p50': float(np.percentile(health, 50)),
    'health_p99': float(np.percentile(health, 99)),
    'left_running': running,
    'exit_status': ended,
  }
  if FLAGS.long_every:
    gaps = np.concatenate([c.gaps for c in clients])
    median, high = np.percentile(gaps, (50, 99))
    alone_s = float(np.median(alone))
    figures |= {
      'root': 'another clone' if FLAGS.root else 'this',
      'gap_p50': float(median),
      'gap_p99': float(high),
      'gap_max': float(gaps.max()),
      'gap_p99_over_p50': float(high / median),
      'gap_target': 2.5,
      'first_token_alone': alone_s,
      'first_token_among_streams': single,
      'first_token_ratio': single and single / alone_s,
      'first_token_target': 1.3,
      'long_prompts': len(long),
      'long_refused': sum(t is None for t in long),
    }
    print(
      f'streams wait {median:.3f} s for their next tokens (p99 {high:.3f}, {high / median:.1f} '
      f'times; at most {gaps.max():.3f}); a long prompt {alone_s:.2f} s for its first one '
      f'alone, {single or math.nan:.2f} s among streams'
    )
  console.table(sorted(seen.items()), ('answer', 'times'))
  print(
    f'{checked} texts checked, {len(wrong)} wrong; memory '
    f'{settled[0] / 2**20:.0f} to {settled[-1] / 2**20:.0f} MiB '
    f'({100 * growth:+.1f} %); /health p99 '
    f'{1000 * figures["health_p99"]:.0f} ms'
  )
  common.save(FLAGS.out, figures)
  console.finish(figures)
  asked = ('whole', 'stream', 'left')
  bad = [
    k
    for k in seen
    if k.startswith(('WRONG', 'broken'))
    or (k.startswith(asked) and not k.endswith((' 200', ' 429')))
  ]
  bad += [line for line in running if not line.endswith((' 0', ' 0.0'))]
  slow = figures['health_p99'] >= 0.1 or growth >= 0.05
  if wrong or bad or ended or slow:
    raise SystemExit(1)


if __name__ == '__main__':
  command.run(main)
