"""Makes the collaborators of an engine and hands them to each other; none of them knows the engine."""

from __future__ import annotations

from typing import Any, NamedTuple

from ds_ddg.checkpoint.save_load import CheckpointPart
from ds_ddg.comm.agreement import Agreement
from ds_ddg.comm.channels import group_of_all, own_group
from ds_ddg.comm.failures import FailureGuard
from ds_ddg.comm.stage_links import Links
from ds_ddg.comm.start import check_before_gloo
from ds_ddg.engine.auto_slack import SlackTuner
from ds_ddg.engine.calls import Calls
from ds_ddg.engine.data_feed import Feed
from ds_ddg.engine.drain import Drain
from ds_ddg.engine.micro_batch import MicroBatchRunner
from ds_ddg.host import Host
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.console import Console
from ds_ddg.telemetry.delay_effects import DelayEffects
from ds_ddg.telemetry.observer import Observer
from ds_ddg.telemetry.recorder import start_recorder
from ds_ddg.telemetry.reporter import Reporter
from ds_ddg.telemetry.trace_writer import TraceWriter
from ds_ddg.weights.optimizer_wrappers import refuse_metric
from ds_ddg.weights.stage_optimizer import StageOptimizer
from ds_ddg.weights.tied import TiedWeights

__all__ = ["Parts", "assemble", "groups_of_stage"]


class Parts(NamedTuple):
    """The collaborators to which an engine hands over its work."""

    calls: Calls
    checkpoint: CheckpointPart
    reporter: Reporter
    runner: MicroBatchRunner
    tracer: TraceWriter


def groups_of_stage(host: Host) -> list[Any]:
    """Return groups that together join all ranks of this stage, for tensors on the CPU. Collective over all ranks."""
    check_before_gloo()
    if host.device.type != "cpu":
        axes = map(host.grid.topology().get_axis_comm_lists, ("data", "model"))
        return [group for lists in axes if (group := own_group(lists, host.global_rank)) is not None]
    return [
        *([host.mpu.get_data_parallel_group()] if host.is_data_parallel else []),
        *([host.mpu.get_slice_parallel_group()] if host.is_model_parallel else []),
    ]


def assemble(
    stage: Stage,
    run: RunState,
    host: Host,
    links: Links,
    feed: Feed,
    observer: Observer,
    tied_weights: TiedWeights,
    updates: StageOptimizer,
    console: Console,
    failures: FailureGuard,
    engine_name: str,
) -> Parts:
    """Make the collaborators that need links to the other stages. Collective over all ranks.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        host: DeepSpeed's engine, fully constructed.
        links: to the other stages.
        feed: the data of a call.
        observer: times the waits of the links and the feed.
        tied_weights: the weights that this stage shares with others.
        updates: this stage's optimizer.
        console: the printed lines.
        failures: runs what a script calls.
        engine_name: what errors call the engine.

    Raises:
        ValueError: the scheduler or the folder of the trace cannot be used.
    """
    settings = stage.config
    if settings.enabled:
        refuse_metric(host.lr_scheduler)
    everyone = group_of_all(stage.rank) if settings.timed else None
    effects = DelayEffects(lambda: updates.versions, lambda: run.plan.delay(stage.stage_id) if run.delayed else 0)
    reporter = Reporter(stage, run, host, links, observer, effects, updates, console)
    tracer = TraceWriter(run, host, start_recorder(stage, host, observer, everyone))
    if host.fp16_enabled():
        links.loss_scale = lambda: float(host.optimizer.loss_scale)
    tied_weights.connect(links, stage.stage_id, run.plan)
    runner = MicroBatchRunner(stage, host, links, feed, tied_weights, updates, effects)
    drain = Drain(stage, run, host, links, updates, reporter, console, failures)
    slack = SlackTuner(stage, run, links, observer, host.device, everyone, drain)
    runner.observe = slack.observe if slack.trying else None
    agreement = Agreement(stage, run, links, failures)
    checkpoint = CheckpointPart(stage, run, host, agreement, tied_weights, updates, reporter, drain)
    calls = Calls(
        stage=stage,
        run=run,
        host=host,
        links=links,
        feed=feed,
        tied_weights=tied_weights,
        updates=updates,
        runner=runner,
        reporter=reporter,
        console=console,
        drain=drain,
        slack=slack,
        checkpoint=checkpoint,
        engine_name=engine_name,
        delayed_from=settings.sync_steps if settings.enabled else None,
    )
    return Parts(calls, checkpoint, reporter, runner, tracer)
