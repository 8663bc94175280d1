"""A training step of two authors against one: two LoRA adapters on one model, each with its own loss, and one adapter.

64 rollouts of the almanac (8 questions x 8), half of them answered wrongly; both samplers are made to write the same
text (see ``bench_step``). Tokens and masks are compared. Two may take at most 1.3 of one.

    python tests/benchmarks/bench_two.py [--steps 3] [--size 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile

from bench_rollout import TINY_QWEN, almanac
from bench_step import PARTS, Ours, half_wrong

from searchr1_lib.training.policy import load_policy

WAYS = {"one": (), "two": ("reason", "search")}


def main(argv: list[str] | None = None) -> dict:
    """Medians of seconds over the steps of each, taken in turn after one that does not count; prints a line a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_QWEN))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=8, help="questions, and rollouts of each")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        ways = {}
        for name, adapters in WAYS.items():
            policy = load_policy(args.model, adapters=adapters, device="cpu")
            _, script, engine = almanac(policy, args.size, args.size)
            ways[name] = Ours(policy, half_wrong(policy, script), engine, args.size, f"{folder}/{name}")
        for _ in range(args.steps + 1):
            for way in ways.values():
                way.step()
    one, two = ways.values()
    assert one.made() == two.made(), "other tokens or masks"
    wrote = {author: sum(sum(t.mask_of(author)) for t in two.trajectories) for author in WAYS["two"]}
    figures: dict = {"rollouts": len(one.trajectories), "tokens": wrote}
    for part in PARTS:
        for kind, unit in enumerate(("s", "cpu_s")):
            a, b = (statistics.median(row[part][kind] for row in way.clock.parts()[1:]) for way in ways.values())
            figures[f"{part}_{unit}"] = {"one": a, "two": b, "two_over_one": b / a}
            print(f"  {part:10} {unit:5} one {a:6.3f}, two {b:6.3f} = {b / a:4.2f}x", flush=True)
    return figures


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
