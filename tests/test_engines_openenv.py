"""OpenEnv's environment plays our episodes, turn by turn, in process and over its HTTP app."""

import pytest
import torch
from engine_world import HOUSE, LIMITS, MODEL, world

pytest.importorskip("openenv", reason="OpenEnv is missing: make engines, or pip install -e '.[openenv]'")

from openenv import GenericEnvClient
from openenv.core.harness.training import TrainingTrace
from served_model import serving

from searchr1_lib import load_policy, rollout
from searchr1_lib.engines.formats import EXTRA, give, take
from searchr1_lib.engines.openenv import SearchAction, SearchR1, make_app
from searchr1_lib.engines.world import Setup
from searchr1_lib.rewards import SearchR1Reward, score


@pytest.fixture(scope="module")
def recorded():
    questions, engine = world()
    how = {"num_generations": 6, "generator": torch.Generator().manual_seed(0), **LIMITS}
    policy = load_policy(MODEL, lora=False)
    made = rollout(policy, questions, engine, **how) + rollout(policy, questions, engine, **how, temperature=3.0)
    score(SearchR1Reward(), made).keep(made)
    assert {t.finish_reason for t in made} >= {"answer", "turns", "stop"} and any(t.searches for t in made)
    return made


@pytest.fixture(scope="module")
def place():
    return Setup(engine=str(HOUSE), model=MODEL, **LIMITS).open()


def turns_of(t) -> list[tuple[str, str | None]]:
    """What the model wrote, by turn, and why it could not go on."""
    texts = ["".join(s.text for s in t.segments if s.by_model and s.turn == k) for k in range(t.turns)]
    return [(text, "stop" if t.finish_reason == "stop" and k == t.turns - 1 else None) for k, text in enumerate(texts)]


def check(t, shown, last) -> None:
    assert [text for text in shown if text] == [s.text for s in t.segments if not s.by_model]
    assert last["reward"] == t.reward and last["kind"] == t.finish_reason
    extra = last["metadata"][EXTRA]
    assert extra["answer"] == t.answer and [c["argument"] for c in extra["calls"]] == [c.argument for c in t.calls]


def test_episodes_are_ours_in_process(recorded, place):
    questions = world()[0]
    env = SearchR1(place, questions)
    for t in recorded:
        first = env.reset(index=int(t.question.id[1:]), episode_id="e")
        assert not first.done and first.text in t.prompt
        observations = [env.step(SearchAction(text=text, end=end)) for text, end in turns_of(t)]
        assert [o.done for o in observations] == [False] * (t.turns - 1) + [True]
        check(t, [o.text for o in observations], observations[-1].model_dump())
        assert env.state.step_count == t.turns and env.state.searches == len(t.searches)
    assert env.reset(seed=3).text == env.reset(seed=3).text


def test_episodes_are_ours_over_http(recorded, place):
    """Two sessions at once, each with an episode of its own."""
    with serving(make_app(place, world()[0])) as url:
        one, two = (GenericEnvClient(base_url=url).sync() for _ in range(2))
        with one, two:
            for t in recorded[::5]:
                for client in (one, two):
                    assert client.reset(index=int(t.question.id[1:])).observation["text"] in t.prompt
                results = []
                for text, end in turns_of(t):
                    results.append(one.step({"text": text, "end": end}))
                    two.step({"text": "nothing"})
                assert [r.done for r in results] == [False] * (t.turns - 1) + [True]
                last = results[-1]
                said = last.observation | {
                    "reward": last.reward,
                    "metadata": last.metadata or last.observation["metadata"],
                }
                check(t, [r.observation["text"] for r in results], said)


def test_our_record_is_a_training_trace(recorded):
    """OpenEnv's own checks accept it, and it comes back equal."""
    for t in recorded:
        record = give("openenv", t)
        trace = TrainingTrace(**record["trace"])
        back = {"trace": trace.model_dump(mode="json"), "reward": record["reward"]}
        assert take("openenv", back) == t
