"""Researchers asked in one batch against one by one: 64 rollouts of a coordinator that are made to search.

The outer rollouts differ a little, because other researchers answer; so seconds are given a token that was sampled
inside. Asked: at least 5 times as fast.

    python tests/benchmarks/bench_researcher.py [--rollouts 64]
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.compare import LIMITS
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.researcher import ResearcherEngine
from searchr1_lib.training.rollout import rollout
from searchr1_lib.worlds.almanac import build_world, question_for, sample_questions


class OneByOne:
    """The same researcher, each query by itself; its seconds and tokens are counted, as the batched one's are."""

    timed, authors = False, ()

    def __init__(self, engine, alone: bool):
        self.engine, self.alone, self.seconds, self.tokens = engine, alone, 0.0, 0

    def search_batch(self, queries, k=3):
        started = time.perf_counter()
        parts = [[query] for query in queries] if self.alone else [queries]
        found = [hits for part in parts for hits in self.engine.search_batch(part, k)]
        self.seconds += time.perf_counter() - started
        self.tokens += sum(sum(one.inner.mask) for one in found)
        return found


def main(argv: list[str] | None = None) -> dict:
    """Prints and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=64)
    args = parser.parse_args(argv)
    world, policy = build_world(0), load_policy("data/tiny_qwen", device="cpu")
    asked = sample_questions(world, "train", args.rollouts // 8, seed=0)
    figures = {}
    for name, alone in (("in a batch", False), ("one by one", True)):
        how = {"question_of": question_for, "first_action": "search", **LIMITS}
        engine = OneByOne(ResearcherEngine(policy, BM25Search(world.passages), **how), alone)
        generator = torch.Generator().manual_seed(0)
        rollout(policy, asked, engine, first_action="search", generator=generator, **LIMITS)
        figures[name] = {
            "s": engine.seconds,
            "tokens": engine.tokens,
            "ms a token": 1000 * engine.seconds / engine.tokens,
        }
    figures["times as fast"] = figures["one by one"]["ms a token"] / figures["in a batch"]["ms a token"]
    print(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    main()
