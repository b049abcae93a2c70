"""The BERT recipes from text to a model that plain transformers runs: what they report is what that model does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from helpers.distributed import GetRanks
from helpers.paths import ROOT
from helpers.recipe_runs import WORDS, metrics, recipe, sentence

pytest.importorskip("transformers")


LENGTH = 16
TRAIN = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "steps_per_print": 10**9}
CONFIG = {
    **TRAIN,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": 0.01}},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, labelled text and DeepSpeed's JSON."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    (folder / "text").mkdir()
    (folder / "text" / "all.txt").write_text("\n\n".join(sentence(n) for n in range(250)))
    for name, numbers in (("train", range(60)), ("dev", range(60, 81))):
        rows = [f"{sentence(n)}\tis {WORDS[n % 3]}\t{WORDS[n % 3]}" for n in numbers]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tgold_label", *rows]) + "\n")
    return folder


PRETRAIN = "--text {work}/text --vocabulary 120 --layers 2 --hidden 16 --length 16 --epochs 2"
RESUME = PRETRAIN + " --checkpoint-dir {work}/checkpoints --resume"
FINETUNE = "--train {work}/train.tsv --dev {work}/dev.tsv --model {work}/pretrained/model --length 12 --epochs 2"


@pytest.fixture(scope="module")
def pretrained(ranks: GetRanks, work: Path) -> Path:
    directory = work / "pretrained"
    arguments = f"{PRETRAIN} --output-dir {directory} --checkpoint-dir {work}/checkpoints --checkpoint-every 5"
    ranks(2).run(recipe, "bert/pretrain", arguments, work)
    return directory


def test_reported_perplexity_is_that_of_the_saved_model(pretrained: Path, work: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from recipes.bert import text
    from recipes.language import corpus
    from recipes.language.batches import IGNORED, held_out_batches

    tokenizer = AutoTokenizer.from_pretrained(pretrained / "model")
    model = AutoModelForMaskedLM.from_pretrained(pretrained / "model").eval()
    _, documents = corpus.split(corpus.read_documents([work / "text"]))
    packed = text.pack(documents, tokenizer, LENGTH)
    masking = text.Masking.of(tokenizer)
    total, count = 0.0, 0
    for inputs, labels in held_out_batches(len(packed), lambda rows, gen: masking(packed[rows], gen), 4):
        with torch.no_grad():
            logits = model(input_ids=inputs).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORED).sum())
    found = metrics(pretrained)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["perplexity"] < 0.75 * found["vocabulary"]
    assert (found["schedule"], found["stages"], found["micro_batches"]) == ("ddg", 2, 2)
    assert (pretrained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_ends_with_the_same_weights(ranks: GetRanks, pretrained: Path, work: Path) -> None:
    """From the checkpoint before the last one, in the middle of an epoch."""
    from ds_ddg.models import read_state_dict

    saved = sorted(int(path.name.removeprefix("global_step")) for path in (work / "checkpoints").glob("global_step*"))
    assert saved == [15, 20]
    (work / "checkpoints" / "latest").write_text("global_step15")
    resumed = work / "resumed"
    arguments = f"{PRETRAIN} --output-dir {resumed} --checkpoint-dir {work}/checkpoints --checkpoint-every 5 --resume"
    ranks(2).run(recipe, "bert/pretrain", arguments, work)
    once, twice = (read_state_dict(directory / "model") for directory in (pretrained, resumed))
    assert once.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[key]) for key, tensor in once.items())
    for key in ("perplexity", "train_loss"):
        assert metrics(pretrained)[key] == metrics(resumed)[key]


def initial_weights(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    from transformers import BertConfig

    from ds_ddg.models import masked_lm, masked_lm_loss
    from recipes import steps

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    specs = masked_lm(config, inputs=("input_ids",))
    net = steps.pipeline(specs, masked_lm_loss, world_size, 3, "type:TransformerLayer")
    pieces = [module for module in net.modules() if hasattr(module, "original_state")]
    return {key: tensor.detach().clone() for piece in pieces for key, tensor in piece.original_state().items()}


def test_initial_weights_do_not_depend_on_how_many_stages(ranks: GetRanks) -> None:
    (one,) = ranks(1).run(initial_weights)
    first, last = ranks(2).run(initial_weights)
    assert one.keys() == first.keys() | last.keys()
    assert first.keys() & last.keys()  # the tied embedding
    for part in (first, last):
        assert all(torch.equal(tensor, one[key]) for key, tensor in part.items())


@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_reported_scores_are_those_of_the_saved_model(
    ranks: GetRanks, pretrained: Path, work: Path, schedule: str
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from recipes.bert import glue

    directory = work / schedule
    ranks(2).run(recipe, "bert/finetune", f"{FINETUNE} --schedule {schedule} --output-dir {directory}", work)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForSequenceClassification.from_pretrained(directory / "model").eval()
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    dev = glue.read_examples(work / "dev.tsv")
    encoded = tokenizer(*map(list, zip(*dev.texts, strict=True)), padding="max_length", max_length=12,
                        truncation=True, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        answers = [model.config.id2label[number] for number in model(**encoded).logits.argmax(dim=1).tolist()]
    pairs = list(zip(answers, dev.labels, strict=True))
    f1 = []
    for name in ("blue", "green", "red"):
        both = sum(answer == label == name for answer, label in pairs)
        either = sum((answer == name) + (label == name) for answer, label in pairs)
        f1.append(2 * both / either if either else 0.0)
    found = metrics(directory)
    assert found["schedule"] == schedule
    assert found["accuracy"] == pytest.approx(sum(answer == label for answer, label in pairs) / len(pairs))
    assert found["f1"] == pytest.approx(sum(f1) / 3)


def test_f1_of_two_labels_is_that_of_the_second() -> None:
    from recipes.bert.finetune import measure, scores

    labels = torch.tensor([0, 0, 0, 1, 1, -100])
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]])
    loss, *counts = measure(logits, labels).tolist()
    assert counts == [2, 1, 1, 1]
    assert loss == pytest.approx(float(F.cross_entropy(logits[:5], labels[:5], reduction="sum")))
    assert scores(counts, 2) == pytest.approx({"accuracy": 0.6, "f1": 0.5})


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("pretrain", f"{PRETRAIN} --text {{work}}/nothing", "nothing does not exist; expected a text file"),
        ("pretrain", f"{PRETRAIN} --length 200 --model {{work}}/pretrained/model", "model's 16 tokens, got 200"),
        ("pretrain", f"{PRETRAIN} --heads 3", "hidden size"),
        ("finetune", f"{FINETUNE} --dev {{work}}/text/all.txt", "all.txt: expected a .tsv file"),
        ("finetune", f"{FINETUNE} --model {{work}}", "no config.json in .*; expected a Hugging Face directory"),
        ("finetune", f"{FINETUNE} --length 17", "model's 16 tokens, got 17"),
        ("finetune", f"{FINETUNE} --model {{work}}/cut", "lack parts of the encoder: bert.encoder.layer.1"),
        ("pretrain", f"{PRETRAIN} --model {{work}}/cut", "lacks 16 tensors"),
        (
            "pretrain",
            f"{PRETRAIN} --output-dir /proc/nope",
            "the model in --output-dir: cannot write to '/proc/nope/model' ",
        ),
        (
            "finetune",
            f"{FINETUNE} --output-dir /proc/nope",
            "the model in --output-dir: cannot write to '/proc/nope/model' ",
        ),
        ("finetune", f"{FINETUNE} --checkpoint-dir /proc/nope", "--checkpoint-dir: cannot write to '/proc/nope' "),
        ("pretrain", f"{PRETRAIN} --stages 3", "--stages 3 needs a multiple of 3 processes"),
        ("finetune", f"{FINETUNE} --stages 3", "--stages 3 needs a multiple of 3 processes"),
        ("pretrain", f"{RESUME} --dropout 0.1", r"a run with hidden_dropout_prob 0.0, now 0.1; attention_probs_drop"),
        ("pretrain", f"{RESUME} --epochs 3", r'a run with epochs 2, now 3 \(they set the "auto" of the scheduler'),
        ("pretrain", f"{RESUME} --text {{work}}/other.txt", r"text_checksum \d+, now \d+: use the same"),
    ],
    ids=[
        *("no text", "too long", "heads", "no table", "no model", "too long for the model", "part of it", "part"),
        *("output", "output of fine-tuning", "checkpoints", "stages", "stages of fine-tuning"),
        *("another dropout", "another length", "another text"),
    ],
)
def test_every_rank_says_what_is_wrong_before_training(
    ranks: GetRanks, pretrained: Path, work: Path, name: str, arguments: str, expected: str
) -> None:
    import re
    import shutil

    from safetensors.torch import save_file

    from ds_ddg.models import read_state_dict

    other = work / "other.txt"
    other.write_text((work / "text" / "all.txt").read_text().replace("red dog", "red cow"))
    cut = work / "cut"
    if not cut.exists():
        shutil.copytree(pretrained / "model", cut, ignore=shutil.ignore_patterns("model*.safetensors*"))
        state = read_state_dict(pretrained / "model")
        kept = {key: tensor for key, tensor in state.items() if ".layer.1." not in key}
        save_file(kept, cut / "model.safetensors")
    for text in ranks(2).run(recipe, f"bert/{name}", arguments, work, True):
        assert re.search(expected, text, re.DOTALL | re.IGNORECASE), text


def test_under_a_launcher_the_last_line_is_the_metrics(work: Path, pretrained: Path) -> None:
    """From another folder, where the package is not installed, going on from a model of its own."""
    directory = work / "launched"
    arguments = PRETRAIN.format(work=work).replace("--epochs 2", "--epochs 1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29642"]
    command += [f"{ROOT}/recipes/bert/pretrain.py", "--deepspeed_config", f"{work}/ds.json", *arguments.split()]
    command += ["--model", f"{pretrained}/model", "--output-dir", str(directory)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    last = json.loads(run.stdout.strip().splitlines()[-1])
    assert last == metrics(directory)
    assert last["perplexity"] < metrics(pretrained)["perplexity"]
