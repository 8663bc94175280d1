"""The adapter that notebook 00 shows: it fits the shipped tiny Qwen, and it has learned when to search."""

import json
from pathlib import Path

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.search import BM25Search
from searchr1_lib.study.evaluate import evaluate
from searchr1_lib.training.policy import load_policy

ADAPTER = Path("data/tiny_qwen_grpo")


def test_the_shipped_adapter_knows_when_to_search():
    asked = load_questions("data/almanac/test.jsonl")
    few = [q for known in (True, False) for q in [q for q in asked if q.known == known][:20]]
    engine = BM25Search(load_passages("data/almanac/passages.jsonl"))
    table = evaluate(load_policy("data/tiny_qwen", adapter=ADAPTER), few, engine, max_turn_tokens=128).table()
    assert table["known"]["searches"] <= 0.25 and table["known"]["em"] >= 0.9
    assert 0.8 <= table["look-up"]["searches_per_need"] <= 1.25 and table["look-up"]["em"] >= 0.75


def test_it_says_how_it_was_made():
    made = json.loads((ADAPTER / "made_by.json").read_text())
    assert {"settings", "reward", "figures"} <= set(made)
    assert None not in json.loads((ADAPTER / "adapter_config.json").read_text()).values()
    files = {f.name for f in ADAPTER.iterdir()}
    assert "adapter_model.safetensors" in files and not any(f.endswith((".bin", ".pt", ".pkl")) for f in files)
