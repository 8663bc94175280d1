"""A short warm start for real models: the form of an episode, and not when to search.

Zero-shot a small Qwen keeps to the tags in half of its rollouts, and hardly ever searches; then a group has nothing to
compare. Here it is shown both acts on questions of the training split, by a coin: it says what it recalls, answers or
asks, reads what came, and ends. What is known stands in the questions (``Question.known``); of what is not it says so,
and answers "unknown" where no passage tells.

    searchr1 form --model Qwen/Qwen2.5-0.5B-Instruct --data data/real/mixed --out runs/form
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..environment import protocol
from ..environment.limits import Count
from ..files import write_json
from ..metrics import malformed, right, searched
from ..records import Question, Trajectory
from ..worlds.optimum import UNKNOWN
from ..worlds.prepare import check_out
from .baselines import fine_tune, save_taught, written
from .warmstart import Piece

OWN = ("form.json", "adapter_config.json", "adapter_model.safetensors")


def demonstrations(
    policy, questions: Sequence[Question], engine, rng: random.Random, *, topk: int = 3
) -> list[Trajectory]:
    """One demonstration a question: a coin decides whether it searches."""
    asks = [rng.random() < 0.5 for _ in questions]
    queries = [q.text.rstrip("?") for q, ask in zip(questions, asks) if ask]
    found = iter(engine.search_batch(queries, topk) if queries else ())
    made = []
    for q, ask in zip(questions, asks):
        answer = q.answers[0] if q.known else UNKNOWN
        recalls = f"I recall that it is {answer}, I am fairly sure." if q.known else "I recall nothing about it."
        pieces = []
        if ask:
            passages = [hit.passage for hit in next(found)]
            search = f"<think> {recalls} I look it up. </think>\n<search> {q.text.rstrip('?')} </search>"
            pieces = [Piece(search, "model"), Piece(protocol.observation(passages), "environment")]
            recalls = "Nothing here tells me more."
            if any(passage.id in q.passages for passage in passages):
                recalls, answer = f"It says {q.answers[0]}.", q.answers[0]
        pieces.append(Piece(f"<think> {recalls} </think>\n<answer> {answer} </answer>", "model"))
        made.append(written(policy, q, pieces, policy.prompt_text(q.text)))
    return made


def examine(policy, questions: Sequence[Question], engine, *, num_generations: int = 2, **limits) -> dict[str, float]:
    """Shares of rollouts at temperature 1: malformed, searched, and right on what is known and on what is not."""
    import torch

    from ..training.rollout import rollout

    generator = torch.Generator(policy.device).manual_seed(0)
    done = rollout(policy, questions, engine, num_generations=num_generations, generator=generator, **limits)
    shares = {"malformed": fmean(map(malformed, done)), "searched": fmean(map(searched, done))}
    for name, known in (("right, known", True), ("right, look-up", False)):
        shares[name] = fmean([right(t) for t in done if t.question.known is known] or [0.0])
    return shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--data", type=Path, default=Path("data/real/mixed"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=Count, default=300, help="of the training split, a demonstration each")
    parser.add_argument("--lora-r", type=Count, default=16, help="rank of the adapter")
    parser.add_argument("--examined", type=Count, default=32, help="of validation, before and after")


def run(args: argparse.Namespace) -> None:
    """Teach a model the form of an episode, write the adapter, and say what changed."""
    from ..data import load_passages, load_questions
    from ..search.bm25 import BM25Search
    from ..training.policy import load_policy

    check_out(args.out, OWN, args.model, args.data)
    questions = load_questions(args.data / "train.jsonl")
    rng = random.Random(0)
    shown = rng.sample(questions, min(args.questions, len(questions)))
    asked = random.Random(1).sample(
        held := load_questions(args.data / "validation.jsonl"), min(args.examined, len(held))
    )
    engine, policy = (
        BM25Search(load_passages(args.data / "passages.jsonl")),
        load_policy(args.model, lora_r=args.lora_r),
    )
    limits = {"max_turns": 2, "max_turn_tokens": 128, "max_completion_length": 900}
    figures = {"before": examine(policy, asked, engine, **limits)}
    made = demonstrations(policy, shown, engine, rng)
    losses = fine_tune(policy, made, epochs=1, learning_rate=2e-4, batch_size=8, token_budget=1024)
    save_taught(policy, args.out)
    figures["after"] = examine(policy, asked, engine, **limits)
    write_json(args.out / OWN[0], {"model": args.model, "losses": [round(x, 4) for x in losses]} | figures)
    for when, shares in figures.items():
        print(f"{when}: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
