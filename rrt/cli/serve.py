r"""Serves a model over HTTP, as OpenAI's clients expect.

rrt serve --model=gated --gate=stored --slots=16 --context=1024

Endpoints: /v1/completions, /v1/chat/completions (both also as a stream),
/v1/models, /health, /metrics, and a page to try it at /. It listens on this
machine alone unless --host says otherwise, which needs an API key. SIGTERM
lets the running requests end and takes no new ones. A connection whose client
sends no whole request within 30 s ends.
"""

import math
import os
from pathlib import Path
import signal
import socket

from rrt import command
from rrt.errors import InputError

FLAGS = command.Flags(
  "Serves a model over HTTP, with OpenAI's interface.",
  'rrt serve --model=gated --gate=stored \\\n    --slots=16 --context=1024',
)
_MODEL = FLAGS.needed.string('model', None, 'The model, as `rrt generate` takes it.')
_NAME = FLAGS.rare.string(
  'name', None, "The model's name for clients; the last part of --model by default."
)
_ADAPTER = FLAGS.usual.string(
  'adapter', None, "Directory of the model's task adapter (rrt.save_adapter)."
)
_HOST = FLAGS.usual.string('host', '127.0.0.1', 'Address to listen on.')
_PORT = FLAGS.usual.integer('port', 8000, 'Port; 0 takes a free one.')
_KEY_FILE = FLAGS.usual.string(
  'api_key_file', None, 'File with the API key that clients must send; or set RRT_API_KEY.'
)
_ORIGINS = FLAGS.rare.list(
  'allowed_origins', [], "Origins whose pages may call (CORS), such as https://a.example; '*' all."
)
_HOSTS = FLAGS.rare.list(
  'allowed_hosts',
  None,
  "Host names that clients may use; '*' all. By default all with an API key, and the names "
  'of this machine without one.',
)
_SLOTS = FLAGS.usual.integer('slots', 8, 'Maximum number of concurrent sequences.')
_CONTEXT = FLAGS.usual.integer(
  'context', None, "Maximum tokens of a sequence; by default 2048, or the model's if shorter."
)
_STEPS = FLAGS.rare.integer(
  'steps',
  None,
  'Block steps of one device call; by default 2 on a CPU, where fewer let new requests begin '
  'sooner, and 4 elsewhere.',
)
_GATE = FLAGS.usual.enum(
  'gate',
  'none',
  ['none', 'stored', 'change'],
  "Early exits: 'stored' is the gate that rrt fit-gate saved with the model.",
)
_THRESHOLD = FLAGS.usual.float(
  'threshold', None, 'Threshold of the gate; the calibrated one by default; 2 never exits early.'
)
_LANES = FLAGS.rare.integer(
  'max_batch_tokens', None, 'Maximum tokens of one block step; see rrt.infer.engine.config.'
)
_LOSSLESS = FLAGS.usual.bool(
  'lossless',
  False,
  'Self-speculative decoding: drafts from early loops and prompt lookup, verified '
  'at full depth; same text, faster with few sequences. With a gate, requests may '
  'set "lossless": false to exit early instead.',
)
_DTYPE = FLAGS.usual.enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Dtype of weights and computation.'
)
_WEIGHT_DTYPE = FLAGS.rare.enum(
  'weight_dtype',
  None,
  ['float32', 'bfloat16'],
  'Dtype that the weights are rounded to; none by default.',
)
_KV_DTYPE = FLAGS.rare.enum(
  'kv_dtype', None, ['float32', 'bfloat16', 'int8'], 'Dtype of the KV cache.'
)
_MAX_WAITING = FLAGS.rare.integer(
  'max_waiting', 64, 'Maximum requests waiting for a slot; more get status 429.'
)
_MAX_TOKENS = FLAGS.rare.integer('max_tokens', 4096, 'Maximum new tokens of a completion.')
_MAX_BODY = FLAGS.rare.integer('max_body', 1 << 20, 'Maximum bytes of a request body.')
_SECONDS = FLAGS.rare.float('seconds', 600.0, 'Maximum seconds for a response.')
_PREFILL = FLAGS.usual.integer(
  'prefill_tokens',
  512,
  'Tokens of prompts that are prefilled between two calls while sequences run; fewer '
  'keep streams smoother, more let new requests begin sooner.',
)
_WARM = FLAGS.rare.integer(
  'warm',
  None,
  'Compile prefill at start-up for prompts of up to so many tokens; by default all sizes. '
  'A first prompt of a larger size compiles on arrival, and all streams wait meanwhile.',
)
_LOG_REQUESTS = FLAGS.rare.bool(
  'log_requests', False, 'Log method, path and status of each request.'
)

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
_SPARE = 256  # Requests beside those that the engine has room for: refusals with a reason.


def read_key(path: str | None) -> str | None:
  """The API key from a file or the environment; None if none is set.

  Raises:
    InputError: the file cannot be read, or the key is empty.
  """
  key = os.environ.get('RRT_API_KEY')
  if path is not None:
    try:
      key = Path(path).read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError) as e:
      raise InputError(f'api_key_file={path!r}: cannot be read ({e}).') from e
  if key is not None and not key.strip():
    raise InputError('The API key is empty.')
  return key.strip() if key else None


def check_ranges() -> None:
  """Raises InputError for flags out of range."""
  for flag, least, most in (
    (_PORT, 0, 65535),
    (_MAX_WAITING, 0, 10**6),
    (_MAX_TOKENS, 1, math.inf),
    (_MAX_BODY, 1, math.inf),
    (_SECONDS, 1, 10**6),
    (_WARM, 0, math.inf),
    (_PREFILL, 1, math.inf),
    (_CONTEXT, 2, math.inf),
    (_SLOTS, 1, 10**6),
    (_STEPS, 1, 10**6),
  ):
    if flag.value is not None and not least <= flag.value <= most:
      bounds = f'{least} to {most}' if most < math.inf else f'{least} or more'
      raise InputError(f'--{flag.name}={flag.value}: must be {bounds}.')


def main(argv) -> None:
  """Binds, loads, compiles, listens."""
  del argv
  if not _MODEL.value:
    raise InputError('--model is missing; try --model=smollm2-135m.')
  check_ranges()
  if _THRESHOLD.value is not None and not math.isfinite(_THRESHOLD.value):
    raise InputError(f'--threshold={_THRESHOLD.value}: must be a finite number; 2 never exits.')
  command.check_effect(_THRESHOLD, _GATE.value != 'none', '--gate')
  key = read_key(_KEY_FILE.value)
  if _HOST.value not in LOOPBACK and key is None:
    raise InputError(
      f'--host={_HOST.value}: other machines may call; give them a key with '
      '--api_key_file or RRT_API_KEY.'
    )
  import jax

  # Prefills and calls that run at once wait for each other's threads, and on few cores may
  # wait for ever. One after the other they are as fast.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  from rrt.checkpoints.load import load
  from rrt.infer.engine.config import EngineConfig
  from rrt.infer.engine.engine import Engine
  from rrt.server.app import Limits, Server
  from rrt.server.connection import http_server
  from rrt.server.gatekeeper import Rules
  from rrt.server.listen import bind
  from rrt.server.worker import Worker

  sock = bind(_HOST.value, _PORT.value, _SECONDS.value)
  model = load(_MODEL.value, adapter=_ADAPTER.value)
  if model.tokenizer is None:
    raise InputError('The model has no tokenizer, so it cannot be served.')
  if _GATE.value == 'change' and _THRESHOLD.value is None:
    raise InputError('--gate=change needs a --threshold.')
  options = EngineConfig(
    slots=_SLOTS.value,
    context=_CONTEXT.value or min(2048, model.config.max_context),
    gate=_GATE.value,
    lossless=_LOSSLESS.value,
    max_batch_tokens=_LANES.value,
    steps=_STEPS.value or (2 if jax.default_backend() == 'cpu' else 4),
    prefill_tokens=_PREFILL.value,
    weight_dtype=_WEIGHT_DTYPE.value,
    kv='propagate' if _GATE.value == 'change' else 'full',
    threshold=_THRESHOLD.value,
    dtype=_DTYPE.value,
    kv_dtype=_KV_DTYPE.value,
    penalties=True,
    masks=True,
    logprobs=20,
  )
  engine = Engine(model, options)
  print('compiling ...', flush=True)
  engine.warm(_WARM.value)
  name = _NAME.value or Path(_MODEL.value).name
  worker = Worker(engine, model.tokenizer, _MAX_WAITING.value, name)
  limits = Limits(_MAX_BODY.value, max_tokens=_MAX_TOKENS.value, seconds=_SECONDS.value)
  hosts = _HOSTS.value or (['*'] if key else [*LOOPBACK, _HOST.value])
  rules = Rules(options.slots + _MAX_WAITING.value + _SPARE, tuple(_ORIGINS.value), tuple(hosts))
  server = Server(worker, model.tokenizer, name, limits, key, rules)
  places = options.slots + _MAX_WAITING.value
  http = http_server(server.app(), places, _SECONDS.value, _LOG_REQUESTS.value)
  try:
    run(http, sock, name)
  finally:
    worker.stop()  # A second Ctrl-C skips the application's own end.


def run(server, sock: socket.socket, name: str) -> None:
  """Listens until SIGTERM or SIGINT, and prints the address."""
  host, port = sock.getsockname()[:2]
  try:
    sock.listen()  # Who reads the address below may call at once.
  except OSError as e:  # Another took the port at the same time.
    raise InputError(f'--host={host} --port={port}: not free ({e}).') from e
  print(f'{name} at http://{host}:{port}/', flush=True)
  # uvicorn lets the running requests end, then raises the signal once more.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
  server.run(sockets=[sock])
  if not server.started:
    raise InputError(f'--port={port}: the server could not start.')
