"""Client of Search-R1's retrieval servers, and of our own (``python -m searchr1_lib.search.server``)."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Sequence

from ..data import split_contents
from ..records import Hit, Passage
from .base import Engine, SearchError, check_batch
from .http import JsonClient, chunks, clean


class RemoteSearch(Engine):
    """Asks ``POST url`` with ``{"queries", "topk", "return_scores"}``.

    Understands servers that wrap each document with its score and servers that return bare documents; those
    then get the score ``1 / rank``.

    Args:
        url: the whole address, for instance "http://127.0.0.1:8000/retrieve".
        timeout: seconds that a search may take, with all its tries and waits.
        retries: tries after the first, with growing waits between.
        batch_size: queries in a request; a larger batch goes out as several requests at once.
        connections: requests under way at once; further ones wait for their turn.

    Raises:
        ValueError: the address is not http or https.
        SearchError: (from a search) no usable answer in time; never later than ``timeout``.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000/retrieve", *, timeout: float = 10.0, retries: int = 6,
                 batch_size: int = 256, connections: int = 16):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://… or https://…, not {url!r}")
        self.url, self.batch_size = url, batch_size
        self._client = JsonClient(f"search server {url}", timeout=timeout, retries=retries, connections=connections)

    @property
    def name(self) -> str:
        return f"RemoteSearch({self.url})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        check_batch(queries, k)
        parts = list(chunks(list(queries), self.batch_size))
        answers = self._client.ask_all([self._request(part, k) for part in parts], lambda answer: _read(answer, k))
        for part, answer in zip(parts, answers):
            if len(part) != len(answer):
                raise SearchError(f"search server {self.url}: {len(answer)} results for {len(part)} queries")
        return [hits for answer in answers for hits in answer]

    def _request(self, queries: Sequence[str], k: int) -> dict[str, Any]:
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        return {"method": "POST", "url": self.url, "body": body, "headers": {"Content-Type": "application/json"}}


def _read(answer: Any, k: int) -> list[list[Hit]]:
    return [[_hit(item, rank) for rank, item in enumerate(hits[:k], 1)] for hits in answer["result"]]


def _hit(item: dict, rank: int) -> Hit:
    document, score = item.get("document", item), item.get("score")
    if (contents := document.get("contents")) is not None:
        title, text = split_contents(clean(contents))
    else:
        title, text = clean(document.get("title", "")), clean(document["text"])
    id = document.get("id", hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16])
    return Hit(Passage(clean(str(id)), title, text), 1 / rank if score is None else float(score))
