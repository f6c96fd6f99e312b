"""How good a model is: cross-entropy of text, and few-shot tasks."""
