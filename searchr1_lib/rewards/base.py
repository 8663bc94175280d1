"""What every reward is, how a batch is scored safely, and how the model's own words are found.

A reward is a callable on a batch of trajectories that returns one float each and has a ``name``. It may
read only what the model wrote, through ``model_turns`` and ``final_answer``; text of the environment
(passages, titles, error notes, the prompt) never reaches it as if the model had written it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby

from ..environment import protocol
from ..metrics import grouped
from ..records import Scores, Trajectory

#: A reward is ``reward(trajectories) -> list[float]`` with an attribute ``name``.
RewardFunction = Callable[[Sequence[Trajectory]], "list[float]"]


class RewardError(ValueError):
    """A reward failed on a trajectory: the message names both. The batch must not be trained on."""


class Reward:
    """A reward that looks at one trajectory at a time: give it a ``name`` and a ``value``."""

    name = "reward"

    def value(self, trajectory: Trajectory) -> float:
        raise NotImplementedError

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory. What ``value`` raises comes through; ``checked`` says for which trajectory."""
        return [float(self.value(t)) for t in trajectories]

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({', '.join(shown)})"


class TurnReward(Reward):
    """A reward that is earned turn by turn: give it ``turn_values``; the whole is their sum."""

    def turn_values(self, trajectory: Trajectory) -> list[float]:
        """One float per turn, ``turn_count(trajectory)`` of them."""
        raise NotImplementedError

    def value(self, trajectory: Trajectory) -> float:
        return math.fsum(self.turn_values(trajectory))

    def per_turn(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        return [self.turn_values(t) for t in trajectories]


def name_of(reward) -> str:
    """The reward's ``name``, or its ``__name__`` if it is a plain function."""
    return getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)


def checked(reward: RewardFunction, trajectories: Sequence[Trajectory]) -> list[float]:
    """Call a reward and check what it returns; touches no trajectory.

    Raises:
        RewardError: the reward raised, returned another number of values than trajectories, or a value
            that is not a finite number. The message names the reward and the trajectory: its place in the
            batch, counted from 0, and its question's id.
    """
    try:
        values = list(reward(trajectories))
    except RewardError:
        raise
    except Exception as e:
        where = _culprit(reward, trajectories)
        raise RewardError(f"reward {name_of(reward)!r} failed on {where}: {type(e).__name__}: {e}") from e
    return _finite(name_of(reward), values, trajectories)


def _finite(name: str, values: Sequence, trajectories: Sequence[Trajectory]) -> list[float]:
    """The values as floats. One that is not finite would silently spoil the advantages of its whole group."""
    if len(values) != len(trajectories):
        ids = ", ".join(repr(t.question.id) for t in trajectories[:3])
        numbers = f"{len(values)} value(s) for {len(trajectories)} trajectories"
        raise RewardError(f"reward {name!r} returned {numbers} (questions {ids}…)")
    for place, (value, t) in enumerate(zip(values, trajectories)):
        with suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(float(value)):
                continue
        raise RewardError(f"reward {name!r} gave {value!r} to {_which(place, t)}: not a finite number")
    return [float(value) for value in values]


def score(reward: RewardFunction, trajectories: Sequence[Trajectory]) -> Scores:
    """What a reward says of a batch, as a return value: no trajectory is touched (``Scores.keep`` writes it down).

    ``parts`` has the values under the reward's name; a ``Composite`` adds its parts. ``turns`` has one value per turn
    that sum to the whole; what a reward does not place in a turn stands in the last.

    Raises:
        RewardError: see ``checked``.
    """
    if hasattr(reward, "scores"):
        said = reward.scores(trajectories)
    else:
        values = checked(reward, trajectories)
        turns = reward.per_turn(trajectories) if hasattr(reward, "per_turn") else in_last_turn(trajectories, values)
        said = Scores(values, {name_of(reward): values}, turns)
    parts = {name: _finite(name, column, trajectories) for name, column in said.parts.items()}
    turns = [list(map(float, row)) for row in said.turns]  # plain ones, which can be logged
    return Scores(_finite(name_of(reward), said.values, trajectories), parts, turns)


def in_last_turn(trajectories: Sequence[Trajectory], values: Sequence[float]) -> list[list[float]]:
    """The values by turn where a reward does not say what each turn earned: all of it in the last."""
    return [[0.0] * (turn_count(t) - 1) + [v] for t, v in zip(trajectories, values)]


def turn_count(trajectory: Trajectory) -> int:
    """Turns of the trajectory, at least 1."""
    last = trajectory.segments[-1].turn + 1 if trajectory.segments else 1
    return max(1, trajectory.turns, last)


def by_group(trajectories: Sequence[Trajectory]) -> dict[str, list[int]]:
    """Positions in the batch by what is compared: the ``group``, or the question where none is set."""
    return grouped(range(len(trajectories)), lambda i: trajectories[i].group or trajectories[i].question.id)


def model_turns(trajectory: Trajectory) -> list[tuple[int, str]]:
    """``(turn, text)`` of each unbroken run of text that the model wrote.

    Text on both sides of an observation is never joined: a passage could otherwise stand between two halves of a tag
    and make an answer of them.
    """
    runs = groupby(trajectory.segments, lambda s: (s.by_model, s.turn))
    return [(turn, "".join(s.text for s in run)) for (by_model, turn), run in runs if by_model]


def answers_in(text: str) -> list[tuple[str, bool]]:
    """Every complete answer of a model's text as ``(answer, thought)``, in order.

    ``thought`` is True for an answer inside a think block that was closed after it: it is part of the
    reasoning, not an action. (A block left open ends at the answer, as it does in a rollout.)

    >>> answers_in("<think> is it <answer>A</answer>? </think><answer>B</answer>")
    [('A', True), ('B', False)]
    """
    answers: list[str] = []
    thought: set[int] = set()
    opened, thinking = None, None  # where an <answer> content began; how many answers preceded <think>
    for tag in protocol.tags_in(text):
        closing, kind = tag.group(1), tag.group(2)
        if kind == "think":
            if closing and thinking is not None:
                thought |= set(range(thinking, len(answers)))
            thinking = None if closing else len(answers)
        elif kind == "answer":
            if closing and opened is not None:
                answers.append(text[opened : tag.start()].strip())
            opened = None if closing else tag.end()
    return [(answer, i in thought) for i, answer in enumerate(answers)]


def final_answer(trajectory: Trajectory) -> str | None:
    """The answer that counts: the last complete one that the model wrote outside its reasoning.

    Read from the model's segments and not from ``trajectory.answer``, which a log or another sampler may have filled
    in from anywhere; it is believed only where there are no segments.
    """
    if not trajectory.segments:
        return trajectory.answer
    answers = (pair for _, text in reversed(model_turns(trajectory)) for pair in reversed(answers_in(text)))
    return next((answer for answer, thought in answers if not thought), None)


def answer_flags(trajectory: Trajectory) -> list[str]:
    """What is odd about the answers: "several" complete ones, or one "in_think".

    >>> answer_flags(Trajectory(None, [], [], [], []))
    []
    """
    thoughts = [thought for _, text in model_turns(trajectory) for _, thought in answers_in(text)]
    return ["several"] * (len(thoughts) > 1) + ["in_think"] * any(thoughts)


def _culprit(reward, trajectories) -> str:
    """The first trajectory on which the reward fails alone (a failed batch is asked again, one by one)."""
    for i, t in enumerate(trajectories):
        try:
            reward([t])
        except Exception:
            return _which(i, t)
    return f"a batch of {len(trajectories)} trajectories, and on none of them alone"


def _which(place: int, t: Trajectory) -> str:
    return f"trajectory {place} of the batch (question {t.question.id!r})"
