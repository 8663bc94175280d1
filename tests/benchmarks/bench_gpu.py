"""Real shapes on a GPU: Qwen2.5-1.5B, 3B and 7B (random weights, from their public configs), ours beside TRL.

    step     a training step in NF4 with LoRA: groups of 8, 4 turns, a context of about 2,000 tokens, gradient
             checkpointing, micro-batches of 4,096 tokens (TRL: of two rollouts). The process is capped at 15 GB, as on
             a T4; who runs out of memory tries again with half of the questions
    rollout  sampling alone, in NF4 and in 16 bits, without a cap: ``bench_rollout``'s contest, in which one question
             at a time (``one``) takes part with 8 rollouts only

Each measurement has a process of its own. The tokenizer is the tiny Qwen's; the vocabulary is Qwen's.

    python tests/benchmarks/bench_gpu.py [--shape 1.5B ...] [--part step rollout]
    python tests/benchmarks/bench_gpu.py --shape tiny --device cpu --questions 1 --steps 1    # does it run?
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch
from bench_rollout import TINY_QWEN, contest, expected, long
from bench_step import PARTS, Ours, Theirs, half_wrong

from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.trainer import peak_memory_mb

CAP_GB, GROUP, TURNS = 15, 8, 4
EPISODE = {"turns": TURNS, "observation": 450, "thought": (8, 17)}  # with its prompt about 2,000 tokens
_NAMES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SHAPES = {
    name: dict(zip(_NAMES, sizes), tie_word_embeddings=tied)
    for name, tied, sizes in (
        ("1.5B", True, (1536, 8960, 28, 12, 2, 151_936)),
        ("3B", True, (2048, 11008, 36, 16, 2, 151_936)),
        ("7B", False, (3584, 18944, 28, 28, 4, 152_064)),
        ("tiny", True, (64, 128, 2, 4, 2, 2048)),
    )
}


def build(shape: str, folder: str, device: str) -> None:
    """A model folder with random 16-bit weights of this shape."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def step(way: str, folder: str, device: str, questions: int, steps: int) -> dict | None:
    """Medians over ``steps`` training steps after one that does not count; None where memory runs out."""
    warnings.simplefilter("ignore")
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GB * 10**9 / total))
    try:
        policy = load_policy(folder, device=device)
        _, script, engine = long(policy, questions, GROUP, **EPISODE)
        half_wrong(policy, script)
        with tempfile.TemporaryDirectory() as run:
            if way == "ours":
                trainer = Ours(
                    policy, script, engine, GROUP, run, gradient_checkpointing=True, tokens_per_micro_batch=4096
                )
                for _ in range(steps + 1):
                    trainer.step()
            else:
                trainer = Theirs(policy, script, engine, GROUP, run, 2, gradient_checkpointing=True)
                trainer.train(steps + 1)
    except torch.OutOfMemoryError:
        return None
    assert [ids for ids, _ in trainer.made()] == expected(policy, script, engine), f"{way} recorded other tokens"
    taken = {part: statistics.median(row[part][0] for row in trainer.clock.parts()[1:]) for part in PARTS}
    sampled = sum(sum(mask) for _, mask in trainer.made())
    seen = sum(
        len(policy.encode(policy.prompt_text(p.question.text))) + len(ids)
        for p, (ids, _) in zip(script.plays, trainer.made())
    )
    return {
        "rollouts": len(script.plays),
        "tokens_a_rollout": seen / len(script.plays),
        **taken,
        "sampled_per_s": sampled / taken["generation"],
        "updated_per_s": seen / taken["update"],
        "peak_mb": peak_memory_mb(policy.device),
    }


def rollouts(folder: str, device: str, questions: int, quantize: bool) -> dict:
    """Sampling alone: all rollouts at a time, and one question's 8 rollouts also one at a time."""
    warnings.simplefilter("ignore")
    policy = load_policy(folder, device=device, quantize=quantize, lora=quantize)
    kind = "NF4 + LoRA" if quantize else str(policy.lm_head.weight.dtype)
    contest(policy, "warm-up", *long(policy, 1, 2, 2, 50), 2, {"ours": 1, "batch": 1, "trl": 1})
    return {
        kind: contest(
            policy, kind, *long(policy, questions, GROUP, **EPISODE), GROUP, {"ours": 3, "batch": 1, "trl": 1}
        ),
        f"{kind}, one question": contest(
            policy, f"{kind}, one question", *long(policy, 1, GROUP, **EPISODE), GROUP, {"ours": 1, "one": 1}
        ),
    }


def apart(call, *args):
    """``call(*args)`` in a process of its own, which gives all memory back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def main(argv: list[str] | None = None) -> dict:
    """Measure what is asked for, print the lines, return the figures; nothing where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1.5B", "3B", "7B"])
    parser.add_argument("--part", nargs="+", choices=["step", "rollout"], default=["step", "rollout"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu: no GPU here, nothing is measured (--shape tiny --device cpu only tries the script out)")
        return {}
    figures: dict = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    print(figures["device"])
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            apart(build, shape, folder, args.device)
            for way in ("ours", "trl") if "step" in args.part else ():
                questions = args.questions
                while (got := apart(step, way, folder, args.device, questions, args.steps)) is None and questions > 1:
                    print(f"{shape} {way}: out of memory with {questions * GROUP} rollouts", flush=True)
                    questions //= 2
                figures[f"{shape} step {way}"] = got
                print(line(shape, way, got), flush=True)
            for quantize in (True, False) if "rollout" in args.part else ():
                figures |= {
                    f"{shape} rollout {name}": made
                    for name, made in apart(rollouts, folder, args.device, args.questions, quantize).items()
                }
    return figures


def line(shape: str, way: str, got: dict | None) -> str:
    if got is None:
        return f"{shape} {way}: out of memory with one question's {GROUP} rollouts"
    return (
        f"{shape} {way:4} {got['rollouts']} rollouts x {got['tokens_a_rollout']:.0f} tokens: "
        f"step {got['step']:.1f} s (generation {got['generation']:.1f}, update {got['update']:.1f}), "
        f"{got['sampled_per_s']:.0f} tokens/s sampled, {got['updated_per_s']:.0f} updated, "
        f"peak {got['peak_mb'] / 1024:.2f} GiB"
    )


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
