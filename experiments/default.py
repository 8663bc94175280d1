"""How near to the optimum does the training of the profile cpu come? On the test split, over prices and seeds.

    searchr1 compare experiments/default.py --out runs/cpu/default --split test \\
        --prices 0.15 0.2 0.3 --seeds 0 1 2

"explore" is the same with a search and an answer put into each group for the first 20 steps, so that no seed gives
one of the two up before it has compared them. In "decided" the token that decides, `<search` or `<answer`, has eight
times the advantage of the others: how to ask and to read is learned as well, but more slowly. Shipped in
experiments/results/default, and "decided" in experiments/results/default_tried.
"""

import torch

from searchr1_lib import group_advantages, suite
from searchr1_lib.study.compare import Method
from searchr1_lib.suite.profiles import read_yaml
from searchr1_lib.training.settings import Settings

WEIGHT = 8


def at_decisions(trajectories, num_generations):
    """The batch's advantages, those of deciding tokens times ``WEIGHT``."""
    rewards = torch.tensor([t.reward for t in trajectories])
    rows = []
    for t, a in zip(trajectories, group_advantages(rewards, num_generations, scale_rewards="batch").tolist()):
        decide = {s.start for s in t.segments if s.by_model and s.kind in ("search", "answer")}
        rows.append([a * WEIGHT if i in decide else a for i in range(len(t.mask))])
    return rows


profile, _ = read_yaml(suite.ROOT / "notebooks" / "profiles" / "cpu.yaml")
default = {name: value for name, value in profile.items() if name in Settings.model_fields}
methods = {"default": default, "explore": default | {"explore": 1, "explore_steps": 20}}
methods["decided"] = Method(default, credit=at_decisions)
