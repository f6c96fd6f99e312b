"""Text in, batches out: sources, the grain pipeline, tokenizers, a corpus."""
