"""Client of Search-R1's retrieval servers, and of our own (``python -m searchr1_lib.search.server``)."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..data import split_contents
from ..records import Hit, Passage
from .base import Engine, check_batch, clean
from .http import JsonClient, parse_url

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
        url: the address, for instance "http://127.0.0.1:8000/retrieve"; without a path, or with "/", "/retrieve" is meant.
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
        parts = parse_url(url, "http://host:port/retrieve")
        parts = parts if parts.path != "/" else parts.copy_with(path="/retrieve")
        self._url = parts
        self.address = str(parts.copy_with(username=None, password=None, query=None, fragment=None))
        self.batch_size = batch_size
        limits = {"timeout": timeout, "retries": retries, "connections": connections}
        self._client = JsonClient(f"search server {self.address}", parts, explain=_said, **limits)
        self._waiting: deque[_Part] = deque()  # any thread appends, the client's event loop alone takes

    @property
    def name(self) -> str:
        return f"RemoteSearch({self.address})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries, deadline = check_batch(queries, k), self._client.deadline()
        parts = self._split(queries, int(k), deadline)
        self._waiting.extend(parts)
        for _ in parts:
            self._client.submit(self._serve())
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

    async def _serve(self) -> None:
        """Ask for the parts that wait, as many as fit in a request; another turn may have taken ours along."""
        async with self._client.slots:
            if not (parts := self._take()):
                return
            queries, deadline = [query for part in parts for query in part.queries], max(p.deadline for p in parts)
            body = {"queries": queries, "topk": parts[0].k, "return_scores": True}
            try:
                async with asyncio.timeout_at(deadline):  # then nobody waits any more
                    request = {"method": "POST", "url": self._url, "json": body}
                    hits = iter(await self._client.ask(request, lambda answer: _read(answer, queries), deadline))
                for part in parts:
                    part.hits.set_result([next(hits)[: part.k] for _ in part.queries])
            except Exception as e:
                for part in parts:
                    part.hits.set_exception(e)

    def _take(self) -> list[_Part]:
        """Parts from the head of the queue, of one ``k``, that somebody still waits for."""
        parts, room, bytes_left = [], self.batch_size, MAX_BYTES
        while self._waiting:
            part = self._waiting[0]
            if parts and (part.k != parts[0].k or len(part.queries) > room or part.bytes > bytes_left):
                break
            self._waiting.popleft()
            if part.hits.set_running_or_notify_cancel():
                parts.append(part)
                room, bytes_left = room - len(part.queries), bytes_left - part.bytes
        return parts


def _said(status: int, body: bytes) -> str:
    """What a search server says about a request that it refused, if it says it in a known form."""
    try:
        answer = json.loads(body)
        said = ": " + " ".join(clean(answer.get("error") or answer.get("detail")).split())[:200]
    except (ValueError, RecursionError, AttributeError, TypeError):
        said = ""
    return said + ("; a retrieval server's path is /retrieve" if status == 404 else "")


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
