"""A search that remembers: what an engine answered is kept in a file, so a run can be repeated offline, exactly."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Sequence

from ..records import Hit, Passage
from .base import Engine, SearchError, check_batch
from .sqlite import Database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  query TEXT NOT NULL, k INTEGER NOT NULL, hits TEXT, error TEXT, PRIMARY KEY (query, k)
);
CREATE TABLE IF NOT EXISTS recorded (engine TEXT NOT NULL);
"""


class CachedSearch(Engine):
    """Answers from a file where it can.

    A query is asked once: what was recorded for it is its answer from then on, in this run and in every
    replay. A failure is recorded as well and fails again at replay, unless a later try succeeded.

    Args:
        engine: the engine behind it; not needed for "replay".
        path: the SQLite file; made in mode "record".
        mode: "record" asks the engine what the file does not hold and keeps it; "replay" never asks.

    Raises:
        ValueError: an unknown mode, no engine to record from, no file to replay from, or a file that was
            recorded from another engine.
        SearchError: (from a search) the engine failed, or "replay" meets a query that was not recorded.
    """

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
        if engine is not None:
            self._check_engine()

    def _check_engine(self) -> None:
        name = self.engine.name
        with self._database.connection() as connection:
            found = connection.execute("SELECT engine FROM recorded").fetchone()
            if found is None:
                connection.execute("INSERT INTO recorded VALUES (?)", (name,))
            elif found[0] != name:
                raise ValueError(f"{self.path}: recorded from {found[0]}, not from {name}; give another file")

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        check_batch(queries, k)
        answers = {query: self._recall(query, k) for query in queries}
        if self.mode == "record":
            missing = [query for query, (hits, _) in answers.items() if hits is None]
            answers.update(self._ask(missing, k))
        return [_hits(*answers[query], query, self.path) for query in queries]

    def _recall(self, query: str, k: int) -> tuple[str | None, str | None]:
        """The recorded ``(hits as JSON, error)``; both None where nothing was recorded."""
        row = self._database.connection().execute(
            "SELECT hits, error FROM answers WHERE query = ? AND k = ?", (query, k)).fetchone()
        return row or (None, None)

    def _ask(self, queries: list[str], k: int) -> dict[str, tuple[str | None, str | None]]:
        """Ask the engine and record what it says; an error goes to every query of the batch."""
        if not queries:
            return {}
        try:
            batch = self.engine.search_batch(queries, k)
            answers = [(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False), None) for hits in batch]
        except SearchError as e:
            answers = [(None, str(e))] * len(queries)
        with self._database.connection() as connection:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                                   [(query, k, *answer) for query, answer in zip(queries, answers)])
        return dict(zip(queries, answers))


def _hits(hits: str | None, error: str | None, query: str, path: Path) -> list[Hit]:
    if hits is not None:
        return [Hit(Passage(**row["passage"]), row["score"]) for row in json.loads(hits)]
    raise SearchError(error or f"{path}: nothing was recorded for the query {query!r}; run with mode='record'")
