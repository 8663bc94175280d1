"""Client of Search-R1's retrieval servers, and of our own (``python -m searchr1_lib.search.server``)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Sequence

from ..data import split_contents
from ..records import Hit, Passage
from .base import Engine, check_batch
from .http import JsonClient, chunks, clean


@dataclass
class _Part:
    """Queries that travel together, and where their hits are awaited."""

    queries: Sequence[str]
    k: int
    deadline: float
    hits: Future = field(default_factory=Future)


class RemoteSearch(Engine):
    """Asks ``POST url`` with ``{"queries", "topk", "return_scores"}``.

    Any number of threads may search at once. While all connections are busy, the queries that wait are put
    together, so many callers with one query each cost few requests (one that the server refuses then fails them
    all). Understands servers that wrap each document with its score and servers that return bare documents, which
    get the score ``1 / rank``.

    Args:
        url: the whole address, for instance "http://127.0.0.1:8000/retrieve".
        timeout: seconds that a search may take, with all its tries and waits.
        retries: tries after the first, with growing waits between.
        batch_size: most queries in a request; a larger batch goes out as several.
        connections: most requests under way at once.

    Raises:
        ValueError: the address is not http or https.
        SearchError: (from a search) no usable answer in time; never later than ``timeout``.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000/retrieve", *, timeout: float = 10.0, retries: int = 6,
                 batch_size: int = 256, connections: int = 4):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://… or https://…, not {url!r}")
        self.url, self.batch_size = url, batch_size
        self._client = JsonClient(f"search server {url}", timeout=timeout, retries=retries, connections=connections)
        self._waiting: deque[_Part] = deque()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"RemoteSearch({self.url})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        check_batch(queries, k)
        deadline = self._client.deadline()
        parts = [_Part(part, k, deadline) for part in chunks(list(queries), self.batch_size)]
        with self._lock:
            self._waiting.extend(parts)
        for _ in parts:
            self._client.threads.submit(self._serve)
        return [hits for part in self._client.wait([part.hits for part in parts], deadline) for hits in part]

    def _serve(self) -> None:
        """Ask for the parts that wait, as many as fit in a request; another thread may have taken ours along."""
        if not (parts := self._take()):
            return
        queries = [query for part in parts for query in part.queries]
        try:
            answer = self._client.ask(self._request(queries, parts[0].k), lambda answer: _read(answer, queries),
                                      max(part.deadline for part in parts))
            for part in parts:
                part.hits.set_result([hits[: part.k] for hits in answer[: len(part.queries)]])
                del answer[: len(part.queries)]
        except Exception as e:
            for part in parts:
                part.hits.set_exception(e)

    def _take(self) -> list[_Part]:
        """Parts from the head of the queue, of one ``k``, that somebody still waits for."""
        parts, room = [], self.batch_size
        with self._lock:
            while self._waiting:
                part = self._waiting[0]
                if parts and (part.k != parts[0].k or len(part.queries) > room):
                    break
                self._waiting.popleft()
                if part.hits.set_running_or_notify_cancel():
                    parts.append(part)
                    room -= len(part.queries)
        return parts

    def _request(self, queries: Sequence[str], k: int) -> dict[str, Any]:
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        return {"method": "POST", "url": self.url, "body": body, "headers": {"Content-Type": "application/json"}}


def _read(answer: Any, queries: Sequence[str]) -> list[list[Hit]]:
    results = answer["result"]
    if len(results) != len(queries):
        raise ValueError(f"{len(results)} results for {len(queries)} queries")
    return [[_hit(item, rank) for rank, item in enumerate(hits, 1)] for hits in results]


def _hit(item: dict, rank: int) -> Hit:
    document, score = item.get("document", item), item.get("score")
    if (contents := document.get("contents")) is not None:
        title, text = split_contents(clean(contents))
    else:
        title, text = clean(document.get("title", "")), clean(document["text"])
    id = document.get("id", hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16])
    return Hit(Passage(clean(str(id)), title, text), 1 / rank if score is None else float(score))
