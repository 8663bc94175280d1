"""The almanac: reproducible, disjoint splits, answerable from its gold passages, and misleading on purpose."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.suite import cli
from searchr1_lib.worlds.almanac import ASKED, MONTHS, SPLITS, Part, build_world, near_duplicates, write_almanac

ALMANAC = Path("data/almanac")


@pytest.fixture(scope="module")
def world():
    return build_world(0)


@pytest.fixture(scope="module")
def shipped():
    return {s: load_questions(ALMANAC / f"{s}.jsonl") for s in SPLITS}


def test_the_shipped_almanac_is_what_the_generator_makes(tmp_path):
    write_almanac(tmp_path)
    for file in ALMANAC.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(load_passages(ALMANAC / "passages.jsonl")) >= 3000


def test_passages_are_distinct_and_questions_too(world, shipped):
    assert len({p.text for p in world.passages}) == len(world.passages)
    ids = [q.id for qs in shipped.values() for q in qs]
    assert len(set(ids)) == len(ids) == 2 * sum(ASKED.values())


def test_kinds_are_mixed_as_planned(shipped):
    for split, questions in shipped.items():
        assert len(questions) == 2 * ASKED[split]
        for known in (True, False):
            kinds = Counter(q.source.split("/")[1] for q in questions if q.known == known)
            assert kinds["bridge"] >= 0.25 * ASKED[split] and kinds["comparison"] >= 0.04 * ASKED[split]


def test_splits_share_no_entity_and_no_gold_passage(world, shipped):
    subjects, gold = ({s: set() for s in SPLITS} for _ in range(2))
    for split, questions in shipped.items():
        for q in questions:
            subjects[split] |= {h.subject for h in world.chains[q.id]}
            gold[split] |= set(q.passages)
    for a, b in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not subjects[a] & subjects[b] and not gold[a] & gold[b]
    asked_in_training = " ".join(q.text for q in shipped["train"])
    assert not [s for s in subjects["test"] if re.search(rf"\b{s}\b", asked_in_training)]


def test_gold_passages_hold_what_the_chain_says(world):
    by_id = {p.id: p for p in world.passages}
    for split in SPLITS:
        for q in world.questions[split]:
            chain = world.chains[q.id]
            assert q.hops == len(chain) and q.passages == [h.passage for h in chain] and q.answers
            for hop in chain:
                passage = by_id[hop.passage]
                for word in hop.value.replace(" in ", " ").removeprefix("a ").removeprefix("an ").split():
                    assert word in passage.text + passage.title, (hop, passage)
            if q.source == "almanac/bridge":
                assert chain[1].subject == chain[0].value
            if q.source == "almanac/comparison":
                assert q.answers == [min(chain, key=lambda h: MONTHS.index(h.value)).subject]


def test_namesakes_mislead(world):
    towns = Counter(p.title.split(" (")[0] for p in world.passages if p.title.endswith(")"))
    surnames = Counter(p.title.split()[1] for p in world.passages if len(p.title.split()) == 2 and "born" in p.text)
    assert sum(n > 1 for n in towns.values()) > 30 and sum(n > 1 for n in surnames.values()) > 100


def test_another_seed_keeps_the_known_part_and_shares_no_lookup_name(world):
    other = build_world(7, avoid=world.lookup_names, lookup={"train": Part(40, 20, 20, 30)})
    known = lambda w: [(q.text, q.answers) for s in SPLITS for q in w.questions[s] if q.known]
    facts = lambda w: {(h.fact) for s in SPLITS for q in w.questions[s] if q.known for h in w.chains[q.id]}
    assert facts(other) == facts(world) and len(known(other)) == len(known(world))
    assert not other.lookup_names & world.lookup_names


def test_the_description_is_true():
    made = json.loads((ALMANAC / "almanac.json").read_text())
    assert made["passages"] == len(load_passages(ALMANAC / "passages.jsonl"))


def test_near_duplicates_come_on_top_and_answer_nothing(world):
    more = near_duplicates(ALMANAC, 2)
    assert world.passages + more == build_world(0, near_duplicates=2).passages
    titles = [p.title for p in world.passages + more]
    assert len(set(titles)) == len({p.id for p in world.passages + more}) == len(titles)
    gold = {i for qs in world.questions.values() for q in qs for i in q.passages}
    assert len(more) > 1.9 * len(gold) and not gold & {p.id for p in more}
    words = {word for p in world.passages if p.id in gold for word in p.title.split()}
    assert all(words & set(p.title.split()) for p in more)  # each bears a name that is asked for


@pytest.mark.parametrize("seed", ["-5", "1.5", "nan"])
def test_a_seed_that_makes_the_world_of_another_is_refused_before_anything_is_written(tmp_path, seed, capsys):
    try:
        assert cli.main(["almanac", "--out", str(tmp_path / "out"), f"--seed={seed}"]) == 2
    except SystemExit as e:  # argparse: no whole number
        assert e.code == 2
    assert "seed" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_questions_of_others_are_not_written_over(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("mine")
    assert cli.main(["almanac", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds train.jsonl, which was not made" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    for _ in "ab":  # its own it makes again
        assert cli.main(["almanac", "--out", str(tmp_path / "mine")]) == 0


def test_near_duplicates_refuse(tmp_path):
    assert near_duplicates("nowhere", 0) == []
    with pytest.raises(ValueError, match="holds no readable almanac.json"):
        near_duplicates("tests", 1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        near_duplicates(ALMANAC, -1)
    for broken in ("[7]", '{"seed": 1.5}', '{"seed": -5}', "{"):
        (tmp_path / "almanac.json").write_text(broken)
        with pytest.raises(ValueError, match="holds no readable almanac.json"):
            near_duplicates(tmp_path, 1)
    with pytest.raises(ValueError, match="near_duplicates must be a whole number"):
        near_duplicates(ALMANAC, 1.5)
