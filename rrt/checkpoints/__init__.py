"""Checkpoints: reading Hugging Face, GGUF and native ones, writing two kinds.

Weights are read from safetensors and GGUF only; nothing is ever unpickled.
"""
