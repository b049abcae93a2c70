"""The time to a loss from the records of trainings: the curves, the targets, a page and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ds_ddg.extras import extra

__all__ = ["SHARES", "Curve", "page", "reached", "rows", "save_picture", "smoothed", "target"]

SHARES = (0.5, 0.75, 1.0)
"""The parts of a run at which its losses are targets."""
WINDOW = 0.1
"""The calls that a point of the smoothed loss is the mean of, as a share of the run."""
SCHEDULES = ("1f1b", "ddg")
_NAMES = {"1f1b": "1F1B", "ddg": "DDG"}
_COLOURS = {"1f1b": ("#d17a00", "--"), "ddg": ("#14507a", "-")}

_SETTING = ("recipe", "K", "M")

Run = dict[str, Any]
"""One training: ``recipe``, ``stages``, ``micro_batches``, ``seed``, ``schedule``; ``total_calls``, ``total_seconds``;
``losses`` and ``seconds`` by call, as far as known; ``held_out``, a metric's name and its last value."""


class Curve(NamedTuple):
    """A smoothed training loss; all three are parallel."""

    calls: list[int]
    """Number of the newest call in the mean."""
    seconds: list[float]
    """Seconds of training until the script had the loss of that call."""
    losses: list[float]


def smoothed(run: Run) -> Curve:
    """Return means over the last `WINDOW` of the run; so the first ones are missing."""
    size = max(1, round(WINDOW * run["total_calls"]))
    losses, ends = run["losses"], range(size, len(run["losses"]) + 1)
    means = [sum(losses[end - size : end]) / size for end in ends]
    return Curve([end - 1 for end in ends], [run["seconds"][end - 1] for end in ends], means)


def reached(curve: Curve, loss: float) -> int | None:
    """Return the first place on the curve from which on it never is above `loss`; None if its end is."""
    above = [place for place, value in enumerate(curve.losses) if value > loss]
    first = above[-1] + 1 if above else 0
    return first if first < len(curve.losses) else None


def target(runs: Sequence[Run], share: float) -> float:
    """Return the highest smoothed loss of all runs, whatever their schedule, after this share of its calls."""
    return max(_at(smoothed(run), share * run["total_calls"]) for run in runs)


def _at(curve: Curve, calls: float) -> float:
    """Return the last of the curve's losses within so many calls."""
    return [loss for call, loss in zip(curve.calls, curve.losses, strict=True) if call < calls][-1]


def rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return a row for every setting (recipe, stages, M) and target: when each schedule reached it, seed by seed."""
    settings: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        settings.setdefault((run["recipe"], run["stages"], run["micro_batches"]), []).append(run)
    found = []
    for (recipe, stages, micro_batches), group in settings.items():
        by_seed = {schedule: {r["seed"]: r for r in group if r["schedule"] == schedule} for schedule in SCHEDULES}
        seeds = sorted(by_seed["1f1b"].keys() & by_seed["ddg"].keys())
        for share in SHARES:
            loss = target(group, share)
            row: dict[str, Any] = {"recipe": recipe, "stages": stages, "micro_batches": micro_batches}
            row |= {"share": share, "target": loss, "seeds": seeds}
            for schedule in SCHEDULES:
                curves = [smoothed(by_seed[schedule][seed]) for seed in seeds]
                places = [reached(curve, loss) for curve in curves]
                both = list(zip(curves, places, strict=True))
                row[schedule] = {
                    "seconds": [None if at is None else curve.seconds[at] for curve, at in both],
                    "calls": [None if at is None else curve.calls[at] + 1 for curve, at in both],
                }
            row["gains"] = {what: _ratios(row, what) for what in ("seconds", "calls")}
            found.append(row)
    return found


def _ratios(row: dict[str, Any], what: str) -> list[float]:
    """Return 1F1B's value by DDG's for every seed with which both got there; above 1: DDG needed less."""
    pairs = zip(row["1f1b"][what], row["ddg"][what], strict=True)
    return [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]


def page(results: dict[str, Any], picture: str) -> str:
    """Return the page in Markdown; `picture` is the address of the picture as seen from there."""
    about, runs = results["about"], results["runs"]
    found = rows(runs)
    slower = [row for row in found if row["gains"]["seconds"] and median(row["gains"]["seconds"]) < 1]
    missed = [row for row in found if len(row["gains"]["seconds"]) < len(row["seeds"])]
    verdict = f"DDG was there sooner in {len(found) - len(slower)} of {len(found)} rows (by the median of the seeds)"
    verdict += f"; not in: {'; '.join(map(_where, slower))}." if slower else "."
    if missed:
        verdict += f" Not reached by every run, such seeds are left out: {'; '.join(map(_where, missed))}."
    parts = [
        "# Time to a loss",
        f"Written by `{about['command']}`, on {about['cores']} cores, {about['platform']}, Python {about['python']}, "
        f"torch {about['torch']}, DeepSpeed {about['deepspeed']}.",
        "The [recipes](recipes.md) themselves, one process for each stage with one thread each, with DDG and with "
        "DeepSpeed's 1F1B in turns: same seeds, so same weights at the start and same data in the same order; same "
        "batch, same M. Where M is not the recipe's own, micro-batches are larger or smaller instead. Seconds are of "
        "training alone, without start, evaluation and checkpoints, on rank 0; DDG tells a loss ceil((K-1) / M) calls "
        "late, and that wait is in its time.",
        f"The loss is the mean over the last {WINDOW:.0%} of a run's calls. **The targets**, by a rule that looks at "
        "no schedule: of all runs of a setting, both schedules and all seeds, the highest loss after "
        f"{', '.join(f'{share:.0%}' for share in SHARES)} of the calls. A run has reached a target at the first call "
        "from which on its loss is never above it again. Each number is the median over the seeds (lowest to "
        "highest); ratios are formed seed by seed, and above 1 DDG needed less.",
        "What delay costs is in *calls*, what the missing bubble brings in *seconds per call*; time to the loss is "
        "both.",
        _table(
            [*_SETTING, "target", "after", *_both("seconds"), "1F1B / DDG", *_both("calls"), "1F1B / DDG, calls"],
            [
                [
                    *(row[name] for name in ("recipe", "stages", "micro_batches")),
                    f"{row['target']:.4g}",
                    f"{row['share']:.0%}",
                    *(_spread(row[schedule]["seconds"], ".1f") for schedule in SCHEDULES),
                    _spread(row["gains"]["seconds"], ".2f"),
                    *(_middle(row[schedule]["calls"], ".0f") for schedule in SCHEDULES),
                    _spread(row["gains"]["calls"], ".2f"),
                ]
                for row in found
            ],
        ),
        verdict,
        "## Whole runs",
        "What the same number of calls takes, and where it ends.",
        _table(
            [*_SETTING, "seeds", *_both("ms a call"), "1F1B / DDG", "held out", *_both("at the end")],
            list(_whole(runs)),
        ),
        f"![smoothed training loss over seconds of training]({picture})",
    ]
    return "\n\n".join(parts) + "\n"


def _whole(runs: Sequence[Run]) -> Iterable[list[Any]]:
    settings = dict.fromkeys((run["recipe"], run["stages"], run["micro_batches"]) for run in runs)
    for setting in settings:
        group = [r for r in runs if (r["recipe"], r["stages"], r["micro_batches"]) == setting]
        by_schedule = [sorted((r for r in group if r["schedule"] == s), key=lambda r: r["seed"]) for s in SCHEDULES]
        times = [[1e3 * r["total_seconds"] / r["total_calls"] for r in of_one] for of_one in by_schedule]
        ratios = [theirs / ours for theirs, ours in zip(*times, strict=True)]
        ends = [_spread([r["held_out"][1] for r in of_one], ".4g") for of_one in by_schedule]
        name = group[0]["held_out"][0].replace("_", " ")
        yield [*setting, len(ratios), *(_spread(t, ".0f") for t in times), _spread(ratios, ".2f"), name, *ends]


def _both(what: str) -> list[str]:
    return [f"{what}, {_NAMES[schedule]}" for schedule in SCHEDULES]


def _where(row: dict[str, Any]) -> str:
    return f"{row['recipe']}, K = {row['stages']}, M = {row['micro_batches']}, after {row['share']:.0%}"


def _middle(values: Sequence[float | None], how: str) -> str:
    there = [value for value in values if value is not None]
    return f"{median(there):{how}}" if there else "never"


def _spread(values: Sequence[float | None], how: str) -> str:
    there = [value for value in values if value is not None]
    missing = f", {len(values) - len(there)} never" if len(there) < len(values) else ""
    return f"{_middle(there, how)} ({min(there):{how}} to {max(there):{how}}{missing})" if there else "never"


def _table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (columns, ["---"] * len(columns), *lines))


def save_picture(runs: Sequence[Run], path: Path) -> None:
    """Draw a panel for every setting: a line for each run, and the targets."""
    with extra("plot", "the picture"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    settings = list(dict.fromkeys((run["recipe"], run["stages"], run["micro_batches"]) for run in runs))
    columns = 2 if len(settings) > 1 else 1
    lines = -(-len(settings) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False)
    for ax in panels.flat[len(settings) :]:
        ax.set_axis_off()
    for ax, setting in zip(panels.flat, settings, strict=False):
        group = [r for r in runs if (r["recipe"], r["stages"], r["micro_batches"]) == setting]
        for run in group:
            curve, (colour, style) = smoothed(run), _COLOURS[run["schedule"]]
            ax.plot(curve.seconds, curve.losses, color=colour, linestyle=style, linewidth=1.2,
                    label=_NAMES[run["schedule"]])  # fmt: skip
        for loss in dict.fromkeys(target(group, share) for share in SHARES):
            ax.axhline(loss, color="#888888", linewidth=0.7, linestyle=":")
        recipe, stages, micro_batches = setting
        ax.set_title(f"{recipe}, K = {stages}, M = {micro_batches}", fontsize=9, loc="left")
        ax.set_yscale("log")
        ax.grid(color="#eeeeee", linewidth=0.6, which="both")
        ax.tick_params(labelsize=8, which="both")
    handles = dict(reversed(pair) for pair in zip(*panels[0, 0].get_legend_handles_labels(), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.supxlabel("seconds of training", fontsize=9)
    figure.supylabel("training loss, smoothed", fontsize=9)
    figure.savefig(path, dpi=120)
