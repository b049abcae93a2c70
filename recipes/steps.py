"""The steps that every recipe takes around its training: start, build the pipeline, set up the engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from deepspeed.runtime.utils import partition_balanced

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
    partition: str,
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
        partition: DeepSpeed's ``partition_method``, for --as-if-stages.

    Raises:
        SystemExit: see `Checkpoints.restore`.
    """
    calls = args.epochs * calls_per_epoch
    planned = common.fill_scheduler(config, calls)
    imagined = args.as_if_stages is not None
    # A stage clips by its own norm; the engine would clip by that of the whole model.
    given = {**config, "gradient_clipping": 0.0} if imagined else config
    engine, _, _, _ = ds_ddg.initialize(model=net, model_parameters=parameters, config=given)
    if imagined:
        _delay(engine, args.as_if_stages, partition, config.get("gradient_clipping", GRADIENT_CLIPPING_DEFAULT))
    told = {"as_if_stages": args.as_if_stages} if imagined else {}
    progress = Progress(engine, calls, calls_per_epoch, **told, **shown)
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


def _delay(engine: ds_ddg.DDGEngine, stages: int, partition: str, gradient_clipping: float) -> None:
    """Have an engine of one stage train as on so many stages, split as DeepSpeed would split them.

    Raises:
        SystemExit: there are several processes, or the optimizer or the layers do not allow it.
    """
    net, settings = engine.module, engine.ddg
    rules = settings.staleness
    try:
        if (processes := torch.distributed.get_world_size()) > 1:
            raise ValueError(f"needs one process, got {processes}; start it with --num_gpus 1")
        wanted = {"enabled": True, "weights": "stash", "clip": "stage", "sync_steps": 0}
        other = [name for name, value in wanted.items() if getattr(settings, name) != value]
        other += ["slack"] * (settings.slack == "auto")
        if other:
            raise ValueError(f'"ddg" sets {", ".join(other)}, which one process cannot imitate; leave that out')
        if isinstance(engine.optimizer, DeepSpeedOptimizer):
            raise ValueError(
                f"the config has bf16, fp16 or ZeRO, whose {type(engine.optimizer).__name__} cannot be delayed here; "
                "leave these blocks out: fp32 shows the same delay"
            )
        weights = [0] * len(net.forward_funcs)
        for index in net._find_layer_type(partition.removeprefix("type:")):
            weights[index] = 1
        bounds = partition_balanced(weights=weights, num_parts=stages)
        layers = [[f for f in net.forward_funcs[i:j] if isinstance(f, torch.nn.Module)] for i, j in pairwise(bounds)]
        ds_ddg.delayed(
            engine.optimizer,
            [[p for layer in part for p in layer.parameters()] for part in layers],
            micro_batches=engine.gradient_accumulation_steps(),
            slack=settings.slack,
            rules=rules if isinstance(rules, str) else rules.model_dump(exclude_unset=True),
            gradient_clipping=gradient_clipping,
        )
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--as-if-stages {stages}: {error}") from None
