"""GRPO and its relatives as pure functions on tensors: advantages and losses.

Symbols as in the papers: B rollouts, T completion tokens, G rollouts of one question (a group), V vocabulary,
H hidden size; ``r`` a reward, ``A`` an advantage, ``w = exp(logprobs - old_logprobs)`` the importance ratio.
``mask`` is 1 where the model sampled the token and 0 for environment text and padding. What stands at a
masked position never matters, not even NaN.

Where this departs from the papers or from TRL 1.16, with which the values agree otherwise:

- The sums of a loss are divided by counts of the *whole* batch, which can be passed in. A batch in micro-batches
  therefore gives the gradients of the unsplit batch, for every loss type.
- ``gspo`` is written in its token form (GSPO, arXiv 2507.18071, section 4.3): same value and gradient as the sequence
  form for one advantage per rollout, and the right credit for one per token.
- A NaN or infinite number on a sampled token is an error that says where, not a silent step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from ..environment.limits import Amount, Share, check
from ..metrics import EQUAL_REWARDS
from .settings import BASELINES, KL_ESTIMATORS, LOSS_TYPES

ADVANTAGE_EPS = 1e-4  #: added to every standard deviation, as TRL does
ROUNDING = 1e-3  #: nats by which the log-probability of a turn may differ, read twice by the same policy
CISPO_CAP = 5.0  #: cap of the ratio in ``cispo`` when none is given (ScaleRL, arXiv 2510.13786)


# ---------------------------------------------------------------------------------------------- advantages


def group_advantages(
    rewards: Sequence[float] | torch.Tensor,
    group_size: int,
    *,
    scale_rewards: str = "group",
    baseline: str = "group_mean",
) -> torch.Tensor:
    """How much better each rollout did than expected: ``A = (r - baseline) / (std + 1e-4)``.

    ============================  =============  =============================================================
    baseline                      scale_rewards  name and source
    ============================  =============  =============================================================
    group_mean                    group          GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2)
    group_mean                    none           Dr. GRPO (arXiv 2503.20783, section 3.2)
    group_mean                    batch          group mean, std over the batch (Lite PPO, arXiv 2508.08221)
    leave_one_out                 none           RLOO (arXiv 2402.14740)
    batch_mean                    batch          REINFORCE++ (arXiv 2501.03262): global normalisation
    none                          none           REINFORCE (Williams 1992)
    ============================  =============  =============================================================

    Args:
        rewards: (B,), the G rollouts of a question next to each other.
        group_size: G; divides B.
        scale_rewards: whose standard deviation (with Bessel's correction) divides: "group", "batch", or "none".
        baseline: what is subtracted; "leave_one_out" is the mean of the *other* rollouts of the group.

    Returns:
        (B,) float32. A group whose rewards are all equal gets 0 under both group baselines.

    Raises:
        ValueError: a reward is not finite, B is no multiple of G, a name is unknown, baseline and scaling do not
            go together, or G (or B) is 1 where a mean or standard deviation is asked of it.

    >>> group_advantages([1., 0., 0., 1.], 4, scale_rewards="none")
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    >>> group_advantages([1., 0., 0., 1.], 4)
    tensor([ 0.8659, -0.8659, -0.8659,  0.8659])
    >>> group_advantages([1., 0., 0., 1.], 4, baseline="leave_one_out", scale_rewards="none")
    tensor([ 0.6667, -0.6667, -0.6667,  0.6667])
    """
    _one_of("baseline", baseline, BASELINES)
    _one_of(f"scale_rewards (with baseline={baseline!r})", scale_rewards, BASELINES[baseline])
    grouped = _grouped(rewards, group_size)
    in_group = baseline in ("group_mean", "leave_one_out")
    if in_group and group_size < 2:
        raise ValueError(f"group_size is {group_size}: baseline={baseline!r} needs at least 2 rollouts a question")
    if scale_rewards == "batch" and grouped.numel() < 2:
        raise ValueError("scale_rewards='batch' needs at least 2 rewards")
    usual = grouped.mean(1, keepdim=True) if in_group else grouped.mean()
    centred = grouped if baseline == "none" else grouped - usual
    if baseline == "leave_one_out":  # the mean of the others is further away by just this factor
        centred = centred * (group_size / (group_size - 1))
    if scale_rewards != "none":
        spread = grouped.std(1, keepdim=True) if scale_rewards == "group" else grouped.std()
        centred = centred / (spread + ADVANTAGE_EPS)
    return centred.flatten().float()


def groups_without_variance(rewards: Sequence[float] | torch.Tensor, group_size: int) -> torch.Tensor:
    """Which groups teach nothing because all their rewards are equal (to 1e-6): (B / G,) bool; ``.sum()`` counts them.

    DAPO (arXiv 2503.14476, section 3.2) samples such groups again.

    >>> groups_without_variance([1., 1., 0., 1.], 2)
    tensor([ True, False])
    """
    grouped = _grouped(rewards, group_size)
    return grouped.amax(1) - grouped.amin(1) <= EQUAL_REWARDS


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) for PPO with a value head.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, where t + 1 is the next
    token that the *model* sampled: environment text is stepped over. After the last token the value is 0.

    Args:
        rewards: (B, T), or (B,) for rewards that fall on the last sampled token of each rollout.
        values: (B, T), the value head's estimate before each token is sampled.
        mask: (B, T).
        gamma, lam: discount and trace decay, 1.0 in Search-R1.

    Returns:
        advantages and returns (targets of the value head, ``A + V``), each (B, T), 0 where the mask is 0.

    Raises:
        ValueError: shapes do not fit, or gamma or lam is not from 0 to 1.
        FloatingPointError: a reward or value on a sampled token is NaN or infinite.

    >>> gae(torch.tensor([1.]), torch.tensor([[0.5, 9., 0.75]]), torch.tensor([[1, 0, 1]]))
    (tensor([[0.5000, 0.0000, 0.2500]]), tensor([[1., 0., 1.]]))
    """
    check(gamma=(gamma, Share), lam=(lam, Share))
    kept = mask.bool()
    values = _on_mask("values", values, kept)
    if rewards.dim() == 1:
        last = kept & (kept.flip(1).cumsum(1).flip(1) == 1)
        rewards = torch.where(last, rewards.to(values).unsqueeze(1), 0.0)
    rewards = _on_mask("rewards", rewards, kept)
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(kept[:, t], advantage, 0.0)
        next_advantage = torch.where(kept[:, t], advantage, next_advantage)
        next_value = torch.where(kept[:, t], values[:, t], next_value)
    return advantages, advantages + values


# ---------------------------------------------------------------------------------------------------- loss


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logprobs: torch.Tensor | None = None,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    llds_coef: float = 0.0,
    max_completion_length: int | None = None,
    num_sequences: float | None = None,
    num_tokens: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss to minimise, ``-J + beta KL - entropy_coef entropy``, and its metrics.

    Per token ``J_t = min(w_t A, clip(w_t, 1 - epsilon, 1 + epsilon_high) A)``, summed over sampled tokens and divided:

    =========  =======================================================  ==========================================
    loss_type  divided by                                               source
    =========  =======================================================  ==========================================
    grpo       the rollout's tokens, then the number of rollouts        DeepSeekMath, arXiv 2402.03300, eq. 3
    dr_grpo    ``num_sequences * max_completion_length``                Dr. GRPO, arXiv 2503.20783
    dapo       ``num_tokens``                                           DAPO, arXiv 2503.14476, section 3.3
    bnpo       ``num_tokens``                                           TRL's name for the mean over the batch
    cispo      ``num_tokens``; ``J_t = sg[min(w_t, epsilon_high)] A     MiniMax-M1, arXiv 2506.13585, section 3.1;
               log pi``, where sg stops the gradient                    ScaleRL, arXiv 2510.13786
    gspo       as grpo; w is the rollout's geometric mean ratio         GSPO, arXiv 2507.18071, section 4
    =========  =======================================================  ==========================================

    Args:
        logprobs: (B, T), of the policy that learns; the only input besides ``entropy`` that gets a gradient.
        old_logprobs: (B, T), recorded while sampling.
        advantages: (B,), or (B, T) for credit per token.
        mask: (B, T), 1 = sampled by the model.
        epsilon, epsilon_high: clip range below and above; ``epsilon_high=None`` means ``epsilon``, a larger one is
            DAPO's clip-higher. For cispo it is the cap of the ratio itself, as in TRL (None: 5.0).
        beta: weight of the KL divergence from ``ref_logprobs`` (B, T), needed when beta is not 0; where it is
            given with beta 0 the KL is reported only.
        kl_estimator: with ``x = ref_logprobs - logprobs``: "k1" ``-x``, "k2" ``x^2 / 2``, "k3" ``e^x - x - 1``
            (Schulman, "Approximating KL divergence", 2020). k1 is a measure, not a good loss: on-policy its
            gradient is 0 on average.
        use_bias_correction_kl: multiply each token's KL by w, so that k3's gradient is that of the true KL also
            off-policy (DeepSeek-V3.2, arXiv 2512.02556). TRL 1.16 does so by default; GRPO as published
            does not, and that is the default here.
        entropy: (B, T) in nats; its mean over sampled tokens, times ``entropy_coef``, is rewarded.
        llds_coef: weight of LLDS (Deng et al. 2025, arXiv 2512.04220, with its action-level gate): in a turn (an
            unbroken run of sampled tokens) whose advantages are not negative and that has become less likely as a
            whole since it was sampled, each token adds what it has lost, ``max(0, old_logprobs - logprobs)``. Divided
            like the rest of the loss. At the first update on a batch nothing has been lost yet.
        max_completion_length: dr_grpo's constant, in tokens.
        num_sequences, num_tokens: rollouts and sampled tokens of the whole batch of one optimiser step, when this
            call is one micro-batch of it; the losses then add up to the unsplit one. None: those of this call. With
            several steps on one batch of rollouts, dapo's ``num_tokens`` is that batch's tokens / steps (TRL), and
            bnpo's the tokens of the step; otherwise the two are the same.

    Returns:
        loss: scalar; 0 with zero gradients where the mask is empty.
        metrics: detached scalars: "loss"; "tokens" sampled; and as means over sampled tokens "ratio" (w), "clip_low"
            and "clip_high" (share of tokens whose clipped side applies), "kl", "entropy" and "llds" where given.
            Combine those of micro-batches with ``merge_metrics``.

    Raises:
        ValueError: a shape, a name or a number is wrong.
        FloatingPointError: NaN or infinity on a sampled token (says which), or in the loss.

    Two rollouts of two tokens; the ratio 1.5 of the first token is clipped to 1.2:

    >>> old = torch.zeros(2, 2)
    >>> new = torch.tensor([[1.5, 1.0], [1.0, 1.0]]).log()
    >>> loss, metrics = policy_loss(new, old, torch.tensor([1.0, -1.0]), torch.tensor([[1, 1], [1, 0]]))
    >>> round(loss.item(), 4)                                      # -((1.2 + 1) / 2 - 1) / 2
    -0.05
    >>> round(metrics["clip_high"].item(), 4), metrics["tokens"].item()
    (0.3333, 3.0)
    """
    numbers = {"epsilon": (epsilon, Amount), "epsilon_high": (epsilon_high, Amount | None)}
    check(**numbers, beta=(beta, Amount), entropy_coef=(entropy_coef, Amount), llds_coef=(llds_coef, Amount))
    _check_loss(loss_type, kl_estimator, beta, ref_logprobs, entropy_coef, entropy, max_completion_length)
    kept = mask.bool()
    if advantages.dim() == 1 and kept.dim() == 2 and len(advantages) == len(kept):
        advantages = advantages.unsqueeze(1).expand(kept.shape)
    logprobs = _on_mask("logprobs", logprobs, kept)
    old_logprobs = _on_mask("old_logprobs", old_logprobs, kept).detach()
    advantages = _on_mask("advantages", advantages, kept).detach()
    num_sequences = len(kept) if num_sequences is None else num_sequences
    num_tokens = int(kept.sum()) if num_tokens is None else num_tokens
    if num_sequences < len(kept) or num_tokens < 0:
        raise ValueError(f"num_sequences={num_sequences}, num_tokens={num_tokens}: give those of the whole batch")
    num_tokens = max(num_tokens, 1)

    low, high = _clip_range(loss_type, epsilon, epsilon_high)
    log_ratio = _log_ratio(logprobs, old_logprobs, kept, by_rollout=loss_type == "gspo")
    ratio = log_ratio.exp()
    per_token = _surrogate(loss_type, ratio, advantages, logprobs, low, high)
    clipped = {"clip_low": (ratio < low) & (advantages < 0), "clip_high": (ratio > high) & (advantages > 0)}
    measured = {"ratio": ratio, **clipped}
    if ref_logprobs is not None:
        measured["kl"] = kl = _kl(logprobs, _on_mask("ref_logprobs", ref_logprobs, kept).detach(), kl_estimator)
        correction = (logprobs - old_logprobs).exp() if use_bias_correction_kl else 1.0
        per_token = per_token + beta * kl * correction if beta else per_token
    if llds_coef:
        measured["llds"] = lost = _displacement(logprobs, old_logprobs, kept & (advantages >= 0))
        per_token = per_token + llds_coef * lost
    per_token = per_token.masked_fill(~kept, 0.0)
    loss = _divided(loss_type, per_token, kept, num_sequences, num_tokens, max_completion_length)
    if entropy is not None:
        measured["entropy"] = entropy = _on_mask("entropy", entropy, kept)
        loss = loss - entropy_coef * entropy.sum() / num_tokens if entropy_coef else loss
    if not (loss.isfinite() and ratio.isfinite().all()):  # an infinite ratio has NaN gradients, even if clipped
        far = "The policy has moved too far from the one that sampled; lower the learning rate or do fewer updates."
        reach = f"log-ratios reach {log_ratio.abs().max().item():.3g}"
        raise FloatingPointError(f"the loss is {loss.item()}, from finite inputs: {reach}. {far}")
    count = kept.sum()
    metrics = {name: (value.detach() * kept).sum() / count.clamp(min=1) for name, value in measured.items()}
    return loss, {"loss": loss.detach(), "tokens": count.float(), **metrics}


def _check_loss(loss_type, kl_estimator, beta, ref_logprobs, entropy_coef, entropy, max_completion_length) -> None:
    _one_of("loss_type", loss_type, LOSS_TYPES)
    _one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    for name, value, tensor in (("beta", beta, ref_logprobs), ("entropy_coef", entropy_coef, entropy)):
        if value and tensor is None:
            raise ValueError(f"{name} is {value}: also give {'ref_logprobs' if name == 'beta' else 'entropy'}")
    if loss_type == "dr_grpo" and not (max_completion_length and max_completion_length > 0):
        raise ValueError("dr_grpo divides by max_completion_length: give the token budget of a completion")


def _surrogate(loss_type, ratio, advantages, logprobs, low: float, high: float) -> torch.Tensor:
    """-J of each token, (B, T)."""
    if loss_type == "cispo":
        return -ratio.clamp(max=high).detach() * advantages * logprobs
    return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)


def _displacement(logprobs, old_logprobs, spared: torch.Tensor) -> torch.Tensor:
    """What each token has lost in likelihood, (B, T), in runs of ``spared`` tokens that have lost some as a whole."""
    lost = (old_logprobs - logprobs).masked_fill(~spared, 0.0)
    run = (spared & ~torch.nn.functional.pad(spared, (1, -1))).cumsum(1)
    total = lost.new_zeros(len(run), run.shape[1] + 1).scatter_add(1, run, lost.detach())
    return lost.clamp(min=0) * (total > ROUNDING).gather(1, run)


def _divided(loss_type, per_token, kept, num_sequences, num_tokens, max_completion_length) -> torch.Tensor:
    """The sum over all tokens, divided as the type of loss has it."""
    if loss_type in ("grpo", "gspo"):
        return (per_token.sum(1) / kept.sum(1).clamp(min=1)).sum() / num_sequences
    if loss_type == "dr_grpo":
        return per_token.sum() / (num_sequences * max_completion_length)
    return per_token.sum() / num_tokens


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange_value: float = 0.2,
    num_tokens: float | None = None,
) -> torch.Tensor:
    """The loss of PPO's value head: ``max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2``, mean over tokens.

    Schulman et al. 2017 (arXiv 1707.06347) leave the form open; this is the clipped one of OpenAI's baselines, which
    TRL's PPO has as well.

    Args:
        values: (B, T), the only input that gets a gradient; old_values: (B, T), while sampling.
        returns: (B, T), R; see ``gae``.
        mask: (B, T).
        cliprange_value: c.
        num_tokens: sampled tokens of the whole batch where this call is one micro-batch of it.

    Raises:
        ValueError: shapes do not fit, or cliprange_value is negative or not finite.
        FloatingPointError: NaN or infinity on a sampled token.

    The value went from 0 to 0.5, but only 0.2 of it counts; the return is 1:

    >>> value_loss(torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[1]]))
    tensor(0.3200)
    """
    check(cliprange_value=(cliprange_value, Amount))
    kept = mask.bool()
    values = _on_mask("values", values, kept)
    old_values, returns = _on_mask("old_values", old_values, kept).detach(), _on_mask("returns", returns, kept).detach()
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error = torch.max((values - returns).square(), (clipped - returns).square())
    return error.sum() / 2 / max(1, int(kept.sum()) if num_tokens is None else num_tokens)


def merge_metrics(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The metrics of a batch from those of its micro-batches: "loss" and "tokens" add up, the others are means
    over tokens. Exact, because each part carries its number of tokens. Raises ValueError where there is no part.

    >>> a, b = {"loss": .1, "tokens": 1., "kl": 4.}, {"loss": .2, "tokens": 3., "kl": 0.}
    >>> {name: round(value, 4) for name, value in merge_metrics([a, b]).items()}
    {'loss': 0.3, 'tokens': 4.0, 'kl': 1.0}
    """
    rows = [{name: float(value) for name, value in part.items()} for part in parts]
    if not rows:
        raise ValueError("there are no metrics to merge")
    loss, tokens = (sum(row[name] for row in rows) for name in ("loss", "tokens"))
    means = {name: sum(row[name] * row["tokens"] for row in rows) / max(tokens, 1.0) for name in rows[0]}
    return means | {"loss": loss, "tokens": tokens}


# ------------------------------------------------------------------------------------------------- helpers


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _grouped(rewards: Sequence[float] | torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards as (groups, G) float64, checked."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64).detach()
    if rewards.dim() != 1 or group_size < 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not split into groups of {group_size}")
    if not (finite := rewards.isfinite()).all():
        i = int((~finite).nonzero()[0])
        raise ValueError(f"the reward of rollout {i} is {rewards[i].item()}; a reward must be a finite number")
    return rewards.view(-1, group_size)


def _on_mask(name: str, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``values`` in fp32 at least, and 0 where the mask is 0; an error where a kept one is not finite."""
    if kept.dim() != 2 or values.shape != kept.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; the mask's is {tuple(kept.shape)}, (B, T)")
    # filled, not multiplied by 0: that would leave a NaN of the padding a NaN, and in the gradient too
    values = values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~kept, 0.0)
    if not (finite := values.isfinite()).all():
        b, t = (~finite).nonzero()[0].tolist()
        more = int((~finite).sum()) - 1
        raise FloatingPointError(f"{name} is {values[b, t].item()} at rollout {b}, token {t} (and at {more} more)")
    return values


def _log_ratio(logprobs, old_logprobs, kept: torch.Tensor, *, by_rollout: bool) -> torch.Tensor:
    """log w, (B, T). By rollout: the mean over its tokens as the value, a token's own gradient (GSPO's token form)."""
    log_ratio = logprobs - old_logprobs
    if not by_rollout:
        return log_ratio
    mean = log_ratio.detach().sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return mean + (logprobs - logprobs.detach())


def _clip_range(loss_type: str, epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """The bounds of the ratio, lower and upper."""
    if loss_type != "cispo":
        return 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    cap = CISPO_CAP if epsilon_high is None else epsilon_high
    if cap < 1:
        warnings.warn(f"cispo caps the ratio itself at epsilon_high={cap}, below 1; usual is 5.0", stacklevel=3)
    return 0.0, cap


def _kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    x = ref_logprobs - logprobs
    return {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - x - 1}[estimator]
