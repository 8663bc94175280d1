"""Second look: a slower, better scorer puts the hits of a fast engine into order."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from ..records import Hit
from .base import Engine, check_batch, check_numbers, identity_of
from .encoders import MINILM, fingerprint, load_encoder, vectors_of

#: Takes ``(query, "title\\ntext")`` pairs, gives one number a pair; higher is better.
Scorer = Callable[[list[tuple[str, str]]], Sequence[float]]


def cross_encoder(name: str) -> Scorer:
    """A cross-encoder of sentence-transformers (Nogueira and Cho 2019, arXiv 1901.04085) as a scorer.

    Args:
        name: a local folder, or a hub name such as "cross-encoder/ms-marco-MiniLM-L6-v2".

    Raises:
        ValueError: it cannot be loaded; the message says why.
    """
    from sentence_transformers import CrossEncoder

    lock = threading.Lock()  # fast tokenizers may not be used by two threads at once
    try:
        model = CrossEncoder(name, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, RuntimeError) as e:
        other = "give a folder that holds one, connect to the hub, or take cosine_scorer(), which needs neither"
        raise ValueError(f"cross-encoder {name!r} cannot be loaded: {e}; {other}") from e

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        with lock:
            return model.predict(pairs, show_progress_bar=False).tolist()

    score.identity = f"cross-encoder {fingerprint(name)}"  # type: ignore[attr-defined]
    return score


def cosine_scorer(encoder_name: str = MINILM) -> Scorer:
    """Cosine of sentence vectors as a scorer: dense quality for the few passages that a fast engine found."""
    encoder = load_encoder(encoder_name)

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors = dict(zip(texts, vectors_of(encoder, texts)))
        return [float(vectors[query] @ vectors[text]) for query, text in pairs]

    score.identity = f"cosine of {identity_of(encoder)}"  # type: ignore[attr-defined]
    return score


class RerankedSearch(Engine):
    """Takes ``depth`` hits of an engine and returns the ``k`` best by a scorer.

    Args:
        engine: the fast engine.
        scorer: ``cross_encoder(name)``, ``cosine_scorer()`` or any function of that form.
        depth: hits that are looked at again (more where ``k`` is larger).

    Equal scores keep the engine's order.

    Raises:
        ValueError: (from a search) the scorer gave another number of scores than there were pairs, or one that is
            not finite.
    """

    decides = ("scorer", "depth", "engine")

    def __init__(self, engine: Engine, scorer: Scorer, *, depth: int = 20):
        check_numbers(1, depth=depth)
        self.engine, self.scorer, self.depth = engine, scorer, depth

    @property
    def name(self) -> str:
        return f"RerankedSearch({self.engine.name})"

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries = check_batch(queries, k)
        batch = self.engine.search_batch(queries, max(k, self.depth))
        pairs = [(q, f"{h.passage.title}\n{h.passage.text}") for q, hits in zip(queries, batch) for h in hits]
        scores = [float(s) for s in self.scorer(pairs)] if pairs else []
        if len(scores) != len(pairs):
            raise ValueError(f"the scorer gave {len(scores)} scores for {len(pairs)} pairs")
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"the scorer gave a score that is not finite, for a query of {queries!r:.200}")
        rest = iter(scores)
        scored = [[Hit(h.passage, next(rest)) for h in hits] for hits in batch]
        return [sorted(hits, key=lambda h: -h.score)[:k] for hits in scored]
