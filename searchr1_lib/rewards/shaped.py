"""Rewards made of other rewards that are no sum: products, thresholds, scales, normalisation by group."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..environment.limits import valid
from .base import RewardFunction, by_group, name_of
from .composite import Combined


class Product(Combined):
    """The product of rewards: nothing is earned where one part is 0."""

    def __init__(self, parts: Sequence[RewardFunction], name: str = "product"):
        super().__init__([(1.0, r) for r in parts], name)

    def combine(self, columns, trajectories):
        return [math.prod(row) for row in zip(*columns)]


class Threshold(Combined):
    """1.0 where a reward is at least ``at``, else 0.0."""

    def __init__(self, reward: RewardFunction, at: float, name: str = ""):
        super().__init__([(1.0, reward)], name or f"{name_of(reward)}>={at:g}")
        self.at = valid(float, at, "Threshold: at")

    def combine(self, columns, trajectories):
        return [float(v >= self.at) for v in columns[0]]


class Scaled(Combined):
    """A reward mapped from [low, high] to [0, 1], and cut there.

    Raises:
        ValueError: ``low`` is not below ``high``, or one is not finite.
    """

    def __init__(self, reward: RewardFunction, low: float, high: float, name: str = ""):
        super().__init__([(1.0, reward)], name or f"{name_of(reward)}_scaled")
        self.low, self.high = valid(float, low, "Scaled: low"), valid(float, high, "Scaled: high")
        if not low < high:
            raise ValueError(f"Scaled: low ({low}) must be below high ({high})")

    def combine(self, columns, trajectories):
        return [min(1.0, max(0.0, (v - self.low) / (self.high - self.low))) for v in columns[0]]


class Standardized(Combined):
    """A reward with mean 0 and standard deviation 1 within each group (0 where all are equal).

    Normalising each part before summing keeps a part of small spread from being drowned by another
    (decoupled normalisation, Liu et al. 2026, "GDPO", arXiv 2601.05242). The population deviation is used.
    """

    def __init__(self, reward: RewardFunction, name: str = ""):
        super().__init__([(1.0, reward)], name or f"{name_of(reward)}_standardized")

    def combine(self, columns, trajectories):
        (values,) = columns
        out = [0.0] * len(values)
        for places in by_group(trajectories).values():
            mean = math.fsum(values[i] for i in places) / len(places)
            std = math.sqrt(math.fsum((values[i] - mean) ** 2 for i in places) / len(places))
            for i in places:
                out[i] = (values[i] - mean) / std if std > 1e-9 else 0.0
        return out
