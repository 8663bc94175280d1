"""Notebook 12: its reading of trainings whose verdict is known, and the solutions of its exercises."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import nbformat
from test_feedback import pool

from searchr1_lib.files import write_json
from searchr1_lib.rewards import PreferenceReward
from searchr1_lib.study import plots
from searchr1_lib.study.analysis import interval, markdown_table
from searchr1_lib.study.evaluate import hashes
from searchr1_lib.study.feedback import Scripted, WellFounded, choose_pairs, pairs_of
from searchr1_lib.worlds.almanac import PRICE

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "12_feedback.ipynb"
CELLS = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, 4).cells}
BEGINNINGS = (
    "from pathlib import Path",
    "reward, regret = ",
    "from searchr1_lib.study.feedback import onset",
    "def ends(rows, key)",
    "from searchr1_lib.study.analysis import judged",
)
RESULTS = [id for id, source in CELLS.items() if source.startswith(BEGINNINGS)]


def run(space: dict, *ids: str) -> dict:
    for id in ids:
        exec(compile(CELLS[id], id, "exec"), space)
    return space


def cell_with(text: str) -> str:
    return next(id for id, source in CELLS.items() if text in source)


def write_trainings(place: Path, rewards: dict[str, float], falls: set[str], liked: float, seeds=range(3)) -> None:
    """Results whose true rewards are given, and fall again on the way for some; what the labeller thinks at the end."""
    place.mkdir(parents=True)
    write_json(place / "start.json", {"reward": 0.3})
    told = lambda seed: [{"opinion": 0.5 + (liked + 0.01 * seed - 0.5) * i / 29, "it says": 0.5} for i in range(30)]
    made_of = {"weights": hashes("data/tiny_qwen")}
    write_json(place / "told.json", {f"{name}-0.2-{seed}": told(seed) for name in rewards for seed in seeds})
    for name, reward in rewards.items():
        for seed in seeds:
            up = [0.3 + (reward - 0.3) * i / 30 for i in range(30)]
            truth = [x - 0.02 * max(0, i - 15) for i, x in enumerate(up)] if name in falls else up
            course = [{"reward": i / 30, "truth": x, "searches": 1.0} for i, x in enumerate(truth)]
            row = {"method": name, "seed": seed, "reward": reward + 0.002 * seed, "regret": 0.1, "price": 0.2}
            write_json(place / f"{name}-0.2-{seed}.json", {"made_of": made_of, "row": row, "course": course})


def verdicts(run_dir: Path) -> dict[str, str]:
    shown: list = []
    p = SimpleNamespace(run_dir=run_dir, tiny_model="data/tiny_qwen")
    space = {"p": p, "interval": interval, "markdown_table": markdown_table}
    space |= {"display": shown.append, "Markdown": str, "mean": lambda xs: sum(xs) / len(xs), "told": str}
    space["PRICE"] = PRICE
    space["plots"] = SimpleNamespace(smooth=plots.smooth, lines=plots.lines, show_figure=shown.append)
    return {claim: verdict for claim, *_, verdict in run(space, *RESULTS)["verdicts"]}


def test_claims_that_hold_and_claims_that_do_not(tmp_path):
    rewards = {"truth": 0.6, "labels_32": 0.5, "labels_512": 0.59, "biased": 0.4, "guarded": 0.5}
    write_trainings(tmp_path / "good" / "feedback", rewards, {"biased"}, 0.8)
    assert set(verdicts(tmp_path / "good").values()) == {"holds"}
    rewards = {"truth": 0.6, "labels_32": 0.55, "labels_512": 0.5, "biased": 0.52, "guarded": 0.4}
    write_trainings(tmp_path / "bad" / "feedback", rewards, set(), 0.3)
    assert set(verdicts(tmp_path / "bad").values()) == {"contradicted"}
    write_trainings(tmp_path / "few" / "feedback", rewards, set(), 0.3, seeds=range(2))
    assert list(verdicts(tmp_path / "few").values())[:5] == ["cannot tell"] * 5


def test_printed_solutions_pass_their_checkers():
    pairs = pairs_of(pool())
    labelled = Scripted(WellFounded())(choose_pairs(pairs, 64, random.Random(0)))
    space = {"sigma": lambda x: 1 / (1 + math.exp(-x)), "PreferenceReward": PreferenceReward, "labelled": labelled}
    run(space, cell_with("def check_after_adding"))
    assert space["check_after_adding"](0.73) == "right" and space["check_after_adding"](0.99).startswith("not yet")
    space["rollouts"] = pool(3)
    run(space, cell_with("def check_cautious"))
    assert space["check_cautious"](lambda reward, ts: reward.each(ts).min(axis=0).tolist()) == "right"
    assert space["check_cautious"](lambda reward, ts: reward(ts)).startswith("not yet")


def test_solutions_stand_in_the_notebook():
    solutions = "\n".join(source for source in CELLS.values() if "<summary>Solution" in source)
    assert "after_adding = 0.73" in solutions and "reward.each(rollouts).min(axis=0).tolist()" in solutions
