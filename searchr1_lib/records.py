"""What flows through the project: questions, passages, hits and trajectories.

A ``Trajectory`` is made once, by the rollout, and only gains fields afterwards (reward, advantage).
Importing this loads no numeric library: a record is plain Python and has one JSON form, and one row in a
table (Parquet, ``datasets``) whose columns follow from the fields' types.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Passage:
    """A piece of text that a search can return."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Hit:
    """A passage that a search returned, with the engine's score (higher is better)."""

    passage: Passage
    score: float


@dataclass
class Question:
    """A question with its accepted answers.

    Attributes:
        passages: ids of the gold passages, in the order of the hops.
        hops: how many searches are needed by a model that knows nothing of it.
        known: True if the policy was taught the facts, False if they stand only in passages,
            None where nobody can say (real questions).
        source: where it comes from, e.g. "almanac/bridge".
    """

    id: str
    text: str
    answers: list[str]
    passages: list[str] = field(default_factory=list)
    hops: int = 1
    known: bool | None = None
    source: str = ""

    def __init__(self, id, text, answers, *, passages=(), hops=1, known=None, source=""):
        self.id, self.text, self.answers = str(id), text, list(answers)
        self.passages, self.hops, self.known, self.source = list(passages), hops, known, source


@dataclass
class SearchCall:
    """One search of a trajectory. ``error`` says why there are no hits, None if the engine answered."""

    query: str
    hits: list[Hit]
    seconds: float
    error: str | None = None


@dataclass
class Segment:
    """A part of a completion, in order and without gaps.

    Attributes:
        kind: "think", "search", "answer", "text" (the model's, outside any tag), "information" (an
            observation) or "invalid" (the environment's message that a turn held no action).
        text: the exact text, tags included.
        turn: number of the turn, from 0.
        start, end: the tokens ``completion_ids[start:end]`` in which the text stands. Tokens can
            straddle two segments; both then count it.
    """

    kind: str
    text: str
    turn: int
    start: int
    end: int

    @property
    def by_model(self) -> bool:
        """False for text of the environment, whatever it looks like."""
        return self.kind not in ("information", "invalid")


FINISH_REASONS = ("answer", "turns", "length", "stop")


@dataclass
class Trajectory:
    """One rollout: what was asked, what the model wrote, what the environment wrote, what it earned.

    Attributes:
        prompt_ids: token ids of the prompt, chat template included.
        completion_ids, mask, logprobs: equal length T. ``mask`` is 1 where the model sampled the
            token and 0 for environment text; ``logprobs`` are taken under the sampling distribution
            (temperature applied), 0.0 where the mask is 0.
        tokens: the text of each completion token, for display ("\\ufffd" for a part of a character).
        segments: the completion cut by kind, see ``Segment``.
        searches: one per executed search, in order.
        answer: the text of the ``<answer>`` action, None if the rollout ended without one.
        finish_reason: "answer", "turns" (no turn left), "length" (token budget spent) or "stop"
            (the model ended its message without an answer).
        reward: the scalar that training used; ``rewards`` its parts by name.
        turn_rewards: the reward by turn (they sum to it), in the order of ``Segment.turn``.
        group: rollouts of one question in one step share it.
        invalid_turns: turns without a valid action, a last one that just stops included.
        first_action: "search" or "answer" where that tag was put into the model's mouth in its first turn.
        token_values: further values per token by name, e.g. "entropy" (nats), each of length T.
    """

    question: Question
    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    logprobs: list[float]
    segments: list[Segment] = field(default_factory=list)
    searches: list[SearchCall] = field(default_factory=list)
    answer: str | None = None
    finish_reason: str = "stop"
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] = field(default_factory=list)
    advantage: float | None = None
    group: str = ""
    prompt: str = ""
    tokens: list[str] = field(default_factory=list)
    turns: int = 0
    invalid_turns: int = 0
    first_action: str | None = None
    step: int | None = None
    seconds: float = 0.0
    token_values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole completion, environment text included."""
        return "".join(s.text for s in self.segments)

    @property
    def model_text(self) -> str:
        """Only what the model wrote."""
        return "".join(s.text for s in self.segments if s.by_model)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: nested plain values; ``from_dict`` reads it back equal. Its lists are the trajectory's own."""
        hits = [[{"passage": dict(vars(h.passage)), "score": h.score} for h in call.hits] for call in self.searches]
        return vars(self) | {
            "question": dict(vars(self.question)),
            "segments": [dict(vars(s)) for s in self.segments],
            "searches": [vars(call) | {"hits": h} for call, h in zip(self.searches, hits)],
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Trajectory:
        """Read the JSON form.

        Raises:
            ValueError: a field is missing or unknown, or the per-token fields differ in length.
        """
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(row) - names):
            raise ValueError(f"unknown trajectory field(s) {', '.join(unknown)}: written by another version?")
        try:
            row = dict(row)
            row["question"] = Question(**row["question"])
            row["segments"] = [Segment(**s) for s in row.get("segments", [])]
            row["searches"] = [
                SearchCall(**{**s, "hits": [Hit(Passage(**h["passage"]), h["score"]) for h in s["hits"]]})
                for s in row.get("searches", [])
            ]
            made = cls(**row)
        except (TypeError, KeyError) as e:
            raise ValueError(f"not a trajectory: {e}") from None
        if not len(made.completion_ids) == len(made.mask) == len(made.logprobs):
            raise ValueError("completion_ids, mask and logprobs differ in length")
        return made

    def to_row(self) -> dict[str, Any]:
        """The row of a table (see ``arrow_schema``): the JSON form, a dictionary as a list of {"name", "value"}."""
        row = self.to_dict()
        return row | {f: [{"name": k, "value": v} for k, v in row[f].items()] for f in ("rewards", "token_values")}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Trajectory:
        """Read a row of the Parquet file or of the ``datasets.Dataset``; errors as in ``from_dict``."""
        try:
            named = {f: {x["name"]: x["value"] for x in row[f]} for f in ("rewards", "token_values")}
        except (TypeError, KeyError) as e:
            raise ValueError(f"not a trajectory: {e}") from None
        return cls.from_dict(row | named)


def arrow_schema():
    """The columns of a table of trajectories (a ``pyarrow.Schema``), read off the records' type hints.

    Whole numbers are int64, others float64, dictionaries lists of {name, value} (``datasets`` has no maps).
    """
    import pyarrow as pa

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

    def columns(record):
        hints = get_type_hints(record)
        return [(f.name, kind(hints[f.name])) for f in fields(record)]

    def kind(hint):
        args = [a for a in get_args(hint) if a is not type(None)]
        if is_dataclass(hint):
            return pa.struct(columns(hint))
        if get_origin(hint) is list:
            return pa.list_(kind(args[0]))
        if get_origin(hint) is dict:
            return pa.list_(pa.struct([("name", kind(args[0])), ("value", kind(args[1]))]))
        return plain[hint] if hint in plain else kind(args[0])  # the rest is "or None"

    return pa.schema(columns(Trajectory))
