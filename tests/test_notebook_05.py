"""Notebook 05 explains every setting of a training and every metric that a step logs."""

import re
from pathlib import Path

import nbformat
from test_trainer import SHORT, engine, questions, trainer  # noqa: F401  (fixtures)

from searchr1_lib.training.settings import Settings

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "05_grpo_qlora_training.ipynb"


def named() -> set[str]:
    """What stands in backquotes in its text; a name that ends in "…" stands for all that begin so."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    return {name for cell in cells if cell.cell_type == "markdown" for name in re.findall(r"`([^`\n]+)`", cell.source)}


def test_every_setting_is_explained():
    missing = set(Settings.model_fields) - named()
    assert not missing, f"notebook 05 does not explain {missing}"


def test_every_metric_is_explained(tmp_path, engine, questions):  # noqa: F811
    run = trainer(tmp_path, engine, questions, SHORT.model_copy(update=dict(steps=1, max_turn_tokens=10)))
    run.train()
    whole, beginnings = named(), tuple(name[:-1] for name in named() if name.endswith("…"))
    missing = [m for m in run.metrics[0] if m != "step" and m not in whole and not m.startswith(beginnings)]
    assert not missing, f"notebook 05 does not explain {missing}"
