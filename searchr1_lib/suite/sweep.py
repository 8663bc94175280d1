"""Experiments: many runs, settings x seeds, as a file asks for; and what runs gave, read back.

    searchr1 sweep experiments/search_cost.yaml --jobs 2

A file has the keys ``notebooks`` (beginnings of their names), ``seeds``, and either ``grid`` (name: [values]; every
combination is a setting) or ``list`` (of settings); optionally ``about``, ``profile`` ("auto") and ``parameters`` (the
same in all runs).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from .. import suite
from ..environment.limits import Count, Whole, problem
from ..files import read_json_lines, write_json_lines
from ..metrics import mean
from .profiles import load_profile, read_yaml, resolve_profile, shown
from .runs import check_run, command_of, failure_of, lacking, notebooks, open_run, read_json, table_of


class Experiment(NamedTuple):
    """What an experiment's file asks for: every one of ``settings`` with every one of ``seeds``.

    Attributes:
        name: the file's name without its ending.
        profile: gives all parameters that are not set here.
        notebooks: the paths to run, in reading order.
        common: parameters that all runs share, by name.
        settings: the parameters by which the runs differ, one dict a setting.
    """

    name: str
    about: str
    profile: str
    notebooks: list[Path]
    common: dict[str, Any]
    settings: list[dict[str, Any]]
    seeds: list[int]

    @property
    def folder(self) -> Path:
        """Where its runs stand, one folder each: NAME-PROFILE under ``runs/`` (or under SEARCHR1_RUNS)."""
        return Path(os.environ.get("SEARCHR1_RUNS", "runs")) / f"{self.name}-{self.profile}"

    def runs(self) -> dict[Path, dict[str, Any]]:
        """The folder of each run and its parameters, seed included; all settings of a seed before the next seed, so
        that a sweep stopped halfway compares all settings, with fewer seeds.

        Raises:
            ValueError: two runs are the same, or differ only in signs that no folder's name can hold.
        """
        runs: dict[Path, dict[str, Any]] = {}
        for seed, setting in product(self.seeds, self.settings):
            words = [f"{name}-{_plain(value)}" for name, value in {**setting, "seed": seed}.items()]
            path = self.folder / "_".join(words)
            if path in runs:
                raise ValueError(f"experiment {self.name}: two of its runs would share the folder {path}")
            runs[path] = {**self.common, **setting, "seed": seed}
        return runs


def _plain(value: Any) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^\w.-]+", "-", str(value)).strip("-") or "none"


class _File(BaseModel):
    """What an experiment's file may hold; values of parameters are checked with the profile's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    about: str = ""
    profile: str = "auto"
    notebooks: Annotated[list[str], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    grid: dict[str, Annotated[list, Field(min_length=1)]] = {}
    settings: list[dict[str, Any]] = Field([], alias="list")
    seeds: Annotated[list[Whole], Field(min_length=1)]


def read_experiment(path: str | os.PathLike, profile: str = "", seeds: Sequence[int] = ()) -> Experiment:
    """Read an experiment's file.

    Args:
        profile, seeds: instead of the file's own, where given.

    Raises:
        ValueError: no such file, no YAML, a key or a parameter that is unknown, missing, twice there, of the wrong
            type or out of range; names file and line.
    """
    path = Path(path)
    value, root = read_yaml(path)

    def fail(message: str, *at: Any):
        raise ValueError(f"{shown(path)}, line {_line(root, at)}: {message}")

    keys = [field.alias or name for name, field in _File.model_fields.items()]
    if not isinstance(value, dict):
        fail(f"an experiment has lines 'key: value', with the keys {', '.join(keys)}")
    try:
        file = _File.model_validate(value)
    except ValidationError as e:
        item = e.errors()[0]
        hint = ': in quotes, a notebook\'s name begins so, as "01"' if "notebooks" in item["loc"] else ""
        fail(problem(item, keys) + hint, *item["loc"])
    if bool(file.grid) == bool(file.settings):
        fail("give either 'grid' or 'list'", "list")
    try:
        paths = notebooks(file.notebooks)
    except ValueError as e:
        fail(str(e).replace("--only", "notebooks:"), "notebooks")
    name, _ = resolve_profile(profile or file.profile)
    load_profile(name)
    grid = [dict(zip(file.grid, values)) for values in product(*file.grid.values())]
    for number, setting in enumerate(file.settings or grid):
        _check_setting(name, file.parameters, setting, ("list", number) if file.settings else ("grid",), fail)
    seeds = list(dict.fromkeys(seeds or file.seeds))
    return Experiment(path.stem, file.about, name, paths, file.parameters, file.settings or grid, seeds)


def _check_setting(profile: str, common: dict[str, Any], setting: dict[str, Any], at: tuple, fail) -> None:
    """Fail, at the line of the parameter, unless a profile can have it."""
    places = {name: ("parameters", name) for name in common} | {name: (*at, name) for name in setting}
    for name in places:
        if name in ("seed", "profile", "run"):
            fail(f"{name!r} is set by the sweep itself" + (": use 'seeds'" if name == "seed" else ""), *places[name])
        if name in common and name in setting:
            fail(f"{name!r} stands under 'parameters' too", *places[name])
    try:
        load_profile(profile, **common, **setting)
    except (ValueError, TypeError) as e:
        named = next((name for name in places if re.search(rf"\b{re.escape(str(name))}\b", str(e))), "")
        fail(str(e), *places.get(named, at))


def _line(node: yaml.Node | None, at: Sequence[Any]) -> int:
    """The line of what stands at a place below a YAML node, such as ("grid", "topk"), or of what lies on the way."""
    line = 1
    for step in at:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = children if isinstance(node, yaml.MappingNode) else [(child, child) for child in children]
        keys = [key.value for key, _ in pairs] if isinstance(node, yaml.MappingNode) else range(len(pairs))
        if step not in keys:
            return line
        key, node = pairs[list(keys).index(step)]
        line = key.start_mark.line + 1
    return line


def run_sweep(experiment: Experiment, jobs: int = 1) -> dict[Path, tuple[float, str | None]]:
    """Run what an experiment lacks, ``jobs`` runs at a time, each in a process and a folder of its own.

    A run whose notebooks all have executed copies is complete and is not run again; one that failed, or was
    interrupted, goes on with the notebook that it failed in. A run that fails stops no other one.

    Returns:
        folder -> (minutes that it took now, 0 if it was complete; why it failed, or None).

    Raises:
        ValueError: ``jobs`` is not positive, or a folder holds another run (``open_run``); nothing has run then.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    runs = experiment.runs()
    for run_dir, values in runs.items():
        check_run(run_dir, experiment.profile, values)
    size = f"{len(experiment.settings)} settings x {len(experiment.seeds)} seeds"
    print(f"{experiment.name}: {size} under the profile {experiment.profile}, into {experiment.folder}", flush=True)
    pool, outcomes = ThreadPoolExecutor(jobs), {}
    try:
        pending = {pool.submit(_sweep_one, experiment, *one, jobs): one[0] for one in runs.items()}
        done = tqdm(as_completed(pending), desc=experiment.name, total=len(runs), unit="run", disable=None)
        for number, future in enumerate(done, 1):
            minutes, error = outcomes[pending[future]] = future.result()
            said = f"FAILED: {error}" if error else f"{minutes:.1f} min" if minutes else "complete already"
            with tqdm.external_write_mode():
                print(f"  {number}/{len(runs)}  {pending[future].name}: {said}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: what runs ends, what waits does not begin
    return {run_dir: outcomes[run_dir] for run_dir in runs}


def _sweep_one(experiment: Experiment, run_dir: Path, values: dict[str, Any], jobs: int) -> tuple[float, str | None]:
    """Run what is missing of one run; returns the minutes and why it failed."""
    rest = [path.stem for path in lacking(run_dir, experiment.notebooks)]
    if not rest:
        return 0.0, None
    open_run(run_dir, experiment.profile, values)
    command, start = command_of(experiment.profile, run_dir.name, rest), time.monotonic()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    env = {**os.environ, "SEARCHR1_RUNS": str(run_dir.parent), "OMP_NUM_THREADS": threads}
    log, error = suite.ROOT / run_dir / "sweep.log", None
    with open(log, "w", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=suite.ROOT, stdout=out, stderr=out, env=env)
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").split()
        end = f"exit code {done.returncode}: {' '.join(said[-30:])} (see {shown(log)})"
        error = failure_of(suite.ROOT / run_dir) or end
    return (time.monotonic() - start) / 60, error


# -- what runs gave ---------------------------------------------------------------------------------------------------


_WORDS = {"em": "exact match", "f1": "F1", "searches_per_need": "searches per hop needed"}
_WORDS |= {"over_search": "over-search", "under_search": "under-search"}


def read_runs(folders: Iterable[str | os.PathLike]) -> list[dict[str, Any]]:
    """What runs were given and what they gave: one row a run's folder, for ``analysis.by_setting``.

    Row keys: ``run`` (the folder's name), ``profile``, ``settings`` (the profile's parameters and those given),
    ``commit``, ``error`` (see ``failure_of``; None if nothing failed), ``figures``: the numbers of summary.json,
    and every metric of after.json by group, such as "exact match, known"; and ``curve``: what ``train/`` logged, as
    means of every five steps. A folder without a manifest is no run's and is left out.

    Raises:
        ValueError: a file of a run is broken; names it.
    """
    rows = []
    for folder in map(Path, folders):
        if not (folder / "manifest.json").exists():
            continue
        manifest = read_json(folder / "manifest.json")
        figures: dict[str, Any] = {}
        if (path := folder / "summary.json").exists():
            for values in read_json(path).values():
                figures |= dict(_flat(values))
        if (path := folder / "after.json").exists():
            for group, metrics in read_json(path).get("table", {}).items():
                figures |= {f"{_WORDS.get(m, m)}, {group}": v for m, v in metrics.items() if v is not None}
        row: dict[str, Any] = {"run": folder.name, "profile": manifest.get("profile", "")}
        row["settings"] = manifest.get("values") or load_profile(row["profile"], **manifest["parameters"]).values
        row |= {"commit": manifest.get("git_commit"), "error": failure_of(folder), "figures": figures}
        rows.append(row | {"curve": _curve(folder / "train" / "metrics.jsonl")})
    return rows


def _flat(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield f"{name}, {key}" if key else name, number


_CURVE = (
    "reward em_known em_lookup searches_known searches_per_need_lookup search_first_known search_first_lookup "
    "malformed entropy grad_norm seconds seconds_update"
).split()


def _curve(path: Path, every: int = 5) -> list[dict[str, float]]:
    """The means of every so many steps of a training's metrics, each with the step in their middle; [] without any."""
    rows = list(read_json_lines(path)) if path.exists() else []
    parts = [rows[i : i + every] for i in range(0, len(rows), every)]
    means = [{n: float(f"{m:.4g}") for n in _CURVE if (m := mean(part, n)) is not None} for part in parts]
    return [{"step": part[len(part) // 2]["step"]} | values for part, values in zip(parts, means)]


def experiment_runs(path: str | os.PathLike, profile: str = "") -> tuple[list[dict[str, Any]], str]:
    """The runs of an experiment (see ``read_runs``), and in words where they come from.

    Those under ``profile``, else those of its own profile, else the results that ship beside the file, else none. A run
    with other parameters than the file has now is left out.

    Raises:
        ValueError: the experiment's file or a run's is broken; names it.
    """
    path = Path(path)
    whole = read_experiment(path)
    for experiment in ([read_experiment(path, profile)] if profile else []) + [whole]:
        if rows := _of(experiment, read_runs(sorted(experiment.runs()))):
            return rows, f"{len(rows)} of {len(experiment.runs())} runs in {experiment.folder}"
    shipped = path.parent / "results" / f"{whole.name}.jsonl"
    if shipped.exists() and (rows := _of(whole, read_json_lines(shipped))):
        return rows, str(shipped)
    return [], f"not run yet: searchr1 sweep {path}"


def _of(experiment: Experiment, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the runs that have the parameters for which the experiment asks now."""
    asked = {run_dir.name: values.items() for run_dir, values in experiment.runs().items()}
    return [row for row in rows if row["run"] in asked and asked[row["run"]] <= row["settings"].items()]


# -- the command line -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="FILE", help="such as experiments/search_cost.yaml")
    parser.add_argument("--jobs", type=Count, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--profile", default="", help="instead of the file's")
    parser.add_argument("--seeds", nargs="+", type=Whole, default=[], metavar="N", help="instead of the file's")


def run(args: argparse.Namespace) -> int:
    """Run an experiment and print how its runs ended; the exit code is 1 where one failed.

    Where it ran as its file says, and nothing failed, its results go to ``results/`` beside the file.
    """
    path, whole = Path(args.experiment), not (args.profile or args.seeds)
    experiment = read_experiment(path, args.profile, args.seeds)
    outcomes = run_sweep(experiment, args.jobs)
    ends = [(d.name, f"{minutes:.1f} min", "FAILED" if error else "ok") for d, (minutes, error) in outcomes.items()]
    print("\n" + table_of(ends))
    failed = {run_dir: error for run_dir, (_, error) in outcomes.items() if error}
    for run_dir, error in failed.items():
        print(f"error: {run_dir}: {error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(ends)} runs failed; the same command runs only these again", file=sys.stderr)
    elif whole:
        results = path.parent / "results" / f"{experiment.name}.jsonl"
        write_json_lines(results, read_runs(sorted(suite.ROOT / run_dir for run_dir in outcomes)))
        print(f"\nResults are in {shown(results)}.")
    print(f"\nNotebook 08_experiment_report reads {experiment.folder}.")
    return 1 if failed else 0
