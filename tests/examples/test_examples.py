"""Each example as its docstring says to run it, and what it prints."""

from __future__ import annotations

import ast
import json
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_ddg.models import read_state_dict
from helpers.notebooks import written
from helpers.script_runs import launched

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ENGINE_LINE = re.compile(r"^steps: \d+ loss: (?P<loss>\S+) \(of call (?P<call>\d+), counted from 0\)", re.M)


def run(folder: Path, name: str, *arguments: str) -> str:
    """What an example prints on two stages, started in an empty folder."""
    status, output, _ = launched([str(EXAMPLES / name), *arguments], folder)
    assert status == 0, output
    return output


def losses(output: str) -> dict[int, str]:
    """Those that the engine has printed, by call."""
    found = {int(line["call"]): line["loss"] for line in ENGINE_LINE.finditer(output)}
    assert found, output
    return found


def falls(output: str) -> float:
    """By how much the last loss that the engine has printed is below the first."""
    values = [float(loss) for loss in losses(output).values()]
    return 1 - values[-1] / values[0]


# -- what they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_one_short_file_with_its_command(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 150
    assert re.search(rf"^    (deepspeed --num_gpus 2|python) {path.name}", ast.get_docstring(tree) or "", re.M)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    neighbours = {"recipes", "benchmarks", "tests", "helpers", *(other.stem for other in EXAMPLES.glob("*.py"))}
    assert not {str(name).partition(".")[0] for name in imported} & neighbours
    assert re.search(r"train_batch\(", text)  # the loop is there to be read


def test_the_notebook_is_the_script() -> None:
    """`python tests/helpers/notebooks.py examples/what_would_delay_do.py` writes it anew."""
    script = EXAMPLES / "what_would_delay_do.py"
    assert script.with_suffix(".ipynb").read_text() == written(script.read_text())


# -- what they do -----------------------------------------------------------------------------------------------------


def test_minimal_has_one_number_for_one_loss(tmp_path: Path) -> None:
    output = run(tmp_path, "minimal.py")
    own = re.findall(r"^loss of call (\d+), counted from 0: (\S+)$", output, re.M)
    last = max(losses(output))
    assert own == [(str(last), losses(output)[last])]
    assert last == 98  # a hundred calls from 0 on, and with two stages and M = 2 the newest loss is one call old
    assert falls(output) > 0.3
    assert list(tmp_path.iterdir()) == []


def test_minimal_is_split_without_training() -> None:
    command = [sys.executable, "-m", "ds_ddg", "partition", "minimal.py:layers", "--stages", "4"]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert re.search(r"^\s+3  .*Linear \+ cross_entropy", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_cifar_resnet_learns_digits(tmp_path: Path, schedule: str) -> None:
    output = run(tmp_path, "cifar_resnet.py", "--schedule", schedule)
    ((loss, accuracy),) = re.findall(rf"^{schedule}: loss (\S+), accuracy (\S+) on held-out images$", output, re.M)
    assert float(loss) < 0.6, output
    assert float(accuracy) > 0.8, output


def write_cifar(folder: Path) -> None:
    """As the unpacked archive, with a few images of noise."""
    generator = torch.Generator().manual_seed(0)
    directory = folder / "cifar-10-batches-py"
    directory.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = torch.randint(256, (32, 3072), generator=generator, dtype=torch.uint8).numpy()
        content = {"data": images, "labels": torch.randint(10, (32,), generator=generator).tolist()}
        (directory / name).write_bytes(pickle.dumps(content))
    (directory / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))


def test_cifar_resnet_reads_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)  # digests are the real
    write_cifar(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "cifar_resnet.py"))
    images, labels, held_out, answers = example["cifar10"](str(tmp_path))
    assert (images.shape, held_out.shape) == ((160, 3, 32, 32), (32, 3, 32, 32))
    assert (labels.shape, answers.shape) == ((160,), (32,))
    assert images.min() == -1.0
    assert images.max() == 1.0
    assert len(list(example["in_order"](images, labels))) == 10


def test_hf_causal_lm_saves_what_it_has_learned(tmp_path: Path) -> None:
    output = run(tmp_path, "hf_causal_lm.py")
    assert falls(output) > 0.9
    said = re.findall(r"^generated: (.*)$", output, re.M)
    assert said == [
        "the opposite of hot is cold",
        "the opposite of up is down",
        "the opposite of left is right",
        "the opposite of day is night",
    ]
    start, trained = (read_state_dict(tmp_path / "trained" / name) for name in ("start", "."))
    assert start.keys() == trained.keys()
    assert all(changed(start[key], trained[key]) for key in start)


def changed(before: Tensor, after: Tensor) -> bool:
    """Whether a weight has been trained."""
    return before.shape == after.shape and not torch.equal(before, after)


def test_hf_causal_lm_goes_on_from_a_directory(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = ByT5Tokenizer(extra_ids=0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "pairs.tsv").write_text("one\t two\nthree\t four five\n")
    arguments = ["--model", "gpt2", "--data", "pairs.tsv", "--output", "out", "--calls", "80"]
    output = run(tmp_path, "hf_causal_lm.py", *arguments)
    assert re.findall(r"^generated: (.*)$", output, re.M) == ["one two", "three four five"]
    assert not (tmp_path / "out" / "start").exists()


def table(output: str) -> dict[tuple[str, int, int], tuple[str, int]]:
    """(learning rate, M, K) -> the loss and how old the first stage's gradients are."""
    found, rate, stages = {}, "", []
    for line in output.splitlines():
        if head := re.match(r"learning rate (\S+)", line):
            rate, stages = head[1], [int(k) for k in re.findall(r"K = (\d+)", line)]
        elif row := re.match(r"M = (\d+)", line):
            cells = re.findall(r"(\S+) \((\d+) old\)", line)
            for k, (loss, old) in zip(stages, cells, strict=True):
                found[rate, int(row[1]), k] = loss, int(old)
    return found


def test_what_would_delay_do_as_script_and_as_notebook(tmp_path: Path) -> None:
    """Both print the same table, in which delay does no good where nothing is averaged (M = 1)."""
    cells = json.loads((EXAMPLES / "what_would_delay_do.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    as_one = tmp_path / "cells.py"  # one after the other, as "run all" does
    as_one.write_text("\n\n".join("".join(cell["source"]) for cell in code))
    printed = [
        subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for script in (EXAMPLES / "what_would_delay_do.py", as_one)
    ]
    assert printed[0] == printed[1]
    losses = table(printed[0])
    assert len(losses) == 2 * 3 * 4
    assert [losses["0.02", 1, k][1] for k in (1, 2, 4, 8)] == [0, 1, 3, 7]
    assert [losses["0.02", 4, k][1] for k in (1, 2, 4, 8)] == [0, 1, 1, 2]
    without_delay, with_most = (float(losses["0.05", 1, k][0].replace("diverged", "inf")) for k in (1, 8))
    assert without_delay < 1.5 < with_most
