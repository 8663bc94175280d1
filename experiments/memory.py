"""Does a policy ask its notes where they hold something, and leave them alone where they hold nothing?

    searchr1 recollection --out runs/tiny_qwen_recall
    python experiments/memory.py --out runs/cpu/memory --seeds 0 1 2 3 4

Of all passages a share rho is in the notes, in training and after it, as if so many entities had been asked about
before. Questions of one hop; a recall costs 0.02 of a right answer, a search 0.3. Half the steps of the default
training, from the adapter that was taught to recall by a coin. Regret is measured against an optimum that may ask the
notes as well, and takes them to bring a passage with rho times the chance of a search.

"no_notes" has the engine alone. "cache" has it too, and is trained with half of the queries in a cache, which answers
what was asked before in the same words for the price of a recall; cache.json has what both of them earn with each rho
in such a cache.

"rho_0.5_explore" puts a search and an answer into each group for the first half of the steps, so that neither is given
up for the cheap recalls before they were compared.

"old" and "old_dated" have a note of every passage. Of half of them it is fifty steps old, and what it says is not true
any more; "old_dated" is told the age of each. (Their regret says nothing: it takes an old note for a good one.)

Notebook 11 reads what this leaves, or what ships in experiments/results/memory (of the former world).
"""

import argparse
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from searchr1_lib.environment.memory import Recall
from searchr1_lib.files import write_json
from searchr1_lib.metrics import grouped, normalize_answer
from searchr1_lib.records import Note
from searchr1_lib.rewards import Discounted
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.search.memory import MemoryStore
from searchr1_lib.study.compare import MODEL, Method, compare, examine
from searchr1_lib.study.recollection import noted
from searchr1_lib.study.regret import Yardstick, skill_of
from searchr1_lib.study.warmstart import RECALL
from searchr1_lib.training.policy import load_policy
from searchr1_lib.worlds.almanac import PRICE, UNKNOWN_PAYS, build_world, query
from searchr1_lib.worlds.optimum import UNKNOWN, Notes

SHORT = {"scale_rewards": "batch", "steps": 30, "decay_steps": 15}
RHOS = (0.0, 0.5, 0.9)
RECALL_COSTS = 0.02
ADAPTER = "data/tiny_qwen_recall"
mixture = {"1-hop": 1.0}


class Cached(Discounted):
    """A cache stands before the engine: in it is what was asked before, in full words, of a share of all passages."""

    name = "cached"

    def __init__(self, rho):
        super().__init__(PRICE, UNKNOWN_PAYS)
        self.rho, world = rho, build_world(0)
        known = {passage.id for passage in noted(world.passages, rho, 0)}
        hops = (hop for asked in world.asked.values() for hop in asked.hops())
        self._before = {query(entity, relation, short=False) for entity, relation in hops if entity.passage in known}

    def value(self, trajectory):
        earned = super().value(trajectory)
        if normalize_answer(trajectory.answer or "") == UNKNOWN:
            return earned
        again = sum(call.argument in self._before for call in trajectory.searches)
        return earned * ((1 - RECALL_COSTS) / (1 - PRICE)) ** again


class Standing(Recall):
    """Notes that nothing is added to, and that do not age."""

    now = property(lambda self: 50, lambda self, step: None)

    def merge(self, trajectories, step):
        pass

    def rewind(self, step):
        pass


def recalling(notes, found, kind=Recall, settings=SHORT, **how):
    """Trained with these notes of all passages."""

    def tools(policy, engine):
        store = MemoryStore(tempfile.mkdtemp())
        store.add(notes(engine.passages))
        return [engine, kind(store, rule="nothing", name=RECALL, **how)]

    expected = Notes(found * skill_of(MODEL).found[0], RECALL_COSTS, RECALL)
    return Method(settings, engine=tools, notes=expected, policy={"adapter": ADAPTER})


def half_of_them_old(passages):
    """Each passage as it is, or half of them as they may have been: other answers to what is asked of them."""
    rng, world = random.Random("old"), build_world(0)
    before = {p.id: p for p in passages if rng.random() < 0.5}
    asked = [(q, world.asked[q.id].relations) for part in world.questions.values() for q in part]
    single = [(q, relations[0]) for q, relations in asked if len(relations) == 1]
    alike = grouped(single, lambda pair: pair[1])
    for q, relation in single:
        for passage in (before[id] for id in q.passages if id in before):
            others = [other.answers[0] for other, _ in alike[relation] if other.answers != q.answers]
            text = passage.text.replace(q.answers[0], rng.choice(others))
            before[passage.id] = replace(passage, text=text)
    return [Note(before.get(p.id, p), time=0 if p.id in before else 49) for p in passages]


def holding(rho, **how):
    return recalling(lambda passages: [Note(passage) for passage in noted(passages, rho, 0)], rho, **how)


methods = {f"rho_{rho:g}": holding(rho) for rho in RHOS}
methods |= {
    "rho_0.5_explore": holding(0.5, settings=SHORT | {"explore": 1, "explore_steps": 15}),
    "no_notes": Method(SHORT, policy={"adapter": ADAPTER}),
    "cache": Method(SHORT, policy={"adapter": ADAPTER}, reward=Cached(0.5)),
    "old": recalling(half_of_them_old, 0.5, Standing),
    "old_dated": recalling(half_of_them_old, 0.5, Standing, show_age=True),
}


def in_a_cache(out, name, seed, questions):
    """What a trained policy earns by the share of what was asked before; its rollouts are the same for all."""
    world = build_world(0)
    adapter = out / "trainings" / f"{name}-{PRICE}-{seed}" / "checkpoints" / f"step_{SHORT['steps']}"
    yardstick = Yardstick(world, skill_of(MODEL), PRICE, UNKNOWN_PAYS)
    how = {"split": "validation", "questions": questions, "rollouts": 2, "mixture": mixture}
    done = examine(load_policy(MODEL, adapter=adapter, device="cpu"), BM25Search(world.passages), yardstick, how, seed)
    earned = {f"{rho:g}": fmean(Cached(rho)(done)) for rho in RHOS}
    return {"method": name, "seed": seed, "searches": fmean(len(t.searches) for t in done), "reward": earned}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--questions", type=int, default=400)
    args = parser.parse_args()
    how = {"prices": [PRICE], "seeds": args.seeds, "questions": args.questions, "mixture": mixture}
    compare(methods, out=args.out, **how)
    pairs = [(name, seed) for name in ("no_notes", "cache") for seed in args.seeds]
    write_json(args.out / "cache.json", [in_a_cache(args.out, *pair, args.questions) for pair in pairs])
