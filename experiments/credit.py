"""Does credit by turn teach faster than the outcome? Equal rollouts, choice regret against the optimum.

    searchr1 compare experiments/credit.py --out runs/cpu/credit --prices 0.3 --seeds 0 1 2 3 4 --questions 400

Half the steps of the default training: what is asked is who learns *faster*.

Notebook 09 reads what this leaves: the *.json in the folder credit of its run, or as they ship, in
experiments/results/credit (of the former world). (The trainings/ beside them hold every rollout: gigabytes.)
"""

from dataclasses import replace

from searchr1_lib.rewards import Composite, Discounted, InformationGain
from searchr1_lib.rewards.process import Format
from searchr1_lib.study.compare import Method
from searchr1_lib.worlds.almanac import PRICE, UNKNOWN_PAYS

#: One reward for the whole, as all others have it, one for each hop found, one for form (``HierarchicalReward``).
HIERARCHICAL = Composite([(1.0, Discounted(PRICE, UNKNOWN_PAYS)), (0.3, InformationGain()), (0.1, Format())])

METHODS = {
    "outcome": {"credit": "rollout"},
    "return": {"credit": "return"},
    "gigpo": {"credit": "gigpo"},
    "gigpo_shuffled": {"credit": "gigpo", "shuffle_credit": True},  # a control: the same numbers, dealt out at random
    "igpo": {"credit": "igpo"},
    "tree_grpo": {"credit": "tree_grpo", "trees": 2},
    "tree_grpo_shuffled": {"credit": "tree_grpo", "trees": 2, "shuffle_credit": True},
    "hierarchical": {"credit": "return"},
}
SHORT = {"scale_rewards": "batch", "steps": 30, "decay_steps": 15}
methods = {name: Method(SHORT | settings) for name, settings in METHODS.items()}
# the only one that is told which passages a question needs
methods["hierarchical"] = replace(methods["hierarchical"], reward=HIERARCHICAL, gold_passages=True)
