"""Client of Search-R1's retrieval servers, and of our own (``searchr1 serve``)."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..data import split_contents
from ..records import Hit, Passage
from .base import Engine, check_batch, check_numbers, clean
from .http import JsonClient, parse_url

MAX_BYTES = 1 << 19  # of the queries in a request; our own server takes twice that


@dataclass
class _Waiting:
    """A query in the queue, and where its hits are awaited."""

    query: str
    k: int
    deadline: float
    hits: Future = field(default_factory=Future)


class RemoteSearch(Engine):
    """Asks ``POST url`` with ``{"queries", "topk", "return_scores"}``.

    Any number of threads may search at once. While all connections are busy, the queries that wait are put
    together, so many callers with one query each cost few requests (one that the server cannot answer fails those
    that travel with it). Understands servers that wrap each document with its score and servers that return bare
    documents, which get the score ``1 / rank``.

    Args:
        url: the address, for instance "http://127.0.0.1:8000/retrieve"; a missing path means that one.
        timeout: seconds that a search may take, with all its tries and waits.
        retries: tries after the first, with growing waits between.
        batch_size: most queries in a request; a larger batch, or one over ``MAX_BYTES``, goes out as several.
        connections: most requests under way at once.

    Raises:
        ValueError: the address is not http or https, or a number makes no sense.
        SearchError: (from a search) no usable answer in time; never later than ``timeout``.
    """

    decides = ("address", "query_sha256")

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000/retrieve",
        *,
        timeout: float = 10.0,
        retries: int = 6,
        batch_size: int = 256,
        connections: int = 4,
    ):
        check_numbers(1, batch_size=batch_size)
        parts = parse_url(url, "http://host:port/retrieve")
        parts = parts if parts.path.strip("/") else parts.copy_with(path="/retrieve")
        self.address = str(parts.copy_with(username=None, password=None, query=None, fragment=None))
        self.query_sha256 = hashlib.sha256(parts.query).hexdigest() if parts.query else None  # it may hold a key
        self.batch_size, self._connections = batch_size, connections
        limits: dict[str, Any] = {"timeout": timeout, "retries": retries, "connections": connections}
        self._client = JsonClient(f"search server {self.address}", parts, lost="; expected path: /retrieve", **limits)
        self._queue: deque[_Waiting] = deque()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"RemoteSearch({self.address})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries, deadline = check_batch(queries, k), self._client.deadline()
        waiting = [_Waiting(query, int(k), deadline) for query in queries]
        self._queue.extend(waiting)
        for _ in range(min(len(waiting), self._connections)):
            self._client.threads.submit(self._serve)
        return self._client.wait([one.hits for one in waiting], deadline)

    def _serve(self) -> None:
        """Ask until nobody waits; another thread may have taken ours along."""
        while batch := self._take():
            body = {"queries": [one.query for one in batch], "topk": batch[0].k, "return_scores": True}
            deadline = max(one.deadline for one in batch)
            try:
                answer = self._client.ask({"json": body}, lambda answer: _read(answer, len(batch)), deadline)
                for one, hits in zip(batch, answer):
                    one.hits.set_result(hits[: one.k])
            except Exception as e:
                for one in batch:
                    one.hits.set_exception(e)

    def _take(self) -> list[_Waiting]:
        """From the head of the queue what fits in a request: queries of one ``k`` that somebody still waits for."""
        batch: list[_Waiting] = []
        size = 0
        with self._lock:
            while self._queue and len(batch) < self.batch_size:
                first = self._queue[0]
                size += len(json.dumps(first.query))
                if batch and (first.k != batch[0].k or size > MAX_BYTES):
                    break
                self._queue.popleft()
                if first.hits.set_running_or_notify_cancel():
                    batch.append(first)
        return batch


def _read(answer: Any, number: int) -> list[list[Hit]]:
    results = answer["result"]
    if len(results) != number:
        raise ValueError(f"{len(results)} results for {number} queries")
    return [[_hit(item, rank) for rank, item in enumerate(hits, 1)] for hits in results]


def _hit(item: dict, rank: int) -> Hit:
    document, score = item.get("document", item), item.get("score")
    if (contents := document.get("contents")) is not None:
        title, text = split_contents(clean(contents))
    else:
        title, text = clean(document.get("title", "")), clean(document["text"])
    id = document.get("id", hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16])
    known = score is not None and math.isfinite(score)
    return Hit(Passage(clean(str(id)), title, text), float(score) if known else 1 / rank)
