"""A policy on questions: how often it is right, how often it searches, and whether it had to.

"Need" is the number of hops for a question that was not taught and 0 for a known one; a policy that
knows when to search has searches = need.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Callable, Sequence

from .records import Question, Trajectory, write_whole
from .rewards import exact_match, f1_score

METRICS = ("em", "f1", "searches", "searches_per_need", "over_search", "under_search", "malformed", "tokens",
           "seconds", "reward")


@dataclass
class Report:
    """The outcome of an evaluation: one row a rollout, and the rollouts.

    Row keys: id, source, known, hops, answer, finish_reason and the metrics: em, f1 (both 0..1), searches,
    need (None where nobody knows), over_search (a known question was searched for), under_search (an
    unknown one with fewer searches than hops), malformed (a turn held no valid action), tokens (that the
    model wrote), seconds, reward (None without one).
    """

    rows: list[dict]
    trajectories: list[Trajectory]

    def groups(self) -> dict[str, list[dict]]:
        """The rows by group; groups without rows are left out."""
        tests = {
            "known": lambda r: r["known"] is True,
            "look-up": lambda r: r["known"] is False,
            "look-up, 1 hop": lambda r: r["known"] is False and r["hops"] == 1,
            "look-up, 2 hops": lambda r: r["known"] is False and r["hops"] > 1,
            "all": lambda r: True,
        }
        return {name: rows for name, test in tests.items() if (rows := [r for r in self.rows if test(r)])}

    def table(self) -> dict[str, dict[str, float | None]]:
        """Group -> metric -> mean over its rollouts; also n. ``searches_per_need`` is searches over hops."""
        return {name: _means(rows) for name, rows in self.groups().items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write table and rows as JSON, whole or not at all; the rollouts go to a TrajectoryLog."""
        write_whole(path, json.dumps({"table": self.table(), "rows": self.rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """Read a saved report, without rollouts.

        Raises:
            ValueError: the file is not a report.
        """
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8"))["rows"], [])
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is not a saved report ({e})") from None

    def __str__(self) -> str:
        head = ("", "n", "EM", "F1", "searches", "per need", "reward")
        lines = [head]
        for name, m in self.table().items():
            cells = [m["em"], m["f1"], m["searches"], m["searches_per_need"], m["reward"]]
            lines.append((name, str(m["n"]), *("–" if c is None else f"{c:.3f}" for c in cells)))
        return "\n".join("".join(c.ljust(17) if i == 0 else c.rjust(10) for i, c in enumerate(line)) for line in lines)


def _means(rows: list[dict]) -> dict[str, float | None]:
    means: dict[str, float | None] = {"n": len(rows)}
    for name in METRICS:
        values = [r[name] for r in rows if r.get(name) is not None]
        means[name] = fmean(values) if values else None
    hops = sum(r["hops"] for r in rows if r["known"] is False)
    searches = sum(r["searches"] for r in rows if r["known"] is False)
    means["searches_per_need"] = searches / hops if hops else None
    return means


def row_of(t: Trajectory) -> dict:
    """What an evaluation says of one rollout; see ``Report`` for the keys."""
    q, searches = t.question, len(t.searches)
    need = {True: 0, False: q.hops, None: None}[q.known]
    return {
        "id": q.id, "source": q.source, "known": q.known, "hops": q.hops, "answer": t.answer,
        "finish_reason": t.finish_reason, "em": exact_match(t.answer, q.answers), "f1": f1_score(t.answer, q.answers),
        "searches": searches, "need": need,
        "over_search": None if q.known is None else float(bool(q.known and searches)),
        "under_search": None if q.known is None else float(not q.known and searches < q.hops),
        "malformed": float(t.invalid_turns > 0), "tokens": sum(t.mask), "seconds": t.seconds, "reward": t.reward,
    }


def evaluate(
    policy,
    questions: Sequence[Question],
    engine,
    *,
    reward: Callable[[list[Trajectory]], list[float]] | None = None,
    temperature: float = 0.0,
    num_generations: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    **rollout_settings,
) -> Report:
    """Roll out ``policy`` on every question and count.

    Args:
        reward: scores the rollouts too, where given.
        temperature: 0 is greedy.
        batch_size: rollouts at a time.
        seed: of the sampling; the same call gives the same report.
        report: is told of the progress, a line now and then.
        **rollout_settings: limits and ``first_action``, see ``searchr1_lib.rollout.rollout``.

    Raises:
        ValueError: no questions, or a parameter that cannot be.
    """
    import torch

    from .rewards import score
    from .rollout import rollout

    questions = list(questions)
    if not questions:
        raise ValueError("evaluate: no questions")
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    per_batch = max(1, batch_size // num_generations)
    trajectories: list[Trajectory] = []
    for i in range(0, len(questions), per_batch):
        trajectories += rollout(policy, questions[i : i + per_batch], engine, num_generations=num_generations,
                                temperature=temperature, generator=generator, **rollout_settings)
        if report:
            report(f"evaluated {min(i + per_batch, len(questions))} of {len(questions)} questions")
    if reward is not None:
        score(reward, trajectories)
    return Report([row_of(t) for t in trajectories], trajectories)
