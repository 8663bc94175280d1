"""The suite: numbered notebooks, run in reading order by papermill under one profile, into one run's folder.

A *profile* is a flat papermill parameter file, ``notebooks/profiles/NAME.yaml``. A notebook's parameters cell (tag
``parameters``) holds one typed literal a line; ``None`` there means "as the profile says". The cell after it calls
``parameters``, which is the only place where the three sources meet: an explicit value (typed into the cell or injected
by papermill) beats the profile. So a notebook opened by hand, one under papermill and one under nbmake agree.

    python -m searchr1_lib.suite run --profile cpu -p steps=20
    python -m searchr1_lib.suite seeds --profile cpu --seeds 0 1 2
    python -m searchr1_lib.suite sweep experiments/search_cost.yaml --jobs 2

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from .. import __version__
from ..files import write_json_lines, write_whole

ROOT = Path(__file__).resolve().parents[2]
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
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
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


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{_shown(path)}, line {number} is broken ({e}): mend or move the file away") from None
    return rows


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
    In Google Colab, where every notebook begins on an empty machine, it runs the one before, as far as that takes
    minutes.

    Raises:
        FileNotFoundError: a file is missing or empty; says which notebook makes it.
    """
    paths = [Path(run_dir) / name for name in files]
    making = os.environ.get("SEARCHR1_MAKING", "").split()
    in_colab = "google.colab" in sys.modules or making
    if in_colab and made_by not in making and (path := _first_lacking(paths)):
        _run_predecessor(Path(run_dir), path, made_by, making)
    if path := _first_lacking(paths):
        raise FileNotFoundError(f"{path} is missing or empty: run notebooks/{made_by}.ipynb with this profile and run")
    return paths


def _first_lacking(paths: Sequence[Path]) -> Path | None:
    return next((p for p in paths if not p.exists() or (p.is_file() and p.stat().st_size == 0)), None)


def _run_predecessor(run_dir: Path, path: Path, notebook: str, making: list[str]) -> None:
    """Run the notebook that makes a file, with the parameters of this run; ``making`` are those that wait for it.

    The names go along in SEARCHR1_MAKING, so that its kernel does the same for its own predecessor.
    """
    manifest = _read_json(ROOT / run_dir / "manifest.json")
    profile = manifest["profile"]
    if notebook.startswith("05") and profile not in ("smoke", "cpu"):
        raise FileNotFoundError(
            f"{path} is missing or empty: it comes from the training, {notebook}, which takes hours under the profile "
            f'{profile}. Run that notebook first, in this session or with mount_drive in both; or set profile = "cpu" '
            "in the parameters cell: the tiny Qwen is then trained here, in minutes"
        )
    print(
        f"{path} is missing, and this is Colab, where each notebook begins on an empty machine: running {notebook} "
        "first",
        flush=True,
    )
    values = {name: value for name, value in manifest["parameters"].items() if name in load_profile(profile)}
    command = [
        sys.executable,
        "-m",
        "searchr1_lib.suite",
        "run",
        "--profile",
        profile,
        "--run",
        run_dir.name,
        "--overwrite",
        "--only",
        notebook,
        *_as_arguments(values, [ROOT / "notebooks" / f"{notebook}.ipynb"]),
    ]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SEARCHR1_MAKING": " ".join([*making, notebook])},
    ) as run:
        for line in run.stdout:
            print(line, end="", flush=True)


def _as_arguments(values: dict[str, Any], paths: Sequence[Path]) -> list[str]:
    """``-p name=value`` for the command line, of those values that one of the notebooks declares."""
    declared = {name for path in paths for name in parameters_of(path)}
    given = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items() if k in declared]
    return [word for text in given for word in ("-p", text)]


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
            iopub_timeout=300,  # a busy machine may be late with a cell's last output
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
    """Train once per seed, in ``runs/PROFILE-seed-N``, and write mean and interval to ``docs/measurements.md``.

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
    section = "\n".join(
        [
            f"## {len(runs)} seeds under the profile {profile}\n",
            f"Made by `{command}` on {os.cpu_count()} cores, commit {', '.join(sorted(commits))}. Figures of {trained}.\n",
            _seed_table({seed: _read_json(run / "summary.json").get(trained, {}) for seed, run in runs.items()}),
        ]
    )
    write_section(ROOT / "docs" / "measurements.md", f"seeds {profile}", section)
    return section


def _run_seed(profile: str, seed: int) -> Path:
    """Run what is missing of one seed; returns its folder."""
    run_dir = _run_dir(f"{profile}-seed-{seed}")
    rest = [path.stem for path in _rest(run_dir, notebooks(SEED_NOTEBOOKS))]
    if not rest:
        open_run(run_dir, profile, {})
        print(f"seed {seed}: {run_dir} is complete", flush=True)
        return ROOT / run_dir
    _, outcomes = run_suite(profile, run_dir.name, [f"seed={seed}"], only=rest, overwrite=True)
    if error := outcomes[-1].error:
        raise RuntimeError(f"seed {seed}: {outcomes[-1].notebook}, {error}")
    return ROOT / run_dir


def _rest(run_dir: Path, paths: Sequence[Path]) -> list[Path]:
    """The notebooks that a run still lacks: from the first one without an executed copy on."""
    done = [(ROOT / run_dir / "notebooks" / path.name).exists() for path in paths]
    return list(paths[done.index(False) :]) if not all(done) else []


def _seed_table(figures: dict[int, dict[str, Any]]) -> str:
    """Figures by seed as a Markdown table, with the mean over seeds and its interval (see ``analysis.interval``).

    What is no number is left out.
    """
    from ..study.analysis import interval

    flat = {seed: dict(_flat(values)) for seed, values in figures.items()}
    shared = [name for name in next(iter(flat.values())) if all(name in values for values in flat.values())]
    last = "95 % interval" if len(flat) > 2 else "range"
    lines = [["figure", *(f"seed {seed}" for seed in flat), "mean", last], ["---"] * (len(flat) + 3)]
    for name in shared:
        values = [by_name[name] for by_name in flat.values()]
        low, high = interval(values)
        spread = f"{low:.4g} to {high:.4g}" if len(values) > 1 else "–"
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


# -- experiments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
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
        found: dict[Path, dict[str, Any]] = {}
        for seed, setting in product(self.seeds, self.settings):
            words = [f"{name}-{_plain(value)}" for name, value in {**setting, "seed": seed}.items()]
            path = self.folder / "_".join(words)
            if path in found:
                raise ValueError(f"experiment {self.name}: two of its runs would share the folder {path}")
            found[path] = {**self.common, **setting, "seed": seed}
        return found


def _plain(value: Any) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^\w.-]+", "-", str(value)).strip("-") or "none"


_EXPERIMENT = {
    "about": (str, "one sentence"),
    "profile": (str, "a profile's name"),
    "notebooks": (list, 'a list of beginnings of names, such as ["01", "05"]'),
    "parameters": (dict, "lines 'name: value'"),
    "grid": (dict, "lines 'name: [values]'"),
    "list": (list, "a list of settings, each with lines 'name: value'"),
    "seeds": (list, "a list of whole numbers"),
}


def read_experiment(path: str | os.PathLike, profile: str = "", seeds: Sequence[int] = ()) -> Experiment:
    """Read an experiment's file.

    Its keys: ``notebooks`` (beginnings of their names), ``seeds``, and either ``grid`` (name: [values]; every
    combination is a setting) or ``list`` (of settings); optionally ``about``, ``profile`` ("auto") and
    ``parameters`` (the same in all runs).

    Args:
        profile, seeds: instead of the file's own, where given.

    Raises:
        ValueError: no such file, no YAML, a key or a parameter that is unknown, missing, twice there or of the wrong
            type; names file and line.
    """
    path = Path(path)
    value, lines = _read_yaml(path)

    def fail(message: str, *at: Any):
        raise ValueError(f"{_shown(path)}, line {lines.get(at, 1)}: {message}")

    if not isinstance(value, dict):
        fail(f"an experiment has lines 'key: value', with the keys {', '.join(_EXPERIMENT)}")
    for key in value:
        if key not in _EXPERIMENT:
            fail(f"unknown key {key!r}; an experiment has {', '.join(_EXPERIMENT)}", key)
        wanted, words = _EXPERIMENT[key]
        if not isinstance(value[key], wanted) or not value[key]:
            fail(f"{key} must be {words}", key)
    for key in ("notebooks", "seeds"):
        if key not in value:
            fail(f"the key {key!r} is missing: {_EXPERIMENT[key][1]}")
    if ("grid" in value) == ("list" in value):
        fail("give either 'grid' or 'list'", *(["list"] if "list" in value else []))
    for key, kind in (("notebooks", str), ("seeds", int)):
        for i, item in enumerate(value[key]):
            if not isinstance(item, kind) or isinstance(item, bool):
                hint = 'a notebook\'s name begins so, in quotes: "01"' if kind is str else "a seed is a whole number"
                fail(f"{key}: {item!r}: {hint}", key, i)
    try:
        paths = notebooks(value["notebooks"])
    except ValueError as e:
        fail(str(e).replace("--only", "notebooks:"), "notebooks")
    declared = {notebook.stem: parameters_of(notebook) for notebook in paths}
    common, settings = value.get("parameters", {}), _settings(value, fail)
    for at, setting in [(("parameters",), common), *settings]:
        for name, given in setting.items():
            _check_setting(name, given, declared, lambda message, name=name, at=at: fail(message, *at, name))
            if setting is not common and name in common:
                fail(f"{name!r} stands under 'parameters' too", *at, name)
    if not any("seed" in names for names in declared.values()):
        fail(f"none of {', '.join(declared)} has a parameter 'seed'", "seeds")
    resolved, _ = resolve_profile(profile or value.get("profile", "auto"))
    check_profile(resolved)
    seeds = list(dict.fromkeys(seeds or value["seeds"]))
    settings = [setting for _, setting in settings]
    return Experiment(path.stem, value.get("about", ""), resolved, paths, common, settings, seeds)


def _settings(value: dict[str, Any], fail) -> list[tuple[tuple, dict[str, Any]]]:
    """The settings of a grid or a list, each with its place in the file."""
    if "list" in value:
        for i, setting in enumerate(value["list"]):
            if not isinstance(setting, dict):
                fail(f"list: a setting has lines 'name: value', this one is {setting!r}", "list", i)
        return [(("list", i), setting) for i, setting in enumerate(value["list"])]
    for name, values in value["grid"].items():
        if not isinstance(values, list) or not values:
            fail(f"grid: {name} must be a list of values, [{values!r}]", "grid", name)
    names = list(value["grid"])
    return [(("grid",), dict(zip(names, values))) for values in product(*value["grid"].values())]


def _check_setting(name: Any, value: Any, declared: dict[str, dict[str, Parameter]], fail) -> None:
    """Fail unless a parameter of an experiment is known to its notebooks and of their type."""
    if name in ("seed", "profile", "run"):
        fail(f"{name!r} is set by the sweep itself" + (": use 'seeds'" if name == "seed" else ""))
    takers = {stem: names[name] for stem, names in declared.items() if name in names}
    if not takers:
        known = sorted({key for names in declared.values() for key in names} - {"seed", "profile", "run"})
        fail(f"unknown parameter {name!r}; {', '.join(declared)} know {', '.join(known)}")
    for stem, parameter in takers.items():
        try:
            _check_type(name, value, parameter.type, f"for {stem}")
        except ValueError as e:
            fail(str(e))


def _read_yaml(path: Path) -> tuple[Any, dict[tuple, int]]:
    """A YAML file's value, and the line of each key and item by its place, such as ``("grid", "topk")``."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        lines: dict[tuple, int] = {}
        for at, line in _places(node):
            if at in lines:
                raise ValueError(f"{_shown(path)}, line {line}: {at[-1]!r} stands in line {lines[at]} already")
            lines[at] = line
        return loader.construct_document(node) if node else None, lines
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{_shown(path)} is not UTF-8 text") from None
    except (yaml.YAMLError, RecursionError) as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or str(e)
        raise ValueError(f"{_shown(path)}, line {mark.line + 1 if mark else 1}: not YAML: {problem}") from None


def _places(node: Any, at: tuple = ()) -> Iterator[tuple[tuple, int]]:
    """Each key and item below a YAML node: its place and its line."""
    kind, value = getattr(node, "id", None), getattr(node, "value", None)
    pairs = [(key.value, key, child) for key, child in value] if kind == "mapping" else []
    pairs += [(i, child, child) for i, child in enumerate(value)] if kind == "sequence" else []
    for name, marked, child in pairs:
        name = name if isinstance(name, (str, int)) else str(name)
        yield (*at, name), marked.start_mark.line + 1
        yield from _places(child, (*at, name))


def sweep(experiment: Experiment, jobs: int = 1) -> dict[Path, tuple[float, str | None]]:
    """Run what an experiment lacks, ``jobs`` runs at a time, each in a process and a folder of its own.

    A run whose notebooks all have executed copies is complete and is not run again; one that failed, or was
    interrupted, goes on with the notebook that it failed in. A run that fails stops no other one.

    Returns:
        folder -> (minutes that it took now, 0 if it was complete; why it failed, or None).

    Raises:
        ValueError: ``jobs`` is not positive, or a folder holds a run with other parameters, under another profile or
            of another version; nothing has run then.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    runs = experiment.runs()
    for run_dir, values in runs.items():
        _check_run(run_dir, experiment.profile, values)
    print(
        f"{experiment.name}: {len(experiment.settings)} settings x {len(experiment.seeds)} seeds under the profile "
        f"{experiment.profile}, into {experiment.folder}",
        flush=True,
    )
    pool = ThreadPoolExecutor(jobs)
    try:
        pending = {
            pool.submit(_sweep_one, experiment, run_dir, values, jobs): run_dir for run_dir, values in runs.items()
        }
        outcomes = {}
        for number, future in enumerate(as_completed(pending), 1):
            minutes, error = outcomes[pending[future]] = future.result()
            said = f"FAILED: {error}" if error else f"{minutes:.1f} min" if minutes else "complete already"
            print(f"  {number}/{len(runs)}  {pending[future].name}: {said}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: what runs ends, what waits does not begin
    return {run_dir: outcomes[run_dir] for run_dir in runs}


def _check_run(run_dir: Path, profile: str, values: dict[str, Any]) -> None:
    """Refuse a folder that holds another run than ours."""
    if not (ROOT / run_dir / "manifest.json").exists():
        return
    open_run(run_dir, profile, values)
    found = _read_json(ROOT / run_dir / "manifest.json").get("parameters", {})
    differ = [
        f"{k} = {found.get(k)!r}, not {values.get(k)!r}" for k in {**found, **values} if found.get(k) != values.get(k)
    ]
    if differ:
        raise ValueError(f"{_shown(run_dir)} was run with {'; '.join(differ)}: move it away")


def _sweep_one(experiment: Experiment, run_dir: Path, values: dict[str, Any], jobs: int) -> tuple[float, str | None]:
    """Run what is missing of one run; returns the minutes and why it failed."""
    rest = _rest(run_dir, experiment.notebooks)
    if not rest:
        return 0.0, None
    command = [
        sys.executable,
        "-m",
        "searchr1_lib.suite",
        "run",
        "--profile",
        experiment.profile,
        "--run",
        run_dir.name,
        "--overwrite",
        "--only",
        *(path.stem for path in rest),
        *_as_arguments(values, rest),
    ]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    start, log = time.monotonic(), ROOT / run_dir / "sweep.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as out:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=out,
            env={**os.environ, "SEARCHR1_RUNS": str(run_dir.parent), "OMP_NUM_THREADS": threads},
        )
    error = None
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").split()
        error = failure_of(ROOT / run_dir) or f"exit code {done.returncode}: {' '.join(said[-30:])} (see {_shown(log)})"
    return (time.monotonic() - start) / 60, error


_WORDS = {
    "em": "exact match",
    "f1": "F1",
    "searches_per_need": "searches per hop needed",
    "over_search": "over-search",
    "under_search": "under-search",
}


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
        manifest, figures = _read_json(folder / "manifest.json"), {}
        if (path := folder / "summary.json").exists():
            for values in _read_json(path).values():
                figures |= dict(_flat(values))
        if (path := folder / "after.json").exists():
            for group, metrics in _read_json(path).get("table", {}).items():
                figures |= {f"{_WORDS.get(m, m)}, {group}": v for m, v in metrics.items() if v is not None}
        profile = manifest.get("profile", "")
        rows.append(
            {
                "run": folder.name,
                "profile": profile,
                "settings": load_profile(profile) | manifest.get("parameters", {}),
                "commit": manifest.get("git_commit"),
                "error": failure_of(folder),
                "figures": figures,
                "curve": _curve(folder / "train" / "metrics.jsonl"),
            }
        )
    return rows


_CURVE = (
    "reward",
    "em_known",
    "em_lookup",
    "searches_known",
    "searches_per_need_lookup",
    "search_first_known",
    "search_first_lookup",
    "malformed",
    "entropy",
    "grad_norm",
    "seconds",
    "seconds_update",
)


def _curve(path: Path, every: int = 5) -> list[dict[str, float]]:
    """The means of every so many steps of a training's metrics, each with the step in their middle; [] without any."""
    rows = _read_json_lines(path) if path.exists() else []
    parts = [rows[i : i + every] for i in range(0, len(rows), every)]
    means = [{name: [row[name] for row in part if row.get(name) is not None] for name in _CURVE} for part in parts]
    return [
        {"step": part[len(part) // 2]["step"]} | {n: float(f"{fmean(v):.4g}") for n, v in mean.items() if v}
        for part, mean in zip(parts, means)
    ]


def experiment_runs(path: str | os.PathLike, profile: str = "") -> tuple[list[dict[str, Any]], str]:
    """The runs of an experiment (see ``read_runs``), and in words where they come from.

    Those under ``profile``, else those of its own profile, else the results that ship beside the file, else none.

    Raises:
        ValueError: the experiment's file or a run's is broken; names it.
    """
    path = Path(path)
    whole = read_experiment(path)
    for experiment in ([read_experiment(path, profile)] if profile else []) + [whole]:
        if rows := read_runs(sorted(experiment.runs())):
            return rows, f"{len(rows)} of {len(experiment.runs())} runs in {experiment.folder}"
    shipped = path.parent / "results" / f"{whole.name}.jsonl"
    if shipped.exists():
        return _read_json_lines(shipped), str(shipped)
    return [], f"not run yet: python -m searchr1_lib.suite sweep {path}"


def failure_of(run_dir: str | os.PathLike) -> str | None:
    """Why a run is unfinished: notebook, cell and error, read from the copy that it left; None if there is none."""
    import nbformat

    for copy in sorted(Path(run_dir).glob("notebooks/*.unfinished.ipynb")):
        name = copy.name.removesuffix(".unfinished.ipynb")
        for cell in nbformat.read(copy, as_version=4).cells:
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    what = f"{output.ename}: {output.evalue}".splitlines()[0][:300]
                    return f"{name}, cell In [{cell.execution_count}]: {what}"
        return f"{name}: its kernel died (out of memory?) or was stopped"
    return None


# -- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0: all ran; 1: a notebook failed; 2: refused before running; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m searchr1_lib.suite", description="Runs the numbered notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run them in reading order")
    run.add_argument("--run", default="", metavar="NAME", help="folder under runs/ (default: profile, date and time)")
    run.add_argument("-p", dest="given", action="append", default=[], metavar="name=value", help="beats the profile")
    run.add_argument("--only", nargs="+", default=[], metavar="03", help="only notebooks whose names begin so")
    run.add_argument("--overwrite", action="store_true", help="delete what an earlier run left under that name")
    several = commands.add_parser("seeds", help="train once per seed; mean and interval go to docs/measurements.md")
    several.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    for command in (run, several):
        command.add_argument("--profile", default="auto", help="smoke, cpu, t4, gpu or auto (default)")
    grid = commands.add_parser("sweep", help="run an experiment: settings x seeds, what is complete is skipped")
    grid.add_argument("experiment", metavar="FILE", help="such as experiments/search_cost.yaml")
    grid.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    grid.add_argument("--profile", default="", help="instead of the file's")
    grid.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="instead of the file's")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "seeds":
            print("\n" + run_seeds(asked.profile, asked.seeds))
            return 0
        if asked.command == "sweep":
            experiment = read_experiment(asked.experiment, asked.profile, asked.seeds)
            whole = not asked.profile and not asked.seeds
            return _report_sweep(Path(asked.experiment), experiment, asked.jobs, whole)
        run_dir, outcomes = run_suite(asked.profile, asked.run, asked.given, only=asked.only, overwrite=asked.overwrite)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:  # a notebook of a seed
        print(f"error: {e}", file=sys.stderr)
        return 1
    return _report(run_dir, outcomes)


def _report_sweep(path: Path, experiment: Experiment, jobs: int, whole: bool) -> int:
    """Run an experiment and print how its runs ended; returns the exit code.

    Where it ran as its file says (``whole``) and nothing failed, its results go to ``results/`` beside the file.
    """
    try:
        outcomes = sweep(experiment, jobs)
    except KeyboardInterrupt:
        print("interrupted: what is complete stays, and the same command goes on", file=sys.stderr)
        return 130
    rows = [
        (run_dir.name, f"{minutes:.1f} min", "FAILED" if error else "ok")
        for run_dir, (minutes, error) in outcomes.items()
    ]
    print("\n" + _table(rows))
    failed = {run_dir: error for run_dir, (_, error) in outcomes.items() if error}
    for run_dir, error in failed.items():
        print(f"error: {run_dir}: {error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(rows)} runs failed; the same command runs only these again", file=sys.stderr)
    elif whole:
        results = path.parent / "results" / f"{experiment.name}.jsonl"
        write_json_lines(results, read_runs(sorted(ROOT / run_dir for run_dir in outcomes)))
        print(f"\nResults are in {_shown(results)}.")
    print(f"\nNotebook 08_experiment_report reads {experiment.folder}.")
    return 1 if failed else 0


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
