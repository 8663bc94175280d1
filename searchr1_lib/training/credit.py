"""Ways to give credit: how much each turn of a rollout did for its reward, as an advantage for each turn.

Pure functions on tensors, and ``credit_of``, which reads what they need off recorded trajectories. Symbols: B rollouts,
the G of a question next to each other (a group), K turns at most; ``turn_rewards`` (B, K) is what each turn earned, NaN
where the rollout had no such turn; an advantage (B, K) is 0 there. A rollout's reward is the sum of its turns' rewards.

=========  =======================================================================================================
credit     advantage of turn k
=========  =======================================================================================================
rollout    the rollout's, for all its turns (``grpo.group_advantages``)
return     the rewards from turn k on, beside those of turn k of the group
gigpo      the rollout's + w times (the rewards from k on, beside those of every turn that began in the same state);
           GiGPO (arXiv 2505.10978)
igpo       how much likelier the right answer became, summed from k on with the reward; IGPO (arXiv 2510.14967)
stepsearch as return, of rewards + w times (new gold passages - those read again); StepSearch (arXiv 2505.15107)
mt_grpo    the last turn's + w times turn k's own; MT-GRPO (arXiv 2505.11821)
tree_grpo  the rollout's in its group + the rollout's in its tree; Tree-GRPO (arXiv 2509.21240)
potential  as return, of rewards + potential-based shaping (Ng, Harada and Russell, ICML 1999)
=========  =======================================================================================================

w is ``Settings.credit_weight``. StepSearch trains with PPO; only what it pays a turn is taken, and compared within the
group as all else here.

More credit is not better credit: in 17 runs of a public comparison (RainyFields/Agentic-RL-CA) step rewards that were
shuffled did as well as real ones. So ``shuffled`` is the control of each of them, and ``values_of_continuing`` the
yardstick.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from ..environment.limits import check
from ..records import Trajectory
from ..rewards import InformationGain, score
from ..rewards.base import RewardFunction, turn_count
from .grpo import ADVANTAGE_EPS, group_advantages
from .logits import micro_batches, padded, token_logprobs_and_entropy
from .policy import Policy
from .rollout import continuations, token_ends, turn_start
from .settings import Settings

#: ``token_values`` of it: how likely the right answer is, asked where the token's turn acts (``gold_probabilities``).
P_GOLD = "p_gold"
#: Before an author's name in ``rewards``: the reward that it has for itself, see ``Trainer``.
OWN_REWARD = "author/"

# --------------------------------------------------------------------------------- advantages by turn, on tensors


def compared(values: torch.Tensor, alike: torch.Tensor, *, scale_rewards: str = "group") -> torch.Tensor:
    """Values beside the mean of those that are alike: ``(v - mean) / (std + 1e-4)``.

    Args:
        values: (B, K); what is NaN takes no part and gets 0.
        alike: (B, K) long, from 0: values with the same number are compared. One that is alone gets 0.
        scale_rewards: whose standard deviation (with Bessel's correction) divides: "group", of those that are alike,
            "batch", of all, or "none".

    >>> compared(torch.tensor([[1., 5.], [3., math.nan]]), torch.tensor([[0, 1], [0, 1]]), scale_rewards="none")
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    used = ~values.isnan()
    v, label = values[used].double(), alike[used]
    total = lambda x: torch.zeros(int(label.max()) + 1, dtype=x.dtype).index_add_(0, label, x)
    count = total(torch.ones_like(v))
    difference = v - (total(v) / count)[label]
    if scale_rewards == "group":
        difference = difference / (
            (total(difference.square()) / (count - 1).clamp(min=1)).sqrt()[label] + ADVANTAGE_EPS
        )
    elif scale_rewards == "batch":
        difference = difference / (v.std() + ADVANTAGE_EPS)
    return torch.zeros(values.shape).masked_scatter_(used, difference.float())


def returns(turn_rewards: torch.Tensor, *, gamma: float = 1.0) -> torch.Tensor:
    """The rewards from each turn on, ``R_k = r_k + gamma R_{k+1}``, (B, K); NaN where there is no turn.

    >>> returns(torch.tensor([[1., 2., 4.]]), gamma=0.5)
    tensor([[3., 4., 4.]])
    """
    found = turn_rewards.double().clone()
    for k in reversed(range(found.shape[1] - 1)):
        found[:, k] += gamma * found[:, k + 1].nan_to_num(0.0)
    return found.to(turn_rewards.dtype)


def return_advantages(
    turn_rewards: torch.Tensor, group_size: int, *, scale_rewards: str = "group", gamma: float = 1.0
) -> torch.Tensor:
    """The rewards from turn k on, beside the mean of those of turn k over the rollouts of the group that have it.

    DeepSeekMath (arXiv 2402.03300, section 4.1.3) sums in the same way, but normalises each reward *before* the sum,
    which charges every further turn the mean reward; so we sum first. Turn k is compared across different histories.
    With one turn a rollout this is ``group_advantages`` with the group mean.

    Args:
        turn_rewards: (B, K), NaN where the rollout had no such turn.
        group_size: G; divides B.
        scale_rewards: "group" (std of the returns of turn k in the group), "batch" (of all returns), "none".
        gamma: discount from turn to turn.

    Returns:
        (B, K) float32. A turn that a single rollout of the group reached gets 0.

    Raises:
        ValueError: see ``checked_turns``.

    Two rollouts: the first searches well (turn 0 earns 1) and fails, the second searches badly and succeeds.

    >>> return_advantages(torch.tensor([[1., 0.], [0., 2.]]), 2, scale_rewards="none")
    tensor([[-0.5000, -1.0000],
            [ 0.5000,  1.0000]])
    """
    groups = checked_turns(turn_rewards, group_size)
    same_turn = groups * turn_rewards.shape[1] + torch.arange(turn_rewards.shape[1])
    return compared(returns(turn_rewards, gamma=gamma), same_turn, scale_rewards=scale_rewards)


def gigpo_advantages(
    turn_rewards: torch.Tensor,
    states: Sequence[Sequence[Hashable]],
    group_size: int,
    *,
    scale_rewards: str = "group",
    weight: float = 1.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    """GiGPO (Feng et al. 2025, arXiv 2505.10978, eq. 8): ``A_k = A_episode + weight A_step``.

    ``A_episode`` (eq. 3) compares the rollout's reward within its group. ``A_step`` (eq. 7) compares the discounted
    return of turn k (eq. 5) with those of all turns of the group that began in the same state (eq. 6), whenever: also
    of the same rollout, so that a turn which leads back to where it began is worth less than the one after it.

    Args:
        states: of each rollout what turn k began with; equal ones of a group are compared, see ``states_of``.
        weight: omega; the public code has 1.0. A state that occurs once adds 0.

    For the other arguments, the result and errors see ``return_advantages``. Two rollouts; the second searches once
    more, in vain (it costs 0.2), before it answers as rightly as the first:

    >>> r = torch.tensor([[1.0, math.nan], [-0.2, 1.0]])
    >>> gigpo_advantages(r, [["q"], ["q", "q"]], 2, scale_rewards="none")
    tensor([[ 0.1667,  0.0000],
            [-0.2333, -0.0333]])
    """
    groups = checked_turns(turn_rewards, group_size)
    numbers: dict[Hashable, int] = {}
    number = lambda i, state: numbers.setdefault((i // group_size, state), len(numbers))
    alike = padded([[number(i, state) for state in row] for i, row in enumerate(states)], 0)
    step = compared(returns(turn_rewards, gamma=gamma), alike, scale_rewards=scale_rewards)
    return _everywhere(_whole(turn_rewards), groups, turn_rewards, scale_rewards) + weight * step


def igpo_advantages(
    outcome: torch.Tensor, p_gold: torch.Tensor, group_size: int, *, scale_rewards: str = "group", gamma: float = 1.0
) -> torch.Tensor:
    """IGPO (Wang et al. 2025, arXiv 2510.14967): information gains and the outcome, normalised together, then summed.

    Turn k < T earns how much likelier the right answer became by it, ``p_{k+1} - p_k``, the last one the outcome. All
    of these, of all turns of the group, are normalised together (the public code's "joint"); ``A_k`` is the discounted
    sum of the normalised ones from k on. Normalising before the sum charges every further turn the mean of all.
    (The public code leaves gains of exactly 0 out of the mean, and divides by the population's deviation.)

    Args:
        outcome: (B,), the reward.
        p_gold: (B, K), the probability of the right answer where turn k acts, its tokens' geometric mean
            (``gold_probabilities``); NaN where there is no such turn.

    For the other arguments, the result and errors see ``return_advantages``. Two rollouts; both end wrongly, but the
    first one found something:

    >>> p = torch.tensor([[0.2, 0.8], [0.2, 0.2]])
    >>> igpo_advantages(torch.tensor([0.0, 0.0]), p, 2, scale_rewards="none")
    tensor([[ 0.3000, -0.1500],
            [-0.3000, -0.1500]])
    """
    groups = checked_turns(p_gold, group_size, "p_gold")
    gains = torch.full_like(p_gold, math.nan)
    gains[:, :-1] = p_gold[:, 1:] - p_gold[:, :-1]
    last = ~p_gold.isnan() & gains.isnan()
    earned = torch.where(last, outcome.to(gains).unsqueeze(1), gains)
    fair = compared(earned, groups.expand(earned.shape), scale_rewards=scale_rewards)
    return returns(fair, gamma=gamma)


def mt_grpo_advantages(
    turn_rewards: torch.Tensor, group_size: int, *, scale_rewards: str = "group", weight: float = 1.0
) -> torch.Tensor:
    """MT-GRPO (Zeng et al. 2025, arXiv 2505.11821): ``A_k = A_outcome + weight A_turn``, and the outcome's at the end.

    ``A_outcome`` compares what the last turn earned over the group. ``A_turn`` compares what turn k itself earned, with
    0 for the rollouts that had ended by then. A rollout of a single turn gets the advantage of its whole reward, as in
    the public code, of which this is the form for more than one search. There too the weight stands at ``A_turn``, in
    the paper at the outcome's. What a turn leads to later is not credited to it, but for the outcome.

    For the arguments, the result and errors see ``return_advantages``. Both fail; the first one's search found a hop:

    >>> mt_grpo_advantages(torch.tensor([[0.5, 0.0], [0.0, 0.0]]), 2, scale_rewards="none")
    tensor([[ 0.2500,  0.0000],
            [-0.2500,  0.0000]])
    """
    groups = checked_turns(turn_rewards, group_size)
    count = (~turn_rewards.isnan()).sum(1, keepdim=True)
    turns = torch.arange(turn_rewards.shape[1])
    is_last = turns == count - 1
    outcome = _everywhere(turn_rewards[is_last], groups, turn_rewards, scale_rewards)
    own = turn_rewards.nan_to_num(0.0).masked_fill(is_last, 0.0)
    by_turn = compared(own, groups * len(turns) + turns, scale_rewards=scale_rewards)
    searched = outcome + weight * by_turn.masked_fill(turns >= count - 1, 0.0)
    return torch.where(count > 1, searched, _everywhere(_whole(turn_rewards), groups, turn_rewards, scale_rewards))


def tree_advantages(
    turn_rewards: torch.Tensor, trees: Sequence[int], group_size: int, *, scale_rewards: str = "group"
) -> torch.Tensor:
    """Tree-GRPO (Ji et al. 2025, arXiv 2509.21240): ``A = A_intra + A_inter``, for all turns of a rollout.

    The reward is compared with those of the rollouts of the same tree, and with all of the group. Turns that several
    rollouts share stand in each of them, and so get the sum of their advantages: the search after which more branches
    do well than elsewhere is praised.

    Args:
        trees: (B,), the tree of each rollout within its group; see ``rollout``.

    For the other arguments, the result and errors see ``return_advantages``.

    >>> tree_advantages(torch.tensor([[1.], [0.], [0.], [0.]]), [0, 0, 1, 1], 4, scale_rewards="none")
    tensor([[ 1.2500],
            [-0.7500],
            [-0.2500],
            [-0.2500]])
    """
    if None in trees:
        raise ValueError(
            "trees: these rollouts did not grow on trees; roll out with trees=..., or choose another credit"
        )
    groups = checked_turns(turn_rewards, group_size)
    tree = groups * (max(trees) + 1) + torch.tensor(trees).unsqueeze(1)
    reward = _whole(turn_rewards)
    each = (_everywhere(reward, alike, turn_rewards, scale_rewards) for alike in (tree, groups))
    return torch.stack([*each]).sum(0)


def shaped_rewards(turn_rewards: torch.Tensor, potentials: torch.Tensor, *, gamma: float = 1.0) -> torch.Tensor:
    """Potential-based shaping (Ng, Harada and Russell, ICML 1999): ``r_k + gamma Phi(s_{k+1}) - Phi(s_k)``.

    The potential is 0 once the rollout is over, so what is added sums, discounted, to ``-Phi(s_0)`` whatever was done,
    and the best policy stays the best one.

    Args:
        turn_rewards: (B, K), NaN where there is no such turn.
        potentials: (B, K), that of the state in which each turn began.

    >>> shaped_rewards(torch.tensor([[-0.2, 1.0]]), torch.tensor([[0.0, 0.5]]))
    tensor([[0.3000, 0.5000]])
    """
    after = torch.zeros_like(potentials)
    after[:, :-1] = potentials[:, 1:].nan_to_num(0.0)
    return turn_rewards + gamma * after - potentials


def shuffled(
    advantages: torch.Tensor, outcome: torch.Tensor, turns: Sequence[int], group_size: int, rng: random.Random
) -> torch.Tensor:
    """The control: what a way to give credit says beyond the outcome, dealt out at random among the turns of the group.

    ``A' = outcome + pi(A - outcome)``: the same numbers and the same spread in each group, but nothing that they say of
    a turn is of that turn. A method that does no better than this owes nothing to its credit.

    Args:
        advantages, outcome: (B, K), the method's and those of ``credit="rollout"``.
        turns: (B,), the number of turns of each rollout.
    """
    beyond = advantages - outcome
    for start in range(0, len(turns), group_size):
        places = [(i, k) for i in range(start, start + group_size) for k in range(turns[i])]
        rows, columns = zip(*places)
        to_rows, to_columns = zip(*rng.sample(places, len(places)))
        beyond[to_rows, to_columns] = beyond[rows, columns]
    return outcome + beyond


def checked_turns(by_turn: torch.Tensor, group_size: int, name: str = "turn_rewards") -> torch.Tensor:
    """The group of each rollout, (B, 1) long, of numbers by turn that are called ``name``.

    Raises:
        ValueError: not (B, K), B is no multiple of G, a rollout has no turn, a number is infinite, or NaN comes before
            a rollout's last turn.
    """
    if by_turn.dim() != 2 or group_size < 1 or not len(by_turn) or len(by_turn) % group_size:
        raise ValueError(f"{name} of shape {tuple(by_turn.shape)} do not split into groups of {group_size}")
    over = by_turn.isnan()
    if by_turn.isinf().any() or over[:, 0].any() or (over[:, :-1] & ~over[:, 1:]).any():
        raise ValueError(f"{name} must be finite numbers, and NaN only after a rollout's last turn")
    return (torch.arange(len(by_turn)) // group_size).unsqueeze(1)


def _whole(turn_rewards: torch.Tensor) -> torch.Tensor:
    return turn_rewards.double().nansum(1)


def _everywhere(reward: torch.Tensor, alike: torch.Tensor, like: torch.Tensor, scale_rewards: str) -> torch.Tensor:
    """The reward of each rollout (B,) beside those that are ``alike`` (B, 1), at all turns that ``like`` (B, K) has."""
    each = compared(reward.unsqueeze(1), alike, scale_rewards=scale_rewards)
    return each.expand(like.shape).masked_fill(like.isnan(), 0.0)


# ------------------------------------------------------------------------------------------ of recorded trajectories


def credit_of(trajectories: Sequence[Trajectory], settings: Settings) -> torch.Tensor:
    """An advantage for each turn of scored rollouts as ``settings.credit`` has it, (B, K); 0 where there is no turn.

    Args:
        trajectories: the G of a question next to each other. "igpo" needs ``token_values["p_gold"]``, "tree_grpo"
            rollouts that grew on ``trees``.

    Raises:
        ValueError: one of these is missing, or rewards do not fit the groups.
    """
    s, size = settings, settings.num_generations
    scale: dict[str, Any] = {"scale_rewards": s.scale_rewards}
    rewards, turns = [t.reward for t in trajectories], [*map(turn_count, trajectories)]
    by_rollout = group_advantages(rewards, size, baseline=s.baseline, **scale)
    outcome = by_rollout.unsqueeze(1) * (torch.arange(max(turns)) < torch.tensor(turns).unsqueeze(1))
    if s.credit == "rollout":
        return outcome
    earned = padded([t.turn_rewards for t in trajectories], math.nan)
    w, onward = s.credit_weight, scale | {"gamma": s.gamma}
    if s.credit == "gigpo":
        advantages = gigpo_advantages(earned, [*map(states_of, trajectories)], size, weight=w, **onward)
    elif s.credit == "igpo":
        advantages = igpo_advantages(torch.tensor(rewards), _by_turn(trajectories, P_GOLD), size, **onward)
    elif s.credit == "mt_grpo":
        advantages = mt_grpo_advantages(earned, size, weight=w, **scale)
    elif s.credit == "tree_grpo":
        advantages = tree_advantages(earned, [t.tree for t in trajectories], size, **scale)
    else:
        if s.credit == "stepsearch":
            earned = earned + w * _gains(trajectories, redundancy=1.0)
        elif s.credit == "potential":
            earned = shaped_rewards(earned, w * found_share(trajectories), gamma=s.gamma)
        advantages = return_advantages(earned, size, **onward)
    if s.shuffle_credit:
        rng = random.Random(f"{s.seed}/{trajectories[0].group}")
        advantages = shuffled(advantages, outcome, turns, size, rng)
    return advantages


def author_advantages(trajectories: Sequence[Trajectory], author: str, settings: Settings) -> torch.Tensor:
    """What scored rollouts are worth to one author, (B, 1): by its own reward where it has one, else by the common one.

    With ``per_author`` only among those rollouts of a group in which it wrote: ``A = (r - mean_k) / (std_k + 1e-4)``
    with mean and deviation over the rollouts of agent k, as Dr. MAS has it (arXiv 2602.08847; M-GRPO, arXiv 2511.13288,
    groups by agent too). One that did not write is not in its group and gets 0. Else all rollouts of the group are.

    Args:
        trajectories: the G of a question next to each other; an own reward stands in ``rewards``, see ``OWN_REWARD``.
    """
    rewards = torch.tensor([t.rewards.get(OWN_REWARD + author, t.reward) for t in trajectories], dtype=torch.float64)
    size, scale = settings.num_generations, settings.scale_rewards
    if not settings.per_author:
        return group_advantages(rewards, size, baseline=settings.baseline, scale_rewards=scale).unsqueeze(1)
    wrote = torch.tensor([any(t.mask_of(author)) for t in trajectories])
    if not wrote.any():
        return torch.zeros(len(rewards), 1)
    groups = torch.arange(len(rewards)) // size
    among = rewards.masked_fill(~wrote, math.nan)
    return compared(among.unsqueeze(1), groups.unsqueeze(1), scale_rewards=scale)


def turns_of_tokens(t: Trajectory) -> list[int]:
    """The turn of each completion token, (T,). One that stands in no segment, such as the end of the message, is of the
    turn that was being written.
    """
    turns = [0] * len(t.mask)
    for s in t.segments:
        turns[s.start :] = [s.turn] * (len(turns) - s.start)
        if not s.by_model:
            turns[s.end :] = [s.turn + 1] * (len(turns) - s.end)
    return turns


def states_of(t: Trajectory) -> list[frozenset]:
    """What the rollout had found as each of its turns began: a set of passages, for GiGPO's "identical state".

    With the question, which is the group's, it is all that the environment has told, in any order. It is not the
    identical token prefix: there the model's own words would count, and where thoughts are sampled freely no two
    rollouts would share any state but the first. Nor does the number of the turn count: a search in vain leads back to
    the state in which it was asked.
    """
    found: list[set] = [set() for _ in range(turn_count(t))]
    answered = [s.turn for s in t.segments if s.kind == "information" and not s.by_model]
    for turn, call in zip(answered, t.calls):
        for later in found[turn + 1 :]:
            later.update(hit.passage for hit in call.result)
    return [frozenset(passages) for passages in found]


def found_share(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """A potential: the share of the gold passages found before each turn, (B, K), NaN where there is no such turn."""
    gained = _gains(trajectories)
    return gained.cumsum(1) - gained


def _gains(trajectories: Sequence[Trajectory], redundancy: float = 0.0) -> torch.Tensor:
    return padded([*map(InformationGain(redundancy).turn_values, trajectories)], math.nan)


def _by_turn(trajectories: Sequence[Trajectory], name: str) -> torch.Tensor:
    """One of the ``token_values`` at the first token of each turn, (B, K), NaN where there is no such turn."""
    if lacking := next((t for t in trajectories if name not in t.token_values), None):
        raise ValueError(f"the rollout of question {lacking.question.id!r} has no token_values[{name!r}]")
    rows = [dict(reversed([*zip(turns_of_tokens(t), t.token_values[name])])) for t in trajectories]
    return padded([[row[turn] for turn in sorted(row)] for row in rows], math.nan)


# ------------------------------------------------------------------------------------------- with the model's help


@torch.no_grad()
def gold_probabilities(
    policy: Policy, trajectories: Sequence[Trajectory], *, temperature: float = 1.0, token_budget: int = 4096
) -> list[list[float]]:
    """How likely the policy would be to give the right answer in each turn, at the place where it acts.

    The rollout is cut off where the model, having thought, wrote the tag of its act. There an answer's tag and the
    right answer are put instead, and read in one forward pass. Off this place the number means little: behind what it
    read, without a thought, the tiny Qwen gives its own answers 0.01, in place 0.93 (geometric means). A turn without
    an act is asked at its end. The thought before the act belongs to the turn, so the gain of a search shows once the
    model has read and thought.

    Args:
        temperature: as sampled; token_budget: padded tokens of one forward pass.

    Returns:
        for each trajectory, a number for each of its tokens (all of a turn have the same): the geometric mean of the
        probabilities of the answer's tokens, for the likeliest of the accepted answers; 0.0 where none is known.
    """
    asked = [
        [[_probe(policy, t, turn, gold) for gold in t.question.answers] for turn in range(turn_count(t))]
        for t in trajectories
    ]
    found: dict[Probe, float] = {probe: 0.0 for rows in asked for row in rows for probe in row}
    head = policy.lm_head
    with policy.sampling():
        for part in micro_batches(found, token_budget, lambda probe: len(probe.ids)):
            ids, readers = (
                padded(rows, fill, policy.device)
                for rows, fill in (([p.ids for p in part], policy.pad_id), ([p.readers for p in part], 0))
            )
            place = torch.arange(1, ids.shape[1], device=policy.device)
            first, end = (
                torch.tensor(column, device=policy.device).unsqueeze(1)
                for column in zip(*((p.first, p.end) for p in part))
            )
            mask = (first <= place) & (place < end)
            hidden = policy.hidden(ids, readers, use_cache=False)[:, :-1]
            how = {"bias": head.bias, "mask": mask, "temperature": temperature}
            logprobs, _ = token_logprobs_and_entropy(hidden, head.weight, ids[:, 1:], **how)
            found |= zip(part, (logprobs.sum(1) / mask.sum(1)).exp().tolist())
    best = [[max((found[probe] for probe in row), default=0.0) for row in rows] for rows in asked]
    return [[row[turn] for turn in turns_of_tokens(t)] for t, row in zip(trajectories, best)]


class Probe(NamedTuple):
    """Token ids of a rollout up to where a turn acts, and of an answer there, by the first author: from ``first`` to
    before ``end``.
    """

    ids: tuple[int, ...]
    first: int
    end: int
    readers: tuple[int, ...]


def _probe(policy: Policy, t: Trajectory, turn: int, gold: str) -> Probe:
    mine = [i for i, s in enumerate(t.segments) if s.turn == turn and s.by_model]
    act = next((i for i in mine if t.segments[i].kind not in ("think", "text")), None)
    stop = len(t.segments) if not mine else mine[-1] + 1 if act is None else act
    written = "".join(s.text for s in t.segments[:stop])
    start = t.segments[act].start if act is not None else max((s.end for s in t.segments[:stop]), default=0)
    # the first token of the act may begin with the blank before it: that is written anew, with the answer
    text = written[t.ends[start - 1] if start else 0 :]
    text += ("" if act is not None or written.endswith("\n") else "\n") + "<answer> "
    tail = policy.encode(f"{text}{gold} </answer>")
    ends = token_ends([policy.token_bytes[i] for i in tail])
    own = [i for i, (a, b) in enumerate(zip([0, *ends], ends)) if a < len(text) + len(gold) and b > len(text)]
    before = (*t.prompt_ids, *t.completion_ids[:start])
    readers = (*policy.readers_of(t)[: len(before) - 1], *[0] * (len(tail) + 1))
    return Probe((*before, *tail), len(before) + own[0], len(before) + own[-1] + 1, readers)


def values_of_continuing(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    engine,
    reward: RewardFunction,
    *,
    num_generations: int = 16,
    **how,
) -> list[list[tuple[float, float]]]:
    """What it was worth to go on from the beginning of each turn, by Monte Carlo: the yardstick of all credit.

    What turn k did is worth ``V_{k+1} - V_k`` under this policy: the advantage that credit estimates.

    Args:
        num_generations: continuations of each decision; one that several rollouts share is continued once.
        **how: see ``continuations``.

    Returns:
        for each trajectory (mean reward, its standard error) at the beginning of each turn, and at the end
        (its own reward, 0.0).

    Raises:
        ValueError: fewer than 2 continuations, which have no standard error; or see ``continuations``.
    """
    check(num_generations=(num_generations, Annotated[int, Field(ge=2)]))
    decisions = [
        [(t.prompt, tuple(t.completion_ids[: turn_start(t, k)]), k) for k in range(turn_count(t))] for t in trajectories
    ]
    distinct = {key: (t, key[2]) for t, keys in zip(trajectories, decisions) for key in keys}
    sampled = continuations(policy, [*distinct.values()], engine, num_generations=num_generations, **how)
    rewards = iter(score(reward, sampled).values)
    each = {key: [next(rewards) for _ in range(num_generations)] for key in distinct}
    value = {key: (fmean(r), stdev(r) / math.sqrt(num_generations)) for key, r in each.items()}
    ends = score(reward, trajectories).values
    return [[*(value[key] for key in keys), (end, 0.0)] for keys, end in zip(decisions, ends)]
