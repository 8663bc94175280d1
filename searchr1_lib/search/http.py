"""Asks JSON services: pooled connections, a deadline that holds, retries with backoff, no keys in errors."""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from email.utils import parsedate_to_datetime
from typing import Any

import urllib3

from .base import SearchError, clean

MAX_RESPONSE = 64 << 20  # bytes
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses after which another try makes sense
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds between tries


class _HideKeys(logging.Filter):
    """urllib3 logs addresses at level DEBUG; a key that stands in one is blotted out."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = re.sub(r"((?:key|token|password|secret)=)[^&\s\"']+", r"\1***", record.getMessage())
        record.args = ()
        return True


logging.getLogger("urllib3.connectionpool").addFilter(_HideKeys())


class _TryAgain(Exception):
    """A try that failed in a way that may pass; ``wait``: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class JsonClient:
    """Asks one service.

    Args:
        service: its name in error messages.
        timeout: seconds that a call may take, with all its tries and waits.
        retries: tries after the first, for refused or broken connections, statuses 429 and 5xx, and answers
            that are cut off.
        connections: requests under way at once.
        reasons: put the service's own words about a refused request into the error. Not for a service with a
            key, which it may repeat.

    Raises:
        ValueError: a number that makes no sense.
    """

    def __init__(self, service: str, *, timeout: float, retries: int, connections: int, reasons: bool = False):
        if not (timeout > 0 and retries >= 0 and connections >= 1):
            raise ValueError(
                f"timeout={timeout}, retries={retries}, connections={connections}: "
                "expected more than 0, at least 0, at least 1"
            )
        self.service, self.timeout, self.retries, self.reasons = service, timeout, retries, reasons
        self.threads = ThreadPoolExecutor(connections, thread_name_prefix="search")
        self._pool = urllib3.PoolManager(maxsize=connections, block=True, retries=False)

    def deadline(self) -> float:
        """When a call that begins now has to end, on the clock ``time.monotonic``."""
        return time.monotonic() + self.timeout

    def ask_all(self, requests: Sequence[Mapping[str, Any]], read: Callable[[Any], Any]) -> list[Any]:
        """``ask`` for each request at once; the answers in order, none later than ``timeout`` seconds.

        Raises:
            SearchError: one of them got no usable answer.
        """
        deadline = self.deadline()
        return self.wait([self.threads.submit(self.ask, request, read, deadline) for request in requests], deadline)

    def wait(self, asked: Sequence[Future], deadline: float) -> list[Any]:
        """The results of futures; after ``deadline`` or an error the rest is cancelled."""
        try:
            return [future.result(max(0.0, deadline - time.monotonic())) for future in asked]
        except FutureTimeout:  # also what no socket timeout can see: a slow name server, an answer that drips
            raise self._error(f"no answer within {self.timeout:g} s") from None
        finally:
            for future in asked:
                future.cancel()

    def ask(self, request: Mapping[str, Any], read: Callable[[Any], Any], deadline: float) -> Any:
        """``read(answer)`` of one request (arguments of urllib3's ``request``), in this thread.

        ``read`` turns the parsed JSON into what the caller wants, and raises KeyError, TypeError or ValueError
        where it is not of the service's form.

        Raises:
            SearchError: no usable answer before ``deadline``.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._try(request, read, deadline)
            except _TryAgain as e:
                wait = max(e.wait, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0))
                tries = "after 1 try" if attempt == 0 else f"after {attempt + 1} tries"
                if attempt == self.retries:
                    raise self._error(f"{e} ({tries})") from None
                if time.monotonic() + wait > deadline:
                    raise self._error(
                        f"{e} ({tries}; the next one would come after the {self.timeout:g} s of the time-out)"
                    ) from None
                time.sleep(wait)

    def _try(self, request: Mapping[str, Any], read: Callable, deadline: float) -> Any:
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._error(f"no answer within {self.timeout:g} s")
        try:
            response = self._pool.request(**request, timeout=left, redirect=False, preload_content=False)
            try:
                body = self._body(response, deadline)
            finally:
                response.release_conn()
        except urllib3.exceptions.NewConnectionError as e:  # in urllib3 a kind of TimeoutError
            raise _TryAgain(_reason(e)) from None
        except urllib3.exceptions.TimeoutError:
            raise self._error(f"no answer within {self.timeout:g} s") from None
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise _TryAgain(_reason(e)) from None
        self._check_status(response, body)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise _TryAgain("the answer is not JSON, or cut off") from None
        try:
            return read(answer)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise self._error(f"the answer is not of the form that this service is known for ({e!r:.200})") from None

    def _body(self, response, deadline: float) -> bytes:
        body = bytearray()
        while chunk := response.read1(1 << 16):
            body += chunk
            if len(body) > MAX_RESPONSE:
                response.close()
                raise self._error(f"the answer is larger than {MAX_RESPONSE} bytes")
            if time.monotonic() > deadline:
                response.close()
                raise self._error(f"the answer did not end within {self.timeout:g} s")
        return bytes(body)

    def _check_status(self, response, body: bytes) -> None:
        if response.status == 200:
            return
        what = f"HTTP status {response.status}"
        if self.reasons:
            what += _said(body)
        elif response.status in (401, 403):
            what += ": the key was refused"
        if response.status in _PASSING:
            raise _TryAgain(what, _retry_after(response.headers.get("Retry-After")))
        raise self._error(what)

    def _error(self, what: str) -> SearchError:
        return SearchError(f"{self.service}: {what}")


def _retry_after(value: str | None) -> float:
    """Seconds to wait by this header, which holds a number or a date; 0 without it."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _said(body: bytes) -> str:
    """What a search server says about a request that it refused, if it says it in a known form."""
    try:
        answer = json.loads(body)
        return ": " + " ".join(clean(answer.get("error") or answer.get("detail")).split())[:200]
    except (ValueError, RecursionError, AttributeError, TypeError):
        return ""


def _reason(error: Exception) -> str:
    """What went wrong in a few words, without the address (which may hold a key)."""
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return "the host's name cannot be resolved; is there a network?"
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return "no connection; is the server running?"
    return f"the connection broke ({type(error).__name__})"
