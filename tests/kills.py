"""Long work killed at random moments and started again: does it end where undisturbed work ends?

    python tests/kills.py            # 50 kills altogether; a quarter of an hour on an idle machine
    python tests/kills.py 5 --seed 3 # fewer, at other moments

Each job is a command that is started until it ends by itself; the first start is killed (SIGKILL) at a moment drawn
evenly from the time that it takes undisturbed. What it leaves then has to be what the undisturbed one left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from searchr1_lib.files import TrajectoryLog

ROOT = Path(__file__).resolve().parents[1]
TRAINING = """
import sys
from searchr1_lib import BM25Search, Settings, Trainer, load_passages, load_policy, load_questions
settings = Settings(steps=6, questions_per_step=2, num_generations=4, checkpoint_every=2, max_turn_tokens=48)
engine = BM25Search(load_passages("data/almanac/passages.jsonl"))
questions = load_questions("data/almanac/train.jsonl")[:20]
Trainer(load_policy("data/tiny_qwen"), questions, engine, None, settings, sys.argv[1], report=None).train()
"""
TWO_AUTHORS = TRAINING.replace("max_turn", "per_author=True, max_turn").replace(
    '("data/tiny_qwen")', '("data/tiny_qwen", adapters=("reason", "search"), lora_r=8)'
)
INDEX = """
import sys
from searchr1_lib import DenseSearch, SQLiteSearch, load_passages
from searchr1_lib.search.dense import encode_passages
passages, out = load_passages("data/almanac/passages.jsonl"), sys.argv[1]
SQLiteSearch(f"{out}/sqlite").add(passages)
encode_passages(passages[:700], vectors_dir=f"{out}/vectors")
DenseSearch(passages[:700], vectors_dir=f"{out}/vectors").save(f"{out}/dense")
"""
SWEEP = "profile: smoke\nnotebooks: ['01']\nparameters: {dense_passages: 50}\ngrid: {topk: [1, 3]}\nseeds: [0]\n"
#: By name: the share of the kills, and the command, which writes into the folder OUT.
JOBS = {
    "training": (0.2, [sys.executable, "-c", TRAINING, "OUT"]),
    "two_authors": (0.1, [sys.executable, "-c", TWO_AUTHORS, "OUT"]),
    "index": (0.2, [sys.executable, "-c", INDEX, "OUT"]),
    "prepare": (0.2, "prepare mixed --out OUT/mixed".split()),
    "evaluate": (
        0.2,
        "evaluate --model data/tiny_qwen --engine HOME --data HOME/test.jsonl --limit 24 "
        "--batch-size 4 --max-turn-tokens 64 --out OUT/evaluation".split(),
    ),
    "sweep": (0.1, "sweep HOME/sweep.yaml --jobs 1".split()),
}
TIMES = {"seconds", "seconds_rollout", "seconds_update", "tokens_per_second", "peak_memory_mb"}


def start(command: list[str], out: Path) -> subprocess.Popen:
    words = [word.replace("OUT", str(out)).replace("HOME", str(out.parent)) for word in command]
    words = words if words[0] == sys.executable else [sys.executable, "-m", "searchr1_lib", *words]
    env = os.environ | {"SEARCHR1_RUNS": str(out), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(name: str, process: subprocess.Popen) -> None:
    error = process.communicate()[1].decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{name}: exit {process.returncode}\n{error[-3000:]}")


def outcome(name: str, out: Path) -> dict:
    """What counts of a job's folder, by file: bytes, or rows without times."""
    if name in ("training", "two_authors"):
        newest = max((out / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        weights = {
            str(file.relative_to(newest)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(newest.rglob("adapter_model.safetensors"))
        }
        assert len(weights) == (2 if name == "two_authors" else 1)
        log = [
            (t.completion_ids, t.logprobs, t.mask, t.reward, t.advantages)
            for t in TrajectoryLog(out / "trajectories.jsonl")
        ]
        return {"metrics": kept, newest.name: weights, "log": log}
    if name == "index":
        from searchr1_lib import DenseSearch, SQLiteSearch

        queries = ["Who founded it?", "born in March", "river"]
        engines = {"sqlite": SQLiteSearch(out / "sqlite"), "dense": DenseSearch.load(out / "dense")}
        found = {
            kind: [[h.passage.id for h in hits] for hits in e.search_batch(queries, 5)] for kind, e in engines.items()
        }
        return found | {"passages": len(engines["sqlite"]), "dense": (out / "dense" / "index.faiss").read_bytes()}
    if name == "prepare":
        return {path.name: path.read_bytes() for path in (out / "mixed").iterdir()}
    if name == "evaluate":
        return {"report": json.loads((out / "evaluation" / "report.json").read_text())}
    figures = {
        path.parent.name: json.loads(path.read_text())["01_retriever_build"] for path in out.rglob("summary.json")
    }
    return {run: {k: v for k, v in found.items() if not k.startswith("milliseconds")} for run, found in figures.items()}


def campaign(name: str, kills: int, home: Path, rng: random.Random) -> None:
    command = JOBS[name][1]
    began = time.monotonic()
    finish(name, start(command, home / "whole"))
    duration, whole = time.monotonic() - began, outcome(name, home / "whole")
    assert whole, f"{name} left nothing"
    moments, ended = [], 0
    for number in range(kills):
        out = home / f"killed{number}"
        process = start(command, out)
        moment = rng.uniform(0, duration)
        try:
            process.wait(moment)
            ended += 1
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
        process.communicate()
        finish(f"{name}, killed after {moment:.2f} s of {duration:.2f}", start(command, out))
        again = outcome(name, out)
        differ = [key for key in whole.keys() | again.keys() if whole.get(key) != again.get(key)]
        if differ:
            raise SystemExit(f"{name}, killed after {moment:.2f} s of {duration:.2f}: {differ} differ, see {out}")
        moments.append(moment / duration)
    early, late = min(moments), max(moments)
    print(
        f"{name:12}{kills:4} kills between {early:.0%} and {late:.0%} of {duration:.1f} s, {ended} too late: all equal",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    home, rng = Path(tempfile.mkdtemp()), random.Random(args.seed)
    for name in args.only:
        (home / name).mkdir()
        for file in ("passages", "test"):
            (home / name / f"{file}.jsonl").write_bytes((ROOT / "data" / "almanac" / f"{file}.jsonl").read_bytes())
        (home / name / "sweep.yaml").write_text(SWEEP)
        campaign(name, max(1, round(args.kills * JOBS[name][0])), home / name, rng)


if __name__ == "__main__":
    main()
