"""How well and how fast an engine finds the gold passages of questions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..records import Hit, Question
from .base import Engine, check_numbers


def recall(hits: Sequence[Hit], gold: Sequence[str], k: int) -> float:
    """Share of the gold passage ids among the first ``k`` hits, from 0 to 1."""
    return len({hit.passage.id for hit in hits[:k]} & set(gold)) / len(set(gold))


def reciprocal_rank(hits: Sequence[Hit], gold: Sequence[str]) -> float:
    """One over the rank of the first gold passage among the hits, 0 where there is none."""
    return next((1 / rank for rank, hit in enumerate(hits, 1) if hit.passage.id in gold), 0.0)


def measure(
    engine: Engine,
    questions: Sequence[Question],
    *,
    ks: Sequence[int] = (1, 3, 5),
    name: str | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """A row for ``plots.retrieval_comparison``: mean recall@k, MRR at the largest k, milliseconds per query.

    The question's own text is the query. Questions without gold passages are left out.

    Raises:
        ValueError: no question names a gold passage.
    """
    check_numbers(1, batch_size=batch_size)
    judged = [q for q in questions if q.passages]
    if not judged:
        raise ValueError("measure: no question names a gold passage (field 'passages')")
    texts = [q.text for q in judged]
    results: list[list[Hit]] = []
    engine.search(texts[0], max(ks))  # the first search may load something
    begun = time.perf_counter()
    for start in range(0, len(texts), batch_size):
        results += engine.search_batch(texts[start : start + batch_size], max(ks))
    seconds = time.perf_counter() - begun
    pairs = list(zip(results, (q.passages for q in judged)))
    return {
        "engine": name or engine.name,
        **{f"recall@{k}": sum(recall(hits, gold, k) for hits, gold in pairs) / len(pairs) for k in ks},
        "mrr": sum(reciprocal_rank(hits, gold) for hits, gold in pairs) / len(pairs),
        "ms_per_query": 1000 * seconds / len(pairs),
    }
