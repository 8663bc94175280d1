"""Bradley-Terry on choices between trajectories."""

import math
import random

import numpy as np
import pytest

from searchr1_lib.records import Passage, Question
from searchr1_lib.rewards import Choice, PreferenceReward, handwritten, read_choices, record_choice, score, visible
from searchr1_lib.study.feedback import agreement
from searchr1_lib.training.identity import identity

Q = Question("q", "?", ["Velmora"], passages=["p"])


def rollout(right, searches):
    found = Passage("p", "Born", f"It was in {'Velmora' if right else 'Sorn'}.")
    asks = [(f"<think> a </think>\n<search> query {i} </search>", [found]) for i in range(searches)]
    return handwritten(Q, asks + [f"<think> b </think>\n<answer> {'Velmora' if right else 'Tarn'} </answer>"])


def choices(number, seed=0):
    """A person who wants answers that were read (+3), dislikes searches (-1 each), errs as Bradley-Terry says."""
    rng = random.Random(seed)
    worth = lambda right, n: 3.0 * (right and n > 0) - 1.0 * n
    pairs = []
    for _ in range(number):
        (ra, na), (rb, nb) = [(rng.random() < 0.5, rng.randint(0, 3)) for _ in range(2)]
        a, b = rollout(ra, na), rollout(rb, nb)
        a_wins = rng.random() < 1 / (1 + math.exp(worth(rb, nb) - worth(ra, na)))
        pairs.append(Choice(a, b, "a" if a_wins else "b"))
    return pairs


def test_it_learns_what_the_person_wants():
    reward = PreferenceReward(choices(300))
    assert reward.weights["searches"] < 0 < reward.weights["answer_was_read"] and reward.accuracy > 0.7
    ts = [rollout(True, 1), rollout(True, 2), rollout(False, 0), rollout(False, 3)]
    scores = score(reward, ts)
    values = scores.values
    assert values == sorted(values, reverse=True) and scores.parts["preference"] == values
    held_out = choices(200, seed=1)
    assert agreement(reward, (c for c in held_out if c.a.to_dict() != c.b.to_dict())) > 0.7


def test_probabilities_come_near_the_persons():
    reward = PreferenceReward(choices(600), l2=0.01)
    true = 1 / (1 + math.exp(-(3 - 1)))  # read with one search against nothing
    a, b, c = rollout(True, 1), rollout(False, 0), rollout(False, 2)
    (said,) = reward.probabilities([(a, b), (a, c), (c, a), (a, a)])
    assert said[0] == pytest.approx(true, abs=0.08) and said[1] + said[2] == pytest.approx(1) and said[3] == 0.5


def test_the_fit_is_the_minimum():
    torch = pytest.importorskip("torch")
    pairs, l2 = choices(60), 0.5
    reward = PreferenceReward(pairs, l2=l2)
    rows = [[visible([getattr(c, side) for c in pairs]) for side in "ab"]]
    sign = torch.tensor([[1.0 if c.preferred == "a" else -1.0] for c in pairs], dtype=torch.float64)
    a, b = (torch.tensor([[row[n] for n in reward.weights] for row in side], dtype=torch.float64) for side in rows[0])
    x = sign * (a - b)
    scale = x.pow(2).mean(0).sqrt()
    x = torch.where(scale > 0, x / scale, 0.0)
    w = torch.tensor(list(reward.weights.values()), dtype=torch.float64, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(x @ w).sum() + l2 / 2 * w.pow(2).sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-6


def test_one_choice_and_choices_that_contradict_are_enough():
    a, b = rollout(True, 0), rollout(False, 2)
    one = PreferenceReward([Choice(a, b, "a"), Choice(a, b, "tie")])
    assert one([a])[0] > one([b])[0] and all(map(math.isfinite, one.weights.values()))
    torn = PreferenceReward([Choice(a, b, "a"), Choice(b, a, "a")])
    assert torn([a])[0] == pytest.approx(torn([b])[0])
    same = PreferenceReward([Choice(a, a, "a")])
    assert same([a, b]) == [0, 0] and same([]) == []


def test_members_disagree_where_little_was_said():
    sure, torn = PreferenceReward(choices(400), members=9), PreferenceReward(choices(4), members=9)
    pairs = [(c.a, c.b) for c in choices(30, seed=2)]
    assert np.mean(torn.disagreement(pairs)) > 2 * np.mean(sure.disagreement(pairs))
    assert PreferenceReward(choices(400)).disagreement(pairs) == [0.0] * 30
    assert identity(sure) != identity(torn) and identity(sure) == identity(PreferenceReward(choices(400), members=9))


def test_choices_live_in_a_file(tmp_path):
    path = tmp_path / "choices.jsonl"
    a, b = rollout(True, 1), rollout(False, 0)
    record_choice(path, Choice(a, b, "a", "ada", "2026-11-28T12:00:00+00:00"))
    record_choice(path, Choice(a, b, "tie", "bob", shown="ba"))
    first, second = read_choices(path)
    assert first == Choice(a, b, "a", "ada", "2026-11-28T12:00:00+00:00")
    assert (second.who, second.shown, second.preferred) == ("bob", "ba", "tie") and second.when.endswith("+00:00")
    with pytest.raises(ValueError, match="'a', 'b' or 'tie'"):
        Choice(a, b, "left")
    for bad in ("{}", "[]", "not json", '{"a": {}, "b": {}, "preferred": "a"}'):
        path.write_text(path.read_text().rstrip("\n").rsplit("\n", 1)[0] + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"choices.jsonl, line 2: (not a choice|Expecting value)"):
            read_choices(path)


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one choice"):
        PreferenceReward([])
    with pytest.raises(ValueError, match="at least one choice"):
        PreferenceReward([Choice(rollout(True, 0), rollout(False, 0), "tie")])
    with pytest.raises(ValueError, match="l2"):
        PreferenceReward(choices(2), l2=0)
