"""Makes the golden files: tiny random Hugging Face models and their logits.

python tests/golden/make.py

Needs torch and transformers (`pip install -e ".[parity]"`); the tests that
read the files need neither. Sizes are odd on purpose, norm gains are
perturbed (an untouched gain of 1 hides a loader that forgets it), and
windows are shorter than the sequences.
"""

from pathlib import Path
import sys
import zlib

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
LENGTH = 24

MODELS = {
  'llama3': transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=38,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={
      'rope_type': 'llama3',
      'rope_theta': 500.0,
      'factor': 4.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 16,
    },
  ),
  'mistral': transformers.MistralConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    sliding_window=5,
    rope_parameters={'rope_type': 'default', 'rope_theta': 10_000.0},
  ),
  'llama_biases': transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_bias=True,
    mlp_bias=True,
    rope_parameters={'rope_type': 'default', 'rope_theta': 10_000.0},
  ),
  'qwen2': transformers.Qwen2Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=38,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    use_sliding_window=True,
    sliding_window=5,
    max_window_layers=2,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
  ),
  'qwen3': transformers.Qwen3Config(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=26,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
  ),
  'mixtral': transformers.MixtralConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=14,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=7,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
  ),
  'qwen2_moe': transformers.Qwen2MoeConfig(
    vocab_size=61,
    hidden_size=24,
    moe_intermediate_size=10,
    shared_expert_intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts=5,
    num_experts_per_tok=2,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
  ),
  'qwen3_moe': transformers.Qwen3MoeConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=26,
    moe_intermediate_size=10,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=6,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    tie_word_embeddings=False,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
  ),
  'qwen3_moe_unnormalised': transformers.Qwen3MoeConfig(
    vocab_size=61,
    hidden_size=20,
    moe_intermediate_size=10,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=6,
    num_experts_per_tok=3,
    norm_topk_prob=False,
    tie_word_embeddings=True,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
  ),
  'gemma': transformers.GemmaConfig(
    vocab_size=61,
    hidden_size=18,
    intermediate_size=30,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
  ),
  'gemma2': transformers.Gemma2Config(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=26,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    query_pre_attn_scalar=7,
    sliding_window=4,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
  ),
  'yarn': transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=38,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rope_parameters={
      'rope_type': 'yarn',
      'rope_theta': 100.0,
      'factor': 4.0,
      'original_max_position_embeddings': 16,
      'beta_fast': 2.0,
    },
  ),
  'smollm3': transformers.SmolLM3Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=38,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    no_rope_layers=[1, 0, 1, 0],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
  ),
  'longrope': transformers.Phi3Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    original_max_position_embeddings=24,
    partial_rotary_factor=0.75,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
    sliding_window=None,
    rope_parameters={
      'rope_type': 'longrope',
      'rope_theta': 500.0,
      'partial_rotary_factor': 0.75,
      'original_max_position_embeddings': 24,
      'short_factor': [1.0, 1.1, 1.3],
      'long_factor': [1.2, 2.5, 4.0],
    },
  ),
  'dynamic': transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=24,
    rope_parameters={'rope_type': 'dynamic', 'rope_theta': 500.0, 'factor': 4.0},
  ),
  'phi3': transformers.Phi3Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=38,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    original_max_position_embeddings=64,
    rope_parameters={'rope_type': 'default', 'rope_theta': 10_000.0, 'partial_rotary_factor': 0.5},
    sliding_window=7,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
  ),
  'olmo2': transformers.Olmo2Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=38,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=2,
  ),
  'pythia': transformers.GPTNeoXConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=38,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    rope_parameters={'rope_type': 'default', 'rope_theta': 10_000.0, 'partial_rotary_factor': 0.25},
    bos_token_id=1,
    eos_token_id=2,
  ),
  'gemma3': transformers.Gemma3TextConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=26,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    query_pre_attn_scalar=7,
    sliding_window=4,
    layer_types=['sliding_attention', 'sliding_attention', 'full_attention'] * 2,
    rope_parameters={
      'full_attention': {'rope_type': 'linear', 'rope_theta': 1_000_000.0, 'factor': 8.0},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000.0},
    },
  ),
}


def random_model(config, seed: int) -> torch.nn.Module:
  """A model of a config whose every weight matters, in float32."""
  torch.manual_seed(seed)
  config._attn_implementation = config._experts_implementation = 'eager'
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim == 1:
        weight.add_(0.3 * torch.randn_like(weight))
      elif 'embed_tokens' in name:
        weight.copy_(0.5 * torch.randn_like(weight))
      else:
        weight.copy_(weight.shape[1] ** -0.5 * torch.randn_like(weight))
  return model


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
  """Logits of int tokens [B, L], float32 [B, L, V]."""
  with torch.no_grad():
    return model(torch.from_numpy(tokens)).logits.float().numpy()


def main() -> None:
  for name, config in MODELS.items():
    if (HERE / name).is_dir():  # Remove it to make it anew.
      continue
    seed = zlib.crc32(name.encode())
    model = random_model(config, seed)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (2, LENGTH))
    model.save_pretrained(HERE / name)
    (HERE / name / 'generation_config.json').unlink(missing_ok=True)
    np.savez_compressed(
      HERE / name / 'logits.npz', tokens=tokens.astype(np.int32), logits=logits_of(model, tokens)
    )
    print(name, model.num_parameters(), 'parameters', file=sys.stderr)


if __name__ == '__main__':
  main()
