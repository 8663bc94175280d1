"""The learning half of a step: from scored rollouts to advantages, gradients and new weights.

``Learner`` holds what changes while a policy learns: the LoRA weights, the optimiser, a value head (PPO only) and a
reference policy. It never asks the model for text and knows nothing of files; ``trainer.Trainer`` does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..records import Trajectory
from .credit import OWN_REWARD, P_GOLD, author_advantages, compared, credit_of, gold_probabilities, turns_of_tokens
from .grpo import ADVANTAGE_EPS, gae, merge_metrics, policy_loss, value_loss
from .logits import micro_batches, padded, token_logprobs_and_entropy
from .policy import Policy, activation_bytes, free_memory
from .settings import Settings

#: The value head learns so many times faster than the policy (Search-R1, arXiv 2503.09516: 1e-5 against 1e-6).
VALUE_HEAD_SPEED = 10
#: In fp16 the loss is first multiplied by this: what is below 6e-8 would be 0 in a backward pass, above 65504 infinite.
LOSS_SCALE = 2.0**12
#: The settings that ``policy_loss`` takes as they are.
_OF_LOSS = set("loss_type epsilon epsilon_high beta kl_estimator entropy_coef llds_coef max_completion_length".split())


class TrainingError(RuntimeError):
    """Training cannot go on. The last good checkpoint stands; the message says what to try."""


class Learner:
    """Updates a policy on scored rollouts.

    Args:
        policy: with LoRA adapters; they are changed in place.
        settings: see ``Settings``; all but those of sampling and of files are used here.
        report: is told when memory runs short.
        advantages: in place of those that ``settings`` ask for, ``f(trajectories, num_generations) -> B rows``, one
            number for each token of each completion; the rollouts of a question stand next to each other.

    Raises:
        ValueError: nothing to train, something that no adapter holds, an adapter that was made for dropout, an author
            that the policy does not have, or settings that do not go with several authors.

    Attributes:
        trained: the authors of the policy that learn. Each has a loss of its own, over its own tokens, whose gradient
            goes into its own adapter alone. What another one wrote, and how that one's adapter reads, is as little its
            own as an observation: so its advantage teaches nobody else, although all look at one cache. It costs a
            backward pass for each author, on one forward pass.
        value_head: with ``baseline="value"``, a linear map from last hidden states to the expected reward, else None.
        token_budget: padded tokens a micro-batch, lowered by itself when memory runs out.
        loss_scale: of the backward pass in fp16, lowered by itself when gradients overflow; elsewhere 1.
    """

    def __init__(
        self,
        policy: Policy,
        settings: Settings,
        report: Callable[[str], None] = lambda line: None,
        advantages: Callable[[Sequence[Trajectory], int], Sequence[Sequence[float]]] | None = None,
    ):
        self.policy, self.settings, self.report, self.advantages = policy, settings, report, advantages
        self.trained = _trained_authors(policy, settings)
        _check_trainable(policy)
        self.token_budget = settings.tokens_per_micro_batch
        self.value_head = self._new_value_head() if settings.baseline == "value" else None
        self.optimizer = self._new_optimizer()
        self.loss_scale = LOSS_SCALE if policy.lm_head.weight.dtype == torch.float16 else 1.0
        self.snapshot: list[torch.Tensor] | None = None  # the reference, where it is not the base

    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that is trained."""
        return self.policy.parameters() + ([] if self.value_head is None else list(self.value_head.parameters()))

    # -- advantages ----------------------------------------------------------------------------------

    def assign_advantages(self, trajectories: Sequence[Trajectory]) -> None:
        """Set the ``advantages`` of scored rollouts, one a token; the G of a question stand next to each other."""
        s = self.settings
        if self.advantages:
            given = self.advantages(trajectories, s.num_generations)
            if [len(row) for row in given] != [len(t.mask) for t in trajectories]:
                raise ValueError("advantages must give one number for each token of each completion")
            rows = padded(given, 0.0)
        elif s.baseline == "value":
            rows = self._by_value(trajectories)
        else:
            if s.credit == "igpo":
                self._with_less_memory(lambda: self._ask_for_gold(trajectories))
            by_turn = credit_of(trajectories, s)
            rows = by_turn.gather(1, padded([turns_of_tokens(t) for t in trajectories], 0))
            writers = padded([self.policy.readers_of(t)[len(t.prompt_ids) - 1 :] for t in trajectories], 0)
            for place, author in enumerate(self.policy.authors):
                if s.per_author or OWN_REWARD + author in trajectories[0].rewards:
                    rows = torch.where(writers == place, author_advantages(trajectories, author, s), rows)
            if s.top_entropy_quantile < 1:
                rows = rows * self._is_undecided(trajectories)
        for t, row in zip(trajectories, rows.tolist()):
            t.advantages = row[: len(t.mask)]

    def assign_in_groups(self, trajectories: Sequence[Trajectory]) -> None:
        """Set the ``advantages`` of scored rollouts where groups are of any size: by their name, in any order."""
        names = {name: place for place, name in enumerate(dict.fromkeys(t.group for t in trajectories))}
        alike, rewards = ([[of(t)] for t in trajectories] for of in (lambda t: names[t.group], lambda t: t.reward))
        how = {"scale_rewards": self.settings.scale_rewards}
        for t, (a,) in zip(trajectories, compared(torch.tensor(rewards), torch.tensor(alike), **how).tolist()):
            t.advantages = [a] * len(t.mask)

    def _ask_for_gold(self, trajectories: Sequence[Trajectory]) -> None:
        how = {"temperature": self.settings.temperature, "token_budget": self.token_budget}
        for t, values in zip(trajectories, gold_probabilities(self.policy, trajectories, **how)):
            t.token_values[P_GOLD] = values

    def _is_undecided(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """False for the sampled tokens of lower entropy, seen over all of the step, (B, T)."""
        mask = padded([t.mask for t in trajectories], 0).bool()
        entropy = padded([t.token_values["entropy"] for t in trajectories], 0.0)
        return ~mask | (entropy >= entropy[mask].quantile(1 - self.settings.top_entropy_quantile))

    def _by_value(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """Advantages by GAE (B, T); leaves each token's "value" and "return" in ``token_values``."""
        s = self.settings
        estimates = self._by_token(trajectories, lambda hidden, batch: self._values(hidden))
        mask = padded([t.mask for t in trajectories], 0)
        values = padded([estimates[id(t)] for t in trajectories], 0.0)
        rewards = torch.tensor([t.reward for t in trajectories])
        advantages, returns = gae(rewards, values, mask, gamma=s.gamma, lam=s.lam)
        for t, row in zip(trajectories, returns.tolist()):
            t.token_values |= {"value": estimates[id(t)], "return": row[: len(t.mask)]}
        if s.scale_rewards == "batch":  # PPO's usual whitening
            sampled = advantages[mask.bool()]
            advantages = (advantages - sampled.mean()) / (sampled.std() + ADVANTAGE_EPS)
        return advantages.masked_fill(~mask.bool(), 0.0)

    # -- the update ----------------------------------------------------------------------------------

    def update(self, trajectories: Sequence[Trajectory], step: int) -> dict[str, float | None]:
        """``num_iterations`` optimiser steps on rollouts that have advantages; returns the metrics of the last.

        Raises:
            FloatingPointError: the loss or the gradient is no number any more; nothing was changed by this step.
            TrainingError: memory does not suffice for one rollout at a time.
        """
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate_at(step) * group["speed"]
        if s.ref_model_sync_steps and step % s.ref_model_sync_steps == 0:
            self.snapshot = [p.detach().clone() for p in self.policy.parameters()]
        measure_kl = s.beta > 0 or (s.kl_every and step % s.kl_every == 0)
        references = self.references(trajectories) if measure_kl else None
        for _ in range(s.num_iterations):
            metrics = self._with_less_memory(lambda: self.gradient(trajectories, references))
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters(), s.max_grad_norm or math.inf))
            if not norm < math.inf:
                raise FloatingPointError(f"the gradient norm is {norm}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        shown = {name: metrics.get(name) for name in ("loss", "ratio", "kl", "entropy", "value_loss")}
        shown |= {"llds": metrics["llds"]} if "llds" in metrics else {}
        return {**shown, "grad_norm": norm, "clip_fraction": metrics["clip_low"] + metrics["clip_high"]}

    def gradient(self, trajectories: Sequence[Trajectory], references: dict[int, list[float]] | None = None) -> dict:
        """Leave the gradient of the loss in ``.grad`` of all ``parameters()``; returns the loss's metrics.

        Rollouts that cannot have a gradient (advantage 0, no penalty, no bonus) are measured, without a backward
        pass. ``references`` are log-probabilities under the reference, by ``id`` of the trajectory; ``beta`` > 0
        needs them, without it they are only compared. Where fp16 overflows, all is done again with a lower
        ``loss_scale``; what is still no number then is left to the caller.
        """
        while True:
            metrics = self._backward(trajectories, references)
            grads = [p.grad.div_(self.loss_scale) for p in self.parameters()]
            if self.loss_scale == 1 or torch.nn.utils.get_total_norm(grads).isfinite():
                return metrics
            self.loss_scale = max(1.0, self.loss_scale / 8)
            self.report(f"fp16 overflowed: the gradient again with a loss scale of {self.loss_scale:g}")

    def _backward(self, trajectories: Sequence[Trajectory], references: dict[int, list[float]] | None) -> dict:
        """Leave ``loss_scale`` times the gradient in ``.grad``; returns the loss's metrics."""
        counts = {author: sum(self._trained_tokens(t, author) for t in trajectories) for author in self.trained}
        own = {author: self.policy.parameters(author) for author in self.trained}
        for p in self.parameters():
            p.grad = torch.zeros_like(p)
        parts = []
        for learns in (True, False):
            rows = [t for t in trajectories if self._is_idle(t) != learns]
            for part in micro_batches(rows, self.token_budget):
                with torch.set_grad_enabled(learns):
                    losses = self._losses(part, references, counts, len(trajectories))
                wrote = [author for author, (_, metrics) in losses.items() if learns and metrics["tokens"]]
                for author in wrote:
                    # of one author also the value head's; of several what an author's tokens ask of its own adapter
                    how = {"inputs": own[author], "retain_graph": author != wrote[-1]} if len(self.trained) > 1 else {}
                    (losses[author][0] * self.loss_scale).backward(**how)
                parts += [metrics for _, metrics in losses.values()]
        return merge_metrics(parts)

    def _trained_tokens(self, t: Trajectory, author: str) -> int:
        spelt = t.authors[t.forced] if t.authors and t.forced is not None else self.policy.authors[0]
        own = sum(t.mask_of(author)) + (t.forced is not None and author == spelt)
        return own if self.settings.mask_observations else len(t.mask)

    def _is_idle(self, t: Trajectory) -> bool:
        s = self.settings
        return not (s.beta or s.entropy_coef or s.llds_coef or s.baseline == "value" or any(t.advantages))

    def _losses(self, part, references, counts: dict[str, int], sequences: int) -> dict[str, tuple[torch.Tensor, dict]]:
        """By author its loss on a part of ``sequences`` rollouts, in all of which it has ``counts`` tokens."""
        s = self.settings
        hidden, batch = self._hidden(part)
        logprobs, entropy = self._logprobs(hidden, batch)
        # What the policy did not sample (a forced token, text under mask_observations=False) has no recorded
        # log-probability: it is compared with itself, so its ratio is 1 and its KL 0.
        recorded = lambda rows: torch.where(batch.sampled.bool(), batch.column(rows), logprobs.detach())
        old = recorded([t.logprobs for t in part])  # before the first update equal to logprobs: every ratio is 1
        reference = recorded([references[id(t)] for t in part]) if references else None
        advantages = batch.column([t.advantages for t in part])
        advantages = _weigh_forced(advantages, logprobs.detach(), batch.forced, s.pairs > 0)
        how = {**s.model_dump(include=_OF_LOSS), "num_sequences": sequences, "ref_logprobs": reference}
        losses = {}
        for author in self.trained:
            mask = batch.mask * (batch.readers[:, :-1] == self.policy.places[author])
            of_author = {"entropy": entropy, "num_tokens": max(1, counts[author])}
            losses[author] = policy_loss(logprobs, old, advantages, mask, **how, **of_author)
        if self.value_head is not None:
            (author,) = losses
            losses[author] = self._with_value_loss(*losses[author], part, hidden, batch, max(1, counts[author]))
        return losses

    def _with_value_loss(self, loss, metrics, part, hidden, batch, num_tokens: int) -> tuple[torch.Tensor, dict]:
        s = self.settings
        old, returns = (batch.column([t.token_values[name] for t in part]) for name in ("value", "return"))
        how = {"cliprange_value": s.cliprange_value, "num_tokens": num_tokens}
        error = value_loss(self._values(hidden), old, returns, batch.mask, **how)
        loss = loss + s.vf_coef * error
        share = num_tokens / max(1.0, float(metrics["tokens"]))  # to a mean over this part's tokens
        return loss, {**metrics, "loss": loss.detach(), "value_loss": error.detach() * share}

    # -- forward passes ------------------------------------------------------------------------------

    def references(self, trajectories: Sequence[Trajectory]) -> dict[int, list[float]]:
        """Log-probabilities under the reference, by ``id`` of the trajectory; 0.0 where the model wrote nothing."""
        with self._as_reference():
            return self._by_token(trajectories, lambda hidden, batch: self._logprobs(hidden, batch)[0])

    @torch.no_grad()
    def _by_token(self, trajectories: Sequence[Trajectory], measure: Callable) -> dict[int, list[float]]:
        """What ``measure(hidden, batch)`` (B, L - 1) says of the tokens of each completion, by ``id``."""

        def compute():
            by_id = {}
            for part in micro_batches(trajectories, self.token_budget):
                hidden, batch = self._hidden(part)
                for t, row, start in zip(part, measure(hidden, batch).tolist(), batch.starts):
                    by_id[id(t)] = row[start : start + len(t.mask)]
            return by_id

        return self._with_less_memory(compute)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self.snapshot is None:
            with self.policy.reference():
                yield
            return
        now = [p.data for p in self.policy.parameters()]
        try:
            for p, data in zip(self.policy.parameters(), self.snapshot):
                p.data = data
            yield
        finally:
            for p, data in zip(self.policy.parameters(), now):
                p.data = data

    def _hidden(self, part: Sequence[Trajectory]) -> tuple[torch.Tensor, Batch]:
        """The states (B, T, H) that predict each token, and the tokens."""
        batch = Batch.of(part, self.policy, mask_observations=self.settings.mask_observations)
        # padding stands on the right, where no token looks: without a mask attention takes its faster causal path
        hidden = self.policy.hidden(batch.ids, batch.readers, use_cache=False)
        return hidden[:, :-1], batch

    def _logprobs(self, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        head = self.policy.lm_head
        how = {"bias": head.bias, "mask": batch.mask, "temperature": self.settings.temperature}
        return token_logprobs_and_entropy(hidden, head.weight, batch.ids[:, 1:], **how)

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.value_head(hidden.float()).squeeze(-1)

    def _with_less_memory(self, compute):
        """``compute()``, again in smaller micro-batches for as long as memory runs out."""
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                if self.token_budget < 256:
                    lower = "lower max_completion_length or num_generations, or set gradient_checkpointing=True"
                    raise TrainingError(f"out of memory with one rollout at a time; {lower}") from None
                self.token_budget //= 2
                torch.cuda.empty_cache()
                self.report(f"out of memory: going on with micro-batches of {self.token_budget} tokens")

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Within it activations are recomputed in the backward pass, if the settings say so."""
        asked = self.settings.gradient_checkpointing
        if asked == "auto":
            asked = self.token_budget * activation_bytes(self.policy) > free_memory(self.policy.device) // 2
        if not asked:
            yield
            return
        self.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            self.policy.model.gradient_checkpointing_disable()

    # -- what is trained, and its state --------------------------------------------------------------

    def _new_value_head(self) -> torch.nn.Linear:
        head = torch.nn.Linear(self.policy.lm_head.in_features, 1, device=self.policy.device, dtype=torch.float32)
        for p in head.parameters():
            torch.nn.init.zeros_(p)
        return head

    def _new_optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        rates = {author: s.learning_rates.get(author, s.learning_rate) for author in self.trained}
        groups = [{"params": self.policy.parameters(a), "speed": rate / s.learning_rate} for a, rate in rates.items()]
        if self.value_head is not None:
            groups.append({"params": list(self.value_head.parameters()), "speed": VALUE_HEAD_SPEED})
        if s.optim == "paged_adamw_8bit" and self.policy.device.type != "cuda":
            raise ValueError(f"optim={s.optim!r} pages out a GPU's memory: here choose 'adamw_8bit' or 'adamw_torch'")
        kind: Any = torch.optim.AdamW
        if s.optim != "adamw_torch":
            from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

            kind = AdamW8bit if s.optim == "adamw_8bit" else PagedAdamW8bit
        return kind(groups, lr=s.learning_rate, weight_decay=0.0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything but the adapter that a later run needs to go on exactly, flat."""
        flat = {"loss_scale": torch.tensor(self.loss_scale)}
        for i, p in enumerate(self.parameters()):
            flat |= {f"optimizer/{i}/{name}": torch.as_tensor(v) for name, v in self.optimizer.state[p].items()}
        if self.value_head is not None:
            flat |= {f"value_head/{name}": v for name, v in self.value_head.state_dict().items()}
        flat |= {f"reference/{i}": v for i, v in enumerate(self.snapshot or ())}
        return {name: v.detach().clone().contiguous() for name, v in flat.items()}

    def load_tensors(self, flat: dict[str, torch.Tensor]) -> None:
        """Put back what ``tensors`` gave."""
        self.loss_scale = float(flat["loss_scale"])
        of = lambda part: {k.removeprefix(part): v for k, v in flat.items() if k.startswith(part)}
        parameters, torchs = self.parameters(), self.settings.optim == "adamw_torch"
        for key, value in of("optimizer/").items():
            number, name = key.split("/")
            if name == "step":  # a tensor on the CPU for torch, a number for bitsandbytes
                value = value.cpu() if torchs else int(value)
            self.optimizer.state[parameters[int(number)]][name] = value
        if self.value_head is not None:
            self.value_head.load_state_dict(of("value_head/"))
        snapshot = of("reference/")
        self.snapshot = [snapshot[str(i)] for i in range(len(snapshot))] or None


def _trained_authors(policy: Policy, settings: Settings) -> list[str]:
    """The authors that learn; of several the others are frozen."""
    s, known = settings, policy.authors
    if odd := sorted({*s.trained, *s.learning_rates} - {*known}):
        raise ValueError(f"trained and learning_rates: {', '.join(odd)} is no author of this policy; {known} are")
    trained = [author for author in known if author in (s.trained or known)]
    if len(known) > 1:
        if s.baseline == "value" or not s.mask_observations:
            raise ValueError("baseline='value' and mask_observations=False know one author, not " + ", ".join(known))
        for name, p in policy.model.named_parameters():
            p.requires_grad_("lora_" in name and name.split(".")[-2] in trained)
    return trained


def _check_trainable(policy: Policy) -> None:
    """Raise ValueError where the adapter, which is all that a checkpoint holds of a model, is not what is trained."""
    from peft import get_peft_model_state_dict

    model = policy.model
    if not hasattr(model, "disable_adapter"):
        raise ValueError("the policy has no LoRA adapter to train; load it with lora=True")
    held = set()
    for name in model.active_adapters:
        if rate := model.peft_config[name].lora_dropout:
            raise ValueError(f"the adapter was made with lora_dropout={rate}; to train on, set it to 0 in its settings")
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        held |= {v.data_ptr() for v in state.values()}
    trained = {name: p.data_ptr() in held for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("the policy has nothing to train: its adapter is frozen")
    if lost := [name for name, is_held in trained.items() if not is_held]:
        raise ValueError(f"{lost[0]} (of {len(lost)}) would be trained, but no adapter holds it: freeze it")


@dataclass
class Batch:
    """Trajectories as tensors: prompt and completion in a row, padded on the right.

    ids, readers: (B, L), see ``Policy.hidden``. The others say something of ``ids[:, 1:]``, (B, L - 1): sampled, 1
    where the model wrote it; forced, 1 for the token that decided which tag was put into the model's mouth; mask, what
    is trained: both of these, or with ``mask_observations=False`` the whole completions. starts: the column at which
    each completion begins.
    """

    ids: torch.Tensor
    readers: torch.Tensor
    sampled: torch.Tensor
    forced: torch.Tensor
    mask: torch.Tensor
    starts: list[int]

    @classmethod
    def of(cls, part: Sequence[Trajectory], policy: Policy, *, mask_observations: bool = True) -> Batch:
        """The batch for a policy: what another one wrote is as little its own as an observation."""
        starts = [len(t.prompt_ids) - 1 for t in part]
        lay = lambda rows: padded([[0] * start + row for start, row in zip(starts, rows)], 0, policy.device)
        ids = padded([t.prompt_ids + t.completion_ids for t in part], policy.pad_id, policy.device)
        readers = padded([[*policy.readers_of(t), 0] for t in part], 0, policy.device)
        sampled = sum(lay([t.mask_of(author) for t in part]) for author in policy.authors)
        # of a forced tag only the token that decides: the others are certain, and blame on what is certain spoils it
        # without any gain (the tag of a blamed answer was misspelt after some dozens of steps)
        forced = lay([[int(i == t.forced) for i in range(len(t.mask))] for t in part])
        mask = sampled | forced if mask_observations else lay([[1] * len(t.mask) for t in part])
        return cls(ids, readers, sampled, forced, mask, starts)

    def column(self, values: Sequence[Sequence[float]]) -> torch.Tensor:
        """Per-token values of the completions laid out like ``mask``, (B, L - 1), 0 elsewhere."""
        return padded([[0.0] * start + [*v] for v, start in zip(values, self.starts)], 0.0, self.mask.device)


def _weigh_forced(advantages: torch.Tensor, logprobs: torch.Tensor, forced: torch.Tensor, pairs: bool) -> torch.Tensor:
    """Advantages (B, T), those of forced tokens weighed by the probability pi that the policy gives to the token.

    ``explore``: praise in full, A (1 - pi), which ends when the policy does it by itself. Blame would have no bound:
    the rarer the token already, the larger its share. Times pi it ends when the policy would not do it any more.
    ``pairs``: both times pi over the pair's 1/2, the importance weight. The mean over the pair is then the gradient of
    what the policy earns, which ends at the better act; praise in full ends at each act as often as it wins.
    """
    weight = 2 * logprobs.exp() if pairs else torch.where(advantages < 0, logprobs.exp(), 1.0)
    return torch.where(forced.bool(), advantages * weight, advantages)
