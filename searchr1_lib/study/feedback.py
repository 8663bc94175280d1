"""Feedback as a loop: roll out, ask about the pairs worth asking, fit a reward, train on it, ask again.

Labellers are callables on pairs of rollouts that return ``Choice``s: ``Scripted`` (a hidden utility, for experiments
with a known truth), ``People`` (a queue of files, and ``viewer.prefer``), ``rewards.JudgeOfPairs`` (a chat model). What
is learned from them is a ``rewards.PreferenceReward``. The loop is that of Christiano et al. (2017, "Deep reinforcement
learning from human preferences", arXiv 1706.03741), with an ensemble that says which pairs are worth asking about.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from ..environment.limits import Count, Share, check
from ..files import TrajectoryLog, read_json, read_json_lines, write_json, write_json_lines
from ..metrics import grouped, normalize_answer
from ..records import Question, Trajectory
from ..rewards.base import Reward, RewardFunction, checked, final_answer
from ..rewards.composite import Composite
from ..rewards.cost import searches_by_turn
from ..rewards.preference import (
    Choice,
    Pair,
    PreferenceReward,
    now,
    pair_key,
    read_choices,
    record_choice,
    sureness_said,
    visible,
)
from ..rewards.process import Malformed
from ..worlds.almanac import LEVELS, PRICE, UNKNOWN_PAYS

Labeller = Callable[[Sequence[Pair]], "list[Choice]"]


class WaitingForLabels(RuntimeError):
    """The loop cannot go on before somebody has labelled what is in the queue; the message says where it is."""


# ---- labellers -------------------------------------------------------------------------------------------


class Scripted:
    """A labeller whose hidden utility is known: prefers ``a`` with probability sigmoid((u(a) - u(b)) / noise).

    Equal utilities are a tie.

    Args:
        utility: a reward; may read what no labeller of a real rollout sees, such as the accepted answers.
        noise: 0 never errs.
        bias: weights of what is ``visible``, added to the utility: ``{"model_tokens": 0.5}`` likes long rollouts,
            ``{"says I am certain": 0.3}`` likes to be told so.
        first: added to the utility of the one that is shown first.
        seed: of the errors, and of the order in which the two are shown.
    """

    name = "scripted"

    def __init__(
        self,
        utility: RewardFunction,
        *,
        noise: float = 0.0,
        bias: Mapping[str, float] | None = None,
        first: float = 0.0,
        seed: int = 0,
    ):
        self.utility, self.noise, self.bias, self.first, self.seed = utility, noise, dict(bias or {}), first, seed

    def __call__(self, pairs: Sequence[Pair]) -> list[Choice]:
        """One choice a pair; the same pair always gets the same one."""
        sides = [self.worth([pair[side] for pair in pairs]) for side in (0, 1)]
        return [self._choice(pair, u, v) for pair, u, v in zip(pairs, *sides)]

    def worth(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """What it thinks of each, its biases included and its errors not."""
        values, rows = checked(self.utility, trajectories), visible(trajectories)
        return [u + sum(w * row.get(name, 0.0) for name, w in self.bias.items()) for u, row in zip(values, rows)]

    def _choice(self, pair: Pair, u: float, v: float) -> Choice:
        rng = random.Random(f"{self.seed} {pair_key(*pair)}")
        shown = rng.choice(("ab", "ba"))
        more = u - v + (self.first if shown == "ab" else -self.first)
        a_wins = more > 0
        if self.noise:
            a_wins = rng.random() < 1 / (1 + math.exp(min(700.0, -more / self.noise)))
        preferred = "tie" if more == 0 else "a" if a_wins else "b"
        return Choice(*pair, preferred, self.name, now(), shown)


class WellFounded(Reward):
    """What a rollout on the almanac is worth to somebody who cannot check its answer, but knows how far to trust it.

    The chance that the answer is right as the rollout itself says it (``LEVELS`` of what it trusts at its end, ``read``
    where it trusts nothing but what it read), times ``(1 - price) ** searches``; "unknown" earns what it earns in
    ``Discounted``, whose expectation this is.
    """

    name = "well_founded"

    def __init__(self, price: float = PRICE, unknown: float = UNKNOWN_PAYS, read: float = 0.95):
        self.price, self.unknown, self.read = price, unknown, read

    def value(self, trajectory: Trajectory) -> float:
        answer = normalize_answer(final_answer(trajectory) or "")
        if answer in ("", "unknown"):
            return self.unknown if answer else 0.0
        trusted = [LEVELS[words] for words in sureness_said(trajectory) if words in LEVELS]
        return math.prod(trusted or [self.read]) * (1 - self.price) ** sum(searches_by_turn(trajectory))


class People:
    """Labellers in front of a screen: pairs wait in ``queue.jsonl`` of a folder, each person's choices are a file.

    ``viewer.prefer(people.waiting("ada"), people.file("ada"), who="ada")`` shows Ada what she has not seen yet.
    Several people may label the same pairs; where they differ, both choices count.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def __call__(self, pairs: Sequence[Pair]) -> list[Choice]:
        """What is said of these pairs so far; those that nobody has seen are put into the queue."""
        queue = {pair_key(*pair): pair for pair in self.queue()}
        if new := {key: pair for pair in pairs if (key := pair_key(*pair)) not in queue}:
            rows = [{"a": a.to_dict(), "b": b.to_dict()} for a, b in (queue | new).values()]
            write_json_lines(self.folder / "queue.jsonl", rows)
        asked = {pair_key(*pair) for pair in pairs}
        return [c for c in self.choices() if pair_key(c.a, c.b) in asked]

    def __repr__(self) -> str:
        return f"people, whose queue is {self.folder / 'queue.jsonl'}"

    def file(self, who: str) -> Path:
        """Where a person's choices are kept."""
        if not who.isidentifier():
            raise ValueError(f"who={who!r}: a name of letters, digits and _ is needed, it names a file")
        return self.folder / f"labels_{who}.jsonl"

    def queue(self) -> list[Pair]:
        """All pairs that were ever asked about."""
        rows = read_json_lines(file) if (file := self.folder / "queue.jsonl").exists() else ()
        return [(Trajectory.from_dict(row["a"]), Trajectory.from_dict(row["b"])) for row in rows]

    def waiting(self, who: str) -> list[Pair]:
        """What a person has not labelled yet."""
        done = {pair_key(c.a, c.b) for c in self._of(self.file(who))}
        return [pair for pair in self.queue() if pair_key(*pair) not in done]

    def choices(self) -> list[Choice]:
        """Of all people."""
        return [c for file in sorted(self.folder.glob("labels_*.jsonl")) for c in self._of(file)]

    def disagreement(self) -> float | None:
        """Of the pairs that two people or more have labelled, the share on which they differ; None without any."""
        each = grouped(self.choices(), lambda c: pair_key(c.a, c.b)).values()
        twice = [{_text_of_winner(c) for c in said} for said in each if len({c.who for c in said}) > 1]
        return fmean(len(winners) > 1 for winners in twice) if twice else None

    @staticmethod
    def _of(file: Path) -> list[Choice]:
        return read_choices(file) if file.exists() else []


def _text_of_winner(c: Choice) -> str | None:
    return None if c.preferred == "tie" else (c.a if c.preferred == "a" else c.b).text


# ---- which pairs, and how well the reward does ---------------------------------------------------------------


def pairs_of(trajectories: Iterable[Trajectory]) -> list[Pair]:
    """All pairs of rollouts of one group that differ in what they say."""
    groups = grouped(trajectories, lambda t: t.group).values()
    return [(a, b) for group in groups for a, b in combinations(group, 2) if a.text != b.text]


def choose_pairs(
    pairs: Sequence[Pair], count: int, rng: random.Random, reward: PreferenceReward | None = None
) -> list[Pair]:
    """``count`` pairs to ask about, no two of which are the same two texts.

    With a ``reward`` those on which its members disagree most, else any; one of each question before a second one.
    """
    shuffled = rng.sample(list(pairs), len(pairs))
    different = list({pair_key(*pair): pair for pair in shuffled}.values())
    if reward:
        unsure = dict(zip(map(id, different), reward.disagreement(different)))
        different.sort(key=lambda pair: -unsure[id(pair)])
    groups = [*grouped(different, lambda pair: pair[0].question.id).values()]
    ranked = sorted((rank, i) for i, group in enumerate(groups) for rank in range(len(group)))
    return [groups[i][rank] for rank, i in ranked[:count]]


def agreement(reward: RewardFunction, choices: Iterable[Choice]) -> float:
    """Share of the choices, ties apart, that a reward orders as the labeller did; equal values count one half.

    Raises:
        ValueError: there are none.
    """
    clear = [c for c in choices if c.preferred != "tie"]
    if not clear:
        raise ValueError("agreement: no choice prefers one of the two")
    a, b = (checked(reward, [getattr(c, side) for c in clear]) for side in "ab")
    return fmean(0.5 if x == y else float((x > y) == (c.preferred == "a")) for x, y, c in zip(a, b, clear))


def states(policy, token_budget: int = 4096) -> Callable[[Sequence[Trajectory]], list[dict[str, float]]]:
    """What a ``PreferenceReward`` may see: the frozen base model's state behind the last token, (H,) numbers a rollout.

    The base has read question, thoughts, passages and answer, and none of the accepted answers.
    """
    import torch

    from ..training.logits import micro_batches, padded

    @torch.no_grad()
    def see(trajectories: Sequence[Trajectory]) -> list[dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        with policy.reference():
            for part in micro_batches(trajectories, token_budget):
                rows = [t.prompt_ids + t.completion_ids for t in part]
                hidden = policy.decoder(input_ids=padded(rows, policy.pad_id, policy.device), use_cache=False)
                last = [state[len(row) - 1] for state, row in zip(hidden.last_hidden_state, rows)]
                found |= {id(t): {f"state {i}": x for i, x in enumerate(h.tolist())} for t, h in zip(part, last)}
        return [found[id(t)] for t in trajectories]

    return see


def onset(proxy: Sequence[float], truth: Sequence[float], *, window: int = 5, least: float = 0.02) -> int | None:
    """The step, counted from 1, from which a learned reward rises while the true one falls: the onset of hacking.

    Of means over ``window`` steps: the step of the true reward's peak, if it ends more than ``least`` below that while
    the learned one ends above what it was there; else None. (CHERRL, arXiv 2606.04923, dates it too.)

    >>> onset([0, 1, 2, 3, 4, 5], [0.1, 0.3, 0.5, 0.4, 0.3, 0.1], window=1)
    3
    """
    check(window=(window, Count), least=(least, Share))
    smooth = lambda values: [fmean(values[i - window : i]) for i in range(window, len(values) + 1)]
    p, t = smooth(proxy), smooth(truth)
    peak = max(range(len(t)), key=t.__getitem__, default=None)
    if peak is None or t[peak] - t[-1] <= least or p[-1] <= p[peak]:
        return None
    return peak + window


# ---- the loop ------------------------------------------------------------------------------------------------


class FeedbackLoop:
    """Rounds of: roll out, choose pairs, ask, fit, train. All is kept in a folder; started again it goes on.

    Args:
        policy, questions, engine: as for ``Trainer``; the adapter is changed in place.
        labeller: what is asked, see the module's head.
        settings: of the training in each round; ``steps`` are those of one round.
        folder: has a folder for each round: the ``pool.jsonl`` of rollouts, ``labels.jsonl`` with every choice, who
            made it and when, the training and the adapter.
        rounds, labels: the budget is ``rounds * labels`` pairs.
        pool: questions that are rolled out in a round, to choose pairs from.
        active: ask where the reward's members disagree; False: at random.
        see, members: of the ``PreferenceReward`` that is fitted to all choices so far.
        truth: a reward to report beside the learned one, where it is known. Nothing is trained on it.

    Raises:
        ValueError: a number that cannot be.
    """

    def __init__(
        self,
        policy,
        questions: Sequence[Question],
        engine,
        labeller: Labeller,
        settings,
        folder: str | os.PathLike,
        *,
        rounds: int = 3,
        labels: int = 32,
        pool: int = 64,
        active: bool = True,
        see: Callable = visible,
        members: int = 5,
        truth: RewardFunction | None = None,
    ):
        check(rounds=(rounds, Count), labels=(labels, Count), pool=(pool, Count), members=(members, Count))
        self.policy, self.questions, self.engine, self.labeller = policy, list(questions), engine, labeller
        self.settings, self.folder, self.rounds, self.labels = settings, Path(folder), rounds, labels
        self.pool, self.active, self.see, self.members, self.truth = pool, active, see, members, truth
        self.reward: PreferenceReward | None = None
        self.rows: list[dict[str, Any]] = []

    def choices(self, rounds: int | None = None) -> list[Choice]:
        """All that was said so far, or in the first so many rounds."""
        files = [self._here(number) / "labels.jsonl" for number in range(self.rounds if rounds is None else rounds)]
        return [c for file in files if file.exists() for c in read_choices(file)]

    def _here(self, number: int) -> Path:
        return self.folder / f"round_{number + 1}"

    def run(self) -> list[dict[str, Any]]:
        """All rounds that are left; returns a row for each round.

        Returns:
            rows of "round", "labels" so far, "agreement" of the reward of the round before with the new choices, and
            of the rollouts at the beginning of the round the mean "truth" and what that reward says, "learned".

        Raises:
            WaitingForLabels: people have to label first; call again when they have.
            TrainingError, RewardError: see ``Trainer.train`` and the labeller.
        """
        fitted = None  # to all that was said before a round
        for number in range(len(self.rows), self.rounds):
            here = self._here(number)
            if (done := here / "done.json").exists():
                self.policy.load_adapter(here / "adapter")
                self.rows.append(read_json(done))
                continue
            said = self.choices(number)
            self.reward = fitted or self._fitted(said)
            rollouts = self._rollouts(number, here)
            new = self._ask(number, here, rollouts)
            said += new
            row = {"round": number + 1, "labels": len(said)} | self._figures(rollouts, new)
            fitted = self._fitted(said)
            self._train(number, here, fitted or _no_opinion)
            self.policy.save_adapter(here / "adapter")
            write_json(done, row)
            self.rows.append(row)
        self.reward = fitted or self._fitted(self.choices())
        return self.rows

    def _fitted(self, choices: Sequence[Choice]) -> PreferenceReward | None:
        clear = [c for c in choices if c.preferred != "tie"]
        return PreferenceReward(clear, see=self.see, members=self.members, seed=self.settings.seed) if clear else None

    def _rollouts(self, number: int, here: Path) -> list[Trajectory]:
        """The pool of a round; it is kept, so that what is asked stays the same while people take their time."""
        import torch

        from ..training.rollout import rollout

        if (file := here / "pool.jsonl").exists():
            return TrajectoryLog(file).read()
        s = self.settings
        asked = random.Random(f"{s.seed}/{number}/pool").sample(self.questions, min(self.pool, len(self.questions)))
        generator = torch.Generator(self.policy.device).manual_seed(s.seed * 1_000_003 + number)
        how = {"num_generations": s.num_generations, "temperature": s.temperature, **s.limits()}
        rollouts = rollout(self.policy, asked, self.engine, generator=generator, **how)
        write_json_lines(file, (t.to_dict() for t in rollouts))
        return rollouts

    def _ask(self, number: int, here: Path, rollouts: Sequence[Trajectory]) -> list[Choice]:
        if (file := here / "labels.jsonl").exists():
            return read_choices(file)
        rng = random.Random(f"{self.settings.seed}/{number}/pairs")
        pairs = choose_pairs(pairs_of(rollouts), self.labels, rng, self.reward if self.active else None)
        said = self.labeller(pairs)
        if missing := len({pair_key(*pair) for pair in pairs} - {pair_key(c.a, c.b) for c in said}):
            waits = f"round {number + 1}: {missing} of {len(pairs)} pairs wait for a label"
            raise WaitingForLabels(f"{waits}; asked were {self.labeller}")
        record_choice(file, *said)
        return said

    def _figures(self, rollouts: Sequence[Trajectory], new: Sequence[Choice]) -> dict[str, float | None]:
        clear = [c for c in new if c.preferred != "tie"]
        return {
            "agreement": agreement(self.reward, clear) if self.reward and clear else None,
            "truth": fmean(checked(self.truth, rollouts)) if self.truth else None,
            "learned": fmean(self.reward(rollouts)) if self.reward else None,
        }

    def _train(self, number: int, here: Path, reward: RewardFunction) -> None:
        from ..training.trainer import Trainer

        # form is no matter of taste: choices between well-formed rollouts say nothing of it
        reward = Composite([(1.0, reward), (1.0, Malformed())], name="feedback")
        settings = self.settings.model_copy(update={"seed": self.settings.seed + number})
        Trainer(self.policy, self.questions, self.engine, reward, settings, here / "train", report=None).train()


def _no_opinion(trajectories: Sequence[Trajectory]) -> list[float]:
    """What is learned from ties alone."""
    return [0.0] * len(trajectories)
