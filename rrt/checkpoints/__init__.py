"""Checkpoints: reads Hugging Face, GGUF and native ones, writes the first and last.

Weights are read from safetensors and GGUF only; nothing is unpickled.
"""
