"""A language model as judge of the final answer.

What keeps an answer from talking to the judge:
1. only the model's final answer is judged, escaped, on one line and cut to ``ANSWER_LIMIT`` characters;
2. it is sent as a JSON string in a message of its own; the rubric stands in the system message;
3. the whole reply must be one JSON object with a score in [0, 1], so a score that the judge merely quotes is not one;
4. every answer that scores is asked about again against a wrong reference (the gold answer of another
   question). An honest judge gives 0 there; an answer that earns points against any reference earned them by
   talking, and these points are taken off: ``score = max(0, judged - control)``.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..environment import protocol
from ..records import Trajectory
from ..search.base import check_numbers, identity_of
from ..search.sqlite import Database
from .answer import f1_score
from .base import RewardError, final_answer
from .endpoints import EndpointError

RUBRIC = Path(__file__).with_name("rubric.md")
ANSWER_LIMIT = 500  # characters
_NOBODY = "Quorvath Lindemere"  # the wrong reference where the batch holds no other gold answer
_SCHEMA = "CREATE TABLE scores (key TEXT PRIMARY KEY, score REAL NOT NULL);"


class JudgeBudgetError(RewardError):
    """The judge's budget is spent; the message says how much it was."""


@dataclass(frozen=True)
class _Case:
    """What is judged once, however many trajectories share it."""

    question: str
    answers: tuple[str, ...]
    answer: str
    id: str  # of the question, for messages


class Judge:
    """A score in [0, 1] for the final answer, by a chat model that follows a rubric (see the module's head).

    No answer, or a blank one, scores 0 without a call. Equal cases of a batch are asked once.

    Args:
        chat: ``ChatEndpoint``, ``LocalChat``, or anything with ``name`` and ``complete(messages) -> Reply``.
        rubric: file with the instructions; the packaged ``rubric.md`` by default.
        cache: SQLite file that keeps scores between runs; several processes may share it, and one that is read-only
            gives what it holds. A score belongs to its model (see ``identity_of``) and rubric.
        max_calls, max_tokens: budget of this object (None: no limit). Cached scores are free. The tokens of a
            call are known after it, so those under way when the budget runs out are still paid for.
        concurrency: calls under way at a time.
        attempts: calls for one score before a reply that cannot be read is an error.

    Attributes:
        calls, tokens: spent so far; cached: scores that came from the cache; controlled: scores that the
            control question lowered.
    """

    def __init__(
        self,
        chat,
        *,
        rubric: str | Path = RUBRIC,
        cache: str | Path | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        concurrency: int = 4,
        attempts: int = 3,
        name: str = "judge",
    ):
        check_numbers(1, concurrency=concurrency, attempts=attempts)
        budget = {"max_calls": max_calls, "max_tokens": max_tokens}
        check_numbers(0, **{name: limit for name, limit in budget.items() if limit is not None})
        self.chat, self.name = chat, name
        self.rubric = Path(rubric).read_text(encoding="utf-8").strip()
        if not self.rubric:
            raise ValueError(f"Judge: the rubric {rubric} is empty")
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.concurrency, self.attempts = concurrency, attempts
        self.calls = self.tokens = self.cached = self.controlled = 0
        self._scores: dict[str, float] = {}
        self._file = Database(Path(cache), _SCHEMA, journal="DELETE") if cache else None
        self._lock = threading.Lock()

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory.

        Raises:
            JudgeBudgetError: the budget is spent.
            RewardError: the judge gave no usable reply; the message names the question's id (rollouts of a
                question with the same answer are judged as one).
        """
        cases = [_case(t) for t in trajectories]
        wanted = list(dict.fromkeys(c for c in cases if c.answer))
        golds = sorted({a for t in trajectories for a in t.question.answers[:1] if a.strip()})
        with ThreadPoolExecutor(self.concurrency) as pool:
            scores = dict(zip(wanted, pool.map(lambda c: self._score(c, _wrong_reference(c, golds)), wanted)))
        return [scores.get(c, 0.0) for c in cases]

    def _score(self, case: _Case, wrong: str) -> float:
        judged = self._ask(case, case.answers)
        if judged == 0:
            return 0.0
        control = self._ask(case, (wrong,))
        with self._lock:
            self.controlled += control > 0
        return max(0.0, judged - control)

    def _ask(self, case: _Case, answers: tuple[str, ...]) -> float:
        task = {"question": case.question, "reference_answers": list(answers), "answer": case.answer}
        user = json.dumps(task, ensure_ascii=False)
        messages = [{"role": "system", "content": self.rubric}, {"role": "user", "content": user}]
        key = hashlib.sha256(json.dumps([identity_of(self.chat), messages]).encode()).hexdigest()
        if (score := self._kept(key)) is not None:
            with self._lock:
                self.cached += 1
            return score
        failed = f"reward {self.name!r} failed on question {case.id!r}"
        for _ in range(self.attempts):
            self._spend()
            try:
                reply = self.chat.complete(messages)
            except EndpointError as e:
                raise RewardError(f"{failed}: {e}") from e
            with self._lock:
                self.tokens += reply.tokens
            try:
                score = parse_score(reply.text)
            except ValueError as e:
                problem = e
                continue
            self._keep(key, score)
            return score
        raise RewardError(f"{failed}: {self.attempts} replies without a score ({problem})")

    def _kept(self, key: str) -> float | None:
        if key not in self._scores and self._file:
            with self._file.use() as connection:
                self._scores |= connection.execute("SELECT key, score FROM scores WHERE key = ?", (key,))
        return self._scores.get(key)

    def _keep(self, key: str, score: float) -> None:
        self._scores[key] = score
        if self._file and self._file.writable:
            with self._file.use() as connection:
                connection.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))

    def _spend(self) -> None:
        with self._lock:
            for spent, limit, unit in ((self.calls, self.max_calls, "calls"), (self.tokens, self.max_tokens, "tokens")):
                if limit is not None and spent >= limit:
                    raise JudgeBudgetError(f"reward {self.name!r}: the budget of {limit} {unit} is spent ({spent})")
            self.calls += 1

    @property
    def identity(self) -> str:
        """What decides its scores: not its budget, and not what it has spent."""
        return f"{type(self).__name__}({identity_of(self.chat)}, {hashlib.sha256(self.rubric.encode()).hexdigest()})"

    def __repr__(self) -> str:
        return f"Judge({self.chat.name!r}, name={self.name!r})"


def parse_score(reply: str) -> float:
    """The score of a judge's reply: one JSON object with "score" in [0, 1] and at most a "reason" beside it.

    A leading ``<think>`` block and a code fence around the object are allowed, nothing else.

    >>> parse_score('{"reason": "same town", "score": 1}')
    1.0

    Raises:
        ValueError: anything else.
    """
    text = reply.rpartition("</think>")[2].strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")
    try:
        verdict = json.loads(text, object_pairs_hook=_no_twins)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(verdict, dict) or not {"score"} <= verdict.keys() <= {"score", "reason"}:
        raise ValueError("not an object with a score")
    score = verdict["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise ValueError("the score is not a number from 0 to 1")
    return float(score)


def _no_twins(pairs):
    if len({k for k, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _case(t: Trajectory) -> _Case:
    q, answer = t.question, _plain(final_answer(t) or "")[:ANSWER_LIMIT].strip()
    return _Case(_plain(q.text), tuple(map(_plain, q.answers)), answer, q.id)


def _plain(text: str) -> str:
    """One line, no control characters, no protocol tags or chat tokens."""
    return "".join(c for c in " ".join(protocol.escape(text[: 20 * ANSWER_LIMIT]).split()) if c.isprintable())


def _wrong_reference(case: _Case, golds: list[str]) -> str:
    """A gold answer of the batch that shares no word with the case; always the same one for the same batch."""
    wrong = [g for g in golds if not f1_score(g, case.answers) and not f1_score(g, case.answer)]
    if not wrong:
        return _NOBODY
    return wrong[int(hashlib.sha256(case.question.encode()).hexdigest(), 16) % len(wrong)]
