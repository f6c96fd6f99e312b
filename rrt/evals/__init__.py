"""Evaluation: cross-entropy of text, few-shot tasks, early-exit curves."""
