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
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data import save_passages
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
    """Text from outside as text that can be written everywhere (no halves of surrogate pairs).

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected text, found {type(text).__name__}")
    return text.encode("utf-8", "replace").decode("utf-8")


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the ``k`` highest positive scores, highest first, equal ones by position.

    >>> best(np.array([0.0, 2.0, 1.0, 2.0, -1.0]), 2).tolist()
    [1, 3]
    """
    found = np.flatnonzero(scores > 0)
    values = scores[found]
    if len(found) > k:
        keep = values >= np.partition(values, len(found) - k)[len(found) - k]
        found, values = found[keep], values[keep]
    return found[np.argsort(-values, kind="stable")[:k]]


class PassageFile(Sequence):
    """The passages of an index folder as a read-only sequence; the file is memory-mapped, not loaded."""

    def __init__(self, folder: Path):
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        with open(folder / PASSAGES, "rb") as f:
            self._file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Passage:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return Passage(**json.loads(self._file[self._offsets[i] : self._offsets[i + 1]]))


def save_corpus(folder: Path, passages: Sequence[Passage]) -> dict[str, Any]:
    """Write the passages of an index and return their part of the manifest."""
    save_passages(folder / PASSAGES, passages)
    lengths = [len(line) for line in open(folder / PASSAGES, "rb")]
    np.save(folder / OFFSETS, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return {"count": len(lengths), "corpus_sha256": sha256(folder / PASSAGES)}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, engine: str, **fields: Any) -> None:
    """Write ``manifest.json``; it is written last, so a folder with a manifest is complete."""
    text = json.dumps({"format": FORMAT, "engine": engine, **fields}, indent=1, ensure_ascii=False)
    part = folder / f".{MANIFEST}.{os.getpid()}.part"
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)


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


def open_corpus(folder: str | os.PathLike, manifest: dict[str, Any]) -> PassageFile:
    """Open the passages of an index, after checking that they are those of its manifest.

    Raises:
        IndexFolderError: the passages are missing, or another corpus than the index was built from.
    """
    folder = Path(folder)
    try:
        found = sha256(folder / PASSAGES)
        passages = PassageFile(folder)
    except (OSError, ValueError) as e:
        raise IndexFolderError(f"{folder}: the passages cannot be read ({e}); build the index again") from None
    if found != manifest.get("corpus_sha256") or len(passages) != manifest.get("count"):
        raise IndexFolderError(
            f"{folder / PASSAGES}: not the corpus that the index was built from ({MANIFEST} says "
            f"{manifest.get('count')} passages, SHA-256 {str(manifest.get('corpus_sha256'))[:12]}…; found "
            f"{len(passages)}, {found[:12]}…); build the index again from this corpus"
        )
    return passages


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the block ends well, and vanishes when not.

    Raises:
        IndexFolderError: ``path`` is a file, or a folder with other things than an index.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).exists() and (not path.is_dir() or any(path.iterdir())):
        raise IndexFolderError(f"{path}: exists and is not an index; choose an empty or a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
