"""A coordinator and a researcher against one agent, at nearly equal tokens: its rollouts take about twice as many.

    searchr1 compare experiments/team.py --out runs/cpu/team --prices 0.3 --seeds 0 1 2 --questions 400

Half the steps of the default training. A search of the coordinator asks the researcher, who is made to begin with a
search; what is paid for are the searches of the index. Notebook 10 reads what this leaves, or what ships in
experiments/results/team (of the former world).
"""

from searchr1_lib.study.compare import LIMITS, Method
from searchr1_lib.training.researcher import ResearcherEngine
from searchr1_lib.worlds.almanac import question_for

SHORT = {"scale_rewards": "batch", "steps": 30, "decay_steps": 15}
TEAM = SHORT | {"questions_per_step": 16, "train_colleagues": True}
BUDGET = LIMITS | {"max_turns": 2}


def same(policy, engine):
    """The researcher is the coordinator's own weights, with another question."""
    return ResearcherEngine(policy, engine, question_of=question_for, first_action="search", **BUDGET)


def apart(policy, engine):
    """The researcher has an adapter of its own."""
    return same(policy.alone("researcher"), engine)


HALVES = {"adapters": ("coordinator", "researcher"), "lora_r": 8, "lora_alpha": 16}  # one adapter has 16 and 32
methods = {
    "one": SHORT | {"credit": "rollout"},  # the very training that experiments/credit.py calls outcome
    "team": Method(TEAM, engine=same),
    "team_apart": Method(TEAM, engine=apart, policy=HALVES),
}
