"""Google Colab: what the first cell of every notebook does there, and the address that is stamped into it.

The repository's address stands in one place, ``[project.urls]`` of pyproject.toml. ``stamp`` puts it (``make badges
REPO=owner/name`` a new one) into the notebooks, their badges and the README.

    searchr1 badges owner/name
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from ..files import write_whole

ROOT = Path(__file__).resolve().parents[2]

#: Never installed or changed: what Colab's own kernel and its CUDA build stand on, and the front end, which it has.
KEPT = ("torch", "numpy", "pillow", "ipykernel", "ipywidgets", "jupyterlab", "nbconvert", "nbclient", "nbformat")

#: The first code cell of every notebook.
CELL = """\
# For Google Colab: fetches the project and installs what it lacks. Anywhere else this cell does nothing.
mount_drive = False  # @param {{type: "boolean"}}
# True keeps the runs in your Google Drive, so that training goes on after a disconnection.
import sys

if "google.colab" in sys.modules:
    import importlib.util, pathlib, subprocess

    if not importlib.util.find_spec("searchr1_lib"):
        folder = pathlib.Path("search-r1").resolve()
        if not folder.exists():
            url = "https://github.com/{address}"
            done = subprocess.run(["git", "clone", "-q", "--depth", "1", url, folder], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"cannot fetch {{url}}: {{done.stderr.strip()}}. If this is not the project's "
                                   "address: `make badges REPO=owner/name` writes the right one into all notebooks")
        sys.path.insert(0, str(folder))
    from searchr1_lib.suite import colab

    colab.setup(mount_drive)"""
TAG = "colab"

_NAME = r"[\w.-]+/[\w.-]+"
_BADGE = re.compile(rf"(colab\.research\.google\.com/github/){_NAME}(/blob/main/notebooks/)")


def setup(mount_drive: bool = False) -> None:
    """Make a Colab runtime ready, in seconds and without a restart; a second call finds nothing to do.

    Args:
        mount_drive: mount Google Drive, and keep the runs there.

    Raises:
        RuntimeError: a package that we do not touch is too old, or pip failed; says what to do.
    """
    _complete(_requirements())
    _make_importable()
    if mount_drive:
        from google.colab import drive

        drive.mount("/content/drive")
        os.environ["SEARCHR1_RUNS"] = "/content/drive/MyDrive/searchr1_runs"
    from . import resolve_profile

    profile, why = resolve_profile("auto")
    print(f"Search-R1 is ready: profile {profile} ({why}).")
    if profile == "cpu":
        print(
            "This runtime has no GPU, so the tiny Qwen is used. For a real Qwen: Runtime > Change runtime type > "
            "T4 GPU, then Runtime > Run all."
        )


def add(extra: str) -> None:
    """Install there what an extra of the project needs (``pyproject.toml`` has them), such as "trl".

    Raises:
        RuntimeError: see ``setup``.
    """
    _complete(_project()["optional-dependencies"][extra])


def _complete(requirements: Sequence[str]) -> None:
    if lacking := missing(requirements, installed := _installed()):
        _install(lacking, installed)


def _requirements() -> list[str]:
    """What the notebooks need: the project's dependencies, and those of the server that appendix A2 starts."""
    project = _project()
    return project["dependencies"] + project["optional-dependencies"]["server"]


def _installed() -> dict[str, str]:
    """Version of each package by its canonical name; of two copies that of the first on the path, as import does."""
    from packaging.utils import canonicalize_name

    found = [d for d in distributions() if d.metadata["Name"]]
    return {canonicalize_name(d.metadata["Name"]): d.version for d in reversed(found)}


def missing(requirements: Sequence[str], installed: Mapping[str, str]) -> list[str]:
    """The requirements that are not met by the installed versions (see ``_installed``), without those on ``KEPT``.

    Raises:
        RuntimeError: torch or numpy is there, but not in a version that will do.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lacking = []
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        met = name in installed and requirement.specifier.contains(installed[name], prereleases=True)
        if name in ("torch", "numpy") and not met:
            raise RuntimeError(
                f"this runtime has {name} {installed.get(name, '(none)')}, the project needs {requirement}. Choose "
                "Runtime > Change runtime type > Runtime version > Latest, then Runtime > Run all"
            )
        if not met and name not in KEPT:
            lacking.append(str(requirement))
    return lacking


def _install(requirements: Sequence[str], installed: Mapping[str, str]) -> None:
    """Let pip install; what is on ``KEPT`` stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "kept.txt"
        pins.write_text("".join(f"{n}=={v}\n" for n, v in installed.items() if n in KEPT), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(pins)]
        done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not install {', '.join(requirements)}:\n{(done.stdout + done.stderr)[-2000:]}")
    importlib.invalidate_caches()


def _make_importable() -> None:
    """Let other processes of this runtime, and the kernel after a restart, import the project too."""
    try:
        distribution("searchr1_lib")
    except PackageNotFoundError:
        write_whole(Path(sysconfig.get_path("purelib")) / "searchr1_lib.pth", f"{ROOT}\n")


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# -- the address ---------------------------------------------------------------------------------------------------


def address() -> str:
    """The repository on GitHub, ``owner/name``, as pyproject.toml says."""
    return _project()["urls"]["Repository"].removeprefix("https://github.com/")


def stamp(repository: str | None = None, root: Path = ROOT) -> list[Path]:
    """Write the address into pyproject.toml, the README and the notebooks, which get the current first cell.

    Outputs of the notebooks stay; a file that is as it should be is not written.

    Args:
        repository: ``owner/name``; None: the address that pyproject.toml has.

    Returns:
        the files that changed.

    Raises:
        ValueError: not of the form ``owner/name``, or a notebook without a badge.
    """
    repository = repository or address()
    if not re.fullmatch(_NAME, repository):
        raise ValueError(f"{repository!r}: write the repository as owner/name")
    project = re.compile(rf'(Repository = "https://github\.com/){_NAME}"')
    texts = {path: path.read_text(encoding="utf-8") for path in (root / "pyproject.toml", root / "README.md")}
    new = {path: project.sub(rf'\g<1>{repository}"', _badges(text, repository)) for path, text in texts.items()}
    for path in sorted((root / "notebooks").glob("[0-9A]*.ipynb")):
        texts[path] = path.read_text(encoding="utf-8")
        new[path] = _stamped_notebook(path, repository)
    changed = [path for path in texts if new[path] != texts[path]]
    for path in changed:
        write_whole(path, new[path])
    return changed


def _badges(text: str, repository: str) -> str:
    return _BADGE.sub(rf"\g<1>{repository}\g<2>", text)


def _stamped_notebook(path: Path, repository: str) -> str:
    """The notebook's file as ``nbformat`` would write it, which is not needed for that."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    cells[0]["source"] = _badges("".join(cells[0]["source"]), repository).splitlines(keepends=True)
    if f"github/{repository}/blob/main/notebooks/{path.name}" not in "".join(cells[0]["source"]):
        raise ValueError(f"{path.name}: the first cell has no Colab badge for this notebook")
    first = next(i for i, cell in enumerate(cells) if cell["cell_type"] == "code")
    if TAG not in cells[first]["metadata"].get("tags", []):
        executed = [cell for cell in cells if cell.get("execution_count")]
        for part in [*executed, *(o for cell in executed for o in cell["outputs"] if o.get("execution_count"))]:
            part["execution_count"] += 1
        cell = {"cell_type": "code", "id": "colab-setup", "metadata": {"tags": [TAG]}, "outputs": []}
        cells.insert(first, cell | {"execution_count": 1 if executed else None})
    cells[first]["source"] = CELL.format(address=repository).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", nargs="?", help="owner/name on GitHub (default: what pyproject.toml says)")


def run(args: argparse.Namespace) -> None:
    """Stamp the address and say which files changed."""
    changed = stamp(args.repository)
    print(f"{len(changed)} file(s) changed", *(path.name for path in changed))
