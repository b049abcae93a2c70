"""Measuring layers: how long each takes, without leaving a trace in them."""
