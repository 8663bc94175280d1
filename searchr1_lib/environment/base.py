"""What a model may do: an object for each episode that is told each turn of the model and says what happens then.

    environment = SearchEnvironment([engine])
    prompt = environment.reset(question)
    environment.step("<think> … </think><search> Ada born </search>")        # an Observation, for the context
    environment.step("<think> … </think><answer> Rome </answer>")            # Done("answer", "Rome")

An environment owns its tags, its one parser and its limits, and knows nothing of tokens: how long a text is, it asks
the ``measure`` that it is given. Of many episodes at once ``step_all`` gathers the calls of a turn, so that they go to
each tool in one batch. What a tool may be is one class, ``Tool``; a new one is one file beside this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import islice
from threading import Thread
from typing import Any

from ..metrics import grouped
from ..records import Hit, Passage, Question, ToolCall, Trajectory
from .limits import Limits


class Tool:
    """Something that a model may call by writing ``<name> argument </name>``.

    Attributes:
        name: of its tag, lower-case letters.
        usage: a sentence for the prompt that says what it is good for and how it is written; "" for a tool of which
            the prompt tells already.
        batched: whether ``run`` should be given all arguments of a turn at once; else one at a time.
        timed: whether it is given up after ``Limits.search_timeout``; False for one whose budget is tokens.
        authors: those of a policy's authors who write inside it and nowhere else.
    """

    name: str
    usage: str = ""
    batched: bool = True
    timed: bool = True
    authors: tuple[str, ...] = ()

    def run(self, arguments: list[str], k: int) -> list:
        """One result for each argument: a passage or a text, or several, best first (at most ``k`` are taken).

        What it raises becomes the observation of the argument, and never stops a step.
        """
        raise NotImplementedError

    def preface(self, question: Question) -> str:
        """What it puts into the prompt of a question, whole lines; untrusted text in it is escaped."""
        return ""

    def merge(self, trajectories: Sequence[Trajectory], step: int) -> None:
        """Told of the rollouts of each step of a training, counted from 0, when all of them are over."""

    def rewind(self, step: int) -> None:
        """Told of the step that comes next where a training begins or goes on: later ones have not happened."""


class Finding(list):
    """What another agent found out: passages as a tool gives them, and ``inner``, the rollout that it took."""

    def __init__(self, passages: Iterable, inner: Trajectory):
        super().__init__(passages)
        self.inner = inner


@dataclass(frozen=True)
class Request:
    """A call that a turn asks for, before it has been made."""

    tool: Tool
    argument: str


@dataclass(frozen=True)
class Observation:
    """What the environment writes after a turn.

    Attributes:
        kind: of the segment: "information", or "invalid" for a message that the turn held no action.
        decides: where not None, the text is put into the model's mouth and its turn goes on: the letter at this place
            of the text decides for the act, the others only spell it.
    """

    text: str
    kind: str = "information"
    decides: int | None = None


@dataclass(frozen=True)
class Done:
    """The episode is over: "answer", "turns" (none left), "length" (of the completion) or "stop" (of the message)."""

    reason: str
    answer: str | None = None


@dataclass
class Environment:
    """One episode. A subclass says what a turn means (``stops``, ``reset``, ``act``, ``observe``, ``parts``).

    Args:
        tools: what may be called; shared by all episodes.
        limits: see ``environment.limits``.
        measure: text -> its length in tokens.
        prompt: template of the user message, with ``{question}``; "" for the environment's own.
        first_action: the act that the model is made to begin with, None for its own choice.

    Attributes:
        turn: number of the turn that is being written, from 0.
        calls: the tool calls so far.
        invalid_turns: turns so far without a valid action.
    """

    tools: Sequence[Tool] = ()
    limits: Limits = field(default_factory=Limits)
    measure: Callable[[str], int] = len
    prompt: str = ""
    first_action: str | None = None
    turn: int = field(default=0, init=False)
    calls: list[ToolCall] = field(default_factory=list, init=False)
    invalid_turns: int = field(default=0, init=False)

    @property
    def stops(self) -> tuple[str, ...]:
        """Where the turn that is being written ends."""
        raise NotImplementedError

    @property
    def roles(self) -> dict[str, str]:
        """By a tag of the model's, who writes from the end of the tag on: the author of this name, where a policy has
        one, or "": the first. Only asked where a policy has several authors.
        """
        return {}

    def reset(self, question: Question) -> str:
        """Begin an episode; the text of the prompt."""
        raise NotImplementedError

    def act(self, turn: str, end: str | None = None) -> Request | Observation | Done:
        """What a turn leads to.

        Args:
            turn: all that the model wrote in it.
            end: None where a stop string or the limit of the turn ended it, "stop" where the model ended its message,
                "length" where the tokens of the completion are used up, so that only an answer counts.
        """
        raise NotImplementedError

    def observe(self, call: ToolCall) -> Observation:
        """What the model is shown of a call that was made."""
        raise NotImplementedError

    def parts(self, turn: str) -> list[tuple[str, int, int]]:
        """The turn cut into ``(kind, start, end)``, characters, without a gap."""
        raise NotImplementedError

    def step(self, turn: str, end: str | None = None) -> Observation | Done:
        """``act``, and ``observe`` where a tool has to be called."""
        return step_all([self], [turn], [end])[0]


def step_all(
    environments: Sequence[Environment], turns: Sequence[str], ends: Sequence[str | None]
) -> list[Observation | Done]:
    """``step`` of many episodes: the calls of all go to each tool in one batch."""
    outcomes: list[Any] = [e.act(turn, end) for e, turn, end in zip(environments, turns, ends)]
    waiting = (i for i, outcome in enumerate(outcomes) if isinstance(outcome, Request))
    for places in grouped(waiting, lambda i: id(outcomes[i].tool)).values():
        tool, limits = outcomes[places[0]].tool, environments[places[0]].limits
        calls = call_all(tool, [outcomes[i].argument for i in places], limits.topk, limits.search_timeout)
        for i, call in zip(places, calls):
            environments[i].calls.append(call)
            outcomes[i] = environments[i].observe(call)
    return outcomes


def call_all(tool: Tool, arguments: list[str], k: int, timeout: float | None) -> list[ToolCall]:
    """A call for each argument. A batch that fails is tried one by one, so one argument cannot spoil all.

    Args:
        timeout: seconds that the batch may take, and once more all that is tried one by one; None: for ever.
    """
    started = time.perf_counter()
    answers = _answers(tool, arguments, k, timeout if tool.timed else None)
    seconds = (time.perf_counter() - started) / max(1, len(arguments))
    each = zip(arguments, answers)
    return [ToolCall(tool.name, a, hits, seconds, error, inner) for a, (hits, error, inner) in each]


class _Late(TimeoutError):
    """Our time is up; an engine that raises ``TimeoutError`` itself has only failed."""


def _answers(
    tool: Tool, arguments: list[str], k: int, timeout: float | None
) -> list[tuple[list[Hit], str | None, Trajectory | None]]:
    """Hits and error for each argument, and the rollout of an agent that was asked."""
    if tool.batched or len(arguments) == 1:
        try:
            return [(hits, None, inner) for hits, inner in _in_time(tool, arguments, k, timeout)]
        except Exception as e:
            if len(arguments) == 1 or isinstance(e, _Late):
                return [([], _why(e), None)] * len(arguments)
    end = time.monotonic() + (timeout or 1e9)  # 30 years stand for ever
    return [_answers(tool, [argument], k, max(0.0, end - time.monotonic()))[0] for argument in arguments]


def _in_time(
    tool: Tool, arguments: list[str], k: int, timeout: float | None
) -> list[tuple[list[Hit], Trajectory | None]]:
    """The hits for each argument; raises ``TimeoutError`` after ``timeout`` seconds (the call is abandoned)."""
    if timeout == 0:  # used up by those before: nothing is begun
        raise _Late
    future: Future = Future()

    def run() -> None:
        try:
            results = tool.run(arguments, k)
            if isinstance(results, (str, Mapping)) or len(results) != len(arguments):
                raise ValueError(f"the {tool.name} gave {len(results)} results for {len(arguments)} arguments")
            inner = lambda result: result.inner if isinstance(result, Finding) else None
            future.set_result([(_as_hits(result, k), inner(result)) for result in results])
        except BaseException as e:  # also a panic in Rust, or an exit
            future.set_exception(e if isinstance(e, Exception) else RuntimeError(_why(e)))

    Thread(target=run, daemon=True).start()  # one of a pool would be waited for when the program ends
    if not wait([future], timeout).done:
        raise _Late
    return future.result()


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    try:
        return f"{type(error).__name__}: {str(error)[:200]}"
    except Exception:  # it cannot even say what it is
        return type(error).__name__


def _as_hits(result: Any, k: int) -> list[Hit]:
    """What a tool may return, as hits: a hit, a passage, plain text, or a list of these."""
    if isinstance(result, (str, bytes, Mapping, Passage, Hit)):
        result = [] if isinstance(result, str) and not result.strip() else [result]
    return [_as_hit(item, rank) for rank, item in enumerate(islice(result, k))]


def _as_hit(item: Any, rank: int) -> Hit:
    """Of plain types all through, whatever an engine put there: it is escaped, shown and logged later.

    Without a score, or with one that is no finite number, the rank stands for it.
    """
    item = Passage("", "", item) if isinstance(item, str) else item
    passage, score = (item.passage, item.score) if isinstance(item, Hit) else (item, None)
    if not isinstance(passage, Passage):
        raise TypeError(f"the engine returned {type(item).__name__}; expected Hit, Passage or str")
    parts = ("" if part is None else str(part) for part in (passage.id, passage.title, passage.text))
    score = float(-rank if score is None else score)
    # half a surrogate pair has no form in UTF-8: "?"
    whole = Passage(*(part.encode("utf-8", "replace").decode() for part in parts))
    return Hit(whole, score if math.isfinite(score) else float(-rank))
