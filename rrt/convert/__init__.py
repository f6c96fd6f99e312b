"""Converts vanilla models into relaxed recursive ones."""
