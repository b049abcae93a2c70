from __future__ import annotations

import pytest


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process the only rank."""
    monkeypatch.setattr("recipes.progress.dist.get_rank", lambda: 0)
    for module in ("common", "checkpoints"):
        monkeypatch.setattr(f"recipes.{module}.gather", lambda value: [value])
