"""What a trajectory amounts to: right, needed, searched, malformed, which error; one definition each.

Plain Python on records, so that rewards, training and study can all ask here. The normalisation of answers is the one
of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv 1606.05250), which HotpotQA (Yang et al. 2018, arXiv 1809.09600) and
Search-R1 (Jin et al. 2025, arXiv 2503.09516) share.

Where we differ from the public scorers:
- an answer that normalises to nothing scores 0, also against a gold answer that does (they say 1);
- against SQuAD 1.1 only: F1 of a yes/no/noanswer on one side is 0 unless both sides are equal, as HotpotQA has it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any, TypeVar

from .records import Passage, Question, Trajectory

T = TypeVar("T")

# ---- answers ---------------------------------------------------------------------------------------------

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
    return float(said != "" and said in _normalized(answers))


def f1_score(prediction: str | None, answers: str | Iterable[str]) -> float:
    """F1 of the normalised tokens (with multiplicity), the best over the gold answers, in [0, 1].

    "yes", "no" and "noanswer" earn nothing unless both sides are equal (HotpotQA's rule).

    >>> f1_score("Ada Lovelace", ["Ada King Lovelace"])
    0.8
    """
    said = normalize_answer(prediction or "")
    return max((_f1(said, gold) for gold in _normalized(answers)), default=0.0)


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
    return float(any(gold and f" {gold} " in said for gold in _normalized(answers)))


def _normalized(answers: str | Iterable[str]) -> list[str]:
    return [normalize_answer(answer) for answer in ([answers] if isinstance(answers, str) else answers)]


# ---- what was needed, and what was done ------------------------------------------------------------------


def right(t: Trajectory) -> bool:
    """Whether the answer equals a gold answer (Search-R1's exact match)."""
    return exact_match(t.answer, t.question.answers) == 1.0


def need(question: Question) -> int | None:
    """Searches that a question needs: none if it is known, else one a hop; None where nobody knows."""
    return {True: 0, False: question.hops, None: None}[question.known]


def knowledge(question: Question) -> str:
    """ "known", "look-up", or "unknown" where nobody can say."""
    return {True: "known", False: "look-up", None: "unknown"}[question.known]


def searched(t: Trajectory) -> bool:
    """Whether at least one search was executed."""
    return bool(t.searches)


def over_search(t: Trajectory) -> bool | None:
    """Whether a known question was searched for; None where nobody knows."""
    return None if t.question.known is None else t.question.known and searched(t)


def under_search(t: Trajectory) -> bool | None:
    """Whether a look-up question got fewer searches than it needs; None where nobody knows."""
    needed = need(t.question)
    return None if needed is None else len(t.searches) < needed


def malformed(t: Trajectory) -> bool:
    """Whether a turn held no valid action."""
    return t.invalid_turns > 0


def first_act(t: Trajectory) -> str:
    """What the model did first: "search" or another tool's name, "answer", or "neither"."""
    return next((s.kind for s in t.segments if s.by_model and s.kind not in ("think", "text")), "neither")


def passages_read(t: Trajectory) -> list[Passage]:
    """What the searches returned, in order; a passage that came twice stands there twice."""
    return [hit.passage for call in t.searches for hit in call.result]


def first_query_finds(t: Trajectory) -> bool | None:
    """Whether the first search returned a gold passage; None without a search or without gold passages."""
    if not t.searches or not t.question.passages:
        return None
    return any(hit.passage.id in t.question.passages for hit in t.searches[0].result)


def answer_retrieved(t: Trajectory) -> bool:
    """Does a gold answer stand in the title or text of a passage that was read, as whole words after normalisation?"""
    return any(holds_answer(passage, t.question) for passage in passages_read(t))


def holds_answer(passage: Passage, question: Question) -> bool:
    """Does a gold answer stand in the title or text of this passage, as whole words after normalisation?"""
    return bool(substring_match(f"{passage.title} {passage.text}", question.answers))


# ---- groups of rollouts ----------------------------------------------------------------------------------

#: Rewards closer than this are equal: a sum of the same parts in another order can differ in its last digits.
EQUAL_REWARDS = 1e-6


def no_variance(rewards: Sequence[float | None]) -> bool:
    """Whether a group of at least two rollouts, all of them scored, has one and the same reward: it teaches nothing."""
    return len(rewards) > 1 and None not in rewards and max(rewards) - min(rewards) <= EQUAL_REWARDS


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """The items by what ``key`` says of them, in their order."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def pairs(before: Iterable[Trajectory], after: Iterable[Trajectory]) -> list[tuple[list, list]]:
    """The trajectories before and after of each question that both sides have.

    Raises:
        ValueError: they share no question.
    """
    first, second = (grouped(side, lambda t: t.question.id) for side in (before, after))
    shared = [(first[question], second[question]) for question in first if question in second]
    if not shared:
        raise ValueError("before and after share no question id: evaluate both on the same questions")
    return shared


# ---- rows and their means --------------------------------------------------------------------------------

#: The numbers of a row; ``means`` also has "n" and "searches_per_need".
METRICS = "em f1 searches searched over_search under_search malformed tokens seconds reward".split()


def row_of(t: Trajectory) -> dict[str, Any]:
    """What an evaluation says of one rollout.

    Keys: id, source, known, hops, answer, finish_reason, need, and the metrics: em, f1 (both 0..1), searches; searched,
    over_search, under_search, malformed (bools, see the functions); tokens (that the model wrote), seconds, reward
    (None without one).
    """
    q = t.question
    return {
        **{name: getattr(q, name) for name in ("id", "source", "known", "hops")},
        "answer": t.answer,
        "finish_reason": t.finish_reason,
        "em": exact_match(t.answer, q.answers),
        "f1": f1_score(t.answer, q.answers),
        "searches": len(t.searches),
        "need": need(q),
        **{says.__name__: says(t) for says in (searched, over_search, under_search, malformed)},
        "tokens": sum(t.mask),
        "seconds": t.seconds,
        "reward": t.reward,
    }


#: Group -> which rows belong to it.
GROUPS = {
    "known": lambda row: row["known"] is True,
    "look-up": lambda row: row["known"] is False,
    "look-up, 1 hop": lambda row: row["known"] is False and row["hops"] == 1,
    "look-up, 2+ hops": lambda row: row["known"] is False and row["hops"] > 1,
    "all": lambda row: True,
}


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by group, see ``GROUPS``; groups without rows are left out."""
    members = {name: [row for row in rows if belongs(row)] for name, belongs in GROUPS.items()}
    return {name: part for name, part in members.items() if part}


def mean(rows: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a number over the rows that have it; None where none does."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else None


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Metric -> mean over the rows; also "n", and "searches_per_need": on look-up questions, searches over hops."""
    lookup = [row for row in rows if row["known"] is False]
    hops = sum(row["hops"] for row in lookup)
    per_need = sum(row["searches"] for row in lookup) / hops if hops else None
    return {"n": len(rows), **{name: mean(rows, name) for name in METRICS}, "searches_per_need": per_need}


# ---- why answers are wrong -------------------------------------------------------------------------------

#: Why an answer is wrong: name -> what it means, in the order in which ``error_of`` asks.
ERRORS = {
    "cut off": "no answer: the tokens or the turns were used up",
    "malformed": "no answer: the message ended, or the turns went by, without a valid action; or an empty answer",
    "did not search": 'a wrong answer from memory, or "unknown"',
    "copied wrongly": "all gold passages were read; the answer resembles the right one, and stands in no passage",
    "found but not used": "all gold passages were read, the answer is wrong all the same",
    "passage not found": "a query named what was missing, the engine did not return it",
    "wrong hop": "a part of the chain was found, then the model stopped or followed it to a wrong place",
    "bad query": "no gold passage was found and no query named one",
}
#: Characters: comparing letters takes the square of them, and no name that could be copied is longer.
_LONGEST_NAME = 300
_FILLERS = {"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "the", "to", "with"}


def error_of(t: Trajectory, passages: Mapping[str, Passage] = {}) -> str | None:
    """The cause of a wrong answer, a key of ``ERRORS``; None for a right one.

    Judged from the record alone: the answer, how the rollout ended, and which gold passages its searches
    returned. A query *names* a passage if it holds more than half of the words of the passage's title, without
    articles and prepositions; that tells a bad query from a weak engine. An answer is *copied wrongly* if no passage
    that was read holds it, and at least 60 % of its letters and of a gold answer's are the same, in the same order
    (both have at most 300 characters).

    Args:
        passages: the corpus by id, for the titles of gold passages. A passage that is not in it counts as
            named: nobody can blame the query then.
    """
    if right(t):
        return None
    if not (t.answer or "").strip():
        used_up = t.finish_reason == "length" or (t.finish_reason == "turns" and not malformed(t))
        return "cut off" if used_up else "malformed"
    if not t.searches:
        return "did not search"
    gold = set(t.question.passages)
    if not gold:
        return "found but not used" if answer_retrieved(t) else "passage not found"
    missing = gold - {passage.id for passage in passages_read(t)}
    if not missing:
        return "copied wrongly" if _miscopied(t) else "found but not used"
    titles = [passages[i].title if i in passages else "" for i in missing]
    if any(_names(call.argument, title) for call in t.searches for title in titles):
        return "passage not found"
    return "wrong hop" if len(missing) < len(gold) else "bad query"


def _names(query: str, title: str) -> bool:
    words, query_words = (re.findall(r"\w+", text.casefold()) for text in (title, query))
    words, said = [word for word in words if word not in _FILLERS] or words, set(query_words)
    return not words or 2 * sum(word in said for word in words) > len(words)


def _miscopied(t: Trajectory) -> bool:
    said = normalize_answer(t.answer)
    if len(said) > _LONGEST_NAME or any(said in normalize_answer(passage.text) for passage in passages_read(t)):
        return False
    golds = (gold for gold in _normalized(t.question.answers) if len(gold) <= _LONGEST_NAME)
    return any(SequenceMatcher(None, said, gold, autojunk=False).ratio() >= 0.6 for gold in golds)
