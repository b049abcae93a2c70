"""Warnings of DeepSpeed that come where all is well; what ds_ddg starts itself (its command, recipes) drops them."""

from __future__ import annotations

import logging

from deepspeed.utils import logger

__all__ = ["HARMLESS", "drop_false_alarms"]

HARMLESS = ("Attempting to get learning rate from scheduler before it has started",)
"""Their texts. The constructors of DeepSpeed's own schedulers cause this one."""


def drop_false_alarms() -> None:
    """Leave the `HARMLESS` warnings out of what this process prints; every other one stays."""
    logger.addFilter(_no_false_alarm)


def _no_false_alarm(record: logging.LogRecord) -> bool:
    return record.getMessage() not in HARMLESS
