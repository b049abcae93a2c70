"""Costs of a schedule, advice on which to choose, and pictures of planned and recorded runs, without torch."""
