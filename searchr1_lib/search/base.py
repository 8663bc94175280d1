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
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data import save_passages
from ..files import whole_folder, write_json
from ..records import Hit, Passage

FORMAT = 1
MANIFEST, PASSAGES, OFFSETS = "manifest.json", "passages.jsonl", "offsets.npy"


class IndexFolderError(ValueError):
    """An index folder that is missing, broken, or not what its manifest says; the message says what to do."""


class SearchError(RuntimeError):
    """An engine could not answer; the message says which, why, and what to do."""


class Engine:
    """A search engine; a subclass writes ``search_batch``.

    Hits come best first, equal scores in the order of the corpus. A query that matches nothing gives [].
    """

    @property
    def name(self) -> str:
        """What a recording of its answers is filed under."""
        return type(self).__name__

    def search(self, query: str, k: int = 3) -> list[Hit]:
        """The ``k`` best passages for one query, fewer where fewer match."""
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        """One list of hits per query, in the order of the queries.

        Raises:
            ValueError: ``k`` is less than 1.
        """
        raise NotImplementedError


def check_batch(queries: Sequence[str], k: int) -> list[str]:
    """The queries as a list of texts that can be written everywhere.

    Raises:
        ValueError: ``k`` is less than 1.
        TypeError: ``k`` is no whole number, a query is no text, or a text stands in place of the list.
    """
    if not isinstance(k, (int, np.integer)):
        raise TypeError(f"k must be a whole number, not {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if isinstance(queries, str):
        raise TypeError("search_batch takes a list of queries; for one query use search")
    return [clean(query) for query in queries]


def clean(text: Any) -> str:
    """Text from outside as text that can be written everywhere: no halves of surrogate pairs, accents composed (NFC).

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected text, found {type(text).__name__}")
    # the same name can be written with composed and with combining accents; unmatched, the passage is never found
    return unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))


def indexed(passage: Passage) -> str:
    """What of a passage is searched: title and text, in the form of the queries (see ``clean``)."""
    return clean(f"{passage.title}\n{passage.text}")


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
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        with open(folder / PASSAGES, "rb") as f:
            self._file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return Passage(**json.loads(self._file[self._offsets[i] : self._offsets[i + 1]]))


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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, version = manifest["engine"], manifest["format"]
    except FileNotFoundError:
        raise IndexFolderError(f"{folder}: no index here ({MANIFEST} is missing)") from None
    except (ValueError, KeyError, TypeError) as e:
        raise IndexFolderError(f"{path}: broken manifest, or not one of an index ({e!r}); build it again") from None
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
    count, expected = manifest.get("count"), manifest.get("corpus_sha256")
    try:
        digest, passages = _sha256(folder / PASSAGES), PassageFile(folder)
    except (OSError, ValueError) as e:
        raise IndexFolderError(f"{folder}: the passages cannot be read ({e}); build the index again") from None
    if digest != expected or len(passages) != count:
        raise IndexFolderError(
            f"{folder / PASSAGES}: not the corpus that the index was built from ({MANIFEST} says {count} passages, "
            f"SHA-256 {str(expected)[:12]}…; found {len(passages)}, {digest[:12]}…); build the index again from this "
            "corpus"
        )
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
        corpus = {"count": len(lengths), "corpus_sha256": _sha256(folder / PASSAGES)}
        write_manifest(folder, engine, **corpus, **fields)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
