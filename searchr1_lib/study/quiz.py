"""Five questions at the end of a notebook: folded answers for readers without a kernel, buttons for those with one.

The questions are files in ``notebooks/quiz``, one a notebook; see ``read``.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import yaml

HOME = Path(__file__).resolve().parents[2] / "notebooks" / "quiz"


def read(name: str) -> list[dict[str, Any]]:
    """The questions of a notebook: ``ask``, a text, and ``options``, what may be chosen: text -> why it is (not) so.

    The right one is the first in the file; shown they are in alphabetical order.

    Raises:
        ValueError: a question without two options or more; names file and place.
    """
    file = HOME / f"{name}.yaml"
    questions = yaml.safe_load(file.read_text(encoding="utf-8"))
    for number, question in enumerate(questions, 1):
        if not isinstance(question, dict) or question.keys() != {"ask", "options"} or len(question["options"]) < 2:
            raise ValueError(f"{file.name}, question {number}: expected ask and at least two options")
    return questions


def show(name: str):
    """The quiz of a notebook, as a widget; on a page without a kernel as folded HTML."""
    from .viewer import Box

    questions = read(name)
    choices = [
        widgets.RadioButtons(options=sorted(q["options"]), value=None, layout={"width": "auto"}) for q in questions
    ]
    verdicts = [widgets.HTML() for _ in questions]
    parts = [
        widgets.VBox([widgets.HTML(f"<b>{number}.</b> {html.escape(q['ask'])}"), choice, verdict])
        for number, (q, choice, verdict) in enumerate(zip(questions, choices, verdicts), 1)
    ]

    def draw(changed) -> str:
        for q, choice, verdict in zip(questions, choices, verdicts):
            if choice.value is not None:
                right = next(iter(q["options"]))
                mark = "✓" if choice.value == right else "✗"
                verdict.value = f"<p>{mark} {html.escape(q['options'][choice.value])}</p>"
        return render(questions) if changed is None else ""

    return Box(parts, {str(i): choice for i, choice in enumerate(choices)}, draw)


def render(questions: list[dict[str, Any]]) -> str:
    """Self-contained HTML: each question with its options, the answers folded; it needs no style."""
    rows = []
    for number, q in enumerate(questions, 1):
        right = next(iter(q["options"]))
        options = "".join(f"<li>{html.escape(option)}</li>" for option in sorted(q["options"]))
        answers = "".join(
            f"<li>{'✓' if option == right else '✗'} <i>{html.escape(option)}</i>: {html.escape(why)}</li>"
            for option, why in sorted(q["options"].items())
        )
        ask = f"<p><b>{number}.</b> {html.escape(q['ask'])}</p><ul>{options}</ul>"
        rows.append(f"{ask}<details><summary>Answer</summary><ul>{answers}</ul></details>")
    return "".join(rows)
