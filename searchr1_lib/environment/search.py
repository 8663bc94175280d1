"""The environment of Search-R1: think, search as often as need be, read, answer (arXiv 2503.09516, section 3.2).

Beside the search engine it takes any further ``Tool``: each has a tag of its name, and one action a turn is carried
out, whichever tool it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..records import Hit, Question, ToolCall
from . import protocol
from .base import Done, Environment, Observation, Request, Tool

#: Too few characters of a document to say anything: rather fewer documents.
_LEAST = 40
#: No token stands for more characters than this, so no more of a document than so many a token need be measured.
_LONGEST_TOKEN = 64


class Search(Tool):
    """A search engine as a tool.

    Args:
        engine: anything with ``search_batch(queries, k)`` or ``search(query)``; may return hits, passages or text.
    """

    name = "search"

    def __init__(self, engine):
        self.engine = engine
        self.batched = hasattr(engine, "search_batch")
        self.timed, self.authors = getattr(engine, "timed", True), getattr(engine, "authors", ())

    def run(self, arguments: list[str], k: int) -> list:
        if self.batched:
            return self.engine.search_batch(arguments, k=k)
        return [self.engine.search(query) for query in arguments]


def tools_of(engine) -> list[Tool]:
    """The tools that an engine stands for, or a list of an engine and further tools."""
    items = engine if isinstance(engine, (list, tuple)) else [engine]
    return [item if isinstance(item, Tool) else Search(item) for item in items]


@dataclass
class SearchEnvironment(Environment):
    """See ``Environment`` for the arguments."""

    def __post_init__(self):
        self.by_name = {tool.name: tool for tool in self.tools}
        self.names = tuple(self.by_name)
        if len(self.names) < len(self.tools) or {"think", "information", "answer"} & set(self.names):
            raise ValueError(f"each tool needs a name that no other one and no tag has: {[t.name for t in self.tools]}")
        self._forces = self.first_action is not None

    @property
    def stops(self) -> tuple[str, ...]:
        stops = protocol.stops_of(self.names)
        return ("</think>", *stops) if self._forces else stops

    @property
    def roles(self) -> dict[str, str]:
        """What stands between a tag and the next one is of the tag's name: a query of "search"."""
        tags = ("think", *self.names, "answer")
        return {f"<{tag}>": tag for tag in tags} | {f"</{tag}>": "" for tag in tags}

    def reset(self, question: Question) -> str:
        """The user message: the template, and before it what it does not tell of further tools."""
        prompt = protocol.build_prompt(question.text, self.prompt or protocol.PROMPT, self.names)
        usage = "".join(f"{tool.usage}\n" for tool in self.tools if tool.usage)
        return usage + "".join(tool.preface(question) for tool in self.tools) + prompt

    def act(self, turn: str, end: str | None = None) -> Request | Observation | Done:
        if self._forces:
            return self._force(turn, end)
        action, last = protocol.read_action(turn, self.names), self.turn >= self.limits.max_turns
        self.turn += 1
        if action.kind == "answer":
            return Done("answer", action.text)
        if end == "length":
            return Done("length")
        if action.kind is not None and not last:
            return Request(self.by_name[action.kind], action.text)
        self.invalid_turns += action.kind is None
        if end == "stop" and action.kind is None:
            return Done("stop")
        if last:
            return Done("turns")
        usage = "".join(f"{tool.usage} " for tool in self.tools if tool.usage)
        return Observation(protocol.INVALID_ACTION.replace("I try again.", f"{usage}I try again."), "invalid")

    def _force(self, turn: str, end: str | None) -> Observation | Done:
        """Put the opening tag of ``first_action`` behind the thoughts."""
        self._forces = False
        if end == "stop" or protocol.find_stop(turn, self.stops)[1]:
            return Done("stop")  # it acted without thinking: nothing to force
        newline = "" if turn.endswith("\n") else "\n"
        return Observation(f"{newline}<{self.first_action}>", decides=len(newline) + 1)

    def observe(self, call: ToolCall) -> Observation:
        note = f"The {call.tool} failed: {call.error}" if call.error else "Nothing was found."
        budget = self.limits.max_observation_tokens
        return Observation(fit_observation(self.measure, call.result, budget, note, self.names))

    def parts(self, turn: str) -> list[tuple[str, int, int]]:
        """As ``protocol.split_turn``; a forged observation is the model's own text, whatever it imitates."""
        spans = protocol.split_turn(turn, self.names)
        return [("text" if kind == "information" else kind, start, end) for kind, start, end in spans]


def fit_observation(
    measure: Callable[[str], int],
    hits: Sequence[Hit],
    budget: int,
    note: str = "Nothing was found.",
    tools: tuple[str, ...] = protocol.TOOLS,
) -> str:
    """The observation of ``hits`` in at most ``budget`` tokens: the longest documents are cut, tags never.

    Documents that do not fit at all are left out from the end. Without hits it is that of ``note``.
    """
    most = budget * _LONGEST_TOKEN  # the time to measure a text must not grow with what an engine returns
    documents = [
        protocol.format_document(i, h.passage.title[:most], h.passage.text[:most], tools)[:most]
        for i, h in enumerate(hits, 1)
    ] or [protocol.escape(note, tools)]

    def cut(number: int, length: int) -> str:
        shown = [d if len(d) <= length else f"{d[:length]} …" for d in documents[:number]]
        return protocol.format_observation(shown or ["No document fits."])

    def fits(number: int, length: int) -> bool:
        text = cut(number, length)
        return len(text) <= most and measure(text) <= budget

    number, longest = len(documents), max(map(len, documents))
    if not fits(number, longest):
        least = min(_LEAST, len(documents[0]))
        number = _largest(number, lambda n: fits(n, least)) if hits else 1
        longest = max(map(len, documents[:number]), default=0)
        longest = max(least, _largest(longest, lambda length: fits(number, length)))
    return cut(number, longest)


def _largest(high: int, good: Callable[[int], bool]) -> int:
    """The largest number up to ``high`` that is good, by bisection; 0 where none is."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
