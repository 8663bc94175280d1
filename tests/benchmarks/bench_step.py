"""A whole training step: ours against TRL's ``GRPOTrainer``, on the same model, episodes and batch, in one process.

64 rollouts of the almanac (8 questions x 8, two or three turns), half of them answered wrongly, so that every group
has something to learn from. Both samplers are made to write the same text (see ``bench_rollout``); tokens, masks and
the first gradient are compared. Both take the default reward, the GRPO loss without KL, AdamW, and one update a step.

    ours   ``Trainer``'s step: rollouts, reward, update in micro-batches by token budget, metrics, log
    trl    its step: generation with its tool loop, reward, update in micro-batches of 16 rollouts (up to 7,200
           padded tokens, ours up to 4,096; all 64 at once are slower). It takes old log-probabilities from the
           update's own pass. LoRA on NF4 it trains in bf16, as its authors chose; ours stays in fp32

    python tests/benchmarks/bench_step.py [--micro-batch 8] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from functools import partial
from unittest.mock import patch

import torch
from bench_rollout import LENGTHS, TINY_QWEN, TRL, Script, almanac
from transformers import PrinterCallback, TrainerCallback

from searchr1_lib.environment import protocol
from searchr1_lib.rewards import exact_match
from searchr1_lib.training import trainer
from searchr1_lib.training.policy import Policy, load_policy

LEARNING_RATE = 1e-5
PARTS = ("step", "generation", "update")


class Clock:
    """Wall and CPU seconds, in a list a name."""

    def __init__(self):
        self.taken: dict[str, list[tuple[float, float]]] = {}

    def timed(self, name: str, call):
        """``call``, its seconds noted under ``name``."""

        def timing(*args, **kwargs):
            before = self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.note(name, before)

        return timing

    def note(self, name: str, before: tuple[float, float]) -> None:
        self.taken.setdefault(name, []).append(tuple(b - a for a, b in zip(before, self.now())))

    @staticmethod
    def now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def parts(self) -> list[dict[str, tuple[float, float]]]:
        """Per step, the seconds of each of ``PARTS``; the update is what is not generation."""
        return [
            {"step": whole, "generation": made, "update": tuple(a - b for a, b in zip(whole, made))}
            for whole, made in zip(self.taken["step"], self.taken["generation"], strict=True)
        ]


class Ours:
    """Our trainer on the script; ``step()`` is one training step."""

    def __init__(self, policy: Policy, script: Script, engine, group: int, folder: str, **settings):
        questions = [p.question for p in script.plays[::group]]
        turns = max(len(p.turns) for p in script.plays)
        self.script, self.clock, self.trajectories = script, Clock(), []
        self.trainer = trainer.Trainer(
            policy,
            questions,
            engine,
            run_dir=folder,
            report=None,
            settings=trainer.Settings(
                steps=1000,
                questions_per_step=len(questions),
                num_generations=group,
                learning_rate=LEARNING_RATE,
                loss_type="grpo",
                beta=0.0,
                max_turns=turns - 1,
                **LENGTHS,
                **settings,
            ),
        )
        self.trainer.questions_of = lambda step: questions

    def step(self) -> None:
        def rollout(*args, **kwargs):
            self.trajectories = plain(*args, **kwargs)
            if not self.trainer.metrics:
                # This step's gradient is compared: ratios of 1, as in TRL (the adapters do nothing yet). Scripted
                # rollouts are so alike that what bf16 rounds otherwise while sampling would be most of what is left.
                by_id = self.trainer.learner.references(self.trajectories)
                for t in self.trajectories:
                    t.logprobs = by_id[id(t)]
            return self.trajectories

        plain = self.clock.timed("generation", trainer.rollout)
        with self.script.drawing(), patch.object(trainer, "rollout", rollout), self.trainer.learner.checkpointing():
            self.clock.timed("step", self.trainer._one_step)()

    def made(self) -> list[tuple[list[int], list[int]]]:
        return [(t.completion_ids, t.mask) for t in self.trajectories]


class Theirs(TrainerCallback):
    """TRL's trainer on the script; before each of its steps it calls ``between``."""

    def __init__(self, policy: Policy, script: Script, engine, group: int, folder: str, micro_batch: int, **settings):
        self.clock = Clock()
        self.trl = TRL(
            policy,
            script,
            engine,
            group,
            folder,
            reward=reward,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=len(script.plays) // micro_batch,
            learning_rate=LEARNING_RATE,
            loss_type="grpo",
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        self.trl.trainer._generate = self.clock.timed("generation", self.trl.trainer._generate)
        self.trl.trainer.remove_callback(PrinterCallback)
        self.trl.trainer.add_callback(self)

    def train(self, steps: int, between=lambda: None) -> None:
        self.between, self.trl.trainer.args.max_steps = between, steps
        self.trl.trainer.train()

    def on_step_begin(self, *args, **kwargs):
        self.between()
        self.before = self.clock.now()

    def on_step_end(self, *args, **kwargs):
        self.clock.note("step", self.before)

    def made(self) -> list[tuple[list[int], list[int]]]:
        return list(zip(self.trl.made[1], self.trl.made[2]))

    def logged(self) -> dict:
        """What it logged of its first step."""
        return self.trl.trainer.state.log_history[0]


def reward(completions, golds, **_) -> list[float]:
    """Our default reward, of TRL's messages: exact match, of which every search takes 0.15."""
    answers = [protocol.read_action(messages[-1]["content"]).text for messages in completions]
    searches = [sum(m["role"] == "tool" for m in messages) for messages in completions]
    return [exact_match(a, g) * (1 - 0.15 * n) for a, g, n in zip(answers, golds, searches)]


def half_wrong(policy: Policy, script: Script) -> Script:
    """Every second rollout gives a wrong answer, so that no group is without variance."""
    for play in script.plays[::2]:
        thought = policy.decode(play.turns[-1]).split("<answer>")[0]
        play.turns[-1] = policy.encode(f"{thought}<answer> nobody </answer>")
    return script


def contest(name: str, load, steps: int, size: int, micro_batch: int, **ours_only) -> dict:
    """Medians over ``steps`` steps of each, taken in turn after one that does not count.

    Args:
        ours_only: further settings; TRL recomputes activations where we do.
    """
    mine = load()
    _, script, engine = almanac(mine, size, size)
    half_wrong(mine, script)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(mine, script, engine, size, f"{folder}/ours", **ours_only)
        how = {"gradient_checkpointing": ours.trainer.settings.gradient_checkpointing}
        theirs = Theirs(load(), script, engine, size, f"{folder}/trl", min(micro_batch, len(script.plays)), **how)
        theirs.train(steps + 1, ours.step)
    compare(ours, theirs, name)
    tokens = sum(sum(mask) for _, mask in ours.made())
    figures = {"rollouts": len(script.plays), "trained_tokens": tokens}
    print(
        f"{name}: {len(script.plays)} rollouts of {statistics.fmean(len(p.turns) for p in script.plays):.1f} turns, "
        f"{tokens} tokens trained"
    )
    for part in PARTS:
        for kind, unit in enumerate(("s", "cpu_s")):
            mid = [statistics.median(row[part][kind] for row in way.clock.parts()[1:]) for way in (ours, theirs)]
            figures |= {
                f"ours_{part}_{unit}": mid[0],
                f"trl_{part}_{unit}": mid[1],
                f"trl_over_ours_{part}_{unit}": mid[1] / mid[0],
            }
        print(
            "  {:10} ours {:6.3f} s, TRL {:6.3f} s = {:4.2f}x   CPU {:6.3f}, {:6.3f} = {:4.2f}x".format(
                part, *list(figures.values())[-6:]
            ),
            flush=True,
        )
    return figures


def compare(ours: Ours, theirs: Theirs, name: str) -> None:
    """Both trained on the same tokens, got the same reward and the same first gradient (TRL's LoRA may be bf16)."""
    assert ours.made() == theirs.made(), f"{name}: other tokens or masks"
    mine, other = ours.trainer.metrics[0], theirs.logged()
    print(
        f"{name}: first step, ours and TRL: reward {mine['reward']:.4f} {other['reward']:.4f}, "
        f"|gradient| {mine['grad_norm']:.5f} {other['grad_norm']:.5f}, "
        f"entropy {mine['entropy']:.4f} {other['entropy']:.4f}"
    )
    assert abs(mine["reward"] - other["reward"]) < 1e-5, f"{name}: other rewards"
    half = any(p.dtype == torch.bfloat16 for p in theirs.trl.policy.parameters())
    assert abs(mine["grad_norm"] / float(other["grad_norm"]) - 1) < (0.05 if half else 1e-3), f"{name}: other gradients"


def main(argv: list[str] | None = None) -> dict:
    """Run all contests on the tiny Qwen, print the lines, return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_QWEN))
    parser.add_argument("--micro-batch", type=int, default=16, help="rollouts of TRL's micro-batch")
    parser.add_argument("--quick", action="store_true", help="one step each, two questions of two rollouts")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    figures: dict = {"threads": torch.get_num_threads()}
    for kind, quantize in (("NF4 + LoRA", True), ("fp32 + LoRA", False)):
        figures[kind] = contest(
            kind,
            partial(load_policy, args.model, quantize=quantize, device="cpu"),
            steps=1 if args.quick else 3,
            size=2 if args.quick else 8,
            micro_batch=args.micro_batch,
        )
    return figures


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
