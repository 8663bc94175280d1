"""From the shipped almanac to a million passages: what engines cost and find, and what becomes of a policy's choice.

    python experiments/corpus.py --out experiments/results/corpus.json --sizes 10000 100000 1000000

Further passages are about others than the almanac's (``further_passages``), so nothing that is asked changes; what
grows is the number of those who bear the same surname. For each size: building an index in a process of its own
(seconds, bytes on disk, peak memory with and before it), the share of hops whose passage is among three documents, by
wording, and the time of a query and of a batch of 64. Then, with BM25, unchanged policies at temperature 1. The
*oracle* holds only the passages that the asked questions need: what is lost with it is the policy's alone.
"""

import argparse
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from searchr1_lib.files import write_json
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.search.sqlite import SQLiteSearch
from searchr1_lib.study.compare import MODEL, examine
from searchr1_lib.study.regret import Yardstick, by_own_skill, queries, skill_of, table
from searchr1_lib.training.policy import load_policy
from searchr1_lib.worlds.almanac import PRICE, UNKNOWN_PAYS, build_world, further_passages, query, sample_questions

OPEN = {"bm25": BM25Search.load, "sqlite": SQLiteSearch}
K, CALLS, BATCH = 3, 200, 64


def peak_mib() -> float:
    """Of this process; what getrusage gives would hold its parent's too."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def build(kind: str, size: int, folder: Path) -> dict[str, float]:
    """Make an index of the almanac and further passages; the time leaves their invention out."""
    world = build_world(0)
    passages = [*world.passages, *islice(further_passages(world), size - len(world.passages))]
    before, begun = peak_mib(), time.perf_counter()
    if kind == "bm25":
        BM25Search(passages).save(folder)
    else:
        SQLiteSearch(folder).add(passages)
    seconds = time.perf_counter() - begun
    size_on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"build_s": seconds, "bytes": size_on_disk, "peak_mib": peak_mib(), "passages_mib": before}


def ask(engine, hops) -> dict[str, float]:
    """Share of the hops whose passage is found, by wording; milliseconds of a query and of a batch."""
    found = {}
    for name, short in (("full", False), ("short", True)):
        hits = engine.search_batch([query(*hop, short=short) for hop in hops], K)
        found[name] = fmean(e.passage in {hit.passage.id for hit in each} for (e, _), each in zip(hops, hits))
    asked = [query(*hop, short=False) for hop in hops[:CALLS]]
    times = []
    for text in asked:
        begun = time.perf_counter()
        engine.search(text, K)
        times.append(1000 * (time.perf_counter() - begun))
    begun = time.perf_counter()
    for start in range(0, len(asked), BATCH):
        engine.search_batch(asked[start : start + BATCH], K)
    batch = 1000 * (time.perf_counter() - begun) * BATCH / len(asked)
    return found | {"median_ms": float(np.median(times)), "p95_ms": float(np.quantile(times, 0.95)), "batch_ms": batch}


def examined(policies, engine, yardstick, how) -> list[dict]:
    rows = []
    for name, policy in policies.items():
        done = examine(policy, engine, yardstick, how)
        figures = table(yardstick, done)
        each = {figure: [round(row[figure], 4) for row in figures] for figure in ("regret", "reward", "best")}
        means = {figure: fmean(values) for figure, values in each.items()}
        of_all = {of.__name__: of(yardstick, done) for of in (by_own_skill, queries)}
        rows.append({"policy": name} | means | of_all | {"each": each})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--engines", nargs="+", choices=OPEN, default=list(OPEN))
    parser.add_argument("--questions", type=int, default=400, help="of the test split, two rollouts each")
    parser.add_argument("--adapter", default="data/tiny_qwen_grpo", help="the trained policy")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world, how = build_world(0), {"split": "test", "questions": args.questions, "rollouts": 2}
    if few := [size for size in args.sizes if size < len(world.passages)]:
        parser.error(f"--sizes: {few[0]} is less than the almanac has")
    yardstick = Yardstick(world, skill_of(MODEL), PRICE, UNKNOWN_PAYS)
    asked = sample_questions(world, "test", args.questions, seed=0)
    hops = [hop for q in asked for hop in world.asked[q.id].hops() if hop[0].passage]
    policies = {"the start": load_policy(MODEL, device="cpu")}
    policies["trained"] = load_policy(MODEL, adapter=args.adapter, device="cpu")
    needed = {e.passage for e, _ in hops}
    oracle = BM25Search([p for p in world.passages if p.id in needed])
    rows = [{"size": len(needed), "engine": "oracle", "policies": examined(policies, oracle, yardstick, how)}]
    with tempfile.TemporaryDirectory() as home:
        for size in (len(world.passages), *args.sizes):
            for kind in args.engines:
                folder = Path(home, f"{kind}-{size}")
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
                    row = {"size": size, "engine": kind} | apart.submit(build, kind, size, folder).result()
                engine = OPEN[kind](folder)
                row |= ask(engine, hops)
                row |= {"policies": examined(policies, engine, yardstick, how)} if kind == "bm25" else {}
                rows.append(row)
                print(row, flush=True)
                write_json(args.out, rows)


if __name__ == "__main__":
    main()
