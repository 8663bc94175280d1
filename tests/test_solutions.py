"""Printed solutions of notebooks pass their own checkers (05, 09 and 12 have tests of their own). Of 00, 02 and 04 one
each is left out, which needs the rollouts of the notebook.
"""

import re
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace

import nbformat
import numpy as np
import torch

from searchr1_lib import load_passages, load_questions, suite
from searchr1_lib.records import Hit, Passage, Question
from searchr1_lib.rewards import F1, Composite, ExactMatch, SubstringMatch, f1_score, normalize_answer, score
from searchr1_lib.search import measure, quality
from searchr1_lib.study import analysis
from searchr1_lib.training.grpo import group_advantages

HOME = Path(__file__).resolve().parents[1] / "notebooks"


def cells(name: str) -> dict[str, str]:
    return {cell.id: cell.source for cell in nbformat.read(HOME / f"{name}.ipynb", 4).cells}


def solution(source: str) -> str:
    """The code of a folded solution: a block, or what stands in backquotes."""
    text = source.split("<summary>Solution</summary>")[1].split("</details>")[0]
    block = re.search(r"```\w*\n(.*?)```", text, re.DOTALL)
    return block[1] if block else re.search(r"`(.*?)`", text)[1]


def by_text(name: str, *beginnings: str) -> list[str]:
    """The one cell each that holds this text."""
    sources = list(cells(name).values())
    return [next(source for source in sources if text in source) for text in beginnings]


def tried(space: dict, name: str, check: str, answer: str) -> None:
    """Leave a notebook's checker and its printed solution, the cells with these texts, in the space."""
    checker, printed = by_text(name, check, answer)
    exec(checker, space)
    exec(solution(printed), space)


def test_00():
    made, check, answer = by_text("00_search_r1_demo", "by_hand = {", "def check_rewards", "`[1.0, 0.4,")
    space = {"p": SimpleNamespace(search_cost=0.3), "score": score, "Question": Question}
    exec(made[: made.index("values = score")], space)
    exec(check, space)
    assert space["check_rewards"](eval(solution(answer))) == " ".join("✓" * 6)


def test_01(engine, world):
    questions = world.questions["validation"]
    space = {"np": np, "Hit": Hit, "Passage": Passage, "measure": measure, "bm25": engine, "questions": questions}
    space |= {"recall": quality.recall, "reciprocal_rank": quality.reciprocal_rank}
    for name in ("answer", "two_steps"):
        text = {"answer": "answer = (1 / 2", "two_steps": "class TwoSteps"}[name]
        tried(space, "01_retriever_build", f"def check_{name}", text)
        assert space[f"check_{name}"](space[name]).startswith("right")


def test_02():
    space = {"trajectories": [SimpleNamespace(mask=[1, 1, 0]), SimpleNamespace(mask=[1, 0, 0, 0])]}
    tried(space, "02_rollout_inspection", "def check_share", "share = sum(m == 0")
    assert space["check_share"](space["share"]) == "right"


def test_04():
    space = {"r": torch.tensor([1.0, 0.0, 0.8, 0.0]), "group_advantages": group_advantages, "rounded": list}
    tried(space, "04_grpo_step_by_step", "def check_leave_one_out", "def leave_one_out(rewards):\n    total")
    assert space["check_leave_one_out"](space["leave_one_out"](space["r"].tolist())) == "right"


def test_06():
    known = lambda *counts: [SimpleNamespace(question=SimpleNamespace(known=k), searches=["s"] * n) for k, n in counts]
    space = {"analysis": analysis, "before": known((True, 2), (False, 1)), "after": known((True, 0), (False, 3))}
    for name, text in (("p_value", "p_value = 2 *"), ("cost", "known = sum(len(t.searches)")):
        tried(space, "06_reward_analysis", f"def check_{name}", text)
    assert space["check_p_value"](space["p_value"]) == "right"
    assert space["check_cost"](space["cost_of_knowing"]).startswith("right")


def test_10_and_11():
    space: dict = {}
    tried(space, "10_two_policies", "def check_blame", "`in_common, apart = ")
    assert space["check_blame"](space["in_common"], space["apart"]) == "right"
    tried(space, "11_memory", "def check_from_rho", "`from_rho = ")
    assert space["check_from_rho"](space["from_rho"]) == "right"


def test_13():
    space = {}
    tried(space, "13_hand_over", "def check_processes", "`passes, refused = ")
    assert space["check_processes"](space["passes"], space["refused"]) == "✓ ✓"


def test_03():
    s, space = cells("03_reward_design"), {"np": np, "Passage": Passage, "Question": Question}
    space |= {"passages": {x.id: x for x in load_passages("data/almanac/passages.jsonl")}}
    space |= {"questions": load_questions("data/almanac/train.jsonl"), "f1_score": f1_score, "ExactMatch": ExactMatch}
    space |= {"normalize_answer": normalize_answer, "Composite": Composite, "F1": F1, "SubstringMatch": SubstringMatch}
    for id in ("03-08", "03-09a"):
        exec(s[id], space)
    exec(s["03-40"][s["03-40"].index("def break_even") : s["03-40"].index("kinds =")], space)
    exec(s["03-49"][s["03-49"].index("MONTHS") : s["03-49"].index("sweep")], space)
    for exercise, answer in (("03-74", "03-75"), ("03-76", "03-77"), ("03-78", "03-79")):
        exec(s[exercise], space)
        exec(solution(s[answer]), space)
    assert space["check_most"](space["most"]) == "right"
    assert space["check_honest"](space["Honest"]()).startswith("right")
    assert space["check_exploit"](space["exploit"], space["patched"]).startswith("right")
    assert not space["check_exploit"](space["exploit"], space["proposal"]).startswith("right")


def test_07():
    s = cells("07_reinforce_ppo_grpo")
    rollouts = [SimpleNamespace(reward=r) for r in (1.0, 0.0, 0.8, 0.0)]
    space = {"np": np, "group_advantages": group_advantages, "rollouts": rollouts, "G": 4}
    exec(s["c07-46"], space)
    assert space["check_rloo"](eval(solution(s["c07-47"]).split("=")[1])).startswith("right")
    exec(s["c07-50"], space)
    exec("def biased(rewards):\n    " + solution(s["c07-51"]), space)
    assert space["check_biased"](space["biased"]).startswith("right")


def test_08(tmp_path):
    s = cells("08_experiment_report")
    space = {"analysis": analysis, "suite": suite, "stdev": stdev, "p": SimpleNamespace(run_dir=tmp_path)}
    exec(s["report-33"], space)
    assert space["check_reach"](eval(solution(s["report-34"]).split("=")[1], space)).startswith("right")
    exec(s["report-35"], space)
    assert space["check_experiment"](solution(s["report-36"])).startswith("right")


def test_a6():
    s, space = cells("A6_gradient_noise"), {"np": np, "noise": {"GRPO": {"signal": 1.0, "noise": 2.0}}, "sizes": [4]}
    exec(s["c07-19"].split("by_hand")[0], space)
    exec(s["c07-48"], space)
    exec("def f(signal, noise, n):\n    " + solution(s["c07-49"]), space)
    assert space["check_cosine"](space["f"]).startswith("right")
