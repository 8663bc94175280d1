"""The suite on throw-away notebooks, run by papermill in real kernels."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

import searchr1_lib
from searchr1_lib import suite

ROOT = Path(__file__).resolve().parents[1]
HEAD = 'profile = "auto"  # which one\nrun = ""  # the folder\n'
USE = "from pathlib import Path\nfrom searchr1_lib import suite\nsuite.ROOT = Path({root!r})\n"


def write_notebook(path: Path, parameters: str, *cells: str) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    book.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with two notebooks that need each other, and a profile."""
    books = tmp_path / "notebooks"
    (books / "profiles").mkdir(parents=True)
    (books / "profiles" / "small.yaml").write_text("steps: 3\nlr: 1.5e-3\nname: tiny\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "facts.txt").write_text("a fact")
    use = USE.format(root=str(tmp_path))
    write_notebook(
        books / "00_first.ipynb",
        HEAD + "steps: int = None  # how many (a = b)\nlr: float = None  # rate",
        use + "p = suite.parameters(profile, run, steps=steps, lr=lr)",
        '(p.run_dir / "steps.txt").write_text(f"{p.steps} {p.lr}")',
        'suite.record(p.run_dir, "00_first", {"steps": p.steps, "rate": {"before": 0.5, "after": p.lr}})',
    )
    write_notebook(
        books / "A1_second.ipynb",
        HEAD + "name: str = None",
        use + "p = suite.parameters(profile, run, name=name)",
        'path, = suite.require(p.run_dir, "steps.txt", made_by="00_first")\nprint(p.name, path.read_text())',
    )
    foreign = tmp_path / "jupyter" / "kernels" / "python3"  # a user's own python3 kernel must not be taken
    foreign.mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel starts in the throw-away repository
    monkeypatch.delenv("SEARCHR1_RUNS", raising=False)
    monkeypatch.delenv("SEARCHR1_PROFILE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SEEDED = """if p.seed == 9:
    raise RuntimeError("diverged")
suite.record(p.run_dir, "05_train", {"EM": {"before": 0.5, "after": p.seed / 10}, "minutes": 2.0, "kept": True})"""


@pytest.fixture
def seeded(project):
    """The same repository with the two notebooks that a seed needs."""
    books = project / "notebooks"
    (books / "profiles" / "small.yaml").write_text("steps: 3\nlr: 1.5e-3\nname: tiny\nseed: 0\n")
    use = USE.format(root=str(project))
    write_notebook(
        books / "01_index.ipynb",
        HEAD,
        use + 'p = suite.parameters(profile, run)\n(p.run_dir / "index.txt").write_text("x")',
    )
    needs = '\nsuite.require(p.run_dir, "index.txt", made_by="01_index")'
    write_notebook(
        books / "05_train.ipynb",
        HEAD + "seed: int = None",
        use + "p = suite.parameters(profile, run, seed=seed)" + needs,
        SEEDED,
    )
    return project


def texts(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def test_whole_suite_from_the_command_line(project, capsys):
    assert suite.main(["run", "--profile", "small", "--run", "one", "-p", "steps=7"]) == 0
    run_dir = project / "runs" / "one"
    assert (run_dir / "steps.txt").read_text() == "7 0.0015"
    assert "tiny 7 0.0015" in texts(run_dir / "notebooks" / "A1_second.ipynb")
    assert "(the profile says 3)" in texts(run_dir / "notebooks" / "00_first.ipynb")
    shown = capsys.readouterr().out
    assert "before 0.5   after 0.0015" in shown and f"Open {Path('runs/one/notebooks')}" in shown

    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["profile"] == "small" and manifest["parameters"] == {"steps": 7}
    assert manifest["searchr1_lib"] == searchr1_lib.__version__ and manifest["packages"]["papermill"]
    assert manifest["data"] == {"data/facts.txt": hashlib.sha256(b"a fact").hexdigest()}
    assert not list(run_dir.rglob("*.part"))

    # what stands there is safe
    before = (run_dir / "manifest.json").read_bytes()
    assert suite.main(["run", "--profile", "small", "--run", "one"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert suite.main(["run", "--profile", "small", "--run", "one", "--only", "A1"]) == 2
    assert "holds A1_second already" in capsys.readouterr().err
    assert (run_dir / "manifest.json").read_bytes() == before


def test_failing_notebook_stops_the_suite_and_can_be_run_again(project, capsys):
    first, second = project / "notebooks" / "00_first.ipynb", project / "notebooks" / "A1_second.ipynb"
    healthy = first.read_text()
    write_notebook(first, HEAD + "steps: int = None\nlr: float = None", "1 + 1", 'raise KeyError("no such town")')
    assert suite.main(["run", "--profile", "small", "--run", "one"]) == 1
    error = capsys.readouterr().err
    copy = Path("runs/one/notebooks/00_first.unfinished.ipynb")
    assert "00_first, cell" in error and str(copy) in error and "KeyError: 'no such town'" in error
    number = int(re.search(r"cell In \[(\d+)\]", error)[1])
    cells = nbformat.read(project / copy, as_version=4).cells
    assert "no such town" in next(c.source for c in cells if c.get("execution_count") == number)
    assert not (project / "runs/one/notebooks" / second.name).exists()

    write_notebook(first, HEAD + "steps: int = None\nlr: float = None", "import os\nos.kill(os.getpid(), 9)")
    run_dir, outcomes = suite.run_suite("small", "one", only=["00"])  # what failed needs no --overwrite
    assert "the kernel died" in outcomes[0].error

    first.write_text(healthy)
    run_dir, outcomes = suite.run_suite("small", "one", only=["00"])
    assert [(o.notebook, o.error) for o in outcomes] == [("00_first", None)]
    assert (project / run_dir / "steps.txt").exists()
    assert [p.name for p in (project / run_dir / "notebooks").iterdir()] == ["00_first.ipynb"]


def test_overwrite_starts_afresh_but_deletes_nothing_foreign(project, monkeypatch):
    monkeypatch.setattr(suite, "_execute", lambda path, run_dir, values: suite.Outcome(path.stem, 0.0))
    left = project / "runs" / "one" / "left.txt"
    suite.run_suite("small", "one")
    left.write_text("old")
    suite.run_suite("small", "one", overwrite=True)
    assert not left.exists() and (left.parent / "manifest.json").exists()

    (left.parent / "manifest.json").unlink()
    left.write_text("mine")
    with pytest.raises(FileExistsError, match="no run's folder"):
        suite.run_suite("small", "one", overwrite=True)
    assert left.read_text() == "mine"


def test_seeds_are_run_once_and_measured(seeded, capsys):
    measured = seeded / "docs" / "measurements.md"
    measured.parent.mkdir()
    measured.write_text("# Measurements\n\nBy hand.\n")
    complete = seeded / "runs" / "small-seed-8"  # as an earlier call left it: must not be run again
    suite.open_run(complete, "small", {})
    suite.record(complete, "05_train", {"EM": {"before": 0.5, "after": 0.8}, "minutes": 2.0, "kept": True})
    (complete / "notebooks").mkdir()
    for name in ("01_index.ipynb", "05_train.ipynb"):
        (complete / "notebooks" / name).touch()
    assert suite.main(["seeds", "--profile", "small", "--seeds", "8", "9"]) == 1
    error = capsys.readouterr().err
    assert "seed 9: 05_train, cell" in error and "diverged" in error and measured.read_text()[-9:] == "By hand.\n"

    train = seeded / "notebooks" / "05_train.ipynb"
    train.write_text(train.read_text().replace("p.seed == 9", "p.seed == 10"))
    (seeded / "runs" / "small-seed-9" / "index.txt").write_text("kept")
    assert suite.main(["seeds", "--profile", "small", "--seeds", "8", "9"]) == 0
    assert not (complete / "notebooks" / "05_train.ipynb").read_text()
    assert (seeded / "runs" / "small-seed-9" / "index.txt").read_text() == "kept"  # 01 was complete too
    text = measured.read_text()
    assert text.startswith("# Measurements\n\nBy hand.\n\n<!-- begin: seeds small -->\n## 2 seeds")
    assert "| EM, after | 0.8 | 0.9 | 0.85 | 0.8 to 0.9 |" in text and "| mean | range |" in text and "kept" not in text
    assert "`python -m searchr1_lib.suite seeds --profile small --seeds 8 9`" in text

    measured.write_text(text + "\nBelow.\n")
    assert suite.main(["seeds", "--profile", "small", "--seeds", "9"]) == 0
    text = measured.read_text()
    assert text.count("begin: seeds small") == 1 and "By hand." in text and text.endswith("-->\n\nBelow.\n")
    assert "| EM, after | 0.9 | 0.9 | – |" in text and "seed 8" not in text


def test_seeds_refuse_before_running(seeded, capsys):
    assert suite.main(["seeds", "--profile", "huge"]) == 2
    assert "profile = 'huge' is unknown" in capsys.readouterr().err
    assert not (seeded / "runs").exists() and not (seeded / "docs").exists()
    folder = seeded / "runs" / "small-seed-0" / "notebooks"
    folder.mkdir(parents=True)
    for name in ("01_index.ipynb", "05_train.ipynb"):
        (folder / name).touch()
    (folder.parent / "manifest.json").write_text('{"searchr1_lib": "7.0.0"}')
    assert suite.main(["seeds", "--profile", "small", "--seeds", "0"]) == 2
    assert "made by searchr1_lib 7.0.0" in capsys.readouterr().err


EXPERIMENT = """about: what the rate does
profile: small
notebooks: ["00", "A1"]
parameters: {steps: 5}
grid:
  lr: [0.1, 0.2]
  name: [a/b]
seeds: [0, 3]
"""


@pytest.fixture
def swept(project, monkeypatch):
    """The repository with the library in it, as its runs are processes of their own; one setting fails at one seed."""
    shutil.copytree(ROOT / "searchr1_lib", project / "searchr1_lib", ignore=shutil.ignore_patterns("__pycache__"))
    head = "from searchr1_lib import suite\n"
    write_notebook(
        project / "notebooks" / "00_first.ipynb",
        HEAD + "steps: int = None\nlr: float = None\nseed: int = 0",
        head + "p = suite.parameters(profile, run, steps=steps, lr=lr, seed=seed)",
        'if (p.lr, p.seed) == (0.2, 3):\n    raise RuntimeError("diverged\\nhere")',
        'suite.record(p.run_dir, "00_first", {"rate": p.lr * p.steps, "seed": p.seed})',
    )
    write_notebook(
        project / "notebooks" / "A1_second.ipynb",
        HEAD + "name: str = None",
        head + 'p = suite.parameters(profile, run, name=name)\n(p.run_dir / "name.txt").write_text(p.name)',
    )
    (project / "rate.yaml").write_text(EXPERIMENT)
    monkeypatch.setenv("PYTHONPATH", str(project))
    return project


def test_a_sweep_runs_all_keeps_failures_and_runs_only_these_again(swept, capsys):
    sweep = ["sweep", "rate.yaml", "--seeds", "3", "--jobs", "2"]
    assert suite.main(sweep) == 1
    shown = capsys.readouterr()
    runs = swept / "runs" / "rate-small"
    assert sorted(p.name for p in runs.iterdir()) == ["lr-0.1_name-a-b_seed-3", "lr-0.2_name-a-b_seed-3"]
    assert "2/2" in shown.out and "lr-0.2_name-a-b_seed-3  " in shown.out and "FAILED" in shown.out
    failed = "lr-0.2_name-a-b_seed-3: 00_first, cell In [4]: RuntimeError: diverged\n1 of 2 runs failed"
    assert failed in shown.err and suite.failure_of(runs / "lr-0.2_name-a-b_seed-3").endswith("diverged")
    good = runs / "lr-0.1_name-a-b_seed-3"
    assert json.loads((good / "summary.json").read_text()) == {"00_first": {"rate": 0.5, "seed": 3}}
    assert (good / "name.txt").read_text() == "a/b" and suite.failure_of(good) is None
    given = json.loads((good / "manifest.json").read_text())["parameters"]
    assert given == {"steps": 5, "lr": 0.1, "name": "a/b", "seed": 3}

    (good / "after.json").write_text('{"table": {"known": {"em": 0.5, "searches": 0.1, "reward": null}}}')
    (runs / "not a run").mkdir()
    rows = {row["run"]: row for row in suite.read_runs(sorted(runs.iterdir()))}
    assert list(rows) == ["lr-0.1_name-a-b_seed-3", "lr-0.2_name-a-b_seed-3"]
    row = rows["lr-0.1_name-a-b_seed-3"]
    assert row["settings"] == {"steps": 5, "lr": 0.1, "name": "a/b", "seed": 3} and row["error"] is None
    assert row["figures"] == {"rate": 0.5, "seed": 3, "exact match, known": 0.5, "searches, known": 0.1}
    assert "diverged" in rows["lr-0.2_name-a-b_seed-3"]["error"]

    first = swept / "notebooks" / "00_first.ipynb"
    first.write_text(first.read_text().replace("(0.2, 3)", "(0.3, 3)"))
    times = {p: p.stat().st_mtime_ns for p in good.rglob("*.ipynb")}
    assert suite.main(sweep) == 0
    shown = capsys.readouterr()
    assert shown.out.count("complete already") == 1 and not shown.err
    assert len(times) == 2 and all(p.stat().st_mtime_ns == before for p, before in times.items())
    assert not list(runs.rglob("*.unfinished.ipynb"))

    (swept / "rate.yaml").write_text(EXPERIMENT.replace("steps: 5", "steps: 6"))
    assert suite.main(sweep) == 2
    assert "was run with steps = 5, not 6: move it away" in capsys.readouterr().err


def test_results_of_a_whole_experiment_go_beside_its_file(swept, capsys):
    for run_dir, values in suite.read_experiment("rate.yaml").runs().items():  # as an earlier sweep left them
        suite.open_run(run_dir, "small", values)
        suite.record(run_dir, "00_first", {"rate": values["lr"]})
        (run_dir / "notebooks").mkdir()
        for name in ("00_first.ipynb", "A1_second.ipynb"):
            (run_dir / "notebooks" / name).touch()
    results = swept / "results" / "rate.jsonl"
    assert suite.main(["sweep", "rate.yaml", "--seeds", "0"]) == 0 and not results.exists()  # a part of it
    assert suite.main(["sweep", "rate.yaml"]) == 0 and "Results are in" in capsys.readouterr().out
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert rows == suite.read_runs(sorted((swept / "runs" / "rate-small").iterdir()))
    assert [row["figures"] for row in rows] == [{"rate": 0.1}] * 2 + [{"rate": 0.2}] * 2
    assert [row["settings"]["seed"] for row in rows] == [0, 3, 0, 3]


def test_a_run_that_cannot_even_start_is_reported(swept, capsys):
    (swept / "rate.yaml").write_text(EXPERIMENT.replace("[0.1, 0.2]", "[0.1]").replace("[0, 3]", "[0]"))
    (swept / "searchr1_lib" / "records.py").write_text("raise ImportError('no records')")
    assert suite.main(["sweep", "rate.yaml"]) == 1
    error = capsys.readouterr().err
    assert "exit code 1: " in error and "ImportError: no records (see runs" in error and "sweep.log" in error


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("grid:\n", "grid: [\n", r"rate.yaml, line 7: not YAML"),
        ("about: what the rate does", "abuot: x", r"line 1: unknown key 'abuot'; an experiment has about, profile"),
        ("seeds: [0, 3]\n", "", r"line 1: the key 'seeds' is missing: a list of whole numbers"),
        ("seeds: [0, 3]", "seeds: 3", r"line 8: seeds must be a list of whole numbers"),
        ("seeds: [0, 3]", "seeds:\n- 0\n- x", r"line 10: seeds: 'x': a seed is a whole number"),
        ('["00", "A1"]', "[00, A1]", r"line 3: notebooks: 0: a notebook's name begins so, in quotes"),
        ('["00", "A1"]', '["07"]', r"line 3: notebooks: 07: no such notebook; there are 00_first, A1_second"),
        ("  lr: [0.1, 0.2]", "  lr: 0.1", r"line 6: grid: lr must be a list of values, \[0.1\]"),
        ("  lr: [0.1, 0.2]", "  lr: [fast]", r"line 6: for 00_first: lr must be of type float, got 'fast'"),
        ("  lr: [0.1, 0.2]", "  rl: [0.1]", r"line 6: unknown parameter 'rl'; 00_first, A1_second know lr, name"),
        ("  lr: [0.1, 0.2]", "  lr: [0.1]\n  lr: [0.2]", r"line 7: 'lr' stands in line 6 already"),
        ("  lr: [0.1, 0.2]", "  lr: [0.1, 0.1]", r"two of its runs would share the folder"),
        ("  lr: [0.1, 0.2]", "  steps: [1]", r"line 6: 'steps' stands under 'parameters' too"),
        ("  lr: [0.1, 0.2]", "  seed: [1]", r"line 6: 'seed' is set by the sweep itself: use 'seeds'"),
        ("profile: small", "profile: huge", r"profile = 'huge' is unknown: choose auto or one of small"),
        ("grid:\n", "list: [{lr: 0.1}]\ngrid:\n", r"line 5: give either 'grid' or 'list'"),
        ("grid:\n  lr: [0.1, 0.2]\n  name: [a/b]", "list:\n- lr: 0.1\n- lr", r"line 7: list: a setting has lines"),
    ],
)
def test_bad_experiments_are_refused_with_their_line(swept, capsys, old, new, message):
    assert old in EXPERIMENT
    (swept / "rate.yaml").write_text(EXPERIMENT.replace(old, new))
    assert suite.main(["sweep", "rate.yaml"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (swept / "runs").exists()


def test_experiments_as_lists_and_with_other_seeds(swept):
    text = EXPERIMENT.replace("grid:\n  lr: [0.1, 0.2]\n  name: [a/b]", "list:\n- {lr: 1}\n- {name: b, lr: 0.2}")
    (swept / "rate.yaml").write_text(text)
    found = suite.read_experiment("rate.yaml", seeds=[7]).runs()
    folder = Path("runs/rate-small")
    assert found == {
        folder / "lr-1_seed-7": {"steps": 5, "lr": 1, "seed": 7},
        folder / "name-b_lr-0.2_seed-7": {"steps": 5, "name": "b", "lr": 0.2, "seed": 7},
    }
    for bad in ("none.yaml", "notebooks"):
        with pytest.raises(ValueError, match="cannot be read"):
            suite.read_experiment(bad)
    (swept / "rate.yaml").write_text("a: &x [*x]\n")
    with pytest.raises(ValueError, match="line 1: "):
        suite.read_experiment("rate.yaml")
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        suite.sweep(suite.Experiment("x", "", "small", [], {}, [{}], [0]), 0)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_experiments_that_ship_are_readable(path):
    found = suite.read_experiment(path)
    assert found.about and len(found.runs()) == len(found.settings) * len(found.seeds) >= 9


def test_half_a_section_is_left_alone(tmp_path):
    path = tmp_path / "m.md"
    path.write_text("<!-- begin: a -->\nmine\n")
    with pytest.raises(ValueError, match="only one of the marks of section 'a'"):
        suite.write_section(path, "a", "new")
    assert path.read_text() == "<!-- begin: a -->\nmine\n"
    suite.write_section(tmp_path / "new" / "m.md", "a", "one")
    assert "begin: a -->\none\n<!-- end: a -->" in (tmp_path / "new" / "m.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profile", "huge"], r"profile = 'huge' is unknown: choose auto or one of small"),
        (["-p", "stepz=3"], r"unknown parameter 'stepz'; .*00_first: profile, run, steps, lr\n.*A1_second: profile"),
        (["-p", "steps=many"], r"for 00_first.*steps must be of type int, got 'many'"),
        (["-p", "steps=2.5"], r"steps must be of type int, got 2.5"),
        (["-p", "steps"], r"name=value"),
        (["-p", "run=x"], r"--run x"),
        (["--only", "07"], r"--only 07: no such notebook; there are 00_first, A1_second"),
        (["--run", "../else"], r"plain folder name"),
        (["--only", "A1", "-p", "steps=3"], r"unknown parameter 'steps'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(project, capsys, arguments, message):
    assert suite.main(["run", "--profile", "small", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.S), error
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: 3\nlr: 1.5e-3\nname: tiny\nstepz: 4\n", r"small.yaml: unknown parameter 'stepz'"),
        ("steps: 3\nlr: 1.5e-3\n", r"small.yaml: A1_second leaves 'name' to the profile"),
        ("steps: 3\nlr: 1e-3\nname: tiny\n", r"small.yaml, lr: .*with a point"),
        ("steps: true\nlr: 1.5e-3\nname: tiny\n", r"steps must be of type int, got True"),
        ("- steps\n", r"small.yaml must hold lines"),
        ("steps: [1\n", r"small.yaml is not YAML"),
    ],
)
def test_bad_profile(project, text, message):
    (project / "notebooks" / "profiles" / "small.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        suite.run_suite("small")
    assert not (project / "runs").exists()


def test_parameters_by_hand(project, capsys):
    p = suite.parameters("small", "", steps=5, lr=None)
    assert (p.profile, p.run_dir, p.steps, p.lr) == ("small", Path("runs/small"), 5, 0.0015)
    assert (p.run_dir / "manifest.json").exists()
    assert "profile small (chosen here)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="steps must be of type int, got 'x'"):
        suite.parameters("small", steps="x")
    with pytest.raises(ValueError, match="'beams' has no value.*small.yaml"):
        suite.parameters("small", beams=None)
    assert suite.parameters("small", question="Who?").question == "Who?"


def test_auto_profile_says_which_and_why(monkeypatch):
    monkeypatch.setenv("SEARCHR1_PROFILE", "smoke")
    assert suite.resolve_profile("auto") == ("smoke", "chosen by SEARCHR1_PROFILE")
    assert suite.resolve_profile("cpu") == ("cpu", "chosen here")
    monkeypatch.delenv("SEARCHR1_PROFILE")
    torch = pytest.importorskip("torch")
    name, why = suite.resolve_profile("auto")
    assert name in (("gpu", "t4") if torch.cuda.is_available() else ("cpu",)) and "found" in why


def test_plain_papermill_is_held_to_the_names_too(project):
    import papermill

    source, out = str(project / "notebooks" / "00_first.ipynb"), str(project / "out.ipynb")

    def run(given):
        papermill.execute_notebook(source, out, given, kernel_name="python3", progress_bar=False)

    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'stepz'"):
        run({"profile": "small", "stepz": 3})
    run({"profile": "small", "steps": 3, "lr": 0.1, "name": "tiny"})  # a whole profile file may be passed
    assert "(the profile says 0.0015)" in texts(Path(out))


def test_folder_of_another_version_or_profile(project):
    suite.parameters("small", "one", steps=None)
    path = project / "runs" / "one" / "manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in (
        ({"searchr1_lib": "7.0.0"}, r"made by searchr1_lib 7.0.0, this is"),
        ({"profile": "gpu"}, r"made under the profile 'gpu', not 'small'"),
    ):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            suite.parameters("small", "one", steps=None)
    path.write_text('{"searchr1_lib": ')
    with pytest.raises(ValueError, match="manifest.json is broken"):
        suite.parameters("small", "one", steps=None)


def test_require_names_the_notebook_to_run(tmp_path):
    (tmp_path / "full").write_text("x")
    (tmp_path / "empty").write_text("")
    assert suite.require(tmp_path, "full", made_by="05_train") == [tmp_path / "full"]
    for name in ("empty", "absent"):
        with pytest.raises(FileNotFoundError, match=f"{name} is missing or empty: run notebooks/05_train.ipynb"):
            suite.require(tmp_path, "full", name, made_by="05_train")


@pytest.fixture
def in_colab(project, monkeypatch):
    """The same repository with the package itself, in Google Colab."""
    shutil.copytree(ROOT / "searchr1_lib", project / "searchr1_lib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setitem(sys.modules, "google.colab", None)
    return project


def test_in_colab_require_runs_the_notebooks_before_with_this_runs_parameters(in_colab, capsys):
    project = in_colab
    use = USE.format(root=str(project)) + "p = suite.parameters(profile, run, steps=steps)\n"
    write_notebook(
        project / "notebooks" / "02_double.ipynb",
        HEAD + "steps: int = None",
        use + 'path, = suite.require(p.run_dir, "steps.txt", made_by="00_first")',
        '(p.run_dir / "doubled.txt").write_text(2 * path.read_text())',
    )
    p = suite.parameters("small", "one", steps=7, greeting="hello")
    (path,) = suite.require(p.run_dir, "doubled.txt", made_by="02_double")
    assert path.read_text() == "7 0.00157 0.0015"  # 00 and 02 took the steps, nobody the greeting
    shown = capsys.readouterr().out
    assert "doubled.txt is missing, and this is Colab" in shown and "running 02_double first" in shown
    assert "in all" in shown  # what the run printed
    assert "running 00_first first" in texts(p.run_dir / "notebooks" / "02_double.ipynb")


def test_in_colab_what_a_notebook_itself_promised_is_not_run_again_and_again(in_colab, capsys):
    path = in_colab / "notebooks" / "02_lazy.ipynb"
    write_notebook(
        path,
        HEAD,
        USE.format(root=str(in_colab)) + "p = suite.parameters(profile, run)",
        'suite.require(p.run_dir, "never.txt", made_by="02_lazy")',
    )
    p = suite.parameters("small", "one")
    with pytest.raises(FileNotFoundError, match="never.txt is missing or empty: run notebooks/02_lazy.ipynb"):
        suite.require(p.run_dir, "never.txt", made_by="02_lazy")
    assert "02_lazy  " in capsys.readouterr().out


def test_in_colab_a_training_of_hours_is_not_begun_by_itself(in_colab):
    p = suite.parameters("small", "one")
    with pytest.raises(FileNotFoundError, match='05_train, which takes hours under the profile small.*profile = "cpu"'):
        suite.require(p.run_dir, "after.jsonl", made_by="05_train")


@pytest.mark.parametrize("source", ["import os", "steps = 2 * 3", "steps", "a = b = 1\nc = f()", "steps ="])
def test_parameters_cell_holds_only_literals(tmp_path, source):
    write_notebook(tmp_path / "00_x.ipynb", source)
    with pytest.raises(ValueError, match="00_x.ipynb: the parameters cell may hold only"):
        suite.parameters_of(tmp_path / "00_x.ipynb")


def test_broken_notebook(tmp_path):
    (tmp_path / "00_x.ipynb").write_text("{")
    with pytest.raises(ValueError, match="00_x.ipynb is not a readable notebook"):
        suite.parameters_of(tmp_path / "00_x.ipynb")
