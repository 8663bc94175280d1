"""What all engines share: the two methods, the checks, and the folder in which an index stands.

An index folder holds ``manifest.json`` (which engine, how many passages, the SHA-256 of their file, the
encoder), ``passages.jsonl`` in our own form with ``offsets.npy`` (so that a passage is read only when it is a
hit), and the engine's own files.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ..data import save_passages
from ..files import whole_folder, write_json
from ..records import Hit, Passage
from .words import clean

FORMAT = 1
MANIFEST, PASSAGES, OFFSETS = "manifest.json", "passages.jsonl", "offsets.npy"


class IndexFolderError(ValueError):
    """An index folder that is missing, broken, or not what its manifest says; the message says what to do."""


class SearchError(RuntimeError):
    """An engine could not answer; the message says which, why, and what to do."""


class Engine:
    """A search engine; a subclass writes ``search_batch``.

    Hits come best first, equal scores in the order of the corpus. A query that matches nothing gives [].

    Attributes:
        decides: the attributes that decide its answers, beside its name: corpus, parameters, engines behind it.
    """

    decides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in messages and tables."""
        return type(self).__name__

    @property
    def identity(self) -> str:
        """All that decides its answers, as one text; what is made of them is filed under it, see ``CachedSearch``."""
        return " ".join([self.name, *(f"{name}={identity_of(getattr(self, name))}" for name in self.decides)])

    def search(self, query: str, k: int = 3) -> list[Hit]:
        """The ``k`` best passages for one query, fewer where fewer match."""
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """One list of hits per query, in the order of the queries.

        Raises:
            ValueError: ``k`` is less than 1.
        """
        raise NotImplementedError


def identity_of(thing: Any) -> str:
    """What decides the answers of an engine, encoder, scorer or chat model: its ``identity``, or name, or class.

    A corpus is known by its SHA-256, plain values and lists of things by themselves.

    >>> identity_of(print)
    'builtins.print'
    """
    if isinstance(thing, (list, PassageFile)):
        passages = bool(thing) and isinstance(thing[0], Passage)
        return corpus_sha256(thing) if passages else str([identity_of(part) for part in thing])
    if thing is None or isinstance(thing, (str, int, float, dict)):
        return repr(thing)
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    known = getattr(thing, "identity", None) or getattr(thing, "name", None)
    return str(known or f"{kind.__module__}.{kind.__qualname__}")


class NumberError(TypeError, ValueError):
    """A value that is no number: a TypeError as Python has it, and a ValueError as every other bad parameter here."""


def check_numbers(least: float, most: float = 1e12, kind: Any = Integral, **values: Any) -> None:
    """Refuse a parameter that is no number of this kind (True is none), not finite or out of range, by its name.

    Raises:
        NumberError, ValueError: names the parameter and its value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, kind):
            raise NumberError(f"{name} must be a {'whole ' * (kind is Integral)}number, not {value!r:.80}")
        if not least <= value <= most:
            raise ValueError(f"{name} must be at least {least:g} and at most {most:g}, not {value}")


def check_batch(queries: Sequence[str], k: int) -> list[str]:
    """The queries as a list of texts that can be written everywhere.

    Raises:
        ValueError: ``k`` is less than 1, or more than a database can count.
        TypeError: ``k`` is no whole number, a query is no text, or a text stands in place of the list.
    """
    check_numbers(1, 2**31, k=k)
    if isinstance(queries, str):
        raise TypeError("search_batch takes a list of queries; for one query use search")
    return [clean(query) for query in queries]


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the ``k`` highest positive scores, highest first, equal ones by position.

    >>> best(np.array([0.0, 2.0, 1.0, 2.0, -1.0]), 2).tolist()
    [1, 3]
    """
    places = np.flatnonzero(scores > 0)  # a score of 0 matches nothing: better no passage than a random one
    values = scores[places]
    if len(places) > k:  # all that tie with the k-th stay for the stable sort: partition alone picks any of them
        keep = values >= np.partition(values, len(places) - k)[len(places) - k]
        places, values = places[keep], values[keep]
    return places[np.argsort(-values, kind="stable")[:k]]


class PassageFile(Sequence[Passage]):
    """The passages of an index folder as a read-only sequence; the file is memory-mapped, not loaded."""

    def __init__(self, folder: Path):
        self._folder, self._offsets = folder, np.load(folder / OFFSETS, mmap_mode="r")
        with open(folder / PASSAGES, "rb") as f:
            self._file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            self.sha256 = hashlib.file_digest(f, "sha256").hexdigest()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        with reading(self._folder):
            return Passage(**json.loads(self._file[self._offsets[i] : self._offsets[i + 1]]))


def corpus_sha256(passages: Iterable[Passage]) -> str:
    """SHA-256 of the passages as ``save_passages`` writes them."""
    if isinstance(passages, PassageFile):
        return passages.sha256
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps(vars(passage), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


@contextmanager
def reading(folder: str | os.PathLike, problem: str = "broken index") -> Iterator[None]:
    """What is found broken while an index is read is an IndexFolderError that names the folder.

    Not an error that says nothing of the index, such as a file that one may not read.
    """
    try:
        yield
    except IndexFolderError:
        raise
    except (FileNotFoundError, EOFError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise IndexFolderError(f"{folder}: {problem} ({e}); build it again") from None


def write_manifest(folder: Path, engine: str, **fields: Any) -> None:
    """Write ``manifest.json``; it is written last, so a folder with a manifest is complete."""
    write_json(folder / MANIFEST, {"format": FORMAT, "engine": engine, **fields})


def read_manifest(folder: str | os.PathLike, engine: str | None = None) -> dict[str, Any]:
    """Read the manifest of an index folder.

    Raises:
        IndexFolderError: no index stands there, its manifest is broken or of another format, or it is of
            another engine than ``engine``.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise IndexFolderError(f"{folder}: no index here ({MANIFEST} is missing)")
    with reading(path, "broken manifest, or not one of an index"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, version = manifest["engine"], manifest["format"]
    if version != FORMAT:
        raise IndexFolderError(f"{path}: format {version}, this version reads {FORMAT}; build the index again")
    if engine is not None and kind != engine:
        raise IndexFolderError(f"{folder}: holds an index of engine {kind!r}, not {engine!r}; use LocalSearch")
    return manifest


def open_index(folder: str | os.PathLike, engine: str) -> tuple[dict[str, Any], PassageFile]:
    """Manifest and passages of an index, after checking that the passages are those of the manifest.

    Raises:
        IndexFolderError: as ``read_manifest``; or the passages are missing, or another corpus than the index was
            built from.
    """
    manifest, folder = read_manifest(folder, engine), Path(folder)
    with reading(folder, "the passages cannot be read"):
        passages = PassageFile(folder)
    count = manifest.get("count")
    if passages.sha256 != manifest.get("corpus_sha256") or len(passages) != count:
        what = f"{len(passages)} passages, not the corpus that the index was built from ({count} passages)"
        raise IndexFolderError(f"{folder / PASSAGES}: {what}; build the index again from this corpus")
    return manifest, passages


@contextmanager
def new_index(
    path: str | os.PathLike, engine: str, passages: Sequence[Passage], **fields: Any
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write an index whole or not at all; one that stands there is replaced.

    Gives the folder for the engine's own files, and ``fields``, the engine's part of the manifest, to be added to.

    Raises:
        IndexFolderError: ``path`` is a file, or a folder with other things than an index.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).exists() and (not path.is_dir() or any(path.iterdir())):
        raise IndexFolderError(f"{path}: exists and is not an index; choose an empty or a new folder")
    with whole_folder(path) as folder:
        yield folder, fields
        save_passages(folder / PASSAGES, passages)
        with open(folder / PASSAGES, "rb") as file:
            lengths = [len(line) for line in file]
        np.save(folder / OFFSETS, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        write_manifest(folder, engine, count=len(lengths), corpus_sha256=PassageFile(folder).sha256, **fields)
