"""The viewer: exact text, nothing forged, small pages, widgets driven through their traits."""

import html
import json
import math
import random
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.environment.protocol import observation, split_turn
from searchr1_lib.metrics import no_variance
from searchr1_lib.records import Hit, Passage, Question, SearchCall, Segment, Trajectory
from searchr1_lib.rewards import read_choices
from searchr1_lib.study.microscope import Reading
from searchr1_lib.study.viewer import (
    ANY,
    OUTCOMES,
    SORTS,
    ask,
    browse,
    colors,
    compare,
    groups,
    paired_outcomes,
    prefer,
    render_comparison,
    render_credit,
    render_html,
    render_side_by_side,
    render_text,
    render_weights,
    select,
    show,
    show_credit,
    weigh,
    weighted,
)
from searchr1_lib.training.rollout import token_ends

GOLD = Passage("p1", "Mirel Vondash", "Mirel Vondash, a glassblower, was born in Taimbford, Norrein in 1871.")
NEAR = Passage("p2", "Mirel Vondick", "Mirel Vondick was a judge born in Ouldmora, Halvia.")
QUESTION = Question(
    "q1", "Where was Mirel Vondash born?", ["Taimbford"], passages=["p1"], known=False, source="almanac"
)


def build(question, parts, *, seed=0, split=r"\s?\w+|\W", **fields):
    """A trajectory from turns: strings of the model, and ``SearchCall``s whose observation is written by protocol."""
    rng = random.Random(seed)
    t = Trajectory(question, [1, 2, 3], [], [], [], prompt=f"Question: {question.text}\n", **fields)
    for part in parts:
        ours = isinstance(part, str)
        text = part if ours else observation([h.passage for h in part.result])
        spans = split_turn(part) if ours else [("information", 0, len(text))]
        tokens, at = re.findall(split, text, re.S), 0
        places = []
        for token in tokens:
            places.append((at, at + len(token)))
            at += len(token)
        assert at == len(text)
        base = len(t.tokens)
        for kind, a, b in spans:
            inside = [i for i, (x, y) in enumerate(places) if x < b and y > a]
            t.segments.append(
                Segment(
                    "policy" if ours else "environment",
                    kind,
                    text[a:b],
                    t.turns,
                    base + inside[0],
                    base + inside[-1] + 1,
                )
            )
        t.tokens += tokens
        t.ends += [len(t.text) - at + end for _, end in places]
        t.completion_ids += [hash(x) % 4000 for x in range(len(tokens))]
        t.mask += [int(ours)] * len(tokens)
        t.logprobs += [math.log(rng.betavariate(3, 0.4) + 1e-6) if ours else 0.0 for _ in tokens]
        if not ours:
            t.calls.append(part)
            t.turns += 1
    t.turns += 1
    found = re.findall(r"<answer>(.*?)</answer>", t.model_text)
    t.answer, t.finish_reason = (found[-1].strip(), "answer") if found else (None, "turns")
    t.token_values["entropy"] = [-p * m for p, m in zip(t.logprobs, t.mask)]
    return t


def found(query="Mirel Vondash born", passages=(GOLD, NEAR)):
    return SearchCall(query, [Hit(p, 7.5 - i) for i, p in enumerate(passages)], 0.0004)


def group_of(size=8, seed=0):
    """A group of one look-up question: some search and answer right, some guess."""
    made = []
    for i in range(size):
        if i % 2:
            parts = [
                "<think> I recall nothing of Mirel Vondash. </think><search> Mirel Vondash born </search>",
                found(),
                "<think> Mirel Vondash was born in Taimbford. </think><answer> Taimbford </answer>",
            ]
        else:
            parts = ["<think> I recall nothing of Mirel Vondash. </think><answer> Ouldmora </answer>"]
        t = build(QUESTION, parts, seed=seed + i, group="g", step=3)
        right = float(t.answer == "Taimbford")
        t.rewards = {"exact_match": right, "search_cost": -0.15 * len(t.searches)}
        t.reward = sum(t.rewards.values())
        made.append(t)
    mean = sum(t.reward for t in made) / size
    for t in made:
        t.advantages = [t.reward - mean] * len(t.mask)
    return made


class _Page(HTMLParser):
    """Reads a page: its text, its tags, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


ALLOWED = set(
    "meta div style section article h3 h4 h5 p b small strong span table tr th td details summary code ol li "
    "mark br i ins".split()
)


def test_a_group_shows_all_that_the_reader_needs():
    page = _Page(render_html(group_of(), title="Step 3"))
    assert set(page.seen) <= ALLOWED
    for expected in (
        "Step 3",
        "Where was Mirel Vondash born?",
        "gold answer: Taimbford",
        "look-up",
        "exact_match",
        "search_cost",
        "✓ Taimbford",
        "✗ Ouldmora",
        "★ gold",
        "score 7.5",
        "by the environment",
        "0.85",
    ):
        assert expected in page.text, expected
    assert page.text.count("★ gold") == 4  # one per search, and none on the near-duplicate
    assert "no variance" not in page.text


def test_every_character_of_a_completion_is_shown():
    for color in ("mask", "logprob", "advantage", "entropy"):
        t = group_of(2)[1]
        page = _Page(render_html([t], color=color))
        for segment in t.segments:
            assert re.sub("\n+", lambda m: "↵" * len(m[0]), segment.text) in page.text


def test_mask_mode_tells_who_wrote_what():
    t = group_of(2)[1]
    page = render_html([t])
    after_legend = page.split("</style>")[1].split("</p>", 1)[1]
    ours = "".join(re.findall(r"<span class=m>(.*?)</span>", after_legend, re.S))
    theirs = "".join(re.findall(r"<i>(.*?)</i>", after_legend, re.S))
    assert html.unescape(ours) == t.model_text
    assert GOLD.text in theirs and GOLD.text not in ours


def hovered(page):
    """What a page's rollouts say in a colour or with values, as (class, values, text)."""
    page = "".join(re.findall("<div class=said>.*?</div>", page, re.S))
    found = re.findall(r'<(?:ins|span)(?: class=(\w+))?(?: title="?([^">]*)"?)?>(.*?)</(?:ins|span)>', page, re.S)
    return [(css, value, html.unescape(text)) for css, value, text in found]


def test_values_stand_on_hover_and_grow_with_surprise():
    t = build(QUESTION, ["<answer> x y </answer>"], split=r"\s?\w+|\W|$")
    t.logprobs = [math.log(p) for p in (0.003, 0.95, 0.9999, 0.9999, 0.93, 0.21, 0.4, 0.91)]
    t.tokens = ["<answer", ">", " ", "x", " y", " </", "ans", "wer>"]
    t.mask, t.completion_ids, t.token_values, t.ends = [1] * 8, [0] * 8, {}, token_ends([x.encode() for x in t.tokens])
    t.segments = [Segment("policy", "answer", t.text, 0, 0, 8)]
    drawn = hovered(render_html([t], color="logprob"))
    assert drawn == [
        ("u5", "0.003", "<answer"),
        ("", "0.95 1×2 0.93", "> x y"),
        ("u2", "0.21", " </"),
        ("u2", "0.4", "ans"),
        ("", "0.91", "wer>"),
    ]
    t.advantages = [-0.5] * len(t.mask)
    drawn = hovered(render_html([t], color="advantage"))
    assert drawn[0] == ("n5", "-0.498", "<answer")  # A (1 - p) = -0.5 * 0.997 = -0.4985
    assert drawn[2] == ("", "+0.000×2", " x")  # -0.00005, at three decimals
    t.advantages = []
    with pytest.raises(ValueError, match="mask, logprob"):
        render_html([t], color="advantage")


@settings(max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6) | st.floats(-1e-6, 1e-6) | st.just(math.nan), min_size=1, max_size=30))
def test_every_value_can_be_read_back_from_the_page(values):
    t = Trajectory(QUESTION, [], [0] * len(values), [1] * len(values), [0.0] * len(values))
    t.tokens = [f"{i};" for i in range(len(values))]
    t.ends = token_ends([token.encode() for token in t.tokens])
    t.segments = [Segment("policy", "text", "".join(t.tokens), 0, 0, len(values))]
    t.token_values["kl"] = values
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return
    shown = []
    for css, listed, text in hovered(render_html([t], color="kl")):
        for value, times in re.findall(r"([^\s×]+)(?:×(\d+))?", listed):
            shown += [float(value)] * (text.count(";") if css else int(times or 1))
    assert shown == pytest.approx(finite, abs=max(0.006 * max(map(abs, finite)), 1e-9))


def test_the_badge_of_a_group_without_variance():
    same = group_of(4)
    for t in same:
        t.reward = 0.85
    assert no_variance([t.reward for t in same]) and "no variance: every reward is 0.85" in render_html(same)
    assert "no variance" not in render_html(same[:1])


NASTY = st.text(
    st.sampled_from(list("<>&\"'/$\\ab \n\t\x00\u202e\u200b\ufeff\ud800é字")) | st.characters(), max_size=40
) | st.sampled_from(["<script>alert(1)</script>", "</div></style>", '" onmouseover="x', "$\\href{javascript:x}{y}$"])


@settings(max_examples=60, deadline=None)
@given(NASTY, NASTY, NASTY, NASTY)
def test_nothing_untrusted_becomes_markup(a, b, c, d):
    question = Question(a, b, [c, d], passages=["p1"], source=d)
    hit = SearchCall(b, [Hit(Passage("p1", c, d), 1.0)], 0.1)
    t = build(question, [f"<think>{a}", hit, f"{b}<answer>{c}</answer>"], group=d, rewards={a or "x": 1.0}, reward=1.0)
    broken = SearchCall(b, [], 0.1, error=d)
    # a log made by somebody else may hold text where numbers belong
    question.hops, t.step, t.turns, t.invalid_turns, t.prompt_ids, t.completion_ids[0] = a, b, c, d, [a], b
    t.calls.append(broken)
    t.segments.append(Segment("environment", "information", c, 9, 0, 0))
    for color in ("mask", "logprob"):
        drawn = render_html([t], color=color, title=a)
        drawn.encode("utf-8")  # no lone surrogate
        page = _Page(drawn)
        assert set(page.seen) <= ALLOWED
        assert {name for name, _ in page.attributes} <= {"class", "charset", "title", "open"}
        # "$" and "\\" always stand alone in an element, so MathJax finds no formula
        assert not re.search(r"[$\\](?!</span>)", drawn.split("</style>")[1])
        assert not re.search("[\x00\u202e\u200b]", drawn)
    assert not re.search("[\x00\u202e\u200b\ud800]", repr(show([t])))
    render_comparison([t], [t], title=d).encode("utf-8")


@pytest.mark.parametrize(
    "name, unseen",
    [
        ("right to left", "\u202e"),
        ("isolate", "\u2067"),
        ("Arabic mark", "\u061c"),
        ("zero width", "\u200b"),
        ("soft hyphen", "\xad"),
        ("line separator", "\u2028"),
        ("tag letter", "\U000e0041"),
        ("variation selector", "\U000e0101"),
        ("annotation", "\ufff9"),
        ("lone surrogate", "\udc00"),
        ("escape", "\x1b"),
    ],
)
def test_what_cannot_be_seen_is_shown_by_its_number(name, unseen):
    shown = _Page(render_html([build(QUESTION, [f"<answer> a{unseen}b </answer>"])])).text
    assert f"a‹U+{ord(unseen):04X}›b" in shown and unseen not in shown, name


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab é字😀\ufffd"), min_size=1, max_size=20), st.data())
def test_tokens_that_cut_characters_still_cover_the_text(text, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=6)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    tokens, n = [piece.decode("utf-8", "replace") for piece in pieces], len(pieces)
    t = Trajectory(QUESTION, [], [0] * n, [1] * n, [-0.5] * n, tokens=tokens, ends=token_ends(pieces))
    t.segments = [Segment("policy", "text", text, 0, 0, n)]
    assert t.ends == sorted(t.ends) and t.ends[-1] == len(text)
    page = render_html([t], color="logprob")
    assert text in _Page(page).text and "0.61" in page  # e^-0.5, told of each token


def test_a_cut_character_belongs_to_the_token_that_completes_it():
    assert token_ends([b"a" + b"\xc3", b"\xa9", b"b"]) == [1, 2, 3]
    assert token_ends([b"\xc3", b"\xa9", b"", b"b\xe2"]) == [0, 1, 1, 3]  # the last one is cut for good


def long_group(size=8):
    """Rollouts of one question with three searches each; what they read is long, and often the same."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "ba ke li mo nu so ti ve".split() for b in ("", "n", "ri", "sta")]
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(12)]
    group = []
    for i in range(size):
        parts = []
        for turn in range(3):
            start = 3 * turn + rng.choice([0, 0, 1])
            passages = [Passage(f"p{k}", f"Title {k}", texts[k % 12]) for k in range(start, start + 3)]
            parts += [
                f"<think> {' '.join(rng.choices(words, k=90))} </think><search> q {start} </search>",
                found("q", passages),
            ]
        group.append(build(QUESTION, [*parts, "<answer> x </answer>"], seed=i))
        group[-1].advantages = [0.5] * len(group[-1].mask)
    for t in group:
        t.completion_ids = [sum(map(ord, token)) * 7919 % 151_936 for token in t.tokens]
    return group


def test_a_group_of_long_rollouts_stays_small():
    group = long_group()
    assert sum(len(t.tokens) for t in group) > 9_000 and sum(sum(t.mask) for t in group) > 2_000
    for color in colors(group):
        assert len(render_html(group, color=color).encode()) < 150_000
        assert len(render_html(group_of(8), color=color).encode()) < 30_000


def test_what_several_read_is_written_once_and_every_id_can_be_found():
    group = long_group()
    page = render_html(group)
    passage = group[0].searches[0].result[0].passage.text
    readers = [i for i, t in enumerate(group) if passage in t.text]
    assert len(readers) > 3 and page.count(passage) == len({t.segments[2].text for t in group if passage in t.text})
    assert page.count("word for word that of #1, turn 1") == page.count("those of #1, turn 1") > 1
    columns = [re.findall(r"(\d+)–(\d+), mask ([01]): ([^<]*)", c) for c in page.split("<article>")[1:]]
    for t, column in zip(group, columns):
        ids, mask = [], []
        for start, end, m, written in column:
            assert (int(start), len(ids)) == (len(ids), int(start))
            mask += [int(m)] * (int(end) + 1 - int(start))
            if where := re.fullmatch(r"those of #(\d+), turn (\d+)", written):
                first = group[int(where[1]) - 1]
                there = next(s for s in first.segments if s.kind == "information" and s.turn == int(where[2]) - 1)
                ids += first.completion_ids[there.start : there.end]
            else:
                ids += map(int, written.split())
        assert ids == t.completion_ids and mask == t.mask


def test_the_reward_of_a_turn_stands_at_the_turn():
    t = group_of(2)[1]
    assert "turn 1 · reward" not in _Page(render_html([t])).text
    t.turn_rewards = [-0.15, 1.0]
    page = _Page(render_html([t])).text
    assert "turn 1 · reward -0.15" in page and "turn 2 · reward 1" in page


def test_credit_stands_turn_by_turn_under_the_truth():
    group = group_of(4)
    reading = lambda rollout, turn, truth, error=0.0, **credit: Reading(
        rollout, turn, "g", "s", "search <full>", truth, error, credit
    )
    readings = [
        reading(0, 0, -0.1, right=-1.0, wrong=5.0),
        reading(1, 0, 0.1, error=0.02, right=1.0, wrong=-5.0),
        reading(1, 1, 0.004, right=0.0),
    ]
    page = render_credit(group, readings, only=[0, 1], title="<b>")
    assert page.count("<article>") == 2 and html.escape("search <full>") in page and "<full>" not in page
    first, second = page.split("<article>")[1:]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", second)][1:]
    assert [row[0] for row in rows] == ["<b>truth</b>", "<b>right</b>", "<b>wrong</b>"]
    # the strongest blue and orange of each row, whatever its unit; what is nearly nothing has no colour
    strengths = [re.findall(r"class=(\w+)", "".join(row)) for row in rows]
    assert strengths == [["p5"], ["p5"], ["n5"]] and "± 0.02" in rows[0][1]
    assert rows[0][2] == "+0.004" and rows[2][2] == "–"
    assert re.findall(r"ins class=(\w+)", first)[:3] == ["n5", "n5", "p5"]
    assert render_credit(group, readings).count("<article>") == 4
    assert "#2 turn 1, search <full>: truth +0.100; right +1.000, wrong -5.000" in repr(show_credit(group, readings))


def test_empty_lists_and_bare_trajectories_are_drawn():
    assert "No trajectories" in render_html([])
    bare = Trajectory(QUESTION, [], [], [], [])
    assert "no answer" in render_html([bare]) and "no answer" in render_text([bare])


def test_show_falls_back_to_text():
    drawn = show(group_of(2))
    assert drawn._repr_html_().startswith("<meta charset")
    assert "#2 reward 0.85, 1 search(es), answer, right: Taimbford" in repr(drawn)
    assert "information | <information>Doc 1(Title: Mirel Vondash)" in repr(drawn)


def test_groups_part_by_step():
    early, late = group_of(2), group_of(2)
    for t in late:
        t.step = 9
    assert [len(g) for g in groups([*early, *late])] == [2, 2]
    assert colors(early) == ["mask", "logprob", "advantage", "entropy"]


KNOWN = Question("q2", "What was the trade of Ada Sorn?", ["baker", "a baker"], hops=2, known=True)


def mixed():
    return [
        *group_of(4),
        build(KNOWN, ["<answer> the baker </answer>"], reward=1.0, step=4),
        build(KNOWN, ["<think> hm"], reward=0.0, step=4),
    ]


def test_select_filters_and_sorts():
    ts = mixed()
    assert {t.question.id for t in select(ts, knowledge="known")} == {"q2"}
    assert len(select(ts, knowledge="look-up", searches=1)) == 2
    assert [t.answer for t in select(ts, hops=2, answered="right")] == ["the baker"]
    assert select(ts, answered="none") == select(ts, finish="turns") == [ts[-1]]
    assert [t.reward for t in select(ts, reward=(0.85, 1.0), sort="highest reward")] == [1.0, 0.85, 0.85]
    assert len(select(ts, text="TAIMBFORD")) == 4 and len(select(ts, text="recall nothing", searches=0)) == 2
    for name in SORTS:
        assert len(select(ts, sort=name)) == len(ts)
    assert select(ts, sort="least likely")[0] is min(ts, key=lambda t: sum(t.logprobs) / sum(t.mask))


def test_browse_follows_its_controls():
    box = browse(mixed())
    c = box.controls
    assert box.count.value == "6 of 6 trajectories" and len(c["rows"].options) == 6
    assert box.drawing.value == render_html(mixed()[:4])  # the whole group of the first
    c["knowledge"].value = "known"
    assert box.count.value == "2 of 6 trajectories" and "Ada Sorn" in box.drawing.value
    c["answered"].value = "none"
    assert len(c["rows"].options) == 1 and "✗ no answer" in box.drawing.value
    c["text"].value = ANY
    assert box.count.value == "0 of 6 trajectories"
    c["text"].value = "nowhere to be found"
    assert box.count.value == "0 of 6 trajectories" and "No trajectories" in box.drawing.value
    c["text"].value = ""
    c["knowledge"].value = c["answered"].value = ANY
    c["searches"].value, c["sort"].value, c["color"].value = 1, "lowest reward", "entropy"
    c["group"].value = False
    c["rows"].value = 1
    assert "Colour: entropy" in box.drawing.value and box.drawing.value.count("<article>") == 1
    c["searches"].value = ANY
    assert c["searches"].index == 0  # else a browser shows nothing
    c["reward"].value = (0.9, 1.0)
    rows = [label for label, _ in c["rows"].options]
    assert rows == ["✓ 1 · 0 searches · step 4 · What was the trade of Ada Sorn?"]
    with pytest.raises(ValueError, match="nothing to browse"):
        browse([])


def test_widgets_leave_static_html_in_the_notebook():
    from IPython.core.formatters import DisplayFormatter

    for box in (browse(mixed()), compare(mixed(), mixed())):
        data, metadata = DisplayFormatter().format(box)
        assert data["text/html"] == box.drawing.value
        assert "application/vnd.jupyter.widget-view+json" in data
        json.dumps([data, metadata])


def outcome_sets():
    questions = [Question(str(i), f"Question {i}?", ["yes"]) for i in range(5)]

    def answers(words):
        return [build(q, [f"<answer> {w} </answer>"]) for q, w in zip(questions, words)]

    return answers("no no yes yes no".split()), answers("yes no yes no".split())


def test_outcomes_are_paired_by_question():
    found_ = paired_outcomes(*outcome_sets())
    assert {name: [b[0].question.id for b, _ in pairs] for name, pairs in found_.items()} == {
        "fixed": ["0"],
        "broken": ["3"],
        "same, right": ["2"],
        "same, wrong": ["1"],
    }
    assert tuple(found_) == OUTCOMES
    page = _Page(render_comparison(*outcome_sets(), title="Before and after"))
    for expected in ("4 questions", "1 fixed", "1 broken", "Before and after", "Question 3?"):
        assert expected in page.text
    with pytest.raises(ValueError, match="no question id"):
        paired_outcomes(outcome_sets()[0][:1], outcome_sets()[1][1:])


def test_compare_follows_its_controls():
    box = compare(*outcome_sets())
    assert "before #1" in box.pair.value and "after #1" in box.pair.value and "✓ yes" in box.pair.value
    box.controls["outcome"].value = "broken"
    assert [label for label, _ in box.controls["rows"].options] == ["Question 3?"] and "Question 3?" in box.pair.value
    box.controls["color"].value = "logprob"
    assert "probability" in box.pair.value
    same = outcome_sets()[0]
    box = compare(same, same)
    assert "No question has this outcome" in box.pair.value and "3 same" in box.drawing.value


def test_side_by_side_labels_both_sides_of_every_question_they_share():
    before, after = outcome_sets()
    page = _Page(render_side_by_side(before, after[:2], title="<b>")).text
    assert page.count("before #1 · ") == page.count("after #1 · ") == 2 and "<b>" in page
    assert "no variance" not in page
    with pytest.raises(ValueError, match="share no question"):
        render_side_by_side(before[:1], after[1:2])
    assert "<details open><summary>what the model read" in render_html(group_of(2))
    assert "<details><summary>what the model read, " in render_side_by_side(group_of(2), group_of(2))


def test_a_question_without_a_gold_answer_is_not_called_wrong():
    page = render_html([build(Question("mine", "Who?", []), ["<answer> Ada </answer>"])])
    assert "no gold answer is known" in page and "✗" not in page and "Ada" in page


def test_ask_shows_what_it_is_told_and_also_what_goes_wrong():
    box = ask(lambda text: f"<p>{1 / (len(text) - 3):.0f}</p>", question="four")
    assert box.drawing.value == "<p>1</p>" and "<p>1</p>" in box._repr_mimebundle_()[0]["text/html"]
    box.controls["question"].value = "<i>"
    assert "ZeroDivisionError" in box.drawing.value
    box.controls["question"].value = " "
    assert box.drawing.value == ""


def test_weights_give_the_advantages_of_grpo_and_name_the_act_they_favour():
    group = group_of()
    rewards, advantages = weighted(group, {"exact_match": 1.0, "search_cost": 1.0})
    assert rewards == pytest.approx([t.reward for t in group])
    mean, std = sum(rewards) / 8, (sum((r - sum(rewards) / 8) ** 2 for r in rewards) / 7) ** 0.5
    assert advantages == pytest.approx([(r - mean) / (std + 1e-4) for r in rewards], abs=1e-5)
    dear = _Page(render_weights(group, {"exact_match": 1.0, "search_cost": 10.0})).text
    cheap = _Page(render_weights(group, {"exact_match": 1.0, "search_cost": 0.0})).text
    assert "answer first: +" in dear and "search first: -" in dear
    assert "answer first: -" in cheap and "search first: +" in cheap and "1 × exact_match + 0 × search_cost" in cheap
    assert "nothing is learned" in render_weights(group, {"exact_match": 0.0})
    with pytest.raises(ValueError, match="'f1'.*exact_match"):
        weighted(group, {"f1": 1.0})


def test_weigh_redraws_at_once_for_the_group_on_display():
    box = weigh(
        group_of()
        + [
            build(
                Question("q2", "<b>Two?</b>", ["x"]),
                ["<answer> x </answer>"],
                rewards={"exact_match": 1.0, "search_cost": 0.0},
            )
        ]
        * 2,
        {"exact_match": 1.0, "search_cost": 1.0},
    )
    before = box.drawing.value
    box.controls["search_cost"].value = 2.0
    assert box.drawing.value != before and "2 × search_cost" in box.drawing.value
    box.controls["group"].value = 1
    assert "&lt;b&gt;Two?" in box.drawing.value and box.drawing.value in box._repr_mimebundle_()[0]["text/html"]
    with pytest.raises(ValueError, match="empty"):
        weigh([], {})


def test_prefer_writes_what_was_chosen_and_shows_neither_reward_nor_what_is_right(tmp_path):
    group, path = group_of(), tmp_path / "choices.jsonl"
    box = prefer([(group[0], group[1]), (group[2], group[3]), (group[4], group[5])], path, who="ada")
    shown = _Page(box.drawing.value).text
    assert "0.85" not in shown and group[0].reward is not None
    assert "✗" not in shown and "✓" not in shown and "no gold answer is known" in shown and group[0].question.answers
    box.controls["b"].click()
    box.controls["skip"].click()
    box.controls["a"].click()
    box.controls["a"].click()  # nothing is left: no further choice
    assert [(c.a.to_dict(), c.b.to_dict(), c.preferred, c.who) for c in read_choices(path)] == [
        (group[0].to_dict(), group[1].to_dict(), "b", "ada"),
        (group[4].to_dict(), group[5].to_dict(), "a", "ada"),
    ]
    assert "2 choices" in box.count.value and "No pair is left" in box.drawing.value


def test_a_choice_that_cannot_be_written_is_not_lost(tmp_path):
    (tmp_path / "a file").touch()
    box = prefer([tuple(group_of(2))], tmp_path / "a file" / "choices.jsonl")
    shown = box.drawing.value
    box.controls["a"].click()
    assert "was not written" in box.count.value and box.drawing.value == shown


def test_the_time_to_draw_is_linear_and_long_texts_are_cut():
    def drawn(size):
        text = "<b>$x\\\u202e\n" * (size // 8)
        question = Question("q", text, [text, "x"], source=text)
        call = SearchCall(text, [Hit(Passage("p1", text, text), 1.0)], 0.1)
        t = build(
            question, ["<think> a </think>", call, f"<think>{text}</think><answer>{text}</answer>"], split=r"(?s).+"
        )
        t.calls.append(SearchCall("x", [], error=text))
        return [t], [t]

    def seconds(size, draw):
        sides, least = drawn(size), math.inf
        for _ in range(3):
            started = time.process_time()
            draw(*sides)
            least = min(least, time.process_time() - started)
        return least

    for draw in (lambda a, b: render_html(a), lambda a, b: render_text(a), render_comparison):
        assert seconds(400_000, draw) < 3 * seconds(200_000, draw) + 0.05
    once, twice = (len(render_html(drawn(size)[0])) for size in (1_000_000, 2_000_000))
    assert once == pytest.approx(twice, rel=0.01)
    assert "more characters)" in render_html(drawn(1_000_000)[0])


def test_labels_hold_what_a_notebook_can_be_sent():
    t = build(Question("q", "half \ud800 \u202e", ["x"]), ["<answer> x </answer>"], rewards={"f1": 1.0}, reward=1.0)
    for box in (browse([t]), weigh([t, t], {"f1": 1.0}), compare([t], [t])):
        for control in box.controls.values():
            for label, *_ in getattr(control, "options", None) or ():
                str(label).encode()
        assert "\u202e" not in str(box.controls.get("rows", box.controls.get("group")).options)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None, True])
def test_a_weight_is_a_finite_number(weight):
    for draw in (weighted, render_weights, weigh):
        with pytest.raises(ValueError, match="weight of 'exact_match'.*got"):
            draw(group_of(), {"exact_match": weight})
    with pytest.raises(ValueError, match="^most "):
        weigh(group_of(), {"exact_match": 1.0}, most=0)


def test_a_weight_beyond_the_slider_is_not_changed():
    box = weigh(group_of(), {"exact_match": 3.0, "search_cost": -0.5})
    assert box.controls["exact_match"].value == 3.0 and box.controls["search_cost"].value == -0.5
    assert "3 × exact_match + -0.5 × search_cost" in box.drawing.value
