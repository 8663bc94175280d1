"""A search that remembers: what an engine answered is kept in a file, so a run can be repeated offline, exactly."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..environment.base import _as_hits
from ..records import Hit, Passage
from .base import Engine, SearchError, check_batch, clean, identity_of
from .sqlite import Database

#: What was answered: the n-th time that a query was asked, from 0; failures, and at most one success, the last.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  query TEXT NOT NULL, k INTEGER NOT NULL, n INTEGER NOT NULL, hits TEXT, error TEXT, PRIMARY KEY (query, k, n)
);
CREATE TABLE IF NOT EXISTS recorded (engine TEXT NOT NULL);
"""
_LAST = "SELECT n, hits, error FROM answers WHERE query = ? AND k = ? AND n <= ? ORDER BY n DESC LIMIT 1"
_CLAIM = "INSERT INTO recorded SELECT ? WHERE NOT EXISTS (SELECT 1 FROM recorded)"
_Answer = tuple[str | None, str | None]  # hits as JSON, or an error


class CachedSearch(Engine):
    """Answers from a file where it can.

    A query is asked until it is answered; that answer is its answer from then on, in this run and in every
    replay, whichever thread or process asks. Failures are recorded as well: a replay gives them again, as often
    and in the same order, before the answer. So the program that recorded sees the same in a replay, and to be
    rid of failures one records into a new file.

    Args:
        engine: the engine behind it; not needed for "replay".
        path: the SQLite file; made in mode "record".
        mode: "record" asks the engine what the file does not hold and keeps it; "replay" never asks.

    Raises:
        ValueError: an unknown mode, no engine to record from, no file to replay from, a file that is no
            recording, or one that was recorded from another engine, corpus or parameters (see ``Engine.identity``).
        SearchError: (from a search) the engine failed, or "replay" meets a query that was not recorded.
    """

    decides = ("recorded",)

    def __init__(self, engine: Engine | None, path: str | os.PathLike, *, mode: str = "record"):
        if mode not in ("record", "replay"):
            raise ValueError(f"mode must be 'record' or 'replay', not {mode!r}")
        if mode == "record" and engine is None:
            raise ValueError("CachedSearch: mode 'record' needs an engine")
        self.engine, self.path, self.mode = engine, Path(path), mode
        if mode == "replay" and not self.path.exists():
            raise ValueError(f"{self.path}: nothing was recorded here; run once with mode='record'")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._database = Database(self.path, _SCHEMA, journal="DELETE")
        self._asked: Counter = Counter()  # how often, in a replay
        self._lock = threading.Lock()
        self._check_file()

    def _check_file(self) -> None:
        """Is it a recording, and of this engine? A new one is given what the engine is known by."""
        ours = None if self.engine is None else identity_of(self.engine)
        try:
            with self._database.connection() as connection:
                connection.execute(_LAST, ("", 1, 0))
                if self.mode == "record" and self._database.writable:
                    connection.execute(_CLAIM, (ours,))
                recorded = connection.execute("SELECT engine FROM recorded").fetchone()
        except sqlite3.Error as e:
            raise ValueError(f"{self.path}: cannot be used as a recording ({e}); give another file") from None
        self.recorded = recorded[0] if recorded else ours
        if ours and ours != self.recorded:
            raise ValueError(f"{self.path}: recorded from {self.recorded}, not from {ours}; give another file")

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries, k = check_batch(queries, k), int(k)
        unique = list(dict.fromkeys(queries))
        try:
            answers = self._replay(unique, k) if self.mode == "replay" else self._record(unique, k)
        except sqlite3.Error as e:
            raise SearchError(f"{self.path}: the recording cannot be used ({e})") from None
        return [_hits(*answers[query]) for query in queries]

    def _replay(self, queries: list[str], k: int) -> dict[str, _Answer]:
        answers = {}
        for query in queries:
            with self._lock:
                n = self._asked[query, k]
                self._asked[query, k] += 1
            row = self._database.connection().execute(_LAST, (query, k, n)).fetchone()
            missing = f"{self.path}: nothing was recorded for the query {query!r} with k={k}; run with mode='record'"
            answers[query] = row[1:] if row else (None, missing)
        return answers

    def _record(self, queries: list[str], k: int) -> dict[str, _Answer]:
        """Ask the engine what has no answer yet; an error goes to every query that was asked."""
        connection = self._database.connection()
        known = {query: row[1:] for query in queries if (row := self._last(connection, query, k)) and row[1]}
        missing = [query for query in queries if query not in known]
        if not missing:
            return known
        try:
            batch = self.engine.search_batch(missing, k)
            texts = [json.dumps([asdict(hit) for hit in _as_hits(found, k)]) for found in batch]
            answers: list[_Answer] = [(text, None) for text in texts]
        except SearchError as e:
            answers = [(None, clean(str(e)))] * len(missing)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            return known | {query: self._keep(connection, query, k, answer) for query, answer in zip(missing, answers)}

    def _keep(self, connection, query: str, k: int, answer: _Answer) -> _Answer:
        """Write an answer down, unless another thread or process was first: then its answer is ours too."""
        last = self._last(connection, query, k)
        if last and last[1]:
            return last[1:]
        n = last[0] + 1 if last else 0
        connection.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", (query, k, n, *answer))
        return answer

    @staticmethod
    def _last(connection, query: str, k: int) -> tuple[int, str | None, str | None] | None:
        return connection.execute(_LAST, (query, k, 1 << 40)).fetchone()


def _hits(hits: str | None, error: str | None) -> list[Hit]:
    if hits is None:
        raise SearchError(error)
    return [Hit(Passage(**row["passage"]), row["score"]) for row in json.loads(hits)]
