r"""Train a ResNet in a pipeline, with DDG or with DeepSpeed's own 1F1B schedule; evaluate, resume, save the weights.

On images that come with scikit-learn, nothing to download; a minute on two cores:

    deepspeed --quiet --num_gpus 2 recipes/resnet/train.py --deepspeed_config configs/resnet20_digits.json

Its last line, where speed and rounding, and so where the training goes, are the machine's:

    {"schedule": "ddg", "stages": 2, "micro_batches": 2, "batch_size": 32, "model": "cifar_resnet20",
     "dataset": "digits", "seed": 0, "epochs": 10, "test_loss": 0.01320906899507261,
     "test_accuracy": 0.9972222222222222, "test_top5_accuracy": 1.0, "train_loss": 0.02476,
     "samples_per_second": ..., "seconds": ...}

The paper's recipe (Huo et al., ICML 2018, section 5.2), days on CPU, for a folder DIR with cifar-10-batches-py/ in it:

    deepspeed --quiet --num_gpus 2 recipes/resnet/train.py --deepspeed_config configs/resnet110_cifar10.json \
        --dataset cifar10 --data-dir DIR --model cifar_resnet110 --epochs 300

A torchvision ResNet on ImageNet, for a folder DIR with train/CLASS/*.JPEG and val/CLASS/*.JPEG:

    deepspeed --quiet --num_gpus 4 recipes/resnet/train.py --deepspeed_config configs/resnet50_imagenet.json \
        --dataset imagefolder --data-dir DIR --model resnet50 --epochs 90 --checkpoint-dir ckpt --resume --save out

`--schedule 1f1b` trains the same network in the same order with DeepSpeed's schedule, for comparison. metrics.json,
losses.csv, curves.png go to `--output-dir`. Without `--quiet` the launcher has the last word instead of the metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder, installed or not

import ds_ddg
from recipes import checks, common, steps
from recipes.progress import fit
from recipes.resnet import data, model


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20", help="cifar_resnet{6n+2}, or a ResNet of torchvision's")
    parser.add_argument("--dataset", choices=data.DATASETS, default="digits")
    parser.add_argument(
        "--data-dir", type=Path, help="cifar-10-batches-py/, cifar-100-python/ or train/ and val/ in it"
    )
    parser.add_argument("--image-size", type=common.at_least(1), help="of imagefolder and random (default: 224)")
    parser.add_argument(
        "--workers", type=common.at_least(0), default=4, help="processes that read images from disk (imagefolder)"
    )
    parser.add_argument("--epochs", type=common.at_least(1), default=10)
    parser.add_argument("--load", type=Path, metavar="PATH", help="start from these weights (a file or a folder)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the trained weights here")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the weights of --load or --resume")
    common.add_arguments(parser)
    args = common.parse(parser, arguments)
    if args.eval_only and not (args.load or args.resume):
        parser.error("--eval-only needs weights: --load PATH, or --resume with --checkpoint-dir")
    return args


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Return sums of loss, top-1 hits, top-5 hits and images, without images labelled `common.IGNORED`.

    Args:
        logits: (B, classes).
        labels: (B,).
    """
    loss = cross_entropy(logits.float(), labels, ignore_index=common.IGNORED, reduction="sum")
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), (labels != common.IGNORED).sum()])


def evaluate(engine: ds_ddg.DDGEngine, batches: data.HeldOutBatches) -> dict[str, float]:
    """Return the mean loss over the test split, and the shares of images with the right class first and among five."""
    loss, top1, top5, images = common.evaluate(engine, batches, len(batches), measure)
    return {"test_loss": loss / images, "test_accuracy": top1 / images, "test_top5_accuracy": top5 / images}


def main() -> None:
    args = parse_arguments()
    config, stages, output_dir = steps.start(args, f"{args.model}-{args.dataset}", {"--save": args.save})
    with common.on_every_rank():
        train_split, test_split = data.load(args.dataset, args.data_dir, args.image_size)
        specs = model.layer_specs(args.model, train_split.num_classes)
    net = steps.pipeline(specs, cross_entropy, stages, args.seed, model.PARTITION)
    grid = net.mpu()
    batch = checks.deepspeed_config(config, net)
    share = data.Share(
        batch.train_micro_batch_size_per_gpu,
        rank=grid.get_data_parallel_rank(),
        size=grid.get_data_parallel_world_size(),
        images=grid.get_stage_id() == 0,
        workers=args.workers,
        dtype=common.dtype_of(batch),
    )
    with common.on_every_rank():
        train_batches = data.TrainBatches(train_split, share, batch.gradient_accumulation_steps, args.seed)
        test_batches = data.HeldOutBatches(test_split, share)
        if args.load:
            model.load_weights(net, args.model, args.load)

    engine, progress, checkpoints = steps.set_up(
        args,
        config,
        net,
        net.parameters(),
        len(train_batches),
        shown={"model": args.model, "dataset": args.dataset, "seed": args.seed},
        hidden={"image_size": args.image_size},
        partition=model.PARTITION,
    )
    if args.eval_only:
        if not (args.load or progress.calls):
            raise SystemExit(f"--eval-only: there is no checkpoint in {args.checkpoint_dir}, and no --load")
        progress.evaluated(evaluate(engine, test_batches))
    else:
        with contextlib.closing(train_batches.from_call(progress.calls)) as micro_batches:
            fit(engine, micro_batches, progress, partial(evaluate, engine, test_batches), checkpoints.save_if_due)
    if args.save:
        model.save_weights(net, args.model, args.save)
    progress.finish(
        output_dir,
        title=f"{args.model} on {args.dataset}",
        draw=["test_accuracy", "test_top5_accuracy"],
        epochs=args.epochs,
    )


if __name__ == "__main__":
    main()
