"""Answer rewards against the public scorers, whose formulas are written down here independently."""

import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lib.records import Question
from searchr1_lib.rewards import (
    F1,
    ExactMatch,
    SubstringMatch,
    exact_match,
    f1_score,
    handwritten,
    normalize_answer,
    score,
    substring_match,
)

# --- the public scorers ------------------------------------------------------------------------------------


def public_normalise(s):
    kept = "".join(c for c in s.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def squad_em(prediction, gold):
    return float(public_normalise(prediction) == public_normalise(gold))


def squad_f1(prediction, gold):
    p, g = public_normalise(prediction).split(), public_normalise(gold).split()
    left, shared = list(g), 0
    for word in p:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(p), shared / len(g)
    return 2 * precision * recall / (precision + recall)


def hotpot_f1(prediction, gold):
    p, g = public_normalise(prediction), public_normalise(gold)
    for one, other in ((p, g), (g, p)):
        if one in ("yes", "no", "noanswer") and one != other:
            return 0.0
    return squad_f1(prediction, gold)


def search_r1_em(prediction, golds):
    return float(any(public_normalise(g) == public_normalise(prediction) for g in golds))


def search_r1_substring(prediction, golds):
    return float(any(public_normalise(g) in public_normalise(prediction) for g in golds))


WORDS = (
    "a an the A The yes no noanswer Yes NO Velmora velmora River Ashun 1821 1,821 born-in Bücher Straße İstanbul "
    "e\u0301te été \uff26ull Ünal don't U.S.A. --- ... !? ¿qué? «x» 中文 "
    "\u00a0 \u2003 north an. (the) a-team Th\u0435 \u0410nna"
).split(" ")


def phrase(rng):
    return rng.choice([" ", " ", " ", "\t", ""]).join(rng.choices(WORDS, k=rng.randint(0, 5)))


def noisy(rng, text):
    words = text.split()
    if rng.random() < 0.2:
        rng.shuffle(words)
    out = " ".join(w.upper() if rng.random() < 0.2 else w + rng.choice(["", "", ".", ",", "'s"]) for w in words)
    return rng.choice(["", "the ", "A "]) + out + rng.choice(["", "!", "  "])


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(5)
    out = []
    for _ in range(8000):
        golds = [phrase(rng) for _ in range(rng.randint(1, 3))]
        out.append((noisy(rng, rng.choice(golds)) if rng.random() < 0.6 else phrase(rng), golds))
    return out


def test_normalisation_is_the_public_one(pairs):
    for prediction, golds in pairs:
        for text in (prediction, *golds):
            assert normalize_answer(text) == public_normalise(text)


def test_exact_match_agrees_and_the_only_difference_is_the_empty_answer(pairs):
    agreed = differed = hits = 0
    for prediction, golds in pairs:
        ours, squad = exact_match(prediction, golds), max(squad_em(prediction, g) for g in golds)
        assert squad == search_r1_em(prediction, golds)
        if normalize_answer(prediction) == "":
            assert ours == 0
            differed += squad == 1
        else:
            assert ours == squad
            agreed += 1
            hits += ours == 1
    assert agreed > 5000 and hits > 1000 and differed > 10  # the pairs reach both sides of the rule


def test_f1_agrees_with_hotpotqa_and_differs_from_squad_on_yes_and_no_only(pairs):
    partial = closed = 0
    for prediction, golds in pairs:
        ours = f1_score(prediction, golds)
        assert ours == pytest.approx(max(hotpot_f1(prediction, g) for g in golds), abs=1e-12)
        squad = max(squad_f1(prediction, g) for g in golds)
        if ours != pytest.approx(squad, abs=1e-12):
            assert {"yes", "no", "noanswer"} & {normalize_answer(t) for t in (prediction, *golds)}
            closed += 1
        partial += 0 < ours < 1
    assert partial > 1000 and closed > 10


def test_substring_is_search_r1s_without_parts_of_words(pairs):
    stricter = 0
    for prediction, golds in pairs:
        ours, theirs = substring_match(prediction, golds), search_r1_substring(prediction, golds)
        assert ours <= theirs
        stricter += ours < theirs
        if ours < theirs:
            said = normalize_answer(prediction).split()
            for g in map(normalize_answer, golds):
                assert not g or not any(said[i : i + len(g.split())] == g.split() for i in range(len(said)))
    assert stricter > 10
    assert substring_match("north", ["no"]) == 0 and search_r1_substring("north", ["no"]) == 1


@given(st.text(max_size=40), st.lists(st.text(max_size=40), max_size=3))
def test_bounds_and_order(prediction, golds):
    em, f1, sub = exact_match(prediction, golds), f1_score(prediction, golds), substring_match(prediction, golds)
    assert em in (0, 1) and 0 <= f1 <= 1 and sub in (0, 1)
    assert em <= f1 and em <= sub
    assert normalize_answer(prediction) == public_normalise(prediction)


@pytest.mark.parametrize("prediction", [None, "", "   ", "the", "...", "A!", "\u2003"])
def test_nothing_scores_nothing(prediction):
    assert exact_match(prediction, ["", "the", "..."]) == 0
    assert f1_score(prediction, ["", "the"]) == 0
    assert substring_match(prediction, ["", "the"]) == 0


def test_aliases_and_a_single_string():
    assert exact_match("River Ashun", ["Ashun", "River Ashun"]) == 1
    assert exact_match("Ashun", "Ashun") == 1
    assert exact_match("Ashun", []) == 0 and f1_score("Ashun", []) == 0


def test_yes_and_no_earn_nothing_in_part():
    assert f1_score("yes it is", ["yes"]) == 0
    assert f1_score("No.", ["no"]) == 1
    assert f1_score("yes", ["no"]) == 0


def test_the_rewards_read_the_final_answer():
    q = Question("q", "Where?", ["Velmora"])
    ts = [handwritten(q, [f"<think> x </think><answer> {a} </answer>"]) for a in ("velmora!", "Velmora town", "x")]
    ts.append(handwritten(q, ["<think> Velmora </think>"]))
    assert score(ExactMatch(), ts).values == [1, 0, 0, 0]
    assert score(F1(), ts).values == pytest.approx([1, 2 / 3, 0, 0])
    scores = score(SubstringMatch(), ts)
    assert scores.values == [1, 1, 0, 0] and scores.parts == {"substring_match": [1, 1, 0, 0]}
    assert all(t.reward is None and not t.rewards for t in ts)  # a score is a return value
