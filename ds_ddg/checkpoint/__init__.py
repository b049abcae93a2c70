"""Saving and loading, on all ranks or on none."""
