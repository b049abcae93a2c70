"""The steps that every recipe takes around its training: start, build the pipeline, set up the engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule

import ds_ddg
from recipes import checks, common
from recipes.checkpoints import Checkpoints
from recipes.progress import Progress


def start(
    args: argparse.Namespace, name: str, model: Mapping[str, Path | None] | None = None
) -> tuple[dict[str, Any], int, Path]:
    """Read the config, join the processes, and see that results can be written.

    Args:
        args: the arguments that `common.add_arguments` has added.
        name: begins the name of the default output folder.
        model: option -> folder for the trained model; if None, it goes to ``model`` in the output folder.

    Returns:
        The DeepSpeed config, the number of stages and the output folder.

    Raises:
        SystemExit: the config cannot be read, the processes do not fit, or a folder cannot be written.
    """
    common.set_threads()
    config = common.read_config(args.deepspeed_config, args.schedule)
    common.init_distributed()
    stages = checks.stages(args.stages)
    output_dir = args.output_dir or Path("runs") / f"{name}-{common.schedule_of(config)}"
    checkpoint_dir = None if getattr(args, "eval_only", False) else args.checkpoint_dir
    if model is None:
        model = {"the model in --output-dir": output_dir / "model"}
    checks.folders(config, {"--checkpoint-dir": checkpoint_dir, **model}, {"--output-dir": output_dir})
    return config, stages, output_dir


def pipeline(
    specs: Sequence[LayerSpec], loss_fn: Callable[..., Any], stages: int, seed: int, partition: str
) -> PipelineModule:
    """Build a pipeline whose initial weights do not depend on the number of stages.

    Args:
        specs: layers of the pipeline.
        loss_fn: ``loss_fn(outputs, labels)`` to a scalar.
        stages: number of stages.
        seed: seed of the weights.
        partition: DeepSpeed's ``partition_method``.
    """
    # It broadcasts the tied weights, and over gloo a GPU's are written in place, which autograd would forbid.
    with torch.no_grad():
        return PipelineModule(
            list(specs),
            num_stages=stages,
            loss_fn=loss_fn,
            partition_method=partition,
            # Layer i starts from seed base_seed + i.
            seed_layers=True,
            seed_fn=torch.manual_seed,
            base_seed=1000 * seed,
        )


def set_up(
    args: argparse.Namespace,
    config: dict[str, Any],
    net: PipelineModule,
    parameters: Iterable[Any],
    calls_per_epoch: int,
    shown: Mapping[str, Any],
    hidden: Mapping[str, Any],
) -> tuple[ds_ddg.DDGEngine, Progress, Checkpoints]:
    """Make the engine, and go on from a checkpoint if there is one to go on from.

    Args:
        args: the arguments that `common.add_arguments` has added, and ``epochs``.
        config: the DeepSpeed config.
        net: the network.
        parameters: parameters of the network, or groups of them.
        calls_per_epoch: ``train_batch()`` calls in an epoch, and between two checkpoints.
        shown: settings that are among the metrics.
        hidden: other settings that decide about the training.

    Raises:
        SystemExit: see `Checkpoints.restore`.
    """
    calls = args.epochs * calls_per_epoch
    planned = common.fill_scheduler(config, calls)
    engine, _, _, _ = ds_ddg.initialize(model=net, model_parameters=parameters, config=config)
    progress = Progress(engine, calls, calls_per_epoch, **shown)
    checkpoints = Checkpoints(
        args,
        engine,
        progress,
        every=calls_per_epoch,
        replicas=net.mpu().get_data_parallel_world_size(),
        **hidden,
        epochs=args.epochs if planned else None,
        config=config,
    )
    checkpoints.restore()
    return engine, progress, checkpoints
