"""GRPO on a real Qwen on a CPU: trained with the profile laptop, examined before and after on the test questions.

    searchr1 form --model FOLDER --out runs/form --questions 160 --lora-r 8
    python experiments/real.py --model FOLDER --adapter runs/form --out runs/real --steps 21 -p max_turns=1

Started again, also with more steps, it goes on. In OUT then stand the exams (``before``, ``after``), the run's folder
``train``, and in ``shipped`` what fits into a repository: the adapter in bf16, the metrics, and what was made of which
model.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from searchr1_lib import Trainer, load_policy
from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.files import TrajectoryLog, read_json, write_json, write_json_lines
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.analysis import change_table, changes
from searchr1_lib.study.baselines import save_taught
from searchr1_lib.study.evaluate import evaluate
from searchr1_lib.suite.profiles import load_profile, read_given

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
parser.add_argument("--name", help="what the base is called in what is shipped; --model where nothing is given")
parser.add_argument("--adapter", type=Path, required=True, help="as `searchr1 form` writes it")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="in place of the profile's")
args = parser.parse_args()

p = load_profile("laptop", **read_given(args.p) | {"model": args.model, "steps": args.steps})
home, reward = Path(p.data), p.make_reward()
# A model of half a billion weights never follows two facts here, with or without searches: nothing to learn from.
train, test = ([q for q in load_questions(home / f"{split}.jsonl") if q.hops == 1] for split in ("train", "test"))
engine = BM25Search(load_passages(home / "passages.jsonl"))
policy = load_policy(args.model, adapter=args.adapter)


def exam(name: str) -> list:
    """Two rollouts a test question at temperature 1; made once."""
    log = args.out / f"{name}.jsonl"
    if not log.exists():
        done = evaluate(policy, test, engine, temperature=1.0, num_generations=2, reward=reward, **p.limits())
        print(f"{name}\n{done}", flush=True)
        write_json_lines(log, [t.to_dict() for t in done.trajectories])
    return list(TrajectoryLog(log))


args.out.mkdir(parents=True, exist_ok=True)
before = exam("before")
trainer = Trainer(policy, train, engine, reward, p.settings(), args.out / "train")
trainer.train()
after = exam("after")
shipped = args.out / "shipped"
save_taught(policy, shipped)
name = args.name or args.model
config = read_json(shipped / "adapter_config.json") | {"base_model_name_or_path": name}
write_json(shipped / "adapter_config.json", config)
weights = {key: w.to(torch.bfloat16) for key, w in load_file(shipped / "adapter_model.safetensors").items()}
save_file(weights, shipped / "adapter_model.safetensors", metadata={"format": "pt"})
write_json_lines(shipped / "metrics.jsonl", trainer.metrics)
figures = changes(before, after)
made = {"base": name, "settings": p.settings().model_dump(), "reward": repr(reward)}
write_json(shipped / "made_by.json", made | {"test": [change._asdict() for change in figures]})
print(change_table(figures))
