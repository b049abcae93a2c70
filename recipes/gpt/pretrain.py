r"""Train a causal language model (GPT-2's architecture) in a pipeline, with DDG or with DeepSpeed's own 1F1B schedule.

On the docstrings of the Python standard library, nothing to download; about two minutes on two cores:

    deepspeed --quiet --num_gpus 2 recipes/gpt/pretrain.py --deepspeed_config configs/gpt_pretrain.json

Its last line, where speed and rounding are the machine's:

    {"schedule": "ddg", "stages": 2, "micro_batches": 4, "batch_size": 16, "sequences": 9820, "length": 64,
     "layers": 4, "hidden": 128, "vocabulary": 1024, "seed": 0, "epochs": 2, "perplexity": 33.02641202228543,
     "bits_per_byte": 1.990360065185918, "train_loss": 3.58069, "samples_per_second": ..., "seconds": ...}

(Python 3.11.7; other versions have other docstrings. 1F1B gives 32.4 and 1.979 bits per byte, the frequencies of the
tokens alone 388 and 3.39.)

GPT-2 small in four stages, on your own text:

    deepspeed --quiet --num_gpus 4 recipes/gpt/pretrain.py --deepspeed_config configs/gpt2_small.json \
        --text DIR_OR_FILE ... --vocabulary 50257 --layers 12 --hidden 768 --heads 12 --length 1024 --epochs 1 \
        --checkpoint-dir DIR --checkpoint-every 1000 --resume

`--model DIR` goes on from a Hugging Face directory of a causal language model, with its own tokenizer, instead. Model
and tokenizer go to `--output-dir`/model, which AutoModelForCausalLM and AutoTokenizer read; metrics.json, losses.csv,
curves.png beside. `--schedule 1f1b` trains the same network on the same batches with DeepSpeed's schedule, for
comparison; `--as-if-stages K` in one process with the delay of K stages. Perplexity is that of a token of held-out
documents given those before it in its sequence; bits per byte is the same loss for a byte of their text, to compare
models of different vocabularies. Input and output embedding are one weight, as in GPT-2, on the first and last stage.
Rank 0 prepares the text, which has to fit into memory. Without `--quiet` the launcher has the last word instead of the
metrics.
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
from transformers import GPT2Config, PreTrainedTokenizerBase

from ds_ddg.models import causal_lm, load_pretrained, next_token_loss
from recipes.gpt import text
from recipes.language import corpus, model
from recipes.language.batches import Split, both_splits
from recipes.progress import fit

SETTINGS = ("activation_function", "embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout")
"""Settings of causal language models that decide about their training and are not in their weights."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus.add_arguments(parser)
    model.add_arguments(parser, "GPT-2")
    parser.add_argument("--epochs", type=common.at_least(1), default=2)
    common.add_arguments(parser)
    return common.parse(parser, arguments)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, text.Packed, text.Packed]:
    """Return the tokenizer, the training text and the held-out text."""
    train, held_out = corpus.documents(args)
    if args.model:
        tokenizer = model.load_tokenizer(args.model, args.length)
    else:
        tokenizer = text.train_tokenizer(train, args.vocabulary, args.length)
    return tokenizer, text.pack(train, tokenizer, args.length), text.pack(held_out, tokenizer, args.length)


def new_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    """Return the config of a GPT-2 of the size asked for."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=args.hidden,
        n_layer=args.layers,
        n_head=args.heads,
        n_positions=args.length,
        embd_pdrop=args.dropout,
        resid_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        initializer_range=model.initializer_range(args.hidden),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def sequences(packed: text.Packed) -> Split:
    """Return the batches of a packed text, whose labels are the tokens themselves."""

    def batch(rows: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = packed.tokens[rows].long()
        return tokens, tokens.clone()

    return len(packed.tokens), batch


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses and the number of tokens to predict.

    Args:
        logits: (B, S, vocabulary).
        labels: (B, S), the tokens themselves; `common.IGNORED` where there is nothing to predict.
    """
    logits, labels = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    loss = cross_entropy(logits, labels, ignore_index=common.IGNORED, reduction="sum")
    return torch.stack([loss, (labels != common.IGNORED).sum()])


def main() -> None:
    args = parse_arguments()
    config, stages, output_dir = steps.start(args, "gpt-pretrain")
    tokenizer, train_text, held_out_text = model.from_first_rank(lambda: prepare(args))
    with common.on_every_rank():
        gpt = model.load_config(args.model) if args.model else new_config(args, tokenizer)
        specs = causal_lm(gpt, inputs=("input_ids",))
    net = steps.pipeline(specs, next_token_loss, stages, args.seed, model.PARTITION)
    if args.model:
        with common.on_every_rank():
            load_pretrained(net, args.model)

    train_batches, held_out = both_splits(config, net, args.seed, sequences(train_text), sequences(held_out_text))
    engine, progress, checkpoints = steps.set_up(
        args,
        config,
        net,
        model.parameter_groups(net),
        len(train_batches),
        shown={
            "sequences": len(train_text.tokens),
            "length": args.length,
            "layers": gpt.num_hidden_layers,
            "hidden": gpt.hidden_size,
            "vocabulary": len(tokenizer),
            "seed": args.seed,
        },
        hidden={"text_checksum": crc32(train_text.tokens.numpy().tobytes()), **model.not_in_weights(gpt, *SETTINGS)},
        partition=model.PARTITION,
    )

    def evaluate() -> dict[str, float]:
        losses, tokens = common.evaluate(engine, held_out, len(held_out), measure)
        bits_per_token = losses / tokens / math.log(2)
        return {"perplexity": 2**bits_per_token, "bits_per_byte": bits_per_token * held_out_text.tokens_per_byte}

    fit(engine, train_batches.from_call(progress.calls), progress, evaluate, checkpoints.save_if_due)
    model.save(net, tokenizer, output_dir / "model")
    progress.finish(output_dir, "GPT-2, causal language model", draw=["perplexity"], epochs=args.epochs)


if __name__ == "__main__":
    main()
