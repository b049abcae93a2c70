"""Schedules as plain data, and their replay under a cost model, without torch: start with ``ddg.py``."""
