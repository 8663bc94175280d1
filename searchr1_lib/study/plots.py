"""Every figure of the project: functions from metrics, reports or trajectories to a matplotlib ``Figure``.

No function here needs a model. Metrics are the rows of a run's ``metrics.jsonl``, one dict a step; a value
that is missing, None or NaN leaves a gap and never an error. Where metrics are taken, a list of several runs
(seeds) is taken too: the curve is then their mean, and a band goes from the least to the greatest.

Colours are Okabe-Ito and cividis, never the only cue; a figure is 900 pixels wide, as GitHub shows it; its
first line says what to see, and ``fig.alt`` says it to those who cannot see. ``show_figure`` displays it.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..records import Trajectory

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
#: The look of the two kinds of question, the same in all figures: colour, marker, line.
KNOWN, LOOKUP = (BLUE, "o", "-"), (RED, "s", "--")
_PLAIN = (BLACK, "D", "-")
_LOOKS = (_PLAIN, KNOWN, LOOKUP, (GREEN, "^", "-."), (PURPLE, "v", ":"))
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "hatch.color": "white",
    "figure.facecolor": "white",
}


# ---- showing ---------------------------------------------------------------------------------------------


class Picture:
    """A figure as one PNG: ``image/png`` is what GitHub and nbconvert keep. Its metadata hold the alt text."""

    def __init__(self, fig: Figure):
        self.fig = fig

    def _repr_png_(self) -> tuple[bytes, dict]:
        return png(self.fig), {"alt": self.fig.alt}

    def __repr__(self) -> str:
        return f"[picture: {self.fig.get_suptitle()}]"


class Words:
    """The alt text of a figure, folded. JupyterLab and nbconvert's default page give a PNG no ``alt`` of its own."""

    def __init__(self, fig: Figure):
        self.alt = fig.alt

    def _repr_html_(self) -> str:
        return f"<details><summary>The picture in words</summary>{html.escape(self.alt)}</details>"

    def __repr__(self) -> str:
        return self.alt


def show_figure(fig: Figure) -> None:
    """Display a figure, and under it its alt text. Figures here are not pyplot's: none must be closed."""
    from IPython.display import display

    display(Picture(fig), Words(fig))


def png(fig: Figure) -> bytes:
    """The figure as a PNG file of at most 256 colours, a third of the size of a full one."""
    full, small = io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png")
    picture = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def _styled(draw):
    """Run a drawing function in the project's style, whatever the notebook has set."""

    @functools.wraps(draw)
    def styled(*args, **kwargs):
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _axes(rows: int, columns: int, height: float, **kwargs):
    """An empty figure of 900 pixels' width, and its axes as a flat list."""
    fig = Figure(figsize=(9, height), dpi=100, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **kwargs).ravel().tolist()
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return fig, axes


def _titled(fig: Figure, title: str, alt: str) -> Figure:
    fig.suptitle(textwrap.fill(title, 88), x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    fig.alt = " ".join(f"{title}. {alt}".replace("..", ".").split())
    return fig


# ---- metrics ---------------------------------------------------------------------------------------------


def series(metrics: Iterable[Mapping[str, Any]], name: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """``(steps, values)`` of one metric, without the steps at which it is missing, None or not finite.

    ``over`` names another key of the rows that stands in for the steps.
    """
    points = [(row[over], row[name]) for row in metrics if _finite(row.get(name))]
    steps, values = zip(*points) if points else ((), ())
    return np.array(steps, float), np.array(values, float)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def smooth(values: Sequence[float], window: int | None = None) -> np.ndarray:
    """Centred moving mean; at the ends over what there is. ``window`` is a twentieth of the length unless given.

    >>> smooth([0, 3, 6, 0], 3).tolist()
    [1.5, 3.0, 3.0, 3.0]
    """
    values = np.asarray(values, float)
    half = (window or _window(len(values))) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / np.maximum(high - low, 1)


def _window(steps: int) -> int:
    return max(3, steps // 20) | 1


def transition_step(metrics: Iterable[Mapping[str, Any]]) -> int | None:
    """The step at which the policy splits known from look-up questions, None if it never does.

    Measured on the gap "share of look-up questions that begin with a search, minus the same for known
    ones", smoothed: the last step before its last tenth at which it crosses the middle between its first and its
    last tenth. None where the gap grows by less than 0.3.
    """
    rows = [r for r in metrics if _finite(r.get("search_first_known")) and _finite(r.get("search_first_lookup"))]
    if len(rows) < 5:
        return None
    gap = smooth([r["search_first_lookup"] - r["search_first_known"] for r in rows])
    tenth = max(1, len(rows) // 10)
    first, last = gap[:tenth].mean(), gap[-tenth:].mean()
    if last - first < 0.3:
        return None
    return int(rows[np.flatnonzero(gap[:-tenth] < (first + last) / 2)[-1] + 1]["step"])


def _runs(metrics) -> list[list[Mapping[str, Any]]]:
    """One run or several as a list of runs."""
    metrics = list(metrics)
    return metrics if metrics and not isinstance(metrics[0], Mapping) else [metrics]


def _curve(ax, runs, name: str, look=_PLAIN, label: str | None = None) -> float | None:
    """Draw a metric: raw and smoothed for one run, mean and band for several. Returns the last smoothed value."""
    color, marker, line = look
    found = [(steps, smooth(values), values) for steps, values in (series(run, name) for run in runs) if len(steps)]
    if not found:
        return None
    if len(found) == 1:
        steps, middle, raw = found[0]
        ax.plot(steps, raw, color=color, alpha=0.3, linewidth=1)
    else:
        steps = np.unique(np.concatenate([s for s, _, _ in found]))
        # a run is not drawn on beyond its own steps
        grid = np.array([np.interp(steps, s, m, left=np.nan, right=np.nan) for s, m, _ in found])
        middle = np.nanmean(grid, axis=0)
        ax.fill_between(steps, np.nanmin(grid, axis=0), np.nanmax(grid, axis=0), color=color, alpha=0.2, linewidth=0)
    every = max(1, len(steps) // 7)
    ax.plot(steps, middle, line, color=color, marker=marker, markevery=every, markersize=5, linewidth=2, label=label)
    return float(middle[-1])


def _step_axis(ax, runs, title: str, drawn: Iterable[float | None]) -> None:
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if all(value is None for value in drawn):
        ax.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=ax.transAxes, color="#595959")


def _legend(ax, **kwargs) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        ax.legend(handles, labels, **{"loc": "best", **kwargs})


def _says(name: str, value: float | None) -> str:
    return f"{name} {'not recorded' if value is None else f'{value:.2f}'}"


def _how(runs) -> str:
    if len(runs) > 1:
        return f"mean of {len(runs)} runs, smoothed; band: least to greatest"
    return f"faint: each step; bold: mean over {_window(len(runs[0]))} steps"


# ---- training --------------------------------------------------------------------------------------------


@_styled
def learning_curves(metrics, *, title: str | None = None) -> Figure:
    """Reward, exact match and searches over the steps, known and look-up apart, the transition marked.

    Args:
        metrics: rows of one run, or a list of runs (seeds).
        title: the takeaway; by default it names the transition, if there is one.
    """
    runs = _runs(metrics)
    fig, (left, middle, right) = _axes(1, 3, 3.5)
    reward = _curve(left, runs, "reward")
    em = [_curve(middle, runs, "em_known", KNOWN, "known"), _curve(middle, runs, "em_lookup", LOOKUP, "look-up")]
    searches = [
        _curve(right, runs, "searches_known", KNOWN, "known: per question"),
        _curve(right, runs, "searches_per_need_lookup", LOOKUP, "look-up: per hop needed"),
    ]
    _step_axis(left, runs, "Reward", [reward])
    _step_axis(middle, runs, "Exact match", em)
    _step_axis(right, runs, "Searches", searches)
    middle.set_ylim(-0.03, 1.03)
    right.set_ylim(bottom=-0.03)
    right.axhline(1, color="#595959", linewidth=1, linestyle=":")
    moments = [step for step in map(transition_step, runs) if step is not None]
    for ax in (left, middle, right):
        for moment in moments:
            ax.axvline(moment, color=GREEN, linewidth=1.5, linestyle="-.", zorder=1)
    if moments:
        left.axvline(moments[0], color=GREEN, linewidth=1.5, linestyle="-.", zorder=1, label="known and look-up part")
    right.set_ylim(top=max(1.5, 1.25 * right.get_ylim()[1]))
    for ax, place in ((left, "lower right"), (middle, "lower right"), (right, "upper left")):
        _legend(ax, loc=place)
    fig.supxlabel(_how(runs), fontsize=9, color="#595959")
    at = " to ".join(str(step) for step in sorted({min(moments), max(moments)})) if moments else ""
    default = f"At step {at}, the policy learns when to search" if moments else "Reward, answers and searches"
    return _titled(
        fig,
        title or default,
        f"Three curves over training steps. At the end: {_says('reward', reward)}; "
        f"{_says('exact match known', em[0])}, {_says('look-up', em[1])}; "
        f"{_says('searches per known question', searches[0])}, "
        f"{_says('searches per hop needed on look-up questions', searches[1])}."
        + (f" A line marks the transition at step {at}." if moments else ""),
    )


_HEALTH = (
    ("entropy", "Entropy (nats)"),
    ("kl", "KL to the start (nats)"),
    ("clip_fraction", "Clipped tokens (share)"),
    ("grad_norm", "Gradient norm"),
    ("malformed", "Malformed (share)"),
    ("completion_tokens", "Model tokens a rollout"),
    ("zero_variance_groups", "No-variance groups"),
)
_FINISH = ("answer", "turns", "length", "stop")


@_styled
def training_health(metrics, *, title: str = "Health of the training") -> Figure:
    """Entropy, KL, clip fraction, gradient norm, malformed rate, lengths, idle groups and finish reasons."""
    runs = _runs(metrics)
    fig, axes = _axes(2, 4, 5.0)
    last = {}
    for ax, (name, label) in zip(axes, _HEALTH):
        last[label] = _curve(ax, runs, name)
        _step_axis(ax, runs, label, [last[label]])
        if name != "kl":
            ax.set_ylim(bottom=0)
        low, high = ax.get_ylim()
        if high - low < 1e-6:
            ax.set_ylim(low - 0.05, low + 1.0)
    ends = [_curve(axes[-1], runs, f"finish_{name}", look, name) for name, look in zip(_FINISH, _LOOKS[1:])]
    _step_axis(axes[-1], runs, "How rollouts end", ends)
    axes[-1].set_ylim(-0.03, 1.03)
    _legend(axes[-1], loc="center left", fontsize=8)
    for ax in axes[:4]:
        ax.set_xlabel("")
    fig.supxlabel(_how(runs), fontsize=9, color="#595959")
    values = "; ".join(_says(label, value) for label, value in last.items())
    return _titled(fig, title, f"Eight small curves over training steps. At the end: {values}.")


@_styled
def curves(metrics, panels: Mapping[str, Mapping[str, str]], *, title: str) -> Figure:
    """Any metrics over the steps, one panel a key of ``panels``.

    Args:
        metrics: rows of one run, or a list of runs (seeds).
        panels: title of a panel -> {name of the metric: label}; at most five metrics a panel. The labels
            "known" and "look-up" have the look that they have in every figure.
        title: the takeaway.
    """
    runs = _runs(metrics)
    fig, axes = _axes(1, len(panels), 3.5)
    told = []
    for ax, (name, lines) in zip(axes, panels.items()):
        looks = [{"known": KNOWN, "look-up": LOOKUP}.get(label, look) for label, look in zip(lines.values(), _LOOKS)]
        last = [_curve(ax, runs, metric, look, label) for (metric, label), look in zip(lines.items(), looks)]
        _step_axis(ax, runs, name, last)
        _legend(ax)
        told += [f"{name}, {_says(label, value)}" for label, value in zip(lines.values(), last)]
    fig.supxlabel(_how(runs), fontsize=9, color="#595959")
    return _titled(fig, title, f"Curves over training steps. At the end: {'; '.join(told)}.")


@_styled
def side_by_side(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Mapping[str, str],
    *,
    title: str,
    logarithmic: Sequence[str] = (),
) -> Figure:
    """A few runs against each other, each with a look of its own, one panel a metric. Not smoothed: moments count.

    Args:
        runs: name of a run -> its rows; at most four.
        panels: title of a panel -> name of its metric.
        title: the takeaway.
        logarithmic: metrics whose values differ by orders of magnitude; zeros are not drawn there.
    """
    if not 1 <= len(runs) < len(_LOOKS):
        raise ValueError(f"side_by_side draws 1 to {len(_LOOKS) - 1} runs, not {len(runs)}")
    fig, axes = _axes(-(-len(panels) // 3), 3, 0.5 + 2.4 * -(-len(panels) // 3))
    told = []
    for ax, (name, metric) in zip(axes, panels.items()):
        last = []
        for (run, rows), (color, marker, line) in zip(runs.items(), _LOOKS[1:]):
            steps, values = series(rows, metric)
            ax.plot(steps, values, line, color=color, marker=marker, markersize=5, linewidth=2, label=run)
            last.append(float(values[-1]) if len(values) else None)
        if metric in logarithmic:
            ax.set_yscale("log", nonpositive="mask")
        _step_axis(ax, runs, name, last)
        told.append(f"{name}: " + ", ".join(map(_says, runs, last)))
    for ax in axes[len(panels) :]:
        ax.remove()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    return _titled(fig, title, f"Curves over training steps. At the end: {'; '.join(told)}.")


@_styled
def methods(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    metric: str,
    label: str,
    against: str,
    *,
    title: str,
    over: str = "step",
) -> Figure:
    """A small picture for each method: its seeds as thin lines, their mean in bold; one method's mean in each, dotted.

    Args:
        runs: name of a method -> its runs (seeds), each a list of rows.
        metric: what is drawn over the steps; ``label`` says it in words.
        against: the method whose mean is drawn into every picture.
        title: the takeaway.
        over: "step", or "minutes": the rows then have this key, and the mean is taken at equal steps.
    """
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    fig, axes = _axes(rows, columns, 0.9 + (2.0 if columns > 2 else 2.6) * rows, sharex=True, sharey=True)
    told = []
    for ax, (name, seeds) in zip(axes, runs.items()):
        for run in seeds:
            ax.plot(*series(run, metric, over), color=BLUE, linewidth=0.9, alpha=0.6)
        at, mean = _mean_curve(seeds, metric, over)
        ax.plot(at, mean, color=BLUE, linewidth=2.5, label=f"mean of the seeds, {label}")
        ax.plot(
            *_mean_curve(runs[against], metric, over), ":", color="#595959", linewidth=2, label=f"the same of {against}"
        )
        ax.set_title(name)
        told.append(_says(name, float(mean[-1]) if len(mean) else None))
    for ax in axes[len(runs) - columns : len(runs)]:
        ax.set_xlabel(over)
        ax.tick_params(labelbottom=True)
    for ax in axes[len(runs) :]:
        ax.remove()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    scale = "training steps" if over == "step" else over
    return _titled(fig, title, f"{label} over {scale}, a small picture a method. At the end: {'; '.join(told)}.")


def _mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], metric: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    """Where every run has a value, the runs' mean there; the axis too is the mean of the runs at a step."""
    found = [dict(zip(series(run, metric)[0], zip(*series(run, metric, over)))) for run in runs]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    means = np.array([np.mean([points[step] for points in found], axis=0) for step in steps]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


@_styled
def reward_distribution(
    steps: Sequence[float], rewards: Sequence[float], *, slices: int = 8, title: str | None = None
) -> Figure:
    """A ridge plot: which rewards the rollouts earn, one ridge a slice of the training, the first at the top.

    Args:
        steps, rewards: one each a rollout; those without a step or a reward (NaN) are left out.
        slices: parts of equal length into which the steps are cut.
        title: the takeaway.

    Raises:
        ValueError: no rollout has both.
    """
    steps, rewards = np.asarray(steps, float), np.asarray(rewards, float)
    both = np.isfinite(steps) & np.isfinite(rewards)
    if not both.any():
        raise ValueError("no rollout has both a step and a reward: pass the columns of a training log")
    parts = _slices(steps[both], slices)
    rewards = rewards[both]
    pad = max(np.ptp(rewards) * 0.03, 0.02)
    edges = np.linspace(rewards.min() - pad, rewards.max() + pad, 61)
    middles = (edges[:-1] + edges[1:]) / 2
    fig, (ax,) = _axes(1, 1, 1.5 + 0.42 * len(parts))
    told = []
    for row, (name, here) in enumerate(parts.items()):
        share = np.histogram(rewards[here], edges)[0] / here.sum()
        base, mean = -row, rewards[here].mean()
        color = _cividis(row / max(1, len(parts) - 1) * 0.85)
        ax.fill_between(middles, base, base + 1.6 * share, step="mid", color=color, alpha=0.85, zorder=row)
        ax.step(middles, base + 1.6 * share, where="mid", color=BLACK, linewidth=0.8, zorder=row)
        ax.plot(
            mean, base, "D", color=ORANGE, markeredgecolor=BLACK, markersize=7, zorder=99, label=None if row else "mean"
        )
        told.append(f"steps {name}: mean {mean:.2f}, standard deviation {rewards[here].std():.2f}")
    ax.set_yticks([-row for row in range(len(parts))], [f"{name}" for name in parts])
    ax.set_ylabel("steps")
    ax.set_xlabel("reward of a rollout; height: share of the slice's rollouts")
    ax.grid(False, axis="y")
    _legend(ax, loc="upper left")
    return _titled(
        fig,
        title or "Which rewards the rollouts earn, from the first steps (top) to the last",
        f"Ridges of rewards. {'; '.join(told)}.",
    )


def _slices(steps: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Steps cut into parts of equal length: "first–last" -> which rollouts; empty parts are left out."""
    low, high = int(steps.min()), int(steps.max())
    edges = np.unique(np.linspace(low, high + 1, count + 1).astype(int))
    found = {}
    for first, end in itertools.pairwise(edges):
        here = (steps >= first) & (steps < end)
        if here.any():
            found[f"{first}–{end - 1}" if end - 1 > first else f"{first}"] = here
    return found


def _cividis(x: float):
    from matplotlib import colormaps

    return colormaps["cividis"](x)


@_styled
def outcomes(
    steps: Sequence[float],
    right: Sequence[float],
    searches: Sequence[float],
    known: Sequence[float],
    *,
    slices: int = 12,
    title: str | None = None,
) -> Figure:
    """What rollouts did and what came of it, as shares through training: known questions left, look-up ones right.

    Args:
        steps, right, searches, known: one each a rollout; rollouts with a NaN are left out.
        slices: parts of equal length into which the steps are cut.
        title: the takeaway.

    Raises:
        ValueError: no rollout has all four.
    """
    columns = np.array([steps, right, searches, known], float)
    steps, right, searches, known = columns[:, np.isfinite(columns).all(axis=0)]
    if not len(steps):
        raise ValueError("no rollout has a step and a known or look-up question: pass the columns of a training log")
    kinds = (
        ("right, no search", lambda ok, n: ok & (n == 0), BLUE, ""),
        ("right, searched", lambda ok, n: ok & (n > 0), SKY, "//"),
        ("wrong, searched", lambda ok, n: ~ok & (n > 0), YELLOW, ".."),
        ("wrong, no search", lambda ok, n: ~ok & (n == 0), RED, "xx"),
    )
    fig, axes = _axes(1, 2, 3.6, sharey=True)
    told = []
    for ax, value, name in zip(axes, (1, 0), ("Known questions", "Look-up questions")):
        here = known == value
        parts = _slices(steps[here], slices) if here.any() else {}
        below, x = np.zeros(len(parts)), np.arange(len(parts))
        for label, test, color, hatch in kinds:
            chosen = test(right[here] > 0.5, searches[here])
            share = np.array([chosen[part].mean() for part in parts.values()])
            ax.bar(x, share, 0.92, bottom=below, color=color, hatch=hatch, label=label, edgecolor="white", linewidth=0)
            below = below + share
            if len(share):
                told.append(f"{name.lower()}, {label}: {share[0]:.0%} to {share[-1]:.0%}")
        every = max(1, -(-len(parts) // 5))
        ax.set_xticks(x[::every], list(parts)[::every])
        ax.set_title(name)
        ax.set_xlabel("steps")
        ax.set_ylim(0, 1)
        ax.grid(False)
    axes[0].set_ylabel("share of the rollouts")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return _titled(
        fig,
        title or "What the rollouts did, and what came of it",
        f"Stacked bars over the training. {'; '.join(told)}.",
    )


@_styled
def calibration(sides: Mapping[str, Sequence[Mapping[str, float]]], *, title: str | None = None) -> Figure:
    """How often answers given without searching are right, over how sure the model was of them.

    Args:
        sides: label -> bins, each with "sure", "right", "low", "high" and "n"; on the dotted line a model is right as
            often as it is sure. The bars below count the answers.
        title: the takeaway.
    """
    fig, (ax, count) = _axes(2, 1, 4.6, height_ratios=(3, 1), sharex=True)
    ax.plot([0, 1], [0, 1], ":", color="#595959", linewidth=1.5, label="as right as it is sure")
    told = []
    for (label, rows), (color, marker, line), shift in zip(sides.items(), (LOOKUP, KNOWN, _PLAIN), (-0.011, 0.011, 0)):
        sure, right = ([row[key] for row in rows] for key in ("sure", "right"))
        spread = [[r["right"] - r["low"] for r in rows], [r["high"] - r["right"] for r in rows]]
        ax.errorbar(sure, right, spread, fmt=line, marker=marker, color=color, capsize=3, markersize=6, label=label)
        count.bar([s + shift for s in sure], [r["n"] for r in rows], 0.022, color=color, label=label)
        told += [f"{label}: sure {r['sure']:.2f}, right {r['right']:.2f} of {r['n']}" for r in rows]
    ax.set_ylabel("share right (95 % interval)")
    ax.set_ylim(-0.04, 1.04)
    _legend(ax, loc="upper left")
    count.set_yscale("log")
    count.set_ylim(bottom=0.8)
    count.set_ylabel("answers (log)")
    count.set_xlabel("how sure: probability of its own words")
    count.set_xlim(-0.03, 1.03)
    return _titled(
        fig,
        title or "How sure the model was when it did not search, and how often it was right",
        f"Points with intervals. {'; '.join(told)}.",
    )


# ---- before and after ------------------------------------------------------------------------------------


@_styled
def before_after(report_before, report_after, *, title: str | None = None) -> Figure:
    """Bars before and after training for known and look-up questions: exact match, searches, reward.

    Where nobody knows which questions are known (public sets), the bars are those of all questions.

    Args:
        report_before, report_after: objects whose ``table()`` maps a group ("known", "look-up", "all") to its
            metrics ("em", "searches", "searches_per_need", "reward"). A dotted line in the middle panel
            is the number of searches that a question needs. Reports without rewards get two panels.
    """
    before, after = report_before.table(), report_after.table()
    shared = before.keys() & after.keys()
    names = [g for g in ("known", "look-up") if g in shared] or [g for g in ("all",) if g in shared]
    if not names:
        raise ValueError("a report is empty: there is nothing to compare")
    panels = [("em", "Exact match"), ("searches", "Searches per question")]
    if any(_finite(table[g].get("reward")) for table in (before, after) for g in names):
        panels.append(("reward", "Reward"))
    fig, axes = _axes(1, len(panels), 3.5)
    for ax, (metric, label) in zip(axes, panels):
        for shift, table, color, hatch, when in ((-0.2, before, SKY, "//", "before"), (0.2, after, BLUE, "", "after")):
            values = [_value(table[g].get(metric)) for g in names]
            bars = ax.bar(np.arange(len(names)) + shift, values, 0.38, color=color, hatch=hatch, label=when)
            over_line = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}, "zorder": 5}
            ax.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, fontsize=9, **over_line)
        ax.set_xticks(range(len(names)), names)
        ax.set_title(label)
        ax.margins(y=0.16)
        ax.grid(False, axis="x")
    axes[0].set_ylim(0, 1.15)
    axes[1].margins(y=0.4)
    for i, group in enumerate(names):
        if (need := _need(group, before, after)) is not None:
            axes[1].plot(
                [i - 0.45, i + 0.45], [need, need], ":", color=BLACK, linewidth=2, label="needed" if i == 0 else None
            )
    _legend(axes[1], loc="upper left")
    told = "; ".join(
        f"{label.lower()} on {g} questions {_value(before[g].get(m)):.2f} before, {_value(after[g].get(m)):.2f} after"
        for g in names
        for m, label in panels
    )
    return _titled(fig, title or "Before and after training", f"Bars: {told}.")


def _value(value: Any) -> float:
    return float(value) if _finite(value) else math.nan


def _need(group: str, *tables) -> float | None:
    """Searches needed per question of a group: none where the model knows, else searches over searches per need."""
    if group == "known":
        return 0.0
    for table in tables:
        searches, ratio = _value(table[group].get("searches")), _value(table[group].get("searches_per_need"))
        if ratio > 0:
            return searches / ratio
    return None


def need(t: Trajectory) -> int:
    """Searches that a question needs: none if it is known, else one a hop."""
    return 0 if t.question.known else t.question.hops


@_styled
def searches_vs_need(trajectories: Sequence[Trajectory], *, title: str | None = None) -> Figure:
    """Share of rollouts by searches made, for each number of searches needed; the framed cells are just right."""
    found = Counter((need(t), len(t.searches)) for t in trajectories)
    if not found:
        raise ValueError("no trajectories to count searches in")
    needs = sorted({n for n, _ in found})
    most = max(max(made for _, made in found), needs[-1])
    counts = np.array([[found[n, made] for n in needs] for made in range(most + 1)], float)
    share = counts / counts.sum(axis=0)
    fig, (ax,) = _axes(1, 1, 1.4 + 0.55 * (most + 1))
    picture = ax.imshow(share, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
    fig.colorbar(picture, ax=ax, label="share of the column")
    for (y, x), value in np.ndenumerate(share):
        label, ink = f"{value:.0%} ({int(counts[y, x])})", "black" if value > 0.5 else "white"
        ax.text(x, y, label, ha="center", va="center", color=ink)
    for x, n in enumerate(needs):
        ax.add_patch(Rectangle((x - 0.48, n - 0.46), 0.96, 0.92, fill=False, edgecolor=ORANGE, linewidth=3))
    ax.set_xticks(range(len(needs)), ["known: 0" if n == 0 else f"look-up: {n}" for n in needs])
    ax.set_yticks(range(most + 1))
    ax.set_xlabel("searches needed")
    ax.set_ylabel("searches made")
    ax.grid(False)
    judged = Counter()
    for (n, made), count in found.items():
        judged["just right" if made == n else "too many" if made > n else "too few"] += count
    told = ", ".join(f"{name} {judged[name] / found.total():.0%}" for name in ("just right", "too many", "too few"))
    return _titled(
        fig,
        title or f"Searches made against searches needed: {told}",
        f"Grid of {found.total()} rollouts; framed cells are where both agree. {told}.",
    )


# ---- designing rewards -----------------------------------------------------------------------------------


@_styled
def reward_histograms(
    columns: Mapping[str, Sequence[float]], known: Sequence[bool], *, title: str | None = None
) -> Figure:
    """How each reward is spread over rollouts, known and look-up questions apart: share of the rollouts by value.

    Args:
        columns: name of a reward -> its value for every rollout.
        known: for every rollout, whether its question is known.
        title: the takeaway.

    Raises:
        ValueError: no reward, or a column as long as ``known`` is not.
    """
    known = np.asarray(known, bool)
    if not columns or any(len(values) != len(known) for values in columns.values()):
        raise ValueError("reward_histograms needs at least one reward, and a value of each for every rollout")
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    fig, axes = _axes(down, across, 0.8 + 1.7 * down)
    told = []
    for ax, (name, values) in zip(axes, columns.items()):
        values = np.asarray(values, float)
        low, high = min(0.0, values.min()), max(1.0 if values.max() > 0 or not values.any() else 0.0, values.max())
        edges = np.linspace(low, high, 12)
        width = (edges[1] - edges[0]) * 0.42
        for shift, part, (color, _, _), hatch, label in (
            (-0.5, known, KNOWN, "", "known"),
            (0.5, ~known, LOOKUP, "//", "look-up"),
        ):
            if part.any():
                share = np.histogram(values[part], edges)[0] / part.sum()
                middles = (edges[:-1] + edges[1:]) / 2 + shift * width
                ax.bar(middles, share, width, color=color, hatch=hatch, label=label)
                told.append(f"{name}, {label}: mean {values[part].mean():.2f}")
        ax.set_title(name)
        ax.set_ylim(0, 1.05)
        ax.grid(False, axis="x")
    for ax in axes[len(columns) :]:
        ax.set_visible(False)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    fig.supylabel("share of the rollouts", fontsize=9)
    return _titled(fig, title or "How each reward is spread over the rollouts", f"Histograms. {'; '.join(told)}.")


@_styled
def correlations(matrix: Mapping[str, Mapping[str, float]], *, title: str | None = None) -> Figure:
    """A square of correlation coefficients, ``matrix[row][column]``; NaN (a constant column) is shown as "–"."""
    names = list(matrix)
    values = np.array([[_value(matrix[a][b]) for b in names] for a in names])
    fig, (ax,) = _axes(1, 1, 1.6 + 0.36 * len(names))
    picture = ax.imshow(values, cmap="cividis", vmin=-1, vmax=1, aspect="auto")
    fig.colorbar(picture, ax=ax, label="correlation")
    for (y, x), value in np.ndenumerate(values):
        label = "–" if math.isnan(value) else f"{value:.2f}"
        ax.text(x, y, label, ha="center", va="center", fontsize=8.5, color="white" if value <= 0.2 else BLACK)
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.grid(False)
    told = "; ".join(f"{name} {value:.2f}" for name, value in zip(names[1:], values[0, 1:]) if not math.isnan(value))
    return _titled(
        fig,
        title or "Which rewards say the same",
        f"A square of {len(names)} by {len(names)} correlation coefficients. {names[0]} with the others: "
        f"{told or 'none'}.",
    )


@_styled
def lines(
    x: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str, title: str
) -> Figure:
    """Values over a parameter that is swept, one panel a key of ``panels``: label -> one value for each of ``x``."""
    fig, axes = _axes(1, len(panels), 3.4)
    told = []
    for ax, (name, drawn) in zip(axes, panels.items()):
        for (label, values), (color, marker, style) in zip(drawn.items(), (*_LOOKS[3:], *_LOOKS[:3])):
            ax.plot(
                x,
                values,
                style,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=2,
                label=label,
                markevery=max(1, len(x) // 10),
            )
            told.append(f"{name}, {label}: from {values[0]:.2f} at {x[0]:g} to {values[-1]:.2f} at {x[-1]:g}")
        ax.set_title(name)
        ax.set_xlabel(xlabel)
        _legend(ax)
    return _titled(fig, title, f"Lines over {xlabel}. {'; '.join(told)}.")


# ---- comparing runs and methods --------------------------------------------------------------------------


@_styled
def trade_off(points: Sequence[Mapping[str, Any]], *, x: str, y: str, title: str | None = None) -> Figure:
    """One quantity against another, one labelled point a method or setting: what is bought, and for how much.

    Args:
        points: each with "label", "x" and "y"; optionally "y_low" and "y_high" (an interval), and "runs": the (x, y)
            of single runs, drawn small; then a legend takes the place of labels.
        x, y: what the axes show. The dotted staircase is the Pareto front: points with more of y for less of x than
            any other.
        title: the takeaway.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("trade_off needs at least one point")
    fig, (ax,) = _axes(1, 1, 4.2)
    xs, ys = ([float(p[key]) for p in points] for key in ("x", "y"))
    front = []
    for at, got in sorted(zip(xs, ys), key=lambda point: (point[0], -point[1])):
        if not front or got > front[-1][1]:
            front.append((at, got))
    ax.plot(*zip(*front), ":", color="#8c8c8c", drawstyle="steps-post", zorder=1)
    for number, point in enumerate(points):
        color, marker = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BLACK)[number % 7], "os^vDPX"[number % 7]
        spread = [[point["y"] - point["y_low"]], [point["y_high"] - point["y"]]] if "y_low" in point else None
        ax.errorbar(
            [point["x"]],
            [point["y"]],
            spread,
            fmt=marker,
            color=color,
            capsize=3,
            markersize=9,
            elinewidth=1.2,
            label=str(point["label"]),
        )
        if runs := point.get("runs"):
            ax.plot(*zip(*runs), marker, color=color, markersize=4, alpha=0.5, zorder=1)
    if any("runs" in p for p in points):
        fig.legend(loc="outside right center", frameon=False, title="small: single runs")
    else:
        ax.margins(0.16)
        _spread_labels(ax, [str(p["label"]) for p in points], xs, ys)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    said = "; ".join(f"{p['label']}: {p['x']:.2f}, {p['y']:.2f}" for p in points)
    return _titled(fig, title or f"{y} against {x}", f"Points of {x} and {y}. {said}.")


def _spread_labels(ax, labels: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Write a label beside each point, each at the first of several places where it meets no other label or point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    ax.figure.draw_without_rendering()
    marks = ax.transData.transform(np.column_stack([xs, ys]))
    places = (
        (9, 5, "left"),
        (-9, 5, "right"),
        (9, -13, "left"),
        (-9, -13, "right"),
        (0, 12, "center"),
        (0, -20, "center"),
        (9, 20, "left"),
        (-9, 20, "right"),
        (9, -28, "left"),
        (-9, -28, "right"),
    )
    taken = []
    for label, x, y in zip(labels, xs, ys):
        for dx, dy, side in places:
            text = ax.annotate(label, (x, y), (dx, dy), textcoords="offset points", ha=side, fontsize=9)
            box = text.get_window_extent(renderer)
            free = (
                not any(box.overlaps(other) for other in taken)
                and not any(box.contains(*mark) for mark in marks)
                and ax.bbox.x0 <= box.x0
                and box.x1 <= ax.bbox.x1
            )
            if free or (dx, dy, side) == places[-1]:
                taken.append(box)
                break
            text.remove()


@_styled
def by_setting(
    groups: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], name: str, *, title: str | None = None
) -> Figure:
    """Figures of several settings that differ in one parameter: mean and interval, one panel a key of ``panels``.

    Args:
        groups: one a setting: "setting" (with the parameter), "runs" (how many), and by figure "mean", "low", "high"
            and "values", as ``analysis.by_setting`` gives them.
        panels: title of a panel -> names of figures, at most five.
        name: the parameter. Numbers are joined by a line, on an axis of equal steps, since settings are often spaced
            unevenly.
        title: the takeaway.

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("by_setting needs at least one setting")
    values = [group["setting"].get(name) for group in groups]
    fig, axes = _axes(1, len(panels), 3.7)
    told = []
    for ax, (heading, figures) in zip(axes, panels.items()):
        inside = []
        for number, (figure, (color, marker, line)) in enumerate(zip(figures, _looks_of(figures))):
            shift = (number - (len(figures) - 1) / 2) * 0.06
            found = [group["figures"].get(figure) for group in groups]
            at = [i + shift for i, f in enumerate(found) if f]
            mean, low, high = ([f[key] for f in found if f] for key in ("mean", "low", "high"))
            spread = [[m - b for m, b in zip(mean, low)], [t - m for m, t in zip(mean, high)]]
            joined = line if all(isinstance(value, (int, float)) for value in values) else ""
            ax.errorbar(
                at, mean, spread, fmt=marker, linestyle=joined, color=color, capsize=3, markersize=5, label=figure
            )
            single = [(i, v) for i, f in zip(at, filter(None, found)) for v in f["values"]]
            ax.plot([i for i, _ in single], [v for _, v in single], ".", color=color, markersize=5, alpha=0.6)
            inside += [v for _, v in single]
            told += [f"{figure} at {value}: {f['mean']:.2f}" for value, f in zip(values, found) if f]
        ax.set_xticks(range(len(values)), [f"{v:g}" if isinstance(v, float) else str(v) for v in values])
        ax.set_title(heading)
        ax.set_xlabel(name)
        if inside:
            height = max(np.ptp(inside), 0.1)
            ax.set_ylim(min(inside) - 0.15 * height, max(inside) + (0.15 + 0.12 * len(figures)) * height)
        _legend(ax, loc="upper left", fontsize=8.5)
    fewest, most = (pick(group["runs"] for group in groups) for pick in (min, max))
    count = str(most) if fewest == most else f"{fewest} to {most}"
    fig.supxlabel(
        f"runs a setting: {count}, small dots; their mean, and its 95 % interval where the picture holds it",
        fontsize=9,
        color="#595959",
    )
    return _titled(fig, title or f"What {name} changes", f"Points over {name}. {'; '.join(told)}.")


def _looks_of(figures: Sequence[str]) -> list[tuple[str, str, str]]:
    """Known and look-up figures have the look that they have everywhere."""
    own = iter((_PLAIN, *_LOOKS[3:]))
    return [KNOWN if "known" in name else LOOKUP if "look-up" in name else next(own) for name in figures]


@_styled
def grid(
    groups: Sequence[Mapping[str, Any]], figures: Sequence[str], across: str, upward: str, *, title: str | None = None
) -> Figure:
    """Figures of settings that differ in two parameters, as maps with the mean (and the range) in each cell.

    Args:
        groups: as for ``by_setting``; their order is that of the axes.
        figures: one map each, at most three.
        across, upward: the two parameters.
        title: the takeaway.

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("grid needs at least one setting")
    xs, ys = (list(dict.fromkeys(g["setting"].get(n) for g in groups)) for n in (across, upward))
    fig, axes = _axes(1, len(figures), 1.7 + 0.62 * len(ys))
    told = []
    for ax, figure in zip(axes, figures):
        values, labels = np.full((len(ys), len(xs)), np.nan), {}
        for g in groups:
            if f := g["figures"].get(figure):
                place = ys.index(g["setting"].get(upward)), xs.index(g["setting"].get(across))
                values[place] = f["mean"]
                spread = f"\n{min(f['values']):.2f}–{max(f['values']):.2f}" if g["runs"] > 1 else ""
                labels[place] = f"{f['mean']:.2f}{spread}"
                told.append(f"{figure} at {across} {xs[place[1]]}, {upward} {ys[place[0]]}: {f['mean']:.2f}")
        low, high = (np.nanmin(values), np.nanmax(values)) if labels else (0, 1)
        ax.imshow(values, cmap="cividis", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect="auto")
        for place, text in labels.items():
            ink = "black" if (values[place] - low) / max(high - low, 1e-6) > 0.55 else "white"
            ax.text(place[1], place[0], text, ha="center", va="center", color=ink, fontsize=9)
        ax.set_xticks(range(len(xs)), xs)
        ax.set_yticks(range(len(ys)), ys)
        ax.set_xlabel(across)
        ax.set_ylabel(upward if ax is axes[0] else "")
        ax.set_title(figure)
        ax.grid(False)
    return _titled(fig, title or f"What {across} and {upward} change together", f"Maps. {'; '.join(told)}.")


# ---- explaining GRPO, retrieval and NF4 ------------------------------------------------------------------


@_styled
def clip_objective(epsilon: float = 0.2, epsilon_high: float | None = None, *, title: str | None = None) -> Figure:
    """The clipped objective min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of one token, for A = 1 and A = -1.

    PPO, arXiv 1707.06347, equation 7; ``epsilon_high`` as in DAPO, arXiv 2503.14476, equation 10.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    r = np.linspace(max(0.0, 1 - 3 * epsilon), 1 + 3 * high, 400)
    fig, axes = _axes(1, 2, 3.4)
    for ax, a in zip(axes, (1, -1)):
        clipped = np.minimum(r * a, np.clip(r, 1 - epsilon, 1 + high) * a)
        flat = (1 + high, r[-1]) if a > 0 else (r[0], 1 - epsilon)
        ax.axvspan(*flat, color=ORANGE, alpha=0.2, label="no gradient")
        ax.plot(r, r * a, "--", color="#595959", label="ratio × A, not clipped")
        ax.plot(r, clipped, "-", color=BLUE, linewidth=2.5, label="clipped objective")
        ax.plot([1], [a], "o", color=BLACK, label="first update: ratio 1")
        ax.set_title(f"A = {a:+d}: {'more' if a > 0 else 'less'} of what was done")
        ax.set_xlabel("ratio new / old probability")
        ax.set_xlim(r[0], r[-1])
        _legend(ax, loc="upper left" if a > 0 else "lower left")
    axes[0].set_ylabel("objective of one token")
    return _titled(
        fig,
        title or "Clipping takes the gradient away where a token has already moved far enough",
        f"Two lines of the objective over the ratio: for A = +1 flat above {1 + high:g}, "
        f"for A = -1 flat below {1 - epsilon:g}.",
    )


@_styled
def advantages_of_group(rewards: Sequence[float], advantages: Sequence[float], *, title: str | None = None) -> Figure:
    """Rewards of one group with their mean, and the advantages made of them."""
    rewards, advantages = _array(rewards), _array(advantages)
    if rewards.shape != advantages.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {rewards.shape} and advantages {advantages.shape} must be one group of equal length")
    fig, (left, right) = _axes(1, 2, 3.2)
    x = np.arange(1, len(rewards) + 1)
    above = rewards - rewards.mean()
    panels = (
        (left, rewards, above, "above the mean", "below the mean"),
        (right, advantages, advantages, "made more likely", "made less likely"),
    )
    for ax, values, sign, more, less in panels:
        up, down = sign > 1e-9, sign < -1e-9
        looks = ((up, BLUE, "", more), (down, ORANGE, "//", less), (~up & ~down, "#999999", "", None))
        for part, color, hatch, label in looks:
            if part.any():
                ax.bar(x[part], values[part], color=color, hatch=hatch, label=label)
        for at, value in zip(x, values):
            place = {"xytext": (0, 3), "va": "bottom"} if value >= 0 else {"xytext": (0, -3), "va": "top"}
            ax.annotate(f"{value:.2f}", (at, value), textcoords="offset points", ha="center", fontsize=9, **place)
        ax.margins(y=0.2)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("rollout of the group")
        ax.grid(False, axis="x")
    left.axhline(rewards.mean(), color=BLACK, linestyle=":", linewidth=1.5, label=f"mean {rewards.mean():.2f}")
    right.axhline(0, color=BLACK, linewidth=1)
    left.set_title("Reward")
    right.set_title("Advantage")
    for ax in (left, right):
        if not np.any(rewards if ax is left else advantages):
            ax.set_ylim(-1, 1)
        ax.set_ylim(top=ax.get_ylim()[1] + 0.4 * np.ptp(ax.get_ylim()))
        _legend(ax, loc="upper left", ncols=3, fontsize=8.5, columnspacing=1)
    pairs = ", ".join(f"{r:.2f} becomes {a:.2f}" for r, a in zip(rewards, advantages))
    return _titled(fig, title or "An advantage says how a rollout compares with its own group", f"Bars: {pairs}.")


@_styled
def step_effect(advantages: Sequence[float], changes: Sequence[float], *, title: str | None = None) -> Figure:
    """What one step did to the rollouts of a group: the change of log-probability over the advantage.

    Args:
        advantages: one a rollout.
        changes: mean change of log-probability over the model's tokens of each rollout, in nats.
        title: the takeaway; by default it counts the rollouts that went the way they were pushed.
    """
    pushed, changed = _array(advantages), _array(changes)
    if pushed.shape != changed.shape or pushed.ndim != 1:
        raise ValueError(f"advantages {pushed.shape} and changes {changed.shape} must be one group of equal length")
    fig, (ax,) = _axes(1, 1, 3.6)
    rose = changed > 0
    for part, color, marker, label in ((rose, BLUE, "^", "more likely now"), (~rose, ORANGE, "v", "less likely now")):
        if part.any():
            ax.plot(pushed[part], changed[part], marker, color=color, markersize=10, alpha=0.7, label=label)
    wide, high = 1.25 * np.abs(pushed).max() or 1.0, 1.25 * np.abs(changed).max() or 1.0
    ax.set_xlim(-wide, wide)
    ax.set_ylim(-high, high)
    against = {"color": "#bbbbbb", "alpha": 0.4, "linewidth": 0}
    ax.fill_between([-wide, 0], 0, high, label="against the push", **against)
    ax.fill_between([0, wide], -high, 0, **against)
    ax.axhline(0, color=BLACK, linewidth=1)
    ax.axvline(0, color=BLACK, linewidth=1)
    ax.set_xlabel("advantage of the rollout")
    ax.set_ylabel("change of log π a token (nats)")
    _legend(ax, loc="upper left")
    moved = int((pushed * changed > 0).sum())
    pairs = ", ".join(f"{a:+.2f} led to {c:+.3f}" for a, c in zip(pushed, changed))
    return _titled(
        fig,
        title or f"{moved} of {len(pushed)} rollouts went the way their advantage pushed them",
        f"Points, one a rollout. Advantage and change of log-probability: {pairs}.",
    )


@_styled
def retrieval_comparison(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Search engines side by side: quality as bars, and quality against time where it was measured.

    Args:
        rows: one dict an engine: "engine" (its name), one or more "recall@K", optionally "mrr" and
            "ms_per_query" (milliseconds).
    """
    qualities = [k for k in (rows[0] if rows else ()) if k.startswith("recall@") or k == "mrr"]
    if not qualities or any("engine" not in row for row in rows):
        raise ValueError('each row needs "engine" and a "recall@K", as in {"engine": "BM25", "recall@3": 0.9}')
    timed = any(_finite(row.get("ms_per_query")) for row in rows)
    names = [str(row["engine"]) for row in rows]
    fig, axes = _axes(1, 1 + timed, 1.7 + 0.26 * len(rows) * len(qualities), sharey=True)
    looks = list(zip((SKY, BLUE, ORANGE, GREEN, PURPLE, YELLOW), ("", "//", "..", "\\\\", "xx", "--")))
    thick = 0.8 / len(qualities)
    for i, quality in enumerate(qualities):
        color, hatch = looks[i % len(looks)]
        values = [_value(row.get(quality)) for row in rows]
        at = np.arange(len(rows)) + (i + 0.5) * thick - 0.4
        bars = axes[0].barh(at, values, thick * 0.92, color=color, hatch=hatch, label=quality)
        axes[0].bar_label(bars, [f"{v:.2f}" for v in values], padding=2, fontsize=9)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1.12)
    axes[0].set_title("Quality")
    axes[0].grid(False, axis="y")
    if timed:
        times = [_value(row.get("ms_per_query")) for row in rows]
        axes[1].plot(times, range(len(rows)), "D", color=BLACK, markersize=8)
        axes[1].set_xscale("log")
        axes[1].margins(x=0.25)
        axes[1].set_title("Milliseconds per query (log scale)")
        for y, value in enumerate(times):
            axes[1].annotate(f"{value:.3g}", (value, y), (9, 0), textcoords="offset points", va="center", fontsize=9)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=6)
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{q} {_value(row.get(q)):.2f}" for q in qualities)
        + (f", {_value(row.get('ms_per_query')):.3g} ms" if timed else "")
        for name, row in zip(names, rows)
    )
    return _titled(fig, title or "How well and how fast the engines find the gold passage", f"Bars: {told}.")


@_styled
def nf4_quantisation(weights, dequantised, *, block: int = 64, title: str | None = None) -> Figure:
    """What NF4 does to a weight matrix: a corner before and after, one block's staircase, the errors.

    Args:
        weights, dequantised: the same matrix before quantisation and after the way there and back (numpy or
            torch, two-dimensional, equal shapes).
        block: how many consecutive weights share one scale (QLoRA, arXiv 2305.14314, section 3: 64).

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    w, q = _array(weights), _array(dequantised)
    if w.shape != q.shape or w.ndim != 2:
        raise ValueError(f"need two matrices of one shape, not {w.shape} and {q.shape}")
    fig, (before, after, stairs, errors) = _axes(2, 2, 6.6)
    side = min(32, *w.shape)
    limit = np.abs(w[:side, :side]).max()
    for ax, matrix, name in ((before, w, "before: 16 or 32 bits a weight"), (after, q, "after: 4 bits a weight")):
        picture = ax.imshow(matrix[:side, :side], cmap="cividis", vmin=-limit, vmax=limit, aspect="auto")
        ax.set_title(f"{side} × {side} corner, {name}", fontsize=9.5)
        ax.grid(False)
    fig.colorbar(picture, ax=[before, after], label="weight")
    one, its = w.ravel()[:block], q.ravel()[:block]
    order = np.argsort(one)
    levels = len(np.unique(its))
    stairs.plot(one[order], "o", color=ORANGE, markersize=4, label="weight")
    label = f"NF4, {levels} of 16 levels used"
    stairs.step(np.arange(len(one)), its[order], where="mid", color=BLUE, linewidth=2, label=label)
    stairs.set_title(f"One block of {len(one)} weights, sorted", fontsize=9.5)
    stairs.set_xlabel("rank in the block")
    _legend(stairs, loc="upper left")
    error = (q - w).ravel()
    relative = np.sqrt((error**2).mean() / (w**2).mean())
    edges = np.linspace(*np.quantile(w, (0.001, 0.999)), 60)
    errors.hist(w.ravel(), edges, color=ORANGE, alpha=0.6, label="weights")
    errors.hist(error, edges, histtype="step", color=BLUE, linewidth=2, label="errors")
    errors.set_title(f"Error: {relative:.1%} of the weights' size (root mean square)", fontsize=9.5)
    errors.set_xlabel("value")
    errors.xaxis.set_major_locator(MaxNLocator(nbins=5))
    errors.set_ylabel("count")
    _legend(errors, loc="upper left")
    return _titled(
        fig,
        title or f"NF4 keeps 16 levels a block and moves the weights by {relative:.1%}",
        f"A corner of the matrix before and after; a block of {len(one)} weights becomes a staircase "
        f"of {levels} levels; the errors are {relative:.1%} of the weights' root mean square.",
    )


def _array(values) -> np.ndarray:
    """Numbers as a float array, also from a torch tensor of any type or device."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, float)


@_styled
def warm_start_loss(log: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """The loss of the warm start over its steps, from ``training_log.jsonl``, on a logarithmic scale."""
    steps, losses = [row["step"] for row in log], [row["loss"] for row in log]
    fig, (ax,) = _axes(1, 1, 3.0)
    ax.plot(steps, losses, color=BLUE, marker="o", markersize=4)
    ax.set_yscale("log")
    ax.set_xlabel("optimiser step")
    ax.set_ylabel("loss per weighted token, nats")
    return _titled(
        fig,
        title or "The loss of the warm start",
        f"A line that falls from {losses[0]:.2f} at step {steps[0]} to {losses[-1]:.2f} at step {steps[-1]}.",
    )


@_styled
def targets(figures: Mapping[str, float], ranges: Mapping[str, tuple[float, float]], *, title: str) -> Figure:
    """Measured values as points on the range that each should lie in; values and ranges lie in [0, 1]."""
    fig, (ax,) = _axes(1, 1, 0.9 + 0.38 * len(figures))
    for row, (name, value) in enumerate(figures.items()):
        low, high = ranges[name]
        inside = low <= value <= high
        ax.barh(row, high - low, left=low, height=0.55, color="#DDDDDD")
        ax.plot(value, row, marker="o" if inside else "X", color=BLUE if inside else ORANGE, markersize=9)
        ax.annotate(f"{value:.2f}", (value, row), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8.5)
    ax.set_yticks(range(len(figures)), list(figures))
    ax.set_ylim(len(figures) - 0.4, -0.8)
    ax.set_xlim(-0.03, 1.05)
    ax.set_xlabel("grey: where it should lie; circle: inside, cross: outside")
    said = "; ".join(
        f"{name} {value:.2f} (range {ranges[name][0]:.2f} to {ranges[name][1]:.2f})" for name, value in figures.items()
    )
    return _titled(fig, title, said + ".")
