"""The walk of a trajectory through its optimum, what the optimum earns on the almanac, and the reward that it is of."""

import random
from statistics import fmean, stdev

import pytest

from searchr1_lib.metrics import exact_match
from searchr1_lib.records import Question, ToolCall, Trajectory
from searchr1_lib.rewards.cost import Discounted
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.recollection import noted
from searchr1_lib.study.regret import (
    SIMPLE,
    WASTED,
    Yardstick,
    _Walk,
    by_level,
    by_own_skill,
    measure_skill,
    queries,
    simple_policies,
)
from searchr1_lib.worlds.almanac import MONTHS, RELATIONS, Entity, query, sample_questions
from searchr1_lib.worlds.optimum import RECALL, TRUST, UNKNOWN, WORDINGS, Notes, Skill

# ---- the walk --------------------------------------------------------------------------------------------


def play(yardstick, q, engine, choose, rng, memory=None):
    """An episode of a policy that is told the values of its acts, on the real world with real engines."""
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
        tool, of = (yardstick.notes.tool, memory) if act == RECALL else ("search", engine)
        calls.append(ToolCall(tool, words, of.search(words, k=3)))
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


def test_with_notes_the_optimum_asks_them_and_regrets_nothing(world, engine):
    memory = BM25Search(noted(world.passages, 0.5, 0))
    asked = sample_questions(world, "test", 400, mixture={"1-hop": 1.0})
    firsts = [(query(*next(world.asked[q.id].hops()), short=False), q.passages) for q in asked]
    brings = fmean(not {h.passage.id for h in memory.search(words, k=3)}.isdisjoint(gold) for words, gold in firsts)
    skill = measured(world, engine, asked)
    yardstick = Yardstick(world, skill, 0.2, 0.1, notes=Notes(brings, 0.02, "ask"))
    best = lambda state, level, values, rng: max(values, key=values.get)
    done = [play(yardstick, q, engine, best, None, memory) for q in asked]
    made = [d for t in done for d in yardstick.decisions(t)]
    assert all(d.regret < 1e-9 for d in made)
    assert {d.act for d in made} > {RECALL, TRUST, WORDINGS[0]}
    earned = yardstick.reward(done)
    expected = [
        exact_match(t.answer, t.question.answers) * 0.8 ** len(t.searches) * 0.98 ** (len(t.calls) - len(t.searches))
        for t in done
    ]
    assert earned == pytest.approx([0.1 if t.answer == "unknown" else e for t, e in zip(done, expected)])
    short = [yardstick.value(t.question.id) - r for t, r in zip(done, earned)]
    # a passage that is missing is in no notes either, so the recalls and the searches for it do not fail independently
    assert abs(fmean(short)) < 3 * stdev(short) / len(short) ** 0.5 + 0.01, fmean(short)
    own = by_own_skill(yardstick, done)
    assert own["regret"] < 0.02


def test_a_recall_in_vain_costs_what_a_recall_costs(world):
    q = next(q for q in world.questions["test"] if q.source == "almanac/1-hop/6")
    yardstick = Yardstick(world, Skill(), 0.3, notes=Notes(0.5, 0.02, "ask"))
    call = ToolCall("ask", "the weather in Rome", [])
    made = yardstick.decisions(Trajectory(q, [], [], [], [], calls=[call], answer="x", segments=[]))
    assert [d.act for d in made] == [WASTED, TRUST, TRUST]
    assert made[0].regret == pytest.approx(yardstick.value(q.id) * 0.02)


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


def test_by_level_the_optimum_searches_as_it_should_and_never_does_not(world, engine):
    asked = sample_questions(world, "test", 200)
    yardstick = Yardstick(world, measured(world, engine, asked), 0.3, 0.1)
    best = lambda state, level, values, rng: max(values, key=values.get)
    rows = by_level(yardstick, [play(yardstick, q, engine, best, None) for q in asked])
    assert [row["level"] for row in rows] == [0.0, 0.2, 0.4, 0.55, 0.7, 0.85, 0.95]
    assert all(row["searches"] == row["best"] and row["over"] == row["under"] == 0 for row in rows)
    assert rows[0]["best"] > 0.9 and rows[-1]["best"] == 0  # the optimum is a step
    never = lambda state, level, values, rng: TRUST
    rows = by_level(yardstick, [play(yardstick, q, engine, never, None) for q in asked])
    assert all(row["searches"] == row["over"] == 0 and row["under"] == row["best"] for row in rows)


def test_by_level_counts_a_wasted_search_as_one_too_many(world):
    q = next(q for q in world.questions["test"] if q.source == "almanac/1-hop/6")
    call = ToolCall("search", "the weather in Rome", [])
    done = Trajectory(q, [], [], [], [], calls=[call], answer="x", segments=[])
    row = {"level": 0.95, "n": 2, "searches": 0.5, "best": 0.0, "over": 0.5, "under": 0.0}
    assert by_level(Yardstick(world, Skill(), 0.3), [done]) == [row]


def test_a_policy_by_its_own_skill_and_how_it_asks(world, engine):
    yardstick, rng = Yardstick(world, Skill((0.9, 0.5), (0.5, 0.1), 0.7), price=0.2), random.Random(0)
    asked = sample_questions(world, "test", 60, mixture={"1-hop": 1.0})
    short = lambda state, level, values, rng: TRUST if level is None or state.tried else WORDINGS[1]
    done = [play(yardstick, q, engine, short, rng) for q in asked]
    found = fmean(yardstick.decisions(t)[0].found for t in done)
    with pytest.raises(ValueError, match="do not show every way to search"):
        measure_skill(yardstick, done)
    own = measure_skill(yardstick, done, yardstick.skill)
    assert own == Skill((0.9, found), (0.5, 0.1), 1.0)  # it reads all rightly; what it never did is as it was
    by_own = by_own_skill(yardstick, done)
    assert by_own["skill"] == {"found": (0.9, found), "again": (0.5, 0.1), "read": 1.0}
    assert by_own["best"] > fmean(yardstick.value(q.id) for q in asked)
    right = fmean(exact_match(t.answer, t.question.answers) for t in done)
    assert queries(yardstick, done) == {"full": 0.0, "found": found, "wasted": 0.0, "right": right}
    assert queries(yardstick, []) == dict.fromkeys(("full", "found", "wasted", "right"))


# ---- the reward ------------------------------------------------------------------------------------------


def test_the_discounted_reward():
    q = Question("q", "?", ["Rome"])
    calls = [ToolCall("search", "a", [])] * 2
    done = [Trajectory(q, [], [], [], [], calls=calls, answer=a) for a in ("Rome", "Oslo", "Unknown.", None)]
    assert Discounted(0.3, 0.1)(done) == [pytest.approx(0.49), 0.0, 0.1, 0.0]
    for how in ({"price": 1.5}, {"unknown": -1}):
        with pytest.raises(ValueError, match="Discounted: "):
            Discounted(**how)
