"""``LocalSearch``: opens whatever index stands in a folder, or indexes the passages that stand there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..data import load_passages
from ..records import Hit
from .base import MANIFEST, PASSAGES, Engine, IndexFolderError, read_manifest
from .bm25 import BM25Search
from .sqlite import SQLiteSearch

#: Names under which a corpus is looked for in a folder without an index.
CORPORA = (PASSAGES, "corpus.jsonl")


class LocalSearch(Engine):
    """The engine whose index stands in ``index_dir``.

    A folder without an index but with a corpus (``passages.jsonl`` or ``corpus.jsonl``, in it or one folder
    below) is indexed with BM25 in memory, and a line says so.

    Args:
        index_dir: the folder.
        encoder: for a dense index, a name or a loaded encoder; None takes the one of its manifest.

    Attributes:
        engine: the engine behind it, e.g. a ``BM25Search``.

    Raises:
        IndexFolderError: neither an index nor a corpus there, several corpora, or an index that is broken or
            not what its manifest says.
    """

    decides = ("engine",)

    def __init__(self, index_dir: str | os.PathLike, encoder=None):
        folder = Path(index_dir)
        self.engine = _open(folder, encoder) if (folder / MANIFEST).exists() else _build(folder)

    @property
    def name(self) -> str:
        return self.engine.name

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        return self.engine.search_batch(queries, k)


def _open(folder: Path, encoder) -> Engine:
    kind = read_manifest(folder)["engine"]
    if kind == "dense":
        from .dense import DenseSearch

        return DenseSearch.load(folder, encoder)
    if kind not in ("bm25", "sqlite"):
        raise IndexFolderError(f"{folder / MANIFEST}: unknown engine {kind!r}; written by another version?")
    return BM25Search.load(folder) if kind == "bm25" else SQLiteSearch(folder)


def _build(folder: Path) -> Engine:
    corpus = _find_corpus(folder)
    passages = load_passages(corpus)
    what = f"BM25 over the {len(passages):,} passages of {corpus}, in memory"
    print(f"LocalSearch: no index in {folder}; {what} (BM25Search(passages).save(folder) keeps an index)")
    return BM25Search(passages)


def _find_corpus(folder: Path) -> Path:
    if not folder.is_dir():
        raise IndexFolderError(f"{folder}: no such folder; name one with an index or with a {PASSAGES}")
    for pattern in [*CORPORA, *("*/" + name for name in CORPORA)]:
        corpora = sorted(folder.glob(pattern))
        if len(corpora) > 1:
            raise IndexFolderError(f"{folder}: several corpora ({', '.join(map(str, corpora))}); name one folder")
        if corpora:
            return corpora[0]
    nothing = f"holds neither an index ({MANIFEST}) nor a corpus ({' or '.join(CORPORA)})"
    what = "make the almanac with searchr1 almanac, or an index with BM25Search(load_passages(file)).save(folder)"
    raise IndexFolderError(f"{folder}: {nothing}; {what}")
