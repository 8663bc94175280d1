"""Draws the moving picture of the README: one question before training and after it, line by line, as an animated SVG.

    python docs/moving.py runs/cpu/demo.jsonl docs/demo.svg

The file is what notebook 00 leaves. The question is the first look-up question that was guessed at, wrongly, before
training, and is searched for and answered rightly after it.
"""

import argparse
import html
import textwrap
from pathlib import Path

from searchr1_lib import TrajectoryLog
from searchr1_lib.files import write_whole
from searchr1_lib.metrics import right

WIDTH, LINE, CHARS, SECONDS = 440, 17, 54, 1.1
COLOURS = {"think": "#57606a", "search": "#0550ae", "information": "#6e7781", "answer": "#116329"}


def lines(t):
    """(kind, text) of each line that is shown; of a passage that was read only the one that holds the answer."""
    for s in t.segments:
        text = " ".join(s.text.split())
        if s.kind == "information":
            found = [h.passage.text for call in t.calls for h in call.result if h.passage.id in t.question.passages]
            text = f"it reads: {found[0] if found else 'nothing that helps'}"
        for part in textwrap.wrap(text, CHARS):
            yield s.kind, part
    yield "answer", f"{'right' if right(t) else 'wrong'}: earns {t.reward:.2f}"


def panel(t, x: int, start: float, total: float) -> str:
    rows = []
    for number, (kind, text) in enumerate(lines(t)):
        at = (start + number * SECONDS) / total
        fade = (
            f'<animate attributeName="opacity" values="0;0;1;1" keyTimes="0;{at:.3f};{at + 0.01:.3f};1" dur="{total}s" '
        )
        style = f'x="{x}" y="{96 + number * LINE}" fill="{COLOURS.get(kind, "#24292f")}"'
        rows.append(f'<text {style} opacity="1">{html.escape(text)}{fade}repeatCount="indefinite"/></text>')
    return "".join(rows)


def picture(before, after) -> str:
    counts = [len(list(lines(t))) for t in (before, after)]
    total = sum(counts) * SECONDS + 4
    height = 96 + max(counts) * LINE
    asked = html.escape(before.question.text)
    head = [
        f'<text x="16" y="30" font-size="15" font-weight="bold" fill="#24292f">{asked}</text>',
        '<text x="16" y="66" font-weight="bold" fill="#24292f">before training</text>',
        f'<text x="{WIDTH + 16}" y="66" font-weight="bold" fill="#24292f">after training</text>',
    ]
    body = panel(before, 16, 0.5, total) + panel(after, WIDTH + 16, 0.5 + counts[0] * SECONDS, total)
    frame = f'<rect width="{2 * WIDTH}" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>'
    size = f'width="{2 * WIDTH}" height="{height}" viewBox="0 0 {2 * WIDTH} {height}"'
    font = 'font-family="ui-monospace, SFMono-Regular, Menlo, monospace" font-size="12.5"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{frame}{"".join(head)}{body}</svg>\n'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rollouts = {(t.group.split()[0], t.question.id): t for t in TrajectoryLog(args.log)}
    for (side, question), before in rollouts.items():
        after = rollouts.get(("after", question))
        guessed = side == "before" and not before.question.known and not before.searches and not right(before)
        if (
            guessed
            and before.answer not in (None, "unknown")
            and after.searches
            and right(after)
            and len(after.searches) < 3
        ):
            write_whole(args.out, picture(before, after))
            break
    else:
        raise SystemExit(f"{args.log}: no look-up question that was guessed at before and is right after")
