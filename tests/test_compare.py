"""The researcher's door: ideas of one's own beside GRPO, resumable, refused before any work where they cannot be."""

import os
from pathlib import Path
from statistics import fmean

import pytest
import torch

from searchr1_lib.files import TrajectoryLog, read_json, write_json
from searchr1_lib.records import Question
from searchr1_lib.rewards import Discounted, ExactMatch, HierarchicalReward
from searchr1_lib.study import compare as laboratory
from searchr1_lib.study.compare import LIMITS, MODEL, Comparison, Method, blanked, compare, trained
from searchr1_lib.suite import cli
from searchr1_lib.suite.profiles import load_profile
from searchr1_lib.training.identity import identity
from searchr1_lib.worlds.almanac import UNKNOWN_PAYS, build_world

SMALL = {"steps": 2, "questions_per_step": 2, "num_generations": 4}
ONCE = {"prices": [0.3], "seeds": [0, 1], "questions": 8, "rollouts": 1}


def test_ideas_are_trained_measured_and_kept(tmp_path):

    def halves(trajectories, num_generations):
        return [[0.5 * t.reward] * len(t.mask) for t in trajectories]

    methods = {
        "mine": Method(SMALL, advantages=lambda rewards, num_generations: torch.sub(rewards, rewards.mean())),
        "credit": Method(SMALL, credit=halves, reward=ExactMatch()),
        "grpo": SMALL,
    }
    found = compare(methods, out=tmp_path, **ONCE)
    assert [(r["method"], r["seed"]) for r in found.rows] == [(m, s) for m in methods for s in (0, 1)]
    assert all(0 <= r["regret"] <= 1 and 0 < r["best"] < 1 for r in found.rows)
    assert {c["method"] for c in found.differences("grpo")} == {"mine", "credit"}
    assert [[row["rollouts"] for row in course] for course in found.courses] == [[8, 16]] * 6
    assert all(0 < a["tokens"] < b["tokens"] and 0 <= b["regret"] <= 1 for a, b in found.courses)
    assert set(found.simple[0.3]) == {"always searches", "never", "where nothing is recalled", "at random"}
    assert len(found.plot().axes[0].lines) >= 4
    times = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.json")}
    assert compare(methods, out=tmp_path, **ONCE).rows == found.rows
    assert times == {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.json")}  # nothing is made again
    with pytest.raises(ValueError, match="was made otherwise \\(settings\\)"):
        compare({"grpo": SMALL | {"learning_rate": 1e-4}}, out=tmp_path, **ONCE)


def test_the_course_is_of_what_the_policy_chose_by_itself(tmp_path):
    compare({"pairs": SMALL | {"pairs": 1}}, out=tmp_path, **ONCE | {"seeds": [0]})
    log = list(TrajectoryLog(tmp_path / "trainings" / "pairs-0.3-0" / "trajectories.jsonl").read())
    free = [t for t in log if t.first_action is None]
    assert (len(free), len(log)) == (8, 16)
    for step, row in enumerate(read_json(tmp_path / "pairs-0.3-0.json")["course"]):
        of_step = [t for t in free if t.step == step]
        assert row["truth"] == pytest.approx(fmean(Discounted(0.3, UNKNOWN_PAYS).value(t) for t in of_step))
        assert row["searches"] == fmean(len(t.calls) for t in of_step)
    assert [row["rollouts"] for row in read_json(tmp_path / "pairs-0.3-0.json")["course"]] == [8, 16]


def test_a_failed_training_is_named_and_the_others_are_kept(tmp_path, capfd):
    methods = {"short": Method(SMALL, advantages=lambda rewards, num_generations: rewards[:2]), "grpo": SMALL}
    with pytest.raises(RuntimeError, match="failed: short, price 0.3, seed 0"):
        compare(methods, out=tmp_path, **ONCE | {"seeds": [0]})
    assert "advantages gave 2 values for 8 rewards" in capfd.readouterr().err
    assert [f.name for f in tmp_path.glob("*.json")] == ["grpo-0.3-0.json"]


@pytest.mark.parametrize(
    "methods, how, message",
    [
        ({"mine": 3}, {}, "mine: expected a Method, settings or an advantage function, got int"),
        ({"mine": {"stepz": 3}}, {}, "mine: unknown name 'stepz'"),
        ({"grpo": {}}, {"prices": [1.5]}, "prices\\[0\\]"),
        ({"grpo": {}}, {"seeds": [-1]}, "seeds\\[0\\]"),
        ({"grpo": {}}, {"model": "tests/data/house/model"}, "no readable skill.json"),
        ({"grpo": {}}, {"mixture": {"1-hop": 0.5}}, "shares of a mixture"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(methods, how, message, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fork", None)
    with pytest.raises(ValueError, match=message):
        compare(methods, out=tmp_path, **how)


def test_what_is_there_is_read_by_method_and_seed(tmp_path):
    for name, seed in (("one", 2), ("one", 0), ("one", 1), ("two", 0), ("two", 2), ("late", 2)):
        write_json(tmp_path / "there" / f"{name}-0.3-{seed}.json", {"row": {"method": name, "seed": seed}})
    write_json(tmp_path / "there" / "one-0.5-7.json", {"row": {"method": "one", "seed": 7}})  # of another price
    write_json(tmp_path / "there" / "start.json", {"reward": 0.3})  # no training
    places = [tmp_path / "empty", tmp_path / "there"]
    seeds = {name: [one["row"]["seed"] for one in ones] for name, ones in trained(places, ["one", "two"]).items()}
    assert seeds == {"one": [0, 2], "two": [0, 2]}
    assert {name: len(ones) for name, ones in trained(places, ["one"]).items()} == {"one": 3}
    assert trained(places, ["one"], [0.5, 0.3])["one"][0]["row"]["seed"] == 7  # the first at which there is anything
    assert trained(places, ["one", "three"]) == {} and len(trained(places, ["one"], [0.5])["one"]) == 1


def test_from_the_shell(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f"methods = {{'grpo': {SMALL}, 'other': {{}}}}\nmixture = {{'1-hop': 1.0}}")
    options = ["--out", str(tmp_path / "out"), "--prices", "0.3", "--seeds", "0", "--questions", "8"]
    assert cli.main(["compare", str(file), *options, "--methods", "grpo"]) == 0
    assert "grpo" in capsys.readouterr().out
    made = read_json(tmp_path / "out" / "grpo-0.3-0.json")
    assert made["made_of"]["mixture"] == {"1-hop": 1.0}
    assert {q["source"].split("/")[1] for q in made["questions"]} == {"1-hop"}
    assert {"searches", "best"} <= made["by_level"][0].keys() and 0 <= made["by_own_skill"]["regret"] <= 1
    assert cli.main(["compare", str(file), *options, "--methods", "mine"]) == 2
    assert "has no mine; it has grpo, other" in capsys.readouterr().err
    file.write_text("x = 1")
    assert cli.main(["compare", str(file), *options]) == 2
    assert "must define a dict named methods" in capsys.readouterr().err


def test_nothing_of_the_truth_leaks_into_a_training(tmp_path, monkeypatch):
    once, real = ONCE | {"seeds": [0]}, laboratory.sample_questions

    def blank(world, split, *args, **how):
        asked = real(world, split, *args, **how)
        return [Question(q.id, q.text, q.answers) for q in asked] if split == "train" else asked

    compare({"grpo": SMALL}, out=tmp_path / "told", **once)
    monkeypatch.setattr(laboratory, "sample_questions", blank)
    compare({"grpo": SMALL}, out=tmp_path / "blank", **once)
    adapter = Path("trainings/grpo-0.3-0/checkpoints/step_2/adapter_model.safetensors")
    assert (tmp_path / "told" / adapter).read_bytes() == (tmp_path / "blank" / adapter).read_bytes()


def test_training_knows_nothing_of_a_question_but_its_text_and_answers():
    q = build_world(0).questions["train"][0]
    assert vars(blanked(q)) == vars(type(q)(q.id, q.text, q.answers))
    assert vars(blanked(q, passages=True)) == vars(type(q)(q.id, q.text, q.answers, passages=q.passages))


def test_who_was_told_the_gold_passages_is_another_method(tmp_path):
    once = ONCE | {"seeds": [0], "out": tmp_path}
    compare({"told": Method(SMALL, reward=HierarchicalReward(hops=1.0), gold_passages=True)}, **once)
    (t, *_) = TrajectoryLog(tmp_path / "trainings" / "told-0.3-0" / "trajectories.jsonl")
    assert t.question.passages and t.question.known is None
    with pytest.raises(ValueError, match="was made otherwise \\(gold_passages\\)"):
        compare({"told": Method(SMALL, reward=HierarchicalReward(hops=1.0))}, **once)


def test_the_laboratory_trains_as_the_notebooks_do():
    profile = load_profile("cpu")
    assert {name: getattr(profile, name) for name in LIMITS} == LIMITS and profile.model == MODEL


def test_the_table_has_intervals_over_the_seeds():
    rows = [
        {"method": m, "price": 0.3, "seed": s, "regret": r, "reward": 0.5, "best": 0.6}
        for m, rs in {"a": (0.1, 0.2, 0.3), "b": (0.2, 0.3, 0.4)}.items()
        for s, r in enumerate(rs)
    ]
    found = Comparison(rows, {0.3: {}})
    assert [round(c["mean"], 6) for c in found.table()] == [0.2, 0.3]
    (difference,) = found.differences("a")
    assert difference["method"] == "b" and difference["low"] == pytest.approx(0.1) == pytest.approx(difference["high"])
    with pytest.raises(ValueError, match="no method is named 'c'; there are a, b"):
        found.differences("c")


def test_an_idea_is_what_it_computes_wherever_it_is_written():
    def written(**around):
        space = {"__name__": "__main__", "torch": torch, **around}
        exec("def idea(rewards, num_generations):\n    return torch.mul(rewards - rewards.mean(), scale)", space)
        return identity(space["idea"])

    assert written(scale=1) == written(scale=1, mean="the same name as a method's") != written(scale=2)
