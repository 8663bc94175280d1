"""Labellers, the pairs worth asking about, and the loop of asking, fitting and training."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from searchr1_lib.records import Passage, Question
from searchr1_lib.rewards import Choice, Discounted, PreferenceReward, handwritten, read_choices, record_choice, visible
from searchr1_lib.study import feedback
from searchr1_lib.study.feedback import FeedbackLoop, People, Scripted, WaitingForLabels, WellFounded

TRUE = Discounted(0.2, 0.1)
SURE = {"I am certain": 0.95, "I think": 0.55, "I faintly recall": 0.2}


def rollout(number, rng):
    """A rollout of the almanac's kind: trusts what it recalls, says unknown, or searches once or twice."""
    right, act, said = rng.random(), rng.choice(["trust", "unknown", "search", "search twice"]), rng.choice([*SURE])
    q = Question(f"q{number}", "Where was Ada born?", ["Velmora"], passages=["p"])
    if act == "unknown":
        turns = ["<think> I recall nothing. </think>\n<answer> unknown </answer>"]
    elif act == "trust":
        answer = "Velmora" if right < SURE[said] else "Tarn"
        turns = [f"<think> Ada was born in {answer}, {said}. </think>\n<answer> {answer} </answer>"]
    else:
        found, asks = right < 0.85, 1 + (act == "search twice")
        passage = Passage("p" if found else "n", "Ada", f"Ada was born in {'Velmora' if found else 'Sorn'}.")
        ask = "<think> I recall nothing. </think>\n<search> Ada {} </search>"
        answer = "Velmora" if found else "Tarn"
        turns = [(ask.format(i), [passage]) for i in range(asks)]
        turns += [f"<think> It says. </think>\n<answer> {answer} </answer>"]
    return handwritten(q, turns, group=q.id)


def pool(groups=60, size=4, seed=0):
    rng = random.Random(seed)
    return [rollout(number, rng) for number in range(groups) for _ in range(size)]


def test_learned_rewards_see_nothing_of_the_truth():
    """Other answers, gold passages, known and hops of the questions: every learned reward says the same."""
    ts = pool()
    choices = Scripted(TRUE)(feedback.pairs_of(ts))
    other = [
        replace(t, question=Question(t.question.id, t.question.text, ["Nowhere"], passages=["x"], hops=3)) for t in ts
    ]
    for t in other:
        t.question.known = True
    reward = PreferenceReward(choices, members=3)
    assert reward(other) == reward(ts) and visible(other) == visible(ts)
    assert TRUE(other) != TRUE(ts)
    blind = [replace(c, a=o, b=p) for c, o, p in zip(choices, other, other[1:])]
    assert PreferenceReward(blind).weights.keys() <= visible(ts)[0].keys() | {n for row in visible(ts) for n in row}


def test_more_labels_agree_better_and_sureness_is_learned():
    pairs, held_out = feedback.pairs_of(pool()), Scripted(TRUE)(feedback.pairs_of(pool(seed=1)))
    agreed = {}
    for count in (8, 200):
        asked = feedback.choose_pairs(pairs, count, random.Random(0))
        agreed[count] = feedback.agreement(PreferenceReward(Scripted(TRUE)(asked)), held_out)
    assert agreed[200] > agreed[8] and agreed[200] > 0.75
    weights = PreferenceReward(Scripted(TRUE)(pairs)).weights
    assert weights["says I am certain"] > weights["says I faintly recall"] and weights["answer_was_read"] > 0


def test_what_is_well_founded():
    worth = lambda *turns: WellFounded(0.2, 0.1)([handwritten(Question("q", "Where?", ["Velmora"]), turns)])[0]
    assert worth("<think> In Tarn, I think. On the Trem, I am certain. </think><answer> Trem </answer>") == 0.55 * 0.95
    ask = ("<think> I recall nothing. </think><search> Ada </search>", [Passage("p", "Ada", "Ada, of Velmora.")])
    assert worth(ask, ask, "<think> Of Velmora. </think><answer> Velmora </answer>") == pytest.approx(0.95 * 0.64)
    assert worth("<think> I recall nothing. </think><answer> unknown </answer>") == 0.1
    assert worth("<think> I recall nothing. </think>") == 0.0


def test_a_scripted_labeller_says_the_same_of_a_pair_in_either_order():
    pairs = feedback.pairs_of(pool(groups=20))
    labeller = Scripted(TRUE, noise=0.3)
    winner = lambda c: getattr(c, c.preferred).text
    assert [c.preferred for c in labeller(pairs)] == [c.preferred for c in labeller(pairs)]
    assert {c.shown for c in labeller(pairs)} == {"ab", "ba"}
    sure = [c for c in Scripted(TRUE)(pairs) if c.preferred != "tie"]
    assert sure and all(TRUE([getattr(c, c.preferred)])[0] == max(TRUE([c.a, c.b])) for c in sure)
    wrong = [winner(n) != winner(c) for n, c in zip(labeller([(c.a, c.b) for c in sure]), sure)]
    assert 0.05 < sum(wrong) / len(wrong) < 0.5


def test_biases_are_what_they_say():
    pairs = feedback.pairs_of(pool(groups=20))
    longer = Scripted(lambda ts: [0.0] * len(ts), bias={"model_tokens": 1.0})(pairs)
    assert all(
        sum(getattr(c, c.preferred).mask) == max(sum(c.a.mask), sum(c.b.mask)) for c in longer if c.preferred != "tie"
    )
    first = Scripted(lambda ts: [0.0] * len(ts), first=1.0)(pairs)
    assert all(c.preferred == c.shown[0] for c in first)


def test_pairs_worth_asking_about():
    ts = pool()
    pairs, rng = feedback.pairs_of(ts), random.Random(0)
    assert all(a.group == b.group and a.text != b.text for a, b in pairs)
    reward = PreferenceReward(Scripted(TRUE)(pairs[:20]), members=7)
    asked = feedback.choose_pairs(pairs, 40, rng, reward)
    assert len({a.question.id for a, _ in asked}) == 40, "one of each question before a second one"
    mean = lambda xs: sum(xs) / len(xs)
    assert mean(reward.disagreement(asked)) > mean(reward.disagreement(feedback.choose_pairs(pairs, 40, rng)))
    twice = [*pairs, *((b, a) for a, b in pairs)]
    assert len(feedback.choose_pairs(twice, 10**6, rng)) <= len(pairs)


def test_people_label_from_a_queue_and_may_differ(tmp_path):
    people, pairs = People(tmp_path), feedback.choose_pairs(feedback.pairs_of(pool()), 4, random.Random(0))
    assert people(pairs) == [] and people.disagreement() is None
    assert people(pairs) == [] and len(people.queue()) == 4, "asking again adds nothing"
    for who, preferred in (("ada", "a"), ("bob", "b")):
        for a, b in people.waiting(who)[:3]:
            record_choice(people.file(who), Choice(a, b, preferred, who))
    assert len(people.waiting("ada")) == 1 and people.disagreement() == 1.0
    assert {c.who for c in people(pairs)} == {"ada", "bob"} and all(c.when for c in people(pairs))
    with pytest.raises(ValueError, match="letters"):
        people.file("../ada")


def test_the_onset_of_hacking():
    rising, peak = [i / 20 for i in range(20)], [min(i, 20 - i) / 20 for i in range(20)]
    assert feedback.onset(rising, peak, window=1) == 11
    assert feedback.onset(rising, rising) is None, "both rise"
    assert feedback.onset(peak, peak) is None, "both fall"
    assert feedback.onset([0.1], [0.1]) is None


@pytest.fixture(scope="module")
def world():
    from searchr1_lib.search.bm25 import BM25Search
    from searchr1_lib.worlds.almanac import build_world, sample_questions

    world = build_world(0)
    return sample_questions(world, "train", 40, seed=0), BM25Search(world.passages)


def loop(folder: Path, world, labeller, **how):
    from searchr1_lib.training.policy import load_policy
    from searchr1_lib.training.settings import Settings

    settings = Settings(
        steps=1,
        questions_per_step=2,
        num_generations=4,
        learning_rate=1e-3,
        max_turn_tokens=110,
        max_completion_length=900,
        kl_every=0,
    )
    how = {"rounds": 2, "labels": 6, "pool": 6, "members": 3, "truth": TRUE} | how
    return FeedbackLoop(load_policy("data/tiny_qwen", device="cpu"), *world, labeller, settings, folder, **how)


def adapter(folder: Path) -> bytes:
    return (folder / "round_2" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_loop_goes_on_where_it_was_and_ends_the_same(tmp_path, world):
    whole = loop(tmp_path / "whole", world, Scripted(TRUE))
    rows = whole.run()
    assert (
        [row["labels"] for row in rows] == [6, 12] and rows[0]["learned"] is None and rows[1]["agreement"] is not None
    )
    assert {c.who for c in whole.choices()} == {"scripted"} and whole.reward is not None

    asked = []

    def interrupted(pairs):
        if len(asked) == 1:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(pairs)
        return Scripted(TRUE)(pairs)

    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "cut", world, interrupted).run()
    again = loop(tmp_path / "cut", world, interrupted)
    assert again.run() == rows and adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert loop(tmp_path / "cut", world, None).run() == rows, "all is done: nobody is asked"


def test_the_loop_waits_for_people(tmp_path, world):
    people = People(tmp_path / "desk")
    with pytest.raises(WaitingForLabels, match="6 of 6 pairs.*queue.jsonl"):
        loop(tmp_path / "run", world, people, rounds=1).run()
    record_choice(people.file("ada"), *(replace(c, who="ada") for c in Scripted(TRUE)(people.waiting("ada"))))
    assert loop(tmp_path / "run", world, people, rounds=1).run()[0]["labels"] == 6
    rows = [json.loads(line) for line in (tmp_path / "run" / "round_1" / "labels.jsonl").open()]
    assert all(row["who"] == "ada" and row["when"] and row["shown"] in ("ab", "ba") for row in rows)
    assert len(read_choices(tmp_path / "run" / "round_1" / "labels.jsonl")) == 6


def test_states_of_the_frozen_model(world):
    from searchr1_lib.training.policy import load_policy
    from searchr1_lib.training.rollout import rollout as sample

    policy = load_policy("data/tiny_qwen", device="cpu")
    questions, engine = world
    ts = sample(policy, questions[:6], engine, num_generations=4, max_turn_tokens=110, max_completion_length=900)
    see = feedback.states(policy)
    whole, alone = see(ts), [see([t])[0] for t in ts]
    assert all(x == pytest.approx(y, abs=1e-4) for x, y in zip(whole, alone)), "padding does not matter"
    choices = Scripted(TRUE)(feedback.pairs_of(ts))
    reward = PreferenceReward(choices, see=see, l2=1.0)
    assert feedback.agreement(reward, choices) > 0.9
