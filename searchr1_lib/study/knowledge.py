"""What does a model know? Every question is answered some times at once, and some times after a search.

    searchr1 knowledge --model Qwen/Qwen2.5-0.5B-Instruct --adapter runs/form --out runs/known

What this writes is the folder of questions with ``known`` as measured: a question is known where answering at once
earns as much as a search does with questions of its kind. To train on it: ``searchr1 run --profile laptop -p
data=runs/known``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data import load_passages, load_questions
from ..environment.limits import Count, Share
from ..metrics import grouped, mean, right
from ..records import Question, Trajectory
from ..worlds.optimum import Optimum, Skill
from ..worlds.prepare import COUNTS, OWN, check_out, write_folder
from .analysis import calibration, calibration_error, sureness
from .evaluate import evaluate, set_of


@dataclass(frozen=True)
class Knowledge:
    """By a question's id the chance ``at_once`` that an answer without a search is right, how ``sure`` of it the model
    was (see ``analysis.sureness``; None where it gave none), and the chance after a search, over all of its kind.
    """

    at_once: dict[str, float]
    sure: dict[str, float | None]
    searched: dict[str, float]

    def judged(self, questions: Sequence[Question], price: float) -> list[Question]:
        """The questions, known where answering at once earns at least what a search earns."""
        return [replace(q, known=self.at_once[q.id] >= self.searched[q.id] * (1 - price)) for q in questions]

    def earns(self, price: float) -> dict[str, float]:
        """What the best policy earns that is told the chance of each question, and the two that choose nothing."""
        both = [(self.at_once[id], self.searched[id]) for id in self.at_once]
        best = fmean(Optimum((chance,), price, Skill(read=searched)).value for chance, searched in both)
        always = fmean(self.searched.values()) * (1 - price)
        return {"best": best, "always": always, "never": fmean(self.at_once.values())}


def measure_knowledge(
    policy, questions: Sequence[Question], engine, *, samples: int = 8, seed: int = 0, **limits
) -> Knowledge:
    """Answer each question ``samples`` times without a search, and once after one, at temperature 1."""

    def play(act: str, times: int, key: Callable[[Question], str]) -> dict[str, list[Trajectory]]:
        how: dict[str, Any] = {"num_generations": times, "first_action": act, "temperature": 1.0, "seed": seed}
        return grouped(evaluate(policy, questions, engine, **how | limits).trajectories, lambda t: key(t.question))

    answered, searched = play("answer", samples, lambda q: q.id), play("search", 1, lambda q: set_of(q.source))
    share = lambda ts: fmean(map(right, ts))
    sure = {id: mean([{"sure": sureness(t)} for t in ts], "sure") for id, ts in answered.items()}
    after = {q.id: share(searched[set_of(q.source)]) for q in questions}
    return Knowledge({id: share(ts) for id, ts in answered.items()}, sure, after)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--adapter", type=Path, help="as `searchr1 form` writes it: the model has to keep to the tags")
    parser.add_argument("--data", type=Path, default=Path("data/real/mixed"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=Count, default=8, help="answers a question, at once")
    parser.add_argument("--price", type=Share, default=0.15, help="of a search")


def run(args: argparse.Namespace) -> None:
    """Measure what a model knows, write the questions anew, and print the shares and what the best policy earns."""
    from ..search.bm25 import BM25Search
    from ..training.policy import load_policy

    check_out(args.out, OWN, args.model, args.data)
    parts = {split: load_questions(args.data / f"{split}.jsonl") for split in COUNTS}
    passages = load_passages(args.data / "passages.jsonl")
    policy, every = load_policy(args.model, adapter=args.adapter), [q for part in parts.values() for q in part]
    limits = {"max_turns": 2, "max_turn_tokens": 128, "max_completion_length": 900, "batch_size": 64}
    known = measure_knowledge(policy, every, BM25Search(passages), samples=args.samples, **limits)
    pairs = [(known.sure[id], share) for id, share in known.at_once.items() if known.sure[id] is not None]
    off = calibration_error(calibration(*zip(*pairs))) if pairs else None
    figures = known.earns(args.price) | {"calibration_error": off}
    judged = {split: known.judged(part, args.price) for split, part in parts.items()}
    made = {"by": "searchr1_lib.knowledge", "source": str(args.data), "model": args.model, "price": args.price}
    chances = {id: {name: of[id] for name, of in vars(known).items()} for id in known.at_once}
    write_folder(args.out, judged, passages, made | figures | {"chances": chances})
    for kind, of in grouped([q for part in judged.values() for q in part], lambda q: set_of(q.source)).items():
        at_once, searched = (fmean(chance[q.id] for q in of) for chance in (known.at_once, known.searched))
        said = (
            f"{at_once:.2f} right at once, {searched:.2f} after a search, {fmean(bool(q.known) for q in of):.2f} known"
        )
        print(f"{kind}: {len(of)} questions, {said}")
    print(", ".join(f"{name} {'–' if value is None else f'{value:.3f}'}" for name, value in figures.items()))
