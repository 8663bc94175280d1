"""Composition: sums, products, thresholds, normalisation, parts by name, rewards by turn."""

import math
import statistics
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lib.files import TrajectoryLog
from searchr1_lib.records import Passage, Question, Trajectory
from searchr1_lib.rewards import (
    F1,
    IKEA,
    OTC,
    Composite,
    ConfidentSearch,
    ExactMatch,
    InformationGain,
    OverlongPenalty,
    Product,
    RepeatedSearch,
    Scaled,
    SearchCost,
    SearchR1Format,
    SearchR1Reward,
    Standardized,
    Threshold,
    handwritten,
    score,
)

Q = Question("q1", "?", ["Ada Lovelace"], passages=["p1"])
P1, P2 = Passage("p1", "t", "Ada"), Passage("p2", "t", "x")


def rollouts(group=""):
    asks = [("<think> </think><search> a </search>", [P2]), ("<think> </think><search> b </search>", [P1])]
    ends = ["<think> </think><answer> Ada Lovelace </answer>", "<think> </think><answer> Ada </answer>", "none"]
    return [handwritten(Q, asks[:n] + [end], group=group) for n in range(3) for end in ends]


def test_the_default_reward_is_exact_match_minus_the_cost_of_searches():
    ts = rollouts()
    scores = score(SearchR1Reward(0.15), ts)
    assert scores.values == pytest.approx([1, 0, -1, 0.85, 0, -1, 0.7, 0, -1])
    scores.keep(ts)
    assert ts[3].rewards == {"exact_match": 1, "search_cost": -0.15, "malformed": 0, "search_r1": 0.85}


def test_a_second_chance_after_a_malformed_turn_is_worth_less_than_a_wrong_answer():
    spoilt = "<think> </think><answer no"
    turns = [spoilt, ("<think> </think><search> a </search>", [P1]), "<think> </think><answer> Ada Lovelace </answer>"]
    right, wrong = handwritten(Q, turns), handwritten(Q, [spoilt, spoilt, "<answer> no </answer>"])
    scores = score(SearchR1Reward(0.15), [right, wrong])
    assert scores.values == pytest.approx([-0.15, -1])
    scores.keep([right, wrong])
    assert right.rewards == {"exact_match": 1, "search_cost": -0.15, "malformed": -1, "search_r1": right.reward}
    assert math.fsum(right.turn_rewards) == right.reward
    assert score(SearchR1Reward(0.15), [handwritten(Q, turns[1:])]).values == [0.85]
    assert score(SearchR1Reward(0.15), [handwritten(Q, ["<think> </think> no action, and the end"])]).values == [-1]


def test_weights_and_parts():
    ts = rollouts()
    scores = score(Composite([(0.7, F1()), (0.3, ExactMatch())], name="mix"), ts)
    scores.keep(ts)
    for t, v in zip(ts, scores.values):
        assert v == pytest.approx(0.7 * t.rewards["f1"] + 0.3 * t.rewards["exact_match"]) == t.rewards["mix"]


def test_products_thresholds_and_scales_nest_and_keep_their_parts():
    ts = rollouts()
    gated = Product([ExactMatch(), Scaled(SearchCost(0.25), -1, 0)], name="gated")
    score(Composite([(1, gated), (0.5, Threshold(F1(), 0.6))]), ts).keep(ts)
    for t in ts:
        assert t.rewards["gated"] == t.rewards["exact_match"] * t.rewards["search_cost_scaled"]
        assert t.rewards["search_cost_scaled"] == 1 + t.rewards["search_cost"]
        assert t.rewards["f1>=0.6"] == (t.rewards["f1"] >= 0.6)
        assert t.reward == t.rewards["gated"] + 0.5 * t.rewards["f1>=0.6"]


def test_standardized_has_mean_0_and_deviation_1_in_each_group():
    ts = rollouts("a") + rollouts("b")
    values = score(Standardized(F1()), ts).values
    assert values[:9] == values[9:]
    assert statistics.fmean(values[:9]) == pytest.approx(0, abs=1e-12)
    assert statistics.pstdev(values[:9]) == pytest.approx(1)
    same = [handwritten(Q, ["x"]) for _ in range(4)]
    assert score(Standardized(F1()), same).values == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Composite([]), "at least one"),
        (lambda: Composite([(math.nan, F1())]), "weight of 'f1'"),
        (lambda: Composite([(1, F1()), (2, F1())]), "two rewards are named 'f1'"),
        (lambda: Composite([(1, F1()), (2, Threshold(F1(), 0.5))]), "two rewards are named 'f1'"),
        (lambda: Product([]), "at least one"),
        (lambda: Scaled(F1(), 1, 1), "below"),
    ],
)
def test_bad_compositions_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_turn_rewards_sum_to_the_reward_and_stand_where_they_were_earned():
    ts = rollouts()
    reward = Composite([(1, ExactMatch()), (1, SearchCost(0.1)), (0.5, InformationGain()), (2, RepeatedSearch(0.1))])
    scores = score(reward, ts)
    for t, turns, value in zip(ts, scores.turns, scores.values):
        assert math.fsum(turns) == pytest.approx(value) and len(turns) == t.turns
    assert scores.turns[6] == pytest.approx([-0.1, -0.1 + 0.5, 1])
    nested = Composite([(2, reward), (1, F1())], name="outer")
    score(nested, ts).keep(ts)
    assert ts[6].turn_rewards == pytest.approx([-0.2, 0.8, 3]) and ts[6].reward == pytest.approx(3.6)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=4), st.integers(0, 8))
def test_a_composite_is_linear(weights, which):
    t = rollouts()[which]
    parts = [ExactMatch(), F1(), SearchCost(0.1), InformationGain()]
    alone = [score(p, [t]).values[0] for p in parts]
    scores = score(Composite(list(zip(weights, parts))), [t])
    assert scores.values[0] == pytest.approx(sum(w * v for w, v in zip(weights, alone)), abs=1e-9)
    assert math.fsum(scores.turns[0]) == pytest.approx(scores.values[0], abs=1e-9)


def test_any_function_is_a_reward_and_a_trajectory_gains_its_score_once():
    ts = rollouts()

    def short(trajectories):
        return [-len(t.answer or "") / 100 for t in trajectories]

    scores = score(short, ts)
    assert scores.values[0] == -0.12 and score(SearchR1Reward(), []).values == []
    scores.keep(ts)
    assert ts[0].rewards == {"short": -0.12}
    with pytest.raises(ValueError, match="question 'q1' has a reward already"):
        score(SearchR1Reward(), ts).keep(ts)
    assert ts[0].rewards == {"short": -0.12}


def test_rewards_survive_the_log(tmp_path):
    ts = rollouts()
    score(SearchR1Reward(), ts).keep(ts)
    TrajectoryLog(tmp_path / "t.jsonl").append(ts)
    assert list(TrajectoryLog(tmp_path / "t.jsonl").read()) == ts
    old = ts[0].to_dict()
    del old["turn_rewards"]  # written before the field existed
    assert Trajectory.from_dict(old).turn_rewards == []


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "make, name, wrong",
    [
        (SearchCost, "cost", (-0.1, NAN, INF, "0.1", True)),
        (SearchR1Reward, "cost", (-0.1, NAN, INF)),
        (RepeatedSearch, "penalty", (-0.1, NAN, INF, None)),
        (InformationGain, "redundancy", (-0.1, NAN, INF, "1")),
        (SearchR1Format, "structure", (-0.1, 1.1, NAN)),
        (SearchR1Format, "retrieval", (-0.1, 1.1, NAN)),
        (SearchR1Format, "answered", (-0.1, 1.1, NAN)),
        (OTC, "c", (-1, NAN, INF, False)),
        (OTC, "alpha", (0, -1, NAN, INF)),
        (IKEA, "bonus", (-0.1, NAN, INF)),
        (IKEA, "max_searches", (0, -1, 1.5, NAN)),
        (IKEA, "tried", (-0.1, 1.1, NAN)),
        (ConfidentSearch, "threshold", (-0.1, 1.1, NAN)),
        (partial(OverlongPenalty, buffer=1), "max_tokens", (0, -5, 2.5, NAN, INF)),
        (partial(OverlongPenalty, 10), "buffer", (0, -5, 11, 2.5, NAN)),
        (partial(Threshold, F1()), "at", (NAN, INF, "0.5")),
        (partial(Scaled, F1(), high=2), "low", (NAN, -INF, 2)),
        (partial(Scaled, F1(), -1), "high", (NAN, INF, -1)),
        (lambda weight: Composite([(weight, F1())]), "weight", (NAN, INF, -INF, "1", None, True)),
    ],
)
def test_every_number_of_a_reward_has_a_range(make, name, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=name):
            make(**{name: value})


def test_a_reward_shows_its_parameters():
    assert repr(OTC(c=3)) == "OTC(correctness=ExactMatch(), c=3.0, alpha=1.0)"
    assert repr(SearchCost(0.1)) == "SearchCost(cost=0.1, only_if=None)"
    assert repr(Product([F1(), Threshold(ExactMatch(), 0.5)])).startswith("Product(name='product', parts=[(1.0, F1())")
