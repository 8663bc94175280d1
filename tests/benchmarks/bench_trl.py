"""The whole way in TRL, on two processes: the tiny Qwen learns when to search, to the same kind of figures as ours.

Both train with the same settings, without ``explore`` (TRL has none), from the same seed; TRL under accelerate launch.

    python tests/benchmarks/bench_trl.py [--steps 150] [--data data/almanac]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

from searchr1_lib import LocalSearch, Settings, Trainer, load_policy, load_questions
from searchr1_lib.files import read_json_lines

SHOWN = ("reward", "em", "searches_known", "searches_lookup", "malformed")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--main_process_port", "0", "-m", "searchr1_lib", "trl"]


def main(argv: list[str] | None = None) -> dict:
    """Train both, print a line each, return the means over the last ten steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--model", default="data/tiny_qwen")
    parser.add_argument("--data", type=Path, default=Path("data/almanac"))
    args = parser.parse_args(argv)
    settings = {"steps": args.steps, "learning_rate": 1.5e-3, "max_turn_tokens": 128, "kl_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        told = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        files = [
            "--model",
            args.model,
            "--engine",
            args.data,
            "--data",
            args.data / "train.jsonl",
            "--out",
            f"{folder}/trl",
        ]
        started = time.perf_counter()
        subprocess.run([*LAUNCH, *map(str, files), *told], check=True, stdout=subprocess.DEVNULL)
        seconds = {"TRL, two processes": time.perf_counter() - started}
        rows = {"TRL, two processes": list(read_json_lines(Path(folder) / "trl" / "metrics.jsonl"))}
        questions, engine = load_questions(args.data / "train.jsonl"), LocalSearch(args.data)
        started = time.perf_counter()
        policy = load_policy(args.model, device="cpu")
        ours = Trainer(policy, questions, engine, None, Settings(**settings), f"{folder}/ours", report=None)
        ours.train()
        seconds["ours"], rows["ours"] = time.perf_counter() - started, ours.metrics
    figures = {}
    for name, steps in rows.items():
        mean = lambda key, part: fmean(row[key] for row in part if row[key] is not None)
        figures[name] = {key: (mean(key, steps[:10]), mean(key, steps[-10:])) for key in SHOWN}
        told = ", ".join(f"{key} {first:.2f} to {last:.2f}" for key, (first, last) in figures[name].items())
        print(f"{name}: {len(steps)} steps in {seconds[name]:.0f} s; {told}")
    return figures


if __name__ == "__main__":
    main()
