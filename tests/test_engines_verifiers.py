"""verifiers plays our task set with our harness against an endpoint of a real model: our greedy episodes."""

import asyncio

import pytest
import torch
from engine_world import HOUSE, LIMITS, MODEL, world

pytest.importorskip("verifiers", reason="verifiers is missing: make engines, or pip install -e '.[verifiers]'")

import verifiers.v1 as vf
from served_model import Model, serving
from verifiers.v1.configs.client import EvalClientConfig

from searchr1_lib import load_policy, rollout
from searchr1_lib.engines.formats import EXTRA, give, take
from searchr1_lib.rewards import SearchR1Reward, score

SETUP = {"engine": str(HOUSE), "model": MODEL, **LIMITS}
TASKSET = {"id": "searchr1_verifiers", "questions": str(HOUSE / "questions.jsonl"), "world": SETUP}
AGENT = {"harness": {"id": "searchr1_verifiers"}, "runtime": {"type": "subprocess"}}


async def play(url: str) -> list[vf.Episode]:
    env = vf.SingleAgentEnv(vf.SingleAgentEnvConfig(taskset=TASKSET, agent=AGENT))
    client = EvalClientConfig(base_url=f"{url}/v1", api_key_var="NO_SUCH_KEY")
    ctx = vf.ModelContext(client=client, model="house", sampling=vf.SamplingConfig())
    async with env.serving():
        return [await env.run_episode(task, ctx) for task in env.taskset]


def test_episodes_are_ours(monkeypatch):
    monkeypatch.setenv("NO_SUCH_KEY", "none")
    model = Model(MODEL, quantize=False)
    with serving(model.app()) as url:
        episodes = asyncio.run(play(url))
    questions, engine = world()
    ours = rollout(model.policy, questions, engine, num_generations=1, temperature=0.0, **LIMITS)
    score(SearchR1Reward(), ours).keep(ours)
    assert len(episodes) == len(ours) and any(t.turns > 1 for t in ours)
    for t, episode in zip(ours, episodes):
        assert episode.ok, episode.errors or episode.traces[0].errors
        (trace,) = episode.traces
        said = [m.content for m in trace.messages]
        assert said[0] in t.prompt
        wrote = ["".join(s.text for s in t.segments if s.by_model and s.turn == k) for k in range(t.turns)]
        assert said[1::2] == wrote
        assert said[2::2] == [s.text for s in t.segments if not s.by_model]
        assert trace.reward == t.reward
        assert trace.info[EXTRA]["answer"] == t.answer


def test_our_record_is_a_trace():
    """Their model accepts it, joins the same tokens from its nodes, and it comes back equal (at full precision)."""
    questions, engine = world()
    how = {"num_generations": 4, "generator": torch.Generator().manual_seed(0), **LIMITS}
    made = rollout(load_policy(MODEL, quantize=False, lora=False), questions, engine, **how)
    score(SearchR1Reward(), made).keep(made)
    for t in made:
        trace = vf.WireTrace.model_validate(give("verifiers", t))
        (branch,) = trace.branches
        assert branch.token_ids == t.prompt_ids + t.completion_ids
        assert branch.sampled_mask == [False] * len(t.prompt_ids) + [bool(m) for m in t.mask]
        assert branch.logprobs == [0.0] * len(t.prompt_ids) + t.logprobs
        assert trace.reward == t.reward
        assert take("verifiers", trace.to_record(float_decimals=None)) == t
