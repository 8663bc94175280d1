"""Notebook 09: its reading of trainings whose verdict is known, and the solutions of its exercises."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import nbformat
import pytest
import torch
from test_microscope import played, yardstick  # noqa: F401  (fixtures)

from searchr1_lib.files import write_json
from searchr1_lib.metrics import grouped
from searchr1_lib.study import microscope, plots
from searchr1_lib.study.analysis import judged, markdown_table
from searchr1_lib.study.compare import Comparison, trained
from searchr1_lib.training import credit
from searchr1_lib.training.settings import Settings

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "09_credit.ipynb"
CELLS = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, 4).cells}
PRICE = 0.3


def run(space: dict, *ids: str) -> None:
    for id in ids:
        exec(compile(CELLS[id], id, "exec"), space)


def comparison(speeds: dict[str, float], seeds=range(5), steps=50) -> Comparison:
    """Trainings whose regret falls by a share a step, the faster the higher the speed; seeds differ a little."""
    rows, courses = [], []
    for name, speed in speeds.items():
        for seed in seeds:
            regret = [0.1 + 0.3 * (1 - speed) ** step + 0.001 * (seed - 2) for step in range(steps)]
            each = {"rollouts": 128, "tokens": 9_000}
            courses.append(
                [{"step": i + 1, "regret": x} | {k: n * (i + 1) for k, n in each.items()} for i, x in enumerate(regret)]
            )
            rows.append(
                {"method": name, "price": PRICE, "seed": seed, "regret": regret[-1], "reward": 0.5, "best": 0.6}
            )
    return Comparison(rows, {PRICE: {"always searches": 0.3, "never": 0.4}}, courses)


def read(results: Comparison | None, correlations: dict[str, float]) -> tuple[dict[str, tuple], list]:
    """The verdicts of the notebook, by claim, and what it displayed."""
    shown: list = []
    said = [{"credit": name, "correlation": x} for name, x in correlations.items()]
    space = {"results": results, "said": said, "PRICE": PRICE, "Markdown": str, "display": shown.append}
    space |= {"markdown_table": markdown_table, "mean": lambda xs: sum(xs) / len(xs)}
    space["plots"] = SimpleNamespace(smooth=plots.smooth, methods=plots.methods, show_figure=shown.append)
    run(space, "c09-43", "c09-45", "c09-47", "c09-48", "c09-49")
    return {claim: rest for claim, *rest in space["verdicts"]}, shown


SPEEDS = {"outcome": 0.05, "return": 0.05, "gigpo": 0.15, "gigpo_shuffled": 0.06, "igpo": 0.02, "hierarchical": 0.1}


def test_claims_that_hold_and_claims_that_do_not():
    verdicts, shown = read(comparison(SPEEDS), {"gigpo": 0.5, "return": 0.4, "rollout": 0.3, "gigpo_shuffled": 0.1})
    word = lambda beginning: next(v[-1] for claim, v in verdicts.items() if claim.startswith(beginning))
    assert word("gigpo needs fewer rollouts") == word("hierarchical needs fewer") == "holds"
    assert word("return needs fewer rollouts") == "cannot tell" and word("igpo needs fewer") == "contradicted"
    assert word("gigpo regrets less on the way than its shuffled copy") == "holds"
    assert word("the truest, gigpo, regrets least") == "holds" and not any(c.startswith("gigpo_sh") for c in verdicts)
    figures = [x for x in shown if isinstance(x, matplotlib.figure.Figure)]
    assert len(figures) == 2 and all("gigpo ends lowest" in fig.alt for fig in figures)
    verdicts, _ = read(comparison(SPEEDS), {"return": 0.5, "gigpo": 0.4, "rollout": 0.3})
    assert next(v[-1] for c, v in verdicts.items() if c.startswith("the truest, return")) == "contradicted"
    verdicts, _ = read(comparison(dict.fromkeys(SPEEDS, 0.05)), {"gigpo": 0.5, "rollout": 0.3})
    assert {v[-1] for v in verdicts.values()} == {"cannot tell"}


def test_without_results_there_is_no_verdict(capsys):
    verdicts, shown = read(None, {"gigpo": 0.5, "rollout": 0.3})
    assert verdicts == {} and shown == [] and "no trainings, no verdicts" in capsys.readouterr().out


def test_replay_is_held_against_the_same_seeds_without(tmp_path):
    made = comparison({"outcome": 0.05, "replay_16": 0.1, "replay_64": 0.02})
    ones = [{"row": row, "course": course} for row, course in zip(made.rows, made.courses)]
    for one in (one for one in ones if one["row"]["method"] != "outcome"):
        write_json(tmp_path / "replay" / f"{one['row']['method']}-0.2-{one['row']['seed']}.json", one)
    shown: list = []
    without = [one for one in ones if one["row"]["method"] == "outcome"]
    space = {"made": {"outcome": without[1:]}, "p": SimpleNamespace(run_dir=tmp_path), "PRICE": PRICE, "Markdown": str}
    space |= {"trained": trained, "judged": judged, "markdown_table": markdown_table, "display": shown.append}
    space["plots"] = SimpleNamespace(smooth=plots.smooth, methods=plots.methods, show_figure=shown.append)
    space["former"] = lambda results: ""
    run(space | {"runpy": runpy, "Path": Path, "mean": lambda xs: sum(xs) / len(xs)}, "c09-replay")
    assert r"replay\_16 | 4 |" in shown[0] and r"replay\_4 " not in shown[0]
    assert "replay_16 holds; replay_64 contradicted" in shown[1].alt


def test_the_solutions_satisfy_the_checkers(played, yardstick):  # noqa: F811
    space = {"credit": credit, "torch": torch, "microscope": microscope, "grouped": grouped, "yardstick": yardstick}
    space |= {"rollouts": played, "mean": lambda xs: sum(xs) / len(xs)}
    space["credits"] = microscope.credits_of(played, Settings(num_generations=4))
    run(space, "c09-53", "c09-55", "c09-57")
    assert space["check_second_turn"](0.8) == "right" and "not yet" in space["check_second_turn"](0.4)
    lines = [
        re.search(r"`(return .*)`", CELLS["c09-56"])[1],
        re.search(r"```python\n(.*)```", CELLS["c09-58"], re.S)[1],
    ]
    exec(f"def shaping(rewards, potentials):\n    {lines[0]}\n{lines[1]}", space)
    assert space["check_shaping"](space["shaping"]).startswith("right")
    assert space["check_shaping"](lambda rewards, potentials: rewards).startswith("not yet")
    assert space["check_mine"](space["mine"]).startswith("right: truer than the outcome")
    assert space["check_mine"](lambda ts: [[0.0] * t.turns for t in ts]).startswith("not yet: less true")
    assert space["check_mine"](lambda ts: [[0.0] for t in ts]) == "not yet: one number for each turn of each rollout"


@pytest.mark.parametrize("id", ["c09-53", "c09-55", "c09-57"])
def test_an_exercise_begins_untried(id, capsys):
    run({"credits": {}, "rollouts": []}, id)
    assert capsys.readouterr().out == "not tried yet\n"
