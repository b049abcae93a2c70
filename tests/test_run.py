"""Unchanged scripts under ``ds_ddg.run``: what they see, and training under every launcher.

The scripts in ``scripts/`` do not know of ds_ddg. Each is trained by plain DeepSpeed, in processes that this session
has anyway, and with the delayed schedule under a launcher, as a user starts it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.ports import free_port
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT
from helpers.paths import LAUNCHER_VARIABLES, ROOT, SCRIPTS

BINARIES = Path(sys.executable).parent
STEPS = 12
PATIENCE = 240.0


def environment(**more: str) -> dict[str, str]:
    """That of a user's shell: nothing in it of a launcher."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {
        **inherited,
        "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **more,
    }


# -- what a script sees -----------------------------------------------------------------------------------------------

LOOK = """\
import atexit, json, pickle, sys

heavy = sorted({"deepspeed", "torch"} & set(sys.modules))
import sibling

class Thing:
    pass

def there():
    return isinstance(pickle.loads(pickle.dumps(Thing())), sys.modules["__main__"].Thing)

def seen():
    main = sys.modules["__main__"]
    names = [name for name in sorted(vars(main)) if name != "__annotations__"]
    names += [getattr(main.__spec__, "name", None)]
    return [sys.argv, sys.path, __name__, __file__, __package__, sibling.__file__, heavy, there(), names]

if __name__ == "__main__":
    print(json.dumps(seen()))
    atexit.register(lambda: print(there(), sys.argv))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in ("project", "project/package"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "look.py").write_text(LOOK)
        (tmp_path / folder / "sibling.py").write_text("")
    (tmp_path / "project" / "package" / "__init__.py").write_text("")
    return tmp_path / "project"


def python(cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (".", ["look.py"]),
        ("package", ["../look.py"]),
        ("..", ["project/package/look.py"]),
        (".", ["-m", "look"]),
        (".", ["-m", "package.look"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_script_sees_what_python_shows_it(project: Path, where: str, what: list[str]) -> None:
    arguments = [*what, "-m", "--flag", "--help", "--", "file.txt"]
    cwd = project / where
    usual, ours = python(cwd, *arguments), python(cwd, "-m", "ds_ddg.run", *arguments)
    assert usual.stdout.count("\n") == 2, usual.stderr
    assert (ours.stdout, ours.stderr, ours.returncode) == (usual.stdout, usual.stderr, 0)


def test_a_script_under_safe_path(project: Path) -> None:
    variables = {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{project}"}
    usual, ours = (python(project, *how, "look.py", **variables) for how in ([], ["-m", "ds_ddg.run"]))
    assert (ours.stdout, ours.stderr) == (usual.stdout, "")


@pytest.mark.parametrize(
    "before", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank", "1", "--flag"], ["--local_rank=1", "-m"]]
)
def test_a_launchers_options_reach_the_script(project: Path, before: list[str]) -> None:
    name = "look" if "-m" in before else "look.py"
    process = python(project, "-m", "ds_ddg.run", *before, name, "--epochs", "2")
    argv = json.loads(process.stdout.splitlines()[0])[0]
    assert argv[1:] == [*(word for word in before if word != "-m"), "--epochs", "2"]
    assert Path(argv[0]).name == "look.py"


@pytest.mark.parametrize(
    "code",
    [
        "sys.exit()",
        "sys.exit(3)",
        "sys.exit('words')",
        "raise KeyboardInterrupt",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "import a_module_that_is_not_there",
        "assert sys.argv == 1, 'never'",
        "(",
    ],
)
def test_how_a_script_ends_passes_through(tmp_path: Path, code: str) -> None:
    (tmp_path / "end.py").write_text(f"import os, signal, sys\n{code}\n")
    usual, ours = python(tmp_path, "end.py"), python(tmp_path, "-m", "ds_ddg.run", "end.py")
    assert ours.returncode == usual.returncode
    # Before the script's own frames are those of who runs it.
    assert ours.stderr.endswith(usual.stderr.removeprefix("Traceback (most recent call last):\n"))
    assert bool(ours.stderr) == bool(usual.stderr)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "usage: python -m ds_ddg.run"),
        (["--local_rank=0", "-h"], 0, "usage: python -m ds_ddg.run"),
        ([], 1, "usage: python -m ds_ddg.run"),
        (["--epochs", "3", "look.py"], 1, "no script '3'"),
        (["package"], 1, "no script 'package'"),
        (["-m"], 1, "-m needs the name of a module"),
        (["-m", "package"], 1, "no module 'package' that can be run"),
        (["-m", "package.nowhere"], 1, "no module 'package.nowhere' that can be run"),
        (["-m", "nowhere.look"], 1, "no module 'nowhere.look' that can be run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(project: Path, arguments: list[str], status: int, words: str) -> None:
    process = python(project, "-m", "ds_ddg.run", *arguments)
    assert process.returncode == status
    assert words in (process.stderr if status else process.stdout)
    assert "Traceback" not in process.stderr


def test_an_import_error_of_the_package_itself_is_shown(project: Path) -> None:
    (project / "package" / "__init__.py").write_text("import a_module_that_is_not_there")
    process = python(project, "-m", "ds_ddg.run", "-m", "package.look")
    assert process.returncode == 1
    assert process.stderr.endswith("ModuleNotFoundError: No module named 'a_module_that_is_not_there'\n")


@pytest.mark.parametrize(
    ("variables", "alone"),
    [({}, True), ({"OMPI_COMM_WORLD_SIZE": "2"}, False), ({"MASTER_PORT": "1"}, False)],
    ids=["no launcher", "mpirun", "something of a launcher"],
)
def test_a_process_without_a_launcher_is_a_world_of_its_own(
    tmp_path: Path, variables: dict[str, str], alone: bool
) -> None:
    """DeepSpeed would ask MPI, which most machines do not have."""
    if importlib.util.find_spec("mpi4py"):
        pytest.skip("DeepSpeed asks MPI here")
    (tmp_path / "show.py").write_text("import os; print(*sorted(os.environ))")
    shown = set(python(tmp_path, "-m", "ds_ddg.run", "show.py", **variables).stdout.split())
    assert shown & set(LAUNCHER_VARIABLES) == (
        set(LAUNCHER_VARIABLES) if alone else set(variables) - {"OMPI_COMM_WORLD_SIZE"}
    )


# -- training ---------------------------------------------------------------------------------------------------------

COMPLAINT = re.compile(
    r"Traceback|Error\b|terminate called|core dumped|\bleaked\b|ds_ddg.*warning|warning.*ds_ddg", re.I
)


@dataclass(frozen=True)
class Case:
    """A script under a launcher."""

    script: str
    launcher: str = "deepspeed"
    config: str = "ds.json"
    world_size: int = 2

    def __str__(self) -> str:
        return f"{self.script} under {self.launcher}"


@dataclass(frozen=True)
class Run:
    status: int
    output: str
    files: set[str]

    def reports(self) -> list[dict[str, Any]]:
        """What the ranks printed at their end, by rank."""
        lines = [json.loads(line) for line in self.output.splitlines() if line.startswith('{"rank"')]
        return sorted(lines, key=lambda line: line["rank"])


def command(case: Case, port: int) -> list[str]:
    """As a user types it, in the directory of the scripts."""
    # On CPU, too: --cpu needs mpirun for more than one process.
    accelerate = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    before = {
        "deepspeed": f"deepspeed --num_gpus 2 --master_port {port} --module ds_ddg.run",
        "torchrun": f"torchrun --nproc-per-node 2 --master-port {port} -m ds_ddg.run",
        "accelerate": f"{accelerate} --dynamo_backend no --main_process_port {port} -m ds_ddg.run",
        "python": "python -m ds_ddg.run",
    }[case.launcher.split()[0]]
    what = ["-m", case.script] if case.launcher.endswith(" -m") else [f"{case.script}.py"]
    return [*before.split(), *what, "--deepspeed", "--deepspeed_config", case.config]


def launch(case: Case, output: Path) -> Run:
    process = subprocess.Popen(
        [*command(case, free_port()), "--output", str(output)],
        cwd=SCRIPTS,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and, as it never leaves its session, every rank
        text, _ = process.communicate()
        text += "\nthe launcher did not end"
    return Run(process.returncode, text, names(output))


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()} if output.exists() else set()


GetRun = Callable[[Case], Run]


@pytest.fixture(scope="module")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetRun]:
    """Two launches at a time, ahead of the tests that look at them: nearly all of it is waiting for imports."""
    runs: dict[Case, Future[Run]] = {}
    with ThreadPoolExecutor(2) as pool:
        for item in request.session.items:
            case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
            if item.path == request.path and case is not None and case not in runs:
                runs[case] = pool.submit(launch, case, tmp_path_factory.mktemp("launched") / "output")
        yield lambda case: runs[case].result()
        pool.shutdown(cancel_futures=True)


def run_plain(rank: int, world_size: int, case: Case, output: str) -> dict[str, Any]:
    """The script as it is, under plain DeepSpeed; its launcher has started this process already, as it were."""
    # These processes come from a fork server, so the script's loaders would start one of their own for their workers.
    multiprocessing.set_start_method("fork", force=True)
    arguments = ["--deepspeed_config", str(SCRIPTS / case.config), "--output", output]
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = [case.script, f"--local_rank={rank}", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(SCRIPTS / f"{case.script}.py"), run_name="__main__")
    sys.path.remove(str(SCRIPTS))
    (report,) = Run(0, printed.getvalue(), set()).reports()
    return report


GetPlain = Callable[[Case], tuple[list[dict[str, Any]], set[str]]]


@pytest.fixture(scope="module")
def plain(ranks: GetRanks, tmp_path_factory: pytest.TempPathFactory) -> GetPlain:
    """Reports and files of a script under plain DeepSpeed."""

    @functools.cache
    def get(case: Case) -> tuple[list[dict[str, Any]], set[str]]:
        output = tmp_path_factory.mktemp("plain") / "output"
        return ranks(2).run(run_plain, case, str(output)), names(output)

    return get


def assert_trained(reports: list[dict[str, Any]], engine: str, world_size: int) -> None:
    assert [report["rank"] for report in reports] == list(range(world_size))
    for report in reports:
        assert report["engine"] == engine
        assert report["global_steps"] == len(report["losses"]) == STEPS
        assert report["finite"]
        assert report["losses"] == reports[0]["losses"]
    losses = reports[0]["losses"]
    assert mean(losses[-3:]) < 0.7 * losses[0], "it does not learn"


SCRIPT_CASES = [
    Case("cnn_training_data"),
    Case("repeating_loader"),
    Case("logs_every_step"),
    Case("changing_length"),
    Case("tied_bf16_zero1", config="bf16_zero1.json"),
]
OTHER_LAUNCHERS = [
    Case("repeating_loader", "torchrun -m"),
    Case("cnn_training_data", "accelerate"),
    Case("repeating_loader", "python", world_size=1),
]


@pytest.mark.parametrize("case", [*SCRIPT_CASES, *OTHER_LAUNCHERS], ids=str)
@pytest.mark.proves("unchanged scripts under deepspeed, torchrun, accelerate", modes=DEFAULT)
def test_unchanged_script(launched: GetRun, case: Case) -> None:
    run = launched(case)
    assert run.status == 0, run.output
    assert not COMPLAINT.search(run.output), run.output
    reports = run.reports()
    assert_trained(reports, "DDGEngine", case.world_size)
    for report in reports:
        assert Path(report["argv"][0]).name == f"{case.script}.py"
        assert (f"--local_rank={report['rank']}" in report["argv"]) == (case.launcher == "deepspeed")
    if case.world_size > 1:
        losses = reports[0]["losses"]
        assert losses[1] == losses[0], "one call old, as under DDG"


def name(case: Case) -> str:
    return case.script


@pytest.mark.parametrize("case", SCRIPT_CASES, ids=name)
def test_script_under_plain_deepspeed(plain: GetPlain, case: Case) -> None:
    assert_trained(plain(case)[0], "PipelineEngine", 2)


@pytest.mark.parametrize("case", SCRIPT_CASES, ids=name)
def test_what_differs_is_the_schedule(launched: GetRun, plain: GetPlain, case: Case) -> None:
    """Same data, same weights at the start, same files."""
    expected, files = plain(case)
    run = launched(case)
    seen = run.reports()
    assert seen[0]["losses"][0] == pytest.approx(expected[0]["losses"][0], rel=1e-5)
    assert seen[0].keys() == expected[0].keys()
    assert run.files == files


@pytest.mark.parametrize("case", [Case("logs_every_step")], ids=name)
def test_checkpoints_and_evaluations_of_a_script(launched: GetRun, case: Case) -> None:
    run = launched(case)
    assert {"latest", "global_step5", "global_step10"} <= run.files
    first, last = (report["evaluations"] for report in run.reports())
    assert first == last
    assert len(first) == 3
    assert first[-1] < first[0]
