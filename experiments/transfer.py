"""What a policy that learned in one world does in others, unchanged: other truths, other engines, another price.

    python experiments/transfer.py runs/cpu/default/trainings/default-0.3-* --out experiments/results/transfer.json

Of each training, and of the model that all began as: choice regret, reward and V* on questions of the test split at
temperature 1, how it asks, and when it searches. V* is always that of the skill and the engine of the shipped almanac,
so where an engine finds more or less, the difference V* - reward says so and the regret does not.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from searchr1_lib.files import write_json
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.search.dense import DenseSearch
from searchr1_lib.study.compare import MODEL, examine
from searchr1_lib.study.regret import Yardstick, by_level, by_own_skill, queries, skill_of, table
from searchr1_lib.training.policy import load_policy
from searchr1_lib.worlds.almanac import PRICE, UNKNOWN_PAYS, build_world, near_duplicates

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("trainings", type=Path, nargs="+")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--questions", type=int, default=400, help="of the test split, two rollouts each")
args = parser.parse_args()

torch.set_num_threads(1)
how = {"split": "test", "questions": args.questions, "rollouts": 2}
world, others = build_world(0), build_world(1)
more = near_duplicates("data/almanac", 20)[:10_000]
yardstick = Yardstick(world, skill_of(MODEL), PRICE, UNKNOWN_PAYS)
bm25 = BM25Search(world.passages)
PLACES = {
    "as it was trained": (yardstick, bm25, {}),
    "other truths": (replace(yardstick, world=others), BM25Search(others.passages), {}),
    "dense retrieval": (yardstick, DenseSearch(world.passages), {}),
    "1 document": (yardstick, bm25, {"topk": 1}),
    "5 documents": (yardstick, bm25, {"topk": 5}),
    f"{len(more)} further passages": (yardstick, BM25Search(world.passages + more), {}),
    "price 0.15": (replace(yardstick, price=0.15), bm25, {}),
}
newest = lambda run: max(run.glob("checkpoints/step_*"), key=lambda folder: int(folder.name.split("_")[1]))
policies = {"the start": load_policy(MODEL, device="cpu")}
policies |= {run.name: load_policy(MODEL, adapter=newest(run), device="cpu") for run in args.trainings}
rows = []
for place, (here, engine, limits) in PLACES.items():
    for name, policy in policies.items():
        done = examine(policy, engine, here, how | {"limits": limits})
        figures = table(here, done)
        row = {"place": place, "policy": name}
        row |= {figure: fmean(each[figure] for each in figures) for figure in ("regret", "reward", "best")}
        rows.append(row | {of.__name__: of(here, done) for of in (by_level, by_own_skill, queries)})
        print(place, name, {figure: round(row[figure], 3) for figure in ("regret", "reward", "best")}, flush=True)
        write_json(args.out, rows)
