"""A training step of a real Qwen on this CPU: bf16 as ``dtype="auto"`` takes it beside fp32, and TRL beside ours.

4 rollouts of the almanac (2 questions x 2, see ``bench_step``), NF4 with LoRA of rank 16, activations recomputed in
micro-batches of 1,024 tokens (TRL: of two rollouts). bf16 and fp32 have a process of their own each; of both the first
step does not count. The gradient is that of the same rollouts, which both samplers are made to write.

    python tests/benchmarks/bench_real.py FOLDER [--steps 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from functools import partial

import torch
from bench_gpu import apart
from bench_rollout import almanac
from bench_step import PARTS, Ours, contest, half_wrong

from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.trainer import peak_memory_mb

SIZE = 2
MEMORY = {"gradient_checkpointing": True, "tokens_per_micro_batch": 1024}


def step(folder: str, dtype: str, steps: int) -> dict:
    """Medians over ``steps`` training steps after one that does not count, and the gradient of the first."""
    warnings.simplefilter("ignore")
    policy = load_policy(folder, device="cpu", dtype=dtype)
    _, script, engine = almanac(policy, SIZE, SIZE)
    gradients: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as run:
        ours = Ours(policy, half_wrong(policy, script), engine, SIZE, run, **MEMORY)
        plain = ours.trainer.learner.gradient

        def gradient(*args):
            metrics = plain(*args)
            gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
            return metrics

        ours.trainer.learner.gradient = gradient
        for _ in range(steps + 1):
            ours.step()
    taken = {part: statistics.median(row[part][0] for row in ours.clock.parts()[1:]) for part in PARTS}
    row = ours.trainer.metrics[0]
    told = {"ratio": row["ratio"], "grad_norm": row["grad_norm"], "peak_gib": peak_memory_mb(policy.device) / 1024}
    return taken | told | {"dtype": str(policy.lm_head.weight.dtype), "gradient": gradients[0]}


def main(argv: list[str] | None = None) -> dict:
    """Measure, print the lines, return the figures; nothing where no model is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="of a real Qwen, such as Qwen2.5-0.5B-Instruct")
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args(argv)
    if not args.folder:
        print("bench_real: no folder of a real Qwen given, nothing is measured")
        return {}
    figures = {dtype: apart(step, args.folder, dtype, args.steps) for dtype in ("auto", "float32")}
    gradients = [row.pop("gradient") for row in figures.values()]
    figures["cosine of the gradients"] = torch.cosine_similarity(*gradients, dim=0).item()
    for name in (*PARTS, "peak_gib"):
        auto, fp32 = (figures[dtype][name] for dtype in ("auto", "float32"))
        print(f"{name:10} auto {auto:8.2f}   fp32 {fp32:8.2f} = {fp32 / auto:.2f}x", flush=True)
    load = partial(load_policy, args.folder, device="cpu")
    figures["TRL"] = contest("ours and TRL", load, args.steps, SIZE, micro_batch=2, **MEMORY)
    return figures


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
