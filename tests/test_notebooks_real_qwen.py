"""The notebooks as a GPU's profiles run them: a Qwen from the hub (here with random weights), real questions."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import nbformat
import pytest
import torch
from test_real_qwen import KINDS, write_model

from searchr1_lib import BM25Search, load_passages, suite
from searchr1_lib.records import Question, Trajectory
from searchr1_lib.study.evaluate import Report, row_of


def cell(notebook: str, id: str) -> str:
    (path,) = suite.notebooks([notebook])
    return next(c.source for c in nbformat.read(path, as_version=4).cells if c.id == id)


@pytest.mark.notebooks
def test_00_02_and_05_with_a_qwen_that_has_no_adapter(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SEARCHR1_RUNS", str(tmp_path))
    model = write_model(tmp_path / "qwen", KINDS["qwen2.5-instruct"])
    BM25Search(load_passages("data/real/mixed/passages.jsonl")).save(tmp_path / "real" / "index")  # as 01 does
    given = [
        f"model={model}",
        f"demo_model={model}",
        "demo_adapter=",
        "data=data/real/mixed",
        "demo_questions=4",
        "demo_steps=1",
        "demo_learning_rate=2e-4",
        "steps=1",
        "eval_questions=4",
        "collapse_steps=0",
        "max_turns=1",
        "max_turn_tokens=16",
    ]
    code = suite.main(
        [
            "run",
            "--profile",
            "smoke",
            "--run",
            "real",
            "--only",
            "00",
            "02",
            "05",
            *(word for text in given for word in ("-p", text)),
        ]
    )
    assert code == 0, capfd.readouterr().err
    for name in ("demo.jsonl", "rollouts.jsonl", "demo_train/metrics.jsonl", "after.json"):
        assert (tmp_path / "real" / name).stat().st_size
    settings = json.loads((tmp_path / "real" / "demo_train" / "settings.json").read_text())["settings"]
    assert (settings["learning_rate"], settings["pairs"]) == (2e-4, 1)
    cells = nbformat.read(tmp_path / "real" / "notebooks" / "00_search_r1_demo.ipynb", as_version=4).cells
    look, exams = (next(i for i, c in enumerate(cells) if c.id == id) for id in ("00-04b", "00-04c"))
    assert "Untrained, turn by turn" in str(cells[look].outputs[0]) and look < exams  # something to see, then training


@pytest.mark.parametrize("known", [None, False])
def test_the_table_of_00_where_there_are_not_two_kinds_of_question(known, capsys):
    t = Trajectory(Question("q", "Where?", ["here"], known=known), [], [], [], [], answer="here", reward=1.0)
    report = Report([row_of(t)], [t])
    space = {
        "evaluate": lambda *_, **__: report,
        "policy": SimpleNamespace(reference=nullcontext),
        "exam": [t.question],
        "engine": None,
        "rules": {},
        "reports": {"before": report, "after": report},
        "p": SimpleNamespace(data="data/real/mixed", demo_model="data/tiny_qwen", search_cost=0.3),
    }
    exec(cell("00", "00-09"), space)
    head, *rows = capsys.readouterr().out.splitlines()
    assert f"{'all' if known is None else 'look-up'}: right" in head and len(rows) == 4
    for id in ("00-15", "00-25"):
        exec(cell("00", id), {"test": [t.question]})
    assert "1 questions, e.g. Where?" in capsys.readouterr().out


@pytest.mark.parametrize("exact, passes", [(False, True), (True, False)])
def test_02_lets_one_token_be_off_in_16_bits(exact, passes):
    t = SimpleNamespace(mask=[1] * 10, logprobs=[-1.0] * 10)
    fresh = torch.full((10,), -1.0)
    fresh[3] -= 0.33
    space = {
        "torch": torch,
        "questions": [SimpleNamespace(known=True)],
        "question": None,
        "engine": None,
        "limits": {},
        "p": SimpleNamespace(seed=0, num_generations=1),
        "policy": SimpleNamespace(device="cpu"),
        "rollout": lambda *_, **__: [t],
        "fresh_logprobs": lambda t: fresh,
        "exact": exact,
        "tolerance": 1e-4 if exact else 0.1,
    }
    if passes:
        exec(cell("02", "02-36"), space)
    else:
        with pytest.raises(AssertionError, match="do not belong to this policy"):
            exec(cell("02", "02-36"), space)
