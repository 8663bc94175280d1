"""Lexical search: BM25 over title and text (Robertson and Zaragoza 2009), through the bm25s library.

Scores come from bm25s; the choice of the best is ours, because the library breaks ties at random and gives
arbitrary passages for a query that matches none. One thread, no progress bars: made for many small batches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..records import Hit, Passage
from .base import Engine, best, check_batch, check_numbers, new_index, open_index, reading
from .words import indexed, words

_CUT: dict[str, Any] = {"token_pattern": r"\S+", "show_progress": False}  # ``words`` has cut the texts already


class BM25Search(Engine):
    """BM25 (Lucene's variant) over ``title`` and ``text``.

    Args:
        passages: the corpus, in the order that breaks ties.
        k1: how fast a repeated word stops counting.
        b: how much long passages are held back, from 0 to 1.
        stopwords: "en", another language that bm25s knows, a list of words, or None to keep all words.

    Raises:
        ValueError: no passages, none with a word to index, or a number out of range.
        TypeError: a passage whose title or text is no text.

    >>> engine = BM25Search([Passage("1", "Penicillin", "It was discovered by Alexander Fleming.")])
    >>> engine.search("who discovered penicillin?")[0].passage.id
    '1'
    """

    decides = ("passages", "parameters")

    def __init__(
        self, passages: Sequence[Passage], *, k1: float = 1.5, b: float = 0.75, stopwords: str | list[str] | None = "en"
    ):
        import bm25s

        check_numbers(0, kind=Real, k1=k1)
        check_numbers(0, 1, kind=Real, b=b)
        self.passages: Sequence[Passage] = list(passages)
        self.parameters = {"k1": k1, "b": b, "stopwords": stopwords}
        if not self.passages:
            raise ValueError("BM25Search: no passages to index")
        texts = [words(indexed(passage)) for passage in self.passages]
        tokens = bm25s.tokenize(texts, stopwords=stopwords or [], **_CUT)
        if not tokens.vocab:
            raise ValueError("BM25Search: no passage holds a word to index")
        self._index = bm25s.BM25(k1=k1, b=b, backend="numpy")
        self._index.index(tokens, create_empty_token=False, show_progress=False)

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        import bm25s

        texts = [words(query) for query in check_batch(queries, k)]
        batch = bm25s.tokenize(texts, stopwords=self.parameters["stopwords"] or [], return_ids=False, **_CUT)
        return [self._search(tokens, k) for tokens in batch]

    def _search(self, tokens: list[str], k: int) -> list[Hit]:
        ids = self._index.get_tokens_ids(tokens)
        if not ids:
            return []
        scores = self._index.get_scores_from_ids(ids)
        return [Hit(self.passages[i], float(scores[i])) for i in best(scores, k).tolist()]

    def save(self, index_dir: str | os.PathLike) -> None:
        """Write the index to a folder, whole or not at all; an index that stands there is replaced."""
        with new_index(index_dir, "bm25", self.passages, **self.parameters) as (folder, _):
            self._index.save(folder, show_progress=False)

    @classmethod
    def load(cls, index_dir: str | os.PathLike) -> BM25Search:
        """Open a saved index; its arrays and passages are memory-mapped.

        Raises:
            IndexFolderError: no BM25 index there, a broken one, or another corpus than it was built from.
        """
        import bm25s

        engine = cls.__new__(cls)
        manifest, engine.passages = open_index(index_dir, "bm25")
        with reading(index_dir):
            engine.parameters = {name: manifest[name] for name in ("k1", "b", "stopwords")}
            engine._index = bm25s.BM25.load(index_dir, mmap=True, show_progress=False)
            if (count := engine._index.scores["num_docs"]) != manifest["count"]:
                raise ValueError(f"over {count} passages, but {manifest['count']} stand beside it")
        return engine
