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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..environment import protocol
from ..records import Trajectory
from ..search.base import check_numbers, identity_of
from ..search.sqlite import Database
from .answer import f1_score
from .base import RewardError, final_answer
from .endpoints import EndpointError

RUBRIC = Path(__file__).with_name("rubric.md")
ANSWER_LIMIT, QUESTION_LIMIT = 500, 4000  # characters
_NOBODY = "Quorvath Lindemere"  # the wrong reference where the batch holds no other gold answer
_SCHEMA = "CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL);"


class JudgeBudgetError(RewardError):
    """The judge's budget is spent; the message says how much it was."""


@dataclass(frozen=True)
class _Case:
    """What is judged once, however many trajectories share it."""

    question: str
    answers: tuple[str, ...]
    answer: str
    id: str  # of the question, for messages


class Asking:
    """Asks a chat model for verdicts: with a cache, a budget, and another try where a reply cannot be read.

    Args:
        chat: ``ChatEndpoint``, ``LocalChat``, or anything with ``name`` and ``complete(messages) -> Reply``.
        rubric: file with the instructions, which stand in the system message.
        cache: SQLite file that keeps replies between runs; several processes may share it, and one that is read-only
            gives what it holds. A reply belongs to its model (see ``identity_of``) and its messages.
        max_calls, max_tokens: budget of this object (None: no limit). Cached replies are free. The tokens of a
            call are known after it, so those under way when the budget runs out are still paid for.
        concurrency: calls under way at a time.
        attempts: calls for one verdict before a reply that cannot be read is an error.

    Attributes:
        calls, tokens: spent so far; cached: verdicts that came from the cache.
    """

    rubric_file = RUBRIC
    name = "judge"

    def __init__(
        self,
        chat,
        *,
        rubric: str | Path | None = None,
        cache: str | Path | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        concurrency: int = 4,
        attempts: int = 3,
        name: str = "",
    ):
        check_numbers(1, concurrency=concurrency, attempts=attempts)
        budget = {"max_calls": max_calls, "max_tokens": max_tokens}
        check_numbers(0, **{name: limit for name, limit in budget.items() if limit is not None})
        self.chat, self.name = chat, name or self.name
        rubric = rubric or self.rubric_file
        self.rubric = Path(rubric).read_text(encoding="utf-8").strip()
        if not self.rubric:
            raise ValueError(f"{type(self).__name__}: the rubric {rubric} is empty")
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.concurrency, self.attempts = concurrency, attempts
        self.calls = self.tokens = self.cached = 0
        self._replies: dict[str, str] = {}
        self._file = Database(Path(cache), _SCHEMA, journal="DELETE") if cache else None
        self._lock = threading.Lock()

    def ask_all(self, ask: Callable[[Any], Any], cases: Iterable[Any]) -> dict[Any, Any]:
        """``ask`` of each different case, some at a time."""
        wanted = list(dict.fromkeys(cases))
        with ThreadPoolExecutor(self.concurrency) as pool:
            return dict(zip(wanted, pool.map(ask, wanted)))

    def ask(self, task: Mapping[str, Any], read: Callable[[str], Any], about: str) -> Any:
        """What ``read`` makes of the model's reply to a task, which is sent as JSON.

        Raises:
            JudgeBudgetError: the budget is spent.
            RewardError: the model gave no reply that ``read`` can read; the message names the question ``about`` which
                it was asked.
        """
        user = json.dumps(task, ensure_ascii=False)
        messages = [{"role": "system", "content": self.rubric}, {"role": "user", "content": user}]
        key = hashlib.sha256(json.dumps([identity_of(self.chat), messages]).encode()).hexdigest()
        if (reply := self._kept(key)) is not None:
            with self._lock:
                self.cached += 1
            return read(reply)
        failed = f"{self.name!r} failed on question {about!r}"
        for _ in range(self.attempts):
            self._spend()
            try:
                said = self.chat.complete(messages)
            except EndpointError as e:
                raise RewardError(f"{failed}: {e}") from e
            with self._lock:
                self.tokens += said.tokens
            try:
                verdict = read(said.text)
            except ValueError as e:
                problem = e
                continue
            self._keep(key, said.text)
            return verdict
        raise RewardError(f"{failed}: {self.attempts} replies without a verdict ({problem})")

    def _kept(self, key: str) -> str | None:
        if key not in self._replies and self._file:
            with self._file.use() as connection:
                self._replies |= connection.execute("SELECT key, reply FROM replies WHERE key = ?", (key,))
        return self._replies.get(key)

    def _keep(self, key: str, reply: str) -> None:
        self._replies[key] = reply
        if self._file and self._file.writable:
            with self._file.use() as connection:
                connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

    def _spend(self) -> None:
        with self._lock:
            for spent, limit, unit in ((self.calls, self.max_calls, "calls"), (self.tokens, self.max_tokens, "tokens")):
                if limit is not None and spent >= limit:
                    raise JudgeBudgetError(f"{self.name!r}: the budget of {limit} {unit} is spent ({spent})")
            self.calls += 1

    @property
    def identity(self) -> str:
        """What decides its verdicts: not its budget, and not what it has spent."""
        return f"{type(self).__name__}({identity_of(self.chat)}, {hashlib.sha256(self.rubric.encode()).hexdigest()})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.chat.name!r}, name={self.name!r})"


class Judge(Asking):
    """A score in [0, 1] for the final answer, by a chat model that follows a rubric (see the module's head).

    No answer, or a blank one, scores 0 without a call. Equal cases of a batch are asked once.

    Attributes:
        controlled: scores that the control question lowered.
    """

    controlled = 0

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory. Raises what ``ask`` raises."""
        cases = [_case(t) for t in trajectories]
        golds = sorted({a for t in trajectories for a in t.question.answers[:1] if a.strip()})
        scores = self.ask_all(lambda c: self._score(c, _wrong_reference(c, golds)), (c for c in cases if c.answer))
        return [scores.get(c, 0.0) for c in cases]

    def _score(self, case: _Case, wrong: str) -> float:
        judged = self._against(case, case.answers)
        if judged == 0:
            return 0.0
        control = self._against(case, (wrong,))
        with self._lock:
            self.controlled += control > 0
        return max(0.0, judged - control)

    def _against(self, case: _Case, answers: tuple[str, ...]) -> float:
        task = {"question": case.question, "reference_answers": list(answers), "answer": case.answer}
        return self.ask(task, parse_score, case.id)


def parse_score(reply: str) -> float:
    """The score of a judge's reply: one JSON object with "score" in [0, 1] and at most a "reason" beside it.

    A leading ``<think>`` block and a code fence around the object are allowed, nothing else.

    >>> parse_score('{"reason": "same town", "score": 1}')
    1.0

    Raises:
        ValueError: anything else.
    """
    verdict = json_object(reply)
    if not {"score"} <= verdict.keys() <= {"score", "reason"}:
        raise ValueError("not an object with a score")
    return share(verdict["score"], "the score")


def json_object(reply: str) -> dict[str, Any]:
    """The one JSON object that a reply consists of; see ``parse_score`` for what may stand around it."""
    text = reply.rpartition("</think>")[2].strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")
    try:
        verdict = json.loads(text, object_pairs_hook=_no_twins)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(verdict, dict):
        raise ValueError("not an object")
    return verdict


def share(value: Any, what: str) -> float:
    """A value that must be a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{what} is not a number from 0 to 1")
    return float(value)


def _no_twins(pairs):
    if len({k for k, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _case(t: Trajectory) -> _Case:
    q, answer = t.question, plain(final_answer(t) or "")
    return _Case(plain(q.text, QUESTION_LIMIT), tuple(map(plain, q.answers)), answer, q.id)


def plain(text: str, limit: int = ANSWER_LIMIT) -> str:
    """One line of at most ``limit`` characters, no control characters, no protocol tags or chat tokens."""
    line = " ".join(protocol.escape(text[: 20 * limit]).split())
    return "".join(c for c in line if c.isprintable())[:limit].strip()


def _wrong_reference(case: _Case, golds: list[str]) -> str:
    """A gold answer of the batch that shares no word with the case; always the same one for the same batch."""
    wrong = [g for g in golds if not f1_score(g, case.answers) and not f1_score(g, case.answer)]
    if not wrong:
        return _NOBODY
    return wrong[int(hashlib.sha256(case.question.encode()).hexdigest(), 16) % len(wrong)]
