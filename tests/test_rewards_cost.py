"""Search efficiency, process and length rewards, against formulas worked out by hand."""

import itertools
import math

import pytest

from searchr1_lib.records import Passage, Question
from searchr1_lib.rewards import (
    F1,
    IKEA,
    OTC,
    ConfidentSearch,
    ExactMatch,
    Format,
    InformationGain,
    OverlongPenalty,
    RepeatedSearch,
    Retrieval,
    SearchCost,
    SearchR1Format,
    format_errors,
    handwritten,
    score,
    search_confidence,
)

Q = Question("q1", "Where was the founder of X born?", ["Velmora"], passages=["p1", "p2"])
P1, P2 = Passage("p1", "X", "X was founded by Ada."), Passage("p2", "Ada", "Born in Velmora.")
P3 = Passage("p3", "Y", "y")
RIGHT, WRONG = "<think> b </think>\n<answer> Velmora </answer>", "<think> b </think>\n<answer> Tarn </answer>"


def ask(query="X founder", found=(P3,)):
    return f"<think> a </think>\n<search> {query} </search>", list(found)


def searching(n, last=RIGHT, **more):
    return handwritten(Q, [ask(f"query {i}") for i in range(n)] + [last], **more)


def test_search_cost_counts_what_the_model_asked_for():
    refused = handwritten(Q, [ask(), "<think> a </think>\n<search> again </search>"])
    empty = handwritten(Q, ["<think> a </think>\n<search> </search>", RIGHT])
    ts = [searching(0), searching(2), refused, empty]
    scores = score(SearchCost(0.25), ts)
    assert scores.values == [0, -0.5, -0.5, -0.25]
    assert scores.turns[1:3] == [[-0.25, -0.25, 0], [-0.25, -0.25]]
    with pytest.raises(ValueError, match="SearchCost: cost must be greater than or equal to 0, got -0.1"):
        SearchCost(-0.1)


def test_otc_follows_the_papers_three_cases():
    none_needed = [searching(0), searching(1), searching(3), searching(0, WRONG)]
    assert score(OTC(c=4), none_needed).values == pytest.approx(
        [1, math.cos(math.pi / 6), math.cos(3 * math.pi / 10), 0]
    )
    two_needed = [searching(2), searching(3), searching(1, WRONG), searching(0, WRONG)]
    f = 2 * 2 * 3 / 5
    assert score(OTC(), two_needed).values == pytest.approx([1, math.sin(f * math.pi / 4), 0, 0])
    assert score(OTC(alpha=0.5), [searching(2)]).values == pytest.approx([0.5])
    assert score(OTC(), [searching(2, WRONG)]).values == [0]


def test_otc_compares_within_the_group_only():
    a, b = searching(0, group="a"), searching(2, group="b")
    assert score(OTC(), [a, b]).values == pytest.approx([1, 1])
    b.group = "a"
    assert score(OTC(), [a, b]).values[1] < 1


def test_otc_factor_falls_with_searches_and_never_below_zero():
    otc = OTC(c=4)
    for n in range(5):
        factors = [otc.tool_factor(m, n) for m in range(n, 12)]
        assert factors[0] == pytest.approx(1) and all(x > y > 0 for x, y in itertools.pairwise(factors))


def test_ikea_table():
    malformed = handwritten(Q, ["<answer> Velmora </answer>"])
    ts = [
        searching(0),
        searching(1),
        searching(2),
        searching(3),
        searching(5),
        searching(2, WRONG),
        searching(0, WRONG),
        malformed,
    ]
    assert score(IKEA(), ts).values == pytest.approx([1.6, 1.4, 1.2, 1.0, 1.0, 0.05, 0, -1])


def test_confident_search_reads_the_least_likely_token_of_the_searches():
    sure, unsure = searching(1, probability=0.9), searching(1, probability=0.9)
    search = next(s for s in unsure.segments if s.kind == "search")
    unsure.logprobs[search.start + 10] = math.log(0.3)
    assert search_confidence(sure) == pytest.approx(0.9) and search_confidence(unsure) == pytest.approx(0.3)
    elsewhere = searching(1, probability=0.9)
    elsewhere.logprobs[0] = math.log(0.01)  # a think token
    none = searching(0, probability=0.1)
    ts = [sure, unsure, elsewhere, none, searching(1, WRONG)]
    assert score(ConfidentSearch(threshold=0.4), ts).values == [1, 0, 1, 1, 0]
    assert score(ConfidentSearch(F1(), threshold=0.2), [unsure]).values == [1]


def test_overlong_penalty_is_dapos_and_counts_the_models_tokens_only():
    t = searching(2)
    written = sum(t.mask)
    assert written < len(t.mask)
    for allowed, buffer, want in [
        (written + 50, 50, 0),
        (written, 50, -1),
        (written + 25, 50, -0.5),
        (written - 1, 10, -1),
        (written + 10, 40, -0.75),
    ]:
        assert score(OverlongPenalty(allowed, buffer), [t]).values == pytest.approx([want])
    with pytest.raises(ValueError, match="buffer"):
        OverlongPenalty(10, 0)


def test_overlong_penalty_is_trls():
    trl = pytest.importorskip("trl.rewards")
    public = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=40)
    ts = [handwritten(Q, ["x" * n]) for n in range(140)]
    assert score(OverlongPenalty(100, 40), ts).values == pytest.approx(
        public(completion_ids=[t.completion_ids for t in ts])
    )


@pytest.mark.parametrize(
    "turns, error",
    [
        ([RIGHT], None),
        ([ask(), RIGHT], None),
        (["<think> 5 < 6 and 7 > 3 </think><answer>x</answer>"], None),
        (["<answer> x </answer>"], "answer in turn 0, expected think"),
        ([ask(), "<answer> x </answer>"], "answer in turn 1, expected think"),
        (["hm <think> a </think><answer> x </answer>"], "text in turn 0"),
        (["<think> a </think> so <answer> x </answer>"], "text in turn 0"),
        (["<think> a </think><think> b </think><answer> x </answer>"], "think in turn 0, expected search or answer"),
        (["<think> a <answer> x </answer>"], "nested"),
        (["<think> a </think><answer> x"], "text in turn 0"),
        (["<think> a </think><information>Velmora</information><answer> x </answer>"], "text in turn 0"),
        (["<think> a </think>\n<search> </search>", RIGHT], "empty search"),
        (["<think> a </think>\n<search> never executed </search>"], "ends without an answer"),
        (["nothing at all", RIGHT], "text in turn 0"),
        ([], "empty completion"),
    ],
)
def test_format_state_machine(turns, error):
    t = handwritten(Q, turns)
    errors = format_errors(t)
    assert bool(errors) == bool(error) and (not error or error in "; ".join(errors))
    assert score(Format(), [t]).values == [float(not error)]


def test_search_r1_format_table():
    badly_right = handwritten(Q, ["<answer> Velmora </answer>"])
    badly_wrong = handwritten(Q, ["<answer> Tarn </answer>"])
    found_wrong = handwritten(Q, [ask(found=[P2]), WRONG])
    ts = [searching(1), badly_right, searching(1, WRONG), found_wrong, badly_wrong, handwritten(Q, ["x"])]
    assert score(SearchR1Format(), ts).values == pytest.approx([1, 0.8, 0.2, 0.2, 0.1, 0])
    assert score(SearchR1Format(retrieval=0.1), ts).values == pytest.approx([1, 0.8, 0.2, 0.3, 0.1, 0])


def test_information_gain_pays_each_gold_passage_once_in_its_turn():
    t = handwritten(Q, [ask("a", [P3]), ask("b", [P1, P3]), ask("c", [P1]), ask("d", [P2]), RIGHT])
    scores = score(InformationGain(), [t])
    assert scores.values == [1] and scores.turns == [[0, 0.5, 0, 0.5, 0]]
    # seen before: P3 of the second search, P1 of the third
    scores = score(InformationGain(redundancy=0.5), [t])
    assert scores.values == pytest.approx([0.25])
    assert scores.turns[0] == pytest.approx([0, 0.25, -0.5, 0.5, 0])


def test_without_gold_passages_the_answer_is_what_is_to_be_found():
    q = Question("q", "?", ["Velmora"])
    t = handwritten(q, [ask("a", [P3]), ask("b", [P2]), ask("c", [P2]), RIGHT])
    scores = score(InformationGain(), [t])
    assert scores.values == [1] and scores.turns == [[0, 1, 0, 0]]
    assert score(Retrieval(), [t]).values == [1] and score(Retrieval(), [searching(1)]).values == [0]


def test_gain_stands_in_the_turn_of_its_search_even_after_a_failed_turn():
    t = handwritten(Q, ["no action here", ask("a", [P1]), "<think> c </think><search> refused </search>"])
    score(InformationGain(), [t]).keep([t])
    assert t.turn_rewards == [0, 0.5, 0]


def test_repeated_and_empty_searches_are_fined():
    empty = "<think> </think><search>  </search>"
    t = handwritten(Q, [ask("Ada born"), ask("ada  BORN!"), ask("Ada died"), empty, RIGHT])
    scores = score(RepeatedSearch(0.1), [t])
    assert scores.values == pytest.approx([-0.2])
    assert scores.turns[0] == pytest.approx([0, -0.1, 0, -0.1, 0])


def test_all_are_finite_on_an_empty_rollout():
    t = handwritten(Q, [""])
    for r in (
        SearchCost(),
        OTC(),
        IKEA(),
        ConfidentSearch(),
        OverlongPenalty(10, 5),
        Format(),
        SearchR1Format(),
        Retrieval(),
        InformationGain(),
        RepeatedSearch(),
        ExactMatch(),
    ):
        assert score(r, [t]).values[0] in (0, -1)
