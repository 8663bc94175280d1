"""Rewards from their names, as profiles and sweeps write them."""

import pytest

from searchr1_lib import rewards
from searchr1_lib.records import Passage, Question
from searchr1_lib.rewards import Composite, Malformed, SearchCost, SearchR1Reward, handwritten, score

Q = Question("q", "Where?", ["Rome"], known=False)
SEARCH = ("<search> Ada </search>", [Passage("p", "Ada", "Ada was born in Rome.")])
ROLLOUTS = [handwritten(Q, ["<answer> Rome </answer>"]), handwritten(Q, [SEARCH, "<answer> Rome </answer>"])]


@pytest.mark.parametrize(
    "spec, like",
    [
        ("SearchR1Reward", SearchR1Reward(0.3)),
        ({"SearchR1Reward": {"cost": 0.2}}, SearchR1Reward(0.2)),
        ({"SearchR1Reward": None}, SearchR1Reward(0.3)),
        ({"OTC": {"c": 3}}, rewards.OTC(c=3)),
        ({"OTC": {"correctness": "F1"}}, rewards.OTC(rewards.F1())),
        (
            [[1, "ExactMatch"], [2.0, {"SearchCost": {"cost": 0.1}}], [1.0, "Malformed"]],
            Composite([(1, rewards.ExactMatch()), (2, SearchCost(0.1)), (1, Malformed())]),
        ),
        ({"Composite": {"parts": [[1, "F1"]], "name": "mine"}}, Composite([(1, rewards.F1())])),
        ({"SearchCost": {"only_if": "ExactMatch"}}, SearchCost(0.3, only_if=rewards.ExactMatch())),
        ({"Product": {"parts": ["ExactMatch", {"Threshold": {"reward": [[1, "F1"]], "at": 0.5}}]}}, rewards.F1()),
        ({"Scaled": {"reward": "IKEA", "low": -1, "high": 1.6}}, rewards.Scaled(rewards.IKEA(), -1, 1.6)),
    ],
)
def test_a_reward_is_built_from_its_name(spec, like):
    built = rewards.build(spec, cost=0.3)
    assert score(built, ROLLOUTS).values == score(like, ROLLOUTS).values


def test_a_judge_with_its_endpoint_can_be_named_too():
    spec = {"Judge": {"chat": {"ChatEndpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}, "max_calls": 3}}
    assert isinstance(rewards.build(spec, cost=0.3), rewards.Judge)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("SearchR2Reward", "'SearchR2Reward' is unknown; there are .*SearchR1Reward"),
        ("Reward", "'Reward' is unknown"),
        ("RewardError", "'RewardError' is unknown"),
        ({"OTC": {"d": 3}}, "OTC: got an unexpected keyword argument 'd'"),
        ({"OTC": {"c": "3"}}, "OTC: c must be of type float, got '3'"),
        ({"OTC": {"c": True}}, "OTC: c must be of type float, got True"),
        ({"OTC": {"correctness": "F2"}}, "OTC: 'F2' is unknown"),
        ({"OTC": 3}, "expected a name"),
        ({"OTC": {}, "F1": {}}, "expected a name"),
        (3, "expected a name"),
        ("OverlongPenalty", "OverlongPenalty: missing a required argument: 'max_tokens'"),
        ({"SearchCost": {"cost": -1}}, "SearchCost: SearchCost: cost must be greater than or equal to 0, got -1"),
        (
            [[1.0, "F1"], ["x", "ExactMatch"]],
            "Composite: Composite: the weight of 'exact_match' must be a valid number, got 'x'",
        ),
        (["F1"], r"Composite: expected pairs \[weight, reward\]"),
        ([[1.0, "F1"], [1.0, "F1"]], "Composite: Composite: two rewards are named"),
        ([], "at least one"),
        ({"Threshold": {"reward": "F2", "at": 0.5}}, "Threshold: 'F2' is unknown"),
    ],
)
def test_what_is_no_reward_is_named(spec, message):
    with pytest.raises(ValueError, match=f"reward: .*{message}|reward: {message}"):
        rewards.build(spec)
