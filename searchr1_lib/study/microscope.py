"""Which credit tells the truth: what each turn of a rollout was worth, beside what every method gave it.

    readings = by_optimum(yardstick, trajectories, credits_of(trajectories, settings))
    for row in verdicts(readings): ...

The truth of a turn is its advantage: by how much what it did is better than what the policy does there on average. The
optimum knows it exactly on the world whose optimum is known (the best is done afterwards), continuing the rollout
estimates it elsewhere (the policy itself goes on). The trajectories should hold each question in several groups: then
there is an average, and the *noise* of a method shows, which is what it says of one decision in different groups.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, get_args

import numpy as np

from ..metrics import grouped
from ..records import Trajectory
from ..training.credit import P_GOLD, credit_of
from ..training.rollout import turn_start
from ..training.settings import Credit, Settings
from .regret import Yardstick

#: A credit or a truth that is nearer to 0 than this is rounding.
ROUNDING = 1e-6
#: What each method gave: by its name, for each rollout a number for each turn.
Credits = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Reading:
    """One turn under the microscope.

    Attributes:
        rollout, turn: its place, both from 0.
        group: in which it was compared.
        situation: turns of the same one began alike: the same question, and all that matters of what was done.
        act: what was done, e.g. "search full", or "trust, search full" where it trusted one hop and searched the next.
        truth: its advantage, in units of reward.
        error: the standard error of ``truth``; 0 where it is exact.
        credit: what each method gave.
    """

    rollout: int
    turn: int
    group: str
    situation: Hashable
    act: str
    truth: float
    error: float
    credit: dict[str, float]

    @property
    def decided(self) -> bool:
        """Whether what was done is known to be better or worse than what is done there on average."""
        return abs(self.truth) > max(ROUNDING, 2 * self.error)


def credits_of(trajectories: Sequence[Trajectory], settings: Settings) -> dict[str, list[list[float]]]:
    """What each method of ``training.credit`` gives to the turns of scored rollouts, by its name.

    Args:
        trajectories: the ``num_generations`` of a group next to each other. "igpo" is left out where they lack
            ``token_values["p_gold"]`` (see ``gold_probabilities``).
        settings: those of the rollouts; "tree_grpo" is left out without ``trees``, "rollout" with ``shuffle_credit``.
    """
    asked = all(P_GOLD in t.token_values for t in trajectories)
    possible = {"igpo": asked, "tree_grpo": settings.trees > 0, "rollout": not settings.shuffle_credit}
    ways = [settings.model_copy(update={"credit": name}) for name in get_args(Credit) if possible.get(name, True)]
    return {way.credit: credit_of(trajectories, way).tolist() for way in ways}


def by_optimum(yardstick: Yardstick, trajectories: Sequence[Trajectory], credits: Credits) -> list[Reading]:
    """One reading for each turn in which something was decided; the truth is the optimum's.

    ``truth = mean of l over the turns of the same situation - l``, where ``l = sum of V* - Q*(act)`` over what the turn
    decided: what it lost. That is ``Q*(act)`` beside its mean over what the policy does there.

    Args:
        trajectories: on the yardstick's world, as they are recorded.
        credits: for each of them and each of its turns, see ``credits_of``.
    """
    seen = []
    for i, t in enumerate(trajectories):
        for turn, made in grouped(yardstick.decisions(t), lambda d: d.turn).items():
            situation = t.question.id, made[0].state, made[0].level, *made[0].values.items()
            seen.append((i, turn, situation, ", ".join(d.act for d in made), sum(d.regret for d in made)))
    usual = {key: fmean(lost for *_, lost in turns) for key, turns in grouped(seen, lambda row: row[2]).items()}
    return [
        Reading(i, turn, trajectories[i].group, key, act, usual[key] - lost, 0.0, _given(credits, i, turn))
        for i, turn, key, act, lost in seen
    ]


def by_continuing(
    trajectories: Sequence[Trajectory], values: Sequence[Sequence[tuple[float, float]]], credits: Credits
) -> list[Reading]:
    """One reading for each turn; the truth is ``V_(k+1) - V_k`` by Monte Carlo, chance included, with its error.

    Args:
        values: what ``training.credit.values_of_continuing`` says of the trajectories.
        credits: see ``by_optimum``.
    """
    readings = []
    for i, (t, row) in enumerate(zip(trajectories, values)):
        for turn, ((before, error), (after, other)) in enumerate(pairwise(row)):
            situation = t.prompt, *t.completion_ids[: turn_start(t, turn)]
            own = [s for s in t.segments if s.turn == turn and s.by_model]
            act = "".join(s.text for s in own if s.kind not in ("think", "text"))
            credit = _given(credits, i, turn)
            readings.append(Reading(i, turn, t.group, situation, act, after - before, math.hypot(error, other), credit))
    return readings


def _given(credits: Credits, rollout: int, turn: int) -> dict[str, float]:
    return {name: rows[rollout][turn] for name, rows in credits.items()}


def verdicts(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """How true each method is, one row for each.

    Args:
        readings: also of several samples, each of which may know other methods: a method is judged by those that know
            it.

    Returns:
        rows of "credit", its name; "correlation", see ``correlation``; of the turns whose truth is ``decided``, their
        number "decided", the share "wrong_sign" of those that were praised for the worse or blamed for the better, and
        the share "silent" of those that got nothing; and "noise", see ``noise``.
    """
    rows = []
    for name in dict.fromkeys(name for r in readings for name in r.credit):
        known = [r for r in readings if name in r.credit]
        signs = [
            0 if abs(c := r.credit[name]) < ROUNDING else math.copysign(1, c * r.truth) for r in known if r.decided
        ]
        rows.append(
            {
                "credit": name,
                "correlation": correlation(known, name),
                "decided": len(signs),
                "wrong_sign": signs.count(-1) / len(signs) if signs else None,
                "silent": signs.count(0) / len(signs) if signs else None,
                "noise": noise(known, name),
            }
        )
    return rows


def correlation(readings: Sequence[Reading], name: str) -> float | None:
    """Spearman's rank correlation of truth and a method's credit, over all turns; None where one never changes."""
    from scipy.stats import spearmanr

    # what differs by rounding alone is tied
    a, b = (np.round(values, 6).tolist() for values in zip(*((r.truth, r.credit[name]) for r in readings)))
    return float(spearmanr(a, b).statistic) if len(set(a)) > 1 < len(set(b)) else None


def noise(readings: Sequence[Reading], name: str) -> float | None:
    """How much a method's credit for the same decision differs from group to group.

    The deviation within a decision (the same act in the same situation, in more than one group) over that of all these
    turns: 0 where a decision always gets the same, about 1 where its credit has nothing to do with what was decided.
    None where no decision came up in two groups, or the method says the same of all.
    """
    again = [
        [r.credit[name] for r in rs]
        for rs in grouped(readings, lambda r: (r.situation, r.act)).values()
        if len({r.group for r in rs}) > 1
    ]
    every = [x for xs in again for x in xs]
    if not every or np.std(every) < ROUNDING:
        return None
    within = sum(len(xs) * np.var(xs) for xs in again) / (len(every) - len(again))
    return math.sqrt(within / np.var(every, ddof=1))
