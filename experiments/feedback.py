"""What is a reward worth that was learned from choices? 32 and 512 labels, a biased labeller, and the truth itself.

    python experiments/feedback.py --out runs/cpu/feedback --seeds 0 1 2

The labeller is scripted: it cannot check an answer, but judges how well founded it is, and errs where two rollouts are
nearly as good. The biased one also likes what is long, so much that a search is worth more than its price. With each
seed come other labels and another training; half the steps of the default one. What ships stands in
experiments/results/feedback and is of the former world; told.json has by step what the labeller itself would have said,
had it been asked, and some of what it was told.
"""

import argparse
import random
from pathlib import Path
from statistics import fmean

import torch

from searchr1_lib.files import TrajectoryLog, write_json
from searchr1_lib.metrics import grouped
from searchr1_lib.rewards import Composite, PreferenceReward
from searchr1_lib.rewards.process import Malformed
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.compare import LIMITS, MODEL, Method, compare, examine
from searchr1_lib.study.feedback import Scripted, WellFounded, choose_pairs, pairs_of
from searchr1_lib.study.regret import Yardstick, skill_of
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.rollout import rollout
from searchr1_lib.worlds.almanac import PRICE, UNKNOWN_PAYS, build_world, sample_questions

SHORT = {"scale_rewards": "batch", "steps": 30, "decay_steps": 15}
NOISE, LONGER = 0.05, {"model_tokens": 0.5}
PHRASES = ("it says", "not here", "I recall nothing", "unknown")  # what the tiny Qwen was taught to say
GUARD = {"beta": 0.05}  # of the KL to the base model


def labelled(seed):
    """512 pairs of rollouts of the untrained policy."""
    world = build_world(0)
    policy, engine = load_policy(MODEL, seed=seed, device="cpu"), BM25Search(world.passages)
    asked, generator = sample_questions(world, "train", 200, seed=seed), torch.Generator().manual_seed(seed)
    pairs = pairs_of(rollout(policy, asked, engine, num_generations=4, generator=generator, **LIMITS))
    return choose_pairs(pairs, 512, random.Random(seed))


def learned(choices):
    """Form is no matter of taste: the choices say little of it."""
    return Composite([(1.0, PreferenceReward(choices)), (1.0, Malformed())], name="learned")


def labeller(name, seed=0):
    """Whose choices the method of this name learned from."""
    return Scripted(WellFounded(), noise=NOISE, bias=LONGER if name in ("biased", "guarded") else {}, seed=seed)


def methods(seed):
    pairs = labelled(seed)
    honest, biased = labeller("honest", seed)(pairs), labeller("biased", seed)(pairs)
    return {
        "truth": Method(SHORT | {"credit": "rollout"}),  # the very training that experiments/credit.py calls outcome
        "labels_32": Method(SHORT, reward=learned(honest[:32])),
        "labels_512": Method(SHORT, reward=learned(honest)),
        "biased": Method(SHORT, reward=learned(biased)),
        "guarded": Method(SHORT | GUARD, reward=learned(biased)),
    }


def told(training):
    """Of each step: what its rollouts' own labeller thinks, errors apart; what an honest one would; what they hold."""
    own, honest = (labeller(name).worth for name in (training.name.partition("-")[0], "honest"))
    steps = grouped(TrajectoryLog(training / "trajectories.jsonl"), lambda t: t.step)
    rows = [
        {"opinion": fmean(own(made)), "well_founded": fmean(honest(made))}
        | {"searches": fmean(len(t.searches) for t in made), "tokens": fmean(sum(t.mask) for t in made)}
        | {said: fmean(said in t.model_text for t in made) for said in PHRASES}
        for _, made in sorted(steps.items())
    ]
    return [{name: round(value, 4) for name, value in row.items()} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--methods", nargs="+", help="only these (default: all)")
    args = parser.parse_args()
    start = Path(args.out) / "start.json"
    if not start.exists():  # what all of them began as
        world, how = build_world(0), {"split": "validation", "questions": args.questions, "rollouts": 2}
        yardstick = Yardstick(world, skill_of(MODEL), PRICE, UNKNOWN_PAYS)
        done = examine(load_policy(MODEL, device="cpu"), BM25Search(world.passages), yardstick, how)
        write_json(start, how | {"reward": fmean(t.reward for t in done)})
    for seed in args.seeds:
        given = {"out": args.out, "questions": args.questions, "jobs": args.jobs}
        chosen = {name: method for name, method in methods(seed).items() if name in (args.methods or [name])}
        done = compare(chosen, prices=[PRICE], seeds=[seed], **given)
        for row in done.rows:
            print(f"{row['method']:12} seed {seed}  reward {row['reward']:.3f}  regret {row['regret']:.3f}")
    trainings = sorted((Path(args.out) / "trainings").glob("*-*"))
    write_json(Path(args.out) / "told.json", {training.name: told(training) for training in trainings})
