"""A replay buffer: the newest trajectories, to be drawn from again."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Iterable
from typing import Literal

from ..environment.limits import Count, Whole, valid
from ..metrics import grouped
from ..records import Trajectory


class ReplayBuffer:
    """The newest trajectories, to draw from again; filled from rollouts or from a ``TrajectoryLog``.

    Args:
        capacity: trajectories held; the oldest make room.
        max_age: one whose ``step`` lies more than so many steps behind the newest is dropped (None: never).
        by: how ``sample`` draws: "uniform"; "reward", with a weight of the reward above the lowest one held;
            "advantage", with the absolute advantage as weight (groups without variance taught nothing).
        seed: of the drawing.

    Raises:
        ValueError: a parameter that cannot be.
    """

    def __init__(self, capacity: int, *, max_age: int | None = None, by: str = "uniform", seed: int = 0):
        self.max_age = valid(Whole | None, max_age, "max_age")
        self.by = valid(Literal["uniform", "reward", "advantage"], by, "by")
        self._held: deque[Trajectory] = deque(maxlen=valid(Count, capacity, "capacity"))
        self._random = random.Random(valid(Whole, seed, "seed"))

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self):
        """The held trajectories, oldest first."""
        return iter(self._held)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Take trajectories in, and let go of the oldest.

        Raises:
            ValueError: one lacks the step, reward or advantage that this buffer goes by; then none is taken in.
        """
        new = deque(trajectories, self._held.maxlen)
        needed = {self.by} - {"uniform"} | ({"step"} if self.max_age is not None else set())
        for t in new:
            if missing := sorted(name for name in needed if getattr(t, name) is None):
                raise ValueError(f"ReplayBuffer: the trajectory of question {t.question.id!r} has no {missing[0]}")
        self._held += new
        if self.max_age is not None:
            newest = max((t.step or 0 for t in self._held), default=0)
            self._held = deque((t for t in self._held if newest - (t.step or 0) <= self.max_age), self._held.maxlen)

    def sample(self, size: int) -> list[Trajectory]:
        """``size`` different trajectories. Those of weight 0 come only when no others are left.

        Weighted drawing without replacement by exponential keys (Efraimidis and Spirakis 2006).

        Raises:
            ValueError: fewer are held, or ``size`` is no whole number from 0.
        """
        if valid(Whole, size, "size") > len(self):
            raise ValueError(f"cannot draw {size} of the {len(self)} trajectories in the buffer")
        held, draw = list(self._held), self._random.random
        keys = [((-math.log(1.0 - draw()) / w if w else math.inf), draw(), i) for i, w in enumerate(self._weights())]
        return [held[i] for _, _, i in heapq.nsmallest(size, keys)]

    def sample_groups(self, count: int, rng: random.Random) -> list[Trajectory]:
        """The trajectories of ``count`` groups, each group whole; of fewer where only so many weigh anything.

        A group weighs what its trajectories do together. It is drawn with ``rng``, so that nothing but what is held
        decides, as when a killed run is taken up again.
        """
        held, weights = list(self._held), self._weights()
        groups = grouped(range(len(held)), lambda i: held[i].group)
        weighed = {name: sum(weights[i] for i in places) for name, places in groups.items()}
        keys = {name: -math.log(1.0 - rng.random()) / w for name, w in weighed.items() if w}
        return [held[i] for name in heapq.nsmallest(count, keys, key=keys.__getitem__) for i in groups[name]]

    def _weights(self) -> list[float]:
        if self.by == "uniform":
            return [1.0] * len(self)
        if self.by == "advantage":
            return [abs(t.advantage or 0.0) for t in self._held]
        rewards = [t.reward or 0.0 for t in self._held]
        lowest = min(rewards, default=0.0)
        return [reward - lowest for reward in rewards]
