"""OpenEnv 0.10: our episode as an ``Environment``, and its HTTP app.

    app = make_app(Setup(engine="data/almanac", model="data/tiny_qwen").open(), load_questions("…/train.jsonl"))
    uvicorn.run(app)

An action is a turn of the model, its stop string included; the last observation holds the reward and the trajectory.
Needs the extra ``openenv``, in an environment without verifiers: each breaks the other there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal
from uuid import uuid4

from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field

from ..environment.base import Done
from ..records import Question
from .formats import EXTRA, rest
from .world import NAME, World


class SearchAction(Action):
    """A turn of the model."""

    text: str = Field(description="all that the model wrote in its turn, with the stop string that ended it")
    end: Literal["stop", "length"] | None = Field(
        default=None, description="'stop' where the model ended its message, 'length' where its tokens are used up"
    )


class SearchObservation(Observation):
    """What is to be put behind the turn, as it is."""

    text: str = ""
    kind: str = Field(default="prompt", description="prompt, information, invalid; or why the episode is over")


class SearchState(State):
    """Where the episode stands."""

    question: str = ""
    searches: int = 0


class SearchR1(Environment[SearchAction, SearchObservation, SearchState]):
    """A session, one episode after another.

    Args:
        world: see ``World``; shared by all sessions.
        questions: what is asked.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, world: World, questions: Sequence[Question]):
        super().__init__()
        self.world, self.questions = world, questions
        self.reset(seed=0)

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, index: int | None = None, **_: Any
    ) -> SearchObservation:
        """Begin an episode; its prompt.

        Args:
            seed: of the choice of a question.
            index: the number of the question, instead of a choice.
        """
        chosen = random.Random(seed).randrange(len(self.questions)) if index is None else index
        self.episode = self.world.begin(self.questions[chosen])
        self.name, self.steps = episode_id or str(uuid4()), 0
        return SearchObservation(text=self.episode.prompt)

    def step(self, action: SearchAction, timeout_s: float | None = None, **_: Any) -> SearchObservation:
        """Hand over a turn. A search has our own time limit (``Limits.search_timeout``), not ``timeout_s``."""
        self.steps += 1
        outcome = self.episode.step(action.text, action.end)
        if not isinstance(outcome, Done):
            return SearchObservation(text=outcome.text, kind=outcome.kind)
        told = {"done": True, "reward": self.world.reward_of(self.episode), "metadata": {EXTRA: rest(self.episode.t)}}
        return SearchObservation(kind=outcome.reason, **told)

    @property
    def state(self) -> SearchState:
        t = self.episode.t
        told = {"question": t.question.text, "searches": len(t.searches)}
        return SearchState(episode_id=self.name, step_count=self.steps, **told)


def make_app(world: World, questions: Sequence[Question], sessions: int = 64):
    """The FastAPI application; ``sessions`` episodes may be under way at once."""
    make = lambda: SearchR1(world, questions)
    how = {"env_name": NAME, "max_concurrent_envs": sessions, "state_cls": SearchState}
    return create_app(make, SearchAction, SearchObservation, **how)
