"""The short warm start for recalls: what its demonstrations show, and what the adapter that ships can do."""

import random
import runpy
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from searchr1_lib.environment.memory import Recall
from searchr1_lib.environment.search import SearchEnvironment, tools_of
from searchr1_lib.records import Note, ToolCall, Trajectory
from searchr1_lib.rewards import Discounted, score
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.search.memory import MemoryStore
from searchr1_lib.study import recollection
from searchr1_lib.study.recollection import asking, demonstrations, noted
from searchr1_lib.study.warmstart import RECALL, coin, episode, play
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.rollout import rollout
from searchr1_lib.worlds.almanac import PRICE, build_world, query

ADAPTER = Path("data/tiny_qwen_recall")


@pytest.fixture(scope="module")
def policy():
    return load_policy("data/tiny_qwen")


def test_demonstrations_ask_the_notes_and_read_them(policy):
    world, rng = build_world(recollection.FIRST_WORLD), random.Random(0)
    engine, notes = BM25Search(world.passages), BM25Search(noted(world.passages, 0.5, world.seed))
    drawn = rng.sample(world.questions["train"], 200)
    done = play(((q, episode(world.asked[q.id], asking(coin(rng), rng)), 3) for q in drawn), engine, notes)
    texts = ["".join(piece.text for piece in pieces) for _, pieces in done]
    asked = [text for text in texts if f"<{RECALL}>" in text]
    assert 60 < len(asked) < 160
    ends = [text.split(f"<{RECALL}>")[1].split(f"</{RECALL}>")[1] for text in asked]
    assert 0.2 < fmean("it says." in end.split("<think>")[1].split("</think>")[0] for end in ends) < 0.8
    assert any("<search>" in end for end in ends)


def test_at_a_hop_the_notes_are_asked_at_most_once():
    world = build_world(0)
    always = type("Always", (random.Random,), {"random": lambda self: 0.0})()
    for q in world.questions["train"][:50]:
        asked, choose = world.asked[q.id], asking(lambda *state: "trust", always)
        one = episode(asked, choose)
        acts = []
        try:
            acts.append(next(one))
            while True:
                acts.append(one.send([]))
        except StopIteration:
            pass
        assert len(set(acts)) == len(acts) <= len(asked.relations) and RECALL in asked_for(acts)


def asked_for(acts):
    return [RECALL for act in acts if type(act).__name__ == "Recalled"]


def test_what_is_trained_is_what_the_model_writes(policy):
    made = list(demonstrations(policy, build_world(recollection.FIRST_WORLD), random.Random(0), 30))
    environment = SearchEnvironment(tools_of([None, Recall(None, name=RECALL)]), prompt=policy.prompt)
    for t in made:
        assert policy.decode(t.prompt_ids) == policy.decode(policy.encode(policy.chat(environment.reset(t.question))))
        wrote = policy.decode([i for i, m in zip(t.completion_ids, t.mask) if m])
        assert "<information>" not in wrote and wrote.endswith("</answer>")


def test_the_adapter_that_ships_recalls_and_reads(tmp_path, world, engine):
    policy = load_policy("data/tiny_qwen", adapter=ADAPTER)
    store = MemoryStore(tmp_path)
    store.add([Note(passage) for passage in world.passages])
    blank = [q for q in world.questions["validation"] if q.source == "almanac/1-hop/0" and q.passages]
    blank = [q for q in blank if any(p.id in q.passages for p in world.passages)][:40]
    limits = {"topk": 3, "max_turns": 3, "max_turn_tokens": 110}
    how = {"num_generations": 4, "generator": torch.Generator().manual_seed(0)} | limits
    done = rollout(policy, blank, [engine, Recall(store, name=RECALL)], **how)
    first = [t.calls[0].tool if t.calls else "answer" for t in done]
    assert 0.1 < fmean(tool == RECALL for tool in first) < 0.9 and first.count("search")
    found = [
        t for t in done if t.calls and t.calls[0].tool == RECALL and t.question.passages[0] in ids(t.calls[0].result)
    ]
    score(Discounted(0.2, 0.1), found).keep(found)
    assert len(found) > 20 and fmean(t.reward > 0.1 for t in found) > 0.5
    assert fmean(t.invalid_turns > 0 for t in done) < 0.05


def ids(hits):
    return [hit.passage.id for hit in hits]


@pytest.fixture(scope="module")
def experiment():
    return SimpleNamespace(**runpy.run_path("experiments/memory.py"))


def test_a_cache_makes_cheap_what_was_asked_in_the_same_words(experiment):
    world, cached, searched = build_world(0), experiment.Cached(0.5), 1 - PRICE
    known = {passage.id for passage in noted(world.passages, 0.5, 0)}
    single = [q for q in world.questions["train"] if len(world.asked[q.id].relations) == 1 and q.passages]
    for before in (True, False):
        q = next(q for q in single if (q.passages[0] in known) == before)
        (hop,) = world.asked[q.id].hops()
        calls = [ToolCall("search", query(*hop, short=short), []) for short in (False, True)]
        done = [Trajectory(q, [], [], [], [], calls=calls, answer=a) for a in (q.answers[0], "unknown", "no")]
        assert cached(done) == pytest.approx([searched * (0.98 if before else searched), 0.1, 0.0])


def test_old_notes_are_wrong_and_say_their_age(experiment, policy):
    world = build_world(0)
    _, memory = experiment.methods["old_dated"].engine(policy, BM25Search(world.passages))
    notes = {note.passage.id: note for note in memory.store.notes()}
    assert len(notes) == len(world.passages)
    single = [q for q in world.questions["train"] if len(world.asked[q.id].relations) == 1 and q.passages]
    holds = {
        old: [q.answers[0] in notes[q.passages[0]].passage.text for q in single if is_old(q, notes) == old]
        for old in (True, False)
    }
    assert fmean(holds[False]) == 1 and fmean(holds[True]) < 0.02
    assert 0.4 < len(holds[True]) / len(single) < 0.6
    memory.rewind(0)
    memory.merge([], 7)  # as the trainer does, step by step
    (shown,) = memory.run([world.passages[0].title], 3)
    assert {p.title.rpartition(" (noted ")[2] for p in shown} <= {"50 steps ago)", "1 steps ago)"}
    assert len(memory.store.notes()) == len(world.passages)


def is_old(q, notes):
    return notes[q.passages[0]].time == 0
