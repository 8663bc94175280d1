"""What was found before: a store of notes that outlives an episode, and Mem0 behind the same methods.

    store = MemoryStore("runs/mine/memory")
    store.add([Note(Passage("p7", "Ada", "Ada was born in Rome."), query="Ada born in", time=3)])
    store.search("where was Ada born")

A store is an engine that is written to. What a rollout may do with it says ``environment.memory``.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..environment.limits import Count, valid
from ..records import Hit, Note, Passage
from .base import Engine, check_batch, identity_of
from .encoders import Encoder, load_encoder, vectors_of
from .http import JsonClient, parse_url, read_key
from .sqlite import Database, _match
from .words import clean, indexed

DATABASE = "memory.sqlite"
#: From so many notes on the nearest are looked for in a graph (HNSW); below, among all of them.
_MANY = 10_000
#: A note is there from ``time`` on until it is ``gone``; it is never overwritten, so that time can be turned back.
_SCHEMA = """
CREATE TABLE notes (
  n INTEGER PRIMARY KEY, id TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, "query" TEXT NOT NULL,
  source TEXT NOT NULL, time INTEGER NOT NULL, gone INTEGER, vector BLOB
);
CREATE INDEX alive ON notes(text, title) WHERE gone IS NULL;
CREATE INDEX born ON notes(time);
CREATE INDEX forgotten ON notes(n) WHERE gone IS NOT NULL;
CREATE TABLE owner (run TEXT NOT NULL, encoder TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5(title, text, content='', tokenize="unicode61 categories 'L* N* Co M*'");
CREATE TRIGGER added AFTER INSERT ON notes BEGIN
  INSERT INTO words(rowid, title, text) VALUES (new.n, cut(new.title), cut(new.text));
END;
CREATE TRIGGER removed AFTER DELETE ON notes BEGIN
  INSERT INTO words(words, rowid, title, text) VALUES ('delete', old.n, cut(old.title), cut(old.text));
END;
"""
_COLUMNS = 'id, title, text, "query", source, time'
_BY_WORDS = """
SELECT notes.n, -bm25(words) AS score FROM words JOIN notes ON notes.n = words.rowid
WHERE words MATCH ? AND gone IS NULL ORDER BY score DESC, notes.time DESC, notes.n LIMIT ?
"""


class MemoryStore(Engine):
    """Notes in a folder: one SQLite file, changed whole or not at all, so that a kill loses no more than the last
    ``add``. It is searched by words, or by meaning where an encoder is given (vectors stand in the file too; the FAISS
    index over them is made in memory).

    Args:
        folder: made if there is none.
        encoder: a name for ``load_encoder``, or a loaded encoder; None: by words (BM25).
        capacity: at most so many notes; the oldest go first. None: any number.
        run: whose memory it is. A store that belongs to another run is not opened; one without a name is not taken
            for that of a training that begins.
        shared: open it all the same, to read only.

    Raises:
        ValueError: it belongs to another run, or was made with another encoder.
        IndexFolderError: the file is no database.
    """

    decides = ("run", "encoder", "capacity")

    def __init__(
        self,
        folder: str | os.PathLike,
        encoder: str | Encoder | None = None,
        *,
        capacity: int | None = None,
        run: str = "",
        shared: bool = False,
    ):
        self.folder, self.run, self.shared = Path(folder), run, shared
        self.capacity = valid(Count | None, capacity, "capacity")
        self.encoder = load_encoder(encoder) if encoder is not None else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._database = Database(self.folder / DATABASE, _SCHEMA, journal="WAL")
        self._index: Any = None
        self._places: list[int] = []  # the note at each place of the index
        self._lock = threading.Lock()
        self._claim()

    def _claim(self) -> None:
        """Write down whose it is, or check that it is ours."""
        known = identity_of(self.encoder)
        with self._database.use() as connection:
            if not self.shared:
                row = "INSERT INTO owner SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM owner)"
                connection.execute(row, (self.run, known))
            owner = connection.execute("SELECT run, encoder FROM owner").fetchone() or (self.run, known)
        if owner[0] != self.run and not self.shared:
            raise ValueError(
                f"{self.folder}: the memory of run {owner[0]!r}; give another folder, or shared=True to read"
            )
        if owner[1] != known:
            raise ValueError(f"{self.folder}: made with encoder {owner[1]}, not {known}; give another folder")

    def __len__(self) -> int:
        return self._database.connection().execute("SELECT count(*) FROM notes WHERE gone IS NULL").fetchone()[0]

    def notes(self) -> list[Note]:
        """All that is remembered, the oldest first."""
        rows = self._database.connection().execute(f"SELECT {_COLUMNS} FROM notes WHERE gone IS NULL ORDER BY n")
        return [_note(row) for row in rows]

    def add(self, notes: Iterable[Note], vectors: Any = None) -> None:
        """Remember, all or nothing. A note that says what another one says takes its place, with its own date.

        Args:
            vectors: of the notes, unit length, (N, dimension), where they are encoded already.

        Raises:
            ValueError: the store is shared.
            SearchError: the database cannot be written.
        """
        if self.shared:
            raise ValueError(f"{self.folder}: opened with shared=True, to be read only")
        notes = [replace(note, passage=_clean(note.passage)) for note in notes]
        if vectors is None and self.encoder and notes:
            vectors = vectors_of(self.encoder, [indexed(note.passage) for note in notes])
        blobs = [None] * len(notes) if vectors is None else [vector.astype("<f4").tobytes() for vector in vectors]
        with self._database.use() as connection:
            for note, blob in zip(notes, blobs):
                p = note.passage
                same = "UPDATE notes SET gone = ? WHERE gone IS NULL AND text = ? AND title = ?"
                connection.execute(same, (note.time, p.text, p.title))
                values = (p.id, p.title, p.text, clean(note.query), clean(note.source), note.time, blob)
                connection.execute(f"INSERT INTO notes({_COLUMNS}, vector) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            if self.capacity and notes:
                oldest = "SELECT n FROM notes WHERE gone IS NULL ORDER BY time DESC, n DESC LIMIT -1 OFFSET ?"
                forget = f"UPDATE notes SET gone = ? WHERE n IN ({oldest})"
                connection.execute(forget, (max(note.time for note in notes), self.capacity))

    def delete(self, ids: Iterable[str]) -> int:
        """Forget for good what passages of these ids say, also what is no more remembered; returns how many notes."""
        with self._database.use() as connection:
            gone = connection.executemany("DELETE FROM notes WHERE id = ?", ((str(id),) for id in ids)).rowcount
        self._index = None
        return gone

    def rewind(self, time: int) -> None:
        """As if nothing had happened from ``time`` on.

        Raises:
            ValueError: a training begins with notes of a training, and nobody has said whose they are.
        """
        with self._database.use() as connection:
            later = connection.execute("SELECT count(*) FROM notes WHERE time >= ?", (time,)).fetchone()[0]
            if later and time <= 0 and not self.run:
                whose = "holds notes of a training; name the run (run=), or give another folder, or shared=True"
                raise ValueError(f"{self.folder}: {whose}")
            connection.execute("DELETE FROM notes WHERE time >= ?", (time,))
            connection.execute("UPDATE notes SET gone = NULL WHERE gone >= ?", (time,))
        self._index = None

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        return [[Hit(note.passage, score) for note, score in found] for found in self.recall(queries, k)]

    def recall(self, queries: Sequence[str], k: int = 3) -> list[list[tuple[Note, float]]]:
        """``search_batch`` with whole notes, each with its score; of equal scores the latest first."""
        queries = check_batch(queries, k)
        if not self.encoder:
            connection = self._database.connection()
            return [self._with_notes(connection.execute(_BY_WORDS, (_match(q), int(k))).fetchall()) for q in queries]
        filled = [query for query in queries if query.strip()]
        found = iter(self.nearest(vectors_of(self.encoder, filled), k) if filled else ())
        return [next(found) if query.strip() else [] for query in queries]

    def nearest(self, vectors: Any, k: int = 3) -> list[list[tuple[Note, float]]]:
        """``recall`` with unit vectors (B, dimension) of what is asked."""
        with self._lock:
            self._read_new()
            if not self._places:
                return [[] for _ in vectors]
            scores, places = self._index.search(vectors, min(k, len(self._places)), params=self._how())
        rows = [[(self._places[i], float(s)) for i, s in zip(*pair) if i >= 0] for pair in zip(places, scores)]
        return [self._with_notes(each) for each in rows]

    def _read_new(self) -> None:
        """Put what was written since into the index; from ``_MANY`` notes on it is a graph."""
        import faiss
        import numpy as np

        connection, read = self._database.connection(), "SELECT n, vector FROM notes WHERE n > ? ORDER BY n"
        if self._index is None:
            self._places = []
        rows = connection.execute(read, (self._places[-1] if self._places else 0,)).fetchall()
        if rows and (self._index is None or len(self._places) < _MANY <= len(self._places) + len(rows)):
            rows, self._places = connection.execute(read, (0,)).fetchall(), []
            kind = "HNSW32" if len(rows) >= _MANY else "Flat"
            dimension = len(rows[0][1]) // 4
            self._index = faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
        if rows:
            self._index.add(np.stack([np.frombuffer(blob, "<f4") for _, blob in rows]))
            self._places += [n for n, _ in rows]

    def _how(self):
        """Search parameters that leave out what is gone."""
        import faiss
        import numpy as np

        rows = self._database.connection().execute("SELECT n FROM notes WHERE gone IS NOT NULL ORDER BY n")
        gone = np.searchsorted(self._places, [n for (n,) in rows])
        left = {"sel": faiss.IDSelectorNot(faiss.IDSelectorBatch(gone))} if len(gone) else {}
        if isinstance(self._index, faiss.IndexFlat):
            return faiss.SearchParameters(**left)
        return faiss.SearchParametersHNSW(efSearch=64, **left)  # type: ignore[attr-defined]

    def _with_notes(self, rows: Sequence[tuple[int, float]]) -> list[tuple[Note, float]]:
        connection = self._database.connection()
        read = lambda n: _note(connection.execute(f"SELECT {_COLUMNS} FROM notes WHERE n = ?", (n,)).fetchone())
        return [(read(n), score) for n, score in rows]


def _note(row: sqlite3.Row | tuple) -> Note:
    return Note(Passage(*row[:3]), *row[3:])


def _clean(passage: Passage) -> Passage:
    return Passage(clean(str(passage.id)), clean(passage.title), clean(passage.text))


class Mem0Store(Engine):
    """The memory of a Mem0 server of one's own (its REST API), behind the methods of ``MemoryStore``.

    The text that is kept is the note's own (``infer: false``: no model rewrites it); the note travels as metadata. The
    key, if there is one, stands in the environment variable MEM0_API_KEY.

    Args:
        url: of the server.
        run: the notes of this name, Mem0's ``user_id``.
        timeout, retries: see ``JsonClient``.

    Raises:
        ValueError: an address that is not http or https, or a number that makes no sense.
        SearchError: (from each method) no usable answer in time.
    """

    decides = ("address", "run")
    shared = False

    def __init__(self, url: str = "http://127.0.0.1:8888", *, run: str, timeout: float = 10.0, retries: int = 3):
        parts = parse_url(url, "http://host:port")
        self.address, self.run = str(parts.copy_with(username=None, password=None, query=None, fragment=None)), run
        key = read_key("MEM0_API_KEY")
        self._headers = {"X-API-Key": key} if key else {}
        how: dict[str, Any] = {"timeout": timeout, "retries": retries, "connections": 4, "keyed": bool(key)}
        self._client, self._url = JsonClient(f"Mem0 {self.address}", parts, **how), parts

    def _ask(self, requests: Sequence[dict], read) -> list:
        base = self._url.path.rstrip("/")
        placed = [r | {"url": self._url.copy_with(path=base + r["url"]), "headers": self._headers} for r in requests]
        return self._client.ask_all(placed, read)

    def add(self, notes: Iterable[Note]) -> None:
        """Remember; one request a note."""
        said = [
            {
                "messages": [{"role": "user", "content": f"{note.passage.title}\n{note.passage.text}"}],
                "user_id": self.run,
                "metadata": asdict(note),
                "infer": False,
            }
            for note in notes
        ]
        self._ask([{"url": "/memories", "json": body} for body in said], lambda answer: answer["results"])

    def _all(self) -> list[tuple[str, Note]]:
        read = lambda answer: [(str(row["id"]), _from_mem0(row)) for row in answer["results"]]
        (found,) = self._ask([{"url": "/memories", "params": {"user_id": self.run}}], read)
        return sorted(found, key=lambda pair: (pair[1].time, pair[0]))

    def notes(self) -> list[Note]:
        """All that is remembered, the oldest first."""
        return [note for _, note in self._all()]

    def delete(self, ids: Iterable[str]) -> int:
        """Forget what passages of these ids say; returns how many notes."""
        wanted = set(map(str, ids))
        return self._forget([own for own, note in self._all() if note.passage.id in wanted])

    def rewind(self, time: int) -> None:
        """Forget what was remembered from ``time`` on."""
        self._forget([own for own, note in self._all() if note.time >= time])

    def _forget(self, ids: list[str]) -> int:
        self._ask([{"url": f"/memories/{id}", "method": "DELETE"} for id in ids], lambda answer: answer)
        return len(ids)

    def recall(self, queries: Sequence[str], k: int = 3) -> list[list[tuple[Note, float]]]:
        """Whole notes, each with its score, best first."""
        read = lambda answer: [(_from_mem0(row), float(row.get("score") or 0.0)) for row in answer["results"]][:k]
        bodies = [{"query": query, "user_id": self.run, "limit": k} for query in check_batch(queries, k)]
        return self._ask([{"url": "/search", "json": body} for body in bodies], read)

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        return [[Hit(note.passage, score) for note, score in found] for found in self.recall(queries, k)]


def _from_mem0(row: dict) -> Note:
    """A note of ours by its metadata, anybody else's by its text."""
    about = row.get("metadata") or {}
    if "passage" not in about:
        return Note(Passage(str(row["id"]), "", clean(row["memory"])))
    return Note(_clean(Passage(**about["passage"])), clean(about["query"]), clean(about["source"]), int(about["time"]))
