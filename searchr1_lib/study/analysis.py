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
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from .. import metrics
from ..files import TrajectoryLog
from ..metrics import ERRORS, error_of, first_query_finds, pairs, right, row_of
from ..records import Passage, Trajectory

Rollouts = Sequence[Trajectory]
Means = Mapping[str, Mapping[str, Any]]  # what ``Report.table()`` gives

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
        lines: the number of each rollout's line in the log, from 0.
    """

    path: Path
    columns: dict[str, np.ndarray]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column; all NaN if no rollout had the value."""
        return self.columns[name] if name in self.columns else np.full(len(self), np.nan, np.float32)

    def trajectory(self, number: int) -> Trajectory:
        """One rollout, whole, read from the log again: for a viewer."""
        with open(self.path, "rb") as log:
            return Trajectory.from_dict(json.loads(next(islice(log, self.lines[number], None))))

    def of_error(self, cause: str) -> np.ndarray:
        """The numbers of the rollouts that are wrong for this reason, a key of ``ERRORS``."""
        return np.flatnonzero(self["error"] == _CAUSES[cause])


def read_table(path: str | os.PathLike, passages: Mapping[str, Passage] = {}) -> Table:
    """Read a trajectory log of any length as columns, one rollout in memory at a time.

    Rollouts that were made to search or to answer (``explore``, ``pairs``) say nothing about the policy: left out.

    Args:
        passages: the corpus by id, see ``error_of``.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a line other than a cut last one is broken; names file and line.
    """
    columns: dict[str, array] = {}
    lines: list[int] = []
    for number, t in enumerate(TrajectoryLog(path)):
        if t.first_action is None:
            row = _numbers(t, passages)
            for name in row.keys() | columns.keys():
                column = columns.setdefault(name, array("f", [math.nan] * len(lines)))
                column.append(row.get(name, math.nan))
            lines.append(number)
    return Table(Path(path), {name: np.frombuffer(column, np.float32) for name, column in columns.items()}, lines)


def _numbers(t: Trajectory, passages: Mapping[str, Passage]) -> dict[str, float]:
    """The row of one rollout in a ``Table``; what does not apply is left out."""
    row, cause = row_of(t), error_of(t, passages)
    numbers = {name: row[name] for name in ("known", "hops", "reward", "em", "searches", "tokens", "malformed")} | {
        "step": None if t.step is None else t.step + 1,
        "first_query_found": first_query_finds(t),
        "sureness": sureness(t),
        "error": _CAUSES.get(cause or ""),
    }
    numbers |= {f"rewards/{name}": value for name, value in t.rewards.items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}


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
    if fixed == broken:  # also where nothing changed, which SciPy refuses
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broken).pvalue)


def bootstrap(
    differences: Sequence[float], weights: Sequence[float] | None = None, *, samples: int = 5_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of ``sum(differences) / sum(weights)``.

    Args:
        differences: one number a question, such as exact match after minus before.
        weights: one positive number a question, such as the hops it needs (None: all 1, so the mean).
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
    if len(d) == 1:  # drawn anew it is always itself; SciPy refuses it
        return float(d[0] / w[0]), float(d[0] / w[0])
    from scipy import stats

    ratio = lambda d, w, axis: d.sum(axis) / w.sum(axis)
    drawn = stats.bootstrap((d, w), ratio, paired=True, n_resamples=samples, method="percentile", rng=seed)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def paired(before: Rollouts, after: Rollouts, value: Callable[[Trajectory], Any]) -> list[tuple[float, float]]:
    """``value`` before and after for every question that both sides have; the mean where one has several rollouts.

    Raises:
        ValueError: they share no question.
    """
    mean = lambda rollouts: fmean(map(value, rollouts))
    return [(mean(first), mean(second)) for first, second in pairs(before, after)]


def flips(before: Rollouts, after: Rollouts) -> tuple[int, int]:
    """How many questions were fixed (wrong before, right after) and how many broken; half right counts as right."""
    outcomes = [(b >= 0.5, a >= 0.5) for b, a in paired(before, after, right)]
    return outcomes.count((False, True)), outcomes.count((True, False))


class Change(NamedTuple):
    """A figure before and after on the same ``n`` questions; ``low`` to ``high``: interval of after - before."""

    name: str
    n: int
    before: float
    after: float
    low: float
    high: float


def changes(before: Rollouts, after: Rollouts, **how: Any) -> list[Change]:
    """The figures that matter, before and after, with 95 % bootstrap intervals of the difference.

    Figures without a question of their kind, or without rewards, are left out.

    Args:
        **how: samples and seed, see ``bootstrap``.
    """
    figures = []
    for name, kind, value, weight in _FIGURES:
        first, second = (_judged(side, kind, value) for side in (before, after))
        if first and second:
            values, weights = paired(first, second, value), [w for w, _ in paired(first, second, weight)]
            was, now = (sum(side) / sum(weights) for side in zip(*values))
            interval = bootstrap([a - b for b, a in values], weights, **how)
            figures.append(Change(name, len(values), was, now, *interval))
    return figures


def _judged(rollouts: Rollouts, kind: str, value: Callable[[Trajectory], Any]) -> list[Trajectory]:
    return [t for t in rollouts if kind in ("all", metrics.knowledge(t.question)) and value(t) is not None]


_one = lambda t: 1.0
_searches = lambda t: len(t.searches)
#: Name, kind of question, value (None: does not count), weight: the figure is the sum of values over that of weights.
_FIGURES = (
    ("exact match, all", "all", right, _one),
    ("exact match, known", "known", right, _one),
    ("exact match, look-up", "look-up", right, _one),
    ("reward", "all", lambda t: t.reward, _one),
    ("searches per known question", "known", _searches, _one),
    ("searches per hop needed, look-up", "look-up", _searches, lambda t: t.question.hops),
    ("over-search: known, searched", "known", metrics.over_search, _one),
    ("under-search: look-up, too few", "look-up", metrics.under_search, _one),
    ("tokens the model wrote", "all", lambda t: sum(t.mask) if t.mask else None, _one),
)


# ---- why answers are wrong -------------------------------------------------------------------------------


def errors(trajectories: Rollouts, passages: Mapping[str, Passage] = {}) -> dict[str, list[Trajectory]]:
    """The wrong trajectories by cause: every key of ``ERRORS``, with an empty list where nothing went wrong so."""
    causes = metrics.grouped(trajectories, lambda t: error_of(t, passages))
    return {cause: causes.get(cause, []) for cause in ERRORS}


# ---- queries ---------------------------------------------------------------------------------------------


def query_quality(trajectories: Rollouts) -> float | None:
    """Share of the searching trajectories whose first query found a gold passage; None if none can be judged.

    Known questions are left out: they need no search, and the more of them are searched for, the easier the queries.
    """
    judged = [f for t in trajectories if not t.question.known and (f := first_query_finds(t)) is not None]
    return fmean(judged) if judged else None


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
    total, at, starts = 0.0, 0, [0, *t.ends]
    for s in t.segments:
        if s.kind in ("think", "answer"):
            first, last = at + len(f"<{s.kind}>"), at + len(s.text) - len(f"</{s.kind}>")
            own = (i for i in range(s.start, s.end) if starts[i] < last and t.ends[i] > first)
            total += sum(t.logprobs[i] for i in own)
        at += len(s.text)
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
    both = np.array([sure, correct], float)
    shares, hits = both[:, ~np.isnan(both[0])]
    place = np.minimum((shares * bins).astype(int), bins - 1)
    rows = []
    for number in np.unique(place):
        here = place == number
        share, n = float(hits[here].mean()), int(here.sum())
        low, high = wilson(int(hits[here].sum()), n)
        rows.append({"sure": float(shares[here].mean()), "right": share, "low": low, "high": high, "n": n})
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Expected calibration error: mean distance of sureness and share right, weighted by answers; None without any."""
    return None if not rows else sum(abs(r["sure"] - r["right"]) * r["n"] for r in rows) / sum(r["n"] for r in rows)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share of ``hits`` out of ``n``.

    >>> [round(x, 3) for x in wilson(0, 10)]
    [0.0, 0.278]

    Raises:
        ValueError: no observations, or more hits than those.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"wilson: {hits} hits out of {n}")
    from scipy.stats import binomtest

    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return float(low), float(high)


# ---- figures to reach ------------------------------------------------------------------------------------


def headline(
    before: Means, after: Means, always: Sequence[Means], never: Sequence[Means], regrets: Mapping[str, float] = {}
) -> dict[str, dict[str, Any]]:
    """The figures by which a run is judged, as ``suite.record`` takes them.

    Args:
        before, after: ``Report.table()`` of the policy left to itself.
        always, never: tables of policies that are made to search, or to answer, first; of several the one
            with the highest reward counts.
        regrets: choice regret "before", "after", and of the "best simple policy"; empty where nobody knows it.
    """
    get = lambda table, group, metric: table.get(group, {}).get(metric)
    both = lambda group, metric: {"before": get(before, group, metric), "after": get(after, group, metric)}
    forced = {"always searching": always, "never searching": never}
    return {
        "exact match, known": both("known", "em"),
        "exact match, look-up": both("look-up", "em"),
        "searches per known question": both("known", "searches"),
        "searches per hop needed, look-up": both("look-up", "searches_per_need"),
        "reward": both("all", "reward") | {k: max(get(t, "all", "reward") for t in ts) for k, ts in forced.items()},
        **({"choice regret": dict(regrets)} if regrets else {}),
    }


#: Choice regret that the shipped almanac and the tiny Qwen should not exceed, and share of the best simple policy's.
MOST_REGRET, MOST_OF_SIMPLE = 0.03, 0.25


def judge(figures: Means) -> list[tuple[str, str, float | None, float | None, bool]]:
    """Hold ``headline`` figures against what they should be: rows of (figure, target, before, after, reached).

    The choice regret must be small, and small beside the best simple policy's; there are no such rows where nobody
    knows it. The reward has no number to reach; it must be higher than always searching and than never searching.
    """
    rows: list[tuple[str, str, float | None, float | None, bool]] = []
    if regret := figures.get("choice regret"):
        was, now, simple = regret["before"], regret["after"], regret["best simple policy"]
        shares, few = (was / simple, now / simple), now / simple <= MOST_OF_SIMPLE
        rows = [
            ("choice regret", f"≤ {MOST_REGRET}", was, now, now <= MOST_REGRET),
            (f"the same, over the best simple policy's {simple:.3f}", f"≤ {MOST_OF_SIMPLE}", *shares, few),
        ]
    r = figures["reward"]
    bar = max(r["always searching"], r["never searching"])
    target = f"> {r['always searching']:.3f} (always searching) and > {r['never searching']:.3f} (never)"
    return [*rows, ("reward", target, r["before"], r["after"], r["after"] > bar)]


def chooses(figures: Mapping[str, float]) -> bool:
    """Whether a run's figures (see ``suite.read_runs``) say that it learned the choice: little regret."""
    return figures.get("choice regret, after", math.inf) <= MOST_REGRET


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
    summaries = []
    for members in metrics.grouped(rows, lambda row: repr(_setting(row["settings"], names))).values():
        whole = [row["figures"] for row in members if not row["error"]]
        measured = dict.fromkeys(name for figures in whole for name in figures)
        figures = {name: _spread(name, [run[name] for run in whole if name in run]) for name in measured}
        counts = {"runs": len(whole), "failed": len(members) - len(whole)}
        summaries.append({"setting": _setting(members[0]["settings"], names), **counts, "figures": figures})
    return sorted(summaries, key=lambda summary: [_order(value) for value in summary["setting"].values()])


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    """A figure over runs, its interval cut to what it can be."""
    (low, high), (bottom, top) = interval(values), _possible(name)
    return {"mean": fmean(values), "low": max(low, bottom), "high": min(high, top), "values": values, "n": len(values)}


def _possible(figure: str) -> tuple[float, float]:
    """Between which numbers a figure of ``suite.read_runs`` must lie, by its name."""
    if figure.startswith(("exact match", "F1", "over-search", "under-search")):
        return 0.0, 1.0
    return (0.0 if figure.startswith("searches") else -math.inf), math.inf


def _order(value: Any) -> tuple:
    """Numbers before words, each in their order."""
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of runs; of two, which carry none worth the name, their least and greatest.

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

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def told(values: Sequence[float]) -> str:
    """The mean, and its 95 % interval where there are several values.

    >>> told([0.5]), told([0.5, 0.6])
    ('0.500', '0.550 (0.500 to 0.600)')
    """
    low, high = interval(values)
    return f"{fmean(values):.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else "")


def judged(differences: Sequence[float]) -> tuple[str, str, str]:
    """Mean, 95 % interval and verdict of differences, one a seed, of which a claim says that they are above 0.

    >>> judged([0.1, 0.12, 0.1])[2], judged([0.1, -0.2, 0.1])[2], judged([0.1])[2]
    ('holds', 'cannot tell', 'cannot tell')

    Raises:
        ValueError: no differences.
    """
    low, high = interval(differences)
    said = "cannot tell" if len(differences) < 3 or low <= 0 <= high else "holds" if low > 0 else "contradicted"
    return f"{fmean(differences):+.3g}", f"{low:+.3g} to {high:+.3g}" if len(differences) > 1 else "one seed", said


def differences(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], figure: str, base: Mapping[str, Any]
) -> list[tuple[dict[str, Any], int, float, float, float]]:
    """How much a figure differs between each setting and ``base``, paired by seed.

    Returns:
        rows of (setting, seeds that both have, mean difference, low, high); a setting that shares no seed with
        ``base`` is left out.
    """
    having = [row for row in rows if not row["error"] and figure in row["figures"]]
    settings = metrics.grouped(having, lambda row: repr(_setting(row["settings"], names)))
    seeds = {k: {r["settings"].get("seed"): r["figures"][figure] for r in runs} for k, runs in settings.items()}
    first = seeds.pop(repr(_setting(base, names)), {})
    compared = []
    for key, values in seeds.items():
        if shared := [values[seed] - first[seed] for seed in values if seed in first]:
            setting = _setting(settings[key][0]["settings"], names)
            compared.append((setting, len(shared), fmean(shared), *interval(shared)))
    return compared


def _setting(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: settings.get(name) for name in names}


def setting_table(groups: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> str:
    """``by_setting`` as a Markdown table: the setting, its runs, and each figure with its interval."""
    names = list(groups[0]["setting"]) if groups else []

    cell = lambda f: f and f"{f['mean']:.3f}" + f" ({f['low']:.3f} to {f['high']:.3f})" * (f["n"] > 1)
    cells = lambda g: [cell(g["figures"].get(figure)) for figure in figures]
    rows = ((*map(str, g["setting"].values()), g["runs"], g["failed"], *cells(g)) for g in groups)
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
    over = lambda s: float(noise / s) if s > 0 else math.inf
    scales = {"scale": over(signal), "scale_low": over(signal + 2 * error), "scale_high": over(signal - 2 * error)}
    return {"signal": float(signal), "noise": float(noise), **scales}


def gradient_agreement(products: np.ndarray, sizes: Sequence[int], *, seed: int = 0) -> list[float]:
    """Mean cosine between the gradients of two batches of n different questions, for each n in ``sizes``.

    Args:
        products: (N, N), as for ``gradient_noise``; N at least twice every n.

    Raises:
        ValueError: a size that leaves no second batch.
    """
    rng = np.random.default_rng(seed)
    if not all(1 <= n <= len(products) // 2 for n in sizes):
        raise ValueError(f"gradient_agreement: sizes must lie between 1 and {len(products) // 2}, got {list(sizes)}")

    def cosine(n: int) -> float:
        a, b = np.split(rng.permutation(len(products))[: 2 * n], 2)
        length = math.sqrt(products[np.ix_(a, a)].sum() * products[np.ix_(b, b)].sum())
        return products[np.ix_(a, b)].sum() / length if length else 0.0

    return [float(np.mean([cosine(n) for _ in range(200)])) for n in sizes]


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


def change_table(figures: Iterable[Change]) -> str:
    """``changes`` as a Markdown table."""
    told = lambda c: f"{c.after - c.before:+.3f} ({c.low:+.3f} to {c.high:+.3f})"
    rows = ((c.name, c.n, c.before, c.after, told(c)) for c in figures)
    return markdown_table(["figure", "questions", "before", "after", "difference (95 % interval)"], rows)


def error_table(before: Mapping[str, Sequence], after: Mapping[str, Sequence]) -> str:
    """Two results of ``errors`` side by side as a Markdown table."""
    rows = [(name, meaning, len(before[name]), len(after[name])) for name, meaning in ERRORS.items()]
    rows.append(("all", "", sum(map(len, before.values())), sum(map(len, after.values()))))
    return markdown_table(["why wrong", "meaning", "before", "after"], rows)


def summarise(
    before: Rollouts,
    after: Rollouts,
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
    shares = {"before": query_quality(before), "after": query_quality(after)}
    queries = ", ".join(f"{name} {'–' if share is None else f'{share:.1%}'}" for name, share in shares.items())
    paragraphs = [
        "# What the policy learned",
        f"{steps} training steps; known and look-up questions {moment}.",
        "## Before and after, on the same questions",
        change_table(changes(before, after)),
        f"{fixed} questions fixed, {broken} broken: exact McNemar test p = {mcnemar(fixed, broken):.2g}.",
        "## Why answers are wrong",
        error_table(errors(before, passages), errors(after, passages)),
        f"Gold passage found at the first query, of the rollouts on look-up questions that searched: {queries}.",
    ]
    return "\n\n".join(paragraphs) + "\n"
