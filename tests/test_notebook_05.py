"""Notebook 05: the solutions of its exercises pass their own checkers."""

import re
from pathlib import Path
from types import SimpleNamespace

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "05_grpo_qlora_training.ipynb"
CELLS = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, 4).cells}


def verdicts(space: dict, exercise: str, check: str, name: str, capsys) -> list[str]:
    """What the checker says as the notebook stands, and of the printed solution."""
    exec(CELLS[check], space)
    before = capsys.readouterr().out.strip()
    exec(re.search(r"```python\n(.*?)```", CELLS[exercise], re.S)[1], space)
    return [before, space[f"check_{name}"](space[name])]


def test_idle(capsys):
    log = [SimpleNamespace(reward=r, step=step) for step in (0, 1) for r in (0, 0, 1, 0.8) if step or r]
    space = {
        "TrajectoryLog": lambda path: log,
        "p": SimpleNamespace(run_dir=Path(), num_generations=2),
        "metrics": [{}, {"zero_variance_groups": 0.5}],
    }
    assert verdicts(space, "cell-43", "cell-46", "idle", capsys) == ["not tried yet", "right"]


def test_lora_size(capsys):
    layers = [SimpleNamespace(lora_A=1, in_features=i, out_features=o, r={"default": 4}) for i, o in ((8, 16), (16, 8))]
    model = SimpleNamespace(modules=lambda: [*layers, SimpleNamespace()])
    space = {"policy": SimpleNamespace(model=model), "trained": 2 * 4 * (8 + 16)}
    assert verdicts(space, "cell-47", "cell-48", "lora_size", capsys) == ["not tried yet", "right"]
