"""Relaxations: what a shared layer does differently in each loop.

Every relaxation answers one call, `relax(x, loop)`, where `loop` is a scalar
(training, prefill: all rows are in the same loop) or one index per row
(depth-wise batching). Rows never mix.
"""
