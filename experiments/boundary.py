"""How sure must one be to answer without searching? Where each way of learning puts its boundary, on one-hop questions.

    searchr1 compare experiments/boundary.py --out runs/cpu/boundary --methods group batch \\
        --prices 0.05 0.15 0.3 0.5 0.7 --seeds 0 1 2
    searchr1 compare experiments/boundary.py --out runs/cpu/boundary --methods none ppo best right \\
        --prices 0.15 0.5 --seeds 0 1 2

Nothing is told to explore: what a policy has given up it cannot take up again. Each result keeps the share that
searches at each level, and the course. What ships in experiments/results/boundary is of the former tiny Qwen and
world: one seed, the first two methods, 40 steps of 16 questions with 8 rollouts.
"""

from searchr1_lib.study.compare import Method

mixture = {"1-hop": 1.0}

GRPO = {"steps": 30, "decay_steps": 10}


def best_of_group(rewards, num_generations):
    """Imitate the first of the best of each group, as rejection sampling does, on the policy's own new rollouts."""
    import torch

    groups = rewards.view(-1, num_generations)
    chosen = torch.nn.functional.one_hot(groups.argmax(1), num_generations) * (groups > 0)
    return chosen.flatten().float()


def all_right(rewards, num_generations):
    """Imitate every rollout that earned something."""
    return (rewards > 0).float()


methods = {
    "group": GRPO | {"scale_rewards": "group"},
    "batch": GRPO | {"scale_rewards": "batch"},
    "none": GRPO | {"scale_rewards": "none"},
    "ppo": GRPO | {"baseline": "value", "scale_rewards": "batch"},
    "best": Method(GRPO, advantages=best_of_group),
    "right": Method(GRPO, advantages=all_right),
}
