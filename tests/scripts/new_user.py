"""A new user's first minutes, from an empty folder: build, install with an extra, two examples, text from the result.

    python tests/scripts/new_user.py

The new environment shares what this one has installed, so nothing is downloaded, and sees nothing that the package
does not require.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ports import free_port
from helpers.packages import ROOT, build, environment, run

GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("trained"), AutoTokenizer.from_pretrained("trained")
prompt = tokenizer("the opposite of old is", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16, do_sample=False)[0], skip_special_tokens=True))
"""


def first_minutes(folder: Path) -> None:
    """Do all of it, and print each command with what it prints; raises where one fails."""
    (folder / "work").mkdir()
    _, wheel = build(folder)
    print(f"$ pip install '{wheel.name}[hf]'", flush=True)
    binaries = environment(folder / "environment", wheel, "hf")
    for name in ("minimal.py", "hf_causal_lm.py"):
        shutil.copy(ROOT / "examples" / name, folder / "work")
    compiled = folder / "compiled"
    variables = {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(compiled),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    where = "import ds_ddg; print(ds_ddg.__file__)"
    for command in (
        ["python", "-c", where],
        ["ds-ddg", "plan", "--stages", "2", "--clock"],
        ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "minimal.py"],
        ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "hf_causal_lm.py"],
        ["python", "-c", GENERATE],
    ):
        print("$", *command, flush=True)
        program = str(binaries / command[0])
        print(run([program, *command[1:]], folder / "work", **variables))
    if compiled.exists():
        raise AssertionError(f"DeepSpeed compiled {', '.join(os.listdir(compiled))}, for which a user would wait")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="new_user_") as empty:
        first_minutes(Path(empty))
