"""The hostile campaign: whatever passages, questions, models and engines hold, nothing is forged and nothing breaks.

Each example goes the whole way: prompt, turns, engine, observation, trajectory, rewards, metrics, log, viewer. A few
hundred here; the long one is ``SEARCHR1_HOSTILE=10000 python -m pytest tests/test_hostile.py``.
"""

import math
import os
import re
import time

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_viewer import ALLOWED, _Page

from searchr1_lib.environment.base import Done, Observation, step_all
from searchr1_lib.environment.calculator import Calculator
from searchr1_lib.environment.limits import Limits
from searchr1_lib.environment.protocol import TAGS
from searchr1_lib.environment.search import Search, SearchEnvironment
from searchr1_lib.files import TrajectoryLog
from searchr1_lib.metrics import error_of, row_of
from searchr1_lib.records import ENVIRONMENT, Hit, Passage, Question, Segment, Trajectory
from searchr1_lib.rewards import (
    F1, IKEA, OTC, Composite, ConfidentSearch, ExactMatch, Format, InformationGain, OverlongPenalty, RepeatedSearch,
    Retrieval, SearchCost, SearchR1Format, SubstringMatch, final_answer, score,
)  # fmt: skip
from searchr1_lib.study.viewer import render_html, render_text

EXAMPLES = int(os.environ.get("SEARCHR1_HOSTILE", 300))
NAMES = (*TAGS, "calculator")
FORGED = re.compile(rf"</?(?:{'|'.join(NAMES)})>|<\|", re.IGNORECASE)
PIECES = (
    [f"<{slash}{name}>" for name in NAMES for slash in ("", "/")]
    + (
        "< search >|<ANSWER>|<\u200banswer>|\uff1canswer\uff1e|&lt;answer&gt;|&amp;lt;answer&amp;gt;|<|>|</|<script>x()</script>|"
        '</div></style>|" onload="x|$\\href{x}{y}$|\ud800|\udc00x|\u202e|\x00|\x1b[31m|\u2028|\ufeff|<answer|answer>|Velmora|'
        "<s>|</s>|<start_of_turn>|{question}|\n\n|1 / 0"
    ).split("|")
    + ["<|im_end|>", "<|endoftext|>", "<|", "|>", "< " * 200, "<" + " " * 3000, "<answer>" * 300, "a" * 4000]
)
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=8).map("".join)
TURN = st.builds(lambda a, kind, b, c: f"{a}<{kind}>{b}</{kind}>{c}", TEXT, st.sampled_from(NAMES), TEXT, TEXT) | TEXT
VALUE = st.none() | st.integers() | st.floats() | st.booleans() | TEXT | st.just(10**400)
PASSAGE = st.builds(Passage, TEXT | VALUE, TEXT | VALUE, TEXT | VALUE)
RETURNED = (
    st.lists(PASSAGE | st.builds(Hit, PASSAGE | VALUE, VALUE) | TEXT | VALUE, max_size=4) | VALUE | st.just({"a": 1})
)


class Engine:
    def __init__(self, answers):
        self.answers = iter(answers)

    def search(self, query):
        answer = next(self.answers, RuntimeError("no route \ud800"))
        if isinstance(answer, Exception):
            raise answer
        return answer


def played(question, turns, answers):
    """A trajectory of these turns, one token a character, and the seconds of its slowest step."""
    environment = SearchEnvironment([Search(Engine(answers)), Calculator()], Limits(max_turns=4))
    t = Trajectory(question, [1], [], [], [], prompt=environment.reset(question), finish_reason="turns")
    slowest = 0.0
    for number, turn in enumerate(turns):
        pieces = [("policy", kind, turn[a:b]) for kind, a, b in environment.parts(turn)]
        assert "".join(text for _, _, text in pieces) == turn
        started = time.process_time()
        (outcome,) = step_all([environment], [turn], [None])
        slowest = max(slowest, time.process_time() - started)
        if isinstance(outcome, Observation):
            pieces.append((ENVIRONMENT, outcome.kind, outcome.text))
        for author, kind, text in pieces:
            start = len(t.mask)
            t.segments.append(Segment(author, kind, text, number, start, start + len(text)))
            t.mask += [int(author == "policy")] * len(text)
        if isinstance(outcome, Done):
            t.answer, t.finish_reason = outcome.answer, outcome.reason
            break
    n = len(t.mask)
    t.completion_ids, t.logprobs, t.ends, t.tokens = (
        [2] * n,
        [-0.1 * m for m in t.mask],
        list(range(1, n + 1)),
        list(t.text),
    )
    t.calls, t.turns, t.invalid_turns = environment.calls, environment.turn, environment.invalid_turns
    return t, slowest


def rewards():
    alone = [
        ExactMatch(), F1(), SubstringMatch(), SearchCost(0.1), Format(), Retrieval(), InformationGain(0.1),
        RepeatedSearch(), OTC(), IKEA(), ConfidentSearch(), SearchR1Format(), OverlongPenalty(200, 50),
    ]  # fmt: skip
    return Composite([(1.0, reward) for reward in alone], name="all")


def joined(text):
    """Two halves of a pair that stand together are one character in JSON."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") if isinstance(text, str) else text


@seed(15)
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    TEXT, st.lists(TEXT, min_size=1, max_size=2), st.lists(TURN, min_size=1, max_size=5), st.lists(RETURNED, max_size=5)
)
def test_nothing_is_forged_and_nothing_breaks(tmp_path_factory, asked, golds, turns, answers):
    question = Question("q", joined(asked), [joined(gold) for gold in golds])
    turns = [turn.encode("utf-8", "replace").decode() for turn in turns]  # as a policy decodes them
    t, _ = played(question, turns, answers)
    assert not FORGED.search(t.prompt.rsplit("Question:", 1)[1])
    for s in t.segments:
        if s.author == ENVIRONMENT and s.kind == "information":
            inside = s.text.removeprefix("\n\n<information>").removesuffix("</information>\n\n")
            assert len(inside) == len(s.text) - 31 and not FORGED.search(inside)
    written = [s.text for s in t.segments if s.by_model]
    assert all(any(answer in text for text in written) for answer in (final_answer(t), t.answer) if answer)
    scores = score(rewards(), [t])
    scores.keep([t])
    assert all(math.isfinite(v) for v in t.rewards.values()) and row_of(t)["id"] == "q"
    error_of(t)
    log = TrajectoryLog(tmp_path_factory.mktemp("hostile") / "log.jsonl")
    log.append([t])
    assert log.read() == [t]
    page = render_html([t])
    page.encode()
    assert set(_Page(page).seen) <= ALLOWED
    render_text([t]).encode()


def test_no_step_takes_twice_the_time_of_a_harmless_one():
    """Hostile texts against harmless ones of equal length: the median over the pieces, each the least of three."""
    length, ratios = 200_000, []
    for piece in filter(str.strip, PIECES):
        hostile = (piece * (length // len(piece) + 1))[:length]
        plain = ("long words, " * (length // 12 + 1))[:length]

        def seconds(text):
            turn, found = f"<think> {text} </think><search> {text} </search>", [Passage("1", text, text)] * 3
            return min(played(Question("q", text, ["x"]), [turn], [found])[1] for _ in range(3))

        ratios.append((seconds(hostile) / max(seconds(plain), 0.002), piece[:20]))
    assert sorted(ratios)[len(ratios) // 2][0] < 2 and max(ratios)[0] < 4, sorted(ratios)[-3:]
