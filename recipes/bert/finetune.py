r"""Fine-tune a pretrained encoder to classify texts or pairs of texts, with DDG or with DeepSpeed's 1F1B schedule.

Which package of the Python standard library does a docstring document? Nothing to download; after `pretrain.py`:

    deepspeed --quiet --num_gpus 2 recipes/bert/finetune.py --deepspeed_config configs/bert_finetune.json \
        --model runs/bert-pretrain-ddg/model

GLUE, from the folders that its archives unpack to, with BERT-Base in a folder of the Hugging Face layout:

    deepspeed --quiet --num_gpus 2 recipes/bert/finetune.py --deepspeed_config configs/bert_finetune_glue.json \
        --model bert-base-uncased/ --train SST-2/train.tsv --dev SST-2/dev.tsv --length 128 --epochs 3

and MNLI likewise with `MNLI/train.tsv` and `MNLI/dev_matched.tsv`. Columns are found by their names in the header, see
`glue.py`. Model and tokenizer go to `--output-dir`/model, which AutoModelForSequenceClassification and AutoTokenizer
read; the record is beside. F1 is that of the second of two labels, and the mean over more (macro).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from zlib import crc32

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder, installed or not

from recipes import common, steps  # first, as it says which library is missing

# isort: split
from sklearn.metrics import accuracy_score, f1_score
from transformers import PreTrainedTokenizerBase

from ds_ddg.models import classification_loss, load_pretrained, sequence_classification
from ds_ddg.models.transformers.layers import Head
from recipes.bert import glue
from recipes.language import model
from recipes.language.batches import Batch, Split, both_splits
from recipes.progress import fit


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the pretrained model")
    parser.add_argument("--train", type=Path, help=".tsv or .csv (default: docstrings of the standard library)")
    parser.add_argument("--dev", type=Path, help="the same, to measure")
    parser.add_argument(
        "--length", type=common.at_least(4), default=64, help="tokens of an example; longer ones are cut"
    )
    parser.add_argument("--epochs", type=common.at_least(1), default=6)
    common.add_arguments(parser)
    args = common.parse(parser)
    if (args.train is None) != (args.dev is None):
        parser.error("--train and --dev go together")
    return args


def prepare(args: argparse.Namespace) -> tuple[glue.Examples, glue.Examples, list[str]]:
    """Return training examples, held-out examples and the names of the labels."""
    if args.train is None:
        train, held_out = glue.stdlib_packages()
    else:
        train, held_out = glue.read_examples(args.train), glue.read_examples(args.dev)
    return train, held_out, glue.label_names(train, held_out)


class Encoder:
    """Makes micro-batches of examples: inputs in the order of `inputs`, each (B, length) int64, and labels (B,)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: list[str], length: int) -> None:
        self.inputs = tuple(tokenizer.model_input_names)
        self._tokenizer, self._length = tokenizer, length
        self._numbers = {name: number for number, name in enumerate(names)}

    def __call__(self, examples: glue.Examples, rows: Tensor) -> Batch:
        texts = zip(*(examples.texts[row] for row in rows.tolist()), strict=True)
        encoded = self._tokenizer(
            *map(list, texts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        labels = torch.tensor([self._numbers[examples.labels[row]] for row in rows.tolist()])
        return tuple(encoded[name] for name in self.inputs), labels


def load_encoder(net: PipelineModule, directory: Path) -> None:
    """Load pretrained weights for all but the head, which may be new in part or as a whole.

    Raises:
        ValueError: the files lack weights of another layer.
    """
    loaded = load_pretrained(net, directory, strict=False)
    heads = [module for module in net.modules() if isinstance(module, Head)]
    new = set(loaded.missing) & {key for head in heads for key in head.original_state()}
    if lacking := sorted(set(loaded.missing) - new):
        raise ValueError(
            f"--model: the weights in {directory} lack parts of the encoder: {', '.join(lacking[:4])}, ..."
        )
    if new:
        print(f"new weights: {', '.join(sorted(new))}", flush=True)


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses, then how often each label got each answer (classes x classes).

    Args:
        logits: (B, classes).
        labels: (B,), `common.IGNORED` where a row only fills up the batch.
    """
    loss = cross_entropy(logits, labels, ignore_index=common.IGNORED, reduction="sum")
    classes, counted = logits.shape[1], labels != common.IGNORED
    pairs = labels[counted] * classes + logits.argmax(dim=1)[counted]
    return torch.cat([loss[None], one_hot(pairs, classes**2).sum(dim=0)])


def scores(counts: list[float], classes: int) -> dict[str, float]:
    """Return accuracy and F1 of the answers that `measure` counted."""
    table = torch.tensor(counts).view(classes, classes)
    labels, answers = torch.meshgrid(torch.arange(classes), torch.arange(classes), indexing="ij")
    pairs = {"y_true": labels.flatten(), "y_pred": answers.flatten(), "sample_weight": table.flatten()}
    f1 = f1_score(**pairs, average="binary" if classes == 2 else "macro", zero_division=0.0)
    return {"accuracy": float(accuracy_score(**pairs)), "f1": float(f1)}


def main() -> None:
    args = parse_arguments()
    task = "stdlib-packages" if args.train is None else args.train.resolve().parent.name
    config, stages, output_dir = steps.start(args, f"bert-{task}")
    train, dev, names = model.from_first_rank(lambda: prepare(args))
    with common.on_every_rank():
        tokenizer = model.load_tokenizer(args.model, args.length)
        numbers = {name: number for number, name in enumerate(names)}
        bert = model.load_config(args.model, num_labels=len(names), id2label=dict(enumerate(names)), label2id=numbers)
        encoder = Encoder(tokenizer, names, args.length)
        specs = sequence_classification(bert, inputs=encoder.inputs)
    net = steps.pipeline(specs, classification_loss, stages, args.seed, model.PARTITION)
    with common.on_every_rank():
        load_encoder(net, args.model)

    def encoded(examples: glue.Examples) -> Split:
        return len(examples), lambda rows, _: encoder(examples, rows)

    train_batches, held_out = both_splits(config, net, args.seed, encoded(train), encoded(dev))
    engine, progress, checkpoints = steps.set_up(
        args,
        config,
        net,
        model.parameter_groups(net),
        len(train_batches),
        shown={
            "task": task,
            "examples": len(train),
            "classes": len(names),
            "length": args.length,
            "seed": args.seed,
        },
        hidden={
            "text_checksum": crc32(repr((train.texts, train.labels)).encode()),
            **model.not_in_weights(bert),
        },
        partition=model.PARTITION,
    )

    def evaluate() -> dict[str, float]:
        _, *counts = common.evaluate(engine, held_out, len(held_out), measure)
        return scores(counts, len(names))

    fit(engine, train_batches.from_call(progress.calls), progress, evaluate, checkpoints.save_if_due)
    model.save(net, tokenizer, output_dir / "model")
    progress.finish(output_dir, f"BERT on {task}", draw=["accuracy", "f1"], epochs=args.epochs)


if __name__ == "__main__":
    main()
