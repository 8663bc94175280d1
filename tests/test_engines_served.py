"""A decoder behind a server: ids kept, the ratio at the first update, drift; the server samples with the tiny Qwen."""

from types import SimpleNamespace

import pytest
import torch
from engine_world import LIMITS, reward, world
from served_model import Model, serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from searchr1_lib import Settings, Trainer, load_policy, rollout
from searchr1_lib.engines.served import Served, ServedError, ServedPolicy, drift, until_stop
from searchr1_lib.rewards import score
from searchr1_lib.training.decoder import Decoder

TINY = "data/tiny_qwen"


@pytest.fixture(scope="module")
def model():
    return Model(TINY)


@pytest.fixture(scope="module")
def url(model):
    with serving(model.app()) as address:
        yield address


@pytest.fixture
def policy():
    return load_policy(TINY)


def roll(policy, **how):
    questions, engine = world()
    return rollout(policy, questions[:4], engine, **{"num_generations": 2} | LIMITS | how)


@pytest.mark.parametrize("wire", ["vllm", "sglang"])
def test_greedy_rollouts_are_those_of_our_own_decoder(wire, url, policy):
    """Token by token, log-probabilities to rounding, without any weights here."""
    served = Served(url, wire=wire, model=TINY)
    how = {"temperature": 0.0, "max_turn_tokens": 60, "first_action": ["search", None]}
    theirs = roll(ServedPolicy.load(TINY, sampler=served), **how)
    ours = roll(policy, **how)
    assert [t.completion_ids for t in theirs] == [t.completion_ids for t in ours]
    assert [t.segments for t in theirs] == [t.segments for t in ours]
    assert [t.mask for t in theirs] == [t.mask for t in ours] and any(t.searches for t in ours)
    for a, b in zip(ours, theirs):
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)


def test_sampled_ids_are_kept_and_the_same_seed_gives_them_again(model, url, policy):
    policy.sampler = Served(url, model=TINY)
    seeded = lambda: torch.Generator().manual_seed(3)
    model.asked.clear()
    first, again = roll(policy, generator=seeded()), roll(policy, generator=seeded())
    assert [t.completion_ids for t in first] == [t.completion_ids for t in again]
    assert {row["temperature"] for row in model.asked} == {1.0}
    assert {tuple(row["stop"]) for row in model.asked} == {("</answer>", "</search>")}
    told = drift(policy, first)
    assert told["tokens"] == sum(sum(t.mask) for t in first)
    assert told["ratio"] == pytest.approx(1, abs=1e-4) and told["worst"] < 1e-3 and told["kl"] < 1e-6
    assert told["ess"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("wire", ["vllm", "sglang"])
def test_training_on_served_rollouts(wire, tmp_path, url, policy):
    """The ratio at the first update is 1; behind a server that nobody tells, it drifts; told, it is 1 again."""
    questions, engine = world()
    policy.sampler = served = Served(url, wire=wire, model=TINY)
    settings = {**LIMITS, "questions_per_step": 2, "num_generations": 4, "learning_rate": 3e-2, "kl_every": 0}
    trainer = Trainer(policy, questions, engine, reward(), Settings(steps=2, **settings), tmp_path, report=None)
    trainer.train()
    assert trainer.metrics[0]["ratio"] == pytest.approx(1, abs=1e-3)
    stale = drift(policy, roll(policy))
    assert stale["worst"] > 0.05 and stale["kl"] > 1e-4 and stale["ess"] < 0.9999
    served.push(trainer)
    fresh = drift(policy, roll(policy))
    assert fresh["worst"] < 1e-3 and fresh["ess"] > 0.9999
    before = served.adapter
    served.push(trainer)
    assert served.adapter != before


def test_branches_grow_behind_a_server(url, policy):
    """It is asked for what a branch adds, behind the ids that its trunk was given."""
    policy.sampler = Served(url, model=TINY)
    made = roll(policy, trees=1, num_generations=4, generator=torch.Generator().manual_seed(3))
    branches = [(made[i - i % 4], t) for i, t in enumerate(made) if t.shared]
    assert branches
    for trunk, t in branches:
        assert t.completion_ids[: t.shared] == trunk.completion_ids[: t.shared]
        assert t.logprobs[: t.shared] == trunk.logprobs[: t.shared]
    assert drift(policy, made)["worst"] < 1e-3


def test_drift_is_what_its_words_say(policy):
    """A log-probability that is wrong by log 2 everywhere."""
    made = roll(policy)
    for t in made:
        t.logprobs = [x + 0.6931471805599453 * m for x, m in zip(t.logprobs, t.mask)]
    told = drift(policy, made)
    assert told["ratio"] == pytest.approx(0.5, abs=1e-3) and told["worst"] == pytest.approx(0.693, abs=1e-3)
    assert told["kl"] == pytest.approx(0.5 - 1 + 0.6931, abs=1e-3) and told["ess"] == pytest.approx(1, abs=1e-3)


def test_temperature_goes_along(url, policy):
    policy.sampler = Served(url, model=TINY)
    made = roll(policy, temperature=0.5)
    assert drift(policy, made, temperature=0.5)["worst"] < 1e-3 < drift(policy, made)["worst"]


def test_until_stop_keeps_the_token_in_which_a_stop_ends():
    policy = ServedPolicy.load(TINY)
    ids = policy.encode("<search> Ada </search> and more <answer> x </answer>")
    kept = until_stop(policy, ids, [b"</answer>", b"</search>"])
    assert kept == ids[: len(kept)] and "</search>" in policy.decode(kept)
    assert "</search>" not in policy.decode(kept[:-1])
    assert until_stop(policy, ids, [b"</think>"]) == ids


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"choices": []}, "not of the form"),
        ({"choices": [{"token_ids": [], "logprobs": {"token_logprobs": []}}]}, "0 ids"),
        ({"choices": [{"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0]}}]}, "2 ids and 1"),
        ({"choices": [{"token_ids": [5], "logprobs": None}]}, "not of the form"),
    ],
)
def test_an_answer_of_another_form_stops_the_step(answer, said):
    async def respond(request):
        return JSONResponse(answer)

    with serving(Starlette(routes=[Route("/v1/completions", respond, methods=["POST"])])) as address:
        policy = ServedPolicy.load(TINY, sampler=Served(address, model="m"))
        with pytest.raises(ServedError, match=said):
            roll(policy)


def test_a_server_that_takes_no_adapter_says_so(policy):
    """As vLLM does without VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
    with serving(Starlette()) as address, pytest.raises(ServedError, match="refused /v1/load_lora_adapter: 404"):
        Served(address, model="m").push(SimpleNamespace(step=1, policy=policy))


def test_wire_and_address_are_checked():
    with pytest.raises(ValueError, match="wire must be vllm or sglang, got 'tgi'"):
        Served("http://127.0.0.1:1", wire="tgi")
    with pytest.raises(ValueError, match="endpoint url"):
        Served("here:8000")


def test_a_reward_sees_served_rollouts(url):
    policy = ServedPolicy.load(TINY, sampler=Served(url, model=TINY))
    made = roll(policy)
    score(reward(), made).keep(made)
    assert all(len(t.token_values["entropy"]) == len(t.mask) for t in made)
    assert not issubclass(type(policy.sampler), Decoder)
