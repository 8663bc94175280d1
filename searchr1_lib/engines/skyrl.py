"""SkyRL-gym 0.4: our episode as a ``BaseTextEnv``, registered as "searchr1" when this is imported.

    env = skyrl_gym.make("searchr1", env_config={"engine": "data/almanac", "model": "data/tiny_qwen"}, extras=row)

``extras`` is a row of ``world.save_parquet``. In SkyRL's trainer (Python 3.12, GPUs; not run here) set

    environment.env_class=searchr1
    environment.skyrl_gym.searchr1.engine=... .model=...
    generator.use_conversation_multi_turn=false                      observations go on in the same message, as ours do
    generator.sampling_params.stop='["</search>", "</answer>"]'      and include_stop_str_in_output, its default

Needs the extra ``skyrl``; torch is not loaded.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from skyrl_gym import register
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput, ConversationType

from ..environment.base import Done
from ..metrics import row_of
from .formats import EXTRA, rest
from .world import NAME, Setup, question_from


class SearchEnv(BaseTextEnv):
    """One episode.

    Args:
        env_config: a ``Setup``.
        extras: a row of the data, see ``world.question_from``.
    """

    def __init__(self, env_config: dict[str, Any] | DictConfig, extras: dict[str, Any]):
        super().__init__()
        told: Any = OmegaConf.to_container(OmegaConf.create(env_config))
        self.world = Setup(**told).open()
        self.question = question_from(extras)
        self.max_turns = self.world.limits.max_turns + 1

    def init(self, prompt: ConversationType) -> tuple[ConversationType, dict[str, Any]]:
        """Begin; the prompt is the data's own, which is our environment's."""
        self.episode = self.world.begin(self.question)
        return prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Hand over a turn; the reward comes with the last one, and with it the trajectory in ``metadata``."""
        self.turns += 1
        outcome = self.episode.step(action)
        if isinstance(outcome, Done):
            told = {EXTRA: rest(self.episode.t)}
            reward = self.world.reward_of(self.episode)
            return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata=told)
        shown = [{"role": "user", "content": outcome.text}]
        return BaseTextEnvStepOutput(observations=shown, reward=0.0, done=False, metadata={"kind": outcome.kind})

    def get_metrics(self) -> dict[str, float]:
        row = row_of(self.episode.t)
        return {name: float(row[name]) for name in ("em", "f1", "searches", "malformed")}


register(id=NAME, entry_point=f"{__name__}:SearchEnv")
