r"""Pretrain BERT as a masked language model in a pipeline, with DDG or with DeepSpeed's own 1F1B schedule.

On the docstrings of the Python standard library, nothing to download; about three minutes on two cores:

    deepspeed --quiet --num_gpus 2 recipes/bert/pretrain.py --deepspeed_config configs/bert_pretrain.json

Its last line, where speed and rounding are the machine's:

    {"schedule": "ddg", "stages": 2, "micro_batches": 4, "batch_size": 16, "sequences": 8127, "length": 64,
     "layers": 4, "hidden": 128, "vocabulary": 1024, "seed": 0, "epochs": 2, "perplexity": 205.48507068621444,
     "train_loss": 5.37044, "samples_per_second": ..., "seconds": ...}

(Python 3.11.7; other versions have other docstrings. The frequencies of the tokens alone give 357, `--epochs 4` 184.)

Your own text, and a BERT-Base in four stages:

    deepspeed --quiet --num_gpus 4 recipes/bert/pretrain.py --deepspeed_config configs/bert_base_pretrain.json \
        --text DIR_OR_FILE ... --vocabulary 30000 --layers 12 --hidden 768 --heads 12 --dropout 0.1 --length 128

`--model DIR` goes on from a Hugging Face directory, with its own vocabulary, instead. Model and tokenizer go to
`--output-dir`/model, which AutoModelForMaskedLM and AutoTokenizer read; metrics.json, losses.csv, curves.png beside.
`--schedule 1f1b` trains the same network on the same batches with DeepSpeed's schedule, for comparison. Perplexity is
that of the masked tokens of held-out documents, with the same masks in every run. Rank 0 prepares the text, which has
to fit into memory. Without `--quiet` the launcher has the last word instead of the metrics.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any folder, installed or not

from recipes import common, steps  # first, as it says which library is missing

# isort: split
from transformers import BertConfig, PreTrainedTokenizerBase

from ds_ddg.models import load_pretrained, masked_lm, masked_lm_loss
from recipes.bert import text
from recipes.language import corpus, model
from recipes.language.batches import Split, both_splits
from recipes.progress import fit


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus.add_arguments(parser)
    model.add_arguments(parser, "BERT")
    parser.add_argument("--epochs", type=common.at_least(1), default=2)
    common.add_arguments(parser)
    return common.parse(parser, arguments)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Tensor, Tensor]:
    """Return the tokenizer, the packed training text and the packed held-out text, both (N, length) int32."""
    train, held_out = corpus.documents(args)
    if args.model:
        tokenizer = model.load_tokenizer(args.model, args.length)
    else:
        tokenizer = text.train_tokenizer(train, args.vocabulary, args.length)
    return tokenizer, text.pack(train, tokenizer, args.length), text.pack(held_out, tokenizer, args.length)


def new_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> BertConfig:
    """Return the config of a BERT of the size asked for."""
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.length,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        initializer_range=model.initializer_range(args.hidden),
        pad_token_id=tokenizer.pad_token_id,
    )


def masked(split: Tensor, masking: text.Masking) -> Split:
    """Return the batches of a packed text, masked anew each time."""
    return len(split), lambda rows, generator: masking(split[rows], generator)


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses and the number of tokens to predict.

    Args:
        logits: (B, S, vocabulary).
        labels: (B, S), `common.IGNORED` where there is nothing to predict.
    """
    loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=common.IGNORED, reduction="sum")
    return torch.stack([loss, (labels != common.IGNORED).sum()])


def main() -> None:
    args = parse_arguments()
    config, stages, output_dir = steps.start(args, "bert-pretrain")
    tokenizer, train_text, held_out_text = model.from_first_rank(lambda: prepare(args))
    with common.on_every_rank():
        masking = text.Masking.of(tokenizer)
        bert = model.load_config(args.model) if args.model else new_config(args, tokenizer)
        specs = masked_lm(bert, inputs=("input_ids",))
    net = steps.pipeline(specs, masked_lm_loss, stages, args.seed, model.PARTITION)
    if args.model:
        with common.on_every_rank():
            load_pretrained(net, args.model)

    train, held_out = masked(train_text, masking), masked(held_out_text, masking)
    train_batches, held_out_batches = both_splits(config, net, args.seed, train, held_out)
    engine, progress, checkpoints = steps.set_up(
        args,
        config,
        net,
        model.parameter_groups(net),
        len(train_batches),
        shown={
            "sequences": len(train_text),
            "length": args.length,
            "layers": bert.num_hidden_layers,
            "hidden": bert.hidden_size,
            "vocabulary": len(tokenizer),
            "seed": args.seed,
        },
        hidden={"text_checksum": crc32(train_text.numpy().tobytes()), **model.not_in_weights(bert)},
        partition=model.PARTITION,
    )

    def evaluate() -> dict[str, float]:
        losses, tokens = common.evaluate(engine, held_out_batches, len(held_out_batches), measure)
        return {"perplexity": math.exp(losses / tokens)}

    fit(engine, train_batches.from_call(progress.calls), progress, evaluate, checkpoints.save_if_due)
    model.save(net, tokenizer, output_dir / "model")
    progress.finish(output_dir, "BERT, masked language model", draw=["perplexity"], epochs=args.epochs)


if __name__ == "__main__":
    main()
