"""A researcher: another agent in the place of an index, with a context of its own.

    engine = ResearcherEngine(policy, BM25Search(passages))
    rollout(coordinator, questions, engine)              # a coordinator's <search> asks the researcher

As in MATPO and M-GRPO (arXiv 2510.04678, 2511.13288) the one that asks reads a short finding in place of all that was
read for it. Both may be the same weights (``ResearcherEngine(policy, …)``), two adapters on one base
(``policy.alone("researcher")``), or two models; ``Settings.train_colleagues`` trains both with the reward of the team.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..environment.base import Finding
from ..environment.limits import Limits
from ..metrics import passages_read, substring_match
from ..records import Hit, Passage, Question, Trajectory
from ..search.base import Engine, check_batch
from .identity import identity, of_weights
from .policy import Policy
from .rollout import rollout


class ResearcherEngine(Engine):
    """Answers a query with what an inner rollout found out; all queries of a batch are asked at once.

    One that finds nothing gives nothing; how it went stands in ``ToolCall.inner``. What it cost is counted there: its
    searches (``rewards.searches_by_turn``) and its tokens.

    Args:
        policy: who is asked.
        engine: what it searches; another ``ResearcherEngine`` asks a further one.
        question_of: query -> the question that is asked; the query itself where it gives nothing.
        first_action: "search": it is made to begin with a search.
        seed: of the sampling; the same queries under the same weights get the same answers.
        **limits: its own, see ``Limits``: turns and tokens are what it may spend.

    Raises:
        ValueError: a limit that cannot be.
    """

    decides = ("engine", "seed", "first_action", "budget", "asks", "weights")
    timed = False

    def __init__(
        self,
        policy: Policy,
        engine,
        *,
        question_of: Callable[[str], str | None] = str,
        first_action: str | None = None,
        seed: int = 0,
        **limits: Any,
    ):
        self.policy, self.engine, self.question_of = policy, engine, question_of
        self.first_action, self.seed, self.budget = first_action, seed, Limits(**limits).model_dump()
        self.authors = policy.authors if policy.team else ()
        self.asks = identity(question_of)
        frozen = {name: w for name, w in policy.model.named_parameters() if not w.requires_grad}
        self.weights = of_weights(frozen)  # what is trained stands in the run's own checkpoints

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries = check_batch(queries, k)
        asked = [Question(f"{i}", self.question_of(q) or q, []) for i, q in enumerate(queries)]
        drawn_from = hashlib.sha256("\n".join([str(self.seed), *queries]).encode("utf-8", "replace")).digest()
        generator = torch.Generator(self.policy.device).manual_seed(int.from_bytes(drawn_from[:7]))
        how = {"num_generations": 1, "first_action": self.first_action, "generator": generator}
        return [finding(t, k) for t in rollout(self.policy, asked, self.engine, **how, **self.budget)]


def finding(t: Trajectory, k: int = 3) -> Finding:
    """What a rollout found out, as at most ``k`` hits: its answer, titled with its question, and then the passages
    that it read in which this answer stands. Empty where it has no answer, or says "unknown".
    """
    answer = t.answer or ""
    if not answer or answer.lower() == "unknown":
        return Finding([], t)
    sources = dict.fromkeys(p for p in passages_read(t) if substring_match(p.text, answer))
    return Finding([Hit(p, -float(i)) for i, p in enumerate([Passage("", t.question.text, answer), *sources][:k])], t)
