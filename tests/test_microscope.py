"""The microscope: the truth of a turn by hand, perfect and hopeless methods, and the library's on played rollouts."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from test_regret import play

from searchr1_lib.records import ENVIRONMENT, Question, Segment, Trajectory
from searchr1_lib.rewards import Discounted, score
from searchr1_lib.study import microscope
from searchr1_lib.study.regret import WASTED, Yardstick
from searchr1_lib.training.credit import P_GOLD
from searchr1_lib.training.settings import Settings
from searchr1_lib.worlds.optimum import TRUST, WORDINGS, Skill


@pytest.fixture(scope="module")
def yardstick(world):
    return Yardstick(world, Skill(found=(0.9, 0.5), again=(0.5, 0.1), read=0.95), price=0.3)


def told(t: Trajectory, group: str = "", **fields) -> Trajectory:
    """A played rollout with the segments of one: a search a turn, then the answer."""
    segments = []
    for turn, call in enumerate(t.calls):
        segments += [Segment("policy", "search", call.argument, turn, 2 * turn, 2 * turn + 1)]
        segments += [Segment(ENVIRONMENT, "information", "found", turn, 2 * turn + 1, 2 * turn + 2)]
    n = 2 * len(t.calls)
    segments.append(Segment("policy", "answer", "<answer>", len(t.calls), n, n + 1))
    turns, ids = len(t.calls) + 1, [0] * (n + 1)
    return replace(t, segments=segments, turns=turns, group=group, completion_ids=ids, mask=[1] * (n + 1), **fields)


def coin(state, level, values, rng):
    return rng.choice([act for act in values if act in (TRUST, WORDINGS[0])])


@pytest.fixture(scope="module")
def played(yardstick, engine):
    """A policy that chooses by a coin: 40 questions, each in three groups of four."""
    rng = random.Random(0)
    questions = rng.sample(yardstick.world.questions["test"], 40)
    made = [
        told(play(yardstick, q, engine, coin, rng), f"{group}:{q.id}")
        for q in questions
        for group in range(3)
        for _ in range(4)
    ]
    score(Discounted(0.3, 0.0), made).keep(made)
    return made


def test_a_decision_knows_its_turn(yardstick, played):
    together = 0
    for t in played:
        made = yardstick.decisions(t)
        assert [d.turn for d in made if d.act in (*WORDINGS, WASTED)] == list(range(len(t.calls)))
        assert [d.turn for d in made] == sorted(d.turn for d in made) and made[-1].turn == len(t.calls)
        together += any(a.act == TRUST and a.turn == b.turn < len(t.calls) for a, b in pairwise(made))
    assert together > 20  # a memory trusted on the way to the next search


def test_the_truth_by_hand(world, engine):
    """A memory that is true with 0.4, a search that always helps and costs 0.3: 0.7 against 0.4, mean 0.55."""
    yardstick = Yardstick(world, Skill(), price=0.3)
    q = next(q for q in world.questions["test"] if yardstick.optimum(world.asked[q.id]).levels == (0.4,))
    searches = lambda state, level, values, rng: WORDINGS[0] if level is not None and not state.searches else TRUST
    trusts = lambda state, level, values, rng: TRUST
    rollouts = [told(play(yardstick, q, engine, how, None), "g") for how in (searches, trusts)]
    credits = {"right": [[0.5, 0.5], [-0.5, 0.0]], "wrong": [[0.0, 1.0], [1.0, 0.0]]}
    got = microscope.by_optimum(yardstick, rollouts, credits)
    assert [(r.rollout, r.turn, r.act) for r in got[:1] + got[-1:]] == [(0, 0, WORDINGS[0]), (1, 0, "trust, trust")]
    assert [r.truth for r in got] == pytest.approx([0.15, *[0.0] * (len(got) - 2), -0.15])
    assert got[0].credit == {"right": 0.5, "wrong": 0.0} and got[0].error == 0
    right, wrong = microscope.verdicts(got)
    assert (right["decided"], right["wrong_sign"], right["silent"]) == (2, 0, 0)
    assert (wrong["decided"], wrong["wrong_sign"], wrong["silent"]) == (2, 0.5, 0.5)


def test_perfect_and_hopeless_methods(yardstick, played):
    rng = random.Random(1)
    width = max(t.turns for t in played)
    rows = lambda value: [[value() for _ in range(width)] for _ in played]
    silent = microscope.by_optimum(yardstick, played, {"silent": rows(float)})
    truth = {(r.rollout, r.turn): r.truth for r in silent}
    by = lambda f: [[f(truth.get((i, k), 0.0)) for k in range(width)] for i in range(len(played))]
    methods = {"true": by(float), "cubed": by(lambda x: x**3), "reversed": by(lambda x: -x)}
    methods |= {"random": rows(rng.random), "silent": rows(float)}
    said = {row["credit"]: row for row in microscope.verdicts(microscope.by_optimum(yardstick, played, methods))}
    assert said["true"]["decided"] > 200
    for name in ("true", "cubed"):
        assert said[name]["correlation"] == pytest.approx(1, abs=0.02) and said[name]["wrong_sign"] == 0
    assert said["true"]["noise"] == pytest.approx(0, abs=1e-6)
    assert said["reversed"]["correlation"] == pytest.approx(-1) and said["reversed"]["wrong_sign"] == 1
    assert abs(said["random"]["correlation"]) < 0.1 and said["random"]["noise"] == pytest.approx(1, abs=0.1)
    assert said["silent"] | {"decided": 0} == {
        **{"credit": "silent", "decided": 0, "correlation": None, "wrong_sign": 0, "silent": 1, "noise": None}
    }


def test_samples_that_know_other_methods_are_judged_by_themselves(yardstick, played):
    width = max(t.turns for t in played)
    one, other = (
        microscope.by_optimum(yardstick, ts, {name: [[value] * width for _ in ts]})
        for name, value, ts in (("praise", 1.0, played[:240]), ("blame", -1.0, played[240:]))
    )
    said = {row["credit"]: row for row in microscope.verdicts(one + other)}
    assert [said[name]["decided"] for name in ("praise", "blame")] == [
        sum(r.decided for r in rs) for rs in (one, other)
    ]
    share = lambda rs, sign: sum(r.decided and sign * r.truth < 0 for r in rs) / sum(r.decided for r in rs)
    assert said["praise"]["wrong_sign"] == share(one, 1) and said["blame"]["wrong_sign"] == share(other, -1)


def test_the_truth_is_an_advantage(yardstick, played):
    """Over the turns of a situation it sums to nothing."""
    got = microscope.by_optimum(yardstick, played, {})
    sums = {}
    for r in got:
        sums[r.situation] = sums.get(r.situation, 0.0) + r.truth
    assert len(sums) > 40 and max(map(abs, sums.values())) < 1e-9
    assert microscope.verdicts(got) == [] == microscope.verdicts([])


def test_the_methods_of_the_library(yardstick, played):
    """On a policy that chooses by a coin: equal states tell more than the outcome, the same numbers dealt out at random
    less. With the whole reward in the last turn MT-GRPO is the outcome's."""
    settings = Settings(num_generations=4, scale_rewards="none")
    credits = microscope.credits_of(played, settings)
    assert set(credits) == {"rollout", "return", "gigpo", "stepsearch", "mt_grpo", "potential"}
    control = microscope.credits_of(played, settings.model_copy(update={"credit": "gigpo", "shuffle_credit": True}))
    assert set(control) == set(credits) - {"rollout"}
    credits["shuffled"] = control["gigpo"]
    said = {row["credit"]: row for row in microscope.verdicts(microscope.by_optimum(yardstick, played, credits))}
    true = {name: row["correlation"] for name, row in said.items()}
    assert true["mt_grpo"] == pytest.approx(true["rollout"])
    assert true["shuffled"] + 0.05 < true["rollout"] < true["gigpo"] < true["return"]
    assert all(said["gigpo"][flaw] < said["shuffled"][flaw] for flaw in ("wrong_sign", "silent", "noise"))


def test_what_lacks_is_left_out(played):
    grown = [replace(t, tree=0, token_values={P_GOLD: [0.5] * len(t.mask)}) for t in played[:4]]
    assert {"igpo", "tree_grpo"} <= set(microscope.credits_of(grown, Settings(num_generations=4, trees=1)))


def test_by_continuing_by_hand():
    def rollout(acts):
        t = Trajectory(Question("q", "?", ["x"]), [1], [], [], [], prompt="p", group="g", turns=len(acts))
        for turn, act in enumerate(acts):
            n = len(t.completion_ids)
            t.completion_ids += [turn, len(act)]
            t.segments += [Segment("policy", "think", "so", turn, n, n + 1)]
            t.segments += [Segment("policy", "search", act, turn, n + 1, n + 2)]
        return t

    rollouts = [rollout(["a", "b"]), rollout(["a", "c"]), rollout(["d"])]
    values = [[(0.5, 0.03), (0.8, 0.04), (1.0, 0.0)], [(0.5, 0.03), (0.8, 0.04), (0.0, 0.0)], [(0.5, 0.03), (0.5, 0.0)]]
    got = microscope.by_continuing(rollouts, values, {"m": [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]})
    assert [r.truth for r in got] == pytest.approx([0.3, 0.2, 0.3, -0.8, 0.0])
    assert [r.error for r in got] == pytest.approx([0.05, 0.04, 0.05, 0.04, 0.03])
    assert [r.act for r in got] == ["a", "b", "a", "c", "d"] and got[1].situation == got[3].situation
    assert got[0].situation == got[2].situation == got[4].situation != got[1].situation
    (row,) = microscope.verdicts(got)
    assert (row["decided"], row["wrong_sign"], row["correlation"], row["noise"]) == (4, 0.25, None, None)
