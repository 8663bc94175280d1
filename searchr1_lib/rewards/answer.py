"""Answer rewards: exact match, token F1 and substring match against the gold answers.

The normalisation is the one of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv 1606.05250), which HotpotQA
(Yang et al. 2018, arXiv 1809.09600) and Search-R1 (Jin et al. 2025, arXiv 2503.09516) share.

Where we differ from the public scorers:
- an answer that normalises to nothing scores 0, also against a gold answer that does (they say 1);
- against SQuAD 1.1 only: F1 of a yes/no/noanswer on one side is 0 unless both sides are equal, as HotpotQA has it;
- against Search-R1's script: only the model's own text is read, never the prompt's example tags.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

from ..records import Trajectory
from .base import Reward, final_answer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED = frozenset(("yes", "no", "noanswer"))


def normalize_answer(text: str) -> str:
    """Lower case, ASCII punctuation deleted, ``a``/``an``/``the`` dropped, white space collapsed.

    >>> normalize_answer("The  Eiffel-Tower!")
    'eiffeltower'
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str | None, answers: str | Iterable[str]) -> float:
    """1.0 if the prediction equals any gold answer after normalisation, else 0.0.

    ``answers`` are the gold answers and their aliases (one string is one answer). No prediction, or one
    that normalises to nothing, scores 0.0.

    >>> exact_match("the Velmora.", ["Velmora", "Velmora in Tarn"])
    1.0
    """
    said = normalize_answer(prediction or "")
    return float(bool(said) and any(said == normalize_answer(a) for a in _list(answers)))


def f1_score(prediction: str | None, answers: str | Iterable[str]) -> float:
    """F1 of the normalised tokens (with multiplicity), the best over the gold answers, in [0, 1].

    "yes", "no" and "noanswer" earn nothing unless both sides are equal (HotpotQA's rule).

    >>> f1_score("Ada Lovelace", ["Ada King Lovelace"])
    0.8
    """
    said = normalize_answer(prediction or "")
    return max((_f1(said, normalize_answer(a)) for a in _list(answers)), default=0.0) if said else 0.0


def _f1(said: str, gold: str) -> float:
    if said != gold and (said in _CLOSED or gold in _CLOSED):
        return 0.0
    ours, theirs = said.split(), gold.split()
    same = (Counter(ours) & Counter(theirs)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def substring_match(prediction: str | None, answers: str | Iterable[str]) -> float:
    """1.0 if a gold answer stands in the prediction as whole words after normalisation, else 0.0.

    Search-R1's substring match also accepts parts of words ("no" in "north"); ours does not.

    >>> substring_match("It was Ada Lovelace, I think", "Ada Lovelace")
    1.0
    """
    said = f" {normalize_answer(prediction or '')} "
    golds = (normalize_answer(a) for a in _list(answers))
    return float(any(gold and f" {gold} " in said for gold in golds))


def _list(answers) -> Iterable[str]:
    return [answers] if isinstance(answers, str) else answers


class ExactMatch(Reward):
    """``exact_match`` of the final answer: 1.0 or 0.0."""

    name = "exact_match"

    def value(self, trajectory: Trajectory) -> float:
        return exact_match(final_answer(trajectory), trajectory.question.answers)


class F1(Reward):
    """``f1_score`` of the final answer, in [0, 1]."""

    name = "f1"

    def value(self, trajectory: Trajectory) -> float:
        return f1_score(final_answer(trajectory), trajectory.question.answers)


class SubstringMatch(Reward):
    """``substring_match`` of the final answer: 1.0 or 0.0. Pair it with a length penalty: long answers win it."""

    name = "substring_match"

    def value(self, trajectory: Trajectory) -> float:
        return substring_match(final_answer(trajectory), trajectory.question.answers)
