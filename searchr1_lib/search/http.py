"""Asks JSON services: pooled connections, a deadline that holds, retries with backoff, no keys in errors."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from numbers import Real
from typing import Any

import httpcore
import httpx
import tenacity

from .base import SearchError, check_numbers, clean

MAX_RESPONSE = 64 << 20  # bytes
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses after which another try makes sense
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)  # seconds between tries


def _hide_keys(record: logging.LogRecord) -> bool:
    """httpx logs addresses at level INFO, httpcore those of redirects at DEBUG; a key in one is blotted out."""
    secrets = r"(://)[^/?#\s\"']+(?=@)|((?:key|token|password|secret)=)[^&\s\"']+"
    record.msg, record.args = re.sub(secrets, r"\1\2***", record.getMessage()), ()
    return True


for _logger in ("httpx", "httpcore.http11"):
    logging.getLogger(_logger).addFilter(_hide_keys)


class _Backend(httpcore.SyncBackend):
    """Its streams are told when reading has to end: a socket's own time-out begins anew with each byte."""

    def connect_tcp(self, *where, **how):
        return _until(super().connect_tcp(*where, **how))


def _until(stream):
    read, start_tls = stream.read, stream.start_tls
    stream.read = lambda size, timeout: read(size, max(1e-3, timeout - time.monotonic()))
    stream.start_tls = lambda **how: _until(start_tls(**how))
    return stream


class _TryAgain(Exception):
    """A try that failed in a way that may pass; ``wait``: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class JsonClient:
    """Asks one service; any number of threads may. No redirect is followed, and no proxy leads to this machine.

    Args:
        service: its name in error messages.
        url: its address, from ``parse_url``.
        timeout: seconds that a call may take, with all its tries and waits.
        retries: tries after the first, for refused or broken connections, statuses 429 and 5xx, and answers
            that are cut off.
        connections: requests under way at once.
        keyed: a key goes along: other machines are asked over https only, and errors do not hold the service's own
            words, which may repeat it.
        lost: what an error about a path that is not there says about the address.
        error: what is raised.

    Raises:
        ValueError: a number that makes no sense, or a key that would travel unencrypted.
    """

    def __init__(
        self,
        service: str,
        url: httpx.URL,
        *,
        timeout: float,
        retries: int,
        connections: int,
        keyed: bool = False,
        lost: str = "",
        error: type[Exception] = SearchError,
    ):
        check_numbers(1e-3, 1e9, kind=Real, timeout=timeout)
        check_numbers(0, retries=retries)
        check_numbers(1, connections=connections)
        here = url.host in ("127.0.0.1", "localhost", "::1")
        if keyed and url.scheme == "http" and not here:
            raise ValueError(f"{service}: the key would travel unencrypted to {url.host}: use https")
        self.url, self.timeout, self.retries, self._keyed, self._lost = url, timeout, retries, keyed, lost
        self._error = lambda what: error(f"{service}: {what}")
        self.threads = ThreadPoolExecutor(connections, thread_name_prefix="http")
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.Client(limits=limits, trust_env=not here)
        for transport in filter(None, (self._client._transport, *self._client._mounts.values())):
            transport._pool._network_backend = _Backend()  # type: ignore[attr-defined]  # httpx has no other way in

    def deadline(self) -> float:
        """When a call that begins now has to end, on the clock ``time.monotonic``."""
        return time.monotonic() + self.timeout

    def ask_all(self, requests: Sequence[Mapping[str, Any]], read: Callable[[Any], Any]) -> list[Any]:
        """``ask`` for each request at once; the answers in order, none later than ``timeout`` seconds.

        Raises:
            error: one of them got no usable answer.
        """
        deadline = self.deadline()  # one for all, and for all their tries: a caller waits once, not once a try
        return self.wait([self.threads.submit(self.ask, request, read, deadline) for request in requests], deadline)

    def wait(self, futures: Sequence[Future], deadline: float) -> list[Any]:
        """The results of futures; after ``deadline`` or an error the rest is cancelled."""
        try:
            return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
        except TimeoutError:  # also what no socket's time-out can see: a slow name server, a head that drips
            raise self._error(f"no answer within {self.timeout:g} s") from None
        finally:
            for future in futures:
                future.cancel()

    def ask(self, request: Mapping[str, Any], read: Callable[[Any], Any], deadline: float) -> Any:
        """``read(answer)`` of one request, in this thread.

        ``request`` holds arguments of httpx's ``request``; without a ``method`` it is posted if there is ``json`` among
        them, or a GET, and without a ``url`` it goes to the service's.
        ``read`` turns the parsed JSON into what the caller wants, and raises LookupError, TypeError or ValueError
        where it is not of the service's form.

        Raises:
            error: no usable answer.
            TimeoutError: none before ``deadline`` (``wait`` makes it an error).
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgain),
            wait=lambda call: max(call.outcome.exception().wait, _BACKOFF(call)),  # type: ignore[attr-defined]
            stop=lambda call: call.attempt_number > self.retries or time.monotonic() + call.upcoming_sleep > deadline,
            retry_error_callback=self._give_up,
        )
        return retrying(self._try, request, read, deadline)

    def _try(self, request: Mapping[str, Any], read: Callable[[Any], Any], deadline: float) -> Any:
        body, how = bytearray(), {"method": "POST" if "json" in request else "GET", "url": self.url} | dict(request)
        timeout = httpx.Timeout(max(1e-3, deadline - time.monotonic()), read=deadline)  # see ``_Backend``
        try:
            with self._client.stream(**how, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_RESPONSE:
                        raise self._error(f"the answer is larger than {MAX_RESPONSE} bytes")
                    if time.monotonic() > deadline:
                        raise TimeoutError
        except httpx.TimeoutException:
            raise TimeoutError from None
        except httpx.ConnectError as e:  # in the system's words: a name that cannot be resolved, a bad certificate
            raise _TryAgain(f"no connection; is the server running? (ConnectError: {e})") from None
        except httpx.RequestError as e:  # whose words may hold a key
            raise _TryAgain(f"the connection broke ({type(e).__name__})") from None
        if not response.is_success:
            problem = f"HTTP status {(status := response.status_code)}{self._explain(status, body)}"
            if status in _PASSING:
                raise _TryAgain(problem, _retry_after(response.headers.get("Retry-After")))
            raise self._error(problem)
        try:
            return read(json.loads(body))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise _TryAgain("the answer is not JSON, or cut off") from None
        except (LookupError, TypeError, ArithmeticError, ValueError, AttributeError) as e:
            raise self._error(f"the answer is not of the form that this service is known for ({e!r:.200})") from None

    def _explain(self, status: int, body: bytearray) -> str:
        """What there is to say about a refused request: the server's own words if they come in a known form."""
        said = ": the key was refused" if self._keyed and status in (401, 403) else ""
        if not self._keyed:
            with suppress(ValueError, RecursionError, AttributeError, TypeError):
                answer = json.loads(body)
                said = ": " + " ".join(clean(answer.get("error") or answer.get("detail")).split())[:200]
        return said + self._lost if status in (404, 405) or status < 400 else said

    def _give_up(self, call: tenacity.RetryCallState) -> None:
        tries = "after 1 try" if call.attempt_number == 1 else f"after {call.attempt_number} tries"
        if call.attempt_number <= self.retries:
            tries += f"; the next one would come after the {self.timeout:g} s of the time-out"
        raise self._error(f"{call.outcome.exception()} ({tries})")


def parse_url(url: str, example: str) -> httpx.URL:
    """The address of a service.

    Raises:
        ValueError: it is not http or https. The message does not repeat it: it may hold a key.
    """
    parts = httpx.URL()
    with suppress(httpx.InvalidURL):
        parts = httpx.URL(url)
    if parts.scheme not in ("http", "https") or not parts.host or "%" in parts.host or (parts.port or 1) > 65535:
        raise ValueError(f"endpoint url: expected {example} or https://…")
    return parts


def read_key(name: str) -> str:
    """The key that stands in this environment variable; "" without one.

    Raises:
        ValueError: it cannot be a key. HTTP libraries would put such a header, key and all, into their error.
    """
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"{name} holds blanks, line breaks or letters that no key has; was it copied with quotes?")
    return key


def _retry_after(value: str | None) -> float:
    """Seconds to wait by this header, which holds a number or a date; 0 where it holds neither."""
    with suppress(ValueError, OverflowError):
        value = value or "0"
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time() if ":" in value else float(value))
    return 0.0
