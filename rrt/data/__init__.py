"""Data loading: text sources, the grain pipeline, tokenizers and a built-in corpus."""
