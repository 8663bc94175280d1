"""Does it help to train on groups of earlier steps again? Equal rollouts, against the training without.

    searchr1 compare experiments/replay.py --out runs/cpu/replay --prices 0.3 --seeds 0 1 2 --questions 400

Half the steps of the default training, as experiments/credit.py has them; its "outcome" is the training without. In
each step so many groups of the last four steps are trained again beside the sixteen new ones, those with large
advantages more often, with the log-probabilities that were recorded when they were sampled. 64 are all that there is of
those steps; ``replay_16_old`` draws its sixteen from all steps so far.
"""

SHORT = {"scale_rewards": "batch", "steps": 30, "decay_steps": 15, "questions_per_step": 16, "num_generations": 8}
methods = {f"replay_{groups}": SHORT | {"replay_groups": groups} for groups in (4, 16, 64)}
methods["replay_16_old"] = methods["replay_16"] | {"replay_max_age": SHORT["steps"]}
