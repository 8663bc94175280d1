"""All settings of a training run in one place, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..environment.base import Limits
from .grpo import BASELINES, KL_ESTIMATORS, LOSS_TYPES

OPTIMISERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
_ALLOWED = {
    "loss_type": LOSS_TYPES,
    "kl_estimator": KL_ESTIMATORS,
    "optim": OPTIMISERS,
    "credit": ("rollout", "turn"),
    "baseline": (*BASELINES, "value"),
    "scale_rewards": ("group", "batch", "none"),
}


@dataclass(frozen=True)
class Settings:
    """Settings of a training run. Names are TRL's where the meaning is the same.

    Attributes:
        steps: rollout batches, each followed by ``num_iterations`` updates.
        questions_per_step: different questions a step.
        num_generations: G, rollouts a question (the group).
        learning_rate: of AdamW on the LoRA weights.
        warmup_steps: steps over which the learning rate rises from 0.
        decay_steps: last steps, over which it falls to a tenth; constant in between.
        temperature: of sampling, and of the log-probabilities.
        loss_type, epsilon, epsilon_high, scale_rewards, baseline: see ``searchr1_lib.training.grpo``. The baseline "value"
            is PPO's: a linear value head on the policy's last hidden states, and advantages by GAE.
        gamma, lam: of GAE; vf_coef: weight of the value head's loss; cliprange_value: its clip range.
        credit: "rollout" gives a rollout's advantage to all its tokens; "turn" gives each turn the rewards from
            that turn on, compared with the same turn of the group (``grpo.turn_advantages``).
        mask_observations: False trains on retrieved text as if the model had written it: an ablation of Search-R1
            (arXiv 2503.09516), never of use.
        top_entropy_quantile: share of the sampled tokens, those of highest entropy, that get an advantage (Wang et
            al. 2025, "Beyond the 80/20 rule", arXiv 2506.01939); 1: all.
        beta, kl_estimator: KL penalty against the frozen base model (adapters off), or against a snapshot.
        ref_model_sync_steps: take a new snapshot of the policy as the reference every so many steps; 0: never,
            the reference is the base.
        kl_every: with ``beta`` 0 the KL is only measured, every so many steps (it costs a forward pass); 0: never.
        entropy_coef: weight of the entropy bonus.
        explore: of the G rollouts of a question, so many begin with a search and as many with an answer, whatever the
            policy would do. Both ways are then compared on every question, also by a policy that has (nearly) given
            one of them up. Of the tag that was put into its mouth the token that decides is trained, with ratio 1,
            praise in full and blame times its probability: off-policy guidance mixed into the group, as in LUFFY
            (arXiv 2504.14945), where other models write it. 0: plain GRPO.
        explore_steps: the first steps, in which ``explore`` applies.
        dynamic_sampling: DAPO's: at most so many times a step draws other questions in place of those whose groups
            have no variance.
        num_iterations: updates on one batch of rollouts.
        optim: "adamw_torch", or bitsandbytes' "adamw_8bit" or "paged_adamw_8bit" (on a GPU).
        max_grad_norm: gradients are clipped to this norm.
        tokens_per_micro_batch: padded tokens that one forward pass holds.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: how many to keep, the newest ones.
        max_turns, max_turn_tokens, max_observation_tokens, max_completion_length, topk, search_timeout:
            see ``searchr1_lib.training.rollout.Limits``.
        seed: of the order of questions and the sampling.

    Raises:
        ValueError: a setting that cannot be, or two that do not go together; names them.
    """

    steps: int = 200
    questions_per_step: int = 8
    num_generations: int = 8
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    decay_steps: int = 0
    temperature: float = 1.0
    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    scale_rewards: str = "group"
    baseline: str = "group_mean"
    gamma: float = 1.0
    lam: float = 1.0
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    credit: str = "rollout"
    mask_observations: bool = True
    top_entropy_quantile: float = 1.0
    beta: float = 0.0
    kl_estimator: str = "k3"
    ref_model_sync_steps: int = 0
    kl_every: int = 10
    entropy_coef: float = 0.0
    explore: int = 0
    explore_steps: int = 50
    dynamic_sampling: int = 0
    num_iterations: int = 1
    optim: str = "adamw_torch"
    max_grad_norm: float = 1.0
    tokens_per_micro_batch: int = 4096
    gradient_checkpointing: bool = False
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    max_turns: int = 4
    max_turn_tokens: int = 500
    max_observation_tokens: int = 500
    max_completion_length: int = 2048
    topk: int = 3
    search_timeout: float | None = 60.0
    seed: int = 0

    def __post_init__(self):
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in (
            "steps",
            "questions_per_step",
            "num_generations",
            "num_iterations",
            "tokens_per_micro_batch",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in (
            "beta",
            "entropy_coef",
            "vf_coef",
            "ref_model_sync_steps",
            "kl_every",
            "explore",
            "explore_steps",
            "dynamic_sampling",
            "warmup_steps",
            "decay_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile must lie in (0, 1], got {self.top_entropy_quantile!r}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie between 0 and 1, got {self.learning_rate!r}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive in training, got {self.temperature!r}")
        self._check_advantages()
        Limits(**self.limits())

    def _check_advantages(self) -> None:
        by_group = self.baseline in ("group_mean", "leave_one_out")
        if by_group and self.num_generations < 2:
            raise ValueError(
                "num_generations must be at least 2: a group of one has no other to be compared with "
                "(or choose baseline 'batch_mean', 'none' or 'value')"
            )
        scales = BASELINES.get(self.baseline, ("batch", "none"))
        if self.scale_rewards not in scales:
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} does not go with baseline={self.baseline!r}; "
                f"choose {' or '.join(map(repr, scales))}"
            )
        if self.credit == "turn" and self.baseline != "group_mean":
            raise ValueError(
                f"credit='turn' compares turns within a group: it needs baseline='group_mean', not {self.baseline!r}"
            )
        if self.explore and (2 * self.explore >= self.num_generations or not by_group):
            raise ValueError(
                f"explore={self.explore} makes {2 * self.explore} of num_generations="
                f"{self.num_generations} rollouts begin in a given way: fewer than all can, and only with "
                f"a baseline of the group (not {self.baseline!r})"
            )
        if self.dynamic_sampling and not by_group:
            raise ValueError(
                f"dynamic_sampling replaces groups without variance, which also teach something with "
                f"baseline={self.baseline!r}: set it to 0"
            )

    def limits(self) -> dict:
        """The part that ``rollout`` takes."""
        return {f.name: getattr(self, f.name) for f in fields(Limits)}

    def first_actions(self, step: int) -> list[str | None]:
        """What the rollouts of a group are made to begin with in a step; see ``explore``."""
        pairs = self.explore if step < self.explore_steps else 0
        return [None] * (self.num_generations - 2 * pairs) + ["search", "answer"] * pairs

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = max(0.1, min(1.0, (self.steps - step) / (self.decay_steps + 1)))
        return self.learning_rate * rise * fall
