"""The one model class: vanilla and recursive decoder-only transformers."""
