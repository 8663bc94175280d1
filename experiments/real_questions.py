"""A real model on real questions, with BM25 over their passages: answered at once, after one search, by its own loop.

    python experiments/real_questions.py --model FOLDER --adapter data/real/qwen_grpo --data DATA --out runs/hotpotqa

DATA holds ``questions.jsonl`` and ``corpus.jsonl``. Exact match and F1 of greedy answers, with 95 % intervals over the
questions, and why the loop's answers are wrong; OUT keeps the rollouts of each way, for the viewer.
"""

import argparse
from pathlib import Path
from statistics import fmean

from searchr1_lib import load_policy
from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.files import write_json, write_json_lines
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.analysis import bootstrap, errors
from searchr1_lib.study.baselines import answer_with

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
parser.add_argument("--adapter", type=Path, help="in PEFT's format")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()

WAYS = {"at once": "direct", "one search, with the question": "rag", "its own loop": "grpo"}
questions, passages = load_questions(args.data / "questions.jsonl"), load_passages(args.data / "corpus.jsonl")
policy, engine = load_policy(args.model, adapter=args.adapter), BM25Search(passages)
limits = {"max_turns": 3, "max_turn_tokens": 128, "max_completion_length": 2000, "batch_size": 32}
args.out.mkdir(parents=True, exist_ok=True)
rows = []
for way, method in WAYS.items():
    report = answer_with(method, policy, questions, engine, **limits)
    write_json_lines(args.out / f"{method}.jsonl", [t.to_dict() for t in report.trajectories])
    row: dict = {"way": way, "searches": fmean(of["searches"] for of in report.rows)}
    for figure in ("em", "f1"):
        values = [of[figure] for of in report.rows]
        row[figure] = [fmean(values), *bootstrap(values)]
    rows.append(row)
    print(way, row, flush=True)
causes = {cause: len(found) for cause, found in errors(report.trajectories, {p.id: p for p in passages}).items()}
print(causes)
write_json(args.out / "figures.json", {"ways": rows, "why the loop is wrong": causes})
