"""What rollouts and trainings of the kept world gave before the house was built (see tests/records.py)."""

import json

import pytest
import records

KEPT = json.loads((records.HOUSE / "records.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(KEPT))
def test_nothing_is_lost(name):
    """Another processor rounds otherwise: so the tolerance, and few steps: a rounding soon becomes another token."""
    *what, kind, seed = name.split(", ")
    quantize, number = kind == "NF4", int(seed.removeprefix("seed "))
    if what == ["rollouts"]:
        again = records.record_rollouts(records.policy_of(number, quantize), number)
    else:
        again = records.record_training(", ".join(what), number, quantize, steps=records.KEPT_STEPS)
    assert records.distance(KEPT[name], json.loads(json.dumps(again))) <= 1e-3
