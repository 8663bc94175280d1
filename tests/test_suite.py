"""The suite on throw-away notebooks, run by papermill in real kernels."""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import searchr1_lib
from searchr1_lib import rewards, suite
from searchr1_lib.suite import cli, runs
from searchr1_lib.training.settings import Settings

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
    (books / "profiles" / "small.yaml").write_text("steps: 3\nlearning_rate: 1.5e-3\nmodel: tiny\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "facts.txt").write_text("a fact")
    use = USE.format(root=str(tmp_path))
    write_notebook(
        books / "00_first.ipynb",
        HEAD + "steps: int = None  # how many (a = b)\nlearning_rate: float = None  # rate",
        use + "p = suite.parameters(profile, run, steps=steps, learning_rate=learning_rate)",
        '(p.run_dir / "steps.txt").write_text(f"{p.steps} {p.learning_rate}")',
        'suite.record(p.run_dir, "00_first", {"steps": p.steps, "rate": {"before": 0.5, "after": p.learning_rate}})',
    )
    write_notebook(
        books / "A1_second.ipynb",
        HEAD + "model: str = None",
        use + "p = suite.parameters(profile, run, model=model)",
        'path, = suite.require(p.run_dir, "steps.txt", made_by="00_first")\nprint(p.model, path.read_text())',
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
    write_notebook(
        first, HEAD + "steps: int = None\nlearning_rate: float = None", "1 + 1", 'raise KeyError("no such town")'
    )
    assert suite.main(["run", "--profile", "small", "--run", "one"]) == 1
    error = capsys.readouterr().err
    copy = Path("runs/one/notebooks/00_first.unfinished.ipynb")
    assert "00_first, cell" in error and str(copy) in error and "KeyError: 'no such town'" in error
    number = int(re.search(r"cell In \[(\d+)\]", error)[1])
    cells = nbformat.read(project / copy, as_version=4).cells
    assert "no such town" in next(c.source for c in cells if c.get("execution_count") == number)
    assert not (project / "runs/one/notebooks" / second.name).exists()

    write_notebook(first, HEAD + "steps: int = None\nlearning_rate: float = None", "import os\nos.kill(os.getpid(), 9)")
    run_dir, outcomes = suite.run_suite("small", "one", only=["00"])  # what failed needs no --overwrite
    assert "the kernel died" in outcomes[0].error

    first.write_text(healthy)
    run_dir, outcomes = suite.run_suite("small", "one", only=["00"])
    assert [(o.notebook, o.error) for o in outcomes] == [("00_first", None)]
    assert (project / run_dir / "steps.txt").exists()
    assert [p.name for p in (project / run_dir / "notebooks").iterdir()] == ["00_first.ipynb"]


def test_overwrite_starts_afresh_but_deletes_nothing_foreign(project, monkeypatch):
    monkeypatch.setattr(runs, "_execute", lambda path, run_dir, values: suite.Outcome(path.stem, 0.0))
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


@pytest.fixture
def pretended(project, monkeypatch):
    """The same repository, in which no kernel starts: what a notebook would have been given, by its name."""
    given = {}

    def execute(path, run_dir, values):
        given[path.stem] = values
        (run_dir / "notebooks").mkdir(exist_ok=True)
        (run_dir / "notebooks" / path.name).write_text("{}")
        return suite.Outcome(path.stem, 0.0)

    monkeypatch.setattr(runs, "_execute", execute)
    return given


def other_value(change, project):
    """Change a part of what made the run ``one``, other than its explicit parameters."""
    if change == "the profile":
        profile = project / "notebooks" / "profiles" / "small.yaml"
        profile.write_text(profile.read_text().replace("1.5e-3", "2.5e-3"))
    elif change == "data":
        (project / "data" / "facts.txt").write_text("another fact")
    elif change == "other data":
        (project / "mine" / "train.jsonl").write_text("other")
    else:
        path = project / "runs" / "one" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["packages"]["torch"] = "1.0"
        path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, said",
    [
        ("steps=8", "steps = 7, not 8"),
        ("search_cost=0.9", "search_cost = 0.3, not 0.9"),  # that was not given before
        ("seed=1", "seed = 0, not 1"),
        ("reward=F1", "reward = 'Discounted', not 'F1'"),
        ("data=elsewhere", "data = 'mine', not 'elsewhere'"),
        ("topk=5", "topk = 3, not 5"),
        ("the profile", "learning_rate = 0.0015, not 0.0025"),
        ("data", "data/facts.txt = '"),
        ("other data", "mine/train.jsonl = '"),
        ("a package", "torch = '1.0', not '2."),
    ],
)
def test_no_run_is_gone_on_with_as_another(project, pretended, capsys, change, said):
    (project / "mine").mkdir()
    (project / "mine" / "train.jsonl").write_text("mine")
    begun = ["run", "--profile", "small", "--run", "one", "-p", "steps=7", "-p", "data=mine"]
    assert suite.main(begun) == 0 and suite.main([*begun, "--only", "A1", "--overwrite"]) == 0
    left = project / "runs" / "one" / "notebooks" / "A1_second.ipynb"
    left.write_text("of the run as it began")
    given = ["-p", change] if "=" in change else other_value(change, project) or []
    for more in ([], ["--overwrite"]):
        assert suite.main(["run", "--profile", "small", "--run", "one", "--only", "A1", *more, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {Path('runs/one')} was run with {said}" in error and error.endswith("choose another run"), error
    assert left.read_text() == "of the run as it began"
    cell = {n: runs.read_given([change])[n] for n in [change.split("=")[0]]} if "=" in change else {}
    with pytest.raises(ValueError, match="was run with"):
        suite.parameters("small", "one", **cell)  # by hand, or by plain papermill
    assert suite.main([*begun, *given, "--overwrite"]) == 0  # started anew, as a whole


def test_a_run_goes_on_with_its_own_parameters(project, pretended, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_git_commit", lambda: "a1")
    begun = ["run", "--profile", "small", "--run", "one"]
    assert suite.main([*begun, "-p", "steps=7", "--only", "00"]) == 0
    monkeypatch.setattr(runs, "_git_commit", lambda: "b2-dirty")
    assert suite.main([*begun, "--only", "A1"]) == 0 and pretended["A1_second"]["steps"] == 7
    assert suite.main([*begun, "--only", "A1", "--overwrite", "-p", "steps=7", "-p", "query=Who?"]) == 0
    p = suite.parameters("small", "one")
    assert p.steps == 7 and "(the profile says 3)" in capsys.readouterr().out
    assert suite.parameters("small", "one", steps=7, query="Where?").query == "Where?"  # only shown to a reader
    manifest = json.loads((project / "runs" / "one" / "manifest.json").read_text())
    assert manifest["parameters"] == {"steps": 7} and manifest["git_commit"] == "a1, b2-dirty"
    assert (manifest["values"]["steps"], manifest["values"]["learning_rate"]) == (7, 0.0015)


def test_running_a_notebook_again_takes_nothing_old_for_new(project, monkeypatch):
    use = USE.format(root=str(project)) + "p = suite.parameters(profile, run)"
    promise = (
        'suite.require(p.run_dir, "train/log.txt", *(["out.txt"] if 1 else []), made_by="02_train")\nprint("a", "b")'
    )
    write_notebook(project / "notebooks" / "02_train.ipynb", HEAD, use, promise)
    found, fails = [], []

    def execute(path, run_dir, values):
        train, copy = run_dir / "train" / "log.txt", run_dir / "notebooks" / path.name
        found.append((train.exists(), (run_dir / "out.txt").exists(), copy.exists(), suite.results_table(run_dir)))
        for file in (train, copy, run_dir / "out.txt", run_dir / "foreign.txt"):
            file.parent.mkdir(exist_ok=True)
            file.write_text("x")
        if fails:
            copy.unlink()
        suite.record(run_dir, path.stem, {"figure": 1})
        return suite.Outcome(path.stem, 0.0, *fails)

    monkeypatch.setattr(runs, "_execute", execute)
    again = {"only": ["02"], "overwrite": True}
    run_dir, _ = suite.run_suite("small", "one", only=["02"])
    suite.record(project / run_dir, "00_first", {"other": 2})
    suite.run_suite("small", "one", **again)
    assert found.pop() == (False, False, False, "00_first  other  2") and (project / run_dir / "foreign.txt").exists()
    fails.append("interrupted")
    suite.run_suite("small", "one", **again)
    suite.run_suite("small", "one", **again)
    assert found.pop()[:3] == (True, True, False)  # what was interrupted goes on


def test_the_notebooks_say_what_they_leave():
    left = {path.stem[:2]: runs.promised(path) for path in suite.notebooks()}
    assert {"index"} <= left["01"] and {"train", "after.json", "adapter", "merged", "collapse"} <= left["05"]
    assert all(left.values()) and not any("/" in name or " " in name for names in left.values() for name in names)


@pytest.mark.parametrize("arguments", [["run", "--only", "05"], ["sweep", "a b.yaml"], ["prepare", "nq", "--out", "x"]])
def test_ctrl_c_ends_any_command_in_the_line_that_goes_on(project, monkeypatch, capsys, arguments):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("searchr1 run --only 05")

    monkeypatch.setattr("searchr1_lib.suite.runs.run_suite", interrupted)
    for name in ("suite.sweep.read_experiment", "worlds.prepare.check_out"):
        monkeypatch.setattr(f"searchr1_lib.{name}", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setenv("SEARCHR1_PROFILE", "small")
    for _ in range(2):
        assert suite.main(arguments) == 130
        assert capsys.readouterr().err == f"interrupted: go on with: {shlex.join(['searchr1', *arguments])}\n"
        monkeypatch.setattr(cli, "import_module", lambda _: signal.raise_signal(signal.SIGINT))  # it takes seconds, too


EXPERIMENT = """about: what the rate does
profile: small
notebooks: ["00", "A1"]
parameters: {steps: 5}
grid:
  learning_rate: [0.1, 0.2]
  model: [a/b]
seeds: [0, 3]
"""


@pytest.fixture
def swept(project, monkeypatch):
    """The repository with the library in it, as its runs are processes of their own; one setting fails at one seed."""
    shutil.copytree(ROOT / "searchr1_lib", project / "searchr1_lib", ignore=shutil.ignore_patterns("__pycache__"))
    head = "from searchr1_lib import suite\n"
    write_notebook(
        project / "notebooks" / "00_first.ipynb",
        HEAD + "steps: int = None\nlearning_rate: float = None\nseed: int = 0",
        head + "p = suite.parameters(profile, run, steps=steps, learning_rate=learning_rate, seed=seed)",
        'if (p.learning_rate, p.seed) == (0.2, 3):\n    raise RuntimeError("diverged\\nhere")',
        'suite.record(p.run_dir, "00_first", {"rate": p.learning_rate * p.steps, "seed": p.seed})',
    )
    write_notebook(
        project / "notebooks" / "A1_second.ipynb",
        HEAD + "model: str = None",
        head + 'p = suite.parameters(profile, run, model=model)\n(p.run_dir / "name.txt").write_text(p.model)',
    )
    (project / "rate.yaml").write_text(EXPERIMENT)
    monkeypatch.setenv("PYTHONPATH", str(project))
    return project


def test_a_sweep_runs_all_keeps_failures_and_runs_only_these_again(swept, capsys):
    sweep = ["sweep", "rate.yaml", "--seeds", "3", "--jobs", "2"]
    assert suite.main(sweep) == 1
    shown = capsys.readouterr()
    folder = swept / "runs" / "rate-small"
    assert sorted(p.name for p in folder.iterdir()) == [
        "learning_rate-0.1_model-a-b_seed-3",
        "learning_rate-0.2_model-a-b_seed-3",
    ]
    assert "2/2" in shown.out and "learning_rate-0.2_model-a-b_seed-3  " in shown.out and "FAILED" in shown.out
    failed = "learning_rate-0.2_model-a-b_seed-3: 00_first, cell In [4]: RuntimeError: diverged\n1 of 2 runs failed"
    assert failed in shown.err and suite.failure_of(folder / "learning_rate-0.2_model-a-b_seed-3").endswith("diverged")
    good = folder / "learning_rate-0.1_model-a-b_seed-3"
    assert json.loads((good / "summary.json").read_text()) == {"00_first": {"rate": 0.5, "seed": 3}}
    assert (good / "name.txt").read_text() == "a/b" and suite.failure_of(good) is None
    given = json.loads((good / "manifest.json").read_text())["parameters"]
    assert given == {"steps": 5, "learning_rate": 0.1, "model": "a/b", "seed": 3}

    (good / "after.json").write_text('{"table": {"known": {"em": 0.5, "searches": 0.1, "reward": null}}}')
    (folder / "not a run").mkdir()
    rows = {row["run"]: row for row in suite.read_runs(sorted(folder.iterdir()))}
    assert list(rows) == ["learning_rate-0.1_model-a-b_seed-3", "learning_rate-0.2_model-a-b_seed-3"]
    row = rows["learning_rate-0.1_model-a-b_seed-3"]
    assert {k: row["settings"][k] for k in given} == given and row["error"] is None
    assert row["settings"]["scale_rewards"] == "group" and "run" not in row["settings"]
    assert row["figures"] == {"rate": 0.5, "seed": 3, "exact match, known": 0.5, "searches, known": 0.1}
    assert "diverged" in rows["learning_rate-0.2_model-a-b_seed-3"]["error"]

    first = swept / "notebooks" / "00_first.ipynb"
    first.write_text(first.read_text().replace("(0.2, 3)", "(0.3, 3)"))
    times = {p: p.stat().st_mtime_ns for p in good.rglob("*.ipynb")}
    assert suite.main(sweep) == 0
    shown = capsys.readouterr()
    assert shown.out.count("complete already") == 1 and not shown.err
    assert len(times) == 2 and all(p.stat().st_mtime_ns == before for p, before in times.items())
    assert not list(folder.rglob("*.unfinished.ipynb"))

    (swept / "rate.yaml").write_text(EXPERIMENT.replace("steps: 5", "steps: 6"))
    assert suite.main(sweep) == 2
    assert "was run with steps = 5, not 6: move it away" in capsys.readouterr().err


def test_results_of_a_whole_experiment_go_beside_its_file(swept, capsys):
    for run_dir, values in suite.read_experiment("rate.yaml").runs().items():  # as an earlier sweep left them
        suite.open_run(run_dir, "small", values)
        suite.record(run_dir, "00_first", {"rate": values["learning_rate"]})
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


def test_runs_are_read_with_the_parameters_that_they_had(swept):
    values = {"steps": 5, "learning_rate": 0.1, "model": "a/b", "seed": 0}
    run_dir = next(iter(suite.read_experiment("rate.yaml").runs()))
    suite.open_run(run_dir, "small", values)
    (swept / "notebooks" / "profiles" / "small.yaml").write_text("steps: 3\ntopk: 7\n")
    (row,), where = suite.experiment_runs("rate.yaml")
    assert (row["settings"]["topk"], row["settings"]["steps"]) == (3, 5) and where.startswith("1 of 4 runs")
    shipped = swept / "results" / "rate.jsonl"
    shipped.parent.mkdir()
    shipped.write_text(json.dumps(row) + "\n")
    (swept / "rate.yaml").write_text(EXPERIMENT.replace("steps: 5", "steps: 6"))
    assert suite.experiment_runs("rate.yaml") == ([], "not run yet: searchr1 sweep rate.yaml")
    (swept / "rate.yaml").write_text(EXPERIMENT)
    shutil.rmtree(swept / "runs")
    assert suite.experiment_runs("rate.yaml")[0] == [row]


def test_a_run_that_was_killed_is_read_all_the_same(swept):
    run_dir = next(iter(suite.read_experiment("rate.yaml").runs()))
    suite.open_run(run_dir, "small", {"steps": 5, "learning_rate": 0.1, "model": "a/b", "seed": 0})
    (run_dir / "notebooks").mkdir()
    (run_dir / "notebooks" / "00_first.unfinished.ipynb").write_text('{"cells": [{"cell_ty')
    (run_dir / "train").mkdir()
    (run_dir / "train" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    (row,), _ = suite.experiment_runs("rate.yaml")
    assert row["error"].startswith("00_first, the kernel died") and row["curve"] == [{"step": 1, "reward": 0.5}]


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
        ("about: what the rate does", "abuot: x", r"line 1: unknown name 'abuot'; did you mean about"),
        (
            "about: what the rate does",
            "zzz: x",
            r"line 1: unknown name 'zzz'; known: about, profile, .*grid, list, seeds",
        ),
        ("seeds: [0, 3]\n", "", r"line 1: seeds is missing"),
        ("seeds: [0, 3]", "seeds: 3", r"line 8: seeds must be a valid list, got 3"),
        ("seeds: [0, 3]", "seeds: []", r"line 8: seeds .*at least 1 item"),
        ("seeds: [0, 3]", "seeds:\n- 0\n- x", r"line 10: seeds.1 must be a valid integer, got 'x'"),
        ('["00", "A1"]', "[00, A1]", r"line 3: notebooks.0 must be a valid string, got 0: in quotes"),
        ('["00", "A1"]', '["07"]', r"line 3: notebooks: 07: no such notebook; there are 00_first, A1_second"),
        (
            "  learning_rate: [0.1, 0.2]",
            "  learning_rate: 0.1",
            r"line 6: grid.learning_rate must be a valid list, got 0.1",
        ),
        (
            "  learning_rate: [0.1, 0.2]",
            "  learning_rate: [fast]",
            r"line 6: learning_rate must be a valid number, got 'fast'",
        ),
        ("  learning_rate: [0.1, 0.2]", "  learning_rate: [2]", r"line 6: learning_rate must be less than 1, got 2"),
        ("  learning_rate: [0.1, 0.2]", "  reward: [{OTC: {d: 3}}]", r"line 6: reward: OTC: .*unexpected .*'d'"),
        (
            "  learning_rate: [0.1, 0.2]",
            "  baseline: [value]",
            r"line 6: scale_rewards='group' does not go with baseline",
        ),
        (
            "  learning_rate: [0.1, 0.2]",
            "  learning_rat: [0.1]",
            r"line 6: unknown name 'learning_rat'; did you mean learning_rate",
        ),
        ("  learning_rate: [0.1, 0.2]", "  steps: [1]\n  steps: [2]", r"line 7: .*'steps' stands in line 6 already"),
        ("  learning_rate: [0.1, 0.2]", "  learning_rate: [0.1, 0.1]", r"two of its runs would share the folder"),
        ("  learning_rate: [0.1, 0.2]", "  steps: [1]", r"line 6: 'steps' stands under 'parameters' too"),
        ("  learning_rate: [0.1, 0.2]", "  seed: [1]", r"line 6: 'seed' is set by the sweep itself: use 'seeds'"),
        ("{steps: 5}", "{steps: 0}", r"line 4: steps must be greater than or equal to 1, got 0"),
        ("profile: small", "profile: huge", r"profile = 'huge' is unknown: choose auto or one of small"),
        ("grid:\n", "list: [{steps: 1}]\ngrid:\n", r"line 5: give either 'grid' or 'list'"),
        (
            "grid:\n  learning_rate: [0.1, 0.2]\n  model: [a/b]",
            "list:\n- topk: 1\n- topk",
            r"line 7: list.1 must be a valid dictionary, got 'topk'",
        ),
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
    grid, settings = (
        "grid:\n  learning_rate: [0.1, 0.2]\n  model: [a/b]",
        "list:\n- {search_cost: 1}\n- {model: b, beta: 2e-1}",
    )
    text = EXPERIMENT.replace(grid, settings)
    (swept / "rate.yaml").write_text(text)
    found = suite.read_experiment("rate.yaml", seeds=[7]).runs()
    folder = Path("runs/rate-small")
    assert found == {
        folder / "search_cost-1_seed-7": {"steps": 5, "search_cost": 1, "seed": 7},
        folder / "model-b_beta-0.2_seed-7": {"steps": 5, "model": "b", "beta": 0.2, "seed": 7},
    }
    for bad in ("none.yaml", "notebooks"):
        with pytest.raises(ValueError, match="cannot be read"):
            suite.read_experiment(bad)
    (swept / "rate.yaml").write_text("a: &x [*x]\n")
    with pytest.raises(ValueError, match="line 1: "):
        suite.read_experiment("rate.yaml")
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        suite.run_sweep(suite.Experiment("x", "", "small", [], {}, [{}], [0]), 0)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_experiments_that_ship_are_readable(path):
    found = suite.read_experiment(path)
    assert found.about and len(found.runs()) == len(found.settings) * len(found.seeds) >= 9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profile", "huge"], r"profile = 'huge' is unknown: choose auto or one of small"),
        (["-p", "stepz=3"], r"unknown name 'stepz'; did you mean steps\?"),
        (["-p", "zzz=3"], r"unknown name 'zzz'; known: .*learning_rate.*search_cost"),
        (["-p", "steps=many"], r"steps must be a valid integer, got 'many'"),
        (["-p", "steps=2.5"], r"steps must be a valid integer, got 2.5"),
        (["-p", "steps=true"], r"steps must be a valid integer, got True"),
        (["-p", "temperature=.nan"], r"temperature must be a finite number, got nan"),
        (["-p", "eval_questions=0"], r"eval_questions must be greater than or equal to 1, got 0"),
        (["-p", "search_cost=-1.5"], r"search_cost must be greater than or equal to 0, got -1.5"),
        (["-p", "baseline=value"], r"scale_rewards='group' does not go with baseline='value'"),
        (["-p", "reward=F2"], r"reward: 'F2' is unknown; there are .*ExactMatch"),
        (["-p", "reward={OTC: {c: x}}"], r"reward: OTC: c must be of type float, got 'x'"),
        (["-p", "reward={"], r"-p reward={: the value is not YAML"),
        (["-p", "steps"], r"name=value"),
        (["-p", "run=x"], r"--run x"),
        (["--only", "07"], r"--only 07: no such notebook; there are 00_first, A1_second"),
        (["--run", "../else"], r"plain folder name"),
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
        ("steps: 3\nstepz: 4\n", r"small.yaml: unknown name 'stepz'; did you mean steps"),
        ("steps: true\n", r"small.yaml: steps must be a valid integer, got True"),
        ("explore: 4\n", r"small.yaml: explore=4 must be less than half of num_generations=8"),
        ("- steps\n", r"small.yaml must hold lines"),
        ("steps: [1\n", r"small.yaml, line 2: not YAML"),
        ("steps: 1\nsteps: 2\n", r"small.yaml, line 2: .*'steps' stands in line 1 already"),
    ],
)
def test_bad_profile(project, text, message):
    (project / "notebooks" / "profiles" / "small.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        suite.run_suite("small")
    assert not (project / "runs").exists()


def test_parameters_by_hand(project, capsys):
    p = suite.parameters("small", "", steps=5, learning_rate=None)
    assert (p.profile, p.run_dir, p.steps, p.learning_rate) == ("small", Path("runs/small"), 5, 0.0015)
    assert (p.run_dir / "manifest.json").exists()
    shown = capsys.readouterr().out
    assert "profile small (chosen here)" in shown and "search_cost" not in shown and "profiles/small.yaml" in shown
    with pytest.raises(ValueError, match="steps must be a valid integer, got 'x'"):
        suite.parameters("small", steps="x")
    with pytest.raises(ValueError, match="unknown name 'beams'"):
        suite.parameters("small", beams=3)
    assert suite.parameters("small", query="Who?").query == "Who?"


def test_what_a_profile_gives_to_a_training(project):
    p = suite.load_profile("small", reward={"OTC": {"c": 3}}, topk=5, steps=30)
    assert isinstance(p.make_reward(), rewards.OTC) and p.limits()["topk"] == 5
    assert (p.settings().steps, p.settings().explore_steps, p.settings().decay_steps) == (30, 10, 20)
    settings = p.settings(steps=4, decay_steps=0)
    assert type(settings) is Settings and (settings.steps, settings.learning_rate, settings.topk) == (4, 0.0015, 5)
    with pytest.raises(ValueError, match="steps must be"):
        p.settings(steps=0)
    dear = suite.load_profile("small", search_cost=0.5).make_reward()
    assert isinstance(dear, rewards.Discounted) and (dear.price, dear.unknown) == (0.5, 0.1)
    taken_off = suite.load_profile("small", search_cost=0.5, reward="SearchR1Reward").make_reward()
    assert [part.cost for _, part in taken_off.parts if hasattr(part, "cost")] == [0.5]
    with pytest.raises(ValueError, match="Discounted: price must be less than or equal to 1, got 1.5"):
        suite.load_profile("small", search_cost=1.5)


def test_a_number_may_be_written_as_people_write_it(project):
    (project / "notebooks" / "profiles" / "small.yaml").write_text("learning_rate: 1e-3\nbeta: 1\n")
    p = suite.load_profile("small")
    assert (p.learning_rate, p.beta, p.search_timeout) == (0.001, 1.0, 60)
    given = ["learning_rate=2E-3", "model=1e3", "search_timeout=null", "reward=F1", "reward=[[1, F1]]", "query="]
    given = suite.read_given(given)
    p = suite.load_profile("small", **given)
    assert (p.learning_rate, p.model, p.search_timeout, p.reward, p.query) == (0.002, "1e3", None, [[1, "F1"]], "")


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

    with pytest.raises(papermill.PapermillExecutionError, match="unknown name 'stepz'"):
        run({"profile": "small", "stepz": 3})
    run({"profile": "small", "steps": 3, "learning_rate": 0.1, "model": "tiny"})  # a whole profile file may be passed
    assert "(the profile says 0.0015)" in texts(Path(out))
    assert "  model                    'tiny'" in texts(Path(out))  # which the parameters cell does not name


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
    p = suite.parameters("small", "one", steps=7, query="hello")
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


def test_broken_notebook(project, capsys):
    (project / "notebooks" / "00_first.ipynb").write_text("{")
    assert suite.main(["run", "--profile", "small"]) == 1
    assert "error: 00_first, " in (error := capsys.readouterr().err) and "00_first.ipynb cannot be run" in error


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_says_the_cell_and_the_time(project, monkeypatch):
    path = project / "notebooks" / "00_first.ipynb"
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with runs._bar(path) as bar:
            bar.n = 2
            bar.refresh()
        shown = stderr.getvalue()
        assert ("00_first: cell 2 of 5 " in shown and "00:00" in shown) if stderr.isatty() else not shown


# -- the command -----------------------------------------------------------------------------------------------------


def searchr1(*arguments, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "searchr1_lib", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **how)


def test_the_commands_are_listed_without_loading_any(capsys):
    with pytest.raises(SystemExit) as e:
        suite.main(["--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\b", shown, re.M) for name in cli.COMMANDS)
    code = "import sys; from searchr1_lib.suite import cli\ntry: cli.main(['-h'])\nexcept SystemExit: pass\n"
    code += "sys.exit(str({'pydantic', 'yaml', 'torch', 'numpy'} & set(sys.modules) or 0))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "0\n", done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_examples(name, capsys):
    with pytest.raises(SystemExit) as e:
        suite.main([name, "--help"])
    assert e.value.code == 0 and re.search(rf"examples:\n  searchr1 {name} ", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "--jobs"], ["sweep"], ["badges", "no-slash"]])
def test_a_broken_command_line_is_one_line_and_2(arguments):
    done = searchr1(*arguments)
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr), done.stderr


def test_ctrl_c_says_how_to_go_on(project):
    write_notebook(
        project / "notebooks" / "A1_second.ipynb", HEAD, "open('began', 'w').close()\nimport time; time.sleep(60)"
    )
    shutil.copytree(ROOT / "searchr1_lib", project / "searchr1_lib", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "searchr1_lib", "run", "--profile", "small", "--run", "one", "-p", "query=a b"]
    env = {**os.environ, "PYTHONPATH": str(project)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=project, env=env, start_new_session=True, **pipes) as process:
        while not (project / "began").exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all that runs in it
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "searchr1_lib/suite" not in error, error  # no traceback of ours
    assert "Traceback" not in error and "ERROR" not in error, error  # nor of the kernel's
    go_on = "searchr1 run --profile small --run one -p 'query=a b' --only A1"
    assert error.splitlines()[-1] == f"interrupted: go on with: {go_on}"
