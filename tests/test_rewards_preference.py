"""Bradley-Terry on choices between trajectories."""

import math
import random

import numpy as np
import pytest

from searchr1_lib.records import Passage, Question
from searchr1_lib.rewards import FEATURES, PreferenceReward, handwritten, read_choices, record_choice, score

Q = Question("q", "?", ["Velmora"], passages=["p"])


def rollout(right, searches, found=False):
    asks = [
        (f"<think> a </think>\n<search> query {i} </search>", [Passage("p" if found else "n", "t", "x")])
        for i in range(searches)
    ]
    return handwritten(Q, asks + [f"<think> b </think>\n<answer> {'Velmora' if right else 'Tarn'} </answer>"])


def choices(number, seed=0):
    """A person who wants right answers (+3) and dislikes searches (-1 each), and errs as Bradley-Terry says."""
    rng = random.Random(seed)
    worth = lambda right, n: 3.0 * right - 1.0 * n
    pairs = []
    for _ in range(number):
        (ra, na), (rb, nb) = [(rng.random() < 0.5, rng.randint(0, 3)) for _ in range(2)]
        a, b = rollout(ra, na), rollout(rb, nb)
        a_wins = rng.random() < 1 / (1 + math.exp(worth(rb, nb) - worth(ra, na)))
        pairs.append((a, b) if a_wins else (b, a))
    return pairs


def test_it_learns_what_the_person_wants():
    reward = PreferenceReward(choices(300))
    assert reward.weights["searches"] < 0 < reward.weights["exact_match"] and reward.accuracy > 0.75
    ts = [rollout(True, 0), rollout(True, 2), rollout(False, 0), rollout(False, 3)]
    scores = score(reward, ts)
    values = scores.values
    assert values == sorted(values, reverse=True) and scores.parts["preference"] == values
    held_out = choices(200, seed=1)
    agreed = np.mean([reward([a])[0] > reward([b])[0] for a, b in held_out if a.to_dict() != b.to_dict()])
    assert agreed > 0.75


def test_probabilities_come_near_the_persons():
    reward = PreferenceReward(choices(600), l2=0.01)
    true = 1 / (1 + math.exp(-(3 - 1)))  # right with one search against wrong with none
    assert reward.probability(rollout(True, 1), rollout(False, 0)) == pytest.approx(true, abs=0.08)
    a, b = rollout(True, 1), rollout(False, 2)
    assert reward.probability(a, b) + reward.probability(b, a) == pytest.approx(1)
    assert reward.probability(a, a) == pytest.approx(0.5)


def test_the_fit_is_the_minimum():
    torch = pytest.importorskip("torch")
    pairs, l2 = choices(60), 0.5
    reward = PreferenceReward(pairs, l2=l2)
    x = torch.tensor([[f(a) - f(b) for f in FEATURES.values()] for a, b in pairs], dtype=torch.float64)
    scale = x.pow(2).mean(0).sqrt()
    x = torch.where(scale > 0, x / scale, 0.0)
    w = torch.tensor(list(reward.weights.values()), dtype=torch.float64, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(x @ w).sum() + l2 / 2 * w.pow(2).sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-6


def test_one_choice_and_choices_that_contradict_are_enough():
    a, b = rollout(True, 0), rollout(False, 2)
    one = PreferenceReward([(a, b)])
    assert one([a])[0] > one([b])[0] and all(map(math.isfinite, one.weights.values()))
    torn = PreferenceReward([(a, b), (b, a)])
    assert torn([a])[0] == pytest.approx(torn([b])[0])
    same = PreferenceReward([(a, a)])
    assert same([a, b]) == [0, 0] and same([]) == []


def test_choices_live_in_a_file(tmp_path):
    path = tmp_path / "choices.jsonl"
    a, b = rollout(True, 1, found=True), rollout(False, 0)
    record_choice(path, a, b, "a")
    record_choice(path, a, b, "b")
    assert read_choices(path) == [(a, b), (b, a)]
    with pytest.raises(ValueError, match="'a' or 'b'"):
        record_choice(path, a, b, "left")
    for bad in ("{}", "[]", "not json", '{"a": {}, "b": {}, "preferred": "a"}'):
        path.write_text(path.read_text().rstrip("\n").rsplit("\n", 1)[0] + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"choices.jsonl, line 2: (not a choice|Expecting value)"):
            read_choices(path)


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one pair"):
        PreferenceReward([])
    with pytest.raises(ValueError, match="l2"):
        PreferenceReward(choices(2), l2=0)
