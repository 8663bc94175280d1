"""A training step with each way to give credit over one with the outcome's, on the same number of rollouts.

    python tests/benchmarks/bench_credit.py [--steps 5] [--questions FILE --passages FILE]

The policy stays what it is (learning rate 1e-12), so every way trains on rollouts of the same kind; the ways take
turns, step by step, so that a busy machine slows down all of them alike. Printed: the median of the seconds of a step,
of its rollouts and of its update, each over that of "rollout" in the same round, and the tokens sampled.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import get_args

import torch

from searchr1_lib import BM25Search, Settings, Trainer, load_passages, load_policy, load_questions
from searchr1_lib.rewards import HierarchicalReward
from searchr1_lib.training.settings import Credit

ALMANAC = Path(__file__).resolve().parents[2] / "data" / "almanac"
PARTS = ("seconds", "seconds_rollout", "seconds_update", "sampled_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="of each way, beside one to warm up")
    parser.add_argument("--questions", default=ALMANAC / "train.jsonl")
    parser.add_argument("--passages", default=ALMANAC / "passages.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    questions, engine = load_questions(args.questions), BM25Search(load_passages(args.passages))
    questions = [q for q in questions if q.hops > 1] or questions  # several turns: there is something to credit
    ways = {name: {"credit": name, "trees": 2 * (name == "tree_grpo")} for name in get_args(Credit)}
    ways["replay"] = {"replay_groups": 4}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, way in ways.items():
            settings = Settings(steps=args.steps + 1, learning_rate=1e-12, max_turns=3, kl_every=0, **way)
            how = {"settings": settings, "run_dir": Path(folder) / name, "report": None}
            trainers[name] = Trainer(load_policy(), questions, engine, HierarchicalReward(), **how)
        rounds = [{name: t._one_step() for name, t in trainers.items()} for _ in range(args.steps + 1)][1:]
    print(f"{'':12}" + "".join(f"{part:>17}" for part in PARTS))
    for name in ways:
        ratios = [statistics.median(row[name][part] / row["rollout"][part] for row in rounds) for part in PARTS]
        print(f"{name:12}" + "".join(f"{ratio:17.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
