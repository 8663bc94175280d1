"""Search the live web through a paid service; put a ``CachedSearch`` in front to repeat a run offline.

Bing has no adapter: its own search API was retired in August 2025. Google's Custom Search takes no new
customers and ends on 1 January 2027. What comes back is untrusted text like any passage.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Hit, Passage
from .base import Engine, check_batch, clean
from .http import JsonClient, parse_url, read_key


@dataclass(frozen=True)
class Provider:
    """How a service is asked and how its answer is read.

    Attributes:
        endpoint: the address.
        keys: environment variables that it needs.
        most: results it gives at most.
        request: ``(query, k, *keys)`` to a request of ``JsonClient``.
        results: the answer to its list of results; a missing list means that nothing was found.
        fields: names of address, title and text in a result.
        longest: characters of a query that it takes.
    """

    endpoint: str
    keys: tuple[str, ...]
    most: int
    request: Callable[..., dict[str, Any]]
    results: Callable[[dict], list[dict]]
    fields: tuple[str, str, str] = ("link", "title", "snippet")
    longest: int = 2048


def _serpapi_results(answer: dict) -> list[dict]:
    if "error" in answer and answer.get("search_metadata", {}).get("status") != "Success":
        raise ValueError("it reports an error")  # "Success" with an error means that nothing was found
    return answer.get("organic_results", [])


PROVIDERS = {
    "serper": Provider(
        "https://google.serper.dev/search",
        ("SERPER_API_KEY",),
        100,
        lambda q, k, key: {"json": {"q": q, "num": k}, "headers": {"X-API-KEY": key}},
        lambda answer: answer.get("organic", []),
    ),
    "brave": Provider(
        "https://api.search.brave.com/res/v1/web/search",
        ("BRAVE_API_KEY",),
        20,
        lambda q, k, key: {
            "params": {"q": " ".join(q.split()[:50]), "count": k},
            "headers": {"X-Subscription-Token": key},
        },
        lambda answer: (answer.get("web") or {}).get("results", []),
        ("url", "title", "description"),
        400,
    ),
    "tavily": Provider(
        "https://api.tavily.com/search",
        ("TAVILY_API_KEY",),
        20,
        lambda q, k, key: {"json": {"query": q, "max_results": k}, "headers": {"Authorization": f"Bearer {key}"}},
        lambda answer: answer["results"],
        ("url", "title", "content"),
        400,
    ),
    "serpapi": Provider(
        "https://serpapi.com/search.json",
        ("SERPAPI_API_KEY",),
        100,
        lambda q, k, key: {"params": {"engine": "google", "q": q, "num": k, "api_key": key}},
        _serpapi_results,
    ),
    "google": Provider(
        "https://www.googleapis.com/customsearch/v1",
        ("GOOGLE_API_KEY", "GOOGLE_CSE_ID"),
        10,
        lambda q, k, key, engine: {"params": {"q": q, "num": k, "cx": engine, "key": key}},
        lambda answer: answer.get("items", []),
    ),
}


class WebSearch(Engine):
    """Asks a web search service; passages have the address as id, and the score is ``1 / rank``.

    Args:
        provider: "serper", "brave", "tavily", "serpapi" or "google". The keys come from the environment:
            SERPER_API_KEY; BRAVE_API_KEY; TAVILY_API_KEY; SERPAPI_API_KEY; GOOGLE_API_KEY and GOOGLE_CSE_ID.
        timeout: seconds that a search may take, with all its tries and waits.
        retries: tries after the first; ``Retry-After`` is respected as far as ``timeout`` allows.
        connections: queries of a batch that are asked at once.
        endpoint: another address that speaks the same form.

    Raises:
        ValueError: an unknown provider, or a key that is not in the environment or cannot be one.
        SearchError: (from a search) no usable answer in time. Neither it nor a log ever holds a key.
    """

    decides = ("engine_id",)

    def __init__(
        self,
        provider: str = "serper",
        *,
        timeout: float = 20.0,
        retries: int = 3,
        connections: int = 4,
        endpoint: str = "",
    ):
        if provider not in PROVIDERS:
            raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, not {provider!r}")
        self.provider, self._provider = provider, PROVIDERS[provider]
        self._keys = [read_key(name) for name in self._provider.keys]
        if missing := [name for name, key in zip(self._provider.keys, self._keys) if not key]:
            raise ValueError(f"WebSearch({provider!r}): set the environment variable {' and '.join(missing)}")
        self.engine_id = "".join(self._keys[1:])  # Google's; it names what is searched and opens nothing
        url = parse_url(endpoint or self._provider.endpoint, "http://127.0.0.1:port/search")
        limits: dict[str, Any] = {"timeout": timeout, "retries": retries, "connections": connections}
        self._client = JsonClient(f"web search {provider}", url, keyed=True, **limits)

    @property
    def name(self) -> str:
        return f"WebSearch({self.provider})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries = check_batch(queries, k)
        p, texts = self._provider, [query.strip() for query in queries]
        requests = [p.request(text[: p.longest], min(int(k), p.most), *self._keys) for text in texts if text]
        answers = iter(self._client.ask_all(requests, lambda answer: self._read(answer, k)))
        return [next(answers) if text else [] for text in texts]

    def _read(self, answer: dict, k: int) -> list[Hit]:
        address, title, text = self._provider.fields
        results = self._provider.results(answer)[:k]
        return [
            Hit(Passage(clean(r[address]), _plain(r.get(title)), _plain(r.get(text))), 1 / rank)
            for rank, r in enumerate(results, 1)
        ]


def _plain(text: Any) -> str:
    """Text without the marks that services put around matched words; some results have no text at all."""
    return html.unescape(re.sub(r"</?(?:b|em|strong)>", "", clean("" if text is None else text)))
