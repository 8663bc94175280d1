"""Trajectories to look at: pure functions that draw HTML, and the widgets that choose among them.

``render_html`` is the drawing: turns as segments, documents with rank, score and gold mark, tokens
coloured by mask or by a value, the rollouts of one question side by side. It needs no script, no network
and no model. ``show`` puts it into a notebook; ``browse``, ``compare``, ``weigh``, ``prefer`` and ``ask`` are
ipywidgets around it.

Everything that a model or the web wrote is escaped, also against MathJax (``$…$`` in a page is set as a
formula by Jupyter) and against characters that turn the reading direction. Nothing is told by colour
alone: kinds carry their names, strengths an underline, and where a site strips styles (GitHub) the page is
still headings, tables and lists, with the environment's words in italics and what stands out underlined.
"""

from __future__ import annotations

import html
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets as widgets

from ..environment.limits import Positive, valid
from ..metrics import first_act, grouped, knowledge, no_variance, pairs, right
from ..records import Question, Segment, ToolCall, Trajectory
from ..rewards import Choice, record_choice

if TYPE_CHECKING:
    from .microscope import Reading

#: Questions longer than this are cut where they only name a row of a list.
_ROW = 90
#: Characters: a name, an answer or a title is cut here, and a text that is read at the second one.
_NAME, _TEXT = 2_000, 200_000
#: Observations up to this many characters are shown unfolded, except where rollouts are compared.
_SHORT = 700
_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8").strip()
#: The kinds that have a style of their own; another tool looks like text.
_KINDS = ("think", "search", "information", "answer", "invalid", "text")


# ---- colours ---------------------------------------------------------------------------------------------


#: What a legend says of a value; of any other, its name.
_MEANINGS = {
    "logprob": "probability of the sampled token, below",
    "advantage": "push of the update on the token, advantage × (1 − p), from",
}


class _Scale(NamedTuple):
    """How a value becomes one of five strengths: ``bounds[i]`` is the least magnitude of strength i + 1.

    ``digits`` are the decimals on hover: few, to keep the page small.
    """

    color: str
    bounds: tuple[float, ...] = ()
    signed: bool = False
    digits: int = 2

    def look(self, mask: int, value: float | None) -> tuple[str, str]:
        """Class ("env" for the environment's tokens, "" below the first bound) and hover text."""
        if not mask:
            return "env", ""
        if value is None or not math.isfinite(value):
            return "m" * (self.color == "mask"), ""
        strength = sum(abs(value) >= b for b in self.bounds)
        hue = ("n" if value < 0 else "p") if self.signed else "u"
        shown = f"{round(value, self.digits) + 0.0:{'+' * self.signed}.{self.digits}f}"  # + 0.0: no "-0"
        return f"{hue}{strength}" * (strength > 0), f"{math.exp(-value):.2g}" if self.color == "logprob" else shown

    def legend(self) -> str:
        if self.color == "mask":
            return "Colour: <span class=m>by the model, trained</span> <i>by the environment, masked</i>"
        bounds = [math.exp(-b) for b in self.bounds] if self.color == "logprob" else self.bounds
        signs = {"n": "−", "p": "+"} if self.signed else {"u": ""}
        steps = [(f"{hue}{i}", f"{sign}{b:.2g}") for hue, sign in signs.items() for i, b in enumerate(bounds, 1)]
        if self.signed:
            steps[:5] = steps[4::-1]
        shown = " ".join(f"<ins class={css}>&nbsp;{text}&nbsp;</ins>" for css, text in steps)
        what = _MEANINGS.get(self.color, f"{_e(self.color)}, from")
        return f"Colour: {what} {shown} · point at a token for its value, at unmarked ones for theirs in order"


def _scale(trajectories: Sequence[Trajectory], color: str) -> _Scale:
    if color == "mask":
        return _Scale("mask")
    values = [v for t in trajectories for v in _values(t, color) if v is not None and math.isfinite(v)]
    if trajectories and not values:
        choice = ", ".join(colors(trajectories))
        raise ValueError(f"color={color!r}: no trajectory has such a value; choose one of {choice}")
    if color == "logprob":
        return _Scale(color, tuple(-math.log(p) for p in (0.9, 0.5, 0.2, 0.05, 0.01)))
    return _up_to_the_largest(color, values)


def _up_to_the_largest(color: str, values: Sequence[float]) -> _Scale:
    top = max(map(abs, values), default=0.0) or 1.0
    digits = min(max(2 - math.floor(math.log10(top)), 0), 9)
    bounds = tuple(top * share for share in (0.05, 0.2, 0.4, 0.6, 0.8))
    return _Scale(color, bounds, min(values, default=0.0) < 0, digits)


def colors(trajectories: Iterable[Trajectory]) -> list[str]:
    """What ``render_html`` can colour these trajectories by: "mask", "logprob", "advantage" and recorded values."""
    trajectories = list(trajectories)
    extra = sorted({name for t in trajectories for name in t.token_values})
    return ["mask", "logprob"] + ["advantage"] * any(t.advantages for t in trajectories) + extra


def _values(t: Trajectory, color: str) -> list[float | None]:
    """One value per token, None for tokens of the environment and where nothing was recorded."""
    values: Sequence[float | None] = t.token_values.get(color) or [None] * len(t.mask)
    if color == "logprob":
        values = [-p for p in t.logprobs]
    elif color == "advantage" and t.advantages:
        values = [a * -math.expm1(p) for a, p in zip(t.advantages, t.logprobs)]
    return [v if m else None for v, m in zip(values, t.mask)]


# ---- HTML ------------------------------------------------------------------------------------------------


def render_html(trajectories: Iterable[Trajectory], *, color: str = "mask", title: str = "") -> str:
    """Draw trajectories as one self-contained piece of HTML (no script, nothing loaded).

    Rollouts of one question (same ``step`` and ``group``) stand side by side under a table of their
    rewards; a group whose rewards are all equal carries a badge, because its advantages are zero. A long
    observation that several of them read is written out once and referred to after that.

    Args:
        color: what colours the model's tokens: "mask" (who wrote it), "logprob" (probability under the
            sampling distribution), "advantage" (A · (1 − p): how strongly one policy-gradient step pushes
            the token's own logit), or a name in ``token_values`` such as "entropy" or "kl" (nats).
        title: a heading; any text.

    Raises:
        ValueError: no trajectory has values for ``color``; names those it has.
    """
    trajectories = list(trajectories)
    scale = _scale(trajectories, color)
    head = f"<p class=legend>{scale.legend()}</p>" if trajectories else "<p>No trajectories.</p>"
    return _page(head + "".join(_group_html(members, scale) for members in groups(trajectories)), title)


def groups(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    """Trajectories by question and step, in the order of first appearance."""
    return list(grouped(trajectories, lambda t: (t.step, t.group or t.question.id, t.question.id)).values())


def _group_html(group: Sequence[Trajectory], scale: _Scale, labels: Sequence[str] = ()) -> str:
    question, first, compared = group[0].question, group[0], bool(labels)
    labels = labels or [f"#{i}" for i in range(1, len(group) + 1)]
    same_prompt = all(t.prompt_ids == first.prompt_ids for t in group)
    columns = (
        _rollout_html(t, label, scale, again, prompt=not same_prompt, fold=compared)
        for t, label, again in zip(group, labels, _repeats(group, labels))
    )
    badge = ""
    if not compared and no_variance([t.reward for t in group]):
        badge = f" <strong class=badge>no variance: every reward is {first.reward:.4g}, advantages are 0</strong>"
    return (
        f"<section class=group><h4>{_e(question.text)}</h4><p>{_facts(group)}{badge}</p>"
        + _reward_table(group, labels)
        + (_prompt_html(first) if same_prompt else "")
        + f"<div class=side>{''.join(columns)}</div></section>"
    )


def _facts(group: Sequence[Trajectory]) -> str:
    q = group[0].question
    hops = f"{_e(q.hops)} hop{'s' * (q.hops != 1)}"
    gold = f"gold answer: <b>{_e(' / '.join(map(str, q.answers)))}</b> · {hops}"
    facts = [gold if q.answers else "no gold answer is known", knowledge(q) if q.known is not None else ""]
    facts += [
        _e(q.source),
        f"step {_e(group[0].step)}" if group[0].step is not None else "",
        f"<code>{_e(q.id)}</code>",
    ]
    return " · ".join(filter(None, facts))


def _reward_table(group: Sequence[Trajectory], labels: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for t in group for name in t.rewards))
    head = ["", "reward", *map(_e, names), "advantage", "answer", "searches", "turns", "tokens", "finish"]
    rows = []
    for t, label in zip(group, labels):
        numbers = [t.reward, *(t.rewards.get(name) for name in names)]
        cells = [f"<b>{_e(label)}</b>", *map(_number, numbers), _number(t.advantage, "+"), _answer_html(t)]
        finish = _e(t.finish_reason) + (f", {_e(t.invalid_turns)} invalid" if t.invalid_turns else "")
        rows.append([*cells, len(t.searches), _e(t.turns), sum(t.mask), finish])
    return _table(head, rows)


def _table(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Cells are HTML."""
    tagged = [("th", head), *(("td", row) for row in rows)]
    body = ("".join(f"<{tag}>{cell}</{tag}>" for cell in row) for tag, row in tagged)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _details(summary: str, body: str, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{summary}</summary>{body}</details>"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value + 0.0:{sign}.3g}"  # + 0.0: no "-0"


def _answer_html(t: Trajectory) -> str:
    if t.answer is None:
        return "<span class=bad>✗ no answer</span>"
    if not t.question.answers:
        return _e(t.answer)  # nothing to compare it with
    return f"<span class={'good>✓' if right(t) else 'bad>✗'} {_e(t.answer)}</span>"


def _repeats(group: Sequence[Trajectory], labels: Sequence[str]) -> list[dict[tuple[int, int], str]]:
    """For each rollout its long observations that stand further up already: (start, end) of the tokens -> where."""
    first: dict[tuple, str] = {}
    repeats: list[dict[tuple[int, int], str]] = []
    for t, label in zip(group, labels):
        repeats.append({})
        for s in t.segments:
            if s.kind == "information" and len(s.text) > _SHORT:
                read, here = (s.text, *t.completion_ids[s.start : s.end]), f"{_e(label)}, turn {_e(s.turn + 1)}"
                if (where := first.setdefault(read, here)) != here:
                    repeats[-1][s.start, s.end] = where
    return repeats


def _rollout_html(
    t: Trajectory, label: str, scale: _Scale, again: dict[tuple[int, int], str], *, prompt: bool, fold: bool
) -> str:
    head = f"<h5>{_e(label)} · reward {_number(t.reward)} · {_answer_html(t)}</h5>"
    calls, body, turn = iter(t.calls), [], None
    *texts, rest = _pieces(t, scale)
    for segment, pieces in zip(t.segments, texts):
        if segment.turn != turn:
            turn = segment.turn
            earned = [f" · reward {_number(r)}" for r in t.turn_rewards[turn : turn + 1] if any(t.turn_rewards)]
            body.append(f"<div class=turn>turn {turn + 1}{''.join(earned)}</div>")
        if segment.kind == "information":
            pieces = _read_html(segment, pieces, again, fold)
            if call := next(calls, None):
                pieces = _call_html(call, t.question.passages) + _colleague_html(call.inner, scale) + pieces
        else:
            pieces = f"<div class=said>{pieces}</div>"
        body.append(_segment_html(segment, pieces))
    body += [f'<div class="seg text"><b class=kind>end</b><div class=said>{rest}</div></div>'] if rest else []
    return f"<article>{head}{''.join(body)}{_prompt_html(t) if prompt else ''}{_ids_html(t, again)}</article>"


def _colleague_html(t: Trajectory | None, scale: _Scale) -> str:
    """The rollout of the agent that was asked, folded."""
    if t is None:
        return ""
    body = _rollout_html(t, t.question.text, scale, {}, prompt=False, fold=True)
    return _details(f"the agent that was asked: {len(t.searches)} searches, {sum(t.mask)} tokens", body)


def _ids_html(t: Trajectory, again: dict[tuple[int, int], str]) -> str:
    """The completion's ids, a line for each run of one mask."""
    lines, end = [], 0
    for mask, run in groupby(t.mask):
        start, end = end, end + len(list(run))
        ids = f"those of {again[start, end]}" if (start, end) in again else _ids(t.completion_ids[start:end])
        lines.append(f"{start}–{end - 1}, mask {_e(mask)}: {ids}")
    return _details("exact ids and mask", f"<p class=ids>{'<br>'.join(lines)}</p>")


def _prompt_html(t: Trajectory) -> str:
    body = f"<p class=said>{_lines(t.prompt)}</p><p class=ids>prompt_ids: {_ids(t.prompt_ids)}</p>"
    return _details(f"prompt, {len(t.prompt_ids)} tokens", body)


def _ids(ids: Sequence[int]) -> str:
    return _e(" ".join(map(str, ids)), sys.maxsize)


def _segment_html(segment: Segment, inside: str) -> str:
    note = "outside any tag" if segment.kind == "text" else "by the environment, not trained" * (not segment.by_model)
    head = f"<b class=kind>{_e(segment.kind)}</b>{f' <small>{note}</small>' * bool(note)}" * bool(segment.text.strip())
    kind = segment.kind if segment.kind in _KINDS else "text"
    return f'<div class="seg {kind}">{head}{inside}</div>'


def _read_html(segment: Segment, pieces: str, again: dict[tuple[int, int], str], fold: bool) -> str:
    """The text of an observation, folded where it is long, or where else it stands."""
    size = f"{segment.end - segment.start} tokens"
    if where := again.get((segment.start, segment.end)):
        return f"<p><small>what the model read, {size}: word for word that of {where}</small></p>"
    folded = fold or len(segment.text) > _SHORT
    return _details(f"what the model read{f', {size}' * folded}", f"<div class=said>{pieces}</div>", not folded)


def _call_html(call: ToolCall, gold: Sequence[str]) -> str:
    """What a call of a tool gave back: its documents, with a star at gold ones."""
    took = f"<small>{call.seconds * 1000:,.1f} ms</small>"
    if call.error is not None:
        return f"<p><strong class=bad>✗ {_e(call.tool)} failed: {_e(call.error)}</strong> {took}</p>"
    if not call.result:
        return f"<p><strong>nothing found</strong> {took}</p>"
    rows = []
    for hit in call.result:
        mark = " <mark>★ gold</mark>" if hit.passage.id in gold else ""
        rows.append(f"<li>{_e(hit.passage.title)} <small>score {hit.score:.4g}</small>{mark}</li>")
    return f"<ol>{''.join(rows)}</ol>{took}"


def _pieces(t: Trajectory, scale: _Scale) -> list[str]:
    """The HTML of each segment's text, and last that of the tokens after them (an end-of-message token)."""
    spans = list(zip([0, *t.ends], t.ends))
    looks = [scale.look(mask, value) for mask, value in zip(t.mask, _values(t, scale.color))]
    out, start = [], 0
    for segment in t.segments:
        runs = [
            (look, segment.text[max(a - start, 0) : max(b - start, 0)])
            for look, (a, b) in zip(looks[segment.start : segment.end], spans[segment.start : segment.end])
        ]
        if "".join(text for _, text in runs) != segment.text:
            runs = [(("m" if segment.by_model else "env", ""), segment.text)]
        out.append(_merged(runs))
        start += len(segment.text)
    done = t.segments[-1].end if t.segments else 0
    return out + [_merged(list(zip(looks[done:], t.tokens[done:])))]


def _merged(runs: Iterable[tuple[tuple[str, str], str]]) -> str:
    """Texts with their ``(class, title)``: neighbours of one look in one element, those without class in any case."""
    out = []
    for look, run in groupby(runs, lambda r: r[0] if r[0][0] else None):
        looks, texts = zip(*run)
        css, title = look or ("", _listed(title for _, title in looks))
        out.append(_span(css, title, "".join(texts)))
    return "".join(out)


def _listed(values: Iterable[str]) -> str:
    """Values in order, a repeated one as "value×times"."""
    counted = [(value, len(list(run))) for value, run in groupby(values) if value]
    return " ".join(f"{value}×{n}" if n > 1 else value for value, n in counted)


def _span(css: str, title: str, text: str) -> str:
    """Text in one look, in as few characters as can be; ``title`` holds numbers only, so it needs no escaping."""
    if css == "env":
        return f"<i>{_lines(text)}</i>"
    title = f' title="{title}"' if " " in title else f" title={title}" * bool(title)
    if not css and not title:
        return _lines(text)
    tag = "ins" if css and title else "span"
    return f"<{tag}{f' class={css}' * bool(css)}{title}>{_lines(text)}</{tag}>"


# ---- text, and the notebook -------------------------------------------------------------------------------


def render_text(trajectories: Iterable[Trajectory]) -> str:
    """The same in plain text, for terminals and logs."""
    out = []
    for group in groups(trajectories):
        q = group[0].question
        out.append(f"{q.text}  [gold: {' / '.join(q.answers)}; {q.hops} hop(s), {knowledge(q)}]")
        if no_variance([t.reward for t in group]):
            out.append("  no variance in the rewards: advantages are 0")
        for i, t in enumerate(group, 1):
            said = "no answer" if t.answer is None else f"{answered(t)}: {t.answer}"
            out.append(f"  #{i} reward {_number(t.reward)}, {len(t.searches)} search(es), {t.finish_reason}, {said}")
            out += [f"     {s.kind:>11} | {' '.join(s.text[:_TEXT].split())}" for s in t.segments if s.text.strip()]
    return _seen("\n".join(out), sys.maxsize)


class Drawing:
    """HTML where a notebook can show it, plain text elsewhere."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def show(trajectories: Iterable[Trajectory], *, color: str = "mask", title: str = "") -> Drawing:
    """``render_html`` for the last line of a cell; in a terminal it prints ``render_text``."""
    trajectories = list(trajectories)
    return Drawing(render_html(trajectories, color=color, title=title), render_text(trajectories))


# ---- credit, turn by turn ---------------------------------------------------------------------------------


def render_credit(
    trajectories: Sequence[Trajectory],
    readings: Sequence[Reading],
    *,
    only: Iterable[int] | None = None,
    title: str = "",
) -> str:
    """What each turn was worth, beside what every method gave it: a table a rollout, the truth on top.

    A row is coloured up to the largest of its own numbers in all readings, since methods have units of their own: what
    compares between rows is the sign and the strength, not the number.

    Args:
        trajectories: those that the readings are of (``microscope.by_optimum`` or ``by_continuing``).
        only: the numbers of the rollouts to draw, from 0; None: all.
    """
    tables = _credit_tables(readings)
    chosen = range(len(trajectories)) if only is None else list(only)
    legend = (
        "Colour, by row: <ins class=p4>&nbsp;+ more of this&nbsp;</ins> <ins class=n4>&nbsp;− less of this&nbsp;</ins>"
    )
    sections = []
    for members in grouped(chosen, lambda i: (trajectories[i].group, trajectories[i].question.id)).values():
        group = [trajectories[i] for i in members]
        columns = (
            f"<article><h5>#{n} · reward {_number(t.reward)} · {_answer_html(t)}</h5>{tables.get(i, '')}</article>"
            for n, (i, t) in enumerate(zip(members, group), 1)
        )
        head = f"<h4>{_e(group[0].question.text)}</h4><p>{_facts(group)}</p>"
        sections.append(f"<section class=group>{head}<div class='side wide'>{''.join(columns)}</div></section>")
    return _page(f"<p class=legend>{legend}</p>{''.join(sections)}", title)


def _credit_tables(readings: Sequence[Reading]) -> dict[int, str]:
    """By rollout: a column for each turn, a row for the truth and one for each method."""
    names = ["truth", *dict.fromkeys(name for r in readings for name in r.credit)]

    def number(name: str, r: Reading) -> float | None:
        return r.truth if name == "truth" else r.credit.get(name)

    scales = {}
    for name in names:
        values = [value for r in readings if (value := number(name, r)) is not None]
        scales[name] = _up_to_the_largest(name, values)._replace(signed=True)

    def cell(name: str, r: Reading) -> str:
        if (value := number(name, r)) is None:
            return "–"
        css, shown = scales[name].look(1, value)
        shown += f" ± {r.error:.2g}" * (name == "truth" and r.error > 0)
        return f"<ins class={css}>&nbsp;{shown}&nbsp;</ins>" if css else shown

    tables = {}
    for rollout, turns in grouped(readings, lambda r: r.rollout).items():
        head = ["", *(f"turn {r.turn + 1}<br>{_e(r.act).replace(', ', '<br>')}" for r in turns)]
        rows = [[f"<b>{_e(name)}</b>", *(cell(name, r) for r in turns)] for name in names]
        tables[rollout] = _table(head, rows)
    return tables


def show_credit(trajectories: Sequence[Trajectory], readings: Sequence[Reading], **how) -> Drawing:
    """``render_credit`` for the last line of a cell; in a terminal it prints a line a turn."""
    lines = [
        f"#{r.rollout + 1} turn {r.turn + 1}, {r.act}: truth {r.truth:+.3f}; "
        + ", ".join(f"{name} {value:+.3f}" for name, value in r.credit.items())
        for r in readings
    ]
    return Drawing(render_credit(trajectories, readings, **how), _seen("\n".join(lines), sys.maxsize))


# ---- choosing --------------------------------------------------------------------------------------------

#: Orders of ``select``: name -> sort key.
SORTS = {
    "as logged": lambda t: 0,
    "highest reward": lambda t: -(t.reward if t.reward is not None else -math.inf),
    "lowest reward": lambda t: t.reward if t.reward is not None else math.inf,
    "largest advantage": lambda t: -abs(t.advantage or 0.0),
    "most searches": lambda t: -len(t.searches),
    "longest": lambda t: -sum(t.mask),
    "least likely": lambda t: sum(t.logprobs) / max(sum(t.mask), 1),
}


#: Conditions of ``select``, and what a trajectory says of each.
_FEATURES = {
    "knowledge": lambda t: knowledge(t.question),
    "hops": lambda t: t.question.hops,
    "answered": lambda t: answered(t),
    "searches": lambda t: len(t.searches),
    "finish": lambda t: t.finish_reason,
}


def select(trajectories: Iterable[Trajectory], reward=None, text="", sort="as logged", **features) -> list[Trajectory]:
    """The trajectories that meet every condition given; None and "" mean any.

    Args:
        reward: the least and the greatest, both included; leaves out trajectories without a reward.
        text: must stand in the question, the gold answers or the completion, whatever the case.
        sort: a name in ``SORTS``.
        features: ``knowledge`` ("known", "look-up" or "unknown"), ``hops``, ``answered`` ("right", "wrong": an answer,
            not a gold one; or "none"), ``searches`` (how many were executed), ``finish`` (a finish reason).
    """
    features = {name: value for name, value in features.items() if value is not None}
    chosen = [t for t in trajectories if all(_FEATURES[name](t) == value for name, value in features.items())]
    if reward is not None:
        chosen = [t for t in chosen if t.reward is not None and reward[0] - 1e-9 <= t.reward <= reward[1] + 1e-9]
    if text:
        texts = ("\n".join([t.question.text, *t.question.answers, t.text]).casefold() for t in chosen)
        chosen = [t for t, written in zip(chosen, texts) if text.casefold() in written]
    return sorted(chosen, key=SORTS[sort])


def answered(t: Trajectory) -> str:
    """ "right", "wrong", or "none" without an answer."""
    return "none" if t.answer is None else "right" if right(t) else "wrong"


def _row(t: Trajectory) -> str:
    mark = {"right": "✓", "wrong": "✗", "none": "–"}[answered(t)]
    step = f"step {t.step} · " if t.step is not None else ""
    return f"{mark} {_number(t.reward)} · {len(t.searches)} searches · {step}{t.question.text[:_ROW]}"


_WIDE = {"width": "auto"}
#: A list in a widget holds at most this many rows; the filters narrow down the rest.
LIST_LIMIT = 500
#: The value of a filter that lets all through. (A browser shows a choice whose value is None as blank.)
ANY = "any"


def browse(trajectories: Iterable[Trajectory]):
    """A widget to filter, search and sort trajectories and to look at one, alone or among its group.

    Where no widget can run (GitHub, nbviewer, papermill's output) the same cell shows the static HTML of the
    group on display. Controls are attributes of the returned box (``box.controls["hops"].value = 2``).
    """
    trajectories = list(trajectories)
    if not trajectories:
        raise ValueError("nothing to browse: the list of trajectories is empty")
    by_group = {id(t): group for group in groups(trajectories) for t in group}
    rewards = [t.reward for t in trajectories if t.reward is not None] or [0.0]
    low, high = min(rewards), max(rewards)
    controls = {}
    for name, feature in _FEATURES.items():
        values = [(_seen(value), value) for value in sorted({feature(t) for t in trajectories})]
        controls[name] = widgets.Dropdown(description=name, options=[(ANY, ANY), *values])
    span = controls["reward"] = widgets.FloatRangeSlider(
        description="reward", min=low, max=max(high, low + 1e-6), value=(low, high), step=(high - low) / 100 or 0.01
    )
    controls["text"] = widgets.Text(description="text", placeholder="question or completion")
    controls["sort"] = widgets.Dropdown(description="sort", options=list(SORTS))
    color = controls["color"] = widgets.Dropdown(description="colour", options=colors(trajectories))
    whole = controls["group"] = widgets.Checkbox(description="whole group", value=True)
    top = widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    rows = controls["rows"] = widgets.Select(rows=8, layout=_WIDE)
    count = widgets.Label()
    shown: list[Trajectory] = []

    def draw(changed) -> str:
        if changed not in (rows, color, whole):
            filters = {name: controls[name].value for name in _FEATURES if controls[name].value != ANY}
            narrowed = span.value[0] > low + 1e-9 or span.value[1] < high - 1e-9
            filters |= {"reward": span.value if narrowed else None, "sort": controls["sort"].value}
            shown[:] = select(trajectories, text=controls["text"].value, **filters)
            cut = f", the first {LIST_LIMIT} listed" if len(shown) > LIST_LIMIT else ""
            count.value = f"{len(shown)} of {len(trajectories)} trajectories{cut}"
            _fill(rows, map(_row, shown))
        chosen = [] if rows.value is None else [shown[rows.value]]
        if chosen and whole.value:
            chosen = by_group[id(chosen[0])]
        return render_html(chosen, color=_possible(color, chosen))

    return Box([top, count, rows], controls, draw, count)


def _fill(rows, labels: Iterable[str]) -> None:
    """Put labels into a list, of which the first is chosen then."""
    rows.options = [(_seen(label), i) for i, label in enumerate(islice(labels, LIST_LIMIT))]
    rows.index = 0 if rows.options else None


def _possible(color, trajectories: Sequence[Trajectory]) -> str:
    """The colour chosen, or that of the mask where these trajectories have no such values."""
    return color.value if color.value in colors(trajectories) else "mask"


class Box(widgets.VBox):
    """A widget: its parts, and below them the HTML that ``draw`` makes whenever a control is used.

    ``draw`` is given that control, at first None. The notebook's output also holds the HTML of ``drawing``, for readers
    without widgets.
    """

    if not hasattr(widgets.VBox, "_repr_mimebundle_"):  # ipywidgets 7, which Colab has: it displays itself
        _ipython_display_ = None

    def __init__(self, parts: Sequence, controls: Mapping[str, Any], draw: Callable, count=None):
        self.controls, self.drawing, self.count = controls, widgets.HTML(), count
        super().__init__([*parts, self.drawing])
        page = self.drawing

        def redraw(used=None):
            page.value = draw(used)

        for control in controls.values():
            if isinstance(control, widgets.Button):
                control.on_click(redraw)
            else:
                control.observe(lambda change: redraw(change["owner"]), "value")
        redraw()

    def _repr_mimebundle_(self, **kwargs):
        if hasattr(super(), "_repr_mimebundle_"):
            bundle = super()._repr_mimebundle_(**kwargs)
        else:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
            bundle = {"text/plain": repr(self)[:110], "application/vnd.jupyter.widget-view+json": view}
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/html": self.drawing.value}, metadata


# ---- two checkpoints on the same questions ---------------------------------------------------------------

OUTCOMES = ("fixed", "broken", "same, right", "same, wrong")


def paired_outcomes(before: Iterable[Trajectory], after: Iterable[Trajectory]) -> dict[str, list[tuple]]:
    """Pair two sets of trajectories by question: outcome -> [(before, after), …], each a list of trajectories.

    "fixed": wrong before, right after; "broken": the reverse. A question with several rollouts counts as
    right where at least half of them are.

    Raises:
        ValueError: the two sets share no question.
    """
    outcomes: dict[str, list[tuple]] = {name: [] for name in OUTCOMES}
    for pair in pairs(before, after):
        was, now = (2 * sum(map(right, side)) >= len(side) for side in pair)
        name = ("same, right" if now else "broken") if was else ("fixed" if now else "same, wrong")
        outcomes[name].append(pair)
    return outcomes


def render_comparison(before: Iterable[Trajectory], after: Iterable[Trajectory], *, title: str = "") -> str:
    """Self-contained HTML: the paired outcome matrix, and per outcome the questions with both answers."""
    outcomes = paired_outcomes(before, after)
    n = {name: len(questions) for name, questions in outcomes.items()}
    matrix = (
        "<table><tr><th></th><th>right after</th><th>wrong after</th></tr>"
        f"<tr><th>right before</th><td>{n['same, right']} same</td><td class=bad>{n['broken']} broken ✗</td></tr>"
        f"<tr><th>wrong before</th><td class=good>{n['fixed']} fixed ✓</td><td>{n['same, wrong']} same</td></tr>"
        "</table>"
    )
    lists = ""
    for name, questions in outcomes.items():
        table = _table(("question", "gold", "before", "after"), (_pair_row(*pair) for pair in questions))
        is_open = name in ("fixed", "broken") and len(questions) <= 20
        lists += _details(f"{name}: {len(questions)}", table if questions else "<p>none</p>", is_open)
    return _page(f"<p>{sum(n.values())} questions, the same before and after</p>{matrix}{lists}", title)


def render_side_by_side(
    before: Iterable[Trajectory], after: Iterable[Trajectory], *, color: str = "mask", title: str = ""
) -> str:
    """Self-contained HTML: for each question its rollouts before and after, next to each other.

    Raises:
        ValueError: the two sets share no question; no trajectory has values for ``color``.
    """
    questions = pairs(before, after)
    scale = _scale([t for pair in questions for side in pair for t in side], color)
    parts = [f"<p class=legend>{scale.legend()}</p>"]
    for first, second in questions:
        sides = (("before", first), ("after", second))
        labels = [f"{name} #{i}" for name, side in sides for i, _ in enumerate(side, 1)]
        parts.append(_group_html([*first, *second], scale, labels))
    return _page("".join(parts), title)


def _pair_row(before: Sequence[Trajectory], after: Sequence[Trajectory]) -> tuple[str, ...]:
    q = before[0].question
    return _e(q.text), _e(q.answers[0]) if q.answers else "–", _side(before), _side(after)


def _side(side: Sequence[Trajectory]) -> str:
    if len(side) > 1:
        return f"{sum(map(right, side))} of {len(side)} right"
    searches = len(side[0].searches)
    return f"{_answer_html(side[0])}, {searches} search{'es' * (searches != 1)}"


def compare(before: Iterable[Trajectory], after: Iterable[Trajectory]):
    """A widget over ``paired_outcomes``: choose an outcome and a question, see both checkpoints side by side.

    Without widgets the cell shows ``render_comparison``. Controls are attributes of the returned box.
    """
    before, after = list(before), list(after)
    outcomes = paired_outcomes(before, after)
    names = [f"{name} ({len(some)})" for name, some in outcomes.items()]
    outcome = widgets.Dropdown(description="outcome", options=list(zip(names, outcomes)))
    color = widgets.Dropdown(description="colour", options=colors(before + after))
    rows = widgets.Select(rows=8, layout=_WIDE)

    def draw(changed) -> str:
        if changed not in (rows, color):
            _fill(rows, (first[0].question.text[:_ROW] for first, _ in outcomes[outcome.value]))
        if rows.value is None:
            return _page("<p>No question has this outcome.</p>")
        first, second = outcomes[outcome.value][rows.value]
        return render_side_by_side(first, second, color=_possible(color, [*first, *second]))

    matrix = widgets.HTML(render_comparison(before, after))
    box = Box([matrix, widgets.HBox([outcome, color]), rows], {"outcome": outcome, "color": color, "rows": rows}, draw)
    box.drawing, box.pair = matrix, box.drawing
    return box


# ---- weighing rewards, and choosing by hand ---------------------------------------------------------------


def weighted(group: Sequence[Trajectory], weights: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """Rewards ``sum(weight * t.rewards[name])`` of one group of G rollouts, and GRPO's advantages: G floats each.

    Raises:
        ValueError: a weight that is no finite number; a rollout was not scored with one of the rewards: names those it
            has.
    """
    from ..training.grpo import group_advantages

    if missing := sorted({name for t in group for name in weights.keys() - t.rewards.keys()}):
        raise ValueError(f"no reward {missing[0]!r} in the trajectories, they have: {', '.join(group[0].rewards)}")
    rewards = [math.fsum(w * t.rewards[name] for name, w in _numbers(weights).items()) for t in group]
    return rewards, group_advantages(rewards, len(group)).tolist()


def _numbers(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: valid(float, w, f"the weight of {name!r}") for name, w in weights.items()}


def render_weights(group: Sequence[Trajectory], weights: Mapping[str, float]) -> str:
    """Self-contained HTML: the advantages of one group under these weights, and which first act they favour.

    Args:
        group: rollouts of one question, scored with every reward in ``weights``.
        weights: name of a reward -> its weight. Errors as in ``weighted``.
    """
    rewards, advantages = weighted(group, weights)
    head = ["", "first act", "searches", "answer", *map(_e, weights), "reward", "advantage", "less", "more likely"]
    rows = []
    for i, (t, reward, advantage) in enumerate(zip(group, rewards, advantages), 1):
        bar = "█" * round(6 * abs(advantage))
        numbers = [*(t.rewards[name] for name in weights), reward]
        cells = [f"<b>#{i}</b>", first_act(t), len(t.searches), _answer_html(t), *map(_number, numbers)]
        rows.append([*cells, _number(round(advantage, 2), "+"), bar * (advantage < 0), bar * (advantage > 0)])
    formula = " + ".join(f"{w:.3g} × {_e(name)}" for name, w in weights.items())
    by_act = grouped(zip(map(first_act, group), advantages), lambda pair: pair[0])
    means = {act: fmean(advantage for _, advantage in some) for act, some in sorted(by_act.items())}
    told = [f"{act} first: {_number(round(mean, 2), '+')} ({len(by_act[act])})" for act, mean in means.items()]
    badge = " <strong class=badge>all rewards are equal: nothing is learned</strong>" * no_variance(rewards)
    return _page(
        f"<h4>{_e(group[0].question.text)}</h4><p>{_facts(group)}</p><p>reward = {formula}{badge}</p>"
        f"{_table(head, rows)}<p>Mean advantage (rollouts): {'; '.join(told)}</p>"
    )


def weigh(trajectories: Iterable[Trajectory], weights: Mapping[str, float], *, most: float = 2.0):
    """A widget with a slider for each weight that redraws ``render_weights`` for a group at once.

    A slider goes from 0 to ``most``, further where the weight given lies further. Without widgets the cell shows the
    first group under the weights given. Its controls are attributes (``box.controls["search_cost"].value = 0.5``;
    ``box.controls["group"]`` chooses the question).

    Raises:
        ValueError: no trajectories; a weight, or ``most``, that cannot be.
    """
    by_question = groups(trajectories)
    if not by_question:
        raise ValueError("nothing to weigh: the list of trajectories is empty")
    most, look = valid(Positive, most, "most"), {"step": 0.05, "style": {"description_width": "9em"}}
    sliders = {
        name: widgets.FloatSlider(description=name, value=w, min=min(0.0, w), max=max(most, w), **look)
        for name, w in _numbers(weights).items()
    }
    options = [
        (_seen(f"{knowledge(g[0].question)}: {g[0].question.text[:_ROW]}"), i) for i, g in enumerate(by_question)
    ]
    group = widgets.Dropdown(description="group", options=options, layout=_WIDE)

    def draw(_) -> str:
        return render_weights(by_question[group.value], {name: s.value for name, s in sliders.items()})

    return Box([group, *sliders.values()], {"group": group, **sliders}, draw)


def render_pair(a: Trajectory, b: Trajectory) -> str:
    """Self-contained HTML: two rollouts of one question as A and B, without rewards and without what is known of the
    answer, so that they sway nobody.
    """
    asked = Question(a.question.id, a.question.text, [])
    pair = [replace(t, question=asked, reward=None, rewards={}, turn_rewards=[], advantages=[]) for t in (a, b)]
    return _page(_group_html(pair, _scale(pair, "mask"), ["A", "B"]))


def prefer(pairs: Iterable[tuple[Trajectory, Trajectory]], path: str | os.PathLike, *, who: str = "me"):
    """A widget that shows pairs and appends each choice of ``who`` to ``path`` (see ``rewards.record_choice``).

    Without widgets the cell shows the first pair. Controls are attributes of the returned box: the buttons
    ``box.controls["a"]``, ``["b"]``, ``["tie"]`` and ``["skip"]``; ``box.count`` says how far one is.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("nothing to choose from: the list of pairs is empty")
    names = {"a": "A is better", "b": "B is better", "tie": "as good", "skip": "skip"}
    buttons = {name: widgets.Button(description=label) for name, label in names.items()}
    count = widgets.Label()
    at = chosen = 0

    def draw(pressed) -> str:
        nonlocal at, chosen
        trouble = ""
        name = next((name for name, button in buttons.items() if button is pressed), None)
        if name and at < len(pairs):
            try:
                if name != "skip":
                    record_choice(path, Choice(*pairs[at], name, who))
                    chosen += 1
                at += 1
            except OSError as e:
                trouble = f"the choice was not written to {path}: {e.strerror or e}"
        count.value = trouble or f"pair {min(at + 1, len(pairs))} of {len(pairs)}; {chosen} choices written to {path}"
        for button in buttons.values():
            button.disabled = at >= len(pairs)
        return render_pair(*pairs[at]) if at < len(pairs) else _page("<p>No pair is left. Thank you.</p>")

    return Box([count, widgets.HBox(list(buttons.values()))], buttons, draw, count)


# ---- asking ----------------------------------------------------------------------------------------------


def ask(answer: Callable[[str], str], question: str = ""):
    """A text box: each question that is entered goes to ``answer``, and the HTML it returns is shown below.

    ``answer`` must escape what it shows, as ``render_html`` does. What it raises is shown in its place. Without
    widgets the cell shows the answer to ``question``, which is asked at once.
    """
    look = {"description": "question", "placeholder": "type a question and press Enter", "layout": _WIDE}
    typed = widgets.Text(question, continuous_update=False, **look)

    def draw(_) -> str:
        try:
            return answer(typed.value) if typed.value.strip() else ""
        except Exception as e:
            return _page(f"<p><strong class=bad>✗ {_e(type(e).__name__)}: {_e(e)}</strong></p>")

    return Box([typed], {"question": typed}, draw)


# ---- escaping --------------------------------------------------------------------------------------------

#: Control characters, lone surrogates, line separators, and characters that turn or hide text or cannot be seen
#: (tags and variation selectors carry smuggled text): shown, never obeyed.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_MATHS = re.compile(r"([$\\])")


def _seen(text: Any, most: int = _NAME) -> str:
    """Untrusted text whose unseen characters are shown by their number; of a long one the beginning."""
    text = str(text)
    more = f" … ({len(text) - most:,} more characters)" * (len(text) > most)
    return _UNSEEN.sub(lambda m: f"‹U+{ord(m[0]):04X}›", text[:most]) + more


def _e(text: Any, most: int = _NAME) -> str:
    """``_seen`` as HTML: tags and formulas (``$``, backslash) lose their power."""
    return _MATHS.sub(r"<span>\1</span>", html.escape(_seen(text, most)))


def _lines(text: str) -> str:
    """``_e``, with line breaks shown; a run of them breaks once."""
    return re.sub("\n+", lambda m: "↵" * len(m[0]) + "<br>", _e(text, _TEXT))


def _page(body: str, title: str = "") -> str:
    heading = f"<h3>{_e(title)}</h3>" if title else ""
    return f'<meta charset="utf-8"><div class=sr1><style>{_STYLE}</style>{heading}{body}</div>'
