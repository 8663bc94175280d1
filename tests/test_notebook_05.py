"""Notebook 05 explains every setting of a training and every metric that a step logs."""

import dataclasses
import re
from pathlib import Path

import nbformat

from searchr1_lib.settings import Settings
from test_trainer import SHORT, engine, questions, trainer  # noqa: F401  (fixtures)

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "05_grpo_qlora_training.ipynb"


def explained() -> list[str]:
    """What stands in backquotes in the first column of its tables; "rewards/…" is a beginning."""
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "markdown")
    first_columns = re.findall(r"^\| (`[^|]*) \|", text, re.M)
    return [name for column in first_columns for name in re.findall(r"`([^`]+)`", column)]


def test_every_setting_is_explained():
    names = {f.name for f in dataclasses.fields(Settings)}
    told = set(explained()) | {"decay_steps", "gradient_checkpointing"}  # in the text between the tables
    assert names <= told, f"notebook 05 does not explain {names - told}"


def test_every_metric_is_explained(tmp_path, engine, questions):  # noqa: F811
    run = trainer(tmp_path, engine, questions, dataclasses.replace(SHORT, steps=1, max_turn_tokens=10))
    run.train()
    told = explained()
    missing = [name for name in run.metrics[0] if name != "step" and not any(
        name.startswith(t[:-1]) if t.endswith("…") else name == t for t in told)]
    assert not missing, f"notebook 05 does not explain {missing}"
