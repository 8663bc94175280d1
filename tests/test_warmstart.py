"""The warm start: what demonstrations say, what carries loss, and that the shipped model is the recipe's."""

import itertools
import json
import random
import re
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from searchr1_lib.environment import protocol
from searchr1_lib.study import warmstart
from searchr1_lib.study.compare import skill_of
from searchr1_lib.study.warmstart import (
    Recipe,
    comparisons,
    demonstrations,
    drills,
    encode,
    episode,
    play,
    prompt_text,
    readings,
    search_share,
)
from searchr1_lib.suite import cli
from searchr1_lib.training.policy import load_policy
from searchr1_lib.worlds.almanac import (
    FIRST_NAMES,
    MONTHS,
    RELATIONS,
    RIVERS,
    SPLITS,
    SURENESS,
    SURNAMES,
    TOWNS,
    UNASKED,
    answers_of,
    build_world,
)
from searchr1_lib.worlds.optimum import TRUST, UNKNOWN
from searchr1_lib.worlds.optimum import WORDINGS as SEARCHES

TINY = Path("data/tiny_qwen")
SMALL = Recipe(
    steps=6,
    batch=6,
    readings=1,
    drills=4,
    warmup=2,
    quantised_steps=2,
    world_steps=3,
    vocab_size=600,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(scope="module")
def shipped():
    return build_world(0)


@pytest.fixture(scope="module")
def world(shipped):
    """One that the recipe trains on."""
    return build_world(1000, avoid=shipped.fresh_names)


@pytest.fixture(scope="module")
def examples(world):
    return list(demonstrations(world, random.Random(0), 600))


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY)


# ---- the command and its recipe --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("lr", float("nan")), ("context_weight", -1), ("batch", True), ("seed", -1)]
)
def test_a_recipe_has_types_and_ranges(name, value):
    with pytest.raises(ValueError, match=name):
        Recipe(**{name: value})
    with pytest.raises(ValueError, match=name):
        replace(Recipe(), **{name: value})


def test_the_command_writes_into_no_folder_of_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmstart, "train", None)
    (tmp_path / "model.safetensors").write_text("mine")
    assert cli.main(["warmstart", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds model.safetensors, which was not made" in capsys.readouterr().err
    assert cli.main(["warmstart", "--start", str(TINY), "--out", str(TINY)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert {p.name for p in TINY.iterdir()} == {*warmstart.OWN}  # what it made itself it makes again


def test_the_command_makes_a_whole_model_and_goes_on_from_one(tmp_path, monkeypatch):
    monkeypatch.setattr(warmstart, "TOKENIZER_WORLDS", 2)
    monkeypatch.setattr(warmstart, "Recipe", lambda: SMALL)
    monkeypatch.setattr(warmstart, "LONGER", replace(SMALL, steps=1, context_steps=0))
    monkeypatch.setattr(warmstart, "search_skill", lambda policy: warmstart.Skill())  # too young to show any
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["warmstart", "--out", str(first)]) == 0
    assert cli.main(["warmstart", "--start", str(first), "--out", str(second)]) == 0
    for folder, steps in ((first, 6), (second, 1)):
        assert {p.name for p in folder.iterdir()} == {*warmstart.OWN} and skill_of(folder) == warmstart.Skill()
        assert json.loads((folder / "recipe.json").read_text())["steps"] == steps
    a, b = (load_policy(folder, quantize=False) for folder in (first, second))
    assert a.tokenizer.get_vocab() == b.tokenizer.get_vocab() and a.prompt_text("Who?") == prompt_text("Who?")
    name, moved = next((n, p) for n, p in b.model.named_parameters() if "q_proj" in n and "lora" not in n)
    start = dict(a.model.named_parameters())[name]
    assert not moved.equal(start) and moved.allclose(start, atol=0.05)


def test_layers_under_another_vocabulary_keep_their_weights_and_known_tokens_their_rows(policy):
    recipe = replace(Recipe(), vocab_size=700)
    tokenizer = warmstart.train_tokenizer([prompt_text("Who founded Tonund Works?")] * 3, 700)
    old = AutoModelForCausalLM.from_pretrained(TINY)
    model = runpy.run_path("experiments/graft.py")["graft"](old, policy.tokenizer, recipe, tokenizer)
    before, after = old.state_dict(), model.state_dict()
    layers = [name for name in before if "layers" in name]
    assert layers and all(torch.equal(before[name], after[name]) for name in layers)
    rows = before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]
    known = [tokenizer.convert_tokens_to_ids("a"), policy.tokenizer.convert_tokens_to_ids("a")]
    assert torch.equal(rows[1][known[0]], rows[0][known[1]]) and len(rows[1]) == 700


def test_the_shipped_files_fit_together():
    recipe = json.loads((TINY / "recipe.json").read_text())
    config = json.loads((TINY / "config.json").read_text())
    assert all(config[name] == recipe[name] for name in warmstart.SHAPE) and asdict(Recipe()).keys() <= recipe.keys()
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    log = [json.loads(line) for line in (TINY / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == recipe["steps"] and log[-1]["loss"] < log[0]["loss"]
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 12 * 2**20


def test_the_prompt_of_the_recipe_is_the_prompt_of_the_rollout(policy):
    for question in ("Who founded Tonund Works?", "Who is <it>"):
        assert policy.prompt_text(question) == prompt_text(question)


# ---- demonstrations --------------------------------------------------------------------------------------


def test_no_shipped_fresh_name_is_taught(shipped, world, examples):
    assert not world.fresh_names & shipped.fresh_names
    words = re.findall(r"\w+", " ".join(piece.text for _, pieces in examples for piece in pieces))
    names = {name.removesuffix("/") for name in shipped.fresh_names if name.count(" ") == 1}
    assert len(names) > 400 and not names & {" ".join(pair) for pair in itertools.pairwise(words)}


def test_the_first_act_is_a_coin_that_the_level_bends_and_fair_over_the_relations(world):
    asked = [world.asked[q.id] for part in world.questions.values() for q in part if q.hops == 1]
    choose, first = warmstart.coin(random.Random(0)), {level: [] for level in range(len(SURENESS))}
    for one in asked:
        try:
            searched = bool(next(episode(one, choose)))
        except StopIteration:
            searched = False
        first[one.start.level].append((searched, search_share(one.relations[0], one.start.level)))
    for level, made in first.items():
        often, share = (sum(column) / len(made) for column in zip(*made))
        assert len(made) > 300 and abs(often - share) < 0.08 and abs(share - 0.5) < 0.1
        shares = [search_share(name, level) for name in RELATIONS]
        assert sum(shares) == pytest.approx(len(RELATIONS) / 2)
        assert max(shares) - 0.5 <= warmstart.BENT + 1e-9


def test_what_is_recalled_is_said_first_and_how_sure(world, examples):
    of = {q.text: world.asked[q.id] for part in world.questions.values() for q in part}
    for text, pieces in examples:
        entity, relation = next(of[text].hops())
        sentence, _ = warmstart.recollect(entity, relation)
        assert pieces[0].text.startswith(f"<think> {sentence}")
        assert sentence.endswith(f", {SURENESS[entity.level]}.") == bool(entity.level)


def test_every_taught_fact_is_drilled_once(world):
    made = drills(world, random.Random(0))
    facts = sum(
        len(e.memory)
        for split in (*SPLITS, UNASKED)
        for part in world.entities[split].values()
        for e in part
        if e.level
    )
    said = [piece.text for _, pieces in made for piece in pieces if piece.writer == "model"]
    about = [piece.text for _, pieces in made for piece in pieces if piece.writer == "environment"]
    assert len(said) == facts and len(about) == len(set(about)) == facts - len(made)
    assert not any("</think>" in text for text in said)
    for question, pieces in made[:50]:
        assert pieces[0].text.startswith("<think> ") and pieces[0].text.endswith(".") and question.endswith("?")


def test_a_reading_says_what_stands_there_and_that_the_rest_does_not(world):
    facts, absent = 0, 0
    for _, pieces in readings(world, random.Random(0), 40):
        shown = next(piece.text for piece in pieces if "<information>" in piece.text)
        for piece in pieces:
            if piece.writer == "model":
                said = piece.text.removeprefix("<think> ").removesuffix(".")
                if said.endswith(", it says"):
                    assert said.removesuffix(", it says") + "." in shown
                    facts += 1
                else:
                    assert said.endswith(": not here") and said.removesuffix("not here") not in shown
                    absent += 1
    assert facts > 100 and absent > 40


def test_a_comparison_names_who_is_born_earlier(world):
    months = {e.subject: e.truth["month"] for part in world.entities.values() for e in part["people"]}
    _, pieces = comparisons(world, random.Random(0))
    for given, said in zip(pieces[::2], pieces[1::2]):
        names = re.findall(r"Birth month of (.+?): ", given.text)
        assert said.text.endswith(f"<answer> {min(names, key=lambda n: MONTHS.index(months[n]))} </answer>")
        assert f"{months[names[0]]} comes " in said.text and (given.writer, said.writer) == ("environment", "model")
    assert len(pieces) > 8


def test_every_word_of_a_name_is_one_token(policy):
    for word in (*FIRST_NAMES, *SURNAMES, *TOWNS, *RIVERS):
        assert len(policy.tokenizer.encode(f" {word}")) == 1, word


def test_demonstrations_speak_the_protocol(examples):
    for _, pieces in examples:
        assert pieces[-1].text.endswith("</answer>") and {p.writer for p in pieces[::2]} == {"model"}
        for piece in pieces[:-1:2]:
            assert protocol.read_action(piece.text).kind == "search"
        for piece in pieces[1::2]:
            assert piece.writer == "environment" and piece.text.startswith("\n\n<information>")


def test_what_is_read_goes_above_what_is_remembered(world):
    """Who searches for every hop, in both wordings, answers rightly where all was found, whatever it remembers."""
    from searchr1_lib.search.bm25 import BM25Search

    def thorough(asked, chain, number, searches, tried):
        return SEARCHES[len(tried)] if number < len(asked.relations) and len(tried) < 2 else TRUST

    some = [q for q in world.questions["test"] if len(q.passages) == q.hops]
    some = random.Random(0).sample(some, 200)
    done = play(((q, episode(world.asked[q.id], thorough), 5) for q in some), BM25Search(world.passages))
    found = [(q, p) for q, p in done if sum(", it says." in piece.text for piece in p) == q.hops]
    said = {q.id: pieces[-1].text.split("<answer> ")[1].split(" </answer>")[0] for q, pieces in found}
    assert len(found) > 120 and all(said[q.id] in q.answers for q, _ in found)
    recalled = [q for q, _ in found if all(e.level for e, _ in world.asked[q.id].hops(remembered=True))]
    wrong = [q for q in recalled if not {said[q.id]} & set(answers_of(world.asked[q.id], remembered=True))]
    assert len(wrong) > 20


def test_who_may_not_search_answers_from_memory_or_says_unknown(world):
    for choice, said in ((TRUST, None), (UNKNOWN, "unknown")):
        for q in world.questions["test"][:200]:
            with pytest.raises(StopIteration) as end:
                next(episode(world.asked[q.id], lambda *state, choice=choice: choice))
            (piece,) = end.value.value
            answer = piece.text.split("<answer> ")[1].removesuffix(" </answer>")
            if said or not all(e.level for e, _ in world.asked[q.id].hops(remembered=True)):
                assert answer == "unknown"
            else:
                assert answer in answers_of(world.asked[q.id], remembered=True)


def test_the_models_words_and_only_they_carry_loss(examples, policy):
    tokenizer = policy.tokenizer
    for text, pieces in examples[:100]:
        ids, weights, _ = encode(tokenizer, text, pieces, 0.0)
        start = len(tokenizer.encode(prompt_text(text)))
        assert ids[-1] == tokenizer.eos_token_id and weights[-1] == 1 and set(weights[:start]) == {0.0}
        silent = tokenizer.decode([i for i, w in zip(ids[start:], weights[start:]) if w == 0])
        assert silent == "".join(p.text for p in pieces if p.writer == "environment")
        assert tokenizer.decode(ids[start:], skip_special_tokens=True) == "".join(p.text for p in pieces)
    ids, weights, _ = encode(tokenizer, "Who?", [warmstart.Piece("<think> I recall nothing", "model")], 0.3)
    assert ids[-1] != tokenizer.eos_token_id and set(weights) == {0.3, 1.0}


def test_what_is_read_is_looked_up_where_it_stands(world, policy):
    tokenizer, looks = policy.tokenizer, 0
    for text, pieces in readings(world, random.Random(0), 20):
        ids, _, pairs = encode(tokenizer, text, pieces, 0.0)
        shown = len(tokenizer.encode(prompt_text(text) + pieces[0].text + pieces[1].text))
        assert all(ids[here + 1] == ids[there] and there < shown <= here for here, there in pairs)
        said = sum("it says" in piece.text for piece in pieces)
        assert said <= len(pairs) <= 4 * said  # a value has up to three tokens, a person's town four
        looks += len(pairs)
    assert looks > 100


def test_attention_is_the_models_own(policy):
    model = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager")
    ids = torch.tensor([policy.tokenizer.encode("Trade of Ada Brown: potter.") * 3] * 2)
    with warmstart.attended(model) as seen, torch.no_grad():
        true = model(ids, output_attentions=True).attentions
        for layer, head in ((0, 1), warmstart.LOOKS):
            rows, here = torch.tensor([0, 1]), torch.tensor([9, 20])
            mine = warmstart.attention(seen, layer, head, rows, here).softmax(-1)
            assert torch.allclose(mine, true[layer][rows, head, here], atol=1e-5)


def test_a_few_steps_lower_the_loss_and_the_weights_end_exact(monkeypatch):
    monkeypatch.setattr(warmstart, "TOKENIZER_WORLDS", 2)
    model, tokenizer, log = warmstart.train(SMALL, every=2, report=lambda line: None)
    assert log[-1]["loss"] < log[0]["loss"] and len(tokenizer) <= 600
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    before = [w.data.clone() for w in weights]
    with warmstart.nf4_rounded(model):
        assert any(not torch.equal(a, w.data) for a, w in zip(before, weights))
    assert weights and all(torch.equal(a, w.data) for a, w in zip(before, weights))


def test_the_shipped_model_is_fit_for_reinforcement_learning(policy, shipped):
    """The figures of TARGETS, with a tenth of room for so few rollouts."""
    for name, (value, count) in warmstart.measure(policy, shipped, generations=1).items():
        low, high = warmstart.TARGETS[name]
        if count >= 30 or "reads" not in name:  # few chains bring every passage
            assert low - 0.1 <= value <= high + 0.1, (name, value)


def test_the_shipped_skill_is_what_the_model_shows(policy):
    shown, kept = asdict(warmstart.search_skill(policy)), asdict(skill_of(TINY))
    for name in ("found", "again", "read"):
        assert shown[name] == pytest.approx(kept[name], abs=0.05), name
