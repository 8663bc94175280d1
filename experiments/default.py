"""How near to the optimum does the training of the profile cpu come? On the test split, over prices and seeds.

    searchr1 compare experiments/default.py --out runs/cpu/default --split test --questions 400 \\
        --prices 0.15 0.3 0.5 --seeds 0 1 2

"plain" is the same without the pairs, a search and an answer in each group that count as often as the policy would
choose them. What is made of it goes to experiments/results/default.
"""

from searchr1_lib import suite
from searchr1_lib.suite.profiles import read_yaml
from searchr1_lib.training.settings import Settings

profile, _ = read_yaml(suite.ROOT / "notebooks" / "profiles" / "cpu.yaml")
default = {name: value for name, value in profile.items() if name in Settings.model_fields}
methods = {"default": default, "plain": default | {"pairs": 0}}
