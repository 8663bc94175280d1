"""Human preference: choices between two trajectories, and a reward that learns from them.

The model is Bradley and Terry's (1952): P(a preferred to b) = sigmoid(r(a) - r(b)), with a linear
``r(t) = w . features(t)``, as the reward models of RLHF are fitted (Ouyang et al. 2022, arXiv 2203.02155).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..environment.limits import Positive, valid
from ..files import append_json_lines, read_json_lines
from ..records import Trajectory
from .answer import ExactMatch, f1_score
from .base import Reward, final_answer
from .cost import searches_by_turn
from .process import Retrieval, format_errors
from .steps import RepeatedSearch

#: What a trajectory is described by. Only counts and the model's own answer: no text of a passage decides.
FEATURES: dict[str, Callable[[Trajectory], float]] = {
    "exact_match": ExactMatch().value,
    "f1": lambda t: f1_score(final_answer(t), t.question.answers),
    "answered": lambda t: float(bool(final_answer(t))),
    "answer_words": lambda t: math.log1p(len((final_answer(t) or "").split())),
    "model_tokens": lambda t: math.log1p(sum(t.mask)),
    "searches": lambda t: float(sum(searches_by_turn(t))),
    "repeated_searches": lambda t: 0.0 - RepeatedSearch(1.0).value(t),
    "retrieved": Retrieval().value,
    "well_formed": lambda t: float(not format_errors(t)),
}


def record_choice(path: str | os.PathLike, a: Trajectory, b: Trajectory, preferred: str) -> None:
    """Append one choice to a JSON Lines file; ``preferred`` is "a" or "b".

    Raises:
        ValueError: another value of ``preferred``.
    """
    if preferred not in ("a", "b"):
        raise ValueError(f"preferred must be 'a' or 'b', not {preferred!r}")
    append_json_lines(path, [{"a": a.to_dict(), "b": b.to_dict(), "preferred": preferred}])


def read_choices(path: str | os.PathLike) -> list[tuple[Trajectory, Trajectory]]:
    """The choices of a file as pairs (preferred, other).

    Raises:
        ValueError: a line is not a choice; the message names file and line.
    """
    return list(read_json_lines(path, _choice))


def _choice(row: Any) -> tuple[Trajectory, Trajectory]:
    try:
        a, b = (Trajectory.from_dict(row[side]) for side in "ab")
        return {"a": (a, b), "b": (b, a)}[row["preferred"]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"not a choice between two trajectories ({e})") from None


class PreferenceReward(Reward):
    """The fitted r(t) of the module's head; higher is preferred, only differences have a meaning.

    Attributes:
        weights: by feature, for a change of one standard deviation of that feature's differences.
        accuracy: share of the pairs it was fitted on that it orders as the human did.
    """

    def __init__(self, pairs: Sequence[tuple[Trajectory, Trajectory]], *, l2: float = 0.1, name: str = "preference"):
        """Fit to pairs (preferred, other) by the penalised likelihood, which is convex:

            minimise  sum_i log(1 + exp(-w . (x_i - y_i)))  +  l2 / 2 |w|^2

        Raises:
            ValueError: no pairs, or ``l2`` not above 0 and finite.
        """
        import numpy as np
        from scipy.optimize import minimize
        from scipy.special import expit

        if not pairs:
            raise ValueError("PreferenceReward needs at least one pair (preferred, other)")
        l2, self.name = valid(Positive, l2, "PreferenceReward: l2"), name
        d = np.array([[f(a) - f(b) for f in FEATURES.values()] for a, b in pairs])
        self._scale = np.sqrt((d**2).mean(0))
        self._scale[self._scale < 1e-9] = np.inf  # a feature that never differed tells nothing
        d /= self._scale

        def loss_and_gradient(w):
            loss = np.logaddexp(0, -d @ w).sum() + l2 / 2 * w @ w
            return loss, l2 * w - d.T @ expit(-d @ w)

        self._w = minimize(loss_and_gradient, np.zeros(len(FEATURES)), jac=True, options={"gtol": 1e-9}).x
        self.weights = dict(zip(FEATURES, self._w.tolist()))
        self.accuracy = float((d @ self._w > 0).mean())

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory."""
        import numpy as np

        x = np.array([[f(t) for f in FEATURES.values()] for t in trajectories]).reshape(-1, len(FEATURES))
        return ((x / self._scale) @ self._w).tolist()

    def probability(self, a: Trajectory, b: Trajectory) -> float:
        """P(a is preferred to b)."""
        from scipy.special import expit

        worth_a, worth_b = self([a, b])
        return float(expit(worth_a - worth_b))
