"""The training "plain" of experiments/default.py, but grown on trees (Tree-GRPO) of the same number of rollouts.

searchr1 compare experiments/trees.py --out runs/cpu/default --split test --questions 400 --prices 0.3 --seeds 1 2
"""

methods = {"trees": {"scale_rewards": "batch", "credit": "tree_grpo", "trees": 2, "steps": 60, "decay_steps": 30}}
