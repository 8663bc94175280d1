"""The almanac: reproducible, memory and truth kept apart, disjoint splits, answerable, and misleading on purpose."""

import json
import re
from collections import defaultdict
from itertools import islice
from math import prod
from pathlib import Path
from statistics import fmean

import pytest

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.study.warmstart import recollect
from searchr1_lib.suite import cli
from searchr1_lib.worlds.almanac import (
    ASKED,
    BLANK,
    LEVELS,
    MIXTURE,
    PRICE,
    READER,
    RELATIONS,
    SPLITS,
    TRAINED,
    TRUE_SHARE,
    UNASKED,
    UNKNOWN_PAYS,
    VERSION,
    answers_of,
    build_world,
    further_passages,
    memory_right,
    near_duplicates,
    query,
    sample_questions,
    text_of,
    world_of,
    write_almanac,
)
from searchr1_lib.worlds.optimum import Optimum

ALMANAC = Path("data/almanac")


@pytest.fixture(scope="module")
def shipped():
    return {s: load_questions(ALMANAC / f"{s}.jsonl") for s in SPLITS}


def facts(world, split):
    for kind, members in world.entities[split].items():
        for relation, r in RELATIONS.items():
            for entity in members if r.kind == kind else ():
                yield entity, relation


def test_a_seed_decides_the_truth_and_not_the_memory(world):
    again, other = build_world(0), build_world(1)
    assert again.passages == world.passages and again.questions == world.questions
    for split in (*SPLITS, UNASKED):
        told = [[recollect(e, r)[0] for e, r in facts(w, split) if e.level] for w in (world, other)]
        true = [[text_of(e.truth[RELATIONS[r].field]) for e, r in facts(w, split) if e.level] for w in (world, other)]
        assert told[0] == told[1] and true[0] != true[1]
    assert not world.fresh_names & build_world(7, avoid=world.fresh_names).fresh_names


def test_of_each_level_relation_and_split_just_its_share_is_true(world):
    for split in (*SPLITS, UNASKED):
        right = defaultdict(list)
        for e, r in facts(world, split):
            if e.level:
                name = RELATIONS[r].field
                right[e.level, r].append(text_of(e.memory[name]) == text_of(e.truth[name]))
        assert len(right) == 6 * len(RELATIONS)
        assert all(abs(fmean(rights) - TRUE_SHARE[level]) <= 0.02 for (level, _), rights in right.items())


def test_the_last_passage_holds_the_answer_and_splits_share_no_entity(world):
    texts, names = {p.id: f"{p.title} {p.text}" for p in world.passages}, {}
    for split in SPLITS:
        names[split] = {e.subject for members in world.entities[split].values() for e in members}
        for q in world.questions[split]:
            *_, (entity, _) = world.asked[q.id].hops()
            if entity.passage and "comparison" not in q.source:
                assert any(answer in texts[entity.passage] for answer in q.answers), q
    assert not names["train"] & names["test"] and not names["train"] & names["validation"]


def test_a_full_query_finds_far_more_than_a_careless_one(world, engine):
    for relation in RELATIONS:
        there = [e for e, r in facts(world, "test") if r == relation and e.passage]
        found = []
        for short in (False, True):
            hits = engine.search_batch([query(e, relation, short=short) for e in there], k=3)
            found.append(fmean(e.passage in {h.passage.id for h in hs} for e, hs in zip(there, hits)))
        assert found[0] > 0.85 and found[0] - found[1] > 0.2, relation


def test_samples_hold_their_shares(world):
    chosen = sample_questions(world, "test", 800)
    assert len({q.id for q in chosen}) == len(chosen) and abs(len(chosen) - 800) < 5
    for level in range(1, len(LEVELS)):
        right = [memory_right(world, q) for q in chosen if q.source == f"almanac/1-hop/{level}"]
        assert len(right) > 40 and abs(fmean(right) - TRUE_SHARE[level]) < 0.06
    assert abs(fmean("0" in q.source.split("/")[2] for q in chosen) - BLANK) < 0.03


@pytest.mark.parametrize(
    "how, message",
    [
        ({"mixture": {"1-hop": 0.5}}, "add up to 1"),
        ({"mixture": {"4-hop": 1.0}}, "4-hop is no kind"),
        ({"blank": 1.5}, "blank=1.5"),
        ({"count": 100_000}, "lower count"),
    ],
)
def test_mixtures_that_cannot_be(world, how, message):
    with pytest.raises(ValueError, match=message):
        sample_questions(world, "test", **{"count": 100} | how)


def test_every_answer_of_memory_is_of_the_form_of_a_right_one(world):
    for q in world.questions["test"]:
        if "0" not in q.source.split("/")[2]:
            assert answers_of(world.asked[q.id], remembered=True)


# ---- the folder ------------------------------------------------------------------------------------------


def test_the_shipped_almanac_is_what_the_generator_makes(tmp_path):
    write_almanac(tmp_path)
    for file in ALMANAC.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_description_is_true(world, shipped):
    made = json.loads((ALMANAC / "almanac.json").read_text())
    assert made["passages"] == len(load_passages(ALMANAC / "passages.jsonl")) == len(world.passages)
    assert made["questions"] == {split: len(part) for split, part in shipped.items()} == ASKED
    assert (made["version"], made["mixture"]["test"], made["mixture"]["train"]) == (VERSION, MIXTURE, TRAINED)
    for split, shares in made["mixture"].items():
        for kind, share in shares.items():
            of_kind = fmean(q.source.split("/")[1] == kind for q in shipped[split])
            assert abs(of_kind - share) < 0.01, (split, kind)


def test_passages_are_distinct_and_questions_too(world, shipped):
    assert len({p.text for p in world.passages}) == len(world.passages) == len({p.id for p in world.passages})
    assert len({q.id for part in shipped.values() for q in part}) == sum(ASKED.values())


def test_known_is_what_is_best_answered_at_once(world, shipped):
    for split, part in shipped.items():
        asked = {q.id: q for q in world.questions[split]}
        for q in part:
            entities = [entity for entity, _ in world.asked[q.id].hops()]
            assert q == asked[q.id] and q.hops == len(entities)
            if not world.asked[q.id].other:
                levels = tuple(TRUE_SHARE[e.level] for e in entities)
                best = Optimum(levels, PRICE, READER, UNKNOWN_PAYS).value
                assert q.known == (prod(levels) > best - 1e-9)
            assert q.source.split("/")[2] == "".join(str(e.level) for e in entities)
            assert q.passages == [e.passage for e in entities if e.passage]


def test_what_is_asked_in_one_split_is_not_asked_in_another(shipped):
    gold = {split: {i for q in part for i in q.passages} for split, part in shipped.items()}
    assert not gold["train"] & gold["test"] and not gold["train"] & gold["validation"]


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--seed=-5", "seed"),
        ("--seed=1.5", "seed"),
        ("--blank=1.5", "blank=1.5"),
        ("--mixture 1 1 0 0", "must not be negative and add up to 1"),
    ],
)
def test_dials_that_cannot_be_are_refused_before_anything_is_written(tmp_path, flag, said, capsys):
    try:
        assert cli.main(["almanac", "--out", str(tmp_path / "out"), *flag.split()]) == 2
    except SystemExit as e:  # argparse: no whole number
        assert e.code == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_dials_of_the_command_line(tmp_path):
    flags = ["--seed", "3", "--mixture", "1", "0", "0", "0", "--blank", "0"]
    assert cli.main(["almanac", "--out", str(tmp_path / "other"), *flags]) == 0
    test = load_questions(tmp_path / "other" / "test.jsonl")
    assert len(test) == ASKED["test"] and all(q.hops == 1 and not q.source.endswith("0") for q in test)
    other = world_of(tmp_path / "other", "this test")
    assert other.seed == 3 and {q.id: q for q in other.questions["test"]}[test[0].id] == test[0]


def test_questions_of_others_are_not_written_over(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("mine")
    assert cli.main(["almanac", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds train.jsonl, which was not made" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    for _ in "ab":  # its own it makes again
        assert cli.main(["almanac", "--out", str(tmp_path / "mine")]) == 0


def test_no_folder_is_taken_for_an_almanac_of_this_version(tmp_path):
    with pytest.raises(ValueError, match="sft needs an almanac, and tests holds no readable almanac.json"):
        world_of("tests", "sft")
    for broken in ("[7]", '{"seed": 1.5, "version": 3}', '{"seed": -5, "version": 3}', "{"):
        (tmp_path / "almanac.json").write_text(broken)
        with pytest.raises(ValueError, match="holds no readable almanac.json"):
            world_of(tmp_path, "sft")
    first = '{"generator": "searchr1_lib.world", "seed": 4, "known_seed": 20250301}'  # nothing said of any version
    for other, version in ((first, 1), ('{"seed": 4, "version": 9}', 9)):
        (tmp_path / "almanac.json").write_text(other)
        with pytest.raises(ValueError, match=f"of version {version}, and sft needs version {VERSION}: .*--seed 4"):
            world_of(tmp_path, "sft")


def test_near_duplicates_come_on_top_and_answer_nothing(world):
    more = near_duplicates(ALMANAC, 2)
    passages = world.passages + more
    assert len({p.title for p in more} | {p.title for p in world.passages}) == len(passages)
    assert len({p.id for p in passages}) == len(passages) and len(more) > 0.9 * len(world.passages)
    words = {word for p in world.passages for word in re.findall(r"[A-Z]\w+", p.title)}
    for p in more:  # each bears a family's, a book's or a town's name that is asked for
        assert words & set(re.findall(r"[A-Z]\w+", p.title.split(" (")[0].split(" ", 1)[-1]))


def test_further_passages_are_about_others(world):
    more = [*islice(further_passages(world), 20_000)]  # of so many some would have a name of the world's by chance
    assert more[:500] == [*islice(further_passages(build_world(0)), 500)]
    ids, titles = ({getattr(p, what) for p in world.passages} for what in ("id", "title"))
    assert len({p.id for p in more} - ids) == len({p.title for p in more} - titles) == 20_000


def test_near_duplicates_refuse():
    assert near_duplicates("nowhere", 0) == []
    with pytest.raises(ValueError, match="near_duplicates = 1 .0: none. needs an almanac"):
        near_duplicates("tests", 1)
    for count in (-1, 1.5, True):
        with pytest.raises(ValueError, match="near_duplicates must be"):
            near_duplicates(ALMANAC, count)
