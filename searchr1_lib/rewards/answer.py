"""Answer rewards: exact match, token F1 and substring match against the gold answers (see ``metrics``).

Unlike Search-R1's script, they read only the model's own text, never the example tags of the prompt.
"""

from __future__ import annotations

from ..metrics import exact_match, f1_score, substring_match
from ..metrics import normalize_answer as normalize_answer
from ..records import Trajectory
from .base import Reward, final_answer


class ExactMatch(Reward):
    """``exact_match`` of the final answer: 1.0 or 0.0."""

    name = "exact_match"

    def value(self, trajectory: Trajectory) -> float:
        return exact_match(final_answer(trajectory), trajectory.question.answers)


class F1(Reward):
    """``f1_score`` of the final answer, in [0, 1]."""

    name = "f1"

    def value(self, trajectory: Trajectory) -> float:
        return f1_score(final_answer(trajectory), trajectory.question.answers)


class SubstringMatch(Reward):
    """``substring_match`` of the final answer: 1.0 or 0.0. Pair it with a length penalty: long answers win it."""

    name = "substring_match"

    def value(self, trajectory: Trajectory) -> float:
        return substring_match(final_answer(trajectory), trajectory.question.answers)
