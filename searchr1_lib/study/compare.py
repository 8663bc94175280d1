"""Ideas about search agents against one another and against the best that is possible, in minutes.

    mine = lambda rewards, num_generations: rewards - rewards.mean()
    compare({"mine": mine, "grpo": {}}, prices=[0.3], seeds=range(5))

Each method is trained on the almanac at each price with each seed, and evaluated on questions of another
split: how much worse its choices are than those of the optimum (choice regret), how far its reward is below V*. One
training takes a core for a few minutes; what is done is kept and not done again.

    searchr1 compare mine.py --out runs/mine --prices 0.15 0.3 --seeds 0 1 2

The file holds a dict ``methods``, as above, and maybe a ``mixture``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from ..environment.limits import Count, Share, Whole, check
from ..files import read_json, write_json
from ..records import Question, Trajectory
from ..rewards import score
from ..worlds.almanac import PRICE, UNKNOWN_PAYS, USUAL, World, build_world, sample_questions
from ..worlds.optimum import Notes
from .analysis import interval
from .evaluate import hashes
from .regret import Yardstick, by_level, by_own_skill, queries, simple_policies, skill_of, table

MODEL = "data/tiny_qwen"
#: How many questions a training draws from.
TRAINED_ON = 1200
#: At which those in experiments/results were trained that are older than the almanac's version 3.
FORMER_PRICE = 0.2
#: What every method trains with unless it says otherwise.
LIMITS: dict[str, Any] = {"topk": 3, "max_turns": 4, "max_turn_tokens": 110, "max_completion_length": 1100}
SETTINGS: dict[str, Any] = {
    "steps": 40,
    "questions_per_step": 32,
    "num_generations": 4,
    "learning_rate": 3e-3,
    "decay_steps": 20,
    "kl_every": 0,
    "checkpoint_every": 1000,
}


@dataclass(frozen=True)
class Method:
    """An idea: what it changes of the training.

    Args:
        settings: of ``training.settings.Settings``.
        advantages: ``f(rewards (B,), num_generations) -> (B,)``, the rollouts of a question next to each other.
        credit: ``f(trajectories, num_generations) -> B rows``, an advantage for each token of each completion.
        reward: a reward to train with; evaluated is always ``Discounted`` at the price.
        policy: how the model is loaded, arguments of ``load_policy`` such as ``lora_r`` or ``adapters``.
        author_rewards: of single authors of a policy, see ``Trainer``.
        engine: ``f(policy, engine) -> engine``: what searches in the engine's place, such as a ``ResearcherEngine``, in
            training and after it.
        notes: those that ``engine`` lets the policy ask: the optimum asks them too, and their price is part of the
            reward that is evaluated.
        gold_passages: the training is told which passages a question needs, as ``HierarchicalReward`` and the credits
            "stepsearch" and "potential" ask for. The others learn from answers alone: say so where they are compared.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    advantages: Callable | None = None
    credit: Callable | None = None
    reward: Callable | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    author_rewards: Mapping[str, Callable] = field(default_factory=dict)
    engine: Callable | None = None
    notes: Notes | None = None
    gold_passages: bool = False

    def by_token(self) -> Callable[[Sequence[Trajectory], int], list[list[float]]] | None:
        """The advantages as ``Learner`` takes them."""
        advantages = self.advantages
        if self.credit or not advantages:
            return self.credit
        import torch

        def spread(trajectories, num_generations):
            rewards = torch.tensor([t.reward for t in trajectories])
            each = [float(a) for a in advantages(rewards, num_generations)]
            if len(each) != len(trajectories):
                raise ValueError(f"advantages gave {len(each)} values for {len(trajectories)} rewards")
            return [[a] * len(t.mask) for a, t in zip(each, trajectories)]

        return spread


@dataclass(frozen=True)
class Comparison:
    """What came out: rows of method, price, seed, regret, reward, best (V*); for each of them its ``course``."""

    rows: list[dict[str, Any]]
    simple: dict[float, dict[str, float]]
    courses: list[list[dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]], simple: Mapping[float, dict[str, float]] = {}) -> Comparison:
        """Of results as they were written, whatever made them."""
        return cls([one["row"] for one in results], dict(simple), [one["course"] for one in results])

    def table(self, figure: str = "regret") -> list[dict[str, Any]]:
        """Mean and 95 % interval over the seeds, of each method at each price."""
        return [_cell(*place, self._values(*place, figure)) for place in self._places()]

    def differences(self, base: str, figure: str = "regret") -> list[dict[str, Any]]:
        """How much more each other method has than ``base``, paired by seed.

        Raises:
            ValueError: no method of that name.
        """
        names = list(dict.fromkeys(r["method"] for r in self.rows))
        if base not in names:
            raise ValueError(f"no method is named {base!r}; there are {', '.join(names)}")
        cells = []
        for method, price in self._places():
            if method != base:
                pairs = zip(self._values(method, price, figure), self._values(base, price, figure), strict=True)
                cells.append(_cell(method, price, [a - b for a, b in pairs]))
        return cells

    def _places(self) -> list[tuple[str, float]]:
        return list(dict.fromkeys((r["method"], r["price"]) for r in self.rows))

    def _values(self, method: str, price: float, figure: str) -> list[float]:
        return [r[figure] for r in self.rows if (r["method"], r["price"]) == (method, price)]

    def plot(self):
        """Regret against the price, see ``plots.regrets``."""
        from . import plots

        return plots.regrets(self.table(), self.simple)


def _cell(method: str, price: float, values: Sequence[float]) -> dict[str, Any]:
    low, high = interval(values)
    return {"method": method, "price": price, "mean": fmean(values), "low": low, "high": high}


def compare(
    methods: Mapping[str, Any],
    *,
    prices: Sequence[float] = (0.15, 0.3, 0.5),
    seeds: Sequence[int] = (0, 1, 2),
    out: str | os.PathLike = "runs/compare",
    split: str = "validation",
    questions: int = 800,
    rollouts: int = 2,
    mixture: Mapping[str, float] | None = None,
    model: str = MODEL,
    jobs: int | None = None,
) -> Comparison:
    """Train and evaluate every method at every price with every seed.

    Args:
        methods: name -> ``Method``, settings of a training (a dict), or an advantage function.
        out: where each run keeps its result. One that stands there under the same name, of the same content, is not
            made again; one of other content is an error.
        split: whose questions are evaluated; training has those of "train".
        questions, rollouts: how many of them, and rollouts each at temperature 1.
        mixture: of the kinds of questions, in training and after it; None: as the almanac's splits have them.
        jobs: trainings at a time, one core each; None: as many as there are cores.

    Raises:
        ValueError: a method that is none of the three, a setting, price or seed that cannot be, or ``out`` holds other
            results; all is checked before anything is trained.
        RuntimeError: a training failed; says which, and what it printed stands above.
    """
    check(questions=(questions, Count), rollouts=(rollouts, Count), jobs=(jobs, Count | None))
    for name, values, kind in (("prices", prices, Share), ("seeds", seeds, Whole)):
        check(**{f"{name}[{i}]": (value, kind) for i, value in enumerate(values)})
    ideas = {name: _method(name, given) for name, given in methods.items()}
    skill = skill_of(model)
    how = {"split": split, "questions": questions, "rollouts": rollouts, "model": str(model), "weights": hashes(model)}
    how |= {"mixture": dict(mixture)} if mixture else {}
    world = build_world(0)
    asked = [q.id for q in _asked(world, split, questions, how)]
    _asked(world, "train", TRAINED_ON, how)
    runs = [
        _Run(name, method, price, seed, Path(out), how)
        for name, method in ideas.items()
        for price in prices
        for seed in seeds
    ]
    left = [run for run in runs if not run.done()]
    _in_processes([run.make for run in left], [run.label for run in left], jobs or os.cpu_count() or 1)
    made = [read_json(run.file) for run in runs]
    simple = {price: simple_policies(Yardstick(world, skill, price, UNKNOWN_PAYS), asked) for price in prices}
    return Comparison.of(made, simple)


def _asked(world: World, split: str, count: int, how: Mapping[str, Any], seed: int = 0) -> list[Question]:
    return sample_questions(world, split, count, seed=seed, mixture=how.get("mixture", USUAL[split]))


def blanked(question: Question, *, passages: bool = False) -> Question:
    """What a training may know of a question: nothing but its text and its answers, and the gold ``passages`` if so."""
    return Question(question.id, question.text, question.answers, passages=question.passages if passages else ())


def _method(name: str, given: Any) -> Method:
    from ..training.settings import Settings

    method = given if isinstance(given, Method) else None
    if isinstance(given, Mapping):
        method = Method(settings=given)
    elif method is None and callable(given):
        method = Method(advantages=given)
    if method is None:
        raise ValueError(f"{name}: expected a Method, settings or an advantage function, got {type(given).__name__}")
    try:
        Settings(**SETTINGS | LIMITS | dict(method.settings))
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    return method


@dataclass(frozen=True)
class _Run:
    name: str
    method: Method
    price: float
    seed: int
    out: Path
    how: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name}, price {self.price}, seed {self.seed}"

    @property
    def file(self) -> Path:
        return self.out / f"{self.name}-{self.price}-{self.seed}.json"

    def made_of(self) -> dict[str, Any]:
        from ..training.identity import identity

        settings = SETTINGS | LIMITS | dict(self.method.settings)
        parts = {part: identity(getattr(self.method, part)) for part in ("advantages", "credit", "reward")}
        told: dict[str, Any] = {"gold_passages": True} if self.method.gold_passages else {}
        told |= {"engine": identity(self.method.engine)} if self.method.engine else {}
        told |= {"notes": asdict(self.method.notes)} if self.method.notes else {}
        told |= {"policy": json.loads(json.dumps(dict(self.method.policy)))} if self.method.policy else {}  # no tuples
        own = {f"author_rewards/{author}": identity(reward) for author, reward in self.method.author_rewards.items()}
        return dict(self.how) | {"settings": settings} | parts | told | own

    def done(self) -> bool:
        if not self.file.exists():
            return False
        there, here = read_json(self.file)["made_of"], self.made_of()
        if there != here:
            differ = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
            raise ValueError(f"{self.file} was made otherwise ({', '.join(differ)}): choose another out or name")
        return True

    def _policy(self):
        from ..training.policy import load_policy

        return load_policy(self.how["model"], seed=self.seed, device="cpu", **self.method.policy)

    def make(self) -> None:
        """Train, evaluate, write the result."""
        import torch

        from ..search.bm25 import BM25Search
        from ..training.settings import Settings
        from ..training.trainer import Trainer

        torch.set_num_threads(1)
        world, skill = build_world(0), skill_of(self.how["model"])
        # on the CPU: a process that was forked off a notebook cannot use its GPU
        policy = self._policy()
        engine: Any = BM25Search(world.passages)
        engine = self.method.engine(policy, engine) if self.method.engine else engine
        settings = Settings(**SETTINGS | LIMITS | dict(self.method.settings) | {"seed": self.seed})
        drawn = _asked(world, "train", TRAINED_ON, self.how, self.seed)
        asked = [blanked(q, passages=self.method.gold_passages) for q in drawn]
        yardstick = Yardstick(world, skill, self.price, UNKNOWN_PAYS, notes=self.method.notes)
        reward = self.method.reward or yardstick.reward
        run_dir = self.out / "trainings" / self.file.stem
        advantages = self.method.by_token()
        how: dict[str, Any] = {"advantages": advantages, "author_rewards": self.method.author_rewards, "report": None}
        trainer = Trainer(policy, asked, engine, reward, settings, run_dir, **how)
        trainer.train()
        done = examine(policy, engine, yardstick, self.how, self.seed)
        rows = table(yardstick, done)
        figures = {name: fmean(row[name] for row in rows) for name in ("regret", "reward", "best")}
        row = {"method": self.name, "price": self.price, "seed": self.seed} | figures
        seen = {of.__name__: of(yardstick, done) for of in (by_level, by_own_skill, queries)}
        calls = {tool: n / len(done) for tool, n in Counter(call.tool for t in done for call in t.calls).items()}
        whole = {"made_of": self.made_of(), "row": row, "course": course(trainer, yardstick), **seen}
        write_json(self.file, whole | {"calls": calls, "questions": rows})


def trained(
    places: Sequence[str | os.PathLike], needed: Sequence[str], prices: Sequence[float] = (PRICE, FORMER_PRICE)
) -> dict[str, list[dict[str, Any]]]:
    """What ``compare`` left in the first of these folders that has all ``needed`` methods with one seed at least.

    Args:
        needed: one name or more.
        prices: the first of them at which there is anything; other trainings in these folders are not looked at.

    Returns:
        method -> its results as they were written, one a seed, in order of the seeds that all ``needed`` have. Methods
        that lack one of these seeds are left out; empty where no folder has anything.
    """
    for place, price in itertools.product(map(Path, places), prices):
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for one in map(read_json, sorted(place.glob(f"*-{price}-*.json"))):
            found.setdefault(one["row"]["method"], {})[one["row"]["seed"]] = one
        if seeds := sorted(set.intersection(*(set(found.get(name, ())) for name in needed))):
            return {name: [of[s] for s in seeds] for name, of in found.items() if set(seeds) <= of.keys()}
    return {}


def former(results: Iterable[Mapping[str, Any]], model: str = MODEL) -> str:
    """A sentence about results that began as another model than the one in the folder ``model``; "" without any."""
    weights, results = hashes(model), list(results)
    others = [one for one in results if one["made_of"]["weights"] != weights]
    if not others:
        return ""
    prices = ", ".join(map(str, sorted({one["row"]["price"] for one in others})))
    return (
        f"{len(others)} of these {len(results)} trainings began as a former tiny Qwen, not as the one in {model}: it "
        f"read worse, in a world with other texts; prices of a search there: {prices}"
    )


def course(trainer, yardstick: Yardstick) -> list[dict[str, Any]]:
    """How a training went: one row a step, of its own rollouts, which are the policy's before that step's update.

    Returns:
        rows of "step" from 1, "rollouts" and sampled "tokens" so far, of its rollouts the choice "regret", the mean
        number of "searches", the mean "reward" that was trained and the mean of ``Discounted`` at the price, "truth";
        of all but those that were made to begin with an act.
    """
    free: dict[int, list[tuple[float, float]]] = {}
    made, true = Counter[int](), yardstick.reward
    for t in trainer.log:
        made[t.step + 1] += 1
        if t.first_action is None:  # what it was made to begin with, it did not choose
            lost = sum(d.regret for d in yardstick.decisions(t))
            free.setdefault(t.step + 1, []).append((lost, true.value(t)))
    rows, rollouts, tokens = [], 0, 0
    for row in trainer.metrics:
        step = row["step"]
        rollouts, tokens = rollouts + made[step], tokens + row["sampled_tokens"]
        regret, truth = map(fmean, zip(*free[step]))
        of_step = {"regret": regret, "searches": row["searches"], "reward": row["reward"], "truth": truth}
        rows.append({"step": step, "rollouts": rollouts, "tokens": tokens} | of_step)
    return rows


def examine(policy, engine, yardstick: Yardstick, how: Mapping[str, Any], seed: int = 0) -> list[Trajectory]:
    """Scored rollouts of a policy at temperature 1."""
    import torch

    from ..training.rollout import rollout

    generator = torch.Generator().manual_seed(seed)
    asked, n = _asked(yardstick.world, how["split"], how["questions"], how), how["rollouts"]
    limits = LIMITS | {"num_generations": n, "batch_size": 100 * n} | how.get("limits", {})
    done = rollout(policy, asked, engine, generator=generator, **limits)
    score(yardstick.reward, done).keep(done)
    return done


def _in_processes(tasks: Sequence[Callable[[], None]], labels: Sequence[str], jobs: int) -> None:
    """Run each in a process of its own, which inherits what a notebook's cell defined."""
    waiting, failed = list(zip(tasks, labels)), list[str]()
    running: dict[int, str] = {}
    with tqdm(total=len(tasks), desc="compare", disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                task, label = waiting.pop(0)
                sys.stdout.flush()
                if (pid := os.fork()) == 0:
                    os._exit(_child(task))
                running[pid] = label
            pid, status = os.wait()
            if pid in running:
                failed += [running[pid]] if status else []
                del running[pid]
                bar.update()
    if failed:
        raise RuntimeError(f"failed: {'; '.join(failed)}. What is done is kept: call again to go on")


def _child(task: Callable[[], None]) -> int:
    import traceback

    try:
        task()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a Python file with a dict named methods")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these of the file")
    parser.add_argument("--prices", type=float, nargs="+", default=[0.15, 0.3, 0.5])
    parser.add_argument("--seeds", type=Whole, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--questions", type=Count, default=800)
    parser.add_argument("--jobs", type=Count)
    parser.add_argument("--model", default=MODEL, help="as searchr1 warmstart makes it")


def run(args: argparse.Namespace) -> None:
    """Train what the file asks for and print regrets with their intervals."""
    given = runpy.run_path(str(args.file))
    methods = given.get("methods")
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            f"{args.file} must define a dict named methods: name -> settings, advantage function or Method"
        )
    if unknown := set(args.methods or ()) - set(methods):
        raise ValueError(f"--methods: {args.file} has no {', '.join(sorted(unknown))}; it has {', '.join(methods)}")
    methods = {name: methods[name] for name in args.methods or methods}
    how = {name: getattr(args, name) for name in ("prices", "seeds", "out", "split", "questions", "jobs", "model")}
    for c in compare(methods, mixture=given.get("mixture"), **how).table():
        print(f"{c['method']:20} price {c['price']:<5} regret {c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})")
