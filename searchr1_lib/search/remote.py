"""Client of Search-R1's retrieval servers, and of our own (``searchr1 serve``)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import urllib3

from ..data import split_contents
from ..records import Hit, Passage
from .base import Engine, check_batch, clean
from .http import JsonClient

MAX_BYTES = 1 << 19  # of the queries in a request; our own server takes twice that


@dataclass
class _Part:
    """Queries that travel together, their size in bytes, and where their hits are awaited."""

    k: int
    deadline: float
    queries: list[str] = field(default_factory=list)
    bytes: int = 0
    hits: Future = field(default_factory=Future)


class RemoteSearch(Engine):
    """Asks ``POST url`` with ``{"queries", "topk", "return_scores"}``.

    Any number of threads may search at once. While all connections are busy, the queries that wait are put
    together, so many callers with one query each cost few requests (one that the server cannot answer fails those
    that travel with it). Understands servers that wrap each document with its score and servers that return bare
    documents, which get the score ``1 / rank``.

    Args:
        url: the address, for instance "http://127.0.0.1:8000/retrieve"; without a path, "/retrieve" is meant.
        timeout: seconds that a search may take, with all its tries and waits.
        retries: tries after the first, with growing waits between.
        batch_size: most queries in a request; a larger batch, or one over ``MAX_BYTES``, goes out as several.
        connections: most requests under way at once.

    Raises:
        ValueError: the address is not http or https, or a number makes no sense.
        SearchError: (from a search) no usable answer in time; never later than ``timeout``.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000/retrieve",
        *,
        timeout: float = 10.0,
        retries: int = 6,
        batch_size: int = 256,
        connections: int = 4,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._url, self.address = _address(url)
        self.batch_size = batch_size
        self._client = JsonClient(
            f"search server {self.address}", timeout=timeout, retries=retries, connections=connections, reasons=True
        )
        self._waiting: deque[_Part] = deque()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"RemoteSearch({self.address})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries, deadline = check_batch(queries, k), self._client.deadline()
        parts = self._split(queries, int(k), deadline)
        with self._lock:
            self._waiting.extend(parts)
        for _ in parts:
            self._client.threads.submit(self._serve)
        return [hits for part in self._client.wait([part.hits for part in parts], deadline) for hits in part]

    def _split(self, queries: list[str], k: int, deadline: float) -> list[_Part]:
        parts: list[_Part] = []
        for query in queries:
            size = len(json.dumps(query))
            if not parts or len(parts[-1].queries) == self.batch_size or parts[-1].bytes + size > MAX_BYTES:
                parts.append(_Part(k, deadline))
            parts[-1].queries.append(query)
            parts[-1].bytes += size
        return parts

    def _serve(self) -> None:
        """Ask for the parts that wait, as many as fit in a request; another thread may have taken ours along."""
        if not (parts := self._take()):
            return
        queries = [query for part in parts for query in part.queries]
        try:
            answer = self._client.ask(
                self._request(queries, parts[0].k),
                lambda answer: _read(answer, queries),
                max(part.deadline for part in parts),
            )
            for part in parts:
                part.hits.set_result([hits[: part.k] for hits in answer[: len(part.queries)]])
                del answer[: len(part.queries)]
        except Exception as e:
            for part in parts:
                part.hits.set_exception(e)

    def _take(self) -> list[_Part]:
        """Parts from the head of the queue, of one ``k``, that somebody still waits for."""
        parts, room, bytes_left = [], self.batch_size, MAX_BYTES
        with self._lock:
            while self._waiting:
                part = self._waiting[0]
                if parts and (part.k != parts[0].k or len(part.queries) > room or part.bytes > bytes_left):
                    break
                self._waiting.popleft()
                if part.hits.set_running_or_notify_cancel():
                    parts.append(part)
                    room, bytes_left = room - len(part.queries), bytes_left - part.bytes
        return parts

    def _request(self, queries: Sequence[str], k: int) -> dict[str, Any]:
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        return {"method": "POST", "url": self._url, "body": body, "headers": {"Content-Type": "application/json"}}


def _address(url: str) -> tuple[str, str]:
    """The whole address, and what may be shown of it: no name, password or key that stands in it."""
    try:
        parts = urllib3.util.parse_url(url)
    except urllib3.exceptions.LocationParseError:
        parts = urllib3.util.Url()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError("url: expected http://host:port/retrieve or https://…")  # without it: it may hold a key
    parts = parts._replace(path=parts.path or "/retrieve")
    return parts.url, parts._replace(auth=None, query=None, fragment=None).url


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
