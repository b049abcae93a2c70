"""Fine-tune a causal language model of Hugging Face on a pipeline, save it, load it with transformers, generate.

    deepspeed --num_gpus 2 hf_causal_lm.py --model DIR --data pairs.tsv --output trained
    deepspeed --num_gpus 2 hf_causal_lm.py                    # a tiny Llama with new weights, and a few pairs

Without a GPU put DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 before it. DIR is a local directory with config.json, weights in
safetensors and a tokenizer; each stage reads only its own weights. A line of pairs.tsv is a prompt, a tab and what
should follow. Nothing is downloaded. It needs `pip install "ds_ddg[hf]"`, and a disk that all machines share.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm
from deepspeed.pipe import PipelineModule
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import ds_ddg
from ds_ddg.models import causal_lm, load_pretrained, next_token_loss, save_pretrained

IGNORED = -100  # a label that counts for nothing
OPPOSITES = {"hot": "cold", "up": "down", "left": "right", "day": "night", "old": "new", "in": "out", "on": "off"}
PAIRS = [(f"the opposite of {word} is", f" {other}") for word, other in OPPOSITES.items()]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--model", type=Path, help="a local directory (default: a tiny one is made in OUTPUT/start)")
    parser.add_argument("--data", type=Path, help="lines of prompt, tab, answer (default: seven such pairs)")
    parser.add_argument("--output", type=Path, default=Path("trained"), help="where the trained model goes")
    parser.add_argument("--calls", type=int, default=120, help="updates")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--config", type=Path, help="such as configs/causal_lm_muon.json (default: AdamW, see below)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_tiny_model(directory):
    """Write a Llama with new weights that reads bytes."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def encode(tokenizer, pairs):
    """Return token ids, mask and labels, all (examples, length).

    All have the length of the longest: what travels between stages has one shape. Labels are the tokens themselves,
    not shifted; the prompt and the padding are not to be predicted.
    """
    rows = []
    for prompt, answer in pairs:
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        after = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((before, after))
    length = max(len(before) + len(after) for before, after in rows)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(rows), length), padding)
    labels = torch.full((len(rows), length), IGNORED)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, (before, after) in enumerate(rows):
        end = len(before) + len(after)
        ids[row, :end] = torch.tensor(before + after)
        labels[row, len(before) : end] = torch.tensor(after)
        mask[row, :end] = 1
    return ids, mask, labels


def micro_batches(ids, mask, labels, size, seed):
    """Yield ((token ids, mask), labels) without end, in an order that depends on the seed alone, not on the rank."""
    order = random.Random(seed)
    chosen = itertools.chain.from_iterable(iter(lambda: order.sample(range(len(ids)), len(ids)), None))
    while True:
        rows = list(itertools.islice(chosen, size))
        yield (ids[rows], mask[rows]), labels[rows]


def generate(directory, prompts):
    """Print what the saved model says, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    for prompt in prompts:
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            (output,) = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        print(f"generated: {tokenizer.decode(output, skip_special_tokens=True)}", flush=True)


def main():
    args = arguments()
    with ds_ddg.swap():  # inside, DeepSpeed does not compile for a minute on CPU what only inference uses
        deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    directory = args.model or args.output / "start"
    if args.model is None and comm.get_rank() == 0:
        make_tiny_model(directory)
    comm.barrier()  # the others read what the first has written
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    pairs = [line.split("\t") for line in args.data.read_text().splitlines()] if args.data else PAIRS

    stages = comm.get_world_size()
    net = PipelineModule(
        causal_lm(directory),
        num_stages=stages,
        loss_fn=next_token_loss,
        partition_method="type:TransformerLayer",  # the same number of transformer layers
    )
    load_pretrained(net, directory)  # before ds_ddg.initialize, which copies weights
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": max(2, stages - 1),  # so gradients are one update old at most
        # Without "torch_adam" DeepSpeed compiles one of its own first, which takes a minute and a compiler.
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "weight_decay": 0.01, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "steps_per_print": max(1, args.calls // 6),
    }
    config = json.loads(args.config.read_text()) if args.config else config
    engine, _, _, _ = ds_ddg.initialize(model=net, model_parameters=net.parameters(), config=config)
    data = micro_batches(*encode(tokenizer, pairs), size=4, seed=args.seed)
    for _ in range(args.calls):
        engine.train_batch(data)

    engine.drain()  # gradients in flight are not in the files
    save_pretrained(net, args.output)  # on all ranks: each writes the weights of its own stage
    if comm.get_rank() == 0:
        tokenizer.save_pretrained(args.output)
        generate(args.output, [prompt for prompt, _ in pairs[:4]])


if __name__ == "__main__":
    main()
