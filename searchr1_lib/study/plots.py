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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..metrics import need
from ..records import Trajectory

Numbers = Any  # a sequence of numbers, or an array
Rows = Sequence[Mapping[str, Any]]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#595959"
#: The looks of lines: the two kinds of question have theirs in all figures, other lines take the rest in order.
KNOWN, LOOKUP, *_OTHERS = (
    dict(zip(("color", "marker", "linestyle"), look))
    for look in ((BLUE, "o", "-"), (RED, "s", "--"), (BLACK, "D", "-"), (GREEN, "^", "-."), (PURPLE, "v", ":"))
)


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
    """Run a drawing function in the project's style (``figures.mplstyle``), whatever the notebook has set."""

    @functools.wraps(draw)
    def styled(*args, **kwargs):
        with context(["default", "searchr1_lib.study.figures"]):
            return draw(*args, **kwargs)

    return styled


def _axes(count: int, height: float, *, across: int = 4, row: float = 0.0, **kwargs):
    """An empty figure of 900 pixels' width with so many axes, at most ``across`` side by side.

    It is ``height`` inches high, and ``row`` more for each row of axes.
    """
    down = -(-count // across)
    fig = Figure(figsize=(9, height + row * down))
    axes = fig.subplots(down, min(count, across), squeeze=False, **kwargs).ravel().tolist()
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count]


def _finished(fig: Figure, title: str, alt: str, *, note: str = "", below: int = 0, **legend) -> Figure:
    """A drawn figure with its takeaway, alt text and legends.

    Args:
        note: a grey line under the axes.
        below: columns of one legend below all axes, that of the first.
        **legend: how each axes' own legend looks, where none stands yet.
    """
    fig.suptitle(textwrap.fill(title, 88), x=0.01, ha="left")
    fig.alt = " ".join(f"{title}. {alt}".replace("..", ".").split())
    fig.supxlabel(note, color=GREY)
    if below:
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=below)
    elif not fig.legends and not any(ax.get_legend() for ax in fig.axes):
        for ax in fig.axes:
            if ax.get_legend_handles_labels()[1]:
                ax.legend(**legend)
    return fig


def _looks(labels: Iterable[str]) -> list[dict[str, str]]:
    """A look for each line, by its label."""
    rest = iter((*_OTHERS, KNOWN, LOOKUP))
    return [KNOWN if "known" in label else LOOKUP if "look-up" in label else next(rest) for label in labels]


def _says(name: str, value: float | None) -> str:
    return f"{name} {'not recorded' if value is None else f'{value:.2f}'}"


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) else None


def _array(values) -> np.ndarray:
    """Numbers as a float array, also from a torch tensor of any type or device."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, float)


def _intervals(ax, at: Numbers, rows: Rows, keys: tuple[str, str, str], **look) -> None:
    """A point for each row and its interval; ``keys`` are those of the value, the low end and the high end."""
    value, low, high = np.array([[row.get(key, math.nan) for key in keys] for row in rows]).reshape(-1, 3).T
    ax.errorbar(at, value, (value - low, high - value), **look)


def _bars(ax, columns: Mapping[str, Numbers], looks: Iterable[tuple[str, str]], *, flat: bool = False) -> None:
    """Bars side by side, a group a place, with their values: label -> one value a place; colour and hatch of each."""
    thick = 0.8 / len(columns)
    for i, ((label, values), (color, hatch)) in enumerate(zip(columns.items(), looks)):
        at = np.arange(len(values)) + (i + 0.5) * thick - 0.4
        bars = (ax.barh if flat else ax.bar)(at, values, 0.95 * thick, color=color, hatch=hatch, label=label)
        ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)


def _map(ax, values: np.ndarray, texts: np.ndarray, columns: Sequence, rows: Sequence, **kwargs):
    """A heat map with a text in each cell; returns what a colour bar is made of."""
    picture = ax.imshow(values, cmap="cividis", aspect="auto", **kwargs)
    for (y, x), value in np.ndenumerate(values):
        ink = "white" if picture.norm(value) < 0.5 else BLACK
        ax.text(x, y, texts[y, x], ha="center", va="center", color=ink, fontsize=9)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
    return picture


# ---- metrics ---------------------------------------------------------------------------------------------


def series(metrics: Rows, name: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """``(steps, values)`` of one metric, without the steps at which it is missing, None or not finite.

    ``over`` names another key of the rows that stands in for the steps.
    """
    points = [(row[over], row[name]) for row in metrics if _finite(row.get(name))]
    return tuple(np.array(points, float).reshape(-1, 2).T)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def smooth(values: Numbers, window: int | None = None) -> np.ndarray:
    """Centred moving mean; at the ends over what there is. ``window`` is a twentieth of the length unless given.

    >>> smooth([0, 3, 6, 0], 3).tolist()
    [1.5, 3.0, 3.0, 3.0]
    """
    values = np.asarray(values, float)
    half = (window or _window(len(values))) // 2
    sums, at = np.cumsum([0.0, *values]), np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _window(steps: int) -> int:
    return max(3, steps // 20) | 1


def transition_step(metrics: Rows) -> int | None:
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


def _curve(ax, runs, name: str, label: str | None, look: Mapping[str, str]) -> float | None:
    """Draw a metric: raw and smoothed for one run, mean and band for several. Returns the last smoothed value."""
    drawn = [(steps, values) for steps, values in (series(run, name) for run in runs) if len(steps)]
    if not drawn:
        return None
    steps = np.unique(np.concatenate([steps for steps, _ in drawn]))
    # a run is not drawn on beyond its own steps
    courses = [np.interp(steps, at, smooth(values), left=np.nan, right=np.nan) for at, values in drawn]
    middle, low, high = (pick(courses, axis=0) for pick in (np.nanmean, np.nanmin, np.nanmax))
    ax.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
    if len(drawn) == 1:
        ax.plot(*drawn[0], color=look["color"], alpha=0.3, linewidth=1)
    ax.plot(steps, middle, **look, markevery=max(1, len(steps) // 7), label=label)
    return float(middle[-1])


def _step_axis(ax, title: str, last: Mapping[str, float | None]) -> str:
    """Name the axes of a panel over the steps; returns what is said of its lines, whose last values are given."""
    ax.set(title=title, xlabel="step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if all(value is None for value in last.values()):
        ax.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=ax.transAxes, color=GREY)
    return ", ".join(itertools.starmap(_says, last.items()))


def _runs(metrics) -> list[Rows]:
    """One run or several as a list of runs."""
    metrics = list(metrics)
    return metrics if metrics and not isinstance(metrics[0], Mapping) else [metrics]


def _over_steps(runs: Sequence[Rows], panels: Mapping[str, Mapping[str, str]]):
    """Panels of curves, {title: {metric: label}}; a single line needs no label.

    Returns:
        the figure, its axes, the last values of each panel in words, and a note on how the curves are drawn.
    """
    fig, axes = _axes(len(panels), 3.5)
    told = []
    for ax, (title, lines) in zip(axes, panels.items()):
        labels = [label or title for label in lines.values()]
        drawn = zip(labels, lines.items(), _looks(labels))
        told.append(_step_axis(ax, title, {name: _curve(ax, runs, *line, look) for name, line, look in drawn}))
    note = f"faint: each step; bold: mean over {_window(len(runs[0]))} steps"
    if len(runs) > 1:
        note = f"mean of {len(runs)} runs, smoothed; band: least to greatest"
    return fig, axes, told, note


# ---- training --------------------------------------------------------------------------------------------


@_styled
def learning_curves(metrics, *, title: str | None = None) -> Figure:
    """Reward, exact match and searches over the steps, known and look-up apart, ``transition_step`` marked.

    Args:
        metrics: rows of one run, or a list of runs (seeds).
        title: the takeaway; by default it names that step, if there is one.
    """
    panels = {
        "Reward": {"reward": ""},
        "Exact match": {"em_known": "known", "em_lookup": "look-up"},
        "Searches": {"searches_known": "known: per question", "searches_per_need_lookup": "look-up: per hop needed"},
    }
    runs = _runs(metrics)
    fig, axes, (reward, em, searches), note = _over_steps(runs, panels)
    moments = sorted({step for step in map(transition_step, runs) if step is not None})
    for ax, moment in itertools.product(axes, moments):
        ax.axvline(moment, color=GREEN, linewidth=1.5, linestyle="-.", zorder=1)
    axes[1].set_ylim(-0.03, 1.03)
    axes[2].axhline(1, color=GREY, linewidth=1, linestyle=":")
    axes[2].set_ylim(-0.03, max(1.5, 1.25 * axes[2].get_ylim()[1]))
    note += "; dash-dotted: half of the gap in beginning with a search" * bool(moments)
    at = " to ".join(map(str, dict.fromkeys(moments[:1] + moments[-1:])))
    default = f"From step {at} on, half of the gap in searching is there" if moments else "Reward, answers and searches"
    told = f"Three curves over training steps. At the end: {reward}; exact match {em}; searches {searches}."
    told += f" A line marks step {at}, from which on half of the gap between the kinds is there." * bool(moments)
    return _finished(fig, title or default, told, note=note)


@_styled
def curves(metrics, panels: Mapping[str, Mapping[str, str]], *, title: str) -> Figure:
    """Any metrics over the steps, one panel a key of ``panels``.

    Args:
        metrics: rows of one run, or a list of runs (seeds).
        panels: title of a panel -> {name of the metric: label}; at most five metrics a panel. Lines whose labels
            say "known" or "look-up" have the look that they have in every figure.
        title: the takeaway.
    """
    fig, _, told, note = _over_steps(_runs(metrics), panels)
    words = "; ".join(f"{name}, {last}" for name, last in zip(panels, told))
    return _finished(fig, title, f"Curves over training steps. At the end: {words}.", note=note)


@_styled
def side_by_side(
    runs: Mapping[str, Rows], panels: Mapping[str, str], *, title: str, logarithmic: Sequence[str] = ()
) -> Figure:
    """A few runs against each other, each with a look of its own, one panel a metric. Not smoothed: moments count.

    Args:
        runs: name of a run -> its rows; at most four.
        panels: title of a panel -> name of its metric.
        title: the takeaway.
        logarithmic: metrics whose values differ by orders of magnitude; zeros are not drawn there.
    """
    if not 1 <= len(runs) <= 4:
        raise ValueError(f"side_by_side draws 1 to 4 runs, not {len(runs)}")
    fig, axes = _axes(len(panels), 0.5, across=3, row=2.4)
    told = []
    for ax, (name, metric) in zip(axes, panels.items()):
        last = {}
        for (run, rows), look in zip(runs.items(), (KNOWN, LOOKUP, *_OTHERS[1:])):
            steps, values = series(rows, metric)
            ax.plot(steps, values, **look, label=run)
            last[run] = _last(values)
        if metric in logarithmic:
            ax.set_yscale("log", nonpositive="mask")
        told.append(f"{name}: {_step_axis(ax, name, last)}")
    return _finished(fig, title, f"Curves over training steps. At the end: {'; '.join(told)}.", below=len(runs))


@_styled
def methods(
    runs: Mapping[str, Sequence[Rows]], metric: str, label: str, against: str, *, title: str, over: str = "step"
) -> Figure:
    """A small picture for each method: its seeds as thin lines, their mean in bold; one method's mean in each, dotted.

    Args:
        runs: name of a method -> its runs (seeds), each a list of rows.
        metric: what is drawn over the steps; ``label`` says it in words.
        against: the method whose mean is drawn into every picture.
        title: the takeaway.
        over: "step", or another key of the rows, such as "minutes"; the mean is then taken at equal steps.
    """
    fig, axes = _axes(len(runs), 0.9, row=2.0 if len(runs) > 2 else 2.6, sharex=True, sharey=True)
    reference = _mean_curve(runs[against], metric, over)
    told = []
    for ax, (name, seeds) in zip(axes, runs.items()):
        for run in seeds:
            ax.plot(*series(run, metric, over), color=BLUE, linewidth=0.9, alpha=0.6)
        at, mean = _mean_curve(seeds, metric, over)
        ax.plot(at, mean, color=BLUE, linewidth=2.5, label=f"mean of the seeds, {label}")
        ax.plot(*reference, ":", color=GREY, label=f"the same of {against}")
        ax.set_title(name)
        told.append(_says(name, _last(mean)))
    for ax in axes[-4:]:
        ax.set_xlabel(over)
        ax.tick_params(labelbottom=True)
    axes[0].xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g} k" if x >= 10_000 else f"{x:g}")  # all share it
    words = f"{label} over {'training steps' if over == 'step' else over}, a small picture a method. At the end: "
    return _finished(fig, title, f"{words}{'; '.join(told)}.", below=2)


def _mean_curve(runs: Sequence[Rows], metric: str, over: str) -> np.ndarray:
    """Where every run has a value, the runs' mean there, (2, N); the axis too is the mean of the runs at a step."""
    courses = [dict(zip(series(run, metric)[0], zip(*series(run, metric, over)))) for run in runs]
    steps = sorted(set.intersection(*map(set, courses))) if courses else []
    return np.array([np.mean([points[step] for points in courses], axis=0) for step in steps]).reshape(-1, 2).T


def _complete(lacking: str, *columns: Numbers) -> np.ndarray:
    """The columns of a training log where all are numbers; ``lacking`` is said where none is left."""
    table = np.array(columns, float)
    table = table[:, np.isfinite(table).all(axis=0)]
    if not table.size:
        raise ValueError(f"{lacking}: pass the columns of a training log")
    return table


def _slices(steps: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Steps cut into parts of equal length: "first–last" -> which rollouts; empty parts are left out."""
    edges = np.unique(np.linspace(steps.min(), steps.max() + 1, count + 1).astype(int)) if len(steps) else []
    parts = {
        f"{first}–{end - 1}" if end - 1 > first else f"{first}": (steps >= first) & (steps < end)
        for first, end in itertools.pairwise(edges)
    }
    return {name: here for name, here in parts.items() if here.any()}


#: Was it right, was there a search, and the look of these rollouts.
_OUTCOMES = {
    "right, no search": (True, False, BLUE, ""),
    "right, searched": (True, True, SKY, "//"),
    "wrong, searched": (False, True, YELLOW, ".."),
    "wrong, no search": (False, False, RED, "xx"),
}


@_styled
def outcomes(steps: Numbers, right: Numbers, searches: Numbers, known: Numbers) -> Figure:
    """What rollouts did and what came of it, as shares through training: known questions left, look-up ones right.

    Args:
        steps, right, searches, known: one each a rollout; rollouts with a NaN are left out.

    Raises:
        ValueError: no rollout has all four.
    """
    columns = _complete("no rollout has a step and a known or look-up question", steps, right, searches, known)
    fig, axes = _axes(2, 3.6, sharey=True)
    told = []
    for ax, value, name in zip(axes, (1, 0), ("Known questions", "Look-up questions")):
        steps, right, searches, _ = columns[:, columns[3] == value]
        parts = _slices(steps, 12)
        x, below = np.arange(len(parts)), np.zeros(len(parts))
        for label, (is_right, searched, color, hatch) in _OUTCOMES.items():
            chosen = ((right > 0.5) == is_right) & ((searches > 0) == searched)
            share = np.array([chosen[part].mean() for part in parts.values()])
            ax.bar(x, share, 0.92, below, color=color, hatch=hatch, label=label, edgecolor="white", linewidth=0)
            below += share
            told += [f"{name.lower()}, {label}: {share[0]:.0%} to {share[-1]:.0%}"] if len(share) else []
        every = max(1, -(-len(parts) // 5))
        ax.set_xticks(x[::every], list(parts)[::every])
        ax.set(title=name, xlabel="steps", ylim=(0, 1))
        ax.grid(False)
    axes[0].set_ylabel("share of the rollouts")
    words = f"Stacked bars over steps. {'; '.join(told)}."
    return _finished(fig, "What the rollouts did, and what came of it", words, below=4)


@_styled
def calibration(
    sides: Mapping[str, Rows], *, title: str = "Answers without a search", xlabel: str = "how sure it was"
) -> Figure:
    """How often answers given without searching are right, over how sure the model was of them.

    Args:
        sides: label -> bins, each with "sure", "right", "low", "high" and "n"; on the dotted line a model is right as
            often as it is sure. The bars below count the answers.
        title: the takeaway.
        xlabel: what "sure" is.
    """
    fig, (ax, count) = _axes(2, 4.6, across=1, height_ratios=(3, 1), sharex=True)
    ax.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1.5, label="as right as it is sure")
    told = []
    for (label, bins), look, shift in zip(sides.items(), (LOOKUP, KNOWN, _OTHERS[0]), (-0.011, 0.011, 0)):
        sure = np.array([row["sure"] for row in bins])
        _intervals(ax, sure, bins, ("right", "low", "high"), **look, label=label)
        count.bar(sure + shift, [row["n"] for row in bins], 0.022, color=look["color"])
        told += [f"{label}: sure {row['sure']:.2f}, right {row['right']:.2f} of {row['n']}" for row in bins]
    ax.set(ylabel="share right (95 % interval)", ylim=(-0.04, 1.04))
    count.set(yscale="log", ylabel="answers (log)", xlabel=xlabel, xlim=(-0.03, 1.03))
    count.set_ylim(bottom=0.8)
    return _finished(fig, title, f"Points with intervals. {'; '.join(told)}.")


# ---- by how sure -----------------------------------------------------------------------------------------


@_styled
def search_by_level(sides: Mapping[str, Rows]) -> Figure:
    """How often a hop is searched for, over how sure the policy says it is of what it remembers.

    Args:
        sides: label -> rows of ``regret.by_level``; the optimum is drawn for the decisions of the last one.
    """
    fig, (ax,) = _axes(1, 3.6)
    *_, last = sides.values()
    level, best = ([row[name] for row in last] for name in ("level", "best"))
    ax.step(level, best, where="mid", color=GREEN, linestyle="-.", label="the optimum")
    told = [_by_level("the optimum", last, "best")]
    for (name, rows), look in zip(sides.items(), (_OTHERS[0] | {"linestyle": ":"}, KNOWN)):
        ax.plot([row["level"] for row in rows], [row["searches"] for row in rows], **look, label=name)
        told.append(_by_level(name, rows, "searches"))
    ax.set(xlabel="the chance that the memory is true, as the policy states it", ylabel="searches for it (share)")
    ax.set(ylim=(-0.03, 1.03), xticks=level)
    told_of = [f"{row['searches']:.0%} where it states {row['level']:g}" for row in (last[0], last[-1])]
    title = f"{name.capitalize()}, it searches in {' and in '.join(told_of)}"
    return _finished(fig, title, f"Curves over the stated level. {'; '.join(told)}.")


def _by_level(label: str, rows: Rows, name: str) -> str:
    return f"{label} " + ", ".join(f"{row[name]:.2f} at {row['level']:.2f}" for row in rows)


@_styled
def searches_vs_need(trajectories: Sequence[Trajectory], *, title: str | None = None) -> Figure:
    """Share of rollouts by searches made, for each number of searches needed; the framed cells are just right.

    Rollouts of questions of which nobody knows what they need are left out, and the alt text counts them.

    Raises:
        ValueError: no trajectories.
    """
    if not trajectories:
        raise ValueError("no trajectories to count searches in")
    pairs = [(len(t.searches), need(t.question)) for t in trajectories if need(t.question) is not None]
    made, needed = np.array(pairs, int).reshape(-1, 2).T
    needs = np.unique(needed)
    rows = range(max([*made, *needs], default=0) + 1)
    fig, (ax,) = _axes(1, 1.4 + 0.55 * len(rows))
    ax.set(xlabel="searches needed", ylabel="searches made")
    if pairs:
        counts = np.array([[np.sum((made == row) & (needed == n)) for n in needs] for row in rows])
        share = counts / counts.sum(axis=0)
        texts = np.vectorize(lambda part, count: f"{part:.0%} ({count})")(share, counts)
        columns = ["known: 0" if n == 0 else f"look-up: {n}" for n in needs]
        picture = _map(ax, share, texts, columns, rows, vmin=0, vmax=1, origin="lower")
        fig.colorbar(picture, ax=ax, label="share of the column")
    for x, n in enumerate(needs):
        ax.add_patch(Rectangle((x - 0.48, n - 0.46), 0.96, 0.92, fill=False, edgecolor=ORANGE, linewidth=3))
    judged = {"just right": made == needed, "too many": made > needed, "too few": made < needed}
    told = ", ".join(f"{name} {rollouts.mean():.0%}" for name, rollouts in judged.items() if pairs)
    left_out = len(trajectories) - len(pairs)
    unknown = f"Rollouts left out: {left_out}; nobody knows how many searches their questions need. " * bool(left_out)
    words = f"Grid of {len(pairs)} rollouts; framed cells are where both agree. {unknown}{told}."
    return _finished(fig, title or f"Searches made against searches needed: {told or 'unknown'}", words, note=unknown)


# ---- designing rewards -----------------------------------------------------------------------------------


@_styled
def reward_histograms(columns: Mapping[str, Numbers], known: Numbers) -> Figure:
    """How each reward is spread over rollouts, known and look-up questions apart: share of the rollouts by value.

    Args:
        columns: name of a reward -> its value for every rollout.
        known: for every rollout, whether its question is known.

    Raises:
        ValueError: no reward, or a column as long as ``known`` is not.
    """
    known = np.asarray(known, bool)
    if not columns or any(len(values) != len(known) for values in columns.values()):
        raise ValueError("reward_histograms needs at least one reward, and a value of each for every rollout")
    fig, axes = _axes(len(columns), 0.8, row=1.7)
    parts = {"known": known, "look-up": ~known}
    told = []
    for ax, (name, column) in zip(axes, columns.items()):
        values = np.asarray(column, float)
        high = max(1.0 if values.max() > 0 or not values.any() else 0.0, values.max())
        edges = np.linspace(min(0.0, values.min()), high, 12)
        shares = [np.full(part.sum(), 1 / max(1, part.sum())) for part in parts.values()]
        look = {"color": (BLUE, RED), "hatch": ("", "//"), "rwidth": 0.84, "label": list(parts)}
        ax.hist([values[part] for part in parts.values()], edges, weights=shares, **look)
        told += [f"{name}, {label}: mean {values[part].mean():.2f}" for label, part in parts.items() if part.any()]
        ax.set(title=name, ylim=(0, 1.05))
        ax.grid(False, axis="x")
    fig.supylabel("share of the rollouts")
    return _finished(fig, "How each reward is spread over the rollouts", f"Histograms. {'; '.join(told)}.", below=2)


@_styled
def correlations(matrix: Mapping[str, Mapping[str, float]], *, title: str = "Which rewards say the same") -> Figure:
    """A square of correlation coefficients, ``matrix[row][column]``; NaN (a constant column) is shown as "–"."""
    names = list(matrix)
    values = np.array([[matrix[a][b] for b in names] for a in names], float)
    fig, (ax,) = _axes(1, 1.6 + 0.36 * len(names))
    texts = np.vectorize(lambda value: "–" if math.isnan(value) else f"{value:.2f}")(values)
    fig.colorbar(_map(ax, values, texts, names, names, vmin=-1, vmax=1), ax=ax, label="correlation")
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    told = "; ".join(f"{name} {value:.2f}" for name, value in zip(names[1:], values[0, 1:]) if not math.isnan(value))
    size = f"{len(names)} by {len(names)}"
    words = f"A square of {size} correlation coefficients. {names[0]} with the others: {told or 'none'}."
    return _finished(fig, title, words)


@_styled
def lines(x: Numbers, panels: Mapping[str, Mapping[str, Numbers]], *, xlabel: str, title: str) -> Figure:
    """Values over a parameter that is swept, one panel a key of ``panels``: label -> one value for each of ``x``."""
    fig, axes = _axes(len(panels), 3.4)
    told = []
    for ax, (name, drawn) in zip(axes, panels.items()):
        for (label, values), look in zip(drawn.items(), _looks(drawn)):
            ax.plot(x, values, **look, label=label, markevery=max(1, len(x) // 10))
            told.append(f"{name}, {label}: from {values[0]:.2f} at {x[0]:g} to {values[-1]:.2f} at {x[-1]:g}")
        ax.set(title=name, xlabel=xlabel)
    alike = len(panels) > 1 and len({tuple(drawn) for drawn in panels.values()}) == 1
    return _finished(fig, title, f"Lines over {xlabel}. {'; '.join(told)}.", below=len(drawn) if alike else 0)


# ---- comparing runs and methods --------------------------------------------------------------------------


@_styled
def trade_off(points: Rows, *, x: str, y: str, title: str | None = None) -> Figure:
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
    fig, (ax,) = _axes(1, 4.2)
    places = [(float(p["x"]), float(p["y"])) for p in points]
    front: list[tuple[float, float]] = []
    for at, height in sorted(places, key=lambda place: (place[0], -place[1])):
        if not front or height > front[-1][1]:
            front.append((at, height))
    ax.plot(*zip(*front), ":", color="#8c8c8c", linewidth=1.5, drawstyle="steps-post", zorder=1)
    with_runs = any("runs" in p for p in points)
    looks = itertools.cycle(zip("os^vDPX", (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BLACK)))
    for point, (marker, color) in zip(points, looks):
        look = dict(fmt=marker, color=color, markersize=9, elinewidth=1.2, label=point["label"] if with_runs else None)
        _intervals(ax, [point["x"]], [point], ("y", "y_low", "y_high"), **look)
        ax.plot(*np.reshape(point.get("runs", []), (-1, 2)).T, marker, color=color, markersize=4, alpha=0.5, zorder=1)
    if with_runs:
        fig.legend(loc="outside right center", frameon=False, title="small: single runs")
    else:
        ax.margins(0.16)
        _spread_labels(ax, [str(p["label"]) for p in points], places)
    ax.set(xlabel=x, ylabel=y)
    said = "; ".join(f"{p['label']}: {p['x']:.2f}, {p['y']:.2f}" for p in points)
    return _finished(fig, title or f"{y} against {x}", f"Points of {x} and {y}. {said}.")


def _spread_labels(ax, labels: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write a label beside each point, each at the first of several places where it meets no other label or point."""
    ax.figure.draw_without_rendering()
    marks = ax.transData.transform(points)
    sides = {9: "left", -9: "right", 0: "center"}
    offsets = list(zip((9, -9, 9, -9, 0, 0, 9, -9, 9, -9), (5, 5, -13, -13, 12, -20, 20, 20, -28, -28)))
    taken: list[Any] = []
    for label, point in zip(labels, points):
        for offset in offsets:
            text = ax.annotate(label, point, offset, textcoords="offset points", ha=sides[offset[0]], fontsize=9)
            box = text.get_window_extent()
            met = any(map(box.overlaps, taken)) or any(box.contains(*mark) for mark in marks)
            if offset == offsets[-1] or (not met and ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1):
                break
            text.remove()
        taken.append(box)


@_styled
def regrets(cells: Rows, simple: Mapping[float, Mapping[str, float]]) -> Figure:
    """Choice regret of methods over the price of a search, with intervals; simple policies dotted.

    Args:
        cells: of ``Comparison.table``: "method", "price", "mean", "low", "high".
        simple: price -> name of a simple policy -> its regret.
    """
    fig, (ax,) = _axes(1, 4.2)
    prices = sorted(simple)
    for name in simple[prices[0]]:
        values = [simple[price][name] for price in prices]
        ax.plot(prices, values, ":", marker="_", markersize=18, color=GREY)
        ax.annotate(name, (prices[-1], values[-1]), (12, 3), textcoords="offset points", color=GREY, fontsize=9)
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    for i, (name, look) in enumerate(zip(methods, itertools.cycle((KNOWN, LOOKUP, *_OTHERS)))):
        mine = sorted((cell for cell in cells if cell["method"] == name), key=lambda cell: cell["price"])
        at = [cell["price"] + 0.004 * (i - (len(methods) - 1) / 2) for cell in mine]  # side by side
        _intervals(ax, at, mine, ("mean", "low", "high"), **look, capsize=3, label=name)
    ax.set(xlabel="price of a search", ylabel="choice regret", xticks=prices, ylim=(0, None))
    ax.set_xlim(prices[0] - 0.05, prices[-1] + 0.05 + 0.25 * (prices[-1] - prices[0]))
    ahead = {c["price"] for c in cells if c["mean"] < min(simple[c["price"]].values())}
    title = f"At {len(ahead)} of {len(prices)} prices a method regrets less than every simple policy"
    told = [f"{c['method']} at {c['price']:g}: {c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" for c in cells]
    told += [f"{name} at {price:g}: {value:.3f}" for price in prices for name, value in simple[price].items()]
    return _finished(fig, title, f"Points with 95 % intervals, and dotted simple policies. {'; '.join(told)}.")


@_styled
def by_setting(groups: Rows, panels: Mapping[str, Sequence[str]], name: str, *, title: str | None = None) -> Figure:
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
    settings = [group["setting"].get(name) for group in groups]
    joined = {} if all(isinstance(value, (int, float)) for value in settings) else {"linestyle": ""}
    fig, axes = _axes(len(panels), 3.7)
    told = []
    for ax, (heading, figures) in zip(axes, panels.items()):
        inside = []
        for number, (figure, look) in enumerate(zip(figures, _looks(figures))):
            at = [i for i, group in enumerate(groups) if group["figures"].get(figure)]
            rows = [groups[i]["figures"][figure] for i in at]
            shifted = np.array(at) + (number - (len(figures) - 1) / 2) * 0.06
            _intervals(ax, shifted, rows, ("mean", "low", "high"), **look | joined, label=figure)
            for x, row in zip(shifted, rows):
                ax.plot([x] * len(row["values"]), row["values"], ".", color=look["color"], alpha=0.6)
                inside += row["values"]
            told += [f"{figure} at {settings[i]}: {row['mean']:.2f}" for i, row in zip(at, rows)]
        ax.set_xticks(range(len(groups)), [f"{v:g}" if isinstance(v, float) else str(v) for v in settings])
        ax.set(title=heading, xlabel=name)
        if inside:  # wide intervals must not flatten the rest; above, room for the legend
            height = max(np.ptp(inside), 0.1)
            ax.set_ylim(min(inside) - 0.15 * height, max(inside) + (0.15 + 0.12 * len(figures)) * height)
    count = " to ".join(map(str, sorted({pick(group["runs"] for group in groups) for pick in (min, max)})))
    note = f"runs a setting: {count}, small dots; their mean, and its 95 % interval where the picture holds it"
    return _finished(fig, title or f"What {name} changes", f"Points over {name}. {'; '.join(told)}.", note=note)


@_styled
def grid(groups: Rows, figures: Sequence[str], across: str, upward: str, *, title: str | None = None) -> Figure:
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
    fig, axes = _axes(len(figures), 1.7 + 0.62 * len(ys))
    told = []
    for ax, figure in zip(axes, figures):
        values, texts = np.full((len(ys), len(xs)), np.nan), np.full((len(ys), len(xs)), "", object)
        for g in groups:
            if row := g["figures"].get(figure):
                x, y = g["setting"].get(across), g["setting"].get(upward)
                place, mean = (ys.index(y), xs.index(x)), row["mean"]
                spread = f"\n{min(row['values']):.2f}–{max(row['values']):.2f}" if g["runs"] > 1 else ""
                values[place], texts[place] = mean, f"{mean:.2f}{spread}"
                told.append(f"{figure} at {across} {x}, {upward} {y}: {mean:.2f}")
        _map(ax, values, texts, xs, ys, origin="lower")
        ax.set(title=figure, xlabel=across, ylabel=upward if ax is axes[0] else "")
    return _finished(fig, title or f"What {across} and {upward} change together", f"Maps. {'; '.join(told)}.")


# ---- explaining GRPO, retrieval and NF4 ------------------------------------------------------------------


@_styled
def clip_objective(epsilon: float = 0.2, epsilon_high: float | None = None, *, title: str | None = None) -> Figure:
    """The clipped objective min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of one token, for A = 1 and A = -1.

    PPO, arXiv 1707.06347, equation 7; ``epsilon_high`` as in DAPO, arXiv 2503.14476, equation 10.
    """
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    r = np.linspace(max(0.0, 3 * low - 2), 3 * high - 2, 400)
    fig, axes = _axes(2, 3.4)
    for ax, a, word, flat in zip(axes, (1, -1), ("more", "less"), ((high, r[-1]), (r[0], low))):
        ax.axvspan(*flat, color=ORANGE, alpha=0.2, label="no gradient")
        ax.plot(r, r * a, "--", color=GREY, linewidth=1.5, label="ratio × A, not clipped")
        ax.plot(r, np.minimum(r * a, np.clip(r, low, high) * a), color=BLUE, linewidth=2.5, label="clipped objective")
        ax.plot([1], [a], "o", color=BLACK, label="first update: ratio 1")
        ax.set(title=f"A = {a:+d}: {word} of what was done", xlabel="ratio new / old probability", xlim=(r[0], r[-1]))
    axes[0].set_ylabel("objective of one token")
    told = f"Two lines of the objective over the ratio: for A = +1 flat above {high:g}, for A = -1 flat below {low:g}."
    default = "Clipping takes the gradient away where a token has already moved far enough"
    return _finished(fig, title or default, told)


@_styled
def advantages_of_group(rewards: Numbers, advantages: Numbers) -> Figure:
    """Rewards of one group with their mean, and the advantages made of them."""
    rewards, advantages = _array(rewards), _array(advantages)
    if rewards.shape != advantages.shape or rewards.ndim != 1:
        raise ValueError(
            f"a group has an advantage for each reward: equal length, not {rewards.shape}, {advantages.shape}"
        )
    fig, axes = _axes(2, 3.2)
    x = np.arange(1, len(rewards) + 1)
    mean = rewards.mean()
    panels = (
        ("Reward", rewards, mean, f"mean {mean:.2f}", "above the mean", "below the mean"),
        ("Advantage", advantages, 0, None, "made more likely", "made less likely"),
    )
    for ax, (name, values, middle, label, more, less) in zip(axes, panels):
        up, down = values > middle + 1e-9, values < middle - 1e-9
        looks = ((up, BLUE, "", more), (down, ORANGE, "//", less), (~up & ~down, "#999999", "", None))
        for part, color, hatch, said in looks:
            if part.any():
                bars = ax.bar(x[part], values[part], color=color, hatch=hatch, label=said)
                ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
        ax.axhline(middle, color=BLACK, linestyle=":" if label else "-", linewidth=1.25, label=label)
        ax.margins(y=0.2)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(title=name, xlabel="rollout of the group")
        ax.grid(False, axis="x")
        low, high = ax.get_ylim() if values.any() else (-1, 1)
        ax.set_ylim(low, high + 0.4 * (high - low))
    pairs = ", ".join(f"{r:.2f} becomes {a:.2f}" for r, a in zip(rewards, advantages))
    title = "An advantage says how a rollout compares with its own group"
    return _finished(fig, title, f"Bars: {pairs}.", loc="upper left", ncols=3, fontsize=8.5, columnspacing=1)


@_styled
def retrieval_comparison(rows: Rows) -> Figure:
    """Search engines side by side: quality as bars, and quality against time where it was measured.

    Args:
        rows: one dict an engine: "engine" (its name), one or more "recall@K", optionally "mrr" and
            "ms_per_query" (milliseconds).
    """
    qualities = [k for k in (rows[0] if rows else ()) if k.startswith("recall@") or k == "mrr"]
    if not qualities or any("engine" not in row for row in rows):
        raise ValueError('each row needs "engine" and a "recall@K", as in {"engine": "BM25", "recall@3": 0.9}')
    columns = {name: np.array([row.get(name) for row in rows], float) for name in (*qualities, "ms_per_query")}
    times = columns.pop("ms_per_query")
    timed = not np.isnan(times).all()
    fig, (ax, *clock) = _axes(1 + timed, 1.7 + 0.26 * len(rows) * len(qualities), sharey=True)
    looks = zip((SKY, BLUE, ORANGE, GREEN, PURPLE, YELLOW), ("", "//", "..", "\\\\", "xx", "--"))
    _bars(ax, columns, looks, flat=True)
    ax.set_yticks(range(len(rows)), [str(row["engine"]) for row in rows])
    ax.set(title="Quality", xlim=(0, 1.12))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    if timed:
        clock[0].plot(times, range(len(rows)), "D", color=BLACK, markersize=8)
        clock[0].set(title="Milliseconds per query (log scale)", xscale="log")
        clock[0].margins(x=0.25)
        for y, ms in enumerate(times):
            clock[0].annotate(f"{ms:.3g}", (ms, y), (9, 0), textcoords="offset points", va="center", fontsize=9)
    say = lambda row: ", ".join(f"{k} {row[k]:.3g}" for k in (*qualities, "ms_per_query") if _finite(row.get(k)))
    told = "; ".join(f"{row['engine']}: {say(row)}" for row in rows).replace("_", " ")
    return _finished(fig, "How well and how fast the engines find the gold passage", f"Bars: {told}.", below=6)


@_styled
def nf4_quantisation(weights, dequantised) -> Figure:
    """What NF4 does to a weight matrix: a corner before and after, one block's staircase, the errors.

    A block is 64 consecutive weights that share one scale (QLoRA, arXiv 2305.14314, section 3).

    Args:
        weights, dequantised: the same matrix before quantisation and after the way there and back (numpy or
            torch, two-dimensional, equal shapes).

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    w, q = _array(weights), _array(dequantised)
    if w.shape != q.shape or w.ndim != 2:
        raise ValueError(f"need two matrices of one shape, not {w.shape} and {q.shape}")
    fig, (before, after, stairs, errors) = _axes(4, 6.6, across=2)
    side = min(32, *w.shape)
    limit = np.abs(w[:side, :side]).max()
    for ax, matrix, name in ((before, w, "before: 16 or 32 bits a weight"), (after, q, "after: 4 bits a weight")):
        picture = ax.imshow(matrix[:side, :side], cmap="cividis", vmin=-limit, vmax=limit, aspect="auto")
        ax.set(title=f"{side} × {side} corner, {name}")
        ax.grid(False)
    fig.colorbar(picture, ax=[before, after], label="weight")
    order = np.argsort(w.ravel()[:64])
    one, its = w.ravel()[order], q.ravel()[order]
    levels = len(np.unique(its))
    stairs.plot(one, "o", color=ORANGE, markersize=4, label="weight")
    stairs.step(range(len(one)), its, where="mid", color=BLUE, label=f"NF4, {levels} of 16 levels used")
    stairs.set(title=f"One block of {len(one)} weights, sorted", xlabel="rank in the block")
    error = (q - w).ravel()
    relative = np.sqrt((error**2).mean() / (w**2).mean())
    edges = np.linspace(*np.quantile(w, (0.001, 0.999)), 60)
    errors.hist(w.ravel(), edges, color=ORANGE, alpha=0.6, label="weights")
    errors.hist(error, edges, histtype="step", color=BLUE, label="errors")
    errors.set(title=f"Error: {relative:.1%} of the weights' size (root mean square)", xlabel="value", ylabel="count")
    errors.xaxis.set_major_locator(MaxNLocator(nbins=5))
    told = f"A corner before and after; a block of {len(one)} weights becomes a staircase of {levels} levels."
    return _finished(fig, f"NF4 keeps 16 levels a block and moves the weights by {relative:.1%}", told)


@_styled
def targets(figures: Mapping[str, float], ranges: Mapping[str, tuple[float, float]], *, title: str) -> Figure:
    """Measured values as points on the range that each should lie in; values and ranges lie in [0, 1]."""
    fig, (ax,) = _axes(1, 0.9 + 0.38 * len(figures))
    told = []
    for row, (name, value) in enumerate(figures.items()):
        low, high = ranges[name]
        inside = low <= value <= high
        ax.barh(row, high - low, left=low, height=0.55, color="#DDDDDD")
        ax.plot(value, row, marker="o" if inside else "X", color=BLUE if inside else ORANGE, markersize=9)
        ax.annotate(f"{value:.2f}", (value, row), (0, 8), textcoords="offset points", ha="center", fontsize=8.5)
        told.append(f"{name} {value:.2f} (range {low:.2f} to {high:.2f})")
    ax.set_yticks(range(len(figures)), list(figures))
    ax.set(ylim=(len(figures) - 0.4, -0.8), xlim=(-0.03, 1.05))
    ax.set_xlabel("grey: where it should lie; circle: inside, cross: outside")
    return _finished(fig, title, "; ".join(told) + ".")


@_styled
def credit(readings: Sequence, said: Rows, *, title: str | None = None) -> Figure:
    """Who is right: for each method the mean credit of turns of like truth, the truest method first.

    Credit has each method's own unit and is divided by its standard deviation, so panels compare: a true method rises
    as the dotted line does, a noisy one has a wide band, and in the shaded corners the worse is praised and the better
    blamed.

    Args:
        readings: ``microscope.Reading`` s.
        said: ``microscope.verdicts`` of them.
        title: the takeaway; by default it names the method that correlates best.

    Raises:
        ValueError: no method is judged.
    """
    if not said:
        raise ValueError("no method to draw: the readings are empty, or nobody gave credit")
    ranked = sorted(said, key=lambda row: (row["correlation"] is None, -(row["correlation"] or 0.0)))
    fig, axes = _axes(len(ranked), 0.7, row=2.3, sharex=True, sharey=True)
    told = []
    for ax, row in zip(axes, ranked):
        name = row["credit"]
        truth, given = np.array([(r.truth, r.credit[name]) for r in readings if name in r.credit], float).T
        at, low, mean, high = _of_like_truth(truth.round(6), given / (given.std() or 1.0))
        wide = 1.1 * np.abs(at).max() or 1.0
        corners = ([-wide, 0, 0, wide], [0, 0, -2.5, -2.5], [2.5, 2.5, 0, 0])
        ax.fill_between(*corners, color="#bbbbbb", alpha=0.4, linewidth=0, label="worse praised, better blamed")
        ax.fill_between(at, low, high, color=BLUE, alpha=0.25, linewidth=0, label="its middle half")
        ax.plot(at, mean, **KNOWN, markersize=5, label="mean credit")
        ax.plot(at, at / (truth.std() or 1.0), ":", color=BLACK, label="the truth")
        ax.axhline(0, color=BLACK, linewidth=1)
        ax.axvline(0, color=BLACK, linewidth=1)
        wrong = "" if row["wrong_sign"] is None else f"{row['wrong_sign']:.0%} wrong"
        ax.text(0.03, 0.04, wrong, transform=ax.transAxes, fontsize=9)
        ax.set(ylim=(-2.5, 2.5), title=f"{name}: {_number(row['correlation'])}")
        told.append(f"{name} {_number(row['correlation'])}{', ' * bool(wrong)}{wrong}")
    for ax in axes[-4:]:
        ax.set_xlabel("truth, in reward")
        ax.tick_params(labelbottom=True)
    best = ranked[0]
    default = f"{best['credit']} is truest: its rank correlation with the truth is {_number(best['correlation'])}"
    words = f"Credit over truth, a panel a method. Rank correlation, and share of the wrong sign: {'; '.join(told)}."
    return _finished(fig, title or default, words, below=4)


def _of_like_truth(truth: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Groups of at most seven: mean truth; lower quartile, mean and upper quartile of what was given, (4, groups)."""
    values = np.unique(truth)
    edges = values if len(values) <= 7 else np.unique(np.quantile(truth, np.linspace(0, 1, 8))[:-1])
    group = np.searchsorted(edges, truth, side="right")
    parts = [(truth[group == i].mean(), given[group == i]) for i in np.unique(group)]
    return np.array([(at, np.quantile(x, 0.25), x.mean(), np.quantile(x, 0.75)) for at, x in parts]).T


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
