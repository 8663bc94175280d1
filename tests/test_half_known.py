"""The half-remembered world, the walk of a trajectory through its optimum, and what the optimum earns there."""

import random
from collections import defaultdict
from statistics import fmean, stdev

import pytest

from searchr1_lib.metrics import exact_match
from searchr1_lib.records import Question, ToolCall, Trajectory
from searchr1_lib.rewards.cost import Discounted
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.regret import SIMPLE, WASTED, Yardstick, _Walk, simple_policies
from searchr1_lib.study.teach import recollect
from searchr1_lib.worlds.halfknown import (
    LEVELS,
    MONTHS,
    RELATIONS,
    SPLITS,
    TRUE_SHARE,
    UNASKED,
    Entity,
    answers_of,
    build_world,
    memory_right,
    query,
    sample_questions,
    text_of,
)
from searchr1_lib.worlds.optimum import TRUST, UNKNOWN, WORDINGS, Skill


@pytest.fixture(scope="module")
def world():
    return build_world(0)


@pytest.fixture(scope="module")
def engine(world):
    return BM25Search(world.passages)


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
    assert 0.2 < fmean("0" in q.source.split("/")[2] for q in chosen) < 0.3


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


# ---- the walk --------------------------------------------------------------------------------------------


def play(yardstick, q, engine, choose, rng):
    """An episode of a policy that is told the values of its acts, on the real world with a real engine."""
    walk = _Walk(yardstick, yardstick.world.asked[q.id])
    calls = []
    while True:
        _, level, values = walk._open()
        act = choose(walk.state, level, values, rng)
        if act == UNKNOWN or level is None:
            break
        if act == TRUST:
            walk.trust_up_to(walk.state.hop + 1)
            continue
        entity, relation = chain_of(walk)[walk.state.hop]
        entity = entity or Entity("people", "Nobody Known", 0)  # behind a blank that it trusted
        words = query(entity, relation, short=act == WORDINGS[1])
        calls.append(ToolCall("search", words, engine.search(words, k=3)))
        walk.search(calls[-1])
    answer = "unknown" if act == UNKNOWN else said(walk)
    return Trajectory(q, [], [], [], [], calls=calls, answer=answer, segments=[])


def chain_of(walk):
    from searchr1_lib.study.regret import _chain

    return [*zip(_chain(walk.asked, walk.read), walk.asked.relations)]


def said(walk):
    values = []
    for hop, (entity, relation) in enumerate(chain_of(walk)):
        if entity is None:
            return "nobody knows"
        values.append((entity.truth if hop in walk.read else entity.memory).get(RELATIONS[relation].field))
    if walk.asked.other:
        months = [MONTHS.index(v) if v else 12 for v in values]
        return (walk.asked.start, walk.asked.other)[months[1] < months[0]].subject
    value = values[-1]
    return "nobody knows" if value is None else value.name if isinstance(value, Entity) else value


def measured(world, engine, questions):
    """The engine's part of a skill, over the first hops of the questions."""
    first, again = ([], []), ([], [])
    for q in questions:
        entity, relation = next(world.asked[q.id].hops())
        found = []
        for short in (False, True):
            hits = engine.search(query(entity, relation, short=short), k=3)
            found.append(entity.passage != "" and entity.passage in {h.passage.id for h in hits})
        for i in (0, 1):
            first[i].append(found[i])
            if not found[1 - i]:
                again[i].append(found[i])
    return Skill(tuple(map(fmean, first)), tuple(map(fmean, again)), 1.0)


@pytest.mark.parametrize("price", [0.15, 0.4])
def test_the_optimum_earns_what_it_promises_and_regrets_nothing(world, engine, price):
    asked = sample_questions(world, "test", 400)
    yardstick = Yardstick(world, measured(world, engine, asked), price, 0.1)
    best = lambda state, level, values, rng: max(values, key=values.get)
    done = [play(yardstick, q, engine, best, None) for q in asked]
    assert all(d.regret < 1e-9 for t in done for d in yardstick.decisions(t))
    rewards = [
        0.1 if t.answer == "unknown" else exact_match(t.answer, t.question.answers) * (1 - price) ** len(t.calls)
        for t in done
    ]
    short = [yardstick.value(t.question.id) - r for t, r in zip(done, rewards)]
    assert abs(fmean(short)) < 3 * stdev(short) / len(short) ** 0.5, fmean(short)


@pytest.mark.parametrize("name", SIMPLE)
def test_the_walk_finds_the_regret_that_the_recursion_computes(world, engine, name):
    asked = sample_questions(world, "test", 400)
    yardstick = Yardstick(world, measured(world, engine, asked), 0.3, 0.1)

    def choose(state, level, values, rng):
        acts = SIMPLE[name](state, level, values)
        return rng.choices(list(acts), acts.values())[0]

    rng = random.Random(0)
    done = [play(yardstick, q, engine, choose, rng) for q in asked]
    walked = [sum(d.regret for d in yardstick.decisions(t)) for t in done]
    expected = simple_policies(yardstick, [q.id for q in asked])[name]
    assert abs(fmean(walked) - expected) < 3.5 * stdev(walked) / len(walked) ** 0.5 + 0.003


def test_a_search_for_something_else_is_wasted(world):
    q = next(q for q in world.questions["test"] if q.source == "almanac/1-hop/6")
    yardstick = Yardstick(world, Skill(), 0.3)
    call = ToolCall("search", "the weather in Rome", [])
    made = yardstick.decisions(Trajectory(q, [], [], [], [], calls=[call], answer="x", segments=[]))
    assert [d.act for d in made] == [WASTED, TRUST, TRUST]
    assert made[0].regret == pytest.approx(0.95 - 0.95 * 0.7)


def test_an_episode_without_an_answer_has_thrown_its_value_away(world):
    q = next(q for q in world.questions["test"] if q.source == "almanac/1-hop/6")
    yardstick = Yardstick(world, Skill(), 0.3)
    made = yardstick.decisions(Trajectory(q, [], [], [], [], segments=[]))
    assert sum(d.regret for d in made) == pytest.approx(yardstick.value(q.id)) == pytest.approx(0.95)


# ---- the reward ------------------------------------------------------------------------------------------


def test_the_discounted_reward():
    q = Question("q", "?", ["Rome"])
    calls = [ToolCall("search", "a", [])] * 2
    done = [Trajectory(q, [], [], [], [], calls=calls, answer=a) for a in ("Rome", "Oslo", "Unknown.", None)]
    assert Discounted(0.3, 0.1)(done) == [pytest.approx(0.49), 0.0, 0.1, 0.0]
    for how in ({"price": 1.5}, {"unknown": -1}):
        with pytest.raises(ValueError, match="Discounted: "):
            Discounted(**how)


def test_every_answer_of_memory_is_of_the_form_of_a_right_one(world):
    for q in world.questions["test"]:
        if "0" not in q.source.split("/")[2]:
            assert answers_of(world.asked[q.id], remembered=True)
