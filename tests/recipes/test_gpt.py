"""The GPT recipe from text to a model that plain transformers runs: what it reports is what that model does."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch

from helpers.distributed import GetRanks
from helpers.paths import ROOT
from helpers.recipe_runs import metrics, recipe, sentence
from helpers.script_runs import launched

pytest.importorskip("transformers")

LENGTH = 16
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "steps_per_print": 10**9,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 4}},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and DeepSpeed's JSON."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    (folder / "text").mkdir()
    (folder / "text" / "all.txt").write_text("\n\n".join(sentence(n) for n in range(250)))
    (folder / "text" / "other").write_text("\n\n".join(f"other {sentence(n)}" for n in range(250)))
    return folder


SIZE = "--vocabulary 300 --layers 2 --hidden 16 --length 16"
PRETRAIN = f"--text {{work}}/text {SIZE} --epochs 2"
SAVING = f"{PRETRAIN} --checkpoint-dir {{work}}/checkpoints --checkpoint-every 5"


@pytest.fixture(scope="module")
def pretrained(ranks: GetRanks, work: Path) -> Path:
    directory = work / "pretrained"
    ranks(2).run(recipe, "gpt/pretrain", f"{SAVING} --output-dir {directory}", work)
    return directory


def losses(directory: Path) -> dict[int, float]:
    with (directory / "losses.csv").open() as file:
        return {int(row["call"]): float(row["loss"]) for row in csv.DictReader(file)}


def check_saved_model(directory: Path, work: Path) -> None:
    """The reported values are those of the model that transformers loads, by transformers' own loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.gpt import text
    from recipes.language import corpus

    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    _, documents = corpus.split(corpus.read_documents([work / "text"]))
    packed = text.pack(documents, tokenizer, LENGTH)
    with torch.no_grad():
        tokens = packed.tokens.long()
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    found = metrics(directory)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss * packed.tokens_per_byte / math.log(2), rel=1e-5)
    assert found["perplexity"] < 0.2 * found["vocabulary"]
    assert (found["stages"], found["micro_batches"], found["vocabulary"]) == (2, 2, len(tokenizer))
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_reported_perplexity_is_that_of_the_saved_model(pretrained: Path, work: Path) -> None:
    check_saved_model(pretrained, work)
    assert metrics(pretrained)["schedule"] == "ddg"


def test_a_resumed_run_ends_with_the_same_weights(ranks: GetRanks, pretrained: Path, work: Path) -> None:
    """From the checkpoint before the last one."""
    from ds_ddg.models import read_state_dict

    saved = sorted(int(path.name.removeprefix("global_step")) for path in (work / "checkpoints").glob("global_step*"))
    assert len(saved) == 2
    (work / "checkpoints" / "latest").write_text(f"global_step{saved[0]}")
    resumed = work / "resumed"
    ranks(2).run(recipe, "gpt/pretrain", f"{SAVING} --output-dir {resumed} --resume", work)
    once, twice = (read_state_dict(directory / "model") for directory in (pretrained, resumed))
    assert once.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[key]) for key, tensor in once.items())
    for key in ("perplexity", "bits_per_byte", "train_loss"):
        assert metrics(pretrained)[key] == metrics(resumed)[key]


def test_as_if_stages_trains_as_a_pipeline_does(ranks: GetRanks, work: Path) -> None:
    """With the embedding that two stages share: its gradient is as late as that of the first, which owns it."""
    arguments = PRETRAIN.replace("--epochs 2", "--epochs 1")
    for world_size, name, more in ((2, "pipeline", ""), (1, "imagined", "--as-if-stages 2"), (1, "plain", "")):
        ranks(world_size).run(recipe, "gpt/pretrain", f"{arguments} {more} --output-dir {{work}}/{name}", work)
    assert metrics(work / "imagined")["as_if_stages"] == 2
    assert "as_if_stages" not in metrics(work / "plain")
    pipeline, imagined, plain = (losses(work / name) for name in ("pipeline", "imagined", "plain"))
    assert len(pipeline) >= 10
    assert {call: imagined[call] for call in pipeline} == pytest.approx(pipeline, rel=1e-5)
    assert {call: plain[call] for call in pipeline} != pytest.approx(pipeline, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (f"{PRETRAIN} --text {{work}}/nothing", "nothing does not exist; expected a text file"),
        (f"{PRETRAIN} --vocabulary 256", "--vocabulary 256 is too small: the 256 bytes and .* alone are 257"),
        (f"{PRETRAIN} --length 3000", "documents of [0-9]+ tokens do not fill one sequence of 3000"),
        (f"{PRETRAIN} --heads 3", "embed_dim"),
        (f"{PRETRAIN} --length 200 --model {{work}}/pretrained/model", "model's 16 tokens, got 200"),
        (f"{PRETRAIN} --model {{work}}/endless", "has no end of text, to stand between documents"),
        (f"{PRETRAIN} --stages 3", "--stages 3 needs a multiple of 3 processes"),
        (f"{PRETRAIN} --output-dir /proc/nope", "the model in --output-dir: cannot write to '/proc/nope/model' "),
        (f"{PRETRAIN} --as-if-stages 2", "--as-if-stages 2: needs one process, got 2"),
        (f"{SAVING} --resume --dropout 0.1", "a run with embd_pdrop 0.0, now 0.1; resid_pdrop 0.0, now 0.1; attn_pd"),
        (f"{SAVING} --resume --text {{work}}/text/other", r"text_checksum \d+, now \d+"),
    ],
    ids=[
        *("no text", "vocabulary", "too long", "heads", "too long for the model", "no end of text", "stages"),
        *("output", "one process", "another dropout", "another text"),
    ],
)
def test_every_rank_says_what_is_wrong_before_training(
    ranks: GetRanks, pretrained: Path, work: Path, arguments: str, expected: str
) -> None:
    import shutil

    if not (endless := work / "endless").exists():
        shutil.copytree(pretrained / "model", endless)
        settings = json.loads((endless / "tokenizer_config.json").read_text())
        settings["eos_token"] = None
        (endless / "tokenizer_config.json").write_text(json.dumps(settings))
    for text in ranks(2).run(recipe, "gpt/pretrain", arguments, work, True):
        assert re.search(expected, text, re.DOTALL), text


def test_under_the_launcher_by_1f1b_from_a_model(work: Path, pretrained: Path) -> None:
    """From another folder, going on from the model of a run by DDG."""
    directory = work / "launched"
    arguments = PRETRAIN.format(work=work).replace("--epochs 2", "--epochs 1")
    command = [f"{ROOT}/recipes/gpt/pretrain.py", "--deepspeed_config", f"{work}/ds.json", *arguments.split()]
    command += ["--schedule", "1f1b", "--model", f"{pretrained}/model", "--output-dir", str(directory)]
    status, output, _ = launched(command, work)
    assert status == 0, output
    assert json.dumps(metrics(directory)) in output.splitlines()
    check_saved_model(directory, work)
    assert metrics(directory)["schedule"] == "1f1b"
    assert metrics(directory)["perplexity"] < metrics(pretrained)["perplexity"]
