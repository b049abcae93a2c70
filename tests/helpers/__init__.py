"""Helpers that test modules share; ranks import them by name, as they import test modules."""
