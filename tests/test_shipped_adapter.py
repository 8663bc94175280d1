"""The adapter that notebook 00 shows fits the shipped tiny Qwen and has learned when to search; the real Qwen's says
which base it is of.
"""

import json
from pathlib import Path
from statistics import fmean

from safetensors.torch import load_file

from searchr1_lib.files import read_json_lines
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


def test_the_real_qwens_adapter_is_small_and_names_its_base():
    home = Path("data/real/qwen_grpo")
    made, config = (json.loads((home / f"{name}.json").read_text()) for name in ("made_by", "adapter_config"))
    assert config["base_model_name_or_path"] == made["base"] == "Qwen2.5-Coder-0.5B-Instruct"
    weights = load_file(home / "adapter_model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"torch.bfloat16"} and config["r"] == 8
    assert (home / "adapter_model.safetensors").stat().st_size < 10 * 2**20
    assert len(list(read_json_lines(home / "metrics.jsonl"))) == made["settings"]["steps"]
