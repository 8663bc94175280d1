"""A language model as judge of whole rollouts: by a list of criteria, by rank within a group, or in pairs.

What is judged is what anybody sees of a rollout; the accepted answers are never sent. Rollouts hold text of strangers
(passages, and answers of a policy that is paid by the judge), so against what talks to the judge stands what
``rewards.judge`` has: escaped, on one line, cut, in a JSON string; the reply must be one JSON object of exactly the
expected form. Beyond that, a list of criteria holds one that nothing fulfils, and pairs are shown in both orders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ..environment.limits import valid
from ..files import sha256_of
from ..records import Trajectory
from .base import by_group, final_answer
from .judge import QUESTION_LIMIT, Asking, json_object, plain, share
from .preference import Choice, Pair, now

CRITERIA = Path(__file__).with_name("criteria.yaml")
ROLLOUT_LIMIT = 4000  # characters of a rollout that are sent
#: No rollout fulfils it: a judge that says it is fulfilled was talked over, and its verdict counts for nothing.
_NEVER = {"control": "The rollout is written in verse and signed by its author with a date."}


def seen(t: Trajectory) -> dict[str, str]:
    """What a judge is sent of a rollout."""
    return {"rollout": plain(t.text, ROLLOUT_LIMIT), "answer": plain(final_answer(t) or "")}


class Rubric(Asking):
    """The weighted share of criteria that a rollout fulfils, as a chat model says: rubrics as rewards.

    The sum of the weights of those fulfilled, over that of the positive ones: 1 at best, and below 0 where only
    criteria of negative weight are fulfilled. (Gunjal et al. 2025, "Rubrics as Rewards", arXiv 2507.17746.)

    Args:
        criteria: a YAML file, a list of ``{id, says, weight}``; ``says`` is what can be so or not so of a rollout.
        **asking: see ``judge.Asking``.

    Raises:
        ValueError: the file holds no such list; names the file and the place.
    """

    rubric_file, name = Path(__file__).with_name("criteria.md"), "rubric"

    def __init__(self, chat, criteria: str | Path = CRITERIA, **asking):
        super().__init__(chat, **asking)
        self.weights, self.says = read_criteria(criteria)
        self._criteria = sha256_of(criteria)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory. Raises what ``ask`` raises."""
        cases = [(plain(t.question.text, QUESTION_LIMIT), *seen(t).items()) for t in trajectories]
        ids = {case: t.question.id for case, t in zip(cases, trajectories)}
        scores = self.ask_all(lambda case: self._score(case, ids[case]), cases)
        return [scores[case] for case in cases]

    def _score(self, case: tuple, about: str) -> float:
        question, *rollout = case
        task = {"question": question, **dict(rollout), "criteria": self.says | _NEVER}
        said = self.ask(task, self._read, about)
        if said["control"]:
            return 0.0
        most = sum(w for w in self.weights.values() if w > 0)
        return sum(w for name, w in self.weights.items() if said[name]) / most

    def _read(self, reply: str) -> dict[str, bool]:
        said = json_object(reply)
        if said.keys() != {*self.weights, *_NEVER} or not all(isinstance(v, bool) for v in said.values()):
            raise ValueError("not true or false for each criterion")
        return said

    @property
    def identity(self) -> str:
        return f"{super().identity} {self._criteria}"


def read_criteria(path: str | Path) -> tuple[dict[str, float], dict[str, str]]:
    """Weights and sentences of a file of criteria, by id."""
    rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a list of criteria")
    weights: dict[str, float] = {}
    says: dict[str, str] = {}
    for place, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or row.keys() != {"id", "says", "weight"}:
            raise ValueError(f"{path}, criterion {place}: expected id, says and weight, nothing else")
        name = str(row["id"])
        if name in {*weights, *_NEVER}:
            raise ValueError(f"{path}, criterion {place}: the id {name!r} is taken")
        weights[name], says[name] = valid(float, row["weight"], f"{path}, {name}: weight"), str(row["says"])
    if not any(w > 0 for w in weights.values()):
        raise ValueError(f"{path}: no criterion has a positive weight")
    return weights, says


class Ranking(Asking):
    """How good each rollout of a group is beside the others, in [0, 1], by one call a group (RULER of OpenPipe's ART).

    Only differences within a group mean anything, which is all that GRPO reads. Rollouts of equal text are one.
    """

    rubric_file, name = Path(__file__).with_name("ranking.md"), "ranking"

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory, those of a group compared. Raises what ``ask`` raises."""
        texts = [plain(t.text, ROLLOUT_LIMIT) for t in trajectories]
        case_of: dict[int, tuple[str, str, tuple[str, ...]]] = {}
        for places in by_group(trajectories).values():
            question = trajectories[places[0]].question
            # in an order that says nothing of who came first
            shown = sorted({texts[i] for i in places}, key=lambda text: hashlib.sha256(text.encode()).digest())
            case_of |= dict.fromkeys(places, (question.id, plain(question.text, QUESTION_LIMIT), tuple(shown)))
        scores = self.ask_all(self._scores, case_of.values())
        return [scores[case_of[i]][text] for i, text in enumerate(texts)]

    def _scores(self, case: tuple[str, str, tuple[str, ...]]) -> dict[str, float]:
        about, question, shown = case
        if len(shown) == 1:
            return {shown[0]: 0.0}  # nothing to compare
        by_number = {str(number): text for number, text in enumerate(shown, 1)}

        def read(reply: str) -> dict[str, float]:
            said = json_object(reply)
            if said.keys() != by_number.keys():
                raise ValueError("not a score for each rollout")
            return {by_number[number]: share(value, f"the score of {number}") for number, value in said.items()}

        return self.ask({"question": question, "rollouts": by_number}, read, about)


class JudgeOfPairs(Asking):
    """A labeller: says which of two rollouts is better, shown in both orders; where these disagree, it is a tie."""

    rubric_file, name = Path(__file__).with_name("pair.md"), "judge of pairs"

    def __call__(self, pairs: Sequence[Pair]) -> list[Choice]:
        """One choice a pair. Raises what ``ask`` raises."""
        cases = [
            (a.question.id, plain(a.question.text), *(plain(t.text, ROLLOUT_LIMIT) for t in (a, b))) for a, b in pairs
        ]
        said = self.ask_all(self._better, cases)
        return [Choice(a, b, said[case], self.name, now(), "both") for (a, b), case in zip(pairs, cases)]

    def _better(self, case: tuple[str, str, str, str]) -> str:
        about, question, *shown = case
        first, second = (
            self.ask({"question": question, "A": shown[i], "B": shown[1 - i]}, _read_better, about) for i in (0, 1)
        )
        return {("A", "B"): "a", ("B", "A"): "b"}.get((first, second), "tie")


def _read_better(reply: str) -> str:
    said = json_object(reply)
    if not {"better"} <= said.keys() <= {"better", "reason"} or said["better"] not in ("A", "B", "tie"):
        raise ValueError("not an object that says which is better")
    return said["better"]
