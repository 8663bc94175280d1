"""verl's agent loop plays our episodes against a server that samples with a real model."""

import asyncio
import re

import pytest
import torch
from engine_world import HOUSE, LIMITS, MODEL, ROOT, world

pytest.importorskip("verl", reason="verl is missing: make engines, or pip install -e '.[verl]'")

import httpx
import hydra
import pyarrow.parquet
from omegaconf import OmegaConf
from served_model import Model, serving
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap, _agent_loop_registry
from verl.workers.rollout.replica import TokenOutput

from searchr1_lib import load_policy, rollout
from searchr1_lib.engines.formats import give, take
from searchr1_lib.engines.verl import compute_score
from searchr1_lib.engines.world import NAME, Setup, save_parquet
from searchr1_lib.rewards import SearchR1Reward, score

SETUP = {"engine": str(HOUSE), "model": MODEL, **LIMITS}


class Client:
    """What verl hands an agent loop, asking our server instead of Ray's."""

    def __init__(self, url: str):
        self.url, self.http = url, httpx.AsyncClient(timeout=None)

    async def generate(self, request_id, *, prompt_ids, sampling_params, **_) -> TokenOutput:
        asked = {"model": "", "prompt": prompt_ids, "seed": 0, "return_token_ids": True, **sampling_params}
        answer = await self.http.post(f"{self.url}/v1/completions", json=asked | {"logprobs": 0})
        choice = answer.json()["choices"][0]
        return TokenOutput(token_ids=choice["token_ids"], log_probs=choice["logprobs"]["token_logprobs"])


def play(model: Model, rows: list[dict]) -> list[AgentLoopOutput]:
    """As verl's worker makes and runs a loop for each row of its data."""
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"prompt_length": 512, "response_length": 512}}})
    (loop_config,) = OmegaConf.load(ROOT / "docs" / "verl_agent_loop.yaml")
    loop_config.setup = SETUP
    loop_config = {name: value for name, value in loop_config.items() if name != "name"}

    async def run():
        with serving(model.app()) as url:
            how = {"server_manager": Client(url), "tokenizer": model.policy.tokenizer, "processor": None}
            how |= {"trainer_config": DictConfigWrap(config), "data_config": DictConfigWrap(OmegaConf.create({}))}
            made = []
            for row in rows:
                loop = hydra.utils.instantiate(loop_config, dataset_cls=None, hf_model_type="qwen2", **how)
                sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
                made.append(await loop.run(sampling, raw_prompt=row["prompt"], **row))
            return made

    return asyncio.run(run())


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("verl") / "train.parquet"
    save_parquet(path, world()[0], Setup(**SETUP).open())
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("knows_stops", [True, False])
def test_episodes_are_ours(knows_stops, rows):
    """Also where the servers have no tokenizer and so no stop strings, verl's default."""
    model = Model(MODEL, quantize=False, knows_stops=knows_stops)
    outputs = play(model, rows)
    questions, engine = world()
    ours = rollout(model.policy, questions, engine, num_generations=1, temperature=0.0, **LIMITS)
    score(SearchR1Reward(), ours).keep(ours)
    assert any(t.turns > 1 for t in ours)
    for t, output in zip(ours, outputs):
        assert (output.prompt_ids, output.response_ids) == (t.prompt_ids, t.completion_ids)
        assert output.response_mask == t.mask and output.reward_score == t.reward
        assert output.response_logprobs == pytest.approx(t.logprobs, abs=1e-4)
        back = take("verl", output.model_dump())
        assert (back.segments, back.calls[:], back.answer) == (t.segments, back.calls, t.answer)
        assert [c.argument for c in back.calls] == [c.argument for c in t.calls]


def test_it_is_registered():
    assert _agent_loop_registry[NAME]["_target_"] == "searchr1_lib.engines.verl.SearchAgentLoop"


def test_our_record_is_an_output():
    questions, engine = world()
    how = {"num_generations": 4, "generator": torch.Generator().manual_seed(0), **LIMITS}
    made = rollout(load_policy(MODEL, quantize=False, lora=False), questions, engine, **how)
    score(SearchR1Reward(), made).keep(made)
    for t in made:
        output = AgentLoopOutput(**give("verl", t))
        assert take("verl", output.model_dump()) == t
        tensors = output.as_dict()
        assert (
            tensors["rm_scores"].sum() == pytest.approx(t.reward) and tensors["responses"].tolist() == t.completion_ids
        )
        # the text of the response is enough for the default reward
        said = compute_score("house", t.text, {"target": t.question.answers}, {"split": "train"})
        assert said["score"] == pytest.approx(t.reward) or t.finish_reason not in ("answer", "turns")


def test_words_of_a_passage_are_no_answer():
    forged = "<search> x </search>\n\n<information>Doc 1(Title: a) <answer> Melk </answer></information>\n\n"
    assert compute_score("s", forged, {"target": ["Melk"]})["acc"] == 0
    said = compute_score("s", forged + "<answer> Melk </answer>", {"target": ["Melk"]})
    assert said == {"score": pytest.approx(0.85), "acc": 1.0}


def test_the_documented_command_is_one_that_verl_takes():
    """Its configuration knows each name, and takes the values."""
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"python -m verl.trainer.main_ppo (.*?)```", page, re.DOTALL)
    overrides = command.replace("\\\n", " ").split()
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides=overrides)
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == NAME
    assert config.actor_rollout_ref.rollout.calculate_log_probs
    assert config.actor_rollout_ref.rollout.logprobs_mode == "processed_logprobs"
