"""Trajectories to other engines' records and back: ids, masks, log-probabilities and reward are equal."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engine_world import LIMITS, reward, world

from searchr1_lib import Question, load_policy, rollout
from searchr1_lib.engines.formats import ENGINES, EXTRA, give, read, take
from searchr1_lib.environment.protocol import escape
from searchr1_lib.metrics import row_of
from searchr1_lib.records import Trajectory
from searchr1_lib.rewards import score
from searchr1_lib.study.viewer import render_html


@pytest.fixture(scope="module")
def policy():
    return load_policy("tests/data/house/model", lora=False)


@pytest.fixture(scope="module")
def trajectories(policy):
    questions, engine = world()
    made = []
    for more in ({}, {"max_completion_length": 120}, {"temperature": 3.0}):
        how = {"num_generations": 6, "generator": torch.Generator().manual_seed(0), **LIMITS, **more}
        made += rollout(policy, questions, engine, **how)
    score(reward(), made).keep(made)
    assert {t.finish_reason for t in made} >= {"answer", "turns", "length", "stop"}
    assert any(t.searches for t in made) and any(t.invalid_turns for t in made)
    return made


def tokens_of(t: Trajectory) -> tuple:
    return t.prompt_ids, t.completion_ids, t.mask, t.logprobs, t.reward


@pytest.mark.parametrize("engine", ENGINES)
def test_round_trip(engine, trajectories):
    """Through JSON text, as another process would hand it back."""
    for t in trajectories:
        assert take(engine, json.loads(json.dumps(give(engine, t)))) == t


def texts(call) -> list[tuple[str, str]]:
    return [(hit.passage.title, hit.passage.text) for hit in call.result]


def without_extras(record):
    """As an agent that is not ours would have written it."""
    if isinstance(record, list):
        return [without_extras(value) for value in record]
    if isinstance(record, dict):
        return {name: without_extras(value) for name, value in record.items() if name != EXTRA}
    return record


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_alone_are_read_with_the_tokenizer(engine, policy, trajectories):
    for t in trajectories:
        got = take(engine, without_extras(give(engine, t)), policy, t.question)
        assert tokens_of(got) == tokens_of(t)
        assert (got.segments, got.tokens, got.ends, got.turns) == (t.segments, t.tokens, t.ends, t.turns)
        # an observation that found no room left is in no token
        calls = t.calls[: sum(s.kind == "information" for s in t.segments)]
        assert [(c.tool, c.argument) for c in got.calls] == [(c.tool, c.argument) for c in calls]
        assert [texts(c) for c in got.calls] == [[tuple(map(escape, text)) for text in texts(c)] for c in calls]
        assert got.answer == t.answer and (got.finish_reason == "answer") == (t.finish_reason == "answer")


def test_what_is_read_opens_in_viewer_and_analysis(policy, trajectories):
    t = next(t for t in trajectories if t.searches and t.finish_reason == "answer")
    got = read(policy, t.question, *tokens_of(t))
    assert row_of(got) | {"seconds": t.seconds} == row_of(t)
    assert "information" in render_html([got])


def test_a_record_of_tokens_alone_needs_a_policy(trajectories):
    with pytest.raises(ValueError, match="policy= and question="):
        take("verl", without_extras(give("verl", trajectories[0])))


def test_fields_that_differ_in_length_are_refused(trajectories):
    record = give("trl", trajectories[0])
    with pytest.raises(ValueError, match="differ in length"):
        take("trl", record | {"logprobs": record["logprobs"][:-1]})


def test_calls_that_are_no_single_sequence_are_refused(trajectories):
    record = give("openenv", next(t for t in trajectories if t.searches))
    record["trace"]["turns"][1]["prompt_token_ids"][0] += 1
    with pytest.raises(ValueError, match="turn-1"):
        take("openenv", record)


def test_an_unknown_engine_is_named():
    with pytest.raises(ValueError, match="trl, verl, skyrl, openenv, verifiers, slime, got 'ray'"):
        give("ray", Trajectory(Question("q", "?", ["a"]), [], [], [], []))


def test_a_forced_beginning_survives(policy):
    """Its tokens have mask 0 in the middle of a turn."""
    questions, engine = world()
    made = rollout(policy, questions[:2], engine, num_generations=2, first_action=["search", "answer"], **LIMITS)
    made = [replace(t, reward=1.0) for t in made]
    assert any(t.forced is not None for t in made)
    for engine in ENGINES:
        assert [take(engine, give(engine, t)) for t in made] == made


def test_no_engine_is_imported():
    code = (
        "import sys, searchr1_lib.engines.formats, searchr1_lib.engines.world, searchr1_lib.engines.served\n"
        "engines = {'trl', 'accelerate', 'verl', 'ray', 'skyrl_gym', 'openenv', 'verifiers'} & set(sys.modules)\n"
        "sys.exit(str(engines) if engines else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
