"""Several seeds: the training once per seed, with mean and interval of each figure in ``docs/measurements.md``.

searchr1 seeds --profile cpu --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import suite
from ..environment.limits import Whole
from ..files import write_whole
from .profiles import folder_of, resolve_profile, shown
from .runs import check_run, lacking, notebooks, read_json, run_suite

SEED_NOTEBOOKS = ("01", "05")
"""Beginnings of the notebooks that a seed needs: the index, and the training whose figures are compared."""


def run_seeds(profile: str = "auto", seeds: Sequence[int] = (0, 1, 2)) -> str:
    """Train once per seed, in ``runs/PROFILE-seed-N``, and write mean and interval to ``docs/measurements.md``.

    A notebook whose executed copy stands in the folder is not run again, and a training that was interrupted goes on.

    Returns:
        The section that was written, in Markdown.

    Raises:
        ValueError: unknown profile, a seed that cannot be, or the folder of another run (see ``open_run``).
        RuntimeError: a notebook failed; the measurements stay as they were.
    """
    profile, _ = resolve_profile(profile)
    for seed in seeds:
        check_run(folder_of(f"{profile}-seed-{seed}"), profile, {"seed": seed})
    runs = {seed: _run_seed(profile, seed) for seed in dict.fromkeys(seeds)}
    command = f"searchr1 seeds --profile {profile} --seeds {' '.join(map(str, runs))}"
    commits = {str(read_json(run / "manifest.json").get("git_commit")) for run in runs.values()}
    trained = notebooks(SEED_NOTEBOOKS)[-1].stem
    section = f"## {len(runs)} seeds under the profile {profile}\n\nMade by `{command}` on {os.cpu_count()} cores, "
    section += f"commit {', '.join(sorted(commits))}. Figures of {trained}.\n\n"
    section += _seed_table({seed: read_json(run / "summary.json").get(trained, {}) for seed, run in runs.items()})
    write_section(suite.ROOT / "docs" / "measurements.md", f"seeds {profile}", section)
    return section


def _run_seed(profile: str, seed: int) -> Path:
    """Run what is missing of one seed; returns its folder."""
    run_dir = folder_of(f"{profile}-seed-{seed}")
    rest = [path.stem for path in lacking(run_dir, notebooks(SEED_NOTEBOOKS))]
    if not rest:
        print(f"seed {seed}: {run_dir} is complete", flush=True)
        return suite.ROOT / run_dir
    _, outcomes = run_suite(profile, run_dir.name, [f"seed={seed}"], only=rest, overwrite=True)
    if error := outcomes[-1].error:
        raise RuntimeError(f"seed {seed}: {outcomes[-1].notebook}, {error}")
    return suite.ROOT / run_dir


def _seed_table(figures: dict[int, dict[str, Any]]) -> str:
    """Figures by seed as a Markdown table, with the mean over seeds and its interval (see ``analysis.interval``).

    What is no number is left out.
    """
    from ..study.analysis import interval, markdown_table

    by_seed = {seed: dict(flat(values)) for seed, values in figures.items()}
    shared = [name for name in next(iter(by_seed.values())) if all(name in values for values in by_seed.values())]
    last = "95 % interval" if len(by_seed) > 2 else "range"
    lines = []
    for name in shared:
        values = [by_name[name] for by_name in by_seed.values()]
        low, high = interval(values)
        spread = f"{low:.4g} to {high:.4g}" if len(values) > 1 else "–"
        lines.append([name, *(f"{v:.4g}" for v in values), f"{fmean(values):.4g}", spread])
    return markdown_table(["figure", *(f"seed {seed}" for seed in by_seed), "mean", last], lines) + "\n"


def flat(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield f"{name}, {key}" if key else name, number


def write_section(path: str | os.PathLike, name: str, text: str) -> None:
    """Put a text between the marks of its section in a Markdown file; all else stays. Whole or not at all.

    Args:
        path: is made if missing; a section that it lacks is added at the end.
        name: stands in the marks, two HTML comments, which readers do not see.

    Raises:
        ValueError: only one of the two marks stands in the file.
    """
    path = Path(path)
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"
    head = "# Measurements\n\nEach section names the command that wrote it.\n"
    old = path.read_text(encoding="utf-8") if path.exists() else head
    if (begin in old) != (end in old):
        raise ValueError(f"{shown(path)}: only one of the marks of section {name!r} is there: put the other one back")
    before, rest = old.split(begin) if begin in old else (old.rstrip("\n") + "\n\n", end)
    write_whole(path, before + begin + text.strip("\n") + "\n" + end + rest.split(end)[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="auto", help="smoke, cpu, laptop, t4, gpu or auto (default)")
    parser.add_argument("--seeds", nargs="+", type=Whole, default=[0, 1, 2], metavar="N", help="default: 0 1 2")


def run(args: argparse.Namespace) -> None:
    """Train once per seed, and print the section that was written."""
    try:
        print("\n" + run_seeds(args.profile, args.seeds))
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # this command goes on, too, and not the one of the run alone
