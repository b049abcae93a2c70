"""Optimizer steps that take the age of their gradients into account; ``rules.py`` has the formulas."""
