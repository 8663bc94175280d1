"""Preference: choices between two rollouts of a question, and a reward that learns from nothing but such choices.

The model is Bradley and Terry's (1952): P(a preferred to b) = sigmoid(r(a) - r(b)), with a linear
``r(t) = w . x(t)``, as the reward models of RLHF are fitted (Ouyang et al. 2022, arXiv 2203.02155). What ``x`` may hold
is what a labeller sees: the question, what the model wrote and read. Never the accepted answers, the gold passages or
what the question needs: these would be the reward that the choices are meant to replace.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..environment.limits import Count, Positive, Whole, check
from ..files import append_json_lines, read_json_lines
from ..metrics import exact_match, passages_read
from ..records import Trajectory
from .base import Reward, final_answer, model_turns
from .cost import searches_by_turn
from .process import format_errors
from .steps import RepeatedSearch

Pair = tuple[Trajectory, Trajectory]
PREFERRED = ("a", "b", "tie")
#: What somebody says of how sure they are: "I believe", "I faintly recall", "I am fairly sure".
_SURENESS = re.compile(r"\bI (?:am )?(?:\w+ly )?\w+")


def _answer_was_read(t: Trajectory) -> float:
    """Whether the answer stands in a passage that was read."""
    answer = final_answer(t) or ""
    words = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return float(bool(answer.strip()) and any(re.search(words, p.text, re.IGNORECASE) for p in passages_read(t)))


#: What anybody can see of a rollout, as numbers.
FEATURES: dict[str, Callable[[Trajectory], float]] = {
    "answered": lambda t: float(bool(final_answer(t))),
    "says_unknown": lambda t: exact_match(final_answer(t), "unknown"),
    "answer_was_read": _answer_was_read,
    "answer_words": lambda t: math.log1p(len((final_answer(t) or "").split())),
    "model_tokens": lambda t: math.log1p(sum(t.mask)),
    "searches": lambda t: float(sum(searches_by_turn(t))),
    "repeated_searches": lambda t: 0.0 - RepeatedSearch(1.0).value(t),
    "well_formed": lambda t: float(not format_errors(t)),
}


def visible(trajectories: Sequence[Trajectory]) -> list[dict[str, float]]:
    """``FEATURES`` of each, and ``sureness_said`` at its end: ``"says I believe": 1.0``."""
    return [{name: feature(t) for name, feature in FEATURES.items()} | _said_at_the_end(t) for t in trajectories]


def _said_at_the_end(t: Trajectory) -> dict[str, float]:
    return {f"says {words}": float(n) for words, n in Counter(sureness_said(t)).items()}


def sureness_said(t: Trajectory) -> list[str]:
    """What it says of how sure it is in the turn in which it ends, such as "I believe", once for each time."""
    return _SURENESS.findall(model_turns(t)[-1][1]) if t.segments else []


@dataclass(frozen=True)
class Choice:
    """What somebody said of two rollouts of a question, which they saw whole and without rewards.

    Attributes:
        preferred: "a", "b" or "tie".
        who: the labeller.
        when: in UTC, ISO 8601.
        shown: in which order the two were shown: "ab", "ba", or "both" one after the other.
    """

    a: Trajectory
    b: Trajectory
    preferred: str
    who: str = "me"
    when: str = ""
    shown: str = "ab"

    def __post_init__(self):
        if self.preferred not in PREFERRED:
            raise ValueError(f"preferred must be 'a', 'b' or 'tie', not {self.preferred!r}")


def pair_key(a: Trajectory, b: Trajectory) -> str:
    """A name of a pair by its content, whichever of the two comes first."""
    texts = sorted(f"{t.question.id}\n{t.text}" for t in (a, b))
    return hashlib.sha256("\n\n".join(texts).encode("utf-8", "replace")).hexdigest()[:16]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_choice(path: str | os.PathLike, *choices: Choice) -> None:
    """Append choices to a JSON Lines file; those without a time get this one."""
    rows = [vars(c) | {"a": c.a.to_dict(), "b": c.b.to_dict(), "when": c.when or now()} for c in choices]
    append_json_lines(path, rows)


def read_choices(path: str | os.PathLike) -> list[Choice]:
    """The choices of a file.

    Raises:
        ValueError: a line is not a choice; the message names file and line.
    """
    return list(read_json_lines(path, _choice))


def _choice(row: Any) -> Choice:
    try:
        return Choice(**row | {side: Trajectory.from_dict(row[side]) for side in "ab"})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"not a choice between two trajectories ({e})") from None


class PreferenceReward(Reward):
    """The fitted r(t) of the module's head; higher is preferred, only differences have a meaning.

    With ``members`` > 1 it is the mean of as many fits, each on choices drawn anew with replacement: where they
    disagree, the choices say nothing yet (``disagreement``).

    Args:
        choices: ties are left out.
        see: what is seen of a batch of trajectories, names and numbers for each; see ``visible`` and
            ``study.feedback.states``.
        l2: weight of the penalty; for each fit

                minimise  sum_i log(1 + exp(-w . (x_i - y_i)))  +  l2 / 2 |w|^2      (x preferred to y; convex)

        seed: of what is drawn anew.

    Attributes:
        weights: by what is seen, for a change of one standard deviation of that feature's differences.
        accuracy: share of the choices it was fitted on that it orders as the labeller did.

    Raises:
        ValueError: no choice that prefers one, or a number that cannot be.
    """

    def __init__(
        self,
        choices: Iterable[Choice],
        *,
        see: Callable[[Sequence[Trajectory]], Sequence[Mapping[str, float]]] = visible,
        l2: float = 0.1,
        members: int = 1,
        seed: int = 0,
        name: str = "preference",
    ):
        import numpy as np

        check(**{"PreferenceReward: l2": (l2, Positive), "members": (members, Count), "seed": (seed, Whole)})
        clear = [c for c in choices if c.preferred != "tie"]
        if not clear:
            raise ValueError("PreferenceReward needs at least one choice that prefers one of the two")
        self._see, self.name = see, name
        better, worse = (see([getattr(c, side) for c in clear]) for side in "ab")
        self._names = sorted({key for row in (*better, *worse) for key in row})
        sign = np.array([[1.0 if c.preferred == "a" else -1.0] for c in clear])
        d = sign * (self._matrix(better) - self._matrix(worse))
        self._scale = np.sqrt((d**2).mean(0))
        self._scale[self._scale < 1e-9] = np.inf  # what never differed tells nothing
        d /= self._scale
        draws = np.random.default_rng(seed).integers(len(d), size=(members - 1, len(d)))
        self._w = np.stack([_fit(d[rows], l2) for rows in (np.arange(len(d)), *draws)])  # (members, F)
        self.weights = dict(zip(self._names, self._w.mean(0).tolist()))
        self.accuracy = float((d @ self._w.mean(0) > 0).mean())

    def _matrix(self, rows: Sequence[Mapping[str, float]]):
        import numpy as np

        return np.array([[row.get(name, 0.0) for name in self._names] for row in rows]).reshape(-1, len(self._names))

    def each(self, trajectories: Sequence[Trajectory]):
        """What every member says, an array (members, B)."""
        return self._w @ (self._matrix(self._see(trajectories)) / self._scale).T

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory."""
        return self.each(trajectories).mean(0).tolist()

    def probabilities(self, pairs: Sequence[Pair]):
        """P(a is preferred to b) as every member says, (members, pairs)."""
        from scipy.special import expit

        a, b = (self.each([pair[side] for pair in pairs]) for side in (0, 1))
        return expit(a - b)

    def disagreement(self, pairs: Sequence[Pair]) -> list[float]:
        """By how much the members' probabilities differ (their standard deviation), for each pair."""
        return self.probabilities(pairs).std(0).tolist()

    @property
    def identity(self) -> str:
        """What decides its values."""
        digest = hashlib.sha256(repr((self._names, self._scale.tolist(), self._w.tolist())).encode())
        return f"PreferenceReward({digest.hexdigest()})"


def _fit(d, l2: float):
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit

    def loss_and_gradient(w):
        loss = np.logaddexp(0, -d @ w).sum() + l2 / 2 * w @ w
        return loss, l2 * w - d.T @ expit(-d @ w)

    return minimize(loss_and_gradient, np.zeros(d.shape[1]), jac=True, options={"gtol": 1e-9}).x
