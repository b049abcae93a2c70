"""The four settings of the schedule: the weights that a delayed backward sees, and what waits for it."""

from __future__ import annotations

from itertools import product

MODES = list(product(("stash", "current"), ("keep", "recompute")))
"""Pairs of `weights` and `activations`."""

MODE_BLOCKS = [{"weights": weights, "activations": activations} for weights, activations in MODES]
"""The same modes as `ddg` blocks."""

DEFAULT = MODES[:1]
"""The mode of an empty block."""
