"""Two adapters, one that decides and one that asks, against one of twice the rank: equal parameters, rollouts, seeds.

    searchr1 compare experiments/two.py --out runs/cpu/two --prices 0.3 --seeds 0 1 2 --questions 400

Half the steps of the default training, as experiments/credit.py has them. Notebook 10 reads what this leaves, or what
ships in experiments/results/two (of the former world).
"""

from searchr1_lib.rewards import InformationGain
from searchr1_lib.study.compare import Method

SHORT = {"scale_rewards": "batch", "steps": 30, "decay_steps": 15}
HALVES = {"adapters": ("reason", "search"), "lora_r": 8, "lora_alpha": 16}  # one adapter has 16 and 32

methods = {
    "one": SHORT | {"credit": "rollout"},  # the very training that experiments/credit.py calls outcome
    "two": Method(SHORT, policy=HALVES),
    "two_apart": Method(SHORT | {"per_author": True}, policy=HALVES),
    # it alone is told which passages a question needs
    "two_found": Method(
        SHORT | {"per_author": True}, policy=HALVES, author_rewards={"search": InformationGain()}, gold_passages=True
    ),
}
