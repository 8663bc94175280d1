"""Search in a real database: SQLite's full-text index FTS5, on disk, changed while it serves.

FTS5 scores with BM25 (k1 = 1.2, b = 0.75) over title and text. Any number of threads and processes may
search; one at a time writes, and a search sees the passages before or after a change, never between.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..records import Hit, Passage
from . import base
from .base import MANIFEST, Engine, IndexFolderError, SearchError, check_batch
from .words import clean, indexed, words

DATABASE = "passages.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS passages (
  n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, text TEXT NOT NULL
);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(
  title, text, content='', tokenize="unicode61 categories 'L* N* Co M*'"
);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON passages BEGIN
  INSERT INTO words(rowid, title, text) VALUES (new.n, cut(new.title), cut(new.text));
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON passages BEGIN
  INSERT INTO words(words, rowid, title, text) VALUES ('delete', old.n, cut(old.title), cut(old.text));
END;
CREATE TRIGGER IF NOT EXISTS changed AFTER UPDATE ON passages BEGIN
  INSERT INTO words(words, rowid, title, text) VALUES ('delete', old.n, cut(old.title), cut(old.text));
  INSERT INTO words(rowid, title, text) VALUES (new.n, cut(new.title), cut(new.text));
END;
"""
_SEARCH = """
SELECT id, passages.title, passages.text, -bm25(words) AS score FROM words JOIN passages ON n = words.rowid
WHERE words MATCH ? ORDER BY score DESC, n LIMIT ?
"""
_ADD = """
INSERT INTO passages(id, title, text) VALUES (?, ?, ?)
ON CONFLICT(id) DO UPDATE SET title = excluded.title, text = excluded.text
"""


class Database:
    """One SQLite file with one connection per thread; waits up to 30 seconds for another writer.

    Args:
        path: the file; made, with the tables of ``schema``, if there is none.
        journal: "WAL" lets searches go on during a write; "DELETE" keeps everything in the one file.

    Raises:
        IndexFolderError: not a database, or a SQLite without FTS5 where the schema needs it.
    """

    def __init__(self, path: Path, schema: str, journal: str):
        self.path, self.journal, self._threads = path, journal, threading.local()
        self.writable = os.access(path.parent, os.W_OK) and (os.access(path, os.W_OK) or not path.exists())
        try:
            if not self.connection().execute("SELECT 1 FROM sqlite_master").fetchone():
                self.connection().executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")
        except sqlite3.DatabaseError as e:
            raise IndexFolderError(f"{path}: cannot be used as a database ({e}); give another place") from None

    def connection(self) -> sqlite3.Connection:
        """This thread's connection; ``with`` it makes a transaction."""
        if not hasattr(self._threads, "connection"):
            # to read along with a writer takes a log and a lock beside it; whole and alone, it needs none ("immutable")
            alone = self.journal == "WAL" and not Path(f"{self.path}-wal").exists()
            how = "mode=rwc" if self.writable else "immutable=1" if alone else "mode=ro"
            connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?{how}", timeout=30, uri=True)
            if self.writable:
                connection.execute(f"PRAGMA journal_mode = {self.journal}")
                connection.execute("PRAGMA synchronous = NORMAL")
            connection.create_function("cut", 1, words, deterministic=True)
            self._threads.connection = connection
        return self._threads.connection

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, in a transaction.

        Raises:
            SearchError: the database fails; names the file.
        """
        try:
            with self.connection() as connection:
                yield connection
        except sqlite3.Error as e:
            raise SearchError(f"{self.path}: the database could not answer ({e})") from None


class SQLiteSearch(Engine):
    """FTS5 over a folder's database, which is made if there is none.

    Args:
        index_dir: the index folder.

    Raises:
        IndexFolderError: another index stands there, or the database is broken.

    >>> engine = SQLiteSearch(folder); engine.add([Passage("1", "Penicillin", "Found by Fleming.")])  # doctest: +SKIP
    """

    def __init__(self, index_dir: str | os.PathLike):
        folder = Path(index_dir)
        if (folder / MANIFEST).exists():
            base.read_manifest(folder, "sqlite")
            if not (folder / DATABASE).exists():
                raise IndexFolderError(f"{folder}: {DATABASE} is missing; build the index again in another folder")
        elif folder.exists() and (not folder.is_dir() or not all(map(_ours, folder.iterdir()))):
            raise IndexFolderError(f"{folder}: exists and is not an index; choose an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._database = Database(folder / DATABASE, _SCHEMA, journal="WAL")
        if not (folder / MANIFEST).exists():
            base.write_manifest(folder, "sqlite")

    @property
    def identity(self) -> str:
        rows = self._database.connection().execute("SELECT id, title, text FROM passages ORDER BY n")
        return f"{self.name} passages={base.corpus_sha256(Passage(*row) for row in rows)}"

    def __len__(self) -> int:
        return self._database.connection().execute("SELECT count(*) FROM passages").fetchone()[0]

    def add(self, passages: Iterable[Passage]) -> None:
        """Add passages, all or none, accents composed; one whose id is there already replaces it in its place.

        Raises:
            TypeError: a passage whose title or text is no text.
            SearchError: the database cannot be written.
        """
        with self._database.use() as connection:
            connection.executemany(_ADD, map(_row, tqdm(passages, "SQLiteSearch", disable=None, delay=1)))

    def delete(self, ids: Iterable[str]) -> int:
        """Delete the passages of these ids, all or none; returns how many were there."""
        with self._database.use() as connection:
            return connection.executemany("DELETE FROM passages WHERE id = ?", ((str(i),) for i in ids)).rowcount

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries = check_batch(queries, k)
        with self._database.use() as connection:
            answers = (connection.execute(_SEARCH, (_match(query), int(k))) for query in queries)
            return [[Hit(Passage(*texts), score) for *texts, score in rows] for rows in answers]


def _row(passage: Passage) -> tuple[str, str, str]:
    indexed(passage)  # is it text?
    return clean(str(passage.id)), clean(passage.title), clean(passage.text)


def _ours(file: Path) -> bool:
    """Is this a file that another process leaves while it makes the same index?"""
    return file.name.startswith((DATABASE, MANIFEST, f".{MANIFEST}."))


def _match(query: str) -> str:
    """The FTS5 expression that matches any word of the query, or nothing; each is quoted: nothing in it is syntax."""
    from bm25s.stopwords import STOPWORDS_EN

    wanted = dict.fromkeys(word for word in words(query).split() if word not in STOPWORDS_EN)
    return " OR ".join(f'"{word}"' for word in wanted or [""])
