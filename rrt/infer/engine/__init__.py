"""The serving engine: continuous depth-wise batching.

`engine.py` is the host side, `step.py` the jitted step; `schedule.py` chooses
the tokens of a launch, `sampler.py` ends them, `speculate.py` drafts and
verifies, `state.py` is what lives on the device.
"""
