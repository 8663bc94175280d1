"""The suite: numbered notebooks, run in reading order by papermill under one profile, into one run's folder.

A *profile* is a flat papermill parameter file, ``notebooks/profiles/NAME.yaml``. A notebook's parameters cell (tag
``parameters``) holds one typed literal a line; ``None`` there means "as the profile says". The cell after it calls
``parameters``, which is the only place where the three sources meet: an explicit value (typed into the cell or injected
by papermill) beats the profile. So a notebook opened by hand, one under papermill and one under nbmake agree.

    python -m searchr1_lib.suite run --profile cpu -p steps=20
    python -m searchr1_lib.suite seeds --profile cpu --seeds 0 1 2

This module knows only notebooks and files; it loads papermill and torch inside the functions that need them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Iterator, Sequence

from . import __version__
from .records import write_whole

ROOT = Path(__file__).resolve().parents[1]
"""The repository's root, where ``notebooks/``, ``data/`` and ``runs/`` stand."""

_PACKAGES = (
    "torch transformers peft bitsandbytes numpy faiss-cpu bm25s sentence-transformers datasets papermill ipykernel"
).split()
_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}


# -- profiles and parameters ------------------------------------------------------------------------------------------


def load_profile(name: str) -> dict[str, Any]:
    """The parameters of ``notebooks/profiles/NAME.yaml``, by name.

    Raises:
        ValueError: there is no such profile (names the known ones), or the file is not a flat list of literals.
    """
    import yaml

    folder = ROOT / "notebooks" / "profiles"
    path, known = folder / f"{name}.yaml", sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(
            f"profile = {name!r} is unknown: choose auto or one of {', '.join(known)}, or write {_shown(path)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as e:
        raise ValueError(f"{_shown(path)} is not YAML: {e}") from None
    if not isinstance(values, dict) or not all(str(key).isidentifier() for key in values):
        raise ValueError(f"{_shown(path)} must hold lines 'name: value', each name a Python name")
    for key, value in values.items():
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I):
            raise ValueError(f"{_shown(path)}, {key}: YAML reads {value} as text; write it with a point, as 1.5e-3")
    return values


def resolve_profile(name: str = "auto") -> tuple[str, str]:
    """The profile that a name stands for, and why, in words.

    "auto" is the environment variable SEARCHR1_PROFILE if set; else "gpu" with a CUDA device of at least 40 GB
    (10^9 bytes), "t4" with a smaller one, and "cpu" without any. Any other name stands for itself.
    """
    if name != "auto":
        return name, "chosen here"
    if chosen := os.environ.get("SEARCHR1_PROFILE"):
        return chosen, "chosen by SEARCHR1_PROFILE"
    import torch

    if not torch.cuda.is_available():
        return "cpu", "no CUDA device found"
    device = torch.cuda.get_device_properties(0)
    memory = device.total_memory / 1e9
    return ("gpu" if memory >= 40 else "t4"), f"{device.name} with {memory:.0f} GB found"


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: its type's name ("int", "float", "str", ...) and its literal."""

    type: str
    default: Any


def parameters_of(notebook: str | os.PathLike) -> dict[str, Parameter]:
    """What the parameters cell of a notebook declares, in order; {} if it has no such cell.

    The type is the annotation's, or else the literal's. (papermill's own inspection skips a line with a second "="
    and cannot tell types of plain literals; ours must be complete, since an unknown name is an error.)

    Raises:
        ValueError: the file is no notebook, or the cell holds anything but ``name = literal`` lines.
    """
    import nbformat

    path = Path(notebook)
    try:
        cells = nbformat.read(path, as_version=4).cells
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{_shown(path)} is not a readable notebook: {e}") from None
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", [])), "")
    try:
        return dict(_read_assignment(node) for node in ast.parse(source).body)
    except (SyntaxError, ValueError) as e:
        raise ValueError(f"{_shown(path)}: the parameters cell may hold only lines 'name = literal': {e}") from None


def _read_assignment(node: ast.stmt) -> tuple[str, Parameter]:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, annotation = node.targets[0], None
    elif isinstance(node, ast.AnnAssign) and node.value:
        target, annotation = node.target, node.annotation
    else:
        raise ValueError(f"line {node.lineno} is no assignment")
    default = ast.literal_eval(node.value)
    return ast.unparse(target), Parameter(ast.unparse(annotation) if annotation else type(default).__name__, default)


def _check_type(name: str, value: Any, type_name: str, where: str) -> None:
    """Raise ValueError unless a value suits a declared type; a type that we do not know suits everything."""
    wanted = _TYPES.get(type_name.split("[")[0].split("|")[0].strip())
    if wanted and (not isinstance(value, wanted) or isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{where}: {name} must be of type {type_name}, got {value!r}")


def parameters(profile: str, run: str = "", **given: Any) -> SimpleNamespace:
    """Settle a notebook's parameters; called in the cell after the parameters cell.

    >>> p = suite.parameters(profile, run, steps=steps, lr=lr)
    >>> p.profile, p.run_dir, p.steps, p.lr

    Changes into the repository's root, so that paths agree wherever the kernel was started; prints the profile, why
    it was chosen and each value; makes the run's folder and its manifest.

    Args:
        profile: a profile's name or "auto", see ``resolve_profile``.
        run: the name of the run's folder under ``runs/`` (or under SEARCHR1_RUNS); "" is the profile's name.
        given: every other name of the parameters cell with its value, None for "as the profile says".

    Returns:
        The values as attributes, with ``profile`` (resolved) and ``run_dir`` (a Path) added.

    Raises:
        ValueError: unknown profile; a name that neither the cell nor a profile knows (also one that papermill
            injected); a type other than the profile's; no value at all; a folder of another version or profile.
    """
    os.chdir(ROOT)
    name, why = resolve_profile(profile)
    values = load_profile(name)
    for unknown in sorted(_injected_names() - {"profile", "run", *given, *values}):
        raise ValueError(f"unknown parameter {unknown!r}: this notebook knows profile, run, {', '.join(given)}")
    explicit = {key: value for key, value in given.items() if value is not None}
    for key, value in explicit.items():
        _check_type(key, value, type(values.get(key)).__name__, f"the parameters cell (profile {name})")
    for key in given:
        if key not in explicit and key not in values:
            raise ValueError(f"parameter {key!r} has no value: set it, or add it to notebooks/profiles/{name}.yaml")
    run_dir = _run_dir(run or name)
    open_run(run_dir, name, explicit)
    settled = {key: explicit.get(key, values.get(key)) for key in given}
    print(f"profile {name} ({why}); the run's folder is {run_dir}")
    for key, value in settled.items():
        changed = key in values and key in explicit and value != values[key]
        print(f"  {key:<24} {value!r}" + (f"  (the profile says {values[key]!r})" if changed else ""))
    return SimpleNamespace(profile=name, run_dir=run_dir, **settled)


def _injected_names() -> set[str]:
    """Names that papermill set in this kernel (its cell opens with "# Parameters"); none outside of a kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells = shell.user_ns.get("In", []) if shell else []
    trees = [ast.parse(source) for source in cells if source.startswith("# Parameters\n")]
    return {t.id for tree in trees for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}


# -- a run's folder ---------------------------------------------------------------------------------------------------


def _run_dir(name: str) -> Path:
    """The folder of a run, relative to the repository's root, so that no output shows a path of one machine."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"run = {name!r} must be a plain folder name: letters, digits, '_', '-', '.'")
    return Path(os.environ.get("SEARCHR1_RUNS", "runs")) / name


def _shown(path: Path) -> str:
    return os.path.relpath(path, ROOT) if path.is_absolute() and path.is_relative_to(ROOT) else str(path)


def _write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{_shown(path)} is broken ({e}): move it away, or choose another run") from None
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(path)} is broken (no JSON object): move it away, or choose another run")
    return value


def open_run(run_dir: str | os.PathLike, profile: str, given: dict[str, Any]) -> None:
    """Make a run's folder with its ``manifest.json``, or check that the one there belongs to us.

    The manifest holds the versions of Python and the main packages, the git commit ("-dirty" if changed), the profile,
    the explicitly given parameters, and the SHA-256 of every file under ``data/``.

    Raises:
        ValueError: the folder was made by another version (for 0.x another x counts) or under another profile.
    """
    path = Path(run_dir) / "manifest.json"
    if not (ROOT / path).exists():
        return _write_json(ROOT / path, _manifest(profile, given))
    found = _read_json(ROOT / path)
    theirs = str(found.get("searchr1_lib", "unknown"))
    if _era(theirs) != _era(__version__):
        raise ValueError(
            f"{_shown(path)}: made by searchr1_lib {theirs}, this is {__version__}: "
            "choose another run, or move the folder away"
        )
    if found.get("profile") != profile:
        raise ValueError(
            f"{_shown(path)}: made under the profile {found.get('profile')!r}, not {profile!r}: choose another run"
        )


def _era(release: str) -> list[str]:
    """The part of a version number within which run folders stay readable."""
    parts = release.split(".")
    return parts[:2] if parts[0] == "0" else parts[:1]


def _manifest(profile: str, given: dict[str, Any]) -> dict[str, Any]:
    files = sorted(p for p in (ROOT / "data").rglob("*") if p.is_file())
    return {
        "searchr1_lib": __version__,
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "profile": profile,
        "parameters": given,
        "data": {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no repository: a downloaded archive


def require(run_dir: str | os.PathLike, *files: str, made_by: str) -> list[Path]:
    """Paths of files in a run's folder that the notebook ``made_by`` must have left, in the order asked for.

    At a notebook's start it asks for what the one before left; at its end for what the notebook itself promised.

    Raises:
        FileNotFoundError: a file is missing or empty; says which notebook makes it.
    """
    paths = [Path(run_dir) / name for name in files]
    for path in paths:
        if not path.exists() or path.is_file() and path.stat().st_size == 0:
            raise FileNotFoundError(
                f"{path} is missing or empty: run notebooks/{made_by}.ipynb with this profile and run"
            )
    return paths


def record(run_dir: str | os.PathLike, notebook: str, figures: dict[str, Any]) -> None:
    """Put a notebook's figures into the run's ``summary.json``, which the suite prints at the end.

    Args:
        figures: numbers or words by name; a value may be a dict of them, e.g. {"before": 0.52, "after": 0.98}.
            They replace what the same notebook recorded before.
    """
    path = Path(run_dir) / "summary.json"
    summary = _read_json(path) if path.exists() else {}
    _write_json(path, {**summary, notebook: figures})


def results_table(run_dir: str | os.PathLike) -> str:
    """The figures in a run's ``summary.json`` as aligned text, one a line; "" if there are none."""
    path = Path(run_dir) / "summary.json"
    rows = []
    for notebook, figures in sorted(_read_json(path).items()) if path.exists() else ():
        for name, value in figures.items():
            columns = value.items() if isinstance(value, dict) else [("", value)]
            rows.append((notebook, name, "   ".join(f"{key} {_figure(v)}".strip() for key, v in columns)))
    return _table(rows)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# -- the run of all notebooks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a notebook ended: minutes it took, and the cell and the error if it failed."""

    notebook: str
    minutes: float
    error: str | None = None


def notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks in reading order: 00, 01, ..., then the appendices A1, A2, ...

    Args:
        only: beginnings of names, e.g. "03"; without any, all notebooks.

    Raises:
        ValueError: no notebook begins so, or there are none at all.
    """
    found = sorted(p for p in (ROOT / "notebooks").glob("*.ipynb") if re.match(r"(\d\d|A\d)_", p.name))
    for start in only:
        if not any(p.name.startswith(start) for p in found):
            known = ", ".join(p.stem for p in found) or "none"
            raise ValueError(f"--only {start}: no such notebook; there are {known}")
    if not found:
        raise ValueError("there is no numbered notebook in notebooks/")
    return [p for p in found if not only or p.name.startswith(tuple(only))]


def check_profile(name: str) -> None:
    """Hold a profile against the parameters cells of all notebooks.

    Raises:
        ValueError: a name that no notebook declares, a value of another type than declared, or a parameter that a
            notebook leaves to the profile and the profile lacks.
    """
    values, where, known = load_profile(name), f"notebooks/profiles/{name}.yaml", set()
    for path in notebooks():
        declared = parameters_of(path)
        known |= set(declared)
        for key, parameter in declared.items():
            if key in values:
                _check_type(key, values[key], parameter.type, f"{where} (declared in {path.stem})")
            elif parameter.default is None:
                raise ValueError(f"{where}: {path.stem} leaves {key!r} to the profile, which lacks it: add it there")
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown parameter {key!r}; the notebooks know {', '.join(sorted(known))}")


def read_given(pairs: Sequence[str], paths: Sequence[Path]) -> dict[str, Any]:
    """Read ``name=value`` texts as the types that the notebooks declare.

    Raises:
        ValueError: not of that form; a name that none of the notebooks declares; a value of another type.
    """
    declared = {path.stem: parameters_of(path) for path in paths}
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        takers = {stem: names[name] for stem, names in declared.items() if name in names}
        if not equals or not name.isidentifier():
            raise ValueError(f"-p {pair}: write it as name=value")
        if name in ("profile", "run"):
            raise ValueError(f"-p {pair}: write it as --{name} {text}")
        if not takers:
            known = "\n".join(f"  {stem}: {', '.join(names)}" for stem, names in declared.items())
            raise ValueError(f"-p {pair}: unknown parameter {name!r}; the notebooks know\n{known}")
        for stem, parameter in takers.items():
            given[name] = _read_value(text, parameter.type)
            _check_type(name, given[name], parameter.type, f"-p {pair} (for {stem})")
    return given


def _read_value(text: str, type_name: str) -> Any:
    """The value of a text from the command line; text stays text where the parameter is one."""
    import yaml

    if type_name == "str":
        return text
    try:
        return float(text) if type_name == "float" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text  # of the wrong type, as the check then says


def run_suite(
    profile: str = "auto",
    run: str = "",
    given: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[Path, list[Outcome]]:
    """Run the notebooks in order; executed copies go to ``runs/NAME/notebooks/``. Stops at the first that fails.

    Args:
        profile: a profile's name or "auto".
        run: the name of the run's folder; "" is the profile with date and time.
        given: ``name=value`` texts that beat the profile, each for all notebooks that declare the name.
        only: beginnings of notebook names; these then run inside an existing folder too.
        overwrite: delete an existing run's folder first; with ``only``, replace just those executed copies.

    Returns:
        The run's folder (relative to the repository's root) and one outcome per notebook that ran.

    Raises:
        ValueError: unknown or ill-typed profile or parameter, before anything is written or run.
        FileExistsError: the run exists already and ``overwrite`` is not set.
    """
    profile, why = resolve_profile(profile)
    paths = notebooks(only)
    check_profile(profile)
    values = read_given(given, paths)
    run_dir = _run_dir(run or f"{profile}-{datetime.now():%Y%m%d-%H%M%S}")
    _clear_way(ROOT / run_dir, paths, bool(only), overwrite)
    open_run(run_dir, profile, values)
    print(f"profile {profile} ({why}), {len(paths)} notebooks, into {run_dir}", flush=True)
    outcomes: list[Outcome] = []
    for path in paths:
        print(f"  {path.stem} ...", flush=True)
        outcomes.append(_execute(path, ROOT / run_dir, {"profile": profile, "run": run_dir.name, **values}))
        if outcomes[-1].error:
            break
    return run_dir, outcomes


def _clear_way(run_dir: Path, paths: Sequence[Path], inside: bool, overwrite: bool) -> None:
    """Refuse to run over existing results, or remove them if so asked."""
    if inside:
        old = [p for p in paths if (run_dir / "notebooks" / p.name).exists()]
        if old and not overwrite:
            raise FileExistsError(f"{_shown(run_dir)} holds {old[0].stem} already: add --overwrite to run it again")
    elif run_dir.exists() and any(run_dir.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{_shown(run_dir)} exists already: choose another --run, continue in it with --only, "
                "or add --overwrite to delete it first"
            )
        if not (run_dir / "manifest.json").exists():
            raise FileExistsError(f"{_shown(run_dir)} has no manifest.json, so it is no run's folder: not deleted")
        shutil.rmtree(run_dir)


def _execute(path: Path, run_dir: Path, values: dict[str, Any]) -> Outcome:
    """Run one notebook with those values that it declares, in a kernel of this very interpreter.

    The executed copy is NAME.unfinished.ipynb until every cell has succeeded.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # "python3" is then this environment's kernel, not the user's
    declared, done, start = parameters_of(path), run_dir / "notebooks" / path.name, time.monotonic()
    copy = done.with_suffix(".unfinished.ipynb")
    copy.parent.mkdir(exist_ok=True)
    done.unlink(missing_ok=True)
    error = None
    try:
        papermill.execute_notebook(
            path,
            copy,
            {name: value for name, value in values.items() if name in declared},
            kernel_name="python3",
            language="python",
            cwd=str(ROOT),
            progress_bar=sys.stderr.isatty(),
            config=Config(KernelManager={"transport_encryption": "auto"}),  # nobody else on the machine listens
        )
    except papermill.PapermillExecutionError as e:
        error = f"cell In [{e.exec_count}] of {_shown(copy)}: {e.ename}: {e.evalue}"
    except (DeadKernelError, CellTimeoutError) as e:
        error = f"{_shown(copy)}: the kernel died (out of memory?): {e}"
    else:
        os.replace(copy, done)
    return Outcome(path.stem, (time.monotonic() - start) / 60, error)


def _peak_gib() -> float:
    """The largest resident memory of any kernel so far, in GiB; nan where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30


# -- several seeds ----------------------------------------------------------------------------------------------------

SEED_NOTEBOOKS = ("01", "05")
"""Beginnings of the notebooks that a seed needs: the index, and the training whose figures are compared."""


def run_seeds(profile: str = "auto", seeds: Sequence[int] = (0, 1, 2)) -> str:
    """Train once per seed, in ``runs/PROFILE-seed-N``, and write mean and range to ``docs/measurements.md``.

    A notebook whose executed copy stands in the folder is not run again, and a training that was interrupted goes on.

    Returns:
        The section that was written, in Markdown.

    Raises:
        ValueError: unknown profile, or a folder made by another version or under another profile.
        RuntimeError: a notebook failed; the measurements stay as they were.
    """
    profile, _ = resolve_profile(profile)
    runs = {seed: _run_seed(profile, seed) for seed in dict.fromkeys(seeds)}
    command = f"python -m searchr1_lib.suite seeds --profile {profile} --seeds {' '.join(map(str, runs))}"
    commits = {str(_read_json(run / "manifest.json").get("git_commit")) for run in runs.values()}
    trained = notebooks(SEED_NOTEBOOKS)[-1].stem
    section = "\n".join([
        f"## {len(runs)} seeds under the profile {profile}\n",
        f"Made by `{command}` on {os.cpu_count()} cores, commit {', '.join(sorted(commits))}. Figures of {trained}.\n",
        _seed_table({seed: _read_json(run / "summary.json").get(trained, {}) for seed, run in runs.items()}),
    ])
    write_section(ROOT / "docs" / "measurements.md", f"seeds {profile}", section)
    return section


def _run_seed(profile: str, seed: int) -> Path:
    """Run what is missing of one seed; returns its folder."""
    run_dir = _run_dir(f"{profile}-seed-{seed}")
    paths = notebooks(SEED_NOTEBOOKS)
    done = [(ROOT / run_dir / "notebooks" / path.name).exists() for path in paths]
    if all(done):
        open_run(run_dir, profile, {})
        print(f"seed {seed}: {run_dir} is complete", flush=True)
        return ROOT / run_dir
    rest = [path.stem for path in paths[done.index(False) :]]
    _, outcomes = run_suite(profile, run_dir.name, [f"seed={seed}"], only=rest, overwrite=True)
    if error := outcomes[-1].error:
        raise RuntimeError(f"seed {seed}: {outcomes[-1].notebook}, {error}")
    return ROOT / run_dir


def _seed_table(figures: dict[int, dict[str, Any]]) -> str:
    """Figures by seed as a Markdown table with mean and range; what is no number is left out."""
    flat = {seed: dict(_flat(values)) for seed, values in figures.items()}
    shared = [name for name in next(iter(flat.values())) if all(name in values for values in flat.values())]
    lines = [["figure", *(f"seed {seed}" for seed in flat), "mean", "range"], ["---"] * (len(flat) + 3)]
    for name in shared:
        values = [by_name[name] for by_name in flat.values()]
        spread = f"{min(values):.4g} to {max(values):.4g}"
        lines.append([name, *(f"{v:.4g}" for v in values), f"{fmean(values):.4g}", spread])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _flat(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
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
        raise ValueError(f"{_shown(path)}: only one of the marks of section {name!r} is there: put the other one back")
    before, rest = old.split(begin) if begin in old else (old.rstrip("\n") + "\n\n", end)
    write_whole(path, before + begin + text.strip("\n") + "\n" + end + rest.split(end)[1])


# -- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0: all ran; 1: a notebook failed; 2: refused before running."""
    parser = argparse.ArgumentParser(prog="python -m searchr1_lib.suite", description="Runs the numbered notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run them in reading order")
    run.add_argument("--run", default="", metavar="NAME", help="folder under runs/ (default: profile, date and time)")
    run.add_argument("-p", dest="given", action="append", default=[], metavar="name=value", help="beats the profile")
    run.add_argument("--only", nargs="+", default=[], metavar="03", help="only notebooks whose names begin so")
    run.add_argument("--overwrite", action="store_true", help="delete what an earlier run left under that name")
    several = commands.add_parser("seeds", help="train once per seed; mean and range go to docs/measurements.md")
    several.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    for command in (run, several):
        command.add_argument("--profile", default="auto", help="smoke, cpu, t4, gpu or auto (default)")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "seeds":
            print("\n" + run_seeds(asked.profile, asked.seeds))
            return 0
        run_dir, outcomes = run_suite(
            asked.profile, asked.run, asked.given, only=asked.only, overwrite=asked.overwrite
        )
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:  # a notebook of a seed
        print(f"error: {e}", file=sys.stderr)
        return 1
    return _report(run_dir, outcomes)


def _report(run_dir: Path, outcomes: Sequence[Outcome]) -> int:
    """Print what a run gave; returns the exit code."""
    rows = [(o.notebook, f"{o.minutes:.1f} min", "FAILED" if o.error else "ok") for o in outcomes]
    total = sum(o.minutes for o in outcomes)
    print("\n" + _table([*rows, ("in all", f"{total:.1f} min", f"peak memory of a notebook {_peak_gib():.1f} GiB")]))
    if figures := results_table(ROOT / run_dir):
        print("\n" + figures)
    print(f"\nOpen {run_dir / 'notebooks'} to read the executed notebooks.")
    if failed := [o for o in outcomes if o.error]:
        print(f"error: {failed[0].notebook}, {failed[0].error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
