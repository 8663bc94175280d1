"""docs/settings.md has every setting with its default, and every metric that a step logs, and no others."""

import ast
import re
from pathlib import Path

from test_trainer import SHORT, VARIANTS, engine, questions, trainer  # noqa: F401  (fixtures)

from searchr1_lib.training.settings import Settings

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")


def rows(part: str) -> list[list[str]]:
    """The cells of all table rows of a part of the page whose first cell is names in backquotes."""
    (text,) = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]


def test_every_setting_stands_there_with_its_default():
    said = {row[0].strip("`"): ast.literal_eval(row[1]) for row in rows("Settings")}
    assert said == {name: field.default for name, field in Settings.model_fields.items()}
    assert all(len(row) == 4 and row[2] for row in rows("Settings"))


def test_every_metric_stands_there(tmp_path, engine, questions):  # noqa: F811
    settings = SHORT.model_copy(update=dict(steps=1, max_turn_tokens=10, **VARIANTS["replay"]))
    run = trainer(tmp_path, engine, questions, settings)
    run.train()
    said = {name for row in rows("Metrics") for name in re.findall(r"`([^`]+)`", row[0])}
    logged = {re.sub("^rewards/.*", "rewards/…", name) for name in run.metrics[0]}
    assert said == logged
    assert all(len(row) == 4 and row[1] for row in rows("Metrics"))
