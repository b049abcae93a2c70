"""A ResNet for 32x32 images on two pipeline stages: train, evaluate, compare with DeepSpeed's own schedule.

    deepspeed --num_gpus 2 cifar_resnet.py                                # digits, which come with scikit-learn
    deepspeed --num_gpus 2 cifar_resnet.py --data-dir DIR --depth 20 --epochs 10     # CIFAR-10
    deepspeed --num_gpus 2 cifar_resnet.py --schedule 1f1b                # the same run on DeepSpeed's schedule

Without a GPU put DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 before it. DIR holds cifar-10-batches-py/, the unpacked "python
version" of CIFAR-10. It needs `pip install "ds_ddg[vision]" scikit-learn`.
"""

import argparse

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import nn

import ds_ddg
from ds_ddg.models import cifar_resnet

MICRO_BATCH = 16


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--data-dir", help="has cifar-10-batches-py/ in it (default: scikit-learn's digits)")
    parser.add_argument("--schedule", choices=["ddg", "1f1b"], default="ddg")
    parser.add_argument("--depth", type=int, default=8, help="of the ResNet, 6n + 2")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=2, help="per call; stage k's gradients are (K-1-k) old")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def digits():
    """Return 1797 grey images of 8x8, drawn at four times their size; a fifth is held out."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:352], order[352:]
    return images[train], labels[train], images[held_out], labels[held_out]


def cifar10(directory):
    """Return 50000 images to train and 10000 to test."""
    from torchvision.datasets import CIFAR10

    parts = []
    for train in (True, False):
        data = CIFAR10(directory, train=train)
        parts += [torch.tensor(data.data).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(data.targets)]
    return parts


def in_order(images, labels):
    """Yield micro-batches (inputs, labels) of equal size; what is left over at the end is left out."""
    for start in range(0, len(labels) - MICRO_BATCH + 1, MICRO_BATCH):
        yield images[start : start + MICRO_BATCH], labels[start : start + MICRO_BATCH]


def shuffled(images, labels, epochs, seed):
    """Yield micro-batches in an order that comes from the seed alone: the first and the last stage both read them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        yield from in_order(images[order], labels[order])


def evaluate(engine, images, labels):
    """Return the mean loss and the share of right answers on the last stage, which has the outputs; None on others."""
    count = len(labels) // MICRO_BATCH
    outputs = engine.eval_batch(
        in_order(images, labels), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=count
    )
    if not engine.is_last_stage():
        return None
    logits = torch.cat(outputs).float().cpu()
    labels = labels[: len(logits)]
    return float(nn.functional.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def main():
    args = arguments()
    with ds_ddg.swap():  # inside, DeepSpeed does not compile for a minute on CPU what only inference uses
        deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = cifar10(args.data_dir) if args.data_dir else digits()
    net = PipelineModule(
        cifar_resnet(args.depth, num_classes=10, in_channels=train_images.shape[1]),
        num_stages=deepspeed.comm.get_world_size(),
        loss_fn=nn.functional.cross_entropy,
        partition_method="type:Stem|BasicBlock",  # the same number of residual blocks, which cost about the same
    )
    calls = args.epochs * len(train_labels) // MICRO_BATCH // args.micro_batches
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": args.micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}},
        # A warm-up, as old gradients ask for: the loss falls fastest while the learning rate is still small.
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": calls, "warmup_num_steps": max(2, calls // 10), "cos_min_ratio": 0.01},
        },
        "steps_per_print": max(1, calls // 8),
        "ddg": {"enabled": args.schedule == "ddg"},
    }
    engine, _, _, _ = ds_ddg.initialize(model=net, model_parameters=net.parameters(), config=config)

    data = shuffled(train_images, train_labels, args.epochs + 1, args.seed)
    for _ in range(calls):
        engine.train_batch(data)
    if args.schedule == "ddg":
        engine.drain()  # finish the gradients in flight

    if measured := evaluate(engine, test_images, test_labels):
        loss, accuracy = measured
        print(f"{args.schedule}: loss {loss:.3f}, accuracy {accuracy:.3f} on held-out images", flush=True)


if __name__ == "__main__":
    main()
