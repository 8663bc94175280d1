"""Quizzes, glossary and the links between them and the notebooks."""

import re
from pathlib import Path

import nbformat
import pytest

from searchr1_lib.study import quiz

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(file.stem for file in quiz.HOME.glob("*.yaml"))
NOTEBOOKS = {file: nbformat.read(file, 4) for file in sorted((ROOT / "notebooks").glob("*.ipynb"))}


@pytest.mark.parametrize("name", NAMES)
def test_a_quiz_explains_every_option(name):
    questions = quiz.read(name)
    assert len(questions) == 5
    for q in questions:
        assert q["ask"].endswith(("?", ".", ":")) and all(len(str(why)) > 20 for why in q["options"].values())
    firsts = [sorted(q["options"])[0] == next(iter(q["options"])) for q in questions]
    assert not all(firsts), "the right one must not always stand first"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_its_quiz(name):
    shown = [nb for file, nb in NOTEBOOKS.items() if file.name.startswith(f"{name}_")]
    assert len(shown) == 1 and any(f'quiz.show("{name}")' in cell.source for cell in shown[0].cells)


def test_with_a_kernel_it_is_checked_and_without_it_is_folded():
    box = quiz.show("12")
    page = box.drawing.value
    assert page.count("<details>") == 5 and "script" not in page
    first, choice = quiz.read("12")[0], box.controls["0"]
    verdict = box.children[0].children[2]
    for option, why in first["options"].items():
        choice.value = option
        assert ("✓" if option == next(iter(first["options"])) else "✗") in verdict.value
    assert box.children[1].children[2].value == "", "only what was answered is judged"


def test_text_in_a_quiz_is_escaped():
    page = quiz.render([{"ask": "<b>?", "options": {"<script>": "a & b", "no": "because"}}])
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page


def test_a_broken_quiz_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr(quiz, "HOME", tmp_path)
    (tmp_path / "x.yaml").write_text("- ask: Why?\n  options: {one: because}\n")
    with pytest.raises(ValueError, match="x.yaml, question 1"):
        quiz.read("x")


def test_the_glossary_is_short_and_every_link_finds_its_word():
    anchors = re.findall(r'<a id="([\w-]+)">', (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
    assert len(anchors) == len(set(anchors)) <= 40
    cells = [cell.source for nb in NOTEBOOKS.values() for cell in nb.cells if cell.cell_type == "markdown"]
    linked = {word for source in cells for word in re.findall(r"glossary\.md#([\w-]+)", source)}
    assert linked <= set(anchors), linked - set(anchors)
