"""The default training, but grown on trees (Tree-GRPO) of the same number of rollouts, so of two thirds of the tokens.

searchr1 compare experiments/trees.py --out runs/cpu/default --split test --questions 400 --prices 0.2 --seeds 1 2
"""

methods = {"trees": {"scale_rewards": "batch", "credit": "tree_grpo", "trees": 2}}
