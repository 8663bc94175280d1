"""The adapter that notebook 00 shows: it fits the shipped tiny Qwen, and it has learned when to search."""

import json
from pathlib import Path
from statistics import fmean

from searchr1_lib.search import BM25Search
from searchr1_lib.study.compare import examine
from searchr1_lib.study.regret import Yardstick, simple_policies, skill_of, table
from searchr1_lib.training.policy import load_policy
from searchr1_lib.worlds.almanac import PRICE, UNKNOWN_PAYS, build_world

ADAPTER = Path("data/tiny_qwen_grpo")


def test_the_shipped_adapter_knows_when_to_search():
    """Better than every simple policy on the same questions, and than half of what the untrained model regrets."""
    world = build_world(0)
    yardstick = Yardstick(world, skill_of("data/tiny_qwen"), PRICE, UNKNOWN_PAYS)
    engine, how = BM25Search(world.passages), {"split": "test", "questions": 200, "rollouts": 1}
    trained, plain = (
        table(yardstick, examine(load_policy("data/tiny_qwen", adapter=adapter), engine, yardstick, how))
        for adapter in (ADAPTER, None)
    )
    regret = fmean(row["regret"] for row in trained)
    assert regret < min(simple_policies(yardstick, [row["id"] for row in trained]).values())
    assert regret < 0.5 * fmean(row["regret"] for row in plain)


def test_it_says_how_it_was_made():
    made = json.loads((ADAPTER / "made_by.json").read_text())
    assert {"settings", "reward", "figures"} <= set(made)
    assert None not in json.loads((ADAPTER / "adapter_config.json").read_text()).values()
    files = {f.name for f in ADAPTER.iterdir()}
    assert "adapter_model.safetensors" in files and not any(f.endswith((".bin", ".pt", ".pkl")) for f in files)
