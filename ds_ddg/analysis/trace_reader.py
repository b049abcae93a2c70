"""The record of a run: what its ranks wrote (``"ddg": {"trace": DIR}``), on one clock, and the reason of each gap.

**The common clock.** A record has the monotonic time of its rank, which all processes of a machine share, so stages on
one machine are compared exactly; on GPUs a device's clock is tied to that time as well as can be known without a wait.
Different machines are brought together by their wall clocks, read once when a rank starts to record, so they are as
exact as the machines' time service. `Run.disorder` says how much earlier than possible an operation seems to start,
which shows a wrong clock.

Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op, Plan
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.schedules.synchronous import OneFOneBPlan
from ds_ddg.schedules.timeline import Event, Timeline

__all__ = ["REASONS", "Run", "Share", "read"]

REASONS = ("activation", "gradient", "loss", "data", "send", "script", "other")
"""Reasons of the gaps between operations. Script: the training script between two calls, evaluation included;
other: time without a name, mostly Python."""


class Share(NamedTuple):
    """The shares of one stage's time in its steady state."""

    stage: int
    busy: float
    """Share of the time spent on operations."""
    gaps: dict[str, float]
    """Share of the time by reason."""
    milliseconds: dict[str, float]
    """Median time of an operation by kind, F, B and U, for the kinds that there were."""


Records = list[tuple[Event, dict[str, float]]]


class _Rank(NamedTuple):
    about: dict[str, Any]
    spans: dict[int, tuple[dict[str, Any], Records]]
    """Maps the number of earlier changes of plan to the plan, and to what was done under it."""


@dataclass(frozen=True)
class Run:
    """One pipeline of a run, since its last change of plan (schedule, M or slack)."""

    plan: Plan
    stages: tuple[tuple[tuple[Event, dict[str, float]], ...], ...]
    """Operations of each stage, in seconds on the common clock, and the reasons of the gap before, in seconds."""

    @cached_property
    def timeline(self) -> Timeline:
        """The operations of all stages."""
        return Timeline(tuple(event for stage in self.stages for event, _ in stage), len(self.stages))

    @property
    def recorded(self) -> list[int]:
        """The micro-batches that the first stage has sent forward."""
        return [event.op.micro_batch for event, _ in self.stages[0] if event.op.kind == FORWARD]

    @cached_property
    def disorder(self) -> float:
        """Seconds by which an operation started before something it needs had ended, at most; not above 0 if right."""
        ends = {event.op: event.end for event in self.timeline}
        needs = ((event, need) for event in self.timeline for need in self.plan.needs(event.op) if need in ends)
        return max((ends[need] - event.start for event, need in needs), default=0.0)

    @cached_property
    def steady(self) -> tuple[float, float]:
        """The time from the first update of the first stage, when all work, to its last forward, before a drain.

        If that is nothing, it is the time of all that was recorded.
        """
        first = [event for event, _ in self.stages[0]]
        begin = min((event.end for event in first if event.op.kind == UPDATE), default=0.0)
        end = max((event.end for event in first if event.op.kind == FORWARD), default=0.0)
        if begin < end:
            return begin, end
        events = self.timeline.events
        return min((e.start for e in events), default=0.0), max((e.end for e in events), default=0.0)

    def shares(self) -> list[Share]:
        """Return what each stage did with its time in the steady state."""
        begin, end = self.steady
        length = (end - begin) or 1.0

        def inside(start: float, stop: float) -> float:
            """Return how much of an interval is in the steady state."""
            return max(0.0, min(stop, end) - max(start, begin))

        found = []
        for stage, records in enumerate(self.stages):
            events = [event for event, _ in records]
            busy = sum(inside(event.start, event.end) for event in events) / length
            gaps = dict.fromkeys(REASONS, 0.0)
            for before, (event, spent) in zip(events, records[1:], strict=False):
                gap = event.start - before.end
                for reason, seconds in spent.items() if gap > 0 else ():
                    gaps[reason] += seconds * inside(before.end, event.start) / gap / length
            gaps["other"] = max(0.0, 1 - busy - sum(gaps.values()))
            kinds = {
                kind: [e.end - e.start for e in events if e.op.kind == kind and inside(e.start, e.end)]
                for kind in (FORWARD, BACKWARD, UPDATE)
            }
            times = {kind: 1e3 * median(seconds) for kind, seconds in kinds.items() if seconds}
            found.append(Share(stage, busy, gaps, times))
        return found

    def cost(self) -> Cost:
        """Return the measured times as a cost, in seconds; its links have no latency."""
        times = [share.milliseconds for share in self.shares()]
        mean = {kind: sum(t.get(kind, 0.0) for t in times) / len(times) / 1e3 for kind in (FORWARD, BACKWARD, UPDATE)}
        work = [t.get(FORWARD, 0.0) + t.get(BACKWARD, 0.0) for t in times]
        scale = tuple(w * len(work) / sum(work) for w in work) if sum(work) else ()
        return Cost(mean[FORWARD], mean[BACKWARD], mean[UPDATE], scale=scale)

    def last(self, ticks: int) -> tuple[Timeline, Timeline]:
        """Return the last `ticks` micro-batches of the first stage before a drain, as measured and as planned.

        There are fewer if no more were recorded. The plan is replayed with the times that were measured, so the
        difference is overhead, latency and noise.
        """
        m = self.plan.micro_batches
        recorded = self.recorded
        ticks = min(ticks, len(recorded))
        measured = _last(self.timeline, ticks)
        # Of a run that ends before it is steady, the planned one is as short.
        settled = -(-(4 * (self.plan.delay(0) + self.plan.num_stages) + ticks) // m) + 1
        calls = max(1, min(settled, -(-len(recorded) // m)))
        newest = max(recorded, default=0)
        shift = max(min(recorded, default=0), newest - (calls * m - 1))
        planned = (
            event._replace(op=event.op._replace(micro_batch=event.op.micro_batch + shift))
            for event in replay(self.plan, calls, self.cost(), drain=True)
        )
        reached = tuple(event for event in planned if event.op.micro_batch <= newest)  # it may end within a call
        return measured, _last(Timeline(reached, self.plan.num_stages), ticks)


def read(folder: str | Path, replica: int = 0) -> Run:
    """Read the newest run in `folder`, of data-parallel replica number `replica` (its first tensor slice).

    Raises:
        OSError: a record cannot be read.
        ValueError: there are no records, or not of every stage, or the files hold something else.
    """
    paths = sorted(Path(folder).glob("stage*-replica*-slice*.jsonl"))
    ranks = [_read_rank(path) for path in paths if not path.name.endswith(".older.jsonl")]
    if not ranks:
        raise ValueError(f'{folder} has no records; train with "ddg": {{"trace": {json.dumps(str(folder))}}}')
    newest = max(rank.about["run"] for rank in ranks)
    ranks = [rank for rank in ranks if rank.about["run"] == newest and rank.about["slice"] == 0]
    replicas = sorted({rank.about["replica"] for rank in ranks})
    if replica not in replicas:
        raise ValueError(
            f"{folder} has no records of replica {replica}; it has those of {', '.join(map(str, replicas))}"
        )
    ranks = sorted((r for r in ranks if r.about["replica"] == replica), key=lambda rank: rank.about["stage"])
    found = [rank.about["stage"] for rank in ranks]
    num_stages = ranks[0].about["stages"]
    if found != list(range(num_stages)):
        raise ValueError(
            f"{folder} has records of stages {found} of replica {replica}, of {num_stages} stages; "
            "copy the files of all ranks into one folder, or choose another --replica"
        )
    # A rank that was killed may not have seen the last change of plan.
    common = set.intersection(*(set(rank.spans) for rank in ranks))
    if not common:
        raise ValueError(f"{folder} has nothing that all {num_stages} stages did under one plan; record more calls")
    span = max(common)
    # One machine, one clock: that of its first rank.
    ahead = {rank.about["machine"]: rank.about["wall"] - rank.about["monotonic"] for rank in reversed(ranks)}
    origin = min(rank.about["wall"] for rank in ranks)
    stages = []
    for rank in ranks:
        shift = ahead[rank.about["machine"]] - origin
        stages.append(tuple((Event(e.op, e.start + shift, e.end + shift), gap) for e, gap in rank.spans[span][1]))
    return Run(_plan(ranks[0].spans[span][0], num_stages), tuple(stages))


def _plan(settings: dict[str, Any], num_stages: int) -> Plan:
    if settings["schedule"] == "1f1b":
        return OneFOneBPlan(num_stages, settings["micro_batches"])
    return DDGPlan(num_stages, settings["micro_batches"], settings["slack"])


def _read_rank(path: Path) -> _Rank:
    about: dict[str, Any] = {}
    spans: dict[int, tuple[dict[str, Any], Records]] = {}
    records: Records = []
    for place, entry in (*_entries(path.with_suffix(".older.jsonl")), *_entries(path)):
        try:
            if isinstance(entry, list):
                text, start, end, gaps = entry
                records.append((Event(Op.parse(text), start, end), gaps))
            elif "rank" in entry:
                about = entry["rank"]
            else:
                _, records = spans.setdefault(entry["plan"]["changes"], (entry["plan"], []))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{place} is no record of ds_ddg: {error!r}") from error
    if not about:
        raise ValueError(f"{path} does not say whose records it holds: its first line is missing")
    return _Rank(about, spans)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each line of a file with its place, but for a last one that was cut off when the rank was killed."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                try:
                    yield f"{path}, line {number},", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def _last(timeline: Timeline, ticks: int) -> Timeline:
    """Return the events while the first stage did its last `ticks` ticks, but for a drain."""
    forwards = [event for event in timeline.rows[0] if event.op.kind == FORWARD]
    newest = max((event.op.micro_batch for event in forwards), default=0)
    begin = min((event.start for event in forwards if event.op.micro_batch > newest - ticks), default=0.0)
    end = max((event.end for event in forwards), default=0.0)
    inside = (event for event in timeline if event.end > begin and event.start < end)
    return Timeline(tuple(inside), timeline.num_stages)
