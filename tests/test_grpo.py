"""grpo.py against TRL 1.16's own code, against numbers worked by hand, and against itself split and whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.training.grpo import (
    LOSS_TYPES,
    gae,
    group_advantages,
    groups_without_variance,
    merge_metrics,
    policy_loss,
    value_loss,
)
from searchr1_lib.training.logits import head_logits, padded, token_logprobs_and_entropy

B, P, T, G = 4, 3, 6, 2  # rollouts, prompt tokens, completion tokens, group size
VOCABULARY, HIDDEN = 32, 16


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def batch(seed=0, spread=0.5):
    """Random inputs of ``policy_loss``: rollouts of unequal length, with environment text inside."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g)
    new = (old + spread * torch.randn(B, T, generator=g)).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    return new, old, torch.randn(B, generator=g), mask, old + 0.3 * torch.randn(B, T, generator=g)


# ------------------------------------------------------------------------------------ against TRL's own code


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL's GRPO and RLOO trainers on a tiny random Qwen2, with rewards that the test prescribes."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rewards = []

    folder = str(tmp_path_factory.mktemp("trl"))
    torch.manual_seed(0)
    tokenizer.save_pretrained(folder)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).save_pretrained(folder)

    def made(trainer, config, **settings):
        return trainer(
            model=Qwen2ForCausalLM.from_pretrained(folder).train(),
            reward_funcs=lambda prompts, completions, **_: list(rewards),
            args=config(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                report_to="none",
                per_device_train_batch_size=8,
                num_generations=G,
                max_completion_length=T,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w2 w3 w4"] * 8}),
            processing_class=tokenizer,
        )

    grpo = made(GRPOTrainer, GRPOConfig, temperature=0.7)
    grpo.current_gradient_accumulation_steps = grpo.args.steps_per_generation
    return {"grpo": grpo, "rloo": made(RLOOTrainer, RLOOConfig), "rewards": rewards}


def trl_advantages(trl, name, rewards):
    """What TRL makes of these rewards, through its own rollout and scoring."""
    trl["rewards"][:] = rewards
    return trl[name]._generate_and_score_completions([{"prompt": "w2 w3 w4"}] * len(rewards))["advantages"]


REWARDS = [1.0, 0.0, 0.25, 0.25, -1.0, 3.0, 0.3, 0.1]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(trl, scale):
    trl["grpo"].scale_rewards = scale
    close(group_advantages(REWARDS, G, scale_rewards=scale), trl_advantages(trl, "grpo", REWARDS))


def test_leave_one_out_equals_trl_rloo(trl):
    trl["rloo"].beta = 0.0
    got = group_advantages(REWARDS, G, baseline="leave_one_out", scale_rewards="none")
    close(got, trl_advantages(trl, "rloo", REWARDS))


def test_groups_without_variance_as_trl_counts_them(trl):
    trl["grpo"].scale_rewards = "group"
    trl_advantages(trl, "grpo", REWARDS)
    share = trl["grpo"]._metrics["train"]["frac_reward_zero_std"][-1]
    close(groups_without_variance(REWARDS, G).float().mean(), share)


TRL_CASES = {
    "grpo": ("grpo", dict()),
    "grpo, clip-higher and KL": ("grpo", dict(epsilon_high=0.28, beta=0.1)),
    "grpo, credit per token": ("grpo", dict(per_token=True)),
    "grpo, entropy bonus": ("grpo", dict(entropy_coef=0.02)),
    "bnpo": ("bnpo", dict(beta=0.1, entropy_coef=0.02)),
    "dr_grpo": ("dr_grpo", dict(beta=0.1)),
    "dapo": ("dapo", dict(epsilon_high=0.28)),
    "dapo, KL, entropy and credit per token": ("dapo", dict(beta=0.1, entropy_coef=0.02, per_token=True)),
    "cispo": ("cispo", dict(epsilon_high=1.1)),
    "cispo, KL": ("cispo", dict(epsilon_high=1.05, beta=0.1)),
    "grpo, corrected KL": ("grpo", dict(beta=0.1, use_bias_correction_kl=True)),
    "cispo, corrected KL": ("cispo", dict(epsilon_high=1.1, beta=0.1, use_bias_correction_kl=True)),
    "gspo": ("gspo", dict(epsilon=0.03, epsilon_high=0.04)),
    "gspo, KL": ("gspo", dict(epsilon=0.03, epsilon_high=0.04, beta=0.1)),
}


@pytest.mark.parametrize("case", TRL_CASES)
def test_loss_and_gradients_equal_trl(trl, case):
    """The whole way, from the model's parameters to the loss and back, TRL's and ours on the same model."""
    loss_type, chosen = TRL_CASES[case]
    options = {"epsilon": 0.2, "epsilon_high": None, "beta": 0.0, "entropy_coef": 0.0, **chosen}
    per_token = options.pop("per_token", False)
    _, old_noise, advantages, mask, ref_noise = batch()
    g = torch.Generator().manual_seed(1)
    if per_token:
        advantages = torch.randn(B, T, generator=g)
    trainer = trl["grpo"]
    model = trainer.model
    prompt_ids = torch.randint(2, VOCABULARY, (B, P), generator=g)
    completion_ids = torch.randint(2, VOCABULARY, (B, T), generator=g)
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]])
    real = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 6, [1] + [0] * 5])  # not padding
    input_ids, attention = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, real], 1)

    def ours():
        hidden = model.model(input_ids, attention_mask=attention).last_hidden_state[:, P - 1 : -1]
        return token_logprobs_and_entropy(
            hidden, model.lm_head.weight, completion_ids, mask=mask, temperature=0.7, chunk_tokens=3
        )

    with torch.no_grad():
        start = ours()[0]
    old, ref = start + 0.2 * (old_noise + 1.5), start + 0.2 * (ref_noise + 1.5)

    # TRL 1.16
    trainer.loss_type = "grpo" if loss_type == "gspo" else loss_type
    trainer.importance_sampling_level = "sequence" if loss_type == "gspo" else "token"
    trainer.epsilon_low = options["epsilon"]
    trainer.epsilon_high = options["epsilon_high"] if options["epsilon_high"] is not None else options["epsilon"]
    trainer.beta, trainer.entropy_coef = options["beta"], options["entropy_coef"]
    trainer.args.use_bias_correction_kl = options.get("use_bias_correction_kl", False)
    trainer._entropy_bonus_enabled = options["entropy_coef"] != 0
    model.zero_grad()
    theirs = trainer._compute_loss(
        model,
        {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": real,
            "tool_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        },
    )
    theirs.backward()
    their_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    # ours
    model.zero_grad()
    logprobs, entropy = ours()
    loss, got = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        loss_type=loss_type,
        ref_logprobs=ref,
        entropy=entropy,
        max_completion_length=T,
        **options,
    )
    loss.backward()
    close(loss, theirs)
    for name, p in model.named_parameters():
        close(p.grad, their_grads[name])
    assert max(g.abs().max() for g in their_grads.values()) > 1e-3
    if options["beta"] and not trainer.args.use_bias_correction_kl:  # TRL then reports the corrected one
        close(got["kl"], metrics["kl"])
    if loss_type == "cispo":
        close(got["clip_high"], metrics["cispo_clip_ratio"])
    elif loss_type != "gspo":  # TRL counts rollouts there, we count tokens
        close(got["clip_low"], metrics["clip_ratio/low_mean"])
        close(got["clip_high"], metrics["clip_ratio/high_mean"])
    if not per_token:
        assert got["clip_low"] + got["clip_high"] > 0, "the inputs clip nothing: they test too little"


# ------------------------------------------------------------------------------------------------ advantages


def test_reinforce_and_reinforce_plus_plus_by_hand():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert group_advantages(rewards, 3, baseline="none", scale_rewards="none").tolist() == rewards
    std = math.sqrt((4 * (1 / 3) ** 2 + 2 * (2 / 3) ** 2) / 5)
    want = [(r - 4 / 6) / (std + 1e-4) for r in rewards]
    close(group_advantages(rewards, 3, baseline="batch_mean", scale_rewards="batch"), want)


@given(st.lists(st.floats(-1, 1), min_size=12, max_size=12), st.sampled_from(["group_mean", "leave_one_out"]))
def test_group_advantages_cancel_and_ignore_a_shift(rewards, baseline):
    advantages = group_advantages(rewards, 4, baseline=baseline)
    close(advantages.view(-1, 4).sum(1), torch.zeros(3), 1e-4)
    close(group_advantages([r + 1 for r in rewards], 4, baseline=baseline), advantages, 1e-4)


def test_equal_rewards_teach_nothing_whatever_the_number():
    assert group_advantages([0.7] * 7 + [0.1] * 7, 7).abs().max() < 1e-9
    assert groups_without_variance([0.1 + 0.2, 0.3], 2).all()
    assert groups_without_variance(torch.tensor([0.1 + 0.2, 0.3 + 3e-8]), 2).all()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(rewards=[1.0, float("nan")]),
        dict(rewards=[1.0, float("-inf")]),
        dict(rewards=[1.0, 2.0, 3.0]),
        dict(rewards=[]),
        dict(group_size=1),
        dict(baseline="rloo"),
        dict(scale_rewards="std"),
        dict(baseline="none"),  # would divide all-correct groups by 1e-4
        dict(baseline="batch_mean"),
    ],
)
def test_group_advantages_refuse(wrong):
    with pytest.raises(ValueError):
        group_advantages(**{"rewards": [1.0, 2.0], "group_size": 2, **wrong})


def test_a_nan_reward_is_named():
    with pytest.raises(ValueError, match="rollout 2 is nan"):
        group_advantages([1.0, 2.0, float("nan"), 0.0], 2)


def test_gae_is_the_sum_of_discounted_deltas():
    """Against the definition, eq. 16 of the paper, on the sampled tokens alone."""
    gamma, lam = 0.9, 0.8
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    mask = batch()[3]
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b in range(B):
        at = mask[b].nonzero().flatten().tolist()
        v = [values[b, t].item() for t in at] + [0.0]
        delta = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            close(advantages[b, t], sum((gamma * lam) ** n * d for n, d in enumerate(delta[i:])))
            close(returns[b, t], advantages[b, t] + values[b, t])
    assert not advantages[mask == 0].any() and not returns[mask == 0].any()


def test_gae_without_values_is_the_reward_to_go():
    mask = batch()[3]
    advantages, returns = gae(torch.arange(1.0, B + 1), torch.zeros(B, T), mask)
    close(advantages, mask * torch.arange(1.0, B + 1).unsqueeze(1))
    close(returns, advantages)
    with pytest.raises(FloatingPointError, match="values is nan at rollout 0, token 0"):
        gae(torch.ones(B), torch.full((B, T), math.nan), mask)


# ------------------------------------------------------------------------------------------------------ loss


def loss_and_grad(new, *rest, **options):
    new = new.detach().requires_grad_()
    loss, metrics = policy_loss(new, *rest, **options)
    loss.backward()
    return loss.detach(), new.grad, metrics


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("split", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_micro_batches_add_up_to_the_whole(loss_type, split):
    new, old, advantages, mask, ref = batch()
    entropy = new.detach() ** 2
    options = dict(
        loss_type=loss_type, beta=0.1, entropy_coef=0.05, max_completion_length=T, epsilon=0.1, epsilon_high=1.1
    )
    whole, grad, metrics = loss_and_grad(new, old, advantages, mask, ref_logprobs=ref, entropy=entropy, **options)
    counts = dict(num_sequences=B, num_tokens=int(mask.sum()))
    grads, parts = [], []
    for n, a, o, m, r, e in zip(*(x.split(split) for x in (new, advantages, old, mask, ref, entropy)), strict=True):
        _, part, measured = loss_and_grad(n, o, a, m, ref_logprobs=r, entropy=e, **options, **counts)
        grads.append(part)
        parts.append(measured)
    close(torch.cat(grads), grad, 1e-6)
    merged = merge_metrics(parts)
    close(merged["loss"], whole.item(), 1e-6)
    assert set(merged) == set(metrics) == {"loss", "tokens", "ratio", "clip_low", "clip_high", "kl", "entropy"}
    for name in metrics:
        close(merged[name], metrics[name].item(), 1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_the_gradient_is_that_of_reinforce(loss_type):
    """At ratio 1 nothing is clipped, and every loss is -A log pi up to its divisor."""
    _, old, advantages, mask, _ = batch()
    _, grad, metrics = loss_and_grad(old, old, advantages, mask, loss_type=loss_type, max_completion_length=10)
    divisor = {
        "grpo": B * mask.sum(1, keepdim=True),
        "gspo": B * mask.sum(1, keepdim=True),
        "dr_grpo": torch.tensor(B * 10),
    }.get(loss_type, mask.sum())
    close(grad, -advantages.unsqueeze(1) * mask / divisor)
    assert metrics["ratio"] == 1 and metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.parametrize(
    "ratio, advantage, flows",
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_clipping_stops_only_the_side_that_overshoots(ratio, advantage, flows):
    new, one = torch.tensor([[ratio]]).log(), torch.ones(1, 1)
    loss, grad, metrics = loss_and_grad(new, torch.zeros(1, 1), torch.tensor([advantage]), one)
    kept = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    close(loss, -kept)
    close(grad.item(), -ratio * advantage if flows else 0.0)
    assert (metrics["clip_high"] + metrics["clip_low"] == 0) == flows


def test_gspo_token_form_gives_credit_per_token():
    """With one advantage per token, a token's gradient holds its own advantage (GSPO paper, section 4.3)."""
    new, old, _, mask, _ = batch(spread=0.01)
    advantages = torch.arange(B * T).view(B, T).float()
    _, grad, _ = loss_and_grad(new, old, advantages, mask, loss_type="gspo")
    length = mask.sum(1, keepdim=True)
    ratio = (((new - old) * mask).sum(1, keepdim=True) / length).exp().detach()
    close(grad, -ratio * advantages * mask / length / B)


@pytest.mark.parametrize(
    "estimator, value, slope", [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5))]
)
def test_kl_estimators_by_hand(estimator, value, slope):
    """Log-probability -1 under the policy and -1.5 under the reference."""
    new, ref, one = torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.ones(1, 1)
    options = dict(beta=2.0, ref_logprobs=ref, kl_estimator=estimator)
    loss, grad, metrics = loss_and_grad(new, new, torch.zeros(1), one, **options)
    close(loss, 2 * value)
    close(metrics["kl"], value)
    close(grad.item(), 2 * slope)


def test_kl_estimators_average_to_the_true_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    ids = torch.multinomial(p.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    true = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        new, ref = p[ids].unsqueeze(0), q[ids].unsqueeze(0)
        _, metrics = policy_loss(
            new, new, torch.zeros(1), ids.unsqueeze(0) * 0 + 1, ref_logprobs=ref, kl_estimator=estimator
        )
        close(metrics["kl"], true, 2e-3)


def test_cispo_default_cap_and_warning():
    new, one = torch.tensor([[6.0], [2.0]]).log(), torch.ones(2, 1)
    _, grad, metrics = loss_and_grad(new, torch.zeros(2, 1), torch.ones(2), one, loss_type="cispo")
    close(grad.flatten(), torch.tensor([-5.0, -2.0]) / 2)  # capped, and yet it flows
    assert metrics["clip_high"] == 0.5
    with pytest.warns(UserWarning, match="caps the ratio itself"):
        policy_loss(new, new, torch.ones(2), one, loss_type="cispo", epsilon_high=0.28)


@settings(max_examples=30)
@given(st.sampled_from(LOSS_TYPES), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 7.0]))
def test_masked_positions_never_matter(loss_type, junk):
    new, old, advantages, mask, ref = batch()
    entropy, advantages = new.detach() ** 2, advantages.unsqueeze(1).expand(B, T)
    options = dict(loss_type=loss_type, beta=0.1, entropy_coef=0.1, max_completion_length=T)
    want = loss_and_grad(new, old, advantages, mask, ref_logprobs=ref, entropy=entropy, **options)
    new, old, advantages, ref, entropy = (
        x.detach().masked_fill(mask == 0, junk) for x in (new, old, advantages, ref, entropy)
    )
    got = loss_and_grad(new, old, advantages, mask, ref_logprobs=ref, entropy=entropy, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2] == want[2]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("given_counts", [{}, dict(num_sequences=8, num_tokens=40), dict(num_tokens=0)])
def test_an_empty_mask_gives_zero(loss_type, given_counts):
    new, old, advantages, mask, ref = batch()
    loss, grad, metrics = loss_and_grad(
        new,
        old,
        advantages,
        mask * 0,
        loss_type=loss_type,
        beta=0.1,
        ref_logprobs=ref,
        entropy=new.detach(),
        entropy_coef=0.1,
        max_completion_length=T,
        **given_counts,
    )
    assert loss == 0 and not grad.any() and not any(metrics.values())


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_number_is_reported_with_its_place(name, bad):
    new, old, advantages, mask, ref = batch()
    inputs = dict(
        logprobs=new,
        old_logprobs=old,
        advantages=advantages.unsqueeze(1).expand(B, T),
        mask=mask,
        ref_logprobs=ref,
        entropy=-old,
    )
    broken = inputs[name].detach().clone()
    broken[2, 3] = bad
    with pytest.raises(FloatingPointError, match=f"^{name} is .* at rollout 2, token 3"):
        policy_loss(**{**inputs, name: broken}, beta=0.1)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_an_overflowing_ratio_is_reported(advantage):
    one = torch.ones(1, 1)
    with pytest.raises(FloatingPointError, match="log-ratios reach 100"):
        policy_loss(-one, -101 * one, torch.tensor([advantage]), one)


@pytest.mark.parametrize("wrong", [dict(gamma=-0.5), dict(gamma=math.nan), dict(lam=1.5), dict(lam=math.inf)])
def test_gae_refuses(wrong):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        gae(one, one, one, **wrong)


def test_value_loss_and_groups_refuse():
    one = torch.ones(1, 1)
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match="^cliprange_value must be"):
            value_loss(one, one, one, one, cliprange_value=wrong)
    for size in (-2, 0, 2.5, math.nan):
        with pytest.raises(ValueError, match="groups of"):
            group_advantages([1.0, 0.0], size)


def test_policy_loss_refuses():
    new, old, advantages, mask, ref = batch()
    for wrong, message in [
        (dict(loss_type="ppo"), "loss_type must be one of grpo"),
        (dict(kl_estimator="k4"), "kl_estimator must be one of k1"),
        (dict(beta=0.1), "also give ref_logprobs"),
        (dict(beta=-0.1, ref_logprobs=ref), "beta must be greater than or equal to 0"),
        (dict(beta=math.nan, ref_logprobs=ref), "beta must be a finite number"),
        (dict(epsilon=-0.2), "epsilon must be greater"),
        (dict(epsilon=math.nan), "epsilon must be a finite number"),
        (dict(epsilon_high=-1), "epsilon_high must be greater"),
        (dict(epsilon_high=math.inf), "epsilon_high must be a finite number"),
        (dict(entropy_coef=math.nan), "entropy_coef must be a finite number"),
        (dict(entropy_coef=0.1), "also give entropy"),
        (dict(loss_type="dr_grpo"), "max_completion_length"),
        (dict(num_sequences=0), "give those of the whole batch"),
        (dict(old_logprobs=old[:, 1:]), "old_logprobs has shape"),
        (dict(advantages=advantages[1:]), "advantages has shape"),
        (dict(ref_logprobs=ref[0]), "ref_logprobs has shape"),
        (dict(mask=mask[0]), "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy_loss(**{**dict(logprobs=new, old_logprobs=old, advantages=advantages, mask=mask), **wrong})


# -------------------------------------------------------------------------- log-probabilities and entropy


def plain(hidden, weight, ids, bias=None, temperature=1.0):
    """The usual computation, with all logits at once."""
    log_p = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def head_inputs(dtype=torch.float64, bias=True, frozen=False):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 4, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(7, 4, generator=g, dtype=dtype).requires_grad_(not frozen)
    vector = torch.randn(7, generator=g, dtype=dtype).requires_grad_(not frozen) if bias else None
    return hidden, weight, vector, torch.randint(7, (2, 5), generator=g)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("wanted", ["logprobs", "entropy", "both"])
def test_head_equals_the_plain_computation(chunk_tokens, temperature, frozen, wanted):
    hidden, weight, bias, ids = head_inputs(frozen=frozen)
    got = token_logprobs_and_entropy(hidden, weight, ids, bias=bias, temperature=temperature, chunk_tokens=chunk_tokens)
    want = plain(hidden, weight, ids, bias, temperature)
    inputs = [x for x in (hidden, weight, bias) if x.requires_grad]
    factors = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = []
    for logprobs, entropy in (got, want):
        parts = {"logprobs": [logprobs * factors[0]], "entropy": [entropy * factors[1]]}
        total = sum(x.sum() for x in parts.get(wanted, parts["logprobs"] + parts["entropy"]))
        grads.append(torch.autograd.grad(total, inputs))
    for a, b in zip([*got, *grads[0]], [*want, *grads[1]], strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_head_gradcheck(frozen):
    hidden, weight, bias, ids = head_inputs(frozen=frozen)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]])

    def f(hidden, weight, bias):
        return token_logprobs_and_entropy(hidden, weight, ids, bias=bias, mask=mask, temperature=0.8, chunk_tokens=2)

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda *x: f(*x)[0], (hidden, weight, bias))


def test_head_mask_skips_positions():
    hidden, weight, _, ids = head_inputs(bias=False)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]])
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, ids, mask=mask)
    got = token_logprobs_and_entropy(
        hidden.masked_fill(mask.unsqueeze(-1) == 0, math.nan), weight, ids.masked_fill(mask == 0, -100), mask=mask
    )
    assert torch.equal(got[0], logprobs) and torch.equal(got[1], entropy)
    want = plain(hidden, weight, ids)
    close(logprobs, want[0] * mask, 1e-12)
    close(entropy, want[1] * mask, 1e-12)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert not grad[mask == 0].any() and grad[mask == 1].all()


def test_head_with_nothing_sampled():
    hidden, weight, _, ids = head_inputs(bias=False)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, ids, mask=ids * 0)
    (logprobs.sum() + entropy.sum()).backward()
    assert not logprobs.any() and not entropy.any() and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_head_in_half_precision(autocast):
    """Products in bf16, softmax in fp32: as near to the exact values as bf16 logits allow."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 32, generator=g).requires_grad_()
    weight, ids = torch.randn(50, 32, generator=g) / 4, torch.randint(50, (2, 8), generator=g)
    states, head = (hidden, weight) if autocast else (hidden.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, entropy = token_logprobs_and_entropy(states, head, ids)
        by_model = plain(states, head, ids)[0]
    assert logprobs.dtype == entropy.dtype == torch.float32
    close(logprobs, by_model.float(), 2e-2)
    want = plain(hidden, weight, ids)
    close(logprobs, want[0], 5e-2)
    close(entropy, want[1], 5e-2)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    (exact,) = torch.autograd.grad(want[0].sum(), hidden)
    close(grad, exact, 3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# The second case is large enough for the products that a CPU has for bf16; summing 256 terms in fp32 rounds more.
@pytest.mark.parametrize("n, width, words, scale, tolerance", [(8, 32, 50, 3, 1e-5), (64, 256, 2000, 1, 1e-4)])
def test_logits_of_16_bit_states_are_not_rounded_to_16_bits(n, width, words, scale, tolerance, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = ((n, width), (words, width), (words,))
    hidden, weight, bias = ((scale * torch.randn(shape, generator=g)).to(dtype) for shape in shapes)
    want = hidden.double() @ weight.double().T + bias.double()
    close(head_logits(hidden, weight, bias), want.float(), tolerance)
    assert torch.get_float32_matmul_precision() == "highest"
    ids = torch.randint(words, (1, n), generator=g)
    logprobs, _ = token_logprobs_and_entropy(hidden[None], weight, ids, bias=bias)
    close(logprobs[0], want.log_softmax(1).gather(1, ids.T).squeeze(1).float(), 1e-4)


def test_head_with_large_logits_stays_finite():
    hidden, weight, ids = torch.full((1, 2, 1), 1e4), torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([[0, 1]])
    logprobs, entropy = token_logprobs_and_entropy(hidden.requires_grad_(), weight, ids)
    close(logprobs, torch.tensor([[-math.log(2), -2e4 - math.log(2)]]))
    close(entropy, torch.full((1, 2), math.log(2)))
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


@given(st.lists(st.lists(st.integers(-9, 9), max_size=5), min_size=1, max_size=5))
def test_rows_are_padded_on_the_right(rows):
    whole, numbers = padded(rows, -1), padded(rows, 0.0)
    assert (whole.dtype, numbers.dtype) == (torch.long, torch.float32)
    assert whole.shape == numbers.shape == (len(rows), max(map(len, rows)))
    for row, a, b in zip(rows, whole.tolist(), numbers.tolist()):
        assert a[: len(row)] == b[: len(row)] == row
        assert set(a[len(row) :]) <= {-1} and set(b[len(row) :]) <= {0.0}


def test_head_refuses():
    hidden, weight, _, ids = head_inputs(bias=False)
    for wrong, message in [
        (dict(ids=ids + 5), "ids must lie in 0..6"),
        (dict(ids=ids[:, 1:]), r"must be \(B, T, H\)"),
        (dict(weight=weight.T), r"must be \(B, T, H\)"),
        (dict(temperature=0.0), "must be positive"),
        (dict(chunk_tokens=0), "must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_logprobs_and_entropy(**{**dict(hidden=hidden, weight=weight, ids=ids), **wrong})


@pytest.mark.parametrize("frozen, entropy_too", [(True, False), (True, True), (False, True)])
def test_full_logits_are_never_held(frozen, entropy_too):
    """Every tensor that comes out of any operation, forward and backward, is far smaller than the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    Largest.numel = max(Largest.numel, x.untyped_storage().nbytes() // x.element_size())
            return out

    tokens, vocabulary, chunk = 64, 1000, 8
    Largest.numel = 0
    hidden = torch.randn(1, tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=not frozen)
    ids = torch.randint(vocabulary, (1, tokens))
    with Largest():
        logprobs, entropy = token_logprobs_and_entropy(hidden, weight, ids, chunk_tokens=chunk)
        (logprobs.sum() + (entropy.sum() if entropy_too else 0)).backward()
    assert chunk * vocabulary <= Largest.numel < tokens * vocabulary / 4
