"""What every reward is, how a batch is scored safely, and how the model's own words are found.

A reward is a callable on a batch of trajectories that returns one float each and has a ``name``. It may
read only what the model wrote, through ``model_turns`` and ``final_answer``; text of the environment
(passages, titles, error notes, the prompt) never reaches it as if the model had written it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..environment import protocol
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
        """One float per trajectory.

        Raises:
            RewardError: ``value`` failed; the message names the reward and the trajectory.
        """
        out = []
        for i, t in enumerate(trajectories):
            try:
                out.append(float(self.value(t)))
            except RewardError:
                raise
            except Exception as e:
                raise RewardError(f"reward {self.name!r} failed on {_which(i, t)}: {_say(e)}") from e
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


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
    name = name_of(reward)
    try:
        values = list(reward(trajectories))
    except RewardError:
        raise
    except Exception as e:
        raise RewardError(f"reward {name!r} failed on {_culprit(reward, trajectories)}: {_say(e)}") from e
    return _check_values(name, values, trajectories)


def _check_values(name: str, values: Sequence, trajectories: Sequence[Trajectory]) -> list[float]:
    """The values as floats."""
    if len(values) != len(trajectories):
        ids = ", ".join(repr(t.question.id) for t in trajectories[:3])
        raise RewardError(
            f"reward {name!r} returned {len(values)} value(s) for {len(trajectories)} trajectories (questions {ids}…)"
        )
    numbers = []
    for i, (value, t) in enumerate(zip(values, trajectories)):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise RewardError(f"reward {name!r} gave {value!r} to {_which(i, t)}: not a finite number")
    return numbers


def score(reward: RewardFunction, trajectories: Sequence[Trajectory]) -> Scores:
    """What a reward says of a batch, as a return value: no trajectory is touched (``Scores.keep`` writes it down).

    ``parts`` has the values under the reward's name; a ``Composite`` adds its parts. ``turns`` has one value per turn
    that sum to the whole; what a reward does not place in a turn stands in the last.

    Raises:
        RewardError: see ``checked``.
    """
    if hasattr(reward, "scores"):
        scores = reward.scores(trajectories)
        _check_values(name_of(reward), scores.values, trajectories)
        return scores
    values = checked(reward, trajectories)
    return Scores(values, {name_of(reward): values}, by_turn(reward, trajectories, values))


def by_turn(reward, trajectories: Sequence[Trajectory], values: Sequence[float]) -> list[list[float]]:
    """The values by turn: as the reward's ``per_turn`` says, otherwise the whole in the last turn."""
    if hasattr(reward, "per_turn"):
        return reward.per_turn(trajectories)
    return [[0.0] * (turn_count(t) - 1) + [v] for t, v in zip(trajectories, values)]


def turn_count(trajectory: Trajectory) -> int:
    """Turns of the trajectory, at least 1."""
    last = trajectory.segments[-1].turn + 1 if trajectory.segments else 1
    return max(1, trajectory.turns, last)


def group_of(trajectory: Trajectory) -> str:
    """What the trajectory is compared within: its ``group``, or its question where none is set."""
    return trajectory.group or trajectory.question.id


def by_group(trajectories: Sequence[Trajectory]) -> dict[str, list[int]]:
    """Positions in the batch by group."""
    groups: dict[str, list[int]] = {}
    for i, t in enumerate(trajectories):
        groups.setdefault(group_of(t), []).append(i)
    return groups


def model_turns(trajectory: Trajectory) -> list[tuple[int, str]]:
    """``(turn, text)`` of each unbroken run of text that the model wrote.

    Text on both sides of an observation is never joined, so no tag can be built across it.
    """
    runs: list[tuple[int, str]] = []
    open_turn = None  # the turn of the run that the next segment may lengthen
    for s in trajectory.segments:
        if not s.by_model:
            open_turn = None
        elif s.turn == open_turn:
            runs[-1] = (s.turn, runs[-1][1] + s.text)
        else:
            runs.append((s.turn, s.text))
            open_turn = s.turn
    return runs


def answers_in(text: str) -> list[tuple[str, bool]]:
    """Every complete answer of a model's text as ``(answer, thought)``, in order.

    ``thought`` is True for an answer inside a think block that was closed after it: it is part of the
    reasoning, not an action. (A block left open ends at the answer, as it does in a rollout.)

    >>> answers_in("<think> is it <answer>A</answer>? </think><answer>B</answer>")
    [('A', True), ('B', False)]
    """
    found: list[list] = []
    opened, thinking = None, None  # where an <answer> content began; how many answers preceded <think>
    for m in protocol.tags_in(text):
        closing, kind = m.group(1), m.group(2)
        if kind == "think":
            if closing and thinking is not None:
                for answer in found[thinking:]:
                    answer[1] = True
            thinking = None if closing else len(found)
        elif kind == "answer":
            if closing and opened is not None:
                found.append([text[opened : m.start()].strip(), False])
            opened = None if closing else m.end()
    return [tuple(answer) for answer in found]


def final_answer(trajectory: Trajectory) -> str | None:
    """The answer that counts: the last complete one that the model wrote outside its reasoning.

    Read from the model's segments; ``trajectory.answer`` is believed only where there are none.
    """
    if not trajectory.segments:
        return trajectory.answer
    for _, text in reversed(model_turns(trajectory)):
        if "</answer>" in text:
            for answer, thought in reversed(answers_in(text)):
                if not thought:
                    return answer
    return None


def answer_flags(trajectory: Trajectory) -> list[str]:
    """What is odd about the answers: "several" complete ones, or one "in_think".

    >>> answer_flags(Trajectory(None, [], [], [], []))
    []
    """
    found = [a for _, text in model_turns(trajectory) for a in answers_in(text)]
    flags = ["several"] if len(found) > 1 else []
    return flags + (["in_think"] if any(thought for _, thought in found) else [])


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


def _say(e: Exception) -> str:
    return f"{type(e).__name__}: {e}"
