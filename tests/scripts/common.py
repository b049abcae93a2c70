"""What the scripts beside this file share; they import it as scripts import their neighbours."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

import deepspeed
import torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", default=None)
    return deepspeed.add_config_arguments(parser).parse_args()


def start() -> int:
    """Set up the processes; returns how many there are. One stage is on each."""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    torch.manual_seed(1)
    return torch.distributed.get_world_size()


def report(engine: Any, losses: list[float], **more: Any) -> None:
    """One line of JSON per rank."""
    line = {
        "rank": torch.distributed.get_rank(),
        "argv": sys.argv,
        "engine": type(engine).__name__,
        "global_steps": engine.global_steps,
        "losses": losses,
        "finite": all(map(math.isfinite, losses)),
        **more,
    }
    print("\n" + json.dumps(line), flush=True)
