"""Tools that remember: ``<recall>`` looks among what earlier episodes found, ``<remember>`` keeps a sentence.

    memory = Recall(MemoryStore("runs/mine/memory"))
    Trainer(policy, questions, [engine, memory], Discounted(0.2, tools={"recall": 0.02}), settings, "runs/mine")

All rollouts of a step see the memory as it was before the step (in Memory-R2, arXiv 2605.21768, memories that part
within a group make its comparison unfair); what they found is merged afterwards, in the order of the rollouts, which
no timing changes. So a run that goes on after a kill remembers what it did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from ..records import Note, Passage, Question, Trajectory
from . import protocol
from .base import Tool
from .limits import Whole, check

#: What is remembered: every passage that a search found, what the policy wrote to ``<remember>``, or nothing.
Rule = Literal["found", "remember", "nothing"]


class Recall(Tool):
    """A memory as a tool, and as notes in the prompt.

    Args:
        store: with ``recall(queries, k)``, ``add(notes)`` and ``rewind(time)``, such as ``search.memory.MemoryStore``.
        rule: what is remembered of an episode.
        notes: so many of what is recalled by the question itself are put into the prompt; 0: none.
        show_age: say of each how many steps ago it was noted.
        name: of the tag, for a model that was taught another one.
    """

    def __init__(self, store, *, rule: Rule = "found", notes: int = 0, show_age: bool = False, name: str = "recall"):
        check(rule=(rule, Rule), notes=(notes, Whole))
        self.store, self.rule, self.notes, self.show_age, self.now = store, rule, notes, show_age, 0
        self.name = name
        between = f"between <{name}> and </{name}>, which costs less than a search; it may be out of date"
        self.usage = f"What earlier questions brought can be looked up {between}."

    @property
    def identity(self) -> str:
        return f"{self.name} {self.store.identity} rule={self.rule} notes={self.notes} show_age={self.show_age}"

    def run(self, arguments: list[str], k: int) -> list:
        return [[self._shown(note) for note, _ in found] for found in self.store.recall(arguments, k)]

    def preface(self, question: Question) -> str:
        (found,) = self.store.recall([question.text], self.notes) if self.notes else ([],)
        shown = [self._shown(note) for note, _ in found]
        lines = [protocol.format_document(i, p.title, p.text) + "\n" for i, p in enumerate(shown, 1)]
        return "Notes of earlier questions:\n" + "".join(lines) if lines else ""

    def _shown(self, note: Note) -> Passage:
        """The passage, with its age in the title; what was there before a run began has none."""
        p = note.passage
        age = f" (noted {self.now - note.time} steps ago)" if self.show_age and note.time >= 0 else ""
        return replace(p, title=p.title + age)

    def merge(self, trajectories: Sequence[Trajectory], step: int) -> None:
        if not self.store.shared:
            self.store.add(notes_of(trajectories, self.rule, step))
        self.now = step + 1

    def rewind(self, step: int) -> None:
        if not self.store.shared:
            self.store.rewind(step)
        self.now = step


class Remember(Tool):
    """Lets the policy say what is worth keeping, for a ``Recall`` with rule "remember"."""

    name = "remember"
    usage = "A sentence to be kept for later questions is written between <remember> and </remember>."

    def run(self, arguments: list[str], k: int) -> list:
        return ["It will be remembered."] * len(arguments)


def notes_of(trajectories: Sequence[Trajectory], rule: Rule = "found", time: int = -1) -> list[Note]:
    """What episodes leave to be remembered, in their order, each once."""
    return list({(note.passage.title, note.passage.text): note for note in _notes(trajectories, rule, time)}.values())


def _notes(trajectories: Sequence[Trajectory], rule: Rule, time: int) -> Iterator[Note]:
    for t in trajectories:
        for call in t.calls:
            if rule == "found" and call.tool == "search":
                yield from (Note(hit.passage, call.argument, "search", time) for hit in call.result)
            if rule == "remember" and call.tool == "remember":
                yield Note(Passage("", t.question.text, call.argument), t.question.text, "policy", time)
