"""verifiers 0.4 (its ``v1``): our questions as a ``Taskset``, our episode as the ``Harness`` that plays them.

    uv run eval searchr1_verifiers --env.agent.harness.id searchr1_verifiers --env.agent.runtime.type subprocess \\
        --env.taskset.questions data/almanac/test.jsonl --env.taskset.world '{"engine": "data/almanac"}'

(``searchr1_verifiers`` is this module under a name that its loader can find.) The harness plays in its own process and
asks the run's endpoint for each turn. An observation is a user's message there, so a chat template stands around it:
episodes are ours in text, not in tokens. Needs the extra ``verifiers``, in an environment without OpenEnv.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import httpx
import verifiers.v1 as vf

from ..data import load_questions
from ..environment.base import Done
from ..records import Question, Trajectory
from ..rewards.base import checked
from .formats import EXTRA, rest
from .world import Setup

__all__ = ["SearchHarness", "SearchTaskset"]


class SearchData(vf.TaskData):
    """A question, and the world that it is asked in (a ``Setup``)."""

    question: dict[str, Any]
    world: dict[str, Any]


class SearchTask(vf.Task[SearchData]):
    """A question; its reward is the world's, on the trajectory that the harness left in the trace."""

    @vf.reward
    async def earned(self, trace: vf.Trace) -> float:
        t = Trajectory.from_dict(trace.info[EXTRA] | _NO_TOKENS)
        return checked(Setup(**self.data.world).open().reward, [t])[0]


_NO_TOKENS: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "mask": [], "logprobs": []}


class SearchConfig(vf.TasksetConfig):
    questions: str = ""
    """a file that ``load_questions`` reads"""
    world: dict[str, Any] = {}
    """a ``Setup``"""


class SearchTaskset(vf.Taskset[SearchTask, SearchConfig]):
    """The questions of a file."""

    def load(self) -> Iterator[SearchTask]:
        for q in load_questions(self.config.questions):
            data = SearchData(id=q.id, prompt=q.text, question=asdict(q), world=self.config.world)
            yield SearchTask(data, self.config.task)


class SearchHarness(vf.Harness[vf.HarnessConfig]):
    """Plays our episode against the endpoint; stop strings and the room of a turn go along with each request."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx, trace: vf.Trace, runtime, endpoint: str, secret: str, mcp_urls: dict[str, str], data: SearchData
    ) -> vf.ProgramResult:
        world = Setup(**data.world).open()
        episode = world.begin(Question(**data.question))
        messages = [{"role": "user", "content": episode.prompt}]
        how = {"model": ctx.model, "stop": list(episode.environment.stops), "include_stop_str_in_output": True}
        how |= {"max_tokens": world.limits.max_turn_tokens}
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {secret}"}, timeout=None) as client:
            while True:
                answer = await client.post(f"{endpoint}/chat/completions", json={**how, "messages": messages})
                answer.raise_for_status()
                text = answer.json()["choices"][0]["message"]["content"] or ""
                outcome = await asyncio.to_thread(episode.step, text)
                if isinstance(outcome, Done):
                    break
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": outcome.text}]
        trace.info[EXTRA] = rest(episode.t)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
