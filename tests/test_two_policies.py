"""Two authors on one model: who writes, who reads, who learns from what, and that nothing of it is approximate."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.environment.base import Environment
from searchr1_lib.environment.search import SearchEnvironment, tools_of
from searchr1_lib.files import TrajectoryLog
from searchr1_lib.records import ENVIRONMENT, Question, Trajectory
from searchr1_lib.rewards import InformationGain, SearchR1Reward, score
from searchr1_lib.search import BM25Search
from searchr1_lib.study.evaluate import evaluate
from searchr1_lib.training import decoder
from searchr1_lib.training.credit import OWN_REWARD, author_advantages, gold_probabilities
from searchr1_lib.training.learner import Batch, Learner
from searchr1_lib.training.logits import token_logprobs_and_entropy
from searchr1_lib.training.policy import Policy, export_merged, load_policy
from searchr1_lib.training.rollout import _switches, continuations, rollout
from searchr1_lib.training.settings import Settings
from searchr1_lib.training.trainer import Trainer

TINY = "data/tiny_qwen"
BOTH = ("reason", "search")
LIMITS = {"max_turns": 2, "max_turn_tokens": 60}
SHORT = Settings(
    steps=3,
    questions_per_step=2,
    num_generations=4,
    learning_rate=1e-3,
    checkpoint_every=2,
    explore=1,
    scale_rewards="none",
    kl_every=0,
    **LIMITS,
)


@pytest.fixture(scope="module")
def engine():
    return BM25Search(load_passages("data/almanac/passages.jsonl"))


@pytest.fixture(scope="module")
def questions():
    return load_questions("data/almanac/train.jsonl")[:20]


def apart(policy: Policy) -> Policy:
    """The policy with adapters that do something, each something else."""
    torch.manual_seed(0)
    for p in policy.parameters():
        p.data.add_(torch.randn_like(p) * 0.03)
    return policy


@pytest.fixture(scope="module")
def two():
    return apart(load_policy(TINY, adapters=BOTH))


@pytest.fixture(scope="module")
def made(two, engine, questions):
    """Rollouts of which some are made to search, to answer, or choose."""
    return sampled(two, questions[:4], engine)


def sampled(policy, questions, engine, **how):
    how = {"num_generations": 4, "first_action": [None, None, "search", "answer"], **LIMITS} | how
    return rollout(policy, questions, engine, generator=torch.Generator().manual_seed(0), **how)


def fresh_logprobs(policy, trajectories, temperature=1.0):
    """Log-probabilities of the whole sequences, from one forward pass without a cache."""
    batch, head = Batch.of(trajectories, policy), policy.lm_head.weight
    with torch.no_grad():
        hidden = policy.hidden(batch.ids, batch.readers, use_cache=False)[:, :-1]
        how = {"mask": batch.mask, "temperature": temperature}
        rows, _ = token_logprobs_and_entropy(hidden, head, batch.ids[:, 1:], **how)
    return [row[start : start + len(t.mask)] for row, start, t in zip(rows.tolist(), batch.starts, trajectories)]


def farthest(policy, trajectories, temperature=1.0):
    """The largest difference between what was recorded while sampling and one pass over all."""
    fresh = fresh_logprobs(policy, trajectories, temperature)
    return max(abs(a - b) for t, row in zip(trajectories, fresh) for a, b, m in zip(t.logprobs, row, t.mask) if m)


def weights(policy, author):
    return [p.detach().clone() for p in policy.parameters(author)]


# -- who writes and who reads


def test_with_the_cache_and_in_one_pass_it_is_the_same_function(two, made, questions, engine):
    assert sum(sum(t.mask_of("search")) for t in made) > 50
    assert farthest(two, made) < 1e-4
    cold = sampled(two, questions[:2], engine, temperature=0.7, first_action=None, batch_size=3)
    assert farthest(two, cold, 0.7) < 1e-4
    alone = load_policy(TINY, adapters=BOTH, quantize=False)
    assert farthest(apart(alone), sampled(alone, questions[:2], engine)) < 1e-4


def test_branches_and_continuations_read_what_others_wrote_as_it_was_read(two, made, questions, engine):
    grown = sampled(two, questions[:3], engine, first_action=None, trees=1)
    assert farthest(two, grown) < 1e-4
    again = next(t for t in made if t.turns > 1)
    onward = continuations(two, [(again, 1)], engine, num_generations=3, **LIMITS)
    assert all(t.authors[: t.shared] == again.authors[: t.shared] for t in onward)
    assert any(t.mask_of("search")[i] for t in onward for i in range(t.shared)) and farthest(two, onward) < 1e-4


def test_the_tag_is_the_reasoners_and_the_query_the_searchers(two, made):
    for t in made:
        assert len(t.authors) == len(t.mask) and Trajectory.from_dict(json.loads(json.dumps(t.to_dict()))) == t
        assert [a + b for a, b in zip(t.mask_of("reason"), t.mask_of("search"))] == t.mask
        assert all((a == ENVIRONMENT) <= (not m) for a, m in zip(t.authors, t.mask))
        queries = [s for s in t.segments if s.kind == "search"]
        assert all(s.author == ("search" if s.kind == "search" else "reason") for s in t.segments if s.by_model)
        own = "".join(token for token, m in zip(t.tokens, t.mask_of("search")) if m)
        assert own == "".join(s.text.removeprefix("<search>") for s in queries)


def test_equal_adapters_are_one(two, engine, questions, tmp_path):
    two.save_adapter(tmp_path)
    one = load_policy(TINY, adapter=tmp_path / "reason")
    same = load_policy(TINY, adapters=dict.fromkeys(BOTH, tmp_path / "reason"))
    a, b = (sampled(policy, questions[:3], engine) for policy in (one, same))
    assert [t.completion_ids for t in a] == [t.completion_ids for t in b]
    assert all(x == pytest.approx(y, abs=1e-4) for s, t in zip(a, b) for x, y in zip(s.logprobs, t.logprobs))
    for policy, trajectories in ((one, a), (same, b)):
        score(SearchR1Reward(), trajectories).keep(trajectories)
        Learner(policy, SHORT).assign_advantages(trajectories)
    assert [t.advantages for t in a] == [t.advantages for t in b] and any(any(t.advantages) for t in a)
    assert not a[0].authors and b[0].authors


PIECES = {
    "between tokens": (["<think>", " a", "</think>", "<search>", " q", " r", "</search>"], [0, 0, 0, 0, 1, 1, 1]),
    "in a token that goes on": (["<sea", "rch>A", "da", "</search>"], [0, 0, 1, 1]),
    "letter by letter": ([*"<search>", "q", *"</search>"], [0] * 8 + [1] * 10),
    "another tag": (["<search>", " x", "<answer>", " y", "</answer>"], [0, 1, 1, 0, 0]),
    "closed, and opened again": (["<think>", "<search>", "</think>", "z", "</answer>"], [0, 0, 1, 0, 0]),
}


@pytest.mark.parametrize("how", PIECES)
def test_the_switch_comes_after_the_token_that_completes_a_tag(two, monkeypatch, how):
    """Whatever tokens spell it: they are given here the bytes of the pieces."""
    pieces, authors = PIECES[how]
    monkeypatch.setattr(two, "token_bytes", [p.encode() for p in pieces] + two.token_bytes[len(pieces) :])
    ids = iter(range(len(pieces)))
    monkeypatch.setattr(decoder, "draw", lambda probs, generator: torch.tensor([next(ids)]))
    environment = SearchEnvironment(tools_of(None))
    stops = [stop.encode() for stop in environment.stops]
    with decoder.Decoder(two) as writer:
        row = two.encode("So:")
        (written,) = writer.write([row], stops, [50], [[0] * len(row)], _switches(two, environment))
    assert written.ids == list(range(len(pieces))) and written.authors == authors


def test_what_nobody_may_write_is_named(two, engine, questions, tmp_path):
    for wrong in (("reason",), ("a", "a"), ("reason", ENVIRONMENT)):
        with pytest.raises(ValueError, match="adapters"):
            load_policy(TINY, adapters=wrong)
    with pytest.raises(ValueError, match="without adapter="):
        load_policy(TINY, adapters=BOTH, adapter=tmp_path)
    with pytest.raises(ValueError, match=r"nothing to write for serach; 'reason' .* of answer, search, think"):
        rollout(load_policy(TINY, adapters=("reason", "serach")), questions, engine)
    with pytest.raises(ValueError, match="nothing to write"):
        _switches(two, Environment())
    with pytest.raises(ValueError, match="no one model is reason and search"):
        export_merged(two, tmp_path / "merged")
    for wrong in ({"trained": ["searcher"]}, {"learning_rates": {"policy": 1e-3}}):
        with pytest.raises(ValueError, match=r"no author of this policy; \('reason', 'search'\) are"):
            Learner(two, Settings(**wrong))
    for wrong in ({"baseline": "value", "scale_rewards": "none"}, {"mask_observations": False}):
        with pytest.raises(ValueError, match="know one author"):
            Learner(two, Settings(**wrong))
    with pytest.raises(ValueError, match="author_rewards: searcher"):
        Trainer(two, questions, engine, run_dir=tmp_path, author_rewards={"searcher": InformationGain()})
    with pytest.raises(ValueError, match="per_author"):
        Settings(per_author=True, credit="return")


def test_dora_has_no_part_for_a_token(tmp_path):
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(load_policy(TINY, lora=False).model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(ValueError, match="use_dora"):
        load_policy(TINY, adapters={"reason": tmp_path, "search": None})


# -- who learns from what


def chance(trajectories):
    """A reward that tells any two rollouts apart."""
    return [sum(t.completion_ids) % 11 / 10 for t in trajectories]


@pytest.fixture
def scored(two, engine, questions):
    """Rollouts with an advantage of its own on every token."""
    trajectories = sampled(two, questions[:3], engine)
    score(chance, trajectories).keep(trajectories)
    for n, t in enumerate(trajectories):
        t.advantages = [math.sin(n + i) for i in range(len(t.mask))]
    return trajectories


def gradients(policy, trajectories, settings=SHORT):
    """Of each author's adapter, after one pass; the trajectories stay as they are."""
    learner = Learner(policy, settings)
    with learner.checkpointing():
        learner.gradient(trajectories)
    found = {a: torch.cat([p.grad.flatten() for p in policy.parameters(a)]) for a in learner.trained}
    policy.model.zero_grad()
    return found


def test_each_adapter_learns_from_its_own_tokens_alone(two, scored):
    whole = gradients(two, scored)
    assert all(g.abs().max() > 1e-4 for g in whole.values())
    before = [t.advantages for t in scored]
    for mine, other in (BOTH, BOTH[::-1]):
        for t, row in zip(scored, before):
            t.advantages = [0.0 if by == other else a for a, by in zip(row, t.authors)]
        part = gradients(two, scored)
        assert torch.allclose(part[mine], whole[mine], atol=1e-7) and not part[other].any()


def test_the_gradient_is_that_of_an_authors_own_loss(two, scored):
    """By hand: GRPO on the author's tokens of each rollout, differentiated by its adapter."""
    whole = gradients(two, scored)
    for author in BOTH:
        batch = Batch.of(scored, two)
        mask = batch.column([t.mask_of(author) for t in scored])
        if author == "reason":
            mask = mask + batch.forced
        hidden = two.hidden(batch.ids, batch.readers, use_cache=False)[:, :-1]
        logprobs, _ = token_logprobs_and_entropy(hidden, two.lm_head.weight, batch.ids[:, 1:], mask=batch.mask)
        advantages = batch.column([t.advantages for t in scored])
        share = torch.where((batch.forced > 0) & (advantages < 0), logprobs.detach().exp(), torch.ones(()))
        each = (logprobs - logprobs.detach()).exp() * advantages * share * mask
        loss = -(each.sum(1) / mask.sum(1).clamp(min=1)).sum() / len(scored)
        by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss, two.parameters(author))])
        assert (whole[author] - by_hand).norm() < 1e-3 * by_hand.norm()


@pytest.mark.parametrize("how", [{"tokens_per_micro_batch": 300}, {"gradient_checkpointing": True}])
def test_parts_and_recomputation_change_no_gradient(two, scored, how):
    whole, parts = gradients(two, scored), gradients(two, scored, SHORT.model_copy(update=how))
    assert all(torch.allclose(whole[a], parts[a], atol=1e-6) for a in BOTH)


def test_what_one_author_is_worth_by_hand():
    """One of four rollouts never asked: it is in no group of the searcher's; the other question's two are alike."""
    asked = {"reason": "reason", "search": "search"}
    wrote = [BOTH, BOTH, BOTH, BOTH[:1], BOTH[:1], BOTH[:1], BOTH[:1], BOTH]
    rows = []
    for number, (names, reward) in enumerate(zip(wrote, (1.0, 0.0, 0.5, 9.0, 1.0, 0.0, 0.0, 3.0))):
        authors = [asked[name] for name in names]
        t = Trajectory(Question(str(number // 4), "?", ["x"]), [1], [1] * len(authors), [1] * len(authors), [0.0] * 2)
        t.authors, t.reward, t.rewards = authors, reward, {OWN_REWARD + "search": reward * 2}
        rows.append(t)
    how = Settings(num_generations=4, per_author=True, scale_rewards="none")
    got = author_advantages(rows, "search", how).flatten().tolist()
    assert got == pytest.approx([1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # of 2, 0, 1; the last one is alone
    scaled = author_advantages(rows, "search", how.model_copy(update={"scale_rewards": "group"}))
    assert scaled.flatten().tolist()[:3] == pytest.approx([1 / 1.0001, -1 / 1.0001, 0.0], abs=1e-4)
    common = author_advantages(rows, "reason", how.model_copy(update={"per_author": False})).flatten().tolist()
    assert common == pytest.approx([-1.625, -2.625, -2.125, 6.375, 0.0, -1.0, -1.0, 2.0])
    for t in rows:
        t.authors = ["reason"] * len(t.mask)
    assert not author_advantages(rows, "search", how).any()


def test_each_authors_tokens_get_its_advantage(two, scored):
    for t in scored:
        t.rewards[OWN_REWARD + "search"] = len(t.mask) % 7
    Learner(two, SHORT.model_copy(update={"per_author": True})).assign_advantages(scored)
    for author in BOTH:
        own = author_advantages(scored, author, SHORT.model_copy(update={"per_author": True})).flatten().tolist()
        assert any(own)
        for t, advantage in zip(scored, own):
            assert all(a == advantage for a, m in zip(t.advantages, t.mask_of(author)) if m)


def test_the_probe_reads_what_the_searcher_wrote_with_its_adapter(two, made, monkeypatch):
    known = gold_probabilities(two, made)
    monkeypatch.setattr(two, "readers_of", lambda t: [0] * (len(t.prompt_ids) + len(t.mask) - 1))
    other = gold_probabilities(two, made)
    differ = [i for i, (a, b) in enumerate(zip(known, other)) if a != pytest.approx(b, rel=1e-3)]
    assert differ and all(any(made[i].mask_of("search")) for i in differ)


# -- training, and its folder


def trainer(folder, engine, questions, settings=SHORT, policy=None, **how):
    policy = policy or load_policy(TINY, adapters=BOTH)
    return Trainer(policy, questions, engine, settings=settings, run_dir=folder, report=None, **how)


def saved(run):
    """The bytes of each adapter of the last checkpoint, and the metrics without times."""
    newest = max((run / "checkpoints").iterdir(), key=lambda f: int(f.name.split("_")[1]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]
    return {author: (newest / author / "adapter_model.safetensors").read_bytes() for author in BOTH}, kept


OWN = {"settings": SHORT.model_copy(update={"per_author": True}), "author_rewards": {"search": InformationGain()}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, engine, questions):
    run = tmp_path_factory.mktemp("two") / "run"
    trainer(run, engine, questions, **OWN).train()
    return run


def test_a_run_of_two_leaves_two_adapters(finished):
    bytes_of, rows = saved(finished)
    assert bytes_of["reason"] != bytes_of["search"]
    assert all("rewards/author/search" in row and row["ratio"] == pytest.approx(1, abs=1e-4) for row in rows)
    files = {f.name for f in (finished / "checkpoints" / "step_3" / "search").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    log = TrajectoryLog(finished / "trajectories.jsonl").read()
    assert {s.author for t in log for s in t.segments} == {*BOTH, ENVIRONMENT}


@pytest.mark.parametrize("damage", ["none", "search/adapter_model.safetensors"])
def test_it_goes_on_to_the_same_bytes(tmp_path, engine, questions, finished, damage):
    run = tmp_path / "run"
    trainer(run, engine, questions, **OWN, callbacks=[lambda t, row: row["step"] == 3 - (damage == "none")]).train()
    if damage != "none":
        (run / "checkpoints" / "step_3" / damage).write_bytes(b"half")
    again = trainer(run, engine, questions, **OWN)
    assert again.step == 2
    again.train()
    assert saved(run) == saved(finished)
    with pytest.raises(ValueError, match="author/search"):
        trainer(run, engine, questions, OWN["settings"])


def test_each_adapter_is_an_ordinary_one(finished, questions):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = finished / "checkpoints" / "step_3"
    both = load_policy(TINY, adapters={a: folder / a for a in BOTH}, quantize=False)
    again = load_policy(TINY, adapters=BOTH, quantize=False)
    again.load_adapter(folder)
    assert all(torch.equal(a, b) for a, b in zip(both.parameters(), again.parameters()))
    ids = torch.tensor([both.encode(both.prompt_text(questions[0].text))])
    states = []
    for place, author in enumerate(BOTH):
        alone = load_policy(TINY, adapter=folder / author, quantize=False)
        base = AutoModelForCausalLM.from_pretrained(TINY)
        theirs = PeftModel.from_pretrained(base, str(folder / author)).get_base_model().get_decoder()
        with torch.no_grad():
            states.append(both.hidden(ids, torch.full_like(ids, place)))
            assert torch.allclose(states[-1], alone.decoder(ids).last_hidden_state, atol=1e-4)
            assert torch.allclose(states[-1], theirs(ids).last_hidden_state, atol=1e-4)
    assert not torch.allclose(*states, atol=1e-3)
    with both.reference(), torch.no_grad():
        bare = load_policy(TINY, lora=False, quantize=False).decoder(ids).last_hidden_state
        assert torch.allclose(both.hidden(ids, torch.ones_like(ids)), bare, atol=1e-5)


def test_it_is_evaluated_as_any_policy(two, engine, questions):
    report = evaluate(two, questions[:2], engine, **LIMITS)
    assert {t.question.id for t in report.trajectories} == {q.id for q in questions[:2]}
    with torch.no_grad():  # outside of all this the model is its first author
        ids = torch.tensor([two.encode("Who founded it?")])
        alone = two.model(input_ids=ids).logits
        first = two.lm_head(two.hidden(ids, torch.zeros_like(ids)))
    assert torch.allclose(alone, first, atol=1e-5)


@pytest.mark.parametrize("author", BOTH)
def test_a_frozen_author_stays_as_it_is(tmp_path, engine, questions, author):
    """In stages: first one learns, then the other, on the same policy."""
    policy = apart(load_policy(TINY, adapters=BOTH))
    policy.save_adapter(tmp_path / "before")
    stage = SHORT.model_copy(update={"trained": [author], "steps": 2, "kl_every": 1})
    trainer(tmp_path / "run", engine, questions, stage, policy).train()
    before = {a: load_file(tmp_path / "before" / a / "adapter_model.safetensors") for a in BOTH}
    bytes_of, _ = saved(tmp_path / "run")
    for other in BOTH:
        same = bytes_of[other] == (tmp_path / "before" / other / "adapter_model.safetensors").read_bytes()
        assert same == (other != author)
    assert len(before[author]) == len(policy.parameters())
    trained = weights(policy, author)
    then = next(a for a in BOTH if a != author)
    stage = stage.model_copy(update={"trained": [then], "steps": 1})
    trainer(tmp_path / "then", engine, questions, stage, policy).train()
    after = Learner(policy, SHORT).policy
    assert all(torch.equal(a, b) for a, b in zip(trained, weights(after, author)))
    assert not all(torch.equal(a, before[then][n].to(a)) for n, a in zip(sorted(before[then]), weights(after, then)))


def test_each_has_its_learning_rate(two, scored):
    """AdamW's first step is of the size of the learning rate, whatever the gradient's."""
    before = {a: weights(two, a) for a in BOTH}
    Learner(two, SHORT.model_copy(update={"learning_rates": {"search": 1e-4}})).update(scored, 0)
    for author, rate in (("reason", 1e-3), ("search", 1e-4)):
        moved = max(float((a - b.detach()).abs().max()) for a, b in zip(before[author], two.parameters(author)))
        assert moved == pytest.approx(rate, rel=0.05)
        for p, old in zip(two.parameters(author), before[author]):
            p.data.copy_(old)
