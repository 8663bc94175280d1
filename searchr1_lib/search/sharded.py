"""A corpus in parts, each behind an engine of its own: the best of what all of them find."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from ..records import Hit
from .base import Engine, SearchError, check_batch, check_numbers


class ShardedSearch(Engine):
    """Asks the engines of all parts at once and merges their hits by score.

    So scores must not depend on what else stands in a part: those of vectors of one encoder do not. BM25 counts in each
    part how rare a word is, so parts should be drawn at random; ranks in a score's place (``HybridSearch``, a server
    that gives no scores) cannot be merged.

    Args:
        engines: one a part, such as ``RemoteSearch`` of several servers.
        required: so many of them must answer; None: all. With fewer than all, what the others hold is missing from the
            hits, and a warning says so: then put ``CachedSearch`` around each part and not around the whole, or what
            was missing once is missing for good.

    Raises:
        ValueError: no engines, or ``required`` is none of 1 to their number.
        SearchError: (from a search) fewer than ``required`` answered; says what the first of the others said.
    """

    decides = ("engines", "required")

    def __init__(self, engines: Sequence[Engine], *, required: int | None = None):
        if not engines:
            raise ValueError("ShardedSearch needs an engine for each part")
        self.engines, self.required = list(engines), len(engines) if required is None else required
        check_numbers(1, len(self.engines), required=self.required)

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries, answers, failed = check_batch(queries, k), [], list[str]()
        with ThreadPoolExecutor(len(self.engines)) as pool:
            for asked in [pool.submit(engine.search_batch, queries, k) for engine in self.engines]:
                try:
                    answers.append(asked.result())
                except SearchError as e:
                    failed.append(str(e))
        if len(answers) < self.required:
            raise SearchError(f"{len(failed)} of {len(self.engines)} parts of the corpus did not answer: {failed[0]}")
        if failed:
            warnings.warn(f"searched without {len(failed)} of {len(self.engines)} parts: {failed[0]}", stacklevel=2)
        return [heapq.nlargest(k, chain.from_iterable(lists), key=lambda hit: hit.score) for lists in zip(*answers)]
