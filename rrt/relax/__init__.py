"""Relaxations: what a shared layer does differently in each loop.

`base.py` holds the contract that every relaxation keeps, `registry.py` their
names; each further file is a relaxation.
"""
