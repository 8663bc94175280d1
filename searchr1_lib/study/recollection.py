"""A short warm start for recalls: an adapter of the tiny Qwen that can look among its notes, and cannot choose.

As in the warm start a coin falls: at every hop the demonstrations ask the notes, search, or trust. Of the passages of a
world half are in the notes, so that a recall brings the passage as often as not. The truths are those of worlds of its
own; the weights stay as they are.

    searchr1 recollection --out runs/tiny_qwen_recall
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from ..environment.limits import Count
from ..environment.memory import Recall
from ..environment.search import SearchEnvironment, tools_of
from ..files import write_json
from ..records import Passage, Trajectory
from ..worlds.almanac import World, build_world
from ..worlds.prepare import check_out
from .baselines import fine_tune, save_taught, written
from .warmstart import RECALL, Choose, coin, episode, play

#: How often the notes are asked at a hop, before anything else.
ASKS = 0.4
#: The first world of the demonstrations; those of a warm start begin at 1,000 times its seed plus one.
FIRST_WORLD = 900_000
OWN = ("recollection.json", "adapter_config.json", "adapter_model.safetensors")


def noted(passages: list[Passage], share: float, seed: int) -> list[Passage]:
    """The passages that are in the notes: each with chance ``share``."""
    rng = random.Random(f"notes/{seed}")
    return [passage for passage in passages if rng.random() < share]


def asking(choose: Choose, rng: random.Random) -> Choose:
    """``choose``, but that at each hop the notes may be asked first."""
    asked: set[int] = set()

    def first_the_notes(question, chain, number, searches, tried):
        if number < len(question.relations) and not tried and number not in asked and rng.random() < ASKS:
            asked.add(number)
            return RECALL
        return choose(question, chain, number, searches, tried)

    return first_the_notes


def demonstrations(policy, world: World, rng: random.Random, count: int, share: float = 0.5) -> Iterator[Trajectory]:
    """``count`` demonstrations on one world, a half of whose passages are in the notes."""
    from ..search.bm25 import BM25Search

    engine, notes = BM25Search(world.passages), BM25Search(noted(world.passages, share, world.seed))
    environment = SearchEnvironment(tools_of([engine, Recall(None, name=RECALL)]), prompt=policy.prompt)
    drawn = rng.sample([q for part in world.questions.values() for q in part], count)
    how = ((q, episode(world.asked[q.id], asking(coin(rng), rng)), rng.choice((1, 2, 3, 3, 3))) for q in drawn)
    for q, pieces in play(how, engine, notes):
        yield written(policy, q, pieces, policy.chat(environment.reset(q)))


def teach(policy, *, worlds: int = 8, count: int = 400, epochs: int = 2, seed: int = 0) -> list[float]:
    """Fine-tune the adapter of a policy on demonstrations; the loss of each update."""
    rng = random.Random(seed)
    made = [t for n in range(worlds) for t in demonstrations(policy, build_world(FIRST_WORLD + n), rng, count)]
    return fine_tune(policy, made, epochs=epochs, learning_rate=1e-3, seed=seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="data/tiny_qwen")
    parser.add_argument("--worlds", type=Count, default=8)


def run(args: argparse.Namespace) -> None:
    """Teach the tiny Qwen to ask its notes, and write the adapter."""
    from ..training.policy import load_policy

    check_out(args.out, OWN, args.model)
    policy = load_policy(args.model)
    losses = teach(policy, worlds=args.worlds)
    save_taught(policy, args.out)
    write_json(args.out / OWN[0], {"model": args.model, "worlds": args.worlds, "losses": [round(x, 4) for x in losses]})
    print(f"wrote {args.out}; loss {losses[0]:.3f}, then {losses[-1]:.3f}")
