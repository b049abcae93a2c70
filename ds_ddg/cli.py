"""The command line: see what a schedule does to speed, memory and staleness before renting the GPUs.

::

    python -m ds_ddg plan --stages 4 --micro-batches 6                         one schedule, as text or picture
    python -m ds_ddg simulate --stages 4,8 --micro-batches 1,4 --link 0,0.3    schedules compared under a cost model
    python -m ds_ddg partition model.py:layers --stages 4                      layers measured, and split into stages

Nothing here imports torch, so the answer comes at once; only `partition` does, when it has layers to measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

from .balance import LayerCost, balance, load, table
from .balance import save as save_profile
from .draw import clock, save, text
from .plan import DDGPlan, OneFOneBPlan, Plan
from .simulate import Cost, Timeline, replay

__all__ = ["main"]

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad arguments end with status 2 and a message, as in argparse."""
    parser = argparse.ArgumentParser(
        prog="ds-ddg", description="Decoupled delayed gradients for DeepSpeed pipelines: plan, simulate, partition."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_plan(commands.add_parser("plan", help="show one schedule: what each stage does, keeps and waits for"))
    _add_simulate(commands.add_parser("simulate", help="compare schedules under a cost model, over lists of settings"))
    _add_partition(commands.add_parser("partition", help="split layers into stages of equal time, as measured"))
    options = parser.parse_args(arguments)
    try:
        answer: str = options.run(options)
    except (ValueError, OSError) as error:
        print(f"ds-ddg: error: {error}", file=sys.stderr)
        return 2
    try:
        print(answer, flush=True)
    except BrokenPipeError:  # the reader has seen enough ("| head"), which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)
    parser.add_argument("--stages", type=int, required=True, metavar="K", help="pipeline stages")
    parser.add_argument("--micro-batches", type=int, default=1, metavar="M", help="micro-batches per call (default 1)")
    parser.add_argument("--slack", type=int, default=0, metavar="S", help="more micro-batches in flight per hop (ddg)")
    parser.add_argument("--schedule", choices=["ddg", "1f1b"], default="ddg")
    parser.add_argument("--calls", type=int, metavar="N", help="calls to show (default: up to the steady state)")
    parser.add_argument("--clock", action="store_true", help="on a common clock, so that the bubble shows")
    _add_output(parser)


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_simulate)
    lists = "; a list such as 1,4,16 gives a row each"
    parser.add_argument("--stages", type=_list_of(int), required=True, metavar="K", help="pipeline stages" + lists)
    parser.add_argument(
        "--micro-batches", type=_list_of(int), default=[1], metavar="M", help="micro-batches per call" + lists
    )
    parser.add_argument("--slack", type=_list_of(int), default=[0, 1], metavar="S", help="slack of ddg" + lists)
    parser.add_argument("--link", type=_list_of(float), default=[0.0], metavar="T", help="latency of a hop" + lists)
    parser.add_argument(
        "--forward", type=float, default=1.0, metavar="T", help="time of a stage's forward (default 1)"
    )
    parser.add_argument("--backward", type=float, default=2.0, metavar="T", help="... of its backward (default 2)")
    parser.add_argument("--update", type=float, default=0.0, metavar="T", help="... of its optimizer step (default 0)")
    parser.add_argument("--bytes", type=float, default=0.0, help="size of an activation between stages (default 0)")
    parser.add_argument("--bandwidth", type=float, default=float("inf"), help="bytes per unit of time of a hop")
    parser.add_argument(
        "--scale",
        type=_list_of(float),
        default=[],
        metavar="X,Y,..",
        help="relative time of each stage (default equal)",
    )
    _add_output(parser)


def _add_partition(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_partition)
    parser.add_argument(
        "source",
        metavar="FILE.py:FUNCTION|PROFILE.json",
        help="a function that returns (layers, sample) or (layers, sample, loss_fn), where sample is a micro-batch "
        "(inputs, labels); or what --out has written, which needs no torch",
    )
    parser.add_argument("--stages", type=int, required=True, metavar="K", help="pipeline stages")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--out", metavar="FILE", help="also write what was measured (.json), to split it again")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--out", metavar="FILE", help="also write a picture (.svg, .png) or a Perfetto trace (.json)")


def _plan(options: argparse.Namespace) -> str:
    plan: Plan
    if options.schedule == "ddg":
        plan = DDGPlan(options.stages, options.micro_batches, options.slack)
    elif options.slack:
        raise ValueError(
            f"--slack {options.slack} has no meaning for 1f1b, where no gradient is delayed; leave it out"
        )
    else:
        plan = OneFOneBPlan(options.stages, options.micro_batches)
    calls = _shown(plan) if options.calls is None else options.calls
    if calls < 1:
        raise ValueError(f"--calls must be 1 or more, got {calls}")
    shown = replay(plan, calls, drain=True)
    if options.out:
        save({_title(plan): shown}, options.out)
    stages = [
        {
            "stage": stage,
            "delay": plan.delay(stage),
            "staleness": plan.staleness(stage),
            "versions": plan.versions(stage),
            "activations": plan.activations(stage),
        }
        for stage in range(plan.num_stages)
    ]
    bubble = _settled(plan).bubble
    if options.json:
        streams = [[str(op) for op in plan.stream(stage, calls, drain=True)] for stage in range(plan.num_stages)]
        record = {"schedule": plan.name, "stages": plan.num_stages, "micro_batches": plan.micro_batches}
        return json.dumps({**record, "bubble": round(bubble, 6), "per_stage": stages, "operations": streams})
    picture = clock(shown) if options.clock else text(shown, updates=plan.micro_batches > 1)
    legend = "F forward, B backward, with the number of the micro-batch"
    legend += "; one column per forward time" if options.clock else "; * update" if plan.micro_batches > 1 else ""
    return "\n".join(
        [_title(plan), "", picture, legend, "", table(stages), "", f"bubble in steady state: {bubble:.1%}"]
    )


def _simulate(options: argparse.Namespace) -> str:
    records: list[Record] = []
    pictures: dict[str, Timeline] = {}
    for num_stages, m, link in product(options.stages, options.micro_batches, options.link):
        cost = Cost(options.forward, options.backward, options.update, link, options.bytes, options.bandwidth,
                    options.scale)  # fmt: skip
        plans = [OneFOneBPlan(num_stages, m), *(DDGPlan(num_stages, m, slack) for slack in options.slack)]
        for plan in plans:
            records.append(_record(plan, cost))
            if options.out:
                pictures[f"{_title(plan)}, link {link:g}"] = replay(plan, max(map(_shown, plans)), cost, drain=True)
    if options.out:
        save(pictures, options.out)
    if options.json:
        return json.dumps(records)
    note = "speedup: over one device; efficiency: share of the devices' time spent on work; activations: on stage 0"
    return "\n".join([table(records), "", note])


def _partition(options: argparse.Namespace) -> str:
    if options.stages < 1:
        raise ValueError(f"--stages must be 1 or more, got {options.stages}")
    if options.out and not options.out.endswith(".json"):
        raise ValueError(f"--out {options.out!r} must end in .json, to be read again")
    layers = load(options.source) if options.source.endswith(".json") else _measured(options.source)
    if options.out:
        save_profile(layers, options.out)
    found = balance(layers, options.stages)
    return json.dumps(found.record()) if options.json else str(found)


def _measured(source: str) -> list[LayerCost]:
    path, _, name = source.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"{source!r} is neither FILE.py:FUNCTION nor a saved profile, which ends in .json")
    # What DeepSpeed and the user's file print must not get between the lines of the answer.
    with redirect_stdout(sys.stderr):
        from .measure import profile

        answer = _function(path, name)()
        if not isinstance(answer, tuple) or len(answer) not in (2, 3):
            got = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
            raise ValueError(f"{source} must return (layers, sample) or (layers, sample, loss_fn), got {got}")
        return profile(*answer)


def _function(path: str, name: str) -> Callable[[], Any]:
    """`name` of the file `path`, which runs next to its own neighbours, as a script would."""
    # A name of our own: a file called queue.py must not take the place of the standard library's.
    spec = importlib.util.spec_from_file_location("__ds_ddg_partition__", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    function: Callable[[], Any] = getattr(module, name)
    return function


def _record(plan: Plan, cost: Cost) -> Record:
    timeline = _settled(plan, cost)
    period = timeline.period()
    # One device does the work of all stages, and waits for nobody.
    one_device = sum(timeline.busy(stage) for stage in range(plan.num_stages)) * period
    return {
        "stages": plan.num_stages,
        "micro_batches": plan.micro_batches,
        "link": cost.link,
        "schedule": plan.name,
        "slack": plan.slack if isinstance(plan, DDGPlan) else None,
        "time_per_call": round(period, 6),
        "speedup": round(one_device / period, 4),
        "efficiency": round(1 - timeline.bubble, 4),
        "staleness": plan.staleness(0),
        "versions": plan.versions(0),
        "activations": plan.activations(0),
    }


def _settled(plan: Plan, cost: Cost | None = None) -> Timeline:
    """A replay long enough for the steady state to be steady."""
    ticks = 6 * (plan.delay(0) + plan.num_stages)
    return replay(plan, max(8, -(-ticks // plan.micro_batches)), cost or Cost())


def _shown(plan: Plan) -> int:
    """Calls that show the pipeline filling and a few ticks of its steady state."""
    return max(1 + (plan.delay(0) == 0), -(-(plan.delay(0) + 3) // plan.micro_batches))


def _title(plan: Plan) -> str:
    slack = f", slack {plan.slack}" if isinstance(plan, DDGPlan) and plan.slack else ""
    return f"{plan.name}, K = {plan.num_stages} stages, M = {plan.micro_batches}{slack}"


def _list_of(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return [number(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number or a list such as 1,4,16") from None

    return parse
