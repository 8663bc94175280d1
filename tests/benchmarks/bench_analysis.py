"""Notebook 06 on a long training log: time and memory to read 50,000 rollouts and draw what it draws from them.

The log is made of real rollouts of the tiny Qwen, written again and again with other steps, probabilities and
rewards, so that its lines have the size that a training under the profile cpu leaves. ``table`` is what notebook 06
does; ``whole`` reads every rollout with its tokens, for comparison. Each runs in a process of its own.

    python tests/benchmarks/bench_analysis.py [--rollouts 50000] [--keep FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 800  # 64 rollouts a step, as under the profile cpu
LIMIT = {"seconds": 20, "MiB": 2048}


def write_log(path: Path, rollouts: int) -> None:
    """A log of so many lines, from a few hundred real rollouts."""
    from searchr1_lib.data import load_passages, load_questions
    from searchr1_lib.rewards import SearchR1Reward, score
    from searchr1_lib.search import BM25Search
    from searchr1_lib.training.policy import load_policy
    from searchr1_lib.training.rollout import rollout

    engine = BM25Search(load_passages("data/almanac/passages.jsonl"))
    questions = load_questions("data/almanac/train.jsonl")[:96]
    real = [
        t
        for i in (0, 48)
        for t in rollout(load_policy(), questions[i : i + 48], engine, num_generations=4, max_turn_tokens=128)
    ]
    score(SearchR1Reward(), real).keep(real)
    rows, rng = [t.to_dict() for t in real], random.Random(0)
    with open(path, "w", encoding="utf-8") as f:
        for i in range(rollouts):
            row = dict(rng.choice(rows))
            logprobs = [p * rng.uniform(0.5, 1.5) for p in row["logprobs"]]
            row |= {"logprobs": logprobs, "step": i * STEPS // rollouts, "group": f"{i // 8}"}
            f.write(json.dumps(row) + "\n")


def table(path: str) -> dict:
    from searchr1_lib.data import load_passages
    from searchr1_lib.study import analysis, plots

    log = analysis.read_table(path, {p.id: p for p in load_passages("data/almanac/passages.jsonl")})
    read = time.perf_counter()
    figures = [
        plots.outcomes(log["step"], log["em"], log["searches"], log["known"]),
        plots.calibration({"all": analysis.calibration(log["sureness"], log["em"])}),
    ]
    sizes = [len(plots.png(fig)) for fig in figures]
    examples = [log.trajectory(log.of_error(cause)[0]) for cause in analysis.ERRORS if len(log.of_error(cause))]
    return {"rollouts": len(log), "read": read, "figures": len(sizes), "examples": len(examples)}


def whole(path: str) -> dict:
    from searchr1_lib.files import TrajectoryLog

    return {"rollouts": len(TrajectoryLog(path).read()), "read": time.perf_counter()}


def child(way: str, path: str, rollouts: str) -> None:
    if way == "write":
        return write_log(Path(path), int(rollouts))
    start = time.perf_counter()
    found = {"table": table, "whole": whole}[way](path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(
        json.dumps(
            found
            | {
                "read": found["read"] - start,
                "seconds": time.perf_counter() - start,
                "CPU seconds": time.process_time(),
                "MiB": peak,
            }
        )
    )


def main() -> dict:
    """Make the log, read it both ways, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=50_000)
    parser.add_argument("--keep", metavar="FILE", help="keep the log there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.chdir(ROOT)
    if asked.child:
        return child(*asked.child)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(asked.keep or Path(folder) / "log.jsonl")

        def run(way: str) -> str:  # the peak of a child counts its parent's memory too: this one stays small
            command = [sys.executable, __file__, "--child", way, str(path), str(asked.rollouts)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout

        run("write")
        figures = {"rollouts": asked.rollouts, "log MiB": path.stat().st_size / 2**20}
        print(f"{asked.rollouts} rollouts, {figures['log MiB']:.0f} MiB", flush=True)
        for way in ("table", "whole"):
            figures[way] = f = json.loads(run(way).splitlines()[-1])
            print(
                f"{way:6} read {f['read']:5.1f} s   in all {f['seconds']:5.1f} s, {f['CPU seconds']:5.1f} of CPU   "
                f"peak {f['MiB']:6.0f} MiB",
                flush=True,
            )
    for what in ("CPU seconds", "MiB"):
        figures[f"{what} table/whole"] = ratio = figures["table"][what] / figures["whole"][what]
        print(f"{what:12} table / whole {ratio:.2f}")
    met = all(figures["table"][what] < most for what, most in LIMIT.items())
    print(f"under {LIMIT['seconds']} s and {LIMIT['MiB']} MiB: {'yes' if met else 'NO'}")
    return figures


if __name__ == "__main__":
    main()
