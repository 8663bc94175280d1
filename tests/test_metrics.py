"""What a trajectory amounts to: each word by hand, on rollouts of every kind of question."""

import subprocess
import sys

import pytest

from searchr1_lib import metrics
from searchr1_lib.records import Hit, Passage, Question, SearchCall, Segment, Trajectory

GOLD, OTHER = Passage("p1", "Gestath Works", "It was founded by Ada Miller."), Passage("p2", "Ida", "A baker.")


def question(known, hops=2):
    return Question("q", "Who founded Gestath Works?", ["Ada Miller"], passages=["p1"], hops=hops, known=known)


def rolled(known, *returned, answer="ada miller.", **fields):
    """A rollout whose searches returned these passages, one each."""
    calls = [SearchCall("works", [Hit(passage, 1.0)], 0.0) for passage in returned]
    return Trajectory(question(known), [1], [1, 2], [1, 0], [0.0] * 2, calls=calls, answer=answer, **fields)


@pytest.mark.parametrize(
    "known, need, knowledge, over, under",
    [
        (True, 0, "known", [False, True, True], [False] * 3),
        (False, 2, "look-up", [False] * 3, [True, True, False]),
        (None, None, "unknown", [None] * 3, [None] * 3),  # nobody knows what an unknown question needs
    ],
)
def test_what_was_needed_and_what_was_done(known, need, knowledge, over, under):
    assert metrics.need(question(known)) == need and metrics.knowledge(question(known)) == knowledge
    ts = [rolled(known, *[OTHER] * searches) for searches in range(3)]
    assert [metrics.searched(t) for t in ts] == [False, True, True]
    assert [metrics.over_search(t) for t in ts] == over and [metrics.under_search(t) for t in ts] == under
    assert [metrics.row_of(t)["need"] for t in ts] == [need] * 3


def test_right_and_malformed():
    assert metrics.right(rolled(True)) is True and metrics.right(rolled(True, answer="Ida")) is False
    assert metrics.right(rolled(True, answer=None)) is False
    assert not metrics.malformed(rolled(True)) and metrics.malformed(rolled(True, invalid_turns=1))


def test_the_first_act():
    kinds = {"search": ["text", "think", "search", "answer"], "answer": ["answer", "search"], "neither": ["text"]}
    for act, segments in kinds.items():
        t = rolled(True, segments=[Segment("policy", kind, "", 0, 0, 0) for kind in segments])
        assert metrics.first_act(t) == act


def test_what_the_searches_returned():
    both = rolled(False, OTHER, GOLD)
    assert metrics.passages_read(both) == [OTHER, GOLD]
    assert metrics.first_query_finds(both) is False and metrics.first_query_finds(rolled(False, GOLD)) is True
    assert metrics.first_query_finds(rolled(False)) is None
    assert metrics.answer_retrieved(both) and not metrics.answer_retrieved(rolled(False, OTHER))
    assert metrics.holds_answer(GOLD, question(None)) and not metrics.holds_answer(OTHER, question(None))
    both.question.passages = []
    assert metrics.first_query_finds(both) is None


def test_no_variance():
    assert metrics.no_variance([0.1 + 0.2, 0.3]) and metrics.no_variance([0.5] * 3)
    assert metrics.no_variance([0.0, metrics.EQUAL_REWARDS]) and not metrics.no_variance([0.0, 2e-6])
    assert not metrics.no_variance([1.0])  # one rollout is no group
    assert not metrics.no_variance([None, None]) and not metrics.no_variance([])


def test_the_rows_and_their_means():
    rows = [metrics.row_of(t) for t in (rolled(True, GOLD, reward=1.0), rolled(False, OTHER, answer="x"), rolled(None))]
    assert {name: len(part) for name, part in metrics.groups(rows).items()} == {
        "known": 1,
        "look-up": 1,
        "look-up, 2+ hops": 1,
        "all": 3,
    }
    table = metrics.means(rows)
    assert (table["n"], table["em"], table["searched"]) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert table["searches_per_need"] == 0.5  # on the look-up question: one search of two
    assert (table["over_search"], table["under_search"]) == (0.5, 0.5)  # of the two of which one can say
    assert table["reward"] == 1.0 and metrics.mean(rows[1:], "reward") is None
    assert set(metrics.METRICS) <= set(rows[0]) and metrics.means(rows[:1])["searches_per_need"] is None


def test_pairs_and_groups():
    first, second = rolled(True), rolled(True)
    other = rolled(True)
    other.question.id = "another"
    assert metrics.pairs([first, other], [second, first]) == [([first], [second, first])]
    with pytest.raises(ValueError, match="share no question"):
        metrics.pairs([first], [other])
    assert metrics.grouped("banana", str.upper) == {"B": ["b"], "A": ["a", "a", "a"], "N": ["n", "n"]}


def test_it_loads_nothing_heavy():
    heavy = "numpy torch scipy transformers pyarrow"
    code = f"import sys, searchr1_lib.metrics; sys.exit(str(set({heavy.split()}) & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
