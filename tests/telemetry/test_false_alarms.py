"""DeepSpeed's warnings where all is well: left out of what ds_ddg starts itself, and no others with them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from deepspeed.utils import logger

from ds_ddg.telemetry.false_alarms import HARMLESS, drop_false_alarms
from helpers.paths import ROOT


def test_only_the_known_alarm_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "filters", [])
    drop_false_alarms()
    drop_false_alarms()
    assert len(logger.filters) == 1
    shown = [
        text
        for text in (*HARMLESS, "Attempting to get something else", "a loss of nan")
        if logger.filter(logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, text, (), None))
    ]
    assert shown == ["Attempting to get something else", "a loss of nan"]


def test_the_check_of_a_good_config_raises_no_alarm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ds_ddg", "check", "configs/resnet20_digits.json", "--stages", "2"],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
