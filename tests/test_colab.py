"""One click in Google Colab: the first cell in a bare environment, and the address that is stamped into everything."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest

from searchr1_lib.suite import colab

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9A]*.ipynb"))

#: What a GPU runtime of Colab held in mid 2026 (github.com/googlecolab/backend-info), as far as we depend on it.
RUNTIME = {
    "torch": "2.11.0+cu128",
    "transformers": "5.9.0",
    "peft": "0.19.1",
    "safetensors": "0.7.0",
    "numpy": "2.0.2",
    "sentence-transformers": "5.5.1",
    "datasets": "4.0.0",
    "pyarrow": "18.1.0",
    "httpx": "0.28.1",
    "urllib3": "2.5.0",
    "pyyaml": "6.0.3",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "ipykernel": "6.17.1",
    "nbconvert": "7.17.1",
    "nbformat": "5.10.4",
    "nbclient": "0.10.4",
    "pillow": "11.3.0",
    "scipy": "1.16.3",
    "pydantic": "2.12.3",
    "tenacity": "9.1.2",
    "tqdm": "4.67.1",
    "regex": "2025.9.18",
    "filelock": "3.20.0",
    "psutil": "5.9.5",
}


def names(requirements):
    return {re.match(r"[\w.-]+", r)[0] for r in requirements}


# -- what is installed ------------------------------------------------------------------------------------------


def test_only_what_colab_lacks_is_installed():
    requirements = colab._project()["dependencies"]
    lacking = names(colab.missing(requirements, RUNTIME))
    assert lacking == {"bitsandbytes", "faiss-cpu", "bm25s", "papermill"}
    assert not colab.missing(requirements, RUNTIME | dict.fromkeys(lacking, "99"))


def test_a_package_that_is_too_old_is_installed_unless_it_is_kept():
    requirements = colab._project()["dependencies"]
    assert names(colab.missing(requirements, RUNTIME | {"transformers": "4.57.0"})) >= {"transformers"}
    for name in ("torch", "numpy"):
        for version in ("1.0", None):
            with pytest.raises(RuntimeError, match=f"this runtime has {name}.*Runtime version > Latest"):
                colab.missing(requirements, {k: v for k, v in (RUNTIME | {name: version}).items() if v})
    assert not names(colab.missing(requirements, {k: v for k, v in RUNTIME.items() if k in ("torch", "numpy")})) & {
        *colab.KEPT
    }


def test_the_server_of_notebook_a2_is_looked_for_too():
    there = dict.fromkeys(names(colab._requirements()), "99") | RUNTIME
    assert not colab.missing(colab._requirements(), there)
    del there["starlette"], there["uvicorn"]
    assert names(colab.missing(colab._requirements(), there)) == {"starlette", "uvicorn"}


def test_of_two_copies_the_first_on_the_path_counts(tmp_path, monkeypatch):
    for version in ("2.0", "1.0"):  # each is put in front of the one before
        info = tmp_path / version / f"Two_Copies-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Two_Copies\nVersion: {version}\n")
        monkeypatch.syspath_prepend(info.parent)
    assert colab._installed()["two-copies"] == "1.0"


# -- the first cell ---------------------------------------------------------------------------------------------------


def test_outside_colab_the_cell_does_and_says_nothing(tmp_path):
    code = (
        f"import sys\nbefore = set(sys.modules)\nexec({colab.CELL.format(address=colab.address())!r})\n"
        "print(set(sys.modules) - before, file=sys.stderr, end='')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "set()", [])


def test_a_clone_that_fails_says_why_and_what_to_do(tmp_path):
    cell = colab.CELL.format(address="no/body").replace("https://github.com/no/body", f"file://{tmp_path}/absent")
    code = f"import sys\nsys.modules['google.colab'] = None\nexec({cell!r})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    said = done.stderr.split("RuntimeError: ")[1]
    assert "absent' does not exist" in said or "absent' does not appear to be a git repository" in said
    assert "make badges REPO=owner/name" in said and not list(tmp_path.iterdir())


def wheel(path, files):
    """A wheel from ``{name in the archive: bytes}``, its RECORD made anew."""
    (info,) = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))


def empty_wheel(folder, name, needs=""):
    """Version 99 of a package without a module; ``needs`` is a line of its metadata."""
    info = f"{name}-99.0.dist-info"
    wheel(
        folder / f"{name}-99.0-py3-none-any.whl",
        {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n{needs}".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        },
    )


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """A bare virtual environment that stands for Colab's.

    It sees our installed packages through links, except for bm25s and this project; pip finds bm25s, and newer
    versions of what must be kept, in a folder and nowhere else. ``google.colab`` is a stand-in, imported at the
    kernel's start as it is there.
    """
    base = tmp_path_factory.mktemp("colab")
    # dill, for one, tells by this name what is installed and what is a user's own
    packages, wheels = base / "site-packages", base / "wheels"
    packages.mkdir()
    wheels.mkdir()
    own = re.compile(r"_distutils|searchr1|__editable__|bm25s|.*\.(pth|egg-link)$", re.I)
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not own.match(entry.name):
                (packages / entry.name).symlink_to(entry)
    bm25s = distribution("bm25s")
    wheel(
        wheels / f"bm25s-{bm25s.version}-py3-none-any.whl",
        {
            str(f): f.read_binary()
            for f in bm25s.files
            if f.parts[0].startswith("bm25s") and f.suffix != ".pyc" and f.name != "RECORD"
        },
    )
    for name in ("torch", "numpy", "pillow"):
        empty_wheel(wheels, name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base / "venv"], check=True)  # pip is linked too
    python = base / "venv" / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").write_text("")
    (site / "google" / "colab" / "drive.py").write_text("def mount(folder):\n    print('mounted at', folder)\n")
    (site / "runtime.pth").write_text(f"{packages}\nimport google.colab\n")
    kernel = base / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps(
            {
                "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "colab",
                "language": "python",
            }
        )
    )
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    copy = base / "origin"
    listed = subprocess.check_output(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "searchr1_lib",
            "data",
            "experiments",
            "notebooks",
            "pyproject.toml",
        ],
        cwd=ROOT,
        text=True,
    ).split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=copy, check=True)
    return base


def run_in_colab(runtime, folder, cells, monkeypatch):
    """Execute a notebook, alone in its folder, in the kernel that stands for Colab; what each cell prints."""
    from nbclient import NotebookClient

    for path in runtime.glob("venv/lib/*/site-packages/searchr1_lib.pth"):  # each on a machine of its own
        path.unlink()

    for name in ("SEARCHR1_PROFILE", "SEARCHR1_RUNS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "JUPYTER_PATH": runtime / "jupyter",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": runtime / "wheels",
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, folder / "notebook.ipynb")
    NotebookClient(notebook, kernel_name="colab", timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def test_one_click_in_a_bare_environment_with_nothing_but_the_notebook(runtime, tmp_path, monkeypatch):
    cells = nbformat.read(ROOT / "notebooks" / "02_rollout_inspection.ipynb", as_version=4).cells
    parameters = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    address, origin = f"https://github.com/{colab.address()}", f"file://{runtime / 'origin'}"
    setup = nbformat.v4.new_code_cell(colab.CELL.format(address=colab.address()).replace(address, origin))
    assert origin in setup.source
    use = nbformat.v4.new_code_cell(
        "from searchr1_lib import BM25Search, load_passages, load_questions, suite\n"
        "p = suite.parameters(profile, 'one')\n"
        "engine = BM25Search(load_passages(f'{p.data}/passages.jsonl'))\n"
        "print(len(engine.search(load_questions(f'{p.data}/test.jsonl')[0].text, k=3)), 'hits')\n"
        "import subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-c', 'import searchr1_lib; print(searchr1_lib.__file__)'],"
        " capture_output=True, text=True, cwd='/').stdout)"
    )
    versions = nbformat.v4.new_code_cell(
        "import importlib.metadata as m\nprint(*(f'{n}=={m.version(n)}' for n in ('torch', 'numpy', 'pillow')))"
    )
    again = nbformat.v4.new_code_cell(setup.source)
    texts = run_in_colab(runtime, tmp_path, [setup, parameters, use, versions, again], monkeypatch)
    first = texts[0].splitlines()
    assert first[0].startswith("Search-R1 is ready: profile cpu") and "Change runtime type > T4 GPU" in first[1]
    assert len(first) == 2 and texts[4] == texts[0]
    assert "3 hits" in texts[2] and str(tmp_path / "search-r1" / "searchr1_lib") in texts[2]
    assert texts[3].split() == [f"{n}=={distribution(n).version}" for n in ("torch", "numpy", "pillow")]
    installed = {p.name for p in (runtime / "venv").glob("lib/python*/site-packages/*.dist-info")}
    assert {n.split("-")[0] for n in installed} == {"bm25s"}
    assert {p.name for p in tmp_path.iterdir()} == {"notebook.ipynb", "search-r1"}


@pytest.mark.notebooks
def test_a_notebook_runs_those_before_it_if_it_begins_on_an_empty_machine(runtime, tmp_path, monkeypatch):
    cells = nbformat.read(ROOT / "notebooks" / "04_grpo_step_by_step.ipynb", as_version=4).cells
    begin = [
        nbformat.v4.new_code_cell(c.source)
        for c in cells[: 1 + next(i for i, c in enumerate(cells) if "suite.require" in c.source)]
        if c.cell_type == "code"
    ]
    address = f"https://github.com/{colab.address()}"
    begin[0].source = begin[0].source.replace(address, f"file://{runtime / 'origin'}")
    begin[1].source = begin[1].source.replace('"auto"', '"smoke"').replace("seed: int = None", "seed: int = 7")
    assert "seed: int = 7" in begin[1].source
    said = run_in_colab(runtime, tmp_path, begin, monkeypatch)[-1]
    run_dir = tmp_path / "search-r1" / "runs" / "smoke"
    assert "runs/smoke/rollouts.jsonl is missing, and this is Colab" in said
    assert re.search(r"02_rollout_inspection +[\d.]+ min +ok", said)  # what the suite printed
    before = (run_dir / "notebooks" / "02_rollout_inspection.ipynb").read_text(encoding="utf-8")
    assert "runs/smoke/index is missing, and this is Colab" in before
    assert json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["parameters"] == {"seed": 7}


@pytest.mark.skipif(not os.environ.get("SEARCHR1_COLAB"), reason="minutes: set SEARCHR1_COLAB=1 to run it")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_whole_notebook_on_an_empty_machine(path, runtime, tmp_path, monkeypatch):
    """With tiny settings; what it needs of others it makes first."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    cells = [nbformat.v4.new_code_cell(cell.source) for cell in code]
    cells[0].source = cells[0].source.replace(f"https://github.com/{colab.address()}", f"file://{runtime / 'origin'}")
    cells[1].source = cells[1].source.replace('"auto"', '"smoke"')
    said = run_in_colab(runtime, tmp_path, cells, monkeypatch)
    assert said[0].startswith("Search-R1 is ready")  # and no cell raised


def test_drive_is_mounted_only_if_asked(monkeypatch, capsys):
    from types import ModuleType

    drive, package = ModuleType("google.colab.drive"), ModuleType("google.colab")
    mounted = []
    drive.mount = package.drive = mounted.append
    package.drive = drive
    for name, module in {"google": ModuleType("google"), "google.colab": package, "google.colab.drive": drive}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(colab, "_make_importable", lambda: None)
    monkeypatch.setenv("SEARCHR1_RUNS", "runs")
    colab.setup()
    assert not mounted and os.environ["SEARCHR1_RUNS"] == "runs"
    colab.setup(mount_drive=True)
    assert mounted == ["/content/drive"] and os.environ["SEARCHR1_RUNS"].startswith("/content/drive/MyDrive/")


def test_pip_that_fails_is_said(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not install no-such-package"):
        colab._install(["no-such-package"], {})


def test_what_is_kept_is_not_changed_for_a_package_that_wants_another_version(tmp_path, monkeypatch):
    for name, needs in {"numpy": "", "greedy": "Requires-Dist: numpy>=99\n"}.items():
        empty_wheel(tmp_path, name, needs)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": tmp_path,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_TARGET": tmp_path / "target",
    }.items():  # nothing reaches our own environment
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RuntimeError, match="pip could not install greedy"):
        colab._install(["greedy"], colab._installed())
    assert not (tmp_path / "target").exists()
    colab._install(["greedy"], {})  # nothing kept: this is what the pins prevent
    assert (tmp_path / "target" / "numpy-99.0.dist-info").is_dir()


# -- the address ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_of_every_notebook_is_the_current_one(path):
    cells = nbformat.read(path, as_version=4).cells
    first = next(cell for cell in cells if cell.cell_type == "code")
    assert first.source == colab.CELL.format(address=colab.address()), "run searchr1 badges"
    assert f"github/{colab.address()}/blob/main/notebooks/{path.name})" in cells[0].source


def strays(root, repository):
    """Files that name another repository as this one: in a badge or in the command that clones it."""
    found = []
    for path in [
        root / "README.md",
        root / "pyproject.toml",
        *(root / "notebooks").glob("[0-9A]*.ipynb"),
        *(root / "docs").glob("*.md"),
    ]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", text)
        named += re.findall(r'"https://github\.com/([\w.-]+/[\w.-]+?)\\?"', text)
        named += re.findall(r"\bOWNER/REPO\b", text)
        found += [f"{path.name}: {name}" for name in named if name != repository]
    return found


def test_no_stray_address():
    assert not strays(ROOT, colab.address())
    assert "colab.research.google.com" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_stamping_reaches_everything_and_nothing_else(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copyfile(path, tmp_path / "notebooks" / path.name)
    for name in ("README.md", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    before = {path: path.read_text(encoding="utf-8") for path in sorted(tmp_path.rglob("*.*")) if path.is_file()}
    changed = colab.stamp("someone/else.where", tmp_path)
    assert {p.name for p in changed} == {"README.md", "pyproject.toml", *(p.name for p in NOTEBOOKS)}
    assert not strays(tmp_path, "someone/else.where") and not colab.stamp("someone/else.where", tmp_path)
    assert "github.com/someone/else.where" in (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    colab.stamp(colab.address(), tmp_path)
    assert before == {path: path.read_text(encoding="utf-8") for path in before}
    for wrong in ("no-slash", "a/b/c", 'a/b"; import os', "https://github.com/a/b"):
        with pytest.raises(ValueError, match="owner/name"):
            colab.stamp(wrong, tmp_path)


def test_make_badges_needs_nothing_but_python_and_makes_no_environment_stale(tmp_path):
    (tmp_path / "notebooks").mkdir()
    shutil.copyfile(NOTEBOOKS[0], tmp_path / "notebooks" / NOTEBOOKS[0].name)
    for name in ("README.md", "pyproject.toml", "Makefile"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "searchr1_lib", tmp_path / "searchr1_lib", ignore=shutil.ignore_patterns("__pycache__"))
    installed, project = tmp_path / ".venv" / ".installed", tmp_path / "pyproject.toml"

    def badges(repository):
        bare = f"PYTHON={sys.executable} -S"  # -S: without any installed package
        subprocess.run(["make", "badges", f"REPO={repository}", bare], cwd=tmp_path, check=True, capture_output=True)
        assert not strays(tmp_path, repository)

    badges("a/b")
    assert not installed.exists()
    installed.parent.mkdir()
    installed.touch()
    for moment, stale in ((0, True), (10, False)):  # older than pyproject.toml, and newer
        os.utime(installed, (project.stat().st_mtime + moment - 5,) * 2)
        badges(f"a/b{moment}")
        assert (installed.stat().st_mtime < project.stat().st_mtime) is stale


def test_stamping_gives_a_notebook_its_cell_and_keeps_its_outputs(tmp_path):
    path = tmp_path / "notebooks" / "07_new.ipynb"
    path.parent.mkdir()
    for name in ("README.md", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    head = nbformat.v4.new_markdown_cell("# New")
    output = nbformat.v4.new_output("execute_result", {"text/plain": "3"}, execution_count=1)
    code = nbformat.v4.new_code_cell("1 + 2", execution_count=1, outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[head, code]), path)
    with pytest.raises(ValueError, match="07_new.ipynb: the first cell has no Colab badge"):
        colab.stamp(root=tmp_path)
    head.source += "\n(https://colab.research.google.com/github/a/b/blob/main/notebooks/07_new.ipynb)"
    nbformat.write(nbformat.v4.new_notebook(cells=[head, code]), path)
    colab.stamp(root=tmp_path)
    setup, kept = nbformat.read(path, as_version=4).cells[1:]
    assert setup.source == colab.CELL.format(address=colab.address()) and setup.execution_count == 1
    assert kept.source == "1 + 2" and kept.execution_count == kept.outputs[0].execution_count == 2
