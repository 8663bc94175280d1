"""A run: its folder with manifest and figures, and the notebooks that papermill executes into it.

searchr1 run --profile cpu --run mine -p steps=20 -p "reward={OTC: {c: 3}}"
searchr1 run --profile cpu --run mine --only 06 --overwrite
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from tqdm import tqdm

from .. import __version__, suite
from ..files import write_json
from ..study.evaluate import hashes, versions
from ..training.settings import DECIDING
from .profiles import SHOWN, Profile, folder_of, load_profile, read_given, resolve_profile, shown

_PACKAGES = [*DECIDING, *"numpy faiss-cpu bm25s sentence-transformers datasets papermill ipykernel".split()]
#: The parameters that name what a run reads.
_INPUTS = ("data", "model", "demo_model", "demo_adapter", "tiny_model", "almanac")


# -- the folder -------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError, with the file's name, where it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{shown(path)} is broken ({e}): move it away, or choose another run") from None
    if not isinstance(value, dict):
        raise ValueError(f"{shown(path)} is broken (no JSON object): move it away, or choose another run")
    return value


def open_run(run_dir: str | os.PathLike, profile: str, given: dict[str, Any], *, working: bool = False) -> Profile:
    """Make a run's folder with its ``manifest.json``, or go on in the one that stands there.

    The manifest holds what decides the run's results: the profile, the explicitly given parameters and the values of
    all, the versions of Python and the main packages, the git commit ("-dirty" if changed; each under which the run
    went on), and the SHA-256 of every file under ``data/`` and of the other inputs.

    Args:
        given: explicit parameters; where a run stands there, its own apply to the others.
        working: notebooks are about to run: the commit is noted.

    Returns:
        the run's parameters.

    Raises:
        ValueError: the folder was made by another version (for 0.x another x counts), under another profile, with
            another value of a parameter, from other inputs or with another version of a package that decides.
    """
    path = suite.ROOT / run_dir / "manifest.json"
    if not path.exists():
        p = load_profile(profile, **given, run=path.parent.name)
        write_json(path, _manifest(p, given))
        return p
    manifest, p, commit = _held_against(path, profile, given, adopt=True)
    commits = str(manifest.get("git_commit")).split(", ")
    if working and commit not in commits:
        write_json(path, {**manifest, "git_commit": ", ".join([*commits, commit])})
    return p


def check_run(run_dir: Path, profile: str, given: dict[str, Any]) -> None:
    """Refuse parameters that cannot be, and a folder that holds a run with others than these and the profile's.

    Raises:
        ValueError: as ``open_run``.
    """
    load_profile(profile, **given)
    if (path := suite.ROOT / run_dir / "manifest.json").exists():
        _held_against(path, profile, given, adopt=False)


def _held_against(path: Path, profile: str, given: dict[str, Any], adopt: bool) -> tuple[dict[str, Any], Profile, str]:
    """The manifest there, the parameters now and the commit now; ``adopt`` takes the run's own where none are given.

    Raises:
        ValueError: as ``open_run``.
    """
    manifest = read_json(path)
    theirs, begun = str(manifest.get("searchr1_lib", "unknown")), manifest.get("parameters", {})
    if _era(theirs) != _era(__version__):
        ours = f"this is {__version__}: choose another run, or move the folder away"
        raise ValueError(f"{shown(path)}: made by searchr1_lib {theirs}, {ours}")
    if (before := manifest.get("profile")) != profile:
        raise ValueError(f"{shown(path)}: made under the profile {before!r}, not {profile!r}: choose another run")
    p = load_profile(profile, **(begun if adopt else {}) | given, run=path.parent.name)
    now, values = _manifest(p, given), load_profile(profile, **begun).values | manifest.get("values", {})
    told = {**values, **manifest.get("data", {}), **manifest.get("packages", {})}
    wanted = {**now["values"], **now["data"], **{name: now["packages"][name] for name in DECIDING}}
    differ = [n for n, value in wanted.items() if n not in SHOWN and told.get(n, value) != value]
    if differ:
        named = [n for n in differ if n in begun or n in given] or differ  # not also what follows from them
        said = "; ".join(f"{n} = {told[n]!r:.80}, not {wanted[n]!r:.80}" for n in named)
        raise ValueError(f"{shown(path.parent)} was run with {said}: move it away, or choose another run")
    return manifest, p, str(now["git_commit"])


def _era(release: str) -> list[str]:
    """The part of a version number within which run folders stay readable."""
    parts = release.split(".")
    return parts[:2] if parts[0] == "0" else parts[:1]


def _manifest(p: Profile, given: dict[str, Any]) -> dict[str, Any]:
    places = {value: hashes(suite.ROOT / value) for name in _INPUTS if (value := getattr(p, name))}
    places["data"] = hashes(suite.ROOT / "data", "**/*")
    return {
        **versions([]),
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions(_PACKAGES),
        "profile": p.profile,
        "parameters": given,
        "values": p.values,
        "data": {f"{at}/{name}": sha for at, files in places.items() for name, sha in files.items()},
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=suite.ROOT, capture_output=True, text=True, check=True).stdout.strip()
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
    profile = read_json(suite.ROOT / run_dir / "manifest.json")["profile"]
    if notebook.startswith("05") and profile not in ("smoke", "cpu"):
        raise FileNotFoundError(
            f"{path} is missing or empty: it comes from the training, {notebook}, which takes hours under the profile "
            f'{profile}. Run that notebook first, in this session or with mount_drive in both; or set profile = "cpu" '
            "in the parameters cell: the tiny Qwen is then trained here, in minutes"
        )
    why = "this is Colab, where each notebook begins on an empty machine"
    print(f"{path} is missing, and {why}: running {notebook} first", flush=True)
    command = command_of(profile, run_dir.name, [notebook])
    env = {**os.environ, "SEARCHR1_MAKING": " ".join([*making, notebook])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=suite.ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout or ():
            print(line, end="", flush=True)


def command_of(profile: str, run: str, only: Sequence[str]) -> list[str]:
    """The command that runs some notebooks, anew, in a process of its own, with the parameters of their run."""
    command = [sys.executable, "-m", "searchr1_lib", "run", "--profile", profile, "--run", run, "--overwrite"]
    return [*command, "--only", *only]


def record(run_dir: str | os.PathLike, notebook: str, figures: dict[str, Any]) -> None:
    """Put a notebook's figures into the run's ``summary.json``, which the suite prints at the end.

    Args:
        figures: numbers or words by name; a value may be a dict of them, e.g. {"before": 0.52, "after": 0.98}.
            They replace what the same notebook recorded before.
    """
    path = Path(run_dir) / "summary.json"
    summary = read_json(path) if path.exists() else {}
    write_json(path, {**summary, notebook: figures})


def results_table(run_dir: str | os.PathLike) -> str:
    """The figures in a run's ``summary.json`` as aligned text, one a line; "" if there are none."""
    path = Path(run_dir) / "summary.json"
    rows, told = [], lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    for notebook, figures in sorted(read_json(path).items()) if path.exists() else ():
        for name, value in figures.items():
            columns = value.items() if isinstance(value, dict) else [("", value)]
            rows.append((notebook, name, "   ".join(f"{key} {told(v)}".strip() for key, v in columns)))
    return table_of(rows)


def table_of(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# -- its notebooks ----------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
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
    books = sorted(p for p in (suite.ROOT / "notebooks").glob("*.ipynb") if re.match(r"(\d\d|A\d)_", p.name))
    for start in only:
        if not any(p.name.startswith(start) for p in books):
            known = ", ".join(p.stem for p in books) or "none"
            raise ValueError(f"--only {start}: no such notebook; there are {known}")
    if not books:
        raise ValueError("there is no numbered notebook in notebooks/")
    return [p for p in books if not only or p.name.startswith(tuple(only))]


def lacking(run_dir: Path, paths: Sequence[Path]) -> list[Path]:
    """The notebooks that a run still lacks: from the first one without an executed copy on."""
    done = [(suite.ROOT / run_dir / "notebooks" / path.name).exists() for path in paths]
    return list(paths[done.index(False) :]) if not all(done) else []


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
        given: ``name=value`` texts that beat the profile.
        only: beginnings of notebook names; these then run inside an existing folder too.
        overwrite: delete an existing run's folder first; with ``only``, replace just those executed copies.

    Returns:
        The run's folder (relative to the repository's root) and one outcome per notebook that ran.

    Raises:
        ValueError: an unknown profile or parameter, or a value that cannot be, before anything is written or run.
        FileExistsError: the run exists already and ``overwrite`` is not set.
        KeyboardInterrupt: with the command that goes on.
    """
    profile, why = resolve_profile(profile)
    paths, values = notebooks(only), read_given(list(given))
    load_profile(profile, **values)
    run_dir = folder_of(run or f"{profile}-{datetime.now():%Y%m%d-%H%M%S}")
    _clear_way(suite.ROOT / run_dir, paths, bool(only), overwrite)
    open_run(run_dir, profile, values, working=True)
    values = read_json(suite.ROOT / run_dir / "manifest.json").get("parameters", {}) | values
    print(f"profile {profile} ({why}), {len(paths)} notebooks, into {run_dir}", flush=True)
    outcomes: list[Outcome] = []
    try:
        for path in paths:
            print(f"  {path.stem} ...", flush=True)
            _forget(path, suite.ROOT / run_dir)
            outcomes.append(_execute(path, suite.ROOT / run_dir, {**values, "profile": profile, "run": run_dir.name}))
            if outcomes[-1].error:
                break
    except KeyboardInterrupt:
        words = ["--profile", profile, "--run", run_dir.name, *(word for text in given for word in ("-p", text))]
        left = [path.stem[:2] for path in paths[len(outcomes) :]]
        raise KeyboardInterrupt(f"searchr1 run {shlex.join([*words, '--only', *left])}") from None
    return run_dir, outcomes


def _clear_way(run_dir: Path, paths: Sequence[Path], inside: bool, overwrite: bool) -> None:
    """Refuse to run over existing results, or remove them if so asked."""
    if inside:
        old = [p for p in paths if (run_dir / "notebooks" / p.name).exists()]
        if old and not overwrite:
            raise FileExistsError(f"{shown(run_dir)} holds {old[0].stem} already: add --overwrite to run it again")
    elif run_dir.exists() and any(run_dir.iterdir()):
        if not overwrite:
            ways = "choose another --run, continue in it with --only, or add --overwrite to delete it first"
            raise FileExistsError(f"{shown(run_dir)} exists already: {ways}")
        if not (run_dir / "manifest.json").exists():
            raise FileExistsError(f"{shown(run_dir)} has no manifest.json, so it is no run's folder: not deleted")
        shutil.rmtree(run_dir)


def _forget(path: Path, run_dir: Path) -> None:
    """Remove what a notebook left that ran to its end, so that running it again takes nothing old for new.

    What one left that was interrupted stays: it goes on from there.
    """
    copy, summary = run_dir / "notebooks" / path.name, run_dir / "summary.json"
    if not copy.exists():
        return
    copy.unlink()
    for name in promised(path) - {summary.name}:
        shutil.rmtree(run_dir / name, ignore_errors=True)
        (run_dir / name).unlink(missing_ok=True)
    if summary.exists():
        write_json(summary, {name: figures for name, figures in read_json(summary).items() if name != path.stem})


def promised(path: Path) -> set[str]:
    """The names in a run's folder that a notebook says that it leaves: what it requires of itself, at its end."""
    cells = nbformat.read(path, as_version=4).cells
    trees = [ast.parse(c.source) for c in cells if c.cell_type == "code" and f'made_by="{path.stem}"' in c.source]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    own = [call for call in calls if f"made_by='{path.stem}'" in map(ast.unparse, call.keywords)]
    words = [word for call in own for argument in call.args for word in ast.walk(argument)]
    names = {Path(w.value).parts[0] for w in words if isinstance(w, ast.Constant) and isinstance(w.value, str)}
    return names - {"/", ".."}


@contextmanager
def _bar(path: Path) -> Iterator[tqdm]:
    """On a terminal, the cell and the time within a notebook; a thread moves the clock while a cell of minutes runs."""
    cells, over = len(nbformat.read(path, as_version=4).cells), threading.Event()
    how = {"bar_format": "  {desc}: cell {n_fmt} of {total_fmt} {bar} {elapsed}", "disable": None, "leave": False}

    def move_clock():
        while not over.wait(1):
            bar.refresh()

    with tqdm(total=cells + 1, desc=path.stem, **how) as bar:  # one more: the values that papermill puts in
        threading.Thread(target=move_clock, daemon=True).start()
        try:
            yield bar
        finally:
            over.set()


def _execute(path: Path, run_dir: Path, values: dict[str, Any]) -> Outcome:
    """Run one notebook with those values, in a kernel of this very interpreter.

    The executed copy is NAME.unfinished.ipynb until every cell has succeeded.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # "python3" is then this environment's kernel, not the user's
    # it warns of each value that a parameters cell does not name; suite.parameters takes, and checks, them all
    logging.getLogger("papermill").setLevel(logging.ERROR)
    done, start, error = run_dir / "notebooks" / path.name, time.monotonic(), None
    copy = done.with_suffix(".unfinished.ipynb")
    copy.parent.mkdir(exist_ok=True)
    how = {
        "kernel_name": "python3",
        "language": "python",
        "cwd": str(suite.ROOT),
        "progress_bar": False,
        "iopub_timeout": 300,  # a busy machine may be late with a cell's last output
        "extra_arguments": ["--log-level=CRITICAL"],  # what a kernel says of being stopped says nothing
        "config": Config(KernelManager={"transport_encryption": "auto"}),  # nobody else on the machine listens
    }
    try:
        with _bar(path) as bar:
            at = lambda cell, cell_index: bar.update(cell_index + 1 - bar.n)
            papermill.execute_notebook(path, copy, values, **how, on_cell_execute=at)
    except (papermill.PapermillExecutionError, DeadKernelError, CellTimeoutError):
        error = f"{_why(copy)} (see {shown(copy)})"
    except ValueError as e:
        error = f"{shown(path)} cannot be run: {e}"
    else:
        os.replace(copy, done)
    return Outcome(path.stem, (time.monotonic() - start) / 60, error)


def failure_of(run_dir: str | os.PathLike) -> str | None:
    """Why a run is unfinished: notebook, cell and error, read from the copy that it left; None if there is none."""
    copies = sorted(Path(run_dir).glob("notebooks/*.unfinished.ipynb"))
    return f"{copies[0].name.removesuffix('.unfinished.ipynb')}, {_why(copies[0])}" if copies else None


def _why(copy: Path) -> str:
    """The cell and the error with which an executed copy ends."""
    try:
        cells = nbformat.read(copy, as_version=4).cells
    except ValueError:
        cells = []  # killed while it was written
    outputs = [(cell, output) for cell in cells for output in cell.get("outputs", [])]
    for cell, output in outputs:
        if output.output_type == "error":
            return f"cell In [{cell.execution_count}]: " + f"{output.ename}: {output.evalue}".splitlines()[0][:300]
    return "the kernel died (out of memory?) or was stopped"


def _peak_gib() -> float:
    """The largest resident memory of any kernel so far, in GiB; nan where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30


# -- the command line -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", default="auto", help="smoke, cpu, laptop, t4, gpu or auto (default)")
    add("--run", default="", metavar="NAME", help="folder under runs/ (default: profile, date and time)")
    add("-p", dest="given", action="append", default=[], metavar="name=value", help="beats the profile")
    add("--only", nargs="+", default=[], metavar="03", help="only notebooks whose names begin so")
    add("--overwrite", action="store_true", help="delete what an earlier run left under that name")


def run(args: argparse.Namespace) -> int:
    """Run the notebooks and print what they gave; the exit code is 1 where one failed."""
    run_dir, outcomes = run_suite(args.profile, args.run, args.given, only=args.only, overwrite=args.overwrite)
    rows = [(o.notebook, f"{o.minutes:.1f} min", "FAILED" if o.error else "ok") for o in outcomes]
    total = sum(o.minutes for o in outcomes)
    print("\n" + table_of([*rows, ("in all", f"{total:.1f} min", f"peak memory of a notebook {_peak_gib():.1f} GiB")]))
    if figures := results_table(suite.ROOT / run_dir):
        print("\n" + figures)
    print(f"\nOpen {run_dir / 'notebooks'} to read the executed notebooks.")
    if failed := [o for o in outcomes if o.error]:
        print(f"error: {failed[0].notebook}, {failed[0].error}", file=sys.stderr)
    return 1 if failed else 0
