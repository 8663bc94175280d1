"""How near to the optimum does the training of the profile cpu come? On the test split, over prices and seeds.

    searchr1 compare experiments/default.py --out runs/cpu/default --split test \\
        --prices 0.15 0.2 0.3 --seeds 0 1 2

"explore" is the same with a search and an answer put into each group for the first 20 steps, so that no seed gives
one of the two up before it has compared them. Shipped in experiments/results/default.
"""

from searchr1_lib import suite
from searchr1_lib.suite.profiles import read_yaml
from searchr1_lib.training.settings import Settings

profile, _ = read_yaml(suite.ROOT / "notebooks" / "profiles" / "cpu.yaml")
default = {name: value for name, value in profile.items() if name in Settings.model_fields}
methods = {"default": default, "explore": default | {"explore": 1, "explore_steps": 20}}
