"""All settings of a training run in one place, their types and ranges checked before anything is loaded.

A field's docstring is its description, see ``environment.limits``.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from ..environment.limits import Amount, Count, Limits, Positive, Share, Whole

#: The packages whose version may change a result.
DECIDING = ("torch", "transformers", "peft", "bitsandbytes")
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"]
Baseline = Literal["group_mean", "leave_one_out", "batch_mean", "none", "value"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Credit = Literal["rollout", "return", "gigpo", "igpo", "stepsearch", "mt_grpo", "tree_grpo", "potential"]
Estimator = Literal["k1", "k2", "k3"]
LOSS_TYPES, KL_ESTIMATORS = get_args(LossType), get_args(Estimator)
#: The scalings that each baseline allows. The others would divide a reward that is not centred by almost 0.
BASELINES: dict[str, tuple[str, ...]] = dict.fromkeys(("group_mean", "leave_one_out"), ("group", "batch", "none"))
BASELINES |= {"batch_mean": ("batch", "none"), "none": ("none",)}


class Settings(Limits):
    """Settings of a training run. Names are TRL's where the meaning is the same.

    Raises:
        ValueError: a setting that cannot be, or two that do not go together; names them.
    """

    steps: Count = 200
    """rollout batches, each followed by ``num_iterations`` updates"""
    questions_per_step: Count = 8
    """different questions a step"""
    num_generations: Count = 8
    """G, rollouts a question (the group)"""
    learning_rate: float = Field(default=1e-5, gt=0, lt=1)
    """of AdamW on the LoRA weights"""
    learning_rates: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """of single authors of a policy, by name; of the others ``learning_rate``"""
    trained: list[str] = []
    """the authors of a policy that are trained, by name, the others are frozen; empty: all"""
    per_author: bool = False
    """each author's advantages come from the rollouts of a group in which it wrote, see
    ``searchr1_lib.training.credit.author_advantages``; False: one advantage for all authors"""
    train_colleagues: bool = False
    """the agents that a rollout asked, see ``searchr1_lib.training.researcher``, learn too: each of their rollouts has
    the reward of the one that asked, compared with those that were asked about the same question"""
    warmup_steps: Whole = 0
    """steps over which the learning rate rises from 0"""
    decay_steps: Whole = 0
    """last steps, over which it falls to a tenth; constant in between"""
    temperature: Positive = 1.0
    """of sampling, and of the log-probabilities"""
    loss_type: LossType = "grpo"
    """see ``searchr1_lib.training.grpo.policy_loss``"""
    epsilon: Share = 0.2
    """how far below 1 a token's ratio is clipped"""
    epsilon_high: Amount | None = None
    """how far above 1; None: as ``epsilon``"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """of what the standard deviation divides a reward's difference from the baseline"""
    baseline: Baseline = "group_mean"
    """what a reward is compared with. "value" is PPO's: a linear value head on the policy's last hidden states, and
    advantages by GAE"""
    gamma: Share = 1.0
    """discount of GAE, from token to token, and of ``credit``, from turn to turn"""
    lam: Share = 1.0
    """of GAE"""
    vf_coef: Amount = 0.1
    """weight of the value head's loss"""
    cliprange_value: Positive = 0.2
    """its clip range"""
    credit: Credit = "rollout"
    """how a rollout's reward is credited to its turns, see ``searchr1_lib.training.credit``: "rollout" gives its
    advantage to all of them"""
    credit_weight: Amount = 1.0
    """of what "gigpo", "stepsearch", "mt_grpo" and "potential" say beside the outcome"""
    shuffle_credit: bool = False
    """a control, never of use: what ``credit`` says beside the outcome is dealt out at random among a group's turns"""
    trees: Whole = 0
    """of each question so many rollouts begin at the prompt and the others branch off them, see
    ``searchr1_lib.training.rollout``; 0: all begin there"""
    mask_observations: bool = True
    """False trains on retrieved text as if the model had written it: an ablation of Search-R1 (arXiv 2503.09516),
    never of use"""
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """share of the sampled tokens, those of highest entropy, that get an advantage (Wang et al. 2025, "Beyond the 80/20
    rule", arXiv 2506.01939); 1: all"""
    beta: Amount = 0.0
    """weight of the KL penalty against the frozen base model (adapters off), or against a snapshot"""
    kl_estimator: Estimator = "k3"
    """of that penalty, see ``searchr1_lib.training.grpo``"""
    ref_model_sync_steps: Whole = 0
    """take a new snapshot of the policy as the reference every so many steps; 0: never, the reference is the base"""
    kl_every: Whole = 10
    """with ``beta`` 0 the KL is only measured, every so many steps (it costs a forward pass); 0: never"""
    entropy_coef: Amount = 0.0
    """weight of the entropy bonus"""
    llds_coef: Amount = 0.0
    """weight of the penalty on praised turns that become less likely all the same (LLDS, arXiv 2512.04220)"""
    explore: Whole = 0
    """of the G rollouts of a question, so many begin with a search and as many with an answer, whatever the policy
    would do. Both ways are then compared on every question, also by a policy that has (nearly) given one of them up.
    Of the tag that was put into its mouth the token that decides is trained, with ratio 1, praise in full and blame
    times its probability: off-policy guidance mixed into the group, as in LUFFY (arXiv 2504.14945), where other models
    write it. 0: plain GRPO"""
    explore_steps: Whole = 50
    """the first steps, in which ``explore`` applies"""
    pairs: Whole = 0
    """as ``explore``, in every step, and the token that decides counts as often as the policy would choose it (times
    its probability over one half): in the mean a pair teaches what two rollouts of the policy do, without the luck of
    which act they draw, as a gradient summed over all acts does (Ciosek and Whiteson 2018, "Expected Policy Gradients",
    arXiv 1801.03326). What is given up stays so: against that there is ``explore``"""
    dynamic_sampling: Whole = 0
    """DAPO's: at most so many times a step draws other questions in place of those whose groups have no variance"""
    num_iterations: Count = 1
    """updates on one batch of rollouts"""
    replay_groups: Whole = 0
    """groups of earlier steps that are trained again in each step, with the log-probabilities and advantages that were
    recorded; drawn by the size of the advantages"""
    replay_max_age: Count = 4
    """how many steps ago they may have been sampled"""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """those with 8 bits are of bitsandbytes, on a GPU"""
    max_grad_norm: Amount = 1.0
    """gradients are clipped to this norm; 0: never, as in TRL"""
    tokens_per_micro_batch: Count = 4096
    """padded tokens that one forward pass holds"""
    gradient_checkpointing: bool | Literal["auto"] = False
    """recompute activations in the backward pass: less memory, more time; "auto": where those of a micro-batch would
    take more than half of the memory that is free"""
    checkpoint_every: Count = 50
    """steps between checkpoints; the last step always has one"""
    keep_checkpoints: Count = 2
    """how many to keep, the newest ones"""
    seed: Seed = 0
    """of the order of questions and the sampling"""

    @model_validator(mode="after")
    def _fit_together(self):
        with_group, by = self.baseline in ("group_mean", "leave_one_out"), f"baseline={self.baseline!r}"
        scales, wrong = BASELINES.get(self.baseline, ("batch", "none")), ""
        forced = f"explore={self.explore}" if self.explore else f"pairs={self.pairs}" if self.pairs else ""
        if with_group and self.num_generations < 2:
            wrong = f"num_generations must be at least 2: {by} compares a rollout with the others of its group"
        elif self.scale_rewards not in scales:
            wrong = f"scale_rewards={self.scale_rewards!r} does not go with {by}; choose {' or '.join(scales)}"
        elif self.credit != "rollout" and self.baseline != "group_mean":
            wrong = f"credit={self.credit!r} compares turns within a group: it needs baseline='group_mean', not {by}"
        elif self.per_author and (self.credit != "rollout" or self.baseline != "group_mean"):
            wrong = f"per_author compares whole rollouts within a group: not with {by}, credit={self.credit!r}"
        elif self.shuffle_credit and self.credit == "rollout":
            wrong = "shuffle_credit deals out what turns got: with credit='rollout' there is nothing to shuffle"
        elif self.trees and (self.num_generations % self.trees or self.trees == self.num_generations):
            wrong = f"trees={self.trees} must divide num_generations={self.num_generations}, and be less"
        elif sum(n > 0 for n in (self.trees, self.explore, self.pairs)) > 1:
            wrong = f"trees={self.trees}, explore={self.explore}, pairs={self.pairs}: set all but one to 0"
        elif self.credit == "tree_grpo" and not self.trees:
            wrong = "credit='tree_grpo' compares rollouts of a tree: set trees, for instance to 2"
        elif self.llds_coef and self.num_iterations == 1 and not self.replay_groups:
            wrong = "llds_coef has no effect at the first update on a rollout: raise num_iterations or replay_groups"
        elif forced and not with_group:
            wrong = f"{forced} compares two ways to begin within a group: with {by} set it to 0"
        elif forced and 2 * max(self.explore, self.pairs) >= self.num_generations:
            wrong = f"{forced} must be less than half of num_generations={self.num_generations}"
        elif self.dynamic_sampling and not with_group:
            wrong = f"dynamic_sampling replaces groups without variance, which also teach with {by}: set it to 0"
        if wrong:
            raise ValueError(wrong)
        return self

    def first_actions(self, step: int) -> list[str | None]:
        """What the rollouts of a group are made to begin with in a step; see ``explore`` and ``pairs``."""
        pairs = self.pairs or (self.explore if step < self.explore_steps else 0)
        return [None] * (self.num_generations - 2 * pairs) + ["search", "answer"] * pairs

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = max(0.1, min(1.0, (self.steps - step) / (self.decay_steps + 1)))
        return self.learning_rate * rise * fall
