"""TRL 1.16: its ``GRPOTrainer`` on our episodes, reward and settings, in as many processes as accelerate starts.

    searchr1 trl --model data/tiny_qwen --engine data/almanac --data data/almanac/train.jsonl --steps 20 --out runs/trl
    accelerate launch --multi_gpu --num_processes 2 -m searchr1_lib trl ...    (the same arguments)

``--multi_gpu`` stands for "several processes", also without a GPU: with ``--cpu`` accelerate 1.15 starts one process
and says nothing, unless there is an MPI.

A process rolls out whole groups, its share of a step's questions; one process draws what our own trainer draws from
the same seed. Rollouts go in by ``rollout_func`` (TRL's ``environment_factory`` ends no turn at ``</search>``), so
ids, masks and log-probabilities are ours, the loss and the update TRL's. Needs the extra ``trl``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from accelerate.utils import gather_object
    from trl import GRPOConfig, GRPOTrainer
except ImportError as e:
    raise RuntimeError(f"TRL is missing ({e}): pip install -e '.[trl]'") from e

from ..environment.limits import Count
from ..files import TrajectoryLog, append_json_lines
from ..records import Question, Trajectory
from ..rewards import SearchR1Reward, score
from ..training.policy import Policy
from ..training.rollout import rollout
from ..training.settings import Settings
from ..training.trainer import describe, questions_of

#: Settings that mean the same in TRL, under the same name.
_SAME = "num_generations learning_rate temperature epsilon epsilon_high scale_rewards beta num_iterations optim"
_SAME += " max_grad_norm max_completion_length entropy_coef seed"
#: Settings that TRL has not, or has otherwise, and what they must be.
_ONLY: dict[str, Any] = {"baseline": "group_mean", "credit": "rollout", "mask_observations": True, "explore": 0}
_ONLY |= {"dynamic_sampling": 0, "ref_model_sync_steps": 0, "kl_estimator": "k3", "top_entropy_quantile": 1.0}
_ONLY |= {"trees": 0, "replay_groups": 0, "llds_coef": 0.0, "learning_rates": {}, "trained": [], "per_author": False}
_ONLY |= {"pairs": 0}
#: What is told of a step beside ``describe``'s figures, as TRL calls it.
_LOGGED = ("loss", "grad_norm", "entropy", "step_time")


def config_of(settings: Settings, run_dir: str | os.PathLike, *, cpu: bool, micro_batch: int = 16) -> GRPOConfig:
    """TRL's configuration of our settings, for a process of those that accelerate started.

    Args:
        micro_batch: rollouts of a forward pass, at most; TRL counts rollouts where we count tokens.

    Raises:
        ValueError: a setting that TRL does not have, or questions that cannot be shared out evenly; names it.
    """
    from accelerate import PartialState

    if wrong := [
        f"{name}={getattr(settings, name)!r}" for name, value in _ONLY.items() if getattr(settings, name) != value
    ]:
        raise ValueError(f"TRL has no {', '.join(wrong)}: leave {'it' if len(wrong) == 1 else 'them'} at the default")
    processes = PartialState(cpu=cpu).num_processes
    if settings.questions_per_step % processes:
        uneven = f"questions_per_step={settings.questions_per_step} is no multiple of the {processes} processes"
        raise ValueError(f"{uneven}: a group is rolled out by one of them")
    rollouts = settings.questions_per_step * settings.num_generations // processes
    part = max(n for n in range(1, micro_batch + 1) if rollouts % n == 0)
    sequence = settings.loss_type == "gspo"
    return GRPOConfig(
        output_dir=str(run_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=part,
        gradient_accumulation_steps=rollouts // part,
        loss_type="grpo" if sequence else settings.loss_type,
        importance_sampling_level="sequence" if sequence else "token",
        use_bias_correction_kl=False,
        weight_decay=0.0,
        shuffle_dataset=False,
        use_cpu=cpu,
        bf16=False,  # our LoRA is in fp32, and the base computes in its own type
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=bool(settings.gradient_checkpointing),  # "auto" plays safe
        **{name: getattr(settings, name) for name in _SAME.split()},
    )


class Trainer(GRPOTrainer):
    """A ``GRPOTrainer`` that takes what our ``Trainer`` takes, and leaves its kind of folder.

    In ``run_dir`` it writes ``trajectories.jsonl`` and ``metrics.jsonl`` (the first process does), which open in our
    viewer and analysis, and at the end ``adapter`` in PEFT's format.

    Args:
        policy: with LoRA adapters; they are changed in place, and stay in fp32 (TRL would round them to bf16).
        questions, engine, reward, settings: see our ``Trainer``. With ``beta`` > 0 the reference is the adapter that
            training began with, which is the base only where that was a new one.
        run_dir: a new folder.
        micro_batch: see ``config_of``.

    Raises:
        ValueError: a setting that TRL does not have; a policy of several authors; two questions of the same text; a
            folder with a run in it.
    """

    def __init__(
        self,
        policy: Policy,
        questions: Sequence[Question],
        engine,
        reward: Callable | None = None,
        settings: Settings | None = None,
        run_dir: str | os.PathLike = "runs/trl",
        *,
        micro_batch: int = 16,
    ):
        from datasets import Dataset

        self.policy, self.engine, self.our_reward = policy, engine, reward or SearchR1Reward()
        self.settings, self.run_dir = settings or Settings(), Path(run_dir)
        self.asked = {policy.prompt_text(q.text): q for q in questions}  # TRL tells a rollout nothing but its prompt
        if len(self.asked) < len(questions):
            raise ValueError("two questions have the same text, which is all that TRL tells a rollout: drop one")
        if len(policy.authors) > 1:
            raise ValueError(f"TRL trains one adapter, not {' and '.join(policy.authors)}: take our Trainer")
        if (self.run_dir / "metrics.jsonl").exists():
            raise ValueError(f"{self.run_dir} holds a run already: choose another folder")
        drawn = [q for step in range(self.settings.steps) for q in questions_of(questions, self.settings, step)]
        args = config_of(self.settings, run_dir, cpu=policy.device.type == "cpu", micro_batch=micro_batch)
        rows = Dataset.from_dict({"prompt": [policy.prompt_text(q.text) for q in drawn]})
        how = {"processing_class": policy.tokenizer, "rollout_func": self.roll_out, "reward_funcs": [self.reward]}
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        whole = [p.data for p in policy.parameters()]
        super().__init__(model=policy.model, args=args, train_dataset=rows, **how)
        for p, data in zip(policy.parameters(), whole):  # TRL has rounded those of a 4-bit model to bf16
            p.data = data
        self.fresh: list[Trajectory] = []

    def roll_out(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's ``rollout_func``: prompts of whole groups, already repeated once a generation.

        Returns:
            "prompt_ids", "completion_ids", "logprobs" and "env_mask" (1 = the model's token), lists of lists; and
            "trajectory", which reaches the reward.
        """
        s, process = self.settings, self.accelerator.process_index
        generator = torch.Generator(device=self.policy.device).manual_seed(
            s.seed * 1_000_003
            + self.state.global_step
            + process * 2_147_483_629  # a prime: a CPU takes the low 32 bits
        )
        questions = [self.asked[prompt] for prompt in prompts[:: s.num_generations]]
        how = {"num_generations": s.num_generations, "temperature": s.temperature, "generator": generator}
        self.fresh = made = rollout(self.policy, questions, self.engine, **how, **s.limits())
        for i, t in enumerate(made):
            t.step, t.group = self.state.global_step, f"{self.state.global_step}:{process}:{i // s.num_generations}"
        told = {name: [getattr(t, name) for t in made] for name in ("prompt_ids", "completion_ids", "logprobs")}
        return {**told, "env_mask": [t.mask for t in made], "trajectory": made}

    def reward(self, trajectory: list[Trajectory], **_) -> list[float]:
        """TRL's reward function, on the trajectories of the rollouts."""
        said = score(self.our_reward, trajectory)
        said.keep(trajectory)
        return said.values

    def _generate_and_score_completions(self, inputs):
        made = super()._generate_and_score_completions(inputs)
        for t, advantage in zip(self.fresh, made["advantages"].tolist()):
            t.advantages = [advantage] * len(t.mask)
        self.drawn = gather_object(self.fresh)
        if self.accelerator.is_main_process:
            TrajectoryLog(self.run_dir / "trajectories.jsonl").append(self.drawn)
        return made

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Ours: TRL's own begin at a learning rate of 0."""
        share = lambda step: self.settings.learning_rate_at(step) / self.settings.learning_rate
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        row = self.state.log_history[-1]
        if self.accelerator.is_main_process and "loss" in row:
            told = describe(self.drawn, self.settings.num_generations) | {name: row.get(name) for name in _LOGGED}
            told["learning_rate"] = self.settings.learning_rate_at(row["step"] - 1)  # TRL names that of the next step
            append_json_lines(self.run_dir / "metrics.jsonl", [{"step": row["step"], **told}])

    def train(self, *args, **kwargs):
        done = super().train(*args, **kwargs)
        if self.accelerator.is_main_process:
            self.policy.save_adapter(self.run_dir / "adapter")
        self.accelerator.wait_for_everyone()
        return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..study.evaluate import add_fields

    add = parser.add_argument
    add("--model", required=True, help="a model's folder, or its name on the hub")
    add("--adapter", help="a folder with a LoRA adapter in PEFT's format to begin with")
    add("--engine", required=True, help="an index's folder, or a retrieval server's address")
    add("--data", required=True, help="a file of questions")
    add("--reward", default="SearchR1Reward", help="a reward's name (default: SearchR1Reward)")
    add("--out", type=Path, required=True, help="a new folder for the run")
    add("--micro-batch", type=Count, default=16, help="rollouts of a forward pass (default: 16)")
    add("--no-quantize", action="store_true", help="16 or 32 bits a weight instead of NF4's 4")
    add_fields(parser, Settings)


def run(args: argparse.Namespace) -> None:
    """Train, in each of accelerate's processes."""
    from ..data import load_questions
    from ..rewards.byname import build
    from ..study.evaluate import open_engine
    from ..training.policy import load_policy

    settings = Settings(**{name: vars(args)[name] for name in Settings.model_fields})
    questions, reward = load_questions(args.data), build(args.reward)
    policy = load_policy(args.model, adapter=args.adapter, quantize=not args.no_quantize, seed=settings.seed)
    engine = open_engine(args.engine)
    Trainer(policy, questions, engine, reward, settings, args.out, micro_batch=args.micro_batch).train()
    print(f"the run is in {args.out}", file=sys.stderr)
