"""A recursive transformer with tied weights, for PyTorch and transformers.

What the loops of the block share is held once; low-rank terms, gains, norms, biases and
the cache differ by loop. With `config.exit_threshold` a decoded token may leave the block
early: its state there then stands for those of the skipped loops, in their caches too.

B batch, L queries, S keys, D width, H heads, G kv groups, Dh head size, R loops.
"""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

FIELDS = CausalLMOutputWithPast.__dataclass_fields__
CACHE = 'cache' if 'cache' in FIELDS else 'past_key_values'  # Renamed in transformers 5.


class RrtConfig(PretrainedConfig):
  """Shape; frequencies of the rotary tables; terms (kind, {linear: rank}) of looped linears."""

  model_type = 'rrt'

  def __init__(self, shape=None, ropes=(), terms=(), exit_threshold=None, gate=None, **kwargs):
    self.shape, self.ropes, self.terms = shape or {}, list(ropes), list(terms)
    self.exit_threshold, self.gate = exit_threshold, gate
    kwargs['tie_word_embeddings'] = False  # The head reads the table itself.
    super().__init__(**kwargs)


def by_loop(value, loop):
  """A vector of all loops, or the loop's own of [R, D]."""
  return value if value is None or value.dim() == 1 else value[loop]


class Norm(nn.Module):
  """RMSNorm or LayerNorm, with one gain or one a loop."""

  def __init__(self, c, size, loops=0):
    super().__init__()
    self.c, shape = c, (loops, size) if loops else (size,)
    self.weight = nn.Parameter(torch.ones(shape))
    self.bias = nn.Parameter(torch.zeros(shape)) if c.norm == 'layer' else None

  def forward(self, x, loop=0):
    weight, x32 = by_loop(self.weight, loop), x.float()
    if self.c.norm == 'layer':
      bias = by_loop(self.bias, loop)
      return F.layer_norm(x32, x32.shape[-1:], weight.float(), bias.float(), self.c.norm_eps).to(x)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.c.norm_eps)
    return (x32 * (1 + weight.float())).to(x) if self.c.unit_offset_norm else x32.to(x) * weight


class Linear(nn.Linear):
  """A linear; in the block with low-rank terms and gains by loop."""

  def __init__(self, c, name, loops, terms):
    d_in, d_out = c.sizes[name]
    super().__init__(d_in, d_out, bias=False)
    shape = (loops, d_out) if loops and c.loop_norms else (d_out,)
    self.added = nn.Parameter(torch.zeros(shape)) if name in c.biases else None
    self.terms = [(kind, of[name]) for kind, of in terms if loops and name in of]
    for kind, rank in self.terms:
      if kind == 'low_rank':
        self.a = nn.Parameter(torch.zeros(loops, d_in, rank))
        self.b = nn.Parameter(torch.zeros(loops, rank, d_out))
      else:
        self.gain = nn.Parameter(torch.ones(loops, d_out))

  def forward(self, x, loop=0):
    y = F.linear(x, self.weight)
    for kind, _ in self.terms:
      y = y + (x @ self.a[loop]) @ self.b[loop] if kind == 'low_rank' else y * self.gain[loop]
    return y if self.added is None else y + by_loop(self.added, loop)


class Layer(nn.Module):
  """Attention and MLP."""

  def __init__(self, c, loops, terms):
    super().__init__()
    self.c, norm_loops = c, loops if c.loop_norms else 0
    self.linears = nn.ModuleDict({name: Linear(c, name, loops, terms) for name in c.sizes})
    self.norms = nn.ModuleDict({n: Norm(c, s, norm_loops) for n, s in c.norm_sizes.items()})

  def norm(self, name, x, loop):
    return self.norms[name](x, loop) if name in self.norms else x

  def heads(self, name, x, loop):
    """Queries, keys or values, normed where the model does so, [B, L, heads, Dh]."""
    y, norm = self.linears[name](x, loop), f'attn_{name}_norm'
    if self.c.qk_norm_all:
      y = self.norm(norm, y, loop)
    y = y.view(*y.shape[:2], -1, self.c.head_dim)
    return y if self.c.qk_norm_all else self.norm(norm, y, loop)

  def keys_values(self, x, loop, depth, context):
    """Caches keys (after RoPE) and values of x, and returns all, [B, G, S, Dh]."""
    k = rotate(self.heads('k', x, loop), *context.rope(depth)).transpose(1, 2)
    v = self.heads('v', x, loop).transpose(1, 2)
    return (k, v) if context.cache is None else context.cache.update(k, v, depth)

  def attention(self, x, loop, depth, context):
    c, mask = self.c, context.mask(depth)
    q = rotate(self.heads('q', x, loop), *context.rope(depth)).transpose(1, 2)
    k, v = self.keys_values(x, loop, depth, context)
    k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for t in (k, v))
    scale = c.query_scale or c.head_dim**-0.5
    if c.attn_softcap:
      scores = (q * scale).float() @ k.float().transpose(-1, -2)
      scores = c.attn_softcap * torch.tanh(scores / c.attn_softcap)
      o = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).to(v) @ v
    else:
      o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return self.linears['o'](o.transpose(1, 2).flatten(2), loop)

  def mlp(self, x, loop):
    exact = {'approximate': 'tanh'} if self.c.activation == 'gelu_tanh' else {}
    act = lambda t: F.silu(t) if self.c.activation == 'silu' else F.gelu(t, **exact)
    up = self.linears['up'](x, loop)
    hidden = act(self.linears['gate'](x, loop)) * up if self.c.gated else act(up)
    return self.linears['down'](hidden, loop)

  def forward(self, x, loop, depth, context):
    y = self.attention(self.norm('attn_norm', x, loop), loop, depth, context)
    after = x + self.norm('attn_post_norm', y, loop)
    y = self.mlp(self.norm('mlp_norm', x if self.c.parallel else after, loop), loop)
    return after + self.norm('mlp_post_norm', y, loop)


class Context:
  """The cache, and masks and rotary tables by depth."""

  def __init__(self, c, ropes, x, positions, keep, cache, past):
    self.c, self.cache, self.keep, self.masks, self.tables = c, cache, keep, {}, []
    self.queries = past + torch.arange(x.shape[1], device=x.device)
    for rope in ropes:
      frequency = torch.tensor(rope['frequencies'], dtype=torch.float32, device=x.device)
      angle = positions[..., None].float() * frequency
      self.tables.append((angle.cos() * rope['factor'], angle.sin() * rope['factor']))

  def rope(self, depth):
    return self.tables[self.c.rope_index[depth] if self.c.rope_index else 0]

  def mask(self, depth):
    """True where a query sees a key, [B or 1, 1, L, S]."""
    window = self.c.windows[depth] if self.c.windows else 0
    if window not in self.masks:
      i = self.queries[:, None]
      j = torch.arange(int(self.queries[-1]) + 1, device=i.device)[None, :]
      seen = ((j <= i) & (i - j < window) if window else j <= i)[None, None]
      if self.keep is not None:  # Padding sees itself, to keep its softmax finite.
        seen = seen & self.keep[:, None, None, : j.shape[1]].bool() | (i == j)
      self.masks[window] = seen
    return self.masks[window]


def rotate(x, cos, sin):
  """Rotates the halves of each head's first dimensions against each other."""
  size, cos, sin = 2 * cos.shape[-1], cos[:, :, None], sin[:, :, None]
  a, b = x[..., :size].float().chunk(2, -1)
  y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x)
  return torch.cat([y, x[..., size:]], -1)


class RrtForCausalLM(PreTrainedModel, GenerationMixin):
  """The model with its head."""

  config_class, _input_embed_layer = RrtConfig, 'embed'

  def __init__(self, config):
    super().__init__(config)
    c = self.c = SimpleNamespace(**config.shape)
    stack = lambda n, loops: nn.ModuleList([Layer(c, loops, config.terms) for _ in range(n)])
    self.embed = nn.Embedding(c.vocab_size, c.d_model)
    self.prelude, self.coda = stack(c.prelude_layers, 0), stack(c.coda_layers, 0)
    self.block, self.final_norm = stack(c.block_layers, c.loops), Norm(c, c.d_model)
    self.lm_head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)
    pairs = [(r, n) for r in range(c.loops) for n in range(c.block_layers)]
    pairs = pairs if c.order == 'cycle' else sorted(pairs, key=lambda pair: pair[::-1])
    # (layer, loop) by depth: the order in which they run.
    self.schedule = [(layer, 0) for layer in self.prelude]
    self.schedule += [(self.block[n], r) for r, n in pairs] + [(layer, 0) for layer in self.coda]
    self.post_init()

  def _init_weights(self, module):
    """Weights always come from a file."""

  def score(self, before, after, loop):
    """How sure a token is after a loop, [B, L]: by its gate, or by how little it changed."""
    unit, gate = lambda t: F.normalize(t.float(), dim=-1), self.config.gate
    if gate is None:
      return (unit(before) * unit(after)).sum(-1)
    kernel = torch.tensor(gate['kernel'][loop], device=after.device)
    read = unit(after) * math.sqrt(after.shape[-1])
    return torch.sigmoid((read * kernel).sum(-1) + gate['bias'][loop])

  def forward(
    self,
    input_ids,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    cache=None,
    use_cache=None,
    labels=None,
    logits_to_keep=0,
    **_,
  ):
    """Logits [B, L, V]; `cache`, earlier `past_key_values`, is a DynamicCache."""
    c, threshold, x = self.c, self.config.exit_threshold, self.embed(input_ids)
    if c.scale_embeddings:
      x = x * torch.tensor(c.d_model**0.5, dtype=x.dtype)
    cache = past_key_values if cache is None else cache
    cache = DynamicCache() if use_cache and cache is None else cache
    past = 0 if cache is None else cache.get_seq_length()
    if position_ids is None:
      position_ids = past + torch.arange(x.shape[1], device=x.device)[None]
    context = Context(c, self.config.ropes, x, position_ids, attention_mask, cache, past)
    exits = threshold is not None and c.order == 'cycle' and past > 0 and x.shape[1] == 1
    start, end = c.prelude_layers, len(self.schedule) - c.coda_layers
    left, before = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device), x
    self.loops_run = torch.full(x.shape[:2], c.loops, device=x.device)
    for depth, (layer, loop) in enumerate(self.schedule):
      may_leave = exits and start <= depth < end
      if may_leave and (depth - start) % c.block_layers == 0:
        before = x
      if may_leave and left.all():
        layer.keys_values(layer.norm('attn_norm', x, loop), loop, depth, context)
        continue
      y = layer(x, loop, depth, context)
      x = torch.where(left[..., None], x, y) if may_leave else y
      if may_leave and loop + 1 < c.loops and (depth + 1 - start) % c.block_layers == 0:
        goes = (self.score(before, x, loop) >= threshold) & ~left
        self.loops_run[goes] = loop + 1
        left = left | goes
    x = self.final_norm(x[:, -logits_to_keep:] if logits_to_keep else x)
    logits = F.linear(x, self.embed.weight if c.tie_embeddings else self.lm_head.weight).float()
    if c.final_softcap:
      logits = c.final_softcap * torch.tanh(logits / c.final_softcap)
    loss = None
    if labels is not None:
      loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
