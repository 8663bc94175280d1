"""The analysis: tests and intervals against their formulas and by hand, the taxonomy on rollouts written by hand."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lib import metrics
from searchr1_lib.files import TrajectoryLog
from searchr1_lib.metrics import row_of
from searchr1_lib.records import Passage, Question
from searchr1_lib.rewards import SearchR1Reward, handwritten, score
from searchr1_lib.study import analysis
from searchr1_lib.study.evaluate import Report

FIRM = Passage("p1", "Gestath Works", "Gestath Works was founded by Ada Miller.")
ADA = Passage("p2", "Ada Miller", "Ada Miller was a potter.")
TWIN = Passage("p3", "Ida Miller", "Ida Miller was a baker.")
CORPUS = {p.id: p for p in (FIRM, ADA, TWIN)}
BRIDGE = Question(
    "q1", "What was the trade of the founder of Gestath Works?", ["potter"], passages=["p1", "p2"], hops=2, known=False
)
KNOWN = Question("q2", "What did Ida Miller do?", ["baker"], passages=["p3"], known=True)
ASK_FIRM, ASK_ADA = "<search> Gestath Works founded by </search>", "<search> Ada Miller trade </search>"


def rollout(question=BRIDGE, *turns, step=None):
    t = handwritten(question, turns)
    t.step = step
    score(SearchR1Reward(0.15), [t]).keep([t])
    return t


def answer(text, question=BRIDGE, searches=0):
    found = [(ASK_FIRM, [FIRM]), (ASK_ADA, [ADA])]
    return rollout(question, *found[:searches], f"<answer> {text} </answer>")


# ---- tests and intervals ---------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(fixed, broken):
    n = fixed + broken
    wanted = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n)
    assert analysis.mcnemar(fixed, broken) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="got -1 and 3"):
        analysis.mcnemar(-1, 3)


def test_bootstrap_is_the_spread_of_samples_drawn_anew():
    d, hops = np.random.default_rng(1).normal(0.3, 1, 80), np.tile([1, 2], 40)
    drawn = np.random.default_rng(2).multinomial(80, [1 / 80] * 80, size=9999)  # how often each question is drawn
    for weights in (np.ones(80), hops):
        wanted = np.quantile(drawn @ d / (drawn @ weights), (0.025, 0.975))
        assert analysis.bootstrap(d, weights, samples=9999) == pytest.approx(tuple(wanted), abs=0.02)
    assert analysis.bootstrap(d, samples=9999) == analysis.bootstrap(d, np.ones(80), samples=9999)


def test_bootstrap_of_a_ratio_and_of_equal_differences():
    assert analysis.bootstrap([0.25] * 7) == pytest.approx((0.25, 0.25))
    assert analysis.bootstrap([1.0, 2.0], [1.0, 2.0]) == pytest.approx((1.0, 1.0))  # each is 1 per unit of weight
    low, high = analysis.bootstrap([1, 0, 0, 1, 0, 1, 0, 0], samples=500)
    assert 0 <= low < 3 / 8 < high <= 1


@pytest.mark.parametrize("differences, weights", [([], None), ([1.0], [1.0, 2.0])])
def test_bootstrap_refuses(differences, weights):
    with pytest.raises(ValueError, match="at least one"):
        analysis.bootstrap(differences, weights)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for i in range(200):
        low, high = analysis.bootstrap(rng.choice([-1, 0, 1], 60, p=[0.1, 0.5, 0.4]), samples=400, seed=i)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


# ---- pairs -----------------------------------------------------------------------------------------------


def test_pairs_flips_and_changes():
    before = [answer("baker"), rollout(KNOWN, ("<search> Ida Miller </search>", [TWIN]), "<answer> baker </answer>")]
    after = [answer("potter", searches=2), answer("baker", KNOWN)]
    assert analysis.flips(before, after) == (1, 0) and analysis.flips(after, before) == (0, 1)
    assert analysis.paired(before, after[:1], analysis.right) == [(0.0, 1.0)]
    found = {c.name: c for c in analysis.changes(before, after, samples=200)}
    assert (found["exact match, all"].before, found["exact match, all"].after) == (0.5, 1.0)
    assert (found["reward"].before, found["reward"].after) == pytest.approx((0.425, 0.85))
    assert (found["searches per known question"].before, found["searches per known question"].after) == (1.0, 0.0)
    hops = found["searches per hop needed, look-up"]
    assert (hops.n, hops.before, hops.after, hops.low, hops.high) == (1, 0.0, 1.0, 1.0, 1.0)
    assert found["over-search: known, searched"].after == 0.0
    assert found["under-search: look-up, too few"].before == 1.0


def test_changes_agree_with_the_report():
    side = [answer("potter", searches=1), answer("baker", KNOWN), answer("x", KNOWN, searches=1)]
    side[2].question = Question("q3", "?", ["y"], known=True)
    table = Report([row_of(t) for t in side], side).table()
    found = {c.name: c.after for c in analysis.changes(side, side, samples=50)}
    assert found["exact match, known"] == table["known"]["em"]
    assert found["searches per hop needed, look-up"] == table["look-up"]["searches_per_need"]
    assert found["reward"] == pytest.approx(table["all"]["reward"])


def test_several_rollouts_of_a_question_count_as_their_mean():
    before, after = [answer("x"), answer("x")], [answer("x"), answer("potter")]
    assert analysis.paired(before, after, analysis.right) == [(0.0, 0.5)]
    assert analysis.flips(before, after) == (1, 0)


def test_nothing_in_common():
    with pytest.raises(ValueError, match="share no question"):
        analysis.flips([answer("x")], [answer("baker", KNOWN)])


# ---- the taxonomy ----------------------------------------------------------------------------------------

CASES = [
    (None, [(ASK_FIRM, [FIRM]), (ASK_ADA, [ADA]), "<answer> potter </answer>"]),
    (None, ["<answer> a potter </answer>"]),  # right without a search: no error, whatever it cost
    ("did not search", ["<answer> baker </answer>"]),
    ("bad query", [("<search> Gostath works </search>", [TWIN]), "<answer> baker </answer>"]),
    ("passage not found", [(ASK_FIRM, [TWIN]), "<answer> baker </answer>"]),
    ("passage not found", [(ASK_FIRM, []), "<answer> baker </answer>"]),
    ("passage not found", [(ASK_FIRM, [FIRM]), (ASK_ADA, [TWIN]), "<answer> baker </answer>"]),
    ("wrong hop", [(ASK_FIRM, [FIRM]), "<answer> Ada Miller </answer>"]),
    ("wrong hop", [(ASK_FIRM, [FIRM]), ("<search> Ida Miller trade </search>", [TWIN]), "<answer> baker </answer>"]),
    ("found but not used", [(ASK_FIRM, [FIRM]), (ASK_ADA, [TWIN, ADA]), "<answer> baker </answer>"]),
    ("copied wrongly", [(ASK_FIRM, [FIRM]), (ASK_ADA, [TWIN, ADA]), "<answer> pottel </answer>"]),
    ("found but not used", [(ASK_FIRM, [FIRM]), (ASK_ADA, [TWIN, ADA]), "<answer> Ada </answer>"]),  # it was read
    ("malformed", [(ASK_FIRM, [FIRM]), "no tags at all"]),
    ("malformed", ["<answer>  </answer>"]),
    ("cut off", [(ASK_FIRM, [FIRM]), ASK_FIRM]),  # the turns were used up with searches
]


@pytest.mark.parametrize("cause, turns", CASES)
def test_cause(cause, turns):
    t = rollout(BRIDGE, *turns)
    if cause == "malformed" and t.answer is None:
        t.finish_reason = "stop"
    assert analysis.error_of(t, CORPUS) == cause


def test_cause_by_how_the_rollout_ended():
    t = rollout(BRIDGE, "hm", "hm")
    assert t.invalid_turns and t.finish_reason == "turns"
    assert analysis.error_of(t) == "malformed"
    t.finish_reason = "length"
    assert analysis.error_of(t) == "cut off"


def test_a_query_names_a_title_by_its_words_of_weight():
    assert metrics._names("where was Ada Miller born", "Ada Miller")
    assert not metrics._names("The Distant Bridge of D Hatenmora", "The Distant Winter of Stearrott")
    assert metrics._names("the of", "The Of")  # a title of nothing else


def test_cause_without_titles_or_gold_passages():
    t = rollout(BRIDGE, ("<search> Gostath works </search>", [TWIN]), "<answer> baker </answer>")
    assert analysis.error_of(t) == "passage not found"  # without the title nobody can blame the query
    real = Question("n1", "who founded gestath works", ["Ada Miller"])
    for passages, cause in (([FIRM], "found but not used"), ([TWIN], "passage not found")):
        assert analysis.error_of(rollout(real, (ASK_FIRM, passages), "<answer> x </answer>")) == cause


def test_errors_partition_the_wrong_ones():
    ts = [rollout(BRIDGE, *turns) for _, turns in CASES]
    found = analysis.errors(ts, CORPUS)
    assert list(found) == list(analysis.ERRORS)
    wrong = [id(t) for t in ts if not analysis.right(t)]
    assert sorted(id(t) for members in found.values() for t in members) == sorted(wrong)


def log_of(tmp_path, trajectories):
    log = TrajectoryLog(tmp_path / "log.jsonl")
    log.append(trajectories)
    return log.path


def test_query_quality():
    good, bad = rollout(BRIDGE, *CASES[0][1], step=0), rollout(BRIDGE, *CASES[3][1], step=0)
    silent = rollout(KNOWN, "<answer> baker </answer>", step=1)
    assert [analysis.first_query_finds(t) for t in (good, bad, silent)] == [True, False, None]
    assert analysis.query_quality([silent]) is None


def test_the_table_says_what_the_rollouts_say(tmp_path):
    ts = [rollout(BRIDGE, *turns, step=i) for i, (_, turns) in enumerate(CASES)] + [answer("baker", KNOWN)]
    path = log_of(tmp_path, ts)
    table = analysis.read_table(path, CORPUS)
    assert len(table) == len(ts)
    rows = [row_of(t) for t in ts]
    for name in ("em", "searches", "reward", "malformed", "tokens", "known", "hops"):
        assert table[name] == pytest.approx([float(r[name]) for r in rows]), name
    for cause, members in analysis.errors(ts, CORPUS).items():
        assert [table.trajectory(i) for i in table.of_error(cause)] == members
    assert np.isnan(table["step"][-1]) and list(table["step"][:3]) == [1, 2, 3]
    assert np.isnan(table["nothing"]).all() and list(table["rewards/exact_match"]) == [r["em"] for r in rows]
    sure = [analysis.sureness(t) for t in ts]
    assert table["sureness"] == pytest.approx([np.nan if s is None else s for s in sure], nan_ok=True)


def test_a_parts_column_that_begins_late_is_filled_up(tmp_path):
    ts = [answer("x"), answer("y")]
    ts[1].rewards["late"] = 0.5
    table = analysis.read_table(log_of(tmp_path, ts))
    assert np.isnan(table["rewards/late"][0]) and table["rewards/late"][1] == 0.5


def test_rollouts_that_were_made_to_begin_in_a_given_way_are_left_out(tmp_path):
    ts = [answer("x"), answer("forced"), answer("y")]
    ts[1].first_action = "answer"
    table = analysis.read_table(log_of(tmp_path, ts))
    assert len(table) == 2 and [table.trajectory(i).answer for i in range(2)] == ["x", "y"]


def test_a_log_that_was_cut_or_broken(tmp_path):
    path = log_of(tmp_path, [answer("x"), answer("y")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert len(analysis.read_table(path)) == 1
    path.write_bytes(whole.replace(b'"question"', b'"quest', 1))
    with pytest.raises(ValueError, match="log.jsonl, line 1: "):
        analysis.read_table(path)
    path.write_bytes(b"")
    assert len(analysis.read_table(path)) == 0
    with pytest.raises(FileNotFoundError, match="no trajectory log"):
        analysis.read_table(tmp_path / "none.jsonl")


# ---- sureness --------------------------------------------------------------------------------------------


def test_sureness_is_the_probability_of_the_words_without_the_tags():
    t = handwritten(KNOWN, ["<think>ab</think>\n<answer>c</answer>"], probability=0.5)
    assert analysis.sureness(t) == pytest.approx(0.5**3)  # a token a character: a, b, c
    t = handwritten(KNOWN, ["<answer>c</answer>"], probability=0.25)
    t.tokens = ["<ans", "wer>c", "</answer>"]  # a token that straddles tag and word counts
    t.segments[0].end, t.completion_ids, t.mask, t.logprobs = 3, [1, 2, 3], [1] * 3, [-1.0, -2.0, -4.0]
    t.ends = [5, 10, 19]
    assert analysis.sureness(t) == pytest.approx(math.exp(-2.0))
    assert analysis.sureness(answer("x", searches=1)) is None
    assert analysis.sureness(handwritten(KNOWN, ["no answer"])) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 12))
def test_calibration_loses_no_answer(pairs, bins):
    sure, correct = zip(*pairs)
    rows = analysis.calibration([*sure, math.nan], [*correct, 0], bins=bins)
    assert sum(r["n"] for r in rows) == len(pairs)
    assert sum(r["right"] * r["n"] for r in rows) == pytest.approx(sum(correct))
    assert all(r["low"] <= r["right"] + 1e-9 and r["right"] <= r["high"] + 1e-9 for r in rows)
    assert 0 <= analysis.calibration_error(rows) <= 1


def test_calibration_error_by_hand():
    rows = analysis.calibration([0.9] * 10 + [0.15] * 10, [1] * 9 + [0] + [0] * 10)
    assert analysis.calibration_error(rows) == pytest.approx((0.0 * 10 + 0.15 * 10) / 20)
    assert analysis.calibration([math.nan], [0]) == [] and analysis.calibration_error([]) is None


@given(st.integers(1, 200), st.data())
def test_wilson_is_the_textbooks(n, data):
    hits, z = data.draw(st.integers(0, n)), 1.959964
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    wanted = (middle - half) / (n + z * z), (middle + half) / (n + z * z)
    assert analysis.wilson(hits, n) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("hits, n", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(hits, n):
    with pytest.raises(ValueError, match="hits out of"):
        analysis.wilson(hits, n)


# ---- several runs ----------------------------------------------------------------------------------------


def run_row(cost, seed, em=None, **settings):
    figures = {} if em is None else {"exact match": em}
    return {
        "run": f"{cost}-{seed}",
        "error": None if em is not None else "05, cell In [3]: ValueError: no",
        "settings": {"steps": 5, "search_cost": cost, "seed": seed, **settings},
        "figures": figures,
    }


RUNS = [
    run_row(0.5, 0, 0.6),
    run_row(0.5, 1, 0.7),
    run_row(0.5, 2, 0.8),
    run_row(0.05, 0, 0.9),
    run_row(0.05, 1, 0.8),
    run_row(0.05, 2),
]


def test_runs_are_gathered_by_what_differs():
    assert analysis.differing(RUNS) == ["search_cost"] and analysis.differing(RUNS[:3]) == []
    low, high = analysis.by_setting(RUNS, ["search_cost"])
    assert low["setting"] == {"search_cost": 0.05} and (low["runs"], low["failed"]) == (2, 1)
    assert low["figures"]["exact match"] == {
        "mean": pytest.approx(0.85),
        "low": 0.8,
        "high": 0.9,
        "values": [0.9, 0.8],
        "n": 2,
    }
    assert (high["runs"], high["failed"], high["figures"]["exact match"]["n"]) == (3, 0, 3)
    table = analysis.setting_table([low, high], ["exact match", "reward"])
    assert "| 0.05 | 2 | 1 | 0.850 (0.800 to 0.900) | – |" in table and table.startswith("| search_cost | runs")
    mixed = analysis.by_setting([run_row("b", 0, 1.0), run_row(2, 0, 1.0), run_row(10, 0, 1.0)], ["search_cost"])
    assert [g["setting"]["search_cost"] for g in mixed] == [2, 10, "b"]


def test_the_interval_of_runs_is_students():
    stats = pytest.importorskip("scipy.stats")
    values = [0.6, 0.7, 0.95, 0.8]
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert analysis.interval(values) == pytest.approx((wanted.low, wanted.high))
    assert analysis.interval([0.6, 0.7]) == (0.6, 0.7) and analysis.interval([0.5] * 4) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        analysis.interval([])


def test_differences_are_paired_by_seed():
    found = analysis.differences(RUNS, ["search_cost"], "exact match", {"search_cost": 0.5})
    assert found == [({"search_cost": 0.05}, 2, pytest.approx(0.2), pytest.approx(0.1), pytest.approx(0.3))]
    assert analysis.differences(RUNS, ["search_cost"], "exact match", {"search_cost": 9}) == []


# ---- figures to reach ------------------------------------------------------------------------------------


def table(em, searches, per_need, reward):
    return {
        "known": {"em": em, "searches": searches},
        "look-up": {"em": em, "searches_per_need": per_need},
        "all": {"reward": reward},
    }


def test_targets_are_judged_on_both_sides_of_the_line():
    low, high = table(0.5, 0.5, 0.5, 0.4), table(0.98, 0.1, 1.0, 0.9)
    regrets = {"before": 0.2, "after": 0.03, "best simple policy": 0.12}
    rows = analysis.judge(analysis.headline(low, high, [low, table(1, 1, 1, 0.8)], [low], regrets))
    assert [row[2:] for row in rows[:2]] == [(0.2, 0.03, True), (pytest.approx(0.2 / 0.12), 0.25, True)]
    assert [row[0] for row in rows][::2] == ["choice regret", "reward"] and rows[2][-1]
    missed = analysis.judge(analysis.headline(high, low, [low, high], [low], regrets | {"after": 0.031}))
    assert not any(row[-1] for row in missed)
    assert missed[-1][1] == "> 0.900 (always searching) and > 0.400 (never)"


def test_headline_of_questions_of_one_kind_and_without_an_optimum():
    only = {"look-up": {"em": 1.0, "searches_per_need": 1.0}, "all": {"reward": 0.9}}
    figures = analysis.headline(only, only, [only], [only])
    assert [row[0] for row in analysis.judge(figures)] == ["reward"] and "choice regret" not in figures


def test_a_run_has_learned_the_choice_where_it_regrets_little():
    assert analysis.chooses({"choice regret, after": 0.03})
    assert not analysis.chooses({"choice regret, after": 0.04}) and not analysis.chooses({})


# ---- Markdown --------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_no_text_breaks_out_of_a_cell(text):
    _head, _rule, line = analysis.markdown_table(["a", "b"], [[text, 1]]).split("\n")
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 and "<" not in line
    assert not re.search(r"(?<!\\)(?:\\\\)*[`$]", line)


def test_summary_holds_what_was_measured():
    before, after = [answer("baker"), answer("x", KNOWN)], [answer("potter", searches=2), answer("baker", KNOWN)]
    page = analysis.summarise(before, after, CORPUS, transition=110, steps=200)
    assert "200 training steps; known and look-up questions part at step 110" in page
    assert "2 questions fixed, 0 broken: exact McNemar test p = 0.5." in page
    assert '| did not search | a wrong answer from memory, or "unknown" | 2 | 0 |' in page
    assert "| exact match, all | 2 | 0.000 | 1.000 | +1.000 (+1.000 to +1.000) |" in page
    assert "before –, after 100.0%" in page and math.isclose(analysis.mcnemar(2, 0), 0.5)
    assert "do not part" in analysis.summarise(before, after)


def test_the_noise_of_gradients_is_that_of_their_distribution():
    rng = np.random.default_rng(0)
    drawn = rng.normal([3.0, 4.0, 0.0], [1.0, 2.0, 2.0], (2_000, 3))  # |mean|^2 = 25, trace = 1 + 4 + 4
    found = analysis.gradient_noise(analysis.dot_products(drawn, chunk=2))
    assert found["signal"] == pytest.approx(25, rel=0.05) and found["noise"] == pytest.approx(9, rel=0.05)
    assert found["scale"] == pytest.approx(9 / 25, rel=0.08)
    assert found["scale_low"] < 9 / 25 < found["scale_high"]
    # variance 0 and 1; |mean|^2 = 1, of it 1/3 chance; without one of the three the signal is 1, 1 or 0
    by_hand = analysis.gradient_noise(analysis.dot_products(np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])))
    assert by_hand == pytest.approx(
        {"signal": 2 / 3, "noise": 1.0, "scale": 1.5, "scale_low": 0.5, "scale_high": math.inf}
    )
    with pytest.raises(ValueError, match="at least 3"):
        analysis.gradient_noise(drawn[:2, :2])


def test_the_interval_of_the_noise_scale_covers_the_truth():
    rng, inside = np.random.default_rng(3), 0
    for _ in range(200):  # |mean|^2 = 1, trace 32: the scale is 32, read off 64 questions
        found = analysis.gradient_noise(analysis.dot_products(rng.normal(np.eye(32)[0], 1.0, (64, 32))))
        inside += found["scale_low"] <= 32 <= found["scale_high"]
    assert 0.9 <= inside / 200 <= 0.995


def test_larger_batches_agree_more():
    drawn = np.random.default_rng(1).normal([1.0, 0.0, 0.0, 0.0], 2.0, (64, 4))
    one, many = analysis.gradient_agreement(analysis.dot_products(drawn), [1, 32])
    assert one < 0.3 < 0.7 < many
    assert analysis.gradient_agreement(analysis.dot_products(np.ones((4, 3))), [1, 2]) == pytest.approx([1, 1])
    assert analysis.gradient_agreement(np.zeros((2, 3)), [1]) == [0]
    with pytest.raises(ValueError, match="between 1 and 32"):
        analysis.gradient_agreement(analysis.dot_products(drawn), [33])
