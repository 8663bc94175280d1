"""Episodes in text alone, for engines that keep the tokens to themselves, and our questions as their Parquet.

    world = Setup(engine="data/almanac", model="data/tiny_qwen").open()
    episode = world.begin(question)             # episode.prompt goes into a user message
    episode.step("<search> Ada born </search>")  # an Observation, to be put behind the turn as it is; at the end, Done
    world.reward_of(episode)

The other engine must end a turn at a stop string (``episode.environment.stops``) and keep it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from ..data import question_of
from ..environment import protocol
from ..environment.base import Done, Environment, Observation
from ..environment.limits import Limits
from ..environment.search import SearchEnvironment, tools_of
from ..records import ENVIRONMENT, Question, Segment, Trajectory
from .formats import Nothing

_INVALID = protocol.INVALID_ACTION
_OBSERVATION = rf"\n*<information>.*?</information>\n*|{re.escape(_INVALID)}"
#: The name under which our agent loop and our environment are registered in other engines.
NAME = "searchr1"


class Setup(Limits):
    """What a process of another engine has to be told, in its own configuration, to play our episodes."""

    engine: str
    """an index's folder, or a retrieval server's address: see ``study.evaluate.open_engine``"""
    model: str = ""
    """the model's folder or name: its tokenizer measures observations and its prompt is asked; "": our full prompt, and
    observations measured in characters"""
    reward: Any = "SearchR1Reward"
    """as ``rewards.byname.build`` takes it"""

    def open(self) -> World:
        """The world, loaded once a process."""
        return _open(self.model_dump_json())


@cache
def _open(setup: str) -> World:
    from ..rewards.byname import build
    from ..study.evaluate import open_engine

    s = Setup.model_validate_json(setup)
    how: dict[str, Any] = {}
    if s.model:
        from .served import ServedPolicy

        policy = ServedPolicy.load(s.model)
        how = {"measure": policy.measure, "prompt": policy.prompt}
    return World(open_engine(s.engine), build(s.reward), **how, **s.limits())


class World:
    """Makes episodes.

    Args:
        engine: what searches, see ``rollout``.
        reward: a reward on trajectories, by default ``SearchR1Reward()``.
        measure, prompt: see ``Environment``.
        **limits: see ``Limits``.
    """

    def __init__(self, engine, reward=None, *, measure=len, prompt: str = "", **limits):
        from ..rewards import SearchR1Reward

        self.tools, self.limits, self.reward = tools_of(engine), Limits(**limits), reward or SearchR1Reward()
        self.how = {"measure": measure, "prompt": prompt}

    def environment(self) -> Environment:
        return SearchEnvironment(tools=self.tools, limits=self.limits, **self.how)

    def begin(self, question: Question) -> Episode:
        return Episode(self.environment(), question)

    def reward_of(self, episode: Episode) -> float:
        """What an episode that is over earned.

        Raises:
            RewardError: see ``rewards.base.checked``. One that compares a group (OTC) sees a group of one.
        """
        from ..rewards.base import checked

        return checked(self.reward, [episode.t])[0]


class Episode:
    """An episode whose tokens nobody tells us: ``t`` is its trajectory, in text.

    Attributes:
        prompt: of the user.
        t: segments, calls, turns, answer; no ids, mask or log-probabilities.
    """

    def __init__(self, environment: Environment, question: Question):
        self.environment, self.prompt = environment, environment.reset(question)
        self.t = Trajectory(question, [], [], [], [], prompt=self.prompt, finish_reason="length")

    def step(self, text: str, end: str | None = None) -> Observation | Done:
        """Hand over a turn of the model; see ``Environment.act`` for ``end``, which not every engine can tell."""
        t, world = self.t, self.environment
        outcome, turn = world.step(text, end), t.turns
        t.segments += [Segment("policy", kind, text[a:b], turn, 0, 0) for kind, a, b in world.parts(text)]
        t.calls, t.turns, t.invalid_turns = world.calls, world.turn, world.invalid_turns
        if isinstance(outcome, Observation):
            t.segments.append(Segment(ENVIRONMENT, outcome.kind, outcome.text, turn, 0, 0))
        else:
            t.answer, t.finish_reason = outcome.answer, outcome.reason
        return outcome


def read_text(question: Question, completion: str) -> Trajectory:
    """The trajectory of a completion's text alone; what stands in ``<information>`` tags is the environment's.

    No search is carried out: the calls of tools have no results.
    """
    turns = len(re.findall(_OBSERVATION, completion, re.DOTALL)) + 1
    episode = World(Nothing(), max_turns=turns).begin(question)
    for turn, observation in re.findall(f"(.*?)({_OBSERVATION}|\\Z)", completion, re.DOTALL):
        if turn:
            episode.step(turn, None if observation else "stop")
    return episode.t


def save_parquet(path: str | os.PathLike, questions: Sequence[Question], world: World, split: str = "train") -> None:
    """Write questions in the layout of Search-R1, verl and SkyRL: one file for all of them.

    ``data_source, prompt[{role, content}], ability, reward_model{style, ground_truth{target}}, extra_info{split,
    index, question}``, and beside them who plays: verl's ``agent_name``, and SkyRL's ``env_class`` and
    ``reward_spec``. The whole question stands in ``extra_info.question``; ``load_questions`` reads the file too.
    """
    import pyarrow
    import pyarrow.parquet

    rows = []
    for index, q in enumerate(questions):
        truth = {"style": "rule", "ground_truth": {"target": q.answers}}
        skyrl = {"env_class": NAME, "reward_spec": {"method": "rule", "ground_truth": {"target": q.answers}}}
        prompt = [{"role": "user", "content": world.environment().reset(q)}]
        told = {"id": q.id, "question": q.text, "data_source": q.source or NAME, "prompt": prompt, "ability": "search"}
        extra = {"split": split, "index": index, "question": asdict(q)}
        rows.append({**told, "reward_model": truth, "extra_info": extra, "agent_name": NAME, **skyrl})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def question_from(row: dict[str, Any]) -> Question:
    """The question of a row of such a file: our own, or another one's of this layout.

    Raises:
        ValueError: a field is missing; says which.
    """
    ours = (row.get("extra_info") or {}).get("question")
    return question_of({name: _plain(value) for name, value in (ours or row).items()})


def _plain(value: Any) -> Any:
    """numpy arrays, which pandas makes of lists, as lists again."""
    return value.tolist() if hasattr(value, "tolist") else value
