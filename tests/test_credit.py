"""Credit by turn: hand-worked cases, numbers of the public codes, recorded rollouts, and the yardstick."""

import math
import random
from dataclasses import replace

import pytest
import records
import torch

from searchr1_lib.records import ENVIRONMENT, Hit, Passage, Question, SearchCall, Segment, Trajectory
from searchr1_lib.rewards import ExactMatch, HierarchicalReward, score
from searchr1_lib.search import BM25Search
from searchr1_lib.training import credit
from searchr1_lib.training.grpo import group_advantages, policy_loss
from searchr1_lib.training.learner import Learner
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.rollout import continuations, rollout, turn_start
from searchr1_lib.training.settings import Settings
from searchr1_lib.worlds.almanac import build_world, sample_questions

NAN = math.nan
#: One question: found all in two searches; searched once in vain; answered wrongly at once; found all in one search.
EARNED = torch.tensor([[-0.15, -0.15, 1.0], [-0.15, 0.0, NAN], [0.0, NAN, NAN], [-0.15, 1.0, NAN]])
STATES = [["q", "a", "ab"], ["q", "q"], ["q"], ["q", "a"]]
TURNS = [3, 2, 1, 2]


def flat(advantages: torch.Tensor) -> list[float]:
    """Those of the turns that there are; the others must be 0."""
    assert not advantages[EARNED.isnan()].any()
    return advantages[~EARNED.isnan()].tolist()


def near(numbers, abs=1e-4):
    return pytest.approx(numbers, abs=abs)


# ---- on tensors ------------------------------------------------------------------------------------------


def test_the_return_is_compared_with_the_same_turn():
    """Returns of turn 0: .7, -.15, 0, .85 (mean .35); of turn 1: .85, 0, 1 (mean .6167); turn 2 is alone."""
    got = credit.return_advantages(EARNED, 4, scale_rewards="none")
    assert flat(got) == near([0.35, 0.2333, 0.0, -0.5, -0.6167, -0.35, 0.5, 0.3833])
    by_group = credit.return_advantages(EARNED, 4)
    spread = torch.tensor([0.85, 0.0, 1.0]).std().item() + 1e-4
    assert by_group[0, 1].item() == near((0.85 - 1.85 / 3) / spread)
    of_all = torch.tensor([0.7, 0.85, 1.0, -0.15, 0.0, 0.0, 0.85, 1.0]).std() + 1e-4
    assert flat(credit.return_advantages(EARNED, 4, scale_rewards="batch")) == near(
        (got / of_all)[~EARNED.isnan()].tolist()
    )


def test_one_turn_a_rollout_is_plain_grpo():
    rewards = [1.0, 0.0, 0.5, 0.85, -0.15, 0.0, 1.0, 1.0]
    for scale in ("group", "batch", "none"):
        want = group_advantages(rewards, 4, scale_rewards=scale)
        column = torch.tensor(rewards).unsqueeze(1)
        for got in (
            credit.return_advantages(column, 4, scale_rewards=scale),
            credit.mt_grpo_advantages(column, 4, scale_rewards=scale),
            credit.igpo_advantages(column[:, 0], torch.rand(8, 1), 4, scale_rewards=scale),
            credit.tree_advantages(column, [0] * 8, 4, scale_rewards=scale) / 2,
            credit.gigpo_advantages(column, [["q"]] * 8, 4, scale_rewards=scale, weight=0.0),
        ):
            assert got[:, 0].tolist() == near(want.tolist(), 1e-5)


def test_a_later_reward_moves_earlier_turns_and_not_the_reverse():
    base = credit.return_advantages(torch.zeros(2, 3), 2, scale_rewards="none")
    for turn in range(3):
        rewards = torch.zeros(2, 3)
        rewards[0, turn] = 1.0
        moved = credit.return_advantages(rewards, 2, scale_rewards="none") != base
        assert moved[0].tolist() == [k <= turn for k in range(3)]


def test_gigpo_by_the_public_code():
    """verl-agent's core_gigpo.py on this case, gamma 0.95: mean_norm, and mean_std_norm (whose epsilon is 1e-6)."""
    got = credit.gigpo_advantages(EARNED, STATES, 4, scale_rewards="none", gamma=0.95)
    assert flat(got) == near([0.708, 0.25, 0.35, -0.902, -0.752, -0.602, 1.048, 0.6])
    got = credit.gigpo_advantages(EARNED, STATES, 4, gamma=0.95)
    assert flat(got) == near([1.5479, -0.0048, 0.7023, -1.9528, -1.5985, -1.2975, 2.2976, 1.7104], 1e-3)


def test_gigpo_compares_states_within_a_group_only():
    two = torch.cat([EARNED, EARNED + 7])
    got = credit.gigpo_advantages(two, STATES * 2, 4, scale_rewards="none")
    assert got[:4].flatten().tolist() == near(
        credit.gigpo_advantages(EARNED, STATES, 4, scale_rewards="none").flatten().tolist()
    )
    step = got - credit.gigpo_advantages(two, STATES * 2, 4, scale_rewards="none", weight=0.0)
    assert step[0, 1] == -step[3, 1] != 0 and step[0, 2] == 0  # two in state "a", one in "ab"


def test_igpo_by_the_public_code():
    """GuoqingWang1/IGPO's compute_grpo_outcome_advantage, joint, gamma 0.9; with division it takes the population's
    deviation, we Bessel's: sqrt(7/8) for these eight rewards."""
    p = torch.tensor([[0.1, 0.3, 0.9], [0.1, 0.2, NAN], [0.15, NAN, NAN], [0.1, 0.7, NAN]])
    outcome = torch.tensor([0.7, -0.15, 0.0, 0.85])
    got = credit.igpo_advantages(outcome, p, 4, scale_rewards="none", gamma=0.9)
    assert flat(got) == near([0.3246, 0.5412, 0.3375, -0.7238, -0.5125, -0.3625, 0.6763, 0.4875])
    got = credit.igpo_advantages(outcome, p, 4, gamma=0.9)
    want = [0.9402, 1.5676, 0.9775, -2.0961, -1.4843, -1.0499, 1.9585, 1.4119]
    assert flat(got) == near([x * math.sqrt(7 / 8) for x in want], 1e-3)


def test_tree_grpo_by_the_public_code():
    """Tree-GRPO's "tree" estimator: GRPO's advantage over the question, and over the tree."""
    got = credit.tree_advantages(EARNED, [0, 0, 1, 1], 4)
    for row, want, turns in zip(got.tolist(), [1.4094, -1.7105, -1.4094, 1.7105], TURNS):
        assert row == near([want] * turns + [0.0] * (3 - turns), 1e-3)
    with pytest.raises(ValueError, match="trees"):
        credit.tree_advantages(EARNED, [None] * 4, 4)


def test_mt_grpo_by_the_public_code():
    """Multi-Turn-RL-Agent's "aae" with coefficient 1, at most one search: its own before, the outcome's after."""
    earned = torch.tensor([[0.5, 1.0], [0.0, 0.0], [1.0, NAN], [0.3, 0.0]])
    got = credit.mt_grpo_advantages(earned, 4)
    want = [[2.0901, 0.8659], [-1.6820, -0.8659], [0.4423, 0.0], [-0.4578, -0.8659]]
    assert got.flatten().tolist() == near([x for row in want for x in row])


def test_shaping_adds_the_same_whatever_was_done():
    potentials = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, NAN], [0.0, NAN, NAN], [0.0, 1.0, NAN]])
    shaped = credit.shaped_rewards(EARNED, potentials)
    assert flat(shaped.nan_to_num(0.0)) == near([0.35, 0.35, 0.0, -0.15, 0.0, 0.0, 0.85, 0.0])
    assert shaped.nansum(1).tolist() == near(EARNED.nansum(1).tolist())
    # what is left of a return is its distance from the potential: finding less than the others shows
    assert credit.returns(shaped)[:, 1].tolist()[:2] == near([0.35, 0.0])


def test_the_control_deals_out_the_same_numbers():
    outcome = credit.return_advantages(EARNED.nansum(1, keepdim=True), 4).expand(4, 3).masked_fill(EARNED.isnan(), 0.0)
    outcome, advantages = outcome.repeat(2, 1), credit.gigpo_advantages(EARNED, STATES, 4).repeat(2, 1)
    beyond = lambda a, rows: sorted(round(x, 5) for x in flat((a - outcome)[rows]))
    one, same, other = (credit.shuffled(advantages, outcome, TURNS * 2, 4, random.Random(i)) for i in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[:4], one[4:])
    for rows in (slice(0, 4), slice(4, 8)):
        assert beyond(one, rows) == beyond(advantages, rows) and not torch.equal(one[rows], advantages[rows])


@pytest.mark.parametrize(
    "wrong, why",
    [
        (EARNED[0], "groups of 2"),
        (EARNED[:3], "groups of 2"),
        (EARNED - math.inf, "finite"),
        (EARNED * NAN, "finite"),
        (EARNED[:, [1, 2, 0]][[0, 1]], "only after"),
    ],
)
def test_turn_rewards_that_cannot_be(wrong, why):
    with pytest.raises(ValueError, match=f"turn_rewards.*{why}"):
        credit.return_advantages(wrong, 2)
    with pytest.raises(ValueError, match=f"p_gold.*{why}"):
        credit.igpo_advantages(torch.zeros(2), wrong, 2)


# ---- the penalty on lost likelihood ----------------------------------------------------------------------


def test_llds_by_hand():
    """Two turns and a blamed rollout. Turn one lost .3 and gained .1: in all .2, so its first token adds .3. Turn two
    lost .1 and gained .4: nothing, though a token lost. What is blamed may become less likely."""
    old = torch.zeros(2, 6)
    new = torch.tensor([[-0.3, 0.1, 9.0, -0.1, 0.4, 0.0], [-1.0, -1.0, 0.0, -1.0, 0.0, 0.0]]).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 0]])
    advantages = torch.tensor([0.0, -1.0])
    how = {"loss_type": "dapo", "epsilon": 1.0, "epsilon_high": 9.0}
    plain, _ = policy_loss(new, old, advantages, mask, **how)
    loss, metrics = policy_loss(new, old, advantages, mask, llds_coef=0.5, **how)
    assert loss.item() - plain.item() == near(0.5 * 0.3 / 7, 1e-6) and metrics["llds"].item() == near(0.3 / 7, 1e-6)
    (gradient,) = torch.autograd.grad(loss - plain, new)
    want = torch.zeros(2, 6)
    want[0, 0] = -0.5 / 7
    assert torch.allclose(gradient, want, atol=1e-6)


def test_llds_says_nothing_before_the_first_update_whatever_is_rounded():
    old = torch.full((1, 4), -1.0)
    new = (old + torch.tensor([1e-5, -1e-4, -1e-4, 1e-5])).requires_grad_()
    with_it, without = (policy_loss(new, old, torch.ones(1), torch.ones(1, 4), llds_coef=c)[0] for c in (9.0, 0.0))
    assert with_it == without


# ---- on trajectories -------------------------------------------------------------------------------------


def passage(name: str) -> Passage:
    return Passage(name, name, f"About {name}.")


def searched(*finds: str, answer="x", invalid=(), **fields) -> Trajectory:
    """A rollout whose searches find these passages (a letter each), five tokens a turn and three an observation."""
    t = Trajectory(Question("q", "?", ["x"], passages=["a", "b"], hops=2), [1], [], [], [], answer=answer)
    for turn, found in enumerate([*finds, None]):
        start = len(t.mask)
        act = "answer" if found is None else "search"
        t.segments.append(Segment("policy", "think", "<think>t</think>", turn, start, start + 2))
        t.segments.append(Segment("policy", act, f"<{act}>{answer}</{act}>", turn, start + 2, start + 5))
        t.mask += [1] * 5
        if found is not None:
            t.segments.append(Segment(ENVIRONMENT, "information", "i", turn, start + 5, start + 8))
            t.calls.append(SearchCall("s", [Hit(passage(x), 1.0) for x in found]))
            t.mask += [0] * 3
    t.turns, t.finish_reason = len(finds) + 1, "answer"
    t.completion_ids, t.logprobs = [0] * len(t.mask), [0.0] * len(t.mask)
    return replace(t, **fields)


def test_tokens_know_their_turn():
    t = searched("a", "b")
    assert credit.turns_of_tokens(t) == [0] * 8 + [1] * 8 + [2] * 5
    t.mask += [1]  # the end of the message stands in no segment, and belongs to what was written
    assert credit.turns_of_tokens(t)[-1] == 2
    t.segments = t.segments[:-2]  # a message that ended at once, after an observation
    assert credit.turns_of_tokens(t) == [0] * 8 + [1] * 8 + [2] * 6


def test_a_state_is_what_was_found_not_how():
    one, other, vain = searched("ac", "b"), searched("b", "a", "c"), searched("", "a")
    a, b, c = map(passage, "abc")
    assert credit.states_of(one) == [frozenset(), {a, c}, {a, b, c}]
    assert credit.states_of(other) == [frozenset(), {b}, {a, b}, {a, b, c}]
    assert credit.states_of(vain) == [frozenset(), frozenset(), {a}]  # it is back where it began


def test_the_potential_is_the_share_found():
    got = credit.found_share([searched("ac", "b"), searched("c", "ab"), searched()])
    assert got[0].tolist() == [0.0, 0.5, 1.0] and got[1].tolist() == [0.0, 0.0, 1.0]
    assert got[2, 0] == 0 and got[2, 1:].isnan().all()


GROUP = [searched("ab"), searched("ab", "c", answer="x"), searched("c", answer="y"), searched(answer="y")]


def scored(**settings) -> tuple[list[Trajectory], Settings]:
    group = [replace(t, group="0:q", tree=i // 2, token_values={}) for i, t in enumerate(GROUP)]
    score(HierarchicalReward(whole=1.0, hops=0.0, form=0.0), group).keep(group)
    for t in group:  # asked in each turn: likelier after "ab" was found
        t.token_values[credit.P_GOLD] = [
            0.9 if turn and t.calls[0].result[0].passage.id == "a" else 0.1 for turn in credit.turns_of_tokens(t)
        ]
    return group, Settings(num_generations=4, trees=2, **settings)


def test_every_credit_says_that_the_second_search_was_wasted():
    """Rollouts 0 and 1 find the same and are right; 1 searches once more (0.15). The outcome blames all its turns."""
    rewards = [t.reward for t in scored()[0]]
    assert rewards == near([0.85, 0.7, 0.0, 0.0])
    by_name = {}
    for name in ("rollout", "return", "gigpo", "igpo", "stepsearch", "mt_grpo", "tree_grpo", "potential"):
        by_name[name] = credit.credit_of(*scored(credit=name, scale_rewards="none"))
        assert by_name[name].shape == (4, 3) and not by_name[name][3, 1:].any()
    assert by_name["rollout"][1].tolist() == near([0.3125] * 3)
    assert by_name["tree_grpo"][1].tolist() == near([0.3125 - 0.075] * 3)
    # turn 1 of rollout 1 is the wasted search, turn 1 of rollout 0 the answer in the same state
    for name in ("return", "gigpo", "stepsearch", "potential"):
        assert by_name[name][0, 1] > by_name[name][1, 1]
    waste = {name: (a[1, 1] - a[1, 0]).item() for name, a in by_name.items()}
    assert waste["rollout"] == waste["tree_grpo"] == 0
    assert all(waste[name] < 0 for name in ("gigpo", "igpo", "mt_grpo"))


def test_the_weight_of_zero_is_the_outcome_or_the_return():
    same = lambda a, b: torch.allclose(a, b, atol=1e-6)
    of = lambda name, **how: credit.credit_of(*scored(credit=name, **how))
    assert same(of("gigpo", credit_weight=0.0), of("rollout"))
    for name in ("stepsearch", "potential"):
        assert same(of(name, credit_weight=0.0), of("return")) and not same(of(name), of("return"))


def test_the_control_is_drawn_by_seed_and_group():
    of = lambda **how: credit.credit_of(*scored(credit="gigpo", **how))
    assert torch.equal(of(shuffle_credit=True), of(shuffle_credit=True))
    assert len({tuple(of(shuffle_credit=True, seed=i).flatten().tolist()) for i in range(5)}) > 1
    assert of(shuffle_credit=True).sum().item() == near(of().sum().item())


def test_igpo_without_its_probe_is_named():
    group, settings = scored(credit="igpo")
    del group[2].token_values[credit.P_GOLD]
    with pytest.raises(ValueError, match="p_gold"):
        credit.credit_of(group, settings)


def test_the_hierarchical_reward_has_three_levels():
    reward = HierarchicalReward(cost=0.1, whole=2.0, hops=0.6, form=0.25)
    said = score(reward, GROUP)
    assert said.turns[1] == near([-0.2 + 0.6, -0.2, 2.0 + 0.25]) and said.values[1] == near(2.45)
    assert said.turns[2] == near([0.0, 0.25]) and said.values[3] == near(0.25)
    assert {"search_r1", "exact_match", "information_gain", "format", "hierarchical"} <= said.parts.keys()
    with pytest.raises(ValueError, match="weight"):
        HierarchicalReward(hops=NAN)


# ---- on rollouts of real models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return load_policy("data/tiny_qwen")


def rollouts(policy, seed=0, **how):
    questions, engine = records.world()
    how = {"num_generations": 4, "max_turns": 2, "max_turn_tokens": 60} | how
    return rollout(policy, questions[:4], engine, generator=torch.Generator().manual_seed(seed), **how)


def worst(policy, trajectories) -> float:
    """The largest difference of a recorded log-probability from one read in a single pass."""
    learner = Learner(policy, Settings())
    hidden, batch = learner._hidden(trajectories)
    fresh = learner._logprobs(hidden, batch)[0][batch.sampled.bool()]
    recorded = batch.column([t.logprobs for t in trajectories])[batch.sampled.bool()]
    return (fresh - recorded).abs().max().item()


def test_the_probe_stands_where_the_model_answers(tiny):
    """Asked for its own answer, in the turn in which it gave it, it says what it recorded while it sampled."""
    ids = lambda t, s: t.completion_ids[s.start : s.end]
    usual = lambda t, s: tiny.encode(f"<answer> {t.answer} </answer>") == ids(t, s)
    made = [t for t in rollouts(tiny) if t.answer and usual(t, t.segments[-1])]
    assert len(made) > 5  # of those that are spelled as most answers are
    for t in made:
        t.question = replace(t.question, answers=["Nobody", t.answer])
    for t, values in zip(made, credit.gold_probabilities(tiny, made, token_budget=600)):
        answer = t.segments[-1]
        text = [i for i in range(answer.start, answer.end) if t.ends[i] > t.ends[answer.start - 1] + len("<answer> ")]
        own = [i for i in text if t.ends[i - 1] < t.ends[answer.end - 1] - len(" </answer>")]
        assert tiny.decode([t.completion_ids[i] for i in own]).strip() == t.answer
        recorded = math.exp(sum(t.logprobs[i] for i in own) / len(own))
        assert values[-1] == near(recorded, 1e-3)
        assert len(values) == len(t.mask) and len(set(values)) <= t.turns


def test_off_its_place_the_probe_means_little(tiny):
    """The same answer behind the observation, without the thought: many times less likely."""
    world = build_world(0)
    asked, engine = sample_questions(world, "train", 20, seed=0), BM25Search(world.passages)
    how = {"num_generations": 2, "max_turns": 3, "max_turn_tokens": 110}
    played = rollout(tiny, asked, engine, generator=torch.Generator().manual_seed(0), **how)
    made = [t for t in played if t.answer and t.answer != "unknown" and t.turns > 1]
    times = []
    for t in made:
        t.question = replace(t.question, answers=[t.answer])
        thoughtless = replace(t, segments=[s for s in t.segments if s.turn < t.turns - 1])
        in_place, bare = (credit.gold_probabilities(tiny, [x])[0][-1] for x in (t, thoughtless))
        times.append(in_place / bare)
    assert len(times) > 4 and math.prod(times) ** (1 / len(times)) > 10


@pytest.mark.parametrize("house", [False, True], ids=["tiny Qwen", "one that forgets its tags"])
@pytest.mark.parametrize("trees", [1, 2])
def test_branches_share_what_stands_before_them(tiny, house, trees):
    policy = records.policy_of(0, quantize=False) if house else tiny
    made = rollouts(policy, trees=trees, max_turns=3, seed=3)
    assert [t.tree for t in made] == [i // (4 // trees) for i in range(4)] * 4
    assert worst(policy, made) < 1e-3
    branches = 0
    for start in range(0, len(made), 4 // trees):
        trunk, *others = made[start : start + 4 // trees]
        assert trunk.shared == 0
        for t in others:
            n = t.shared
            assert t.group == trunk.group and n in {turn_start(trunk, k) for k in range(trunk.turns)}
            for name in ("completion_ids", "mask", "logprobs", "tokens", "ends"):
                assert getattr(t, name)[:n] == getattr(trunk, name)[:n]
                assert len(getattr(t, name)) == len(t.mask) == len(t.token_values["entropy"])
            assert [s for s in t.segments if s.end <= n] == [s for s in trunk.segments if s.end <= n]
            assert t.calls[: sum(s.kind == "information" for s in t.segments if s.end <= n)] == [
                c for c, s in zip(trunk.calls, (s for s in trunk.segments if s.kind == "information")) if s.end <= n
            ]
            assert t.invalid_turns == sum(s.kind == "invalid" for s in t.segments) or t.finish_reason != "answer"
            assert t.finish_reason and "".join(t.tokens[: len(t.mask)]) and t.text
            branches += n > 0
    assert branches


def test_a_branch_encodes_nothing_again(tiny):
    """An observation that several rollouts have in common is one row of one forward pass."""
    read = []
    hook = tiny.decoder.register_forward_pre_hook(lambda m, a, kw: read.append(a[0].shape), with_kwargs=True)
    try:
        made = rollouts(tiny, num_generations=2, trees=1, max_turns=3, seed=3)
    finally:
        hook.remove()
    shared = [(t, s) for t in made for s in t.segments if not s.by_model and s.end <= t.shared]
    assert shared  # observations that two rollouts have in common
    texts = {(t.group, s.start) for t in made for s in t.segments if not s.by_model and (s.end > t.shared)}
    rows = sum(shape[0] for shape in read[1:] if shape[1] > 2)
    assert rows <= len(texts) + sum(t.turns > 1 for t in made)  # one for each, and those that read a token beside it


def test_a_recorded_rollout_goes_on_from_any_turn(tiny):
    engine = records.world()[1]
    made = rollouts(tiny)
    decisions = [(t, k) for t in made for k in range(t.turns)]
    how = {"num_generations": 2, "max_turns": 2, "max_turn_tokens": 60}
    got = continuations(tiny, decisions, engine, generator=torch.Generator().manual_seed(0), **how)
    assert len(got) == 2 * len(decisions) and worst(tiny, got) < 1e-3
    for i, (t, k) in enumerate(decisions):
        one, other = got[2 * i : 2 * i + 2]
        n = turn_start(t, k)
        assert one.completion_ids[:n] == other.completion_ids[:n] == t.completion_ids[:n] and one.shared == n
        assert one.group == other.group and one.turns <= 3 and one.finish_reason
    assert len({t.group for t in got}) == len(decisions)
    assert any(t.text != decisions[i // 2][0].text for i, t in enumerate(got))


def test_what_cannot_be_gone_on_from_is_named(tiny):
    engine = records.world()[1]
    long = next(t for t in rollouts(tiny) if t.turns == 3)
    with pytest.raises(ValueError, match="turn is 3"):
        continuations(tiny, [(long, 3)], engine, num_generations=2, max_turns=2)
    with pytest.raises(ValueError, match="limits"):
        continuations(tiny, [(long, 2)], engine, num_generations=2, max_turns=0)
    with pytest.raises(ValueError, match="num_generations"):
        credit.values_of_continuing(tiny, [long], engine, ExactMatch(), num_generations=1)


def test_the_yardstick_is_a_mean_over_continuations(tiny):
    """Greedy continuations are all the same: the value at every turn of a greedy rollout is its own reward."""
    engine = records.world()[1]
    how = {"temperature": 0.0, "max_turns": 2, "max_turn_tokens": 60}
    greedy = rollouts(tiny, num_generations=1, **how)
    for t in greedy:
        t.question = replace(t.question, answers=[t.answer or "?"])
    values = credit.values_of_continuing(tiny, greedy, engine, ExactMatch(), num_generations=2, **how)
    for t, row in zip(greedy, values):
        assert row == [(float(t.answer is not None), 0.0)] * (t.turns + 1)
    made = rollouts(tiny, num_generations=2)
    how = {"generator": torch.Generator().manual_seed(0), "max_turns": 2, "max_turn_tokens": 60}
    chance = lambda ts: [len(t.completion_ids) % 7 / 7 for t in ts]
    values = credit.values_of_continuing(tiny, made, engine, chance, num_generations=8, **how)
    assert [len(row) for row in values] == [t.turns + 1 for t in made]
    assert all(row[0] == other[0] for row, other in zip(values[::2], values[1::2]))  # one question, one beginning
    assert any(se > 0 for row in values for _, se in row[:-1]) and all(row[-1][1] == 0 for row in values)
    assert [row[-1][0] for row in values] == chance(made)


@pytest.mark.parametrize("name", ["gigpo", "igpo", "stepsearch", "mt_grpo", "tree_grpo", "potential"])
def test_every_credit_reaches_the_tokens(tiny, name):
    made = rollouts(tiny, num_generations=4, trees=2)
    score(HierarchicalReward(), made).keep(made)
    learner = Learner(tiny, Settings(num_generations=4, trees=2, credit=name, kl_every=0))
    learner.assign_advantages(made)
    by_turn = credit.credit_of(made, learner.settings)
    for t, row in zip(made, by_turn.tolist()):
        assert t.advantages == [row[turn] for turn in credit.turns_of_tokens(t)]
    assert learner.gradient(made)["tokens"] > 0
    assert any(p.grad.abs().max() > 0 for p in learner.parameters())
