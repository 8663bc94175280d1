"""The warm start: what demonstrations say, what carries loss, and that the shipped model is the recipe's."""

import itertools
import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.environment import protocol
from searchr1_lib.search import BM25Search
from searchr1_lib.study import warmstart
from searchr1_lib.study.warmstart import Recipe, demonstrations, encode, fresh_world, prompt_text
from searchr1_lib.suite import cli
from searchr1_lib.training.policy import load_policy
from searchr1_lib.worlds.almanac import build_world

TINY = Path("data/tiny_qwen")


@pytest.fixture(scope="module")
def shipped():
    return build_world(0)


@pytest.fixture(scope="module")
def examples(shipped):
    world = fresh_world(3, shipped.lookup_names)
    return list(demonstrations(world, Recipe(), random.Random(0), 400))


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY)


@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("lr", float("nan")), ("known_share", 1.5), ("batch", True), ("seed", -1)]
)
def test_a_recipe_has_types_and_ranges(name, value):
    with pytest.raises(ValueError, match=name):
        Recipe(**{name: value})
    with pytest.raises(ValueError, match=name):
        replace(Recipe(), **{name: value})


@pytest.mark.parametrize("flag", ["--steps=0", "--steps=-5", "--seed=-1"])
def test_the_command_refuses_before_any_work(tmp_path, flag, capsys):
    assert cli.main(["warm-start", "--out", str(tmp_path / "out"), flag]) == 2
    assert flag[2:].split("=")[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_writes_into_no_folder_of_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmstart, "train", None)
    (tmp_path / "model.safetensors").write_text("mine")
    assert cli.main(["warm-start", "--out", str(tmp_path), "--steps=1"]) == 2
    assert f"{tmp_path} holds model.safetensors, which was not made" in capsys.readouterr().err
    assert {p.name for p in TINY.iterdir()} <= {*warmstart.OWN}  # what it made itself it makes again


def test_the_shipped_files_are_the_recipes(policy):
    recipe = Recipe()
    assert json.loads((TINY / "recipe.json").read_text()) == asdict(recipe)
    config = json.loads((TINY / "config.json").read_text())
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        assert config[name] == getattr(recipe, name), name
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    log = [json.loads(line) for line in (TINY / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == recipe.steps
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 8 * 2**20


def test_the_shipped_tokenizer_is_the_one_that_the_recipe_trains(shipped, policy):
    made = warmstart.make_tokenizer(Recipe(), shipped.lookup_names)
    assert made.get_vocab() == policy.tokenizer.get_vocab()
    text = prompt_text("Who founded it?") + "<think> I recall nothing. </think>"
    assert made.encode(text) == policy.tokenizer.encode(text)


def test_the_prompt_of_the_recipe_is_the_prompt_of_the_rollout(policy):
    for question in ("Who founded Tonund Works?", "Who is <it>"):
        assert policy.prompt_text(question) == prompt_text(question)


def test_no_shipped_lookup_name_is_taught(shipped, examples):
    text = "".join("".join(p.text for p in pieces) for _, pieces in examples)
    for number in range(3):
        assert not fresh_world(number, shipped.lookup_names).lookup_names & shipped.lookup_names
    names = {n for n in shipped.lookup_names if " " in n}
    assert names and not [n for n in names if re.search(rf"\b{n}\b", text)]


def test_the_first_act_is_a_coin_whatever_was_recalled(examples):
    for known in (True, False):
        acts = ["<search>" in pieces[0].text for q, pieces in examples if q.known == known]
        assert 0.4 < sum(acts) / len(acts) < 0.6
        said = [pieces[0].text for q, pieces in examples if q.known == known]
        assert all(("I recall that" in s) == known and ("I recall nothing" in s) == (not known) for s in said)


def test_demonstrations_speak_the_protocol(examples):
    for question, pieces in examples:
        for environment, group in itertools.groupby(pieces, key=lambda p: p.writer == "environment"):
            turn = "".join(p.text for p in group)
            if environment:
                assert turn.startswith("\n\n<information>")
            else:
                assert protocol.read_action(turn).kind in ("search", "answer")


def test_guesses_and_only_guesses_carry_no_loss(examples, policy):
    tokenizer = policy.tokenizer
    for question, pieces in examples[:100]:
        ids, weights = encode(tokenizer, question, pieces, context_weight=0.0)
        start = len(tokenizer.encode(prompt_text(question.text)))
        silent = tokenizer.decode([i for i, w in zip(ids[start:], weights[start:]) if w == 0])
        guessed = "".join(p.text for p in pieces if p.writer == "guess")
        observed = "".join(p.text for p in pieces if p.writer == "environment")
        assert silent == guessed + observed
        assert tokenizer.decode(ids[start:], skip_special_tokens=True) == "".join(p.text for p in pieces)


def test_a_few_steps_lower_the_loss_and_the_weights_end_exact():
    recipe = Recipe(
        steps=6,
        batch=8,
        warmup=2,
        quantised_steps=2,
        world_steps=3,
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model, tokenizer, log = warmstart.train(recipe, every=2, report=lambda line: None)
    assert log[-1]["loss"] < log[0]["loss"] and len(tokenizer) <= 600
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    before = [w.data.clone() for w in weights]
    with warmstart.nf4_rounded(model):
        assert any(not torch.equal(a, w.data) for a, w in zip(before, weights))
    assert weights and all(torch.equal(a, w.data) for a, w in zip(before, weights))


def test_the_shipped_model_is_fit_for_reinforcement_learning(policy):
    """The figures of TARGETS on a part of the test split, with a tenth of room for so few questions."""
    engine = BM25Search(load_passages("data/almanac/passages.jsonl"))
    asked = load_questions("data/almanac/test.jsonl")
    chosen = [q for known in (True, False) for q in [q for q in asked if q.known == known][:60]]
    for name, value in warmstart.measure(policy, chosen, engine).items():
        low, high = warmstart.TARGETS[name]
        assert low - 0.1 <= value <= high + 0.1, (name, value)
