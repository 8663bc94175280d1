"""What a run's trajectories say: what changed and whether by chance, why answers are wrong, how good queries are.

Pure functions on records; no model and no notebook. Before and after are compared *on the same questions*, so
all tests are paired: that needs far fewer questions than two independent samples do.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..records import Passage, Trajectory
from ..rewards.answer import normalize_answer
from ..rewards.process import answer_retrieved
from .evaluate import row_of

#: Why an answer is wrong: name -> what it means, in the order in which ``error_of`` asks.
ERRORS = {
    "cut off": "no answer: the tokens or the turns were used up",
    "malformed": "no answer: the message ended, or the turns went by, without a valid action; or an empty answer",
    "did not search": "a wrong answer from memory",
    "copied wrongly": "all gold passages were read; the answer resembles the right one, and stands in no passage",
    "found but not used": "all gold passages were read, the answer is wrong all the same",
    "passage not found": "a query named what was missing, the engine did not return it",
    "wrong hop": "a part of the chain was found, then the model stopped or followed it to a wrong place",
    "bad query": "no gold passage was found and no query named one",
}
_CAUSES = {name: number for number, name in enumerate(ERRORS)}


@dataclass(frozen=True)
class Table:
    """A trajectory log as columns: a few numbers a rollout instead of its text and tokens.

    Attributes:
        path: of the log.
        columns: name -> one number a rollout (float32), NaN where it does not apply. ``step`` (from 1, as in
            metrics.jsonl), ``known`` (1, 0), ``hops``, ``reward``, ``em``, ``searches``, ``tokens`` (that the model
            wrote), ``malformed``, ``first_query_found``, ``sureness`` (see ``sureness``), ``error`` (position of the
            cause in ``ERRORS``), and ``rewards/NAME`` for each part of the reward.
        offsets: where each rollout's line begins in the log, in bytes.
    """

    path: Path
    columns: dict[str, np.ndarray]
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column; all NaN if no rollout had the value."""
        return self.columns[name] if name in self.columns else np.full(len(self), np.nan, np.float32)

    def trajectory(self, number: int) -> Trajectory:
        """One rollout, whole, read from the log again: for a viewer."""
        with open(self.path, "rb") as f:
            f.seek(int(self.offsets[number]))
            return Trajectory.from_dict(json.loads(f.readline()))

    def of_error(self, cause: str) -> np.ndarray:
        """The numbers of the rollouts that are wrong for this reason, a key of ``ERRORS``."""
        return np.flatnonzero(self["error"] == list(ERRORS).index(cause))


def read_table(path: str | os.PathLike, passages: Mapping[str, Passage] = {}) -> Table:
    """Read a trajectory log of any length as columns, one rollout in memory at a time.

    Rollouts that were made to begin in a given way (``Settings.explore``) say nothing about the policy: left out.

    Args:
        passages: the corpus by id, see ``error_of``.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a line other than a cut last one is broken; names file and line.
    """
    columns: dict[str, array] = {}
    offsets, at = array("q"), 0
    with _log_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # cut off by a crash
            try:
                t = Trajectory.from_dict(json.loads(line))
                row = _numbers(t, passages) if t.first_action is None else None
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
            if row is not None:
                for name in row.keys() | columns.keys():
                    column = columns.setdefault(name, array("f"))
                    column.extend([math.nan] * (len(offsets) - len(column)))
                    column.append(row.get(name, math.nan))
                offsets.append(at)
            at += len(line)
    arrays = {name: np.frombuffer(column, np.float32) for name, column in columns.items()}
    return Table(Path(path), arrays, np.frombuffer(offsets, np.int64) if offsets else np.empty(0, np.int64))


def _log_lines(path: str | os.PathLike):
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"no trajectory log at {path}") from None


def _numbers(t: Trajectory, passages: Mapping[str, Passage]) -> dict[str, float]:
    """The row of one rollout in a ``Table``; what does not apply is left out."""
    cause = error_of(t, passages)
    found = {
        "step": None if t.step is None else t.step + 1,
        "known": t.question.known,
        "hops": t.question.hops,
        "reward": t.reward,
        "em": cause is None,
        "searches": len(t.searches),
        "tokens": sum(t.mask),
        "malformed": t.invalid_turns > 0,
        "first_query_found": first_query_finds(t),
        "sureness": sureness(t),
        "error": None if cause is None else _CAUSES[cause],
    }
    found |= {f"rewards/{name}": value for name, value in t.rewards.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


# ---- before and after ------------------------------------------------------------------------------------


def mcnemar(fixed: int, broken: int) -> float:
    """p value of the exact two-sided test that a change fixes and breaks equally often, in (0, 1].

    McNemar 1947: only the questions whose outcome changed count, and under the null hypothesis each of them
    is a fair coin. So it is the two-sided binomial test of ``fixed`` out of ``fixed + broken`` at 1/2.

    >>> mcnemar(5, 0)
    0.0625

    Raises:
        ValueError: a negative count.
    """
    if fixed < 0 or broken < 0:
        raise ValueError(f"mcnemar: counts must not be negative, got {fixed} and {broken}")
    n = fixed + broken
    tail = sum(math.comb(n, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(
    differences: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    samples: int = 5_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of ``sum(differences) / sum(weights)``.

    Args:
        differences: one number a question, such as exact match after minus before.
        weights: one positive number a question, such as the hops it needs (None: all 1, so the mean).
        level: of the interval.
        samples: how often the questions are drawn anew, with replacement.
        seed: of the drawing.

    Returns:
        the lower and the upper end.

    Raises:
        ValueError: no differences, or another number of weights.
    """
    d = np.asarray(differences, float)
    w = np.ones_like(d) if weights is None else np.asarray(weights, float)
    if not len(d) or d.shape != w.shape:
        raise ValueError(f"bootstrap needs as many weights as differences, and at least one: got {len(w)} and {len(d)}")
    # how often each question is drawn: one multinomial row a sample
    drawn = np.random.default_rng(seed).multinomial(len(d), np.full(len(d), 1 / len(d)), size=samples)
    low, high = np.quantile(drawn @ d / (drawn @ w), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def paired(
    before: Iterable[Trajectory], after: Iterable[Trajectory], value: Callable[[Trajectory], float]
) -> list[tuple[float, float]]:
    """``value`` before and after for every question that both sides have; the mean where one has several rollouts.

    Raises:
        ValueError: they share no question.
    """
    first, second = _by_question(before, value), _by_question(after, value)
    pairs = [(first[question], second[question]) for question in first if question in second]
    if not pairs:
        raise ValueError("before and after share no question id: evaluate both on the same questions")
    return pairs


def _by_question(trajectories: Iterable[Trajectory], value: Callable[[Trajectory], float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for t in trajectories:
        found.setdefault(t.question.id, []).append(value(t))
    return {question: fmean(values) for question, values in found.items()}


def right(t: Trajectory) -> float:
    """1.0 if the answer equals a gold answer (Search-R1's exact match), else 0.0."""
    return row_of(t)["em"]


def flips(before: Iterable[Trajectory], after: Iterable[Trajectory]) -> tuple[int, int]:
    """How many questions were fixed (wrong before, right after) and how many broken; half right counts as right."""
    pairs = [(b >= 0.5, a >= 0.5) for b, a in paired(before, after, right)]
    return sum(a and not b for b, a in pairs), sum(b and not a for b, a in pairs)


@dataclass(frozen=True)
class Change:
    """A figure before and after on the same ``n`` questions; ``low`` to ``high``: interval of after - before."""

    name: str
    n: int
    before: float
    after: float
    low: float
    high: float


def changes(before: Sequence[Trajectory], after: Sequence[Trajectory], **how: Any) -> list[Change]:
    """The figures that matter, before and after, with 95 % bootstrap intervals of the difference.

    Figures without a question of their kind, or without rewards, are left out.

    Args:
        **how: level, samples and seed, see ``bootstrap``.
    """
    found = []
    for name, belongs, value, weight in _FIGURES:
        first, second = ([t for t in side if belongs(t)] for side in (before, after))
        if first and second:
            pairs, weights = paired(first, second, value), [w for w, _ in paired(first, second, weight)]
            sums = [sum(side) / sum(weights) for side in zip(*pairs)]
            found.append(Change(name, len(pairs), *sums, *bootstrap([a - b for b, a in pairs], weights, **how)))
    return found


def _known(t: Trajectory) -> bool:
    return t.question.known is True


def _lookup(t: Trajectory) -> bool:
    return t.question.known is False


def _one(t: Trajectory) -> float:
    return 1.0


#: name, which trajectories, value, weight: the figure is the sum of the values over that of the weights.
_FIGURES = (
    ("exact match, all", lambda t: True, right, _one),
    ("exact match, known", _known, right, _one),
    ("exact match, look-up", _lookup, right, _one),
    ("reward", lambda t: t.reward is not None, lambda t: t.reward, _one),
    ("searches per known question", _known, lambda t: len(t.searches), _one),
    ("searches per hop needed, look-up", _lookup, lambda t: len(t.searches), lambda t: t.question.hops),
    ("over-search: known, searched", _known, lambda t: row_of(t)["over_search"], _one),
    ("under-search: look-up, too few", _lookup, lambda t: row_of(t)["under_search"], _one),
    ("tokens the model wrote", lambda t: bool(t.mask), lambda t: sum(t.mask), _one),
)


# ---- why answers are wrong -------------------------------------------------------------------------------


def error_of(t: Trajectory, passages: Mapping[str, Passage] = {}) -> str | None:
    """The cause of a wrong answer, a key of ``ERRORS``; None for a right one.

    Judged from the record alone: the answer, how the rollout ended, and which gold passages its searches
    returned. A query *names* a passage if it holds more than half of the words of the passage's title, without
    articles and prepositions; that tells a bad query from a weak engine. An answer is *copied wrongly* if no passage
    that was read holds it, and at least 60 % of its letters and of a gold answer's are the same, in the same order.

    Args:
        passages: the corpus by id, for the titles of gold passages. A passage that is not in it counts as
            named: nobody can blame the query then.
    """
    if right(t):
        return None
    if not (t.answer or "").strip():
        used_up = t.finish_reason == "length" or (t.finish_reason == "turns" and not t.invalid_turns)
        return "cut off" if used_up else "malformed"
    if not t.searches:
        return "did not search"
    gold = t.question.passages
    if not gold:
        return "found but not used" if answer_retrieved(t) else "passage not found"
    missing = set(gold) - {hit.passage.id for call in t.searches for hit in call.result}
    if not missing:
        return "copied wrongly" if _miscopied(t) else "found but not used"
    titles = [passages[i].title if i in passages else "" for i in missing]
    if any(_names(call.argument, title) for call in t.searches for title in titles):
        return "passage not found"
    return "wrong hop" if len(missing) < len(set(gold)) else "bad query"


_FILLERS = {"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "the", "to", "with"}


def _names(query: str, title: str) -> bool:
    words, asked = (re.findall(r"\w+", text.casefold()) for text in (title, query))
    words = [word for word in words if word not in _FILLERS] or words
    return not words or 2 * sum(word in asked for word in words) > len(words)


def _miscopied(t: Trajectory) -> bool:
    said = normalize_answer(t.answer)
    if any(said in normalize_answer(hit.passage.text) for call in t.searches for hit in call.result):
        return False
    return any(
        SequenceMatcher(None, said, normalize_answer(gold), autojunk=False).ratio() >= 0.6
        for gold in t.question.answers
    )


def errors(trajectories: Iterable[Trajectory], passages: Mapping[str, Passage] = {}) -> dict[str, list[Trajectory]]:
    """The wrong trajectories by cause: every key of ``ERRORS``, with an empty list where nothing went wrong so."""
    found: dict[str, list[Trajectory]] = {name: [] for name in ERRORS}
    for t in trajectories:
        if (cause := error_of(t, passages)) is not None:
            found[cause].append(t)
    return found


# ---- queries ---------------------------------------------------------------------------------------------


def first_query_finds(t: Trajectory) -> bool | None:
    """Whether the first search returned a gold passage; None without a search or without gold passages."""
    if not t.searches or not t.question.passages:
        return None
    return any(hit.passage.id in t.question.passages for hit in t.searches[0].result)


def query_quality(trajectories: Iterable[Trajectory]) -> float | None:
    """Share of the searching trajectories whose first query found a gold passage; None if none can be judged.

    Known questions are left out: they need no search, and the more of them are searched for, the easier the queries.
    """
    found = [f for t in trajectories if not t.question.known and (f := first_query_finds(t)) is not None]
    return fmean(found) if found else None


def by_step(table: Table) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` does not hold, one row a training step and numbered as there (from 1).

    Keys: step, ``first_query_found`` (see ``query_quality``), and ``error/CAUSE`` for each cause in ``ERRORS``:
    its share of the step's rollouts. ``plots.curves`` draws the rows.
    """
    rows = []
    for step in np.unique(table["step"][~np.isnan(table["step"])]):
        here = table["step"] == step
        found, cause = table["first_query_found"][here], table["error"][here]
        judged = found[~np.isnan(found) & (table["known"][here] != 1)]
        rows.append(
            {"step": int(step), "first_query_found": float(judged.mean()) if len(judged) else None}
            | {f"error/{name}": float((cause == number).mean()) for name, number in _CAUSES.items()}
        )
    return rows


# ---- sureness --------------------------------------------------------------------------------------------


def sureness(t: Trajectory) -> float | None:
    """How sure the model was of an answer that it gave without searching: the probability of its own words.

    The product of the sampling probabilities of the tokens of its thoughts and its answer, tags left out (they tell
    how sure it was of the *act*). So it is the chance that, answering again, it would write exactly this. Long
    thoughts can be put in many ways, and push it towards 0: compare it within one model only.

    Returns:
        a number in [0, 1]; None for a rollout that searched or gave no answer.
    """
    if t.searches or t.answer is None:
        return None
    total = 0.0
    for s in t.segments:
        if s.kind in ("think", "answer"):
            texts = t.tokens[s.start : s.end]
            # the segment's text stands somewhere in its tokens, which can straddle its ends
            begin = max(0, "".join(texts).find(s.text))
            first, last = begin + len(f"<{s.kind}>"), begin + len(s.text) - len(f"</{s.kind}>")
            at = 0
            for text, logprob in zip(texts, t.logprobs[s.start : s.end]):
                if at < last and at + len(text) > first:
                    total += logprob
                at += len(text)
    return math.exp(total)


def calibration(sure: Sequence[float], correct: Sequence[float], *, bins: int = 10) -> list[dict[str, float]]:
    """Answers in bins of equal width by sureness: how often they are right, with 95 % intervals.

    A calibrated model is right as often as it is sure (DeGroot and Fienberg 1983; Guo et al. 2017, arXiv 1706.04599).

    Args:
        sure: in [0, 1], one an answer; NaN is left out.
        correct: 1 where it is right, else 0.

    Returns:
        one row a bin that holds an answer: "sure" and "right" (means), "low" and "high" (see ``wilson``), "n".
    """
    sure, correct = np.asarray(sure, float), np.asarray(correct, float)
    judged = ~np.isnan(sure)
    sure, correct = sure[judged], correct[judged]
    place = np.minimum((sure * bins).astype(int), bins - 1)
    rows = []
    for number in np.unique(place):
        here = place == number
        low, high = wilson(int(correct[here].sum()), int(here.sum()))
        rows.append(
            {
                "sure": float(sure[here].mean()),
                "right": float(correct[here].mean()),
                "low": low,
                "high": high,
                "n": int(here.sum()),
            }
        )
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Expected calibration error: mean distance of sureness and share right, weighted by answers; None without any."""
    return None if not rows else sum(abs(r["sure"] - r["right"]) * r["n"] for r in rows) / sum(r["n"] for r in rows)


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of ``hits`` out of ``n``, 95 % by default.

    >>> [round(x, 3) for x in wilson(0, 10)]
    [0.0, 0.278]

    Raises:
        ValueError: no observations, or more hits than those.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"wilson: {hits} hits out of {n}")
    middle, wide = (hits + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, middle - wide), min(1.0, middle + wide)


# ---- figures to reach ------------------------------------------------------------------------------------


def headline(
    before: Mapping[str, Mapping],
    after: Mapping[str, Mapping],
    always: Sequence[Mapping[str, Mapping]],
    never: Sequence[Mapping[str, Mapping]],
) -> dict[str, dict[str, float | None]]:
    """The figures by which a run is judged, as ``suite.record`` takes them.

    Args:
        before, after: ``Report.table()`` of the policy left to itself.
        always, never: tables of policies that are made to search, or to answer, first; of several the one
            with the highest reward counts.
    """

    def get(table, group, metric):
        return table.get(group, {}).get(metric)

    def both(group, metric):
        return {"before": get(before, group, metric), "after": get(after, group, metric)}

    return {
        "exact match, known": both("known", "em"),
        "exact match, look-up": both("look-up", "em"),
        "searches per known question": both("known", "searches"),
        "searches per hop needed, look-up": both("look-up", "searches_per_need"),
        "reward": both("all", "reward")
        | {
            "always searching": max(get(t, "all", "reward") for t in always),
            "never searching": max(get(t, "all", "reward") for t in never),
        },
    }


#: What the shipped almanac and the tiny Qwen should reach: figure -> (at least, at most).
TARGETS = {
    "exact match, known": (0.97, None),
    "exact match, look-up": (0.92, None),
    "searches per known question": (None, 0.15),
    "searches per hop needed, look-up": (0.9, 1.15),
}


def judge(figures: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, str, float | None, float | None, bool]]:
    """Hold ``headline`` figures against ``TARGETS``: rows of (figure, target, before, after, reached).

    The reward has no number to reach; it must be higher than always searching and than never searching.
    """
    rows = []
    for name, (least, most) in TARGETS.items():
        now = figures[name]["after"]
        reached = now is not None and (least is None or now >= least) and (most is None or now <= most)
        target = f"≤ {most}" if least is None else f"≥ {least}" if most is None else f"{least} to {most}"
        rows.append((name, target, figures[name]["before"], now, reached))
    r = figures["reward"]
    bar = max(r["always searching"], r["never searching"])
    target = f"> {r['always searching']:.3f} (always searching) and > {r['never searching']:.3f} (never)"
    return [*rows, ("reward", target, r["before"], r["after"], r["after"] > bar)]


def chooses(figures: Mapping[str, float]) -> bool:
    """Whether a run's figures (see ``suite.read_runs``) keep both targets for searching: the policy learned the choice."""
    known, hops = "searches per known question", "searches per hop needed, look-up"
    least, most = TARGETS[hops]
    return figures.get("searches, known", math.inf) <= TARGETS[known][1] and least <= figures.get(hops, 0.0) <= most


# ---- several runs ----------------------------------------------------------------------------------------


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters by which runs differ, besides their seeds: names in ``row["settings"]``, in their order."""
    names = dict.fromkeys(name for row in rows for name in row["settings"] if name != "seed")
    return [name for name in names if len({repr(row["settings"].get(name)) for row in rows}) > 1]


def by_setting(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Runs gathered by setting: what ``suite.read_runs`` gives, as means with intervals.

    Args:
        names: the parameters that make a setting; runs of one setting differ in their seeds.

    Returns:
        one dict a setting, ordered by it: "setting", "runs" (that did not fail), "failed", and "figures": name ->
        "mean", "low", "high" (see ``interval``; cut to what the figure can be), "values" (a run each, in the order of
        the rows) and "n", of the runs that have it.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr([row["settings"].get(name) for name in names]), []).append(row)
    made = []
    for members in groups.values():
        whole = [row for row in members if not row["error"]]
        figures = {}
        for name in dict.fromkeys(name for row in whole for name in row["figures"]):
            values = [row["figures"][name] for row in whole if name in row["figures"]]
            (low, high), (bottom, top) = interval(values), _possible(name)
            figures[name] = {
                "mean": fmean(values),
                "low": max(low, bottom),
                "high": min(high, top),
                "values": values,
                "n": len(values),
            }
        made.append(
            {
                "setting": {name: members[0]["settings"].get(name) for name in names},
                "runs": len(whole),
                "failed": len(members) - len(whole),
                "figures": figures,
            }
        )
    return sorted(made, key=lambda group: [_order(value) for value in group["setting"].values()])


def _possible(figure: str) -> tuple[float, float]:
    """Between which numbers a figure of ``suite.read_runs`` must lie, by its name."""
    if figure.startswith(("exact match", "F1", "over-search", "under-search")):
        return 0.0, 1.0
    return (0.0 if figure.startswith("searches") else -math.inf), math.inf


def _order(value: Any) -> tuple:
    """Numbers before words, each in their order."""
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value))


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of runs; of two, which carry none worth the name, the least and the greatest.

    >>> interval([3.0])
    (3.0, 3.0)

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("interval: no values")
    if len(values) < 3:
        return min(values), max(values)
    from scipy.stats import t

    mean, n = fmean(values), len(values)
    wide = t.ppf((1 + level) / 2, n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return float(mean - wide), float(mean + wide)


def differences(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], figure: str, base: Mapping[str, Any]
) -> list[tuple[dict[str, Any], int, float, float, float]]:
    """How much a figure differs between each setting and ``base``, paired by seed.

    Returns:
        rows of (setting, seeds that both have, mean difference, low, high); a setting that shares no seed with
        ``base`` is left out.
    """
    found: dict[str, tuple[dict, dict]] = {}
    for row in rows:
        if not row["error"] and figure in row["figures"]:
            setting = {name: row["settings"].get(name) for name in names}
            found.setdefault(repr(setting), (setting, {}))[1][row["settings"].get("seed")] = row["figures"][figure]
    _, first = found.get(repr({name: base.get(name) for name in names}), ({}, {}))
    made = []
    for setting, values in found.values():
        shared = [values[seed] - first[seed] for seed in values if seed in first]
        if shared and values is not first:
            made.append((setting, len(shared), fmean(shared), *interval(shared)))
    return made


def setting_table(groups: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> str:
    """``by_setting`` as a Markdown table: the setting, its runs, and each figure with its interval."""
    names = list(groups[0]["setting"]) if groups else []

    def cell(f):
        if f is None:
            return None
        return f"{f['mean']:.3f}" + (f" ({f['low']:.3f} to {f['high']:.3f})" if f["n"] > 1 else "")

    rows = [
        (*map(str, g["setting"].values()), g["runs"], g["failed"], *(cell(g["figures"].get(f)) for f in figures))
        for g in groups
    ]
    return markdown_table([*names, "runs", "failed", *figures], rows)


# ---- the noise of a gradient -----------------------------------------------------------------------------


def dot_products(gradients: np.ndarray, *, chunk: int = 2**16) -> np.ndarray:
    """The dot product of each row with each, (N, D) -> (N, N), in 64 bits; ``chunk`` columns at a time, for memory."""
    rows = np.asarray(gradients)
    parts = (rows[:, i : i + chunk].astype(np.float64) for i in range(0, rows.shape[1], chunk))
    return sum((part @ part.T for part in parts), np.zeros((len(rows), len(rows))))


def gradient_noise(products: np.ndarray) -> dict[str, float]:
    """How noisy the gradient of one question is, beside what all questions agree on.

    Args:
        products: (N, N), ``dot_products`` of the gradients of N questions that were drawn independently.

    Returns:
        "signal": squared length of the true mean gradient, without the bias that chance adds to that of the sample
        (it can be negative where there is no signal to speak of); "noise": trace of the covariance; "scale": noise
        over signal, the questions a batch needs for as much signal as noise (the simple noise scale of McCandlish et
        al. 2018, "An empirical model of large-batch training", arXiv 1812.06162), infinite where signal <= 0;
        "scale_low", "scale_high": the same two standard errors of the signal (jackknife over the questions) above and
        below it; infinite where that is not above 0.

    Raises:
        ValueError: fewer than 3 gradients.
    """
    if (n := len(products)) < 3:
        raise ValueError(f"gradient_noise needs the gradients of at least 3 questions, got {n}")
    own, all_of = np.diag(products), products.sum()
    noise = (own.sum() - all_of / n) / (n - 1)
    signal = (all_of - own.sum()) / (n * (n - 1))
    without = (all_of - 2 * products.sum(axis=1) + 2 * own - own.sum()) / ((n - 1) * (n - 2))
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    scale, low, high = (
        float(noise / s) if s > 0 else math.inf for s in (signal, signal + 2 * error, signal - 2 * error)
    )
    return {"signal": float(signal), "noise": float(noise), "scale": scale, "scale_low": low, "scale_high": high}


def gradient_agreement(products: np.ndarray, sizes: Sequence[int], *, draws: int = 200, seed: int = 0) -> list[float]:
    """Mean cosine between the gradients of two batches of n different questions, for each n in ``sizes``.

    Args:
        products: (N, N), as for ``gradient_noise``; N at least twice every n.

    Raises:
        ValueError: a size that leaves no second batch.
    """
    rng = np.random.default_rng(seed)
    if not all(1 <= n <= len(products) // 2 for n in sizes):
        raise ValueError(f"gradient_agreement: sizes must lie between 1 and {len(products) // 2}, got {list(sizes)}")
    found = []
    for n in sizes:
        cosines = []
        for _ in range(draws):
            order = rng.permutation(len(products))
            a, b = order[:n], order[n : 2 * n]
            length = math.sqrt(products[np.ix_(a, a)].sum() * products[np.ix_(b, b)].sum())
            cosines.append(products[np.ix_(a, b)].sum() / length if length else 0.0)
        found.append(float(np.mean(cosines)))
    return found


# ---- Markdown --------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with three decimals, None as "–", bools as yes and no, text made harmless.

    >>> print(markdown_table(["a", "b"], [["x|y", 0.5]]))
    | a | b |
    |---|---|
    | x\\|y | 0.500 |
    """
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    text = " ".join(html.escape(str(value), quote=False).split())
    return re.sub(r"([\\|`*_$\[\]])", r"\\\1", text)


def change_table(found: Iterable[Change]) -> str:
    """``changes`` as a Markdown table."""
    rows = [
        (c.name, c.n, c.before, c.after, f"{c.after - c.before:+.3f} ({c.low:+.3f} to {c.high:+.3f})") for c in found
    ]
    return markdown_table(["figure", "questions", "before", "after", "difference (95 % interval)"], rows)


def error_table(before: Mapping[str, Sequence], after: Mapping[str, Sequence]) -> str:
    """Two results of ``errors`` side by side as a Markdown table."""
    rows = [(name, meaning, len(before[name]), len(after[name])) for name, meaning in ERRORS.items()]
    rows.append(("all", "", sum(map(len, before.values())), sum(map(len, after.values()))))
    return markdown_table(["why wrong", "meaning", "before", "after"], rows)


def summarise(
    before: Sequence[Trajectory],
    after: Sequence[Trajectory],
    passages: Mapping[str, Passage] = {},
    *,
    transition: int | None = None,
    steps: int = 0,
) -> str:
    """One page of Markdown about a run: what changed, whether it could be chance, what is still wrong.

    Args:
        transition: the training step at which known and look-up questions part, None if they never did.
        steps: training steps in all.
    """
    fixed, broken = flips(before, after)
    moment = f"part at step {transition}" if transition else "do not part"
    found = [(name, query_quality(side)) for name, side in (("before", before), ("after", after))]
    queries = ", ".join(f"{name} {'–' if share is None else f'{share:.1%}'}" for name, share in found)
    return (
        "\n\n".join(
            [
                "# What the policy learned",
                f"{steps} training steps; known and look-up questions {moment}.",
                "## Before and after, on the same questions",
                change_table(changes(before, after)),
                f"{fixed} questions fixed, {broken} broken: exact McNemar test p = {mcnemar(fixed, broken):.2g}.",
                "## Why answers are wrong",
                error_table(errors(before, passages), errors(after, passages)),
                f"Gold passage found at the first query, of the rollouts on look-up questions that searched: {queries}.",
            ]
        )
        + "\n"
    )
