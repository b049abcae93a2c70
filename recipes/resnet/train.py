r"""Train a CIFAR ResNet in a pipeline, with DDG or with DeepSpeed's own 1F1B schedule.

On images that come with scikit-learn, nothing to download; a minute on two cores:

    deepspeed --quiet --num_gpus 2 recipes/resnet/train.py --deepspeed_config configs/resnet20_digits.json

Its last line, where the speed is the machine's:

    {"schedule": "ddg", "stages": 2, "micro_batches": 2, "dataset": "digits", "depth": 20, "epochs": 10, "seed": 0,
     "test_accuracy": 0.9944444444444445, "train_loss": 0.03022, "samples_per_second": ..., "seconds": ...}

The paper's recipe (Huo et al., ICML 2018, section 5.2), days on CPU, for a folder DIR with cifar-10-batches-py/ in it:

    deepspeed --quiet --num_gpus 2 recipes/resnet/train.py --deepspeed_config configs/resnet110_cifar10.json \
        --dataset cifar10 --data-dir DIR --depth 110 --epochs 300

`--schedule 1f1b` trains the same network in the same order with DeepSpeed's schedule, for comparison. curves.png and
metrics.json go to `--output-dir`. Without `--quiet` the launcher has the last word instead of the metrics.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder, installed or not

import ds_ddg
from ds_ddg.models import cifar_resnet
from recipes import common
from recipes.progress import Progress
from recipes.resnet import data


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, classes), (B,) -> loss, correct answers, images: sums over those not labelled `data.NO_LABEL`."""
    loss = cross_entropy(logits, labels, ignore_index=data.NO_LABEL, reduction="sum")
    return torch.stack([loss, (logits.argmax(dim=1) == labels).sum(), (labels != data.NO_LABEL).sum()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder that holds cifar-10-batches-py/")
    parser.add_argument("--depth", type=int, default=20, help="layers of the ResNet, 6n + 2")
    parser.add_argument("--epochs", type=int, default=10)
    common.add_arguments(parser)
    args = common.parse(parser)
    common.set_threads()
    config = common.read_config(args.deepspeed_config, args.schedule)
    train_split, test_split = data.load(args.dataset, args.data_dir)

    common.init_distributed()
    stages = args.stages or dist.get_world_size()
    net = PipelineModule(
        cifar_resnet(args.depth),
        num_stages=stages,
        loss_fn=cross_entropy,
        partition_method="type:Stem|BasicBlock",
        # Layer i starts from seed base_seed + i: the initial weights must not depend on the number of stages.
        seed_layers=True,
        seed_fn=torch.manual_seed,
        base_seed=1000 * args.seed,
    )
    batch = DeepSpeedConfig(config, net.mpu())
    grid = net.mpu()
    shard = (grid.get_data_parallel_rank(), grid.get_data_parallel_world_size())
    train_batches = data.TrainBatches(
        train_split, batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps, args.seed, *shard
    )
    test_batches = data.held_out_batches(test_split, batch.train_micro_batch_size_per_gpu, *shard)
    common.fill_scheduler(config, calls=args.epochs * len(train_batches))

    engine, _, _, _ = ds_ddg.initialize(model=net, model_parameters=net.parameters(), config=config)
    calls = args.epochs * len(train_batches)
    progress = Progress(engine, calls, len(train_batches), dataset=args.dataset, depth=args.depth, seed=args.seed)
    checkpoints = common.Checkpoints(args, engine, progress, every=len(train_batches))
    checkpoints.restore()

    micro_batches = train_batches.from_call(progress.calls)
    while progress.calls < calls:
        with progress:
            loss = engine.train_batch(micro_batches)
            progress.update(loss, engine.loss_step)
            if progress.calls == calls:
                engine.drain()  # the network is trained once its last gradients have arrived
        if progress.calls % len(train_batches) == 0:
            loss_sum, correct, images = common.evaluate(engine, test_batches, len(test_batches), measure)
            progress.evaluated({"test_loss": loss_sum / images, "test_accuracy": correct / images})
        checkpoints.save_if_due()

    output_dir = args.output_dir or Path("runs") / f"resnet{args.depth}-{args.dataset}-{engine.schedule}"
    progress.finish(output_dir, f"ResNet-{args.depth} on {args.dataset}", draw=["test_accuracy"], epochs=args.epochs)


if __name__ == "__main__":
    main()
