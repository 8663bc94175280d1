"""Semantic similarity of the answer and the gold answers: the cosine of their sentence embeddings.

It forgives other wordings, and also other facts: "1821" and "1822" are near neighbours for every encoder.
Calibrate it on labelled pairs, and compose it with a stricter reward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Trajectory
from ..search.encoders import MINILM, load_encoder, vectors_of
from .base import final_answer

_LONGEST = 2000  # characters of an answer that are read; encoders see a few hundred tokens anyway
_CACHED = 100_000  # vectors kept


@dataclass(frozen=True)
class Affine:
    """``scale * similarity + offset``, cut to [0, 1]."""

    scale: float
    offset: float

    def __call__(self, similarity: float) -> float:
        return min(1.0, max(0.0, self.scale * similarity + self.offset))


@dataclass(frozen=True)
class Cutoff:
    """1.0 from a similarity of ``at`` on, else 0.0."""

    at: float

    def __call__(self, similarity: float) -> float:
        return float(similarity >= self.at)


def fit_affine(similarities: Sequence[float], labels: Sequence[float]) -> Affine:
    """The least-squares line from similarities to labels in [0, 1].

    Raises:
        ValueError: fewer than two different similarities, or lengths that differ.
    """
    import numpy as np

    x, y = _labelled(similarities, labels)
    if len(np.unique(x)) < 2:
        raise ValueError("an affine calibration needs at least two different similarities")
    scale, offset = np.polyfit(x, y, 1)
    return Affine(float(scale), float(offset))


def fit_cutoff(similarities: Sequence[float], labels: Sequence[float]) -> Cutoff:
    """The threshold with the highest balanced accuracy; labels count as right from 0.5 on.

    Raises:
        ValueError: labels of one class only, or lengths that differ.
    """
    import numpy as np

    x, y = _labelled(similarities, labels)
    right = y >= 0.5
    if right.all() or not right.any():
        raise ValueError("a threshold needs pairs that are right and pairs that are wrong")
    points = np.unique(x)
    cuts = np.concatenate([points[:1], (points[1:] + points[:-1]) / 2])
    passed = x[None] >= cuts[:, None]
    accuracy = (passed[:, right].mean(1) + (~passed[:, ~right]).mean(1)) / 2
    return Cutoff(float(cuts[accuracy.argmax()]))


def _labelled(similarities, labels):
    import numpy as np

    x, y = np.asarray(similarities, float), np.asarray(labels, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{x.size} similarities for {y.size} labels")
    return x, y


class SemanticSimilarity:
    """Cosine of the final answer and the nearest gold answer, in [0, 1] (negative ones count as 0).

    No answer, or a blank one, earns 0. Texts are encoded once, in one batch per call, and kept.

    Args:
        encoder: a name for ``load_encoder`` (loaded at the first use) or any object with
            ``encode(texts, normalize=True)``, for example an ``EmbeddingsEndpoint``.
        calibration: maps a cosine to a reward, for example ``Affine`` or ``Cutoff``.
    """

    def __init__(self, encoder=MINILM, calibration: Callable[[float], float] | None = None, name: str = "semantic"):
        self.encoder, self.calibration, self.name = encoder, calibration or Affine(1.0, 0.0), name
        self._vectors: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """What decides its values; the encoder by its name, which does not change when it is loaded."""
        return f"{type(self).__name__}({getattr(self.encoder, 'name', self.encoder)!r:.200}, {self.calibration!r})"

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of each pair of texts, in [-1, 1]; 0.0 where one is blank."""
        pairs = [(a[:_LONGEST].strip(), b[:_LONGEST].strip()) for a, b in pairs]
        vectors = self._encode({text for pair in pairs if all(pair) for text in pair})
        return [min(1.0, max(-1.0, float(vectors[a] @ vectors[b]))) if a and b else 0.0 for a, b in pairs]

    def calibrate(
        self, pairs: Sequence[tuple[str, str]], labels: Sequence[float], fit=fit_affine
    ) -> SemanticSimilarity:
        """Learn the calibration from pairs (answer, gold answer) labelled in [0, 1]; returns itself.

        ``fit`` is ``fit_affine`` or ``fit_cutoff``.
        """
        self.calibration = fit(self.similarities(pairs), labels)
        return self

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory."""
        answers = [(final_answer(t) or "").strip() for t in trajectories]
        pairs = [(answer, gold) for answer, t in zip(answers, trajectories) for gold in t.question.answers]
        similarity = dict(zip(pairs, self.similarities(pairs)))
        worth = lambda answer, gold: self.calibration(similarity[answer, gold]) if answer else 0.0
        return [max([0.0, *(worth(a, g) for g in t.question.answers)]) for a, t in zip(answers, trajectories)]

    def _encode(self, texts: set[str]) -> dict[str, Any]:
        with self._lock:
            self.encoder = load_encoder(self.encoder)
            if new := sorted(texts - self._vectors.keys()):
                if len(self._vectors) + len(new) > _CACHED:
                    self._vectors = {}
                    new = sorted(texts)
                self._vectors.update(zip(new, vectors_of(self.encoder, new)))
            return {text: self._vectors[text] for text in texts}
