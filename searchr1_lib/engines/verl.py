"""verl 0.9: our episode as an ``AgentLoop`` named "searchr1", and a ``compute_score``.

    save_parquet("runs/verl/train.parquet", questions, Setup(...).open())
    python -m verl.trainer.main_ppo ...        (docs/engines.md has the whole command; training is not run here)

The loop's reward, ids, mask and log-probabilities are ours: what is sampled is kept, nothing is encoded again. Needs
the extra ``verl``, in an environment of its own (it wants transformers < 5.11).
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register

from ..records import Question, Trajectory
from ..rewards import SearchR1Reward
from ..rewards.base import score
from ..training.decoder import Written
from ..training.rollout import _Episode
from .formats import give
from .served import ServedPolicy, until_stop
from .world import NAME, Setup, question_from, read_text


@register(NAME)
class SearchAgentLoop(AgentLoopBase):
    """Plays one episode against verl's servers.

    Args:
        setup: a ``Setup``, from the file that ``rollout.agent.agent_loop_config_path`` names.
    """

    def __init__(self, *args, setup, **kwargs):
        super().__init__(*args, **kwargs)
        told: Any = setup if isinstance(setup, dict) else OmegaConf.to_container(setup)
        self.world = Setup(**told).open()
        self.policy = ServedPolicy(self.tokenizer, self.world.how["prompt"])

    async def run(self, sampling_params: dict[str, Any], **row) -> AgentLoopOutput:
        """The episode of a row of the data; ``extra_fields["searchr1"]`` holds what ``formats.take`` puts back."""
        environment, question = self.world.environment(), question_from(row)
        environment.measure = self.policy.measure
        prompt = self.policy.chat(environment.reset(question))
        t = Trajectory(question, self.policy.encode(prompt), [], [], [], prompt=prompt)
        t.finish_reason, t.token_values["entropy"] = None, []  # type: ignore[assignment]  # it is under way
        episode = _Episode(self.policy, environment, t, list(t.prompt_ids))
        how = {**sampling_params, "stop": list(environment.stops), "include_stop_str_in_output": True}
        request, stops = uuid4().hex, [s.encode() for s in environment.stops]
        while t.finish_reason is None:
            asked = {**how, "max_tokens": max(1, episode.room)}
            output = await self.server_manager.generate(
                request_id=request, prompt_ids=list(episode.ids), sampling_params=asked
            )
            if not output.token_ids:  # the server gave up
                t.finish_reason = "length"
                break
            ids = until_stop(self.policy, output.token_ids, stops)
            logprobs = (output.log_probs or [0.0] * len(ids))[: len(ids)]
            episode.write(Written(ids, logprobs, [-x for x in logprobs], ids[-1] in self.policy.stop_ids))
            if episode.turn_is_over(text := episode.text):
                outcome = await asyncio.to_thread(environment.step, text, episode.end)
                episode.take(outcome, text)
        score(self.world.reward, [t]).keep([t])
        return AgentLoopOutput(**give("verl", t))


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None, **_) -> dict:
    """Our default reward of a response's text, for agent loops that are not ours (ours brings its reward along).

    Observations in it, between ``<information>`` and its end, count as no words of the model.

    Returns:
        "score", and "acc", the exact match.
    """
    told = {"data_source": data_source, "extra_info": extra_info, "reward_model": {"ground_truth": ground_truth}}
    question = question_from({"id": "0", "question": "?", **told})
    t = read_text(Question(question.id, question.text, question.answers), solution_str)
    said = score(SearchR1Reward(), [t])
    return {"score": said.values[0], "acc": said.parts["exact_match"][0]}
