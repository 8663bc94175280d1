"""Several engines as one: reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from ..records import Hit, Passage
from .base import Engine, check_batch, check_numbers


class HybridSearch(Engine):
    """Adds up ``1 / (constant + rank)`` over the engines that found a passage; scores need not be comparable.

    Args:
        engines: at least two, over the same corpus (a passage is known by its id).
        constant: how little the first ranks stand out; 60 in the paper.
        depth: hits taken from each engine (more where ``k`` is larger).

    Equal sums keep the order in which the engines, one after the other, name the passages.
    """

    decides = ("engines", "constant", "depth")

    def __init__(self, engines: Sequence[Engine], *, constant: int = 60, depth: int = 50):
        if len(engines) < 2:
            raise ValueError("HybridSearch needs at least two engines")
        check_numbers(0, kind=Real, constant=constant)
        check_numbers(1, depth=depth)
        self.engines, self.constant, self.depth = list(engines), constant, depth

    @property
    def name(self) -> str:
        return f"HybridSearch({', '.join(e.name for e in self.engines)})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries = check_batch(queries, k)
        batches = [engine.search_batch(queries, max(k, self.depth)) for engine in self.engines]
        return [self._fuse(rankings)[:k] for rankings in zip(*batches)]

    def _fuse(self, rankings: Sequence[list[Hit]]) -> list[Hit]:
        passages: dict[str, Passage] = {}
        scores: dict[str, float] = {}
        for hits in rankings:
            for rank, hit in enumerate(hits, 1):
                id = hit.passage.id
                passages.setdefault(id, hit.passage)
                scores[id] = scores.get(id, 0.0) + 1 / (self.constant + rank)
        return [Hit(passages[id], scores[id]) for id in sorted(scores, key=lambda id: -scores[id])]
