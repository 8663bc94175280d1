"""What the house did before its walls were moved: ids, masks, log-probabilities and adapters, kept to compare with.

The model is a seeded Qwen2 of 114,000 weights, random but for 120 steps on made-up turns, and the world has a dozen
passages, both in ``tests/data/house``, so that no later almanac touches them. It searches, answers, forgets tags and
rambles, all by chance.

    python tests/records.py --write FILE          3 seeds, NF4 and fp32, every baseline and loss (5 minutes)
    python tests/records.py --compare FILE FILE   says what differs, and by how much
    python tests/records.py --keep                what the tests compare with: one seed, two steps
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from searchr1_lib import BM25Search, Settings, Trainer, load_passages, load_policy, load_questions
from searchr1_lib.rewards import Composite, ExactMatch, Malformed, SearchCost
from searchr1_lib.training.rollout import rollout

HOUSE = Path(__file__).parent / "data" / "house"
LIMITS = {"max_turns": 2, "max_turn_tokens": 24, "max_observation_tokens": 200, "max_completion_length": 450, "topk": 2}
STEPS = {"steps": 10, "questions_per_step": 3, "num_generations": 4, "learning_rate": 2e-3, "checkpoint_every": 10}
#: Trainings: name -> what differs from the default settings.
TRAININGS = {
    "grpo": {},
    "explore": {"explore": 1, "explore_steps": 10},
    "grpo, batch": {"scale_rewards": "batch"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "rloo": {"baseline": "leave_one_out", "scale_rewards": "none", "loss_type": "bnpo"},
    "reinforce": {"baseline": "none", "scale_rewards": "none"},
    "reinforce++": {"baseline": "batch_mean", "scale_rewards": "batch"},
    "ppo": {"baseline": "value", "scale_rewards": "batch"},
    "turns": {"credit": "return"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "dynamic_sampling": 1, "num_iterations": 2},
    "cispo": {"loss_type": "cispo", "top_entropy_quantile": 0.5},
    "gspo, kl, entropy": {"loss_type": "gspo", "beta": 0.01, "entropy_coef": 0.01},
    "no mask": {"mask_observations": False},
}
#: Steps of the trainings that are kept in the repository; ``--write`` makes ten.
KEPT_STEPS = 2
SHOWN = ("reward", "loss", "ratio", "entropy", "grad_norm", "kl", "searches", "malformed")


def reward() -> Composite:
    """The default reward, and a part that tells any two rollouts apart, so that each group has something to learn."""
    correct = ExactMatch()
    return Composite([(1.0, correct), (1.0, SearchCost(0.15)), (1.0, Malformed()), (1.0, chance)])


def chance(trajectories) -> list[float]:
    return [sum(t.completion_ids) % 11 / 10 for t in trajectories]


def world():
    """Questions and engine of the small world."""
    return load_questions(HOUSE / "questions.jsonl"), BM25Search(load_passages(HOUSE / "passages.jsonl"))


def policy_of(seed: int, quantize: bool, lora: bool = True):
    return load_policy(str(HOUSE / "model"), quantize=quantize, lora=lora, seed=seed, lora_r=4, lora_alpha=8)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def record_rollouts(policy, seed: int) -> list[dict]:
    """Sampled rollouts of the small world, free and with the first act put into the model's mouth."""
    questions, engine = world()
    rows = []
    for first in (None, [None, "search", "answer"]):
        generator = torch.Generator().manual_seed(seed)
        made = rollout(policy, questions, engine, num_generations=3, generator=generator, first_action=first, **LIMITS)
        rows += [
            {
                "ids": t.completion_ids,
                "mask": t.mask,
                "logprobs": [round(x, 7) for x in t.logprobs],
                "answer": t.answer,
                "finish": t.finish_reason,
                "turns": t.turns,
                "invalid": t.invalid_turns,
                "queries": [call.argument for call in t.searches],
                "segments": [[s.kind, s.text, s.turn, s.start, s.end] for s in t.segments],
            }
            for t in made
        ]
    return rows


def record_training(name: str, seed: int, quantize: bool, steps: int = STEPS["steps"]) -> dict:
    """Metrics of each step and the trained adapter: the hash of its bytes, and sums that tell how far two are apart."""
    questions, engine = world()
    settings = Settings(**LIMITS, **STEPS | TRAININGS[name] | {"seed": seed, "steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(policy_of(seed, quantize), questions, engine, reward(), settings, folder, report=None)
        trainer.train()
        newest = Path(folder) / "checkpoints" / f"step_{steps}"
        data = (newest / "adapter_model.safetensors").read_bytes()
    weights = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    marks = torch.randn(4, len(weights), generator=torch.Generator().manual_seed(1))
    return {
        "adapter": digest(data),
        "norm": float(weights.norm()),
        "projections": (marks @ weights).tolist(),
        "metrics": [{k: row.get(k) for k in SHOWN} for row in trainer.metrics],
    }


def record_all(seeds=(0, 1, 2), steps: int = STEPS["steps"], report=print) -> dict:
    """Everything, by name."""
    torch.set_num_threads(1)
    found = {}
    for quantize in (True, False):
        for seed in seeds:
            kind = f"{'NF4' if quantize else 'fp32'}, seed {seed}"
            found[f"rollouts, {kind}"] = record_rollouts(policy_of(seed, quantize), seed)
            for name in TRAININGS:
                found[f"{name}, {kind}"] = record_training(name, seed, quantize, steps)
            report(kind)
    return found


def distance(a, b) -> float:
    """The largest difference of two numbers in the same place; infinite where anything else differs."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max([distance(a[k], b[k]) for k in a if k != "adapter"], default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max(map(distance, a, b), default=0.0)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b)
    return 0.0 if a == b else float("inf")


def compare(old: dict, new: dict) -> list[str]:
    """A line for everything that is not the same."""
    lines = []
    for name in old.keys() | new.keys():
        a, b = old.get(name), new.get(name)
        if a != b:
            lines.append(
                f"{name}: largest difference {distance(a, b):.3g}"
                + (", other adapter bytes" if isinstance(a, dict) and a["adapter"] != b["adapter"] else "")
            )
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2)
    parser.add_argument("--keep", action="store_true", help="write what tests/test_records_kept.py compares with")
    args = parser.parse_args()
    if args.write:
        args.write.write_text(json.dumps(record_all()) + "\n")
    if args.keep:
        (HOUSE / "records.json").write_text(json.dumps(record_all(seeds=(0,), steps=KEPT_STEPS)) + "\n")
    if args.compare:
        old, new = (json.loads(file.read_text()) for file in args.compare)
        lines = compare(old, new)
        print("\n".join(lines) or f"identical: {len(old)} records")
        return bool(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
