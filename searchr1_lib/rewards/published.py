"""Rewards of published methods, each with its source and with what we do otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..environment.limits import Amount, Count, Positive, Share, valid
from ..metrics import answer_retrieved, exact_match
from ..records import Trajectory
from .answer import ExactMatch
from .base import Reward, RewardFunction, by_group, checked, final_answer
from .cost import searches_by_turn
from .process import format_errors


class SearchR1Format(Reward):
    """The format-aware exact match of Search-R1's scripts (Jin et al. 2025, arXiv 2503.09516 and its code).

    Well-formed and correct 1.0; correct only ``1 - structure``; well-formed only ``structure``, plus
    ``retrieval`` if a gold answer stands in what was retrieved; neither, but an answer was given,
    ``answered``; otherwise 0. The defaults are those of its scripts, which leave the retrieval part at 0.
    """

    name = "search_r1_format"

    def __init__(self, structure: float = 0.2, retrieval: float = 0.0, answered: float = 0.1):
        self.structure = valid(Share, structure, "SearchR1Format: structure")
        self.retrieval = valid(Share, retrieval, "SearchR1Format: retrieval")
        self.answered = valid(Share, answered, "SearchR1Format: answered")

    def value(self, trajectory: Trajectory) -> float:
        answer = final_answer(trajectory)
        formed = not format_errors(trajectory)
        if exact_match(answer, trajectory.question.answers):
            return 1.0 if formed else 1.0 - self.structure
        if formed:
            return self.structure + self.retrieval * answer_retrieved(trajectory)
        return self.answered if answer is not None else 0.0


class OTC(Reward):
    """Correctness times a factor that is highest for the fewest searches that sufficed in the group.

    OTC-GRPO (Wang et al. 2025, "Acting less is reasoning more", arXiv 2504.14870):
    ``reward = alpha * r_tool * r``, where r is ``correctness``, m the searches of the rollout, n the fewest
    searches among the rollouts of its group with r > 0, and

        r_tool = 1                          if m = n = 0
               = cos(m pi / (2 m + c))      if n = 0
               = sin(f pi / (2 n)),  f = 2 n m / (m + n)    otherwise

    Being a product, it gives nothing for saving searches on a wrong answer.

    Args:
        c: how slowly the factor falls where no search was needed. The default, the most searches that a
            rollout may make in this project, is our choice.
    """

    name = "otc"

    def __init__(self, correctness: RewardFunction | None = None, c: float = 4.0, alpha: float = 1.0):
        self.correctness = correctness or ExactMatch()
        self.c, self.alpha = valid(Amount, c, "OTC: c"), valid(Positive, alpha, "OTC: alpha")

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory. Raises RewardError if ``correctness`` fails."""
        correct = checked(self.correctness, trajectories)
        searches = [sum(searches_by_turn(t)) for t in trajectories]
        out = [0.0] * len(trajectories)
        for places in by_group(trajectories).values():
            solved = [i for i in places if correct[i] > 0]
            fewest = min((searches[i] for i in solved), default=0)
            for i in solved:
                out[i] = self.alpha * self.tool_factor(searches[i], fewest) * correct[i]
        return out

    def tool_factor(self, m: int, n: int) -> float:
        """``r_tool`` for m searches where n sufficed, in (0, 1]."""
        if n == 0:
            return 1.0 if m == 0 else math.cos(m * math.pi / (2 * m + self.c))
        return math.sin(2 * n * m / (m + n) * math.pi / (2 * n))


class IKEA(Reward):
    """The knowledge-boundary reward: know it, and say it; do not know it, and search.

    IKEA (Huang et al. 2025, arXiv 2505.07596): malformed -1; correct
    ``1 + bonus * max(0, 1 - searches / max_searches)``; wrong after a search ``tried``; wrong without one 0.
    The defaults are those of its public code (1.6, 1.4, 1.2 and 1 for 0, 1, 2 and more searches). Malformed is
    what ``format_errors`` says, which is stricter than its code.
    """

    name = "ikea"

    def __init__(self, bonus: float = 0.6, max_searches: int = 3, tried: float = 0.05):
        self.bonus, self.tried = valid(Amount, bonus, "IKEA: bonus"), valid(Share, tried, "IKEA: tried")
        self.max_searches = valid(Count, max_searches, "IKEA: max_searches")
        self._correct = ExactMatch()

    def value(self, trajectory: Trajectory) -> float:
        if format_errors(trajectory):
            return -1.0
        searches = sum(searches_by_turn(trajectory))
        if self._correct.value(trajectory):
            return 1.0 + self.bonus * max(0.0, 1 - searches / self.max_searches)
        return self.tried if searches else 0.0


def search_confidence(trajectory: Trajectory) -> float:
    """The smallest probability with which a token of a search was sampled; 1.0 without a search.

    The tags count as tokens of the search: with the opening one the model decides to search at all.
    """
    searches = [s for s in trajectory.segments if s.by_model and s.kind == "search"]
    places = [i for s in searches for i in range(s.start, s.end) if trajectory.mask[i]]
    return math.exp(min((trajectory.logprobs[i] for i in places), default=0.0))


class ConfidentSearch(Reward):
    """Correctness that counts only if every search was issued with confidence.

    beta-GRPO (Wu et al. 2025, "Search Wisely", arXiv 2505.17281): the reward is ``correctness`` if
    the smallest token probability inside the searches is at least ``threshold``, else 0; a rollout without a
    search needs no confidence. Probabilities are those of the sampling distribution (temperature applied).
    The threshold is the one with which others re-implemented the paper; some leave the tags out of the minimum,
    ``search_confidence`` does not.
    """

    name = "confident_search"

    def __init__(self, correctness: RewardFunction | None = None, threshold: float = 0.4):
        self.correctness = correctness or ExactMatch()
        self.threshold = valid(Share, threshold, "ConfidentSearch: threshold")

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory. Raises RewardError if ``correctness`` fails."""
        correct = checked(self.correctness, trajectories)
        return [r if search_confidence(t) >= self.threshold else 0.0 for t, r in zip(trajectories, correct)]


class OverlongPenalty(Reward):
    """0 up to a length, then falling linearly to -1: the soft overlong punishment.

    DAPO (Yu et al. 2025, arXiv 2503.14476, equation 13), with y the tokens the model wrote (environment
    text is not its fault): 0 for ``y <= max_tokens - buffer``; ``((max_tokens - buffer) - y) / buffer`` up
    to ``max_tokens``; -1 beyond.

    Raises:
        ValueError: unless 0 < buffer <= max_tokens.
    """

    name = "overlong"

    def __init__(self, max_tokens: int, buffer: int):
        self.max_tokens = valid(Count, max_tokens, "OverlongPenalty: max_tokens")
        self.buffer = valid(Count, buffer, "OverlongPenalty: buffer")
        if buffer > max_tokens:
            raise ValueError(f"OverlongPenalty: buffer ({buffer}) must be at most max_tokens ({max_tokens})")

    def value(self, trajectory: Trajectory) -> float:
        over = sum(trajectory.mask) - (self.max_tokens - self.buffer)
        return 0.0 - min(1.0, max(0.0, over / self.buffer))
