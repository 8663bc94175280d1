"""The best that any policy can do where what it remembers may be wrong, and where a way of learning puts its boundary.

A question is a chain of hops. Of each hop the policy says how sure it is of what it remembers: a chance ``level``, 0
where it recalls nothing. At each hop it trusts its memory or searches, in one of two wordings; what it finds is read
rightly or not; at the end a right answer after n searches earns ``(1 - price) ** n``. The optimum knows what the policy
states and how well it searches and reads, and never whether a memory is true.

One hop: searching is better if and only if ``level < found * read * (1 - price)``, give or take what a failed search
leaves to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import product
from math import comb

#: What may be done at a hop: believe the memory, search in either wording, look among notes where there are any, or end
#: by saying that one does not know.
TRUST, UNKNOWN, RECALL, WORDINGS = "trust", "unknown", "recall", ("search full", "search short")
#: A level, or where nobody can know it yet the levels that it may have, each with its chance.
Level = float | tuple[tuple[float, float], ...]
#: (state, level, values of the open acts) -> acts with their probabilities.
Policy = Callable[["State", "float | None", dict[str, float]], dict[str, float]]


@dataclass(frozen=True)
class Skill:
    """What a policy can do once it has chosen; measured, see ``study.evaluate``.

    Attributes:
        found: the chance that a first query in each of ``WORDINGS`` brings the passage.
        again: the same where the other wording has failed; missing passages are in both.
        read: the chance that what a passage says is used rightly.
    """

    found: tuple[float, float] = (1.0, 1.0)
    again: tuple[float, float] = (0.0, 0.0)
    read: float = 1.0


@dataclass(frozen=True)
class Notes:
    """What earlier episodes left, see ``environment.memory``.

    Attributes:
        found: the chance that they bring the passage of a hop.
        price: of looking among them; what a right answer is worth is multiplied by 1 - price.
        tool: what the calls of it are named.
    """

    found: float
    price: float
    tool: str = "recall"


@dataclass(frozen=True)
class State:
    """Where a decision stands: the hop, the searches so far, the chance that all before is right, what was tried for
    this hop (places among ``Optimum.ways``), and how often the notes were asked.
    """

    hop: int = 0
    searches: int = 0
    right: float = 1.0
    tried: tuple[int, ...] = ()
    recalls: int = 0

    def trusted(self, level: float) -> State:
        """The state after the memory of this hop, right with ``level``, was believed."""
        return replace(self, hop=self.hop + 1, right=self.right * level, tried=())

    def asked(self, notes: bool) -> State:
        """The state after one more search, or one more recall, whatever it brought."""
        return replace(self, searches=self.searches + (not notes), recalls=self.recalls + notes)

    @property
    def searched_in_vain(self) -> bool:
        """Whether a search for this hop has failed, in the other wording than the next one's."""
        return any(way < len(WORDINGS) for way in self.tried)


@dataclass(frozen=True)
class Optimum:
    """The best policy for one kind of question, by dynamic programming.

    Args:
        levels: of each hop, in order; see ``Level``.
        price: c; a right answer after n searches earns (1 - c) ** n.
        skill: of the policy that is to choose.
        unknown: what saying "unknown" earns.
        guess: the chance that a wrong chain gives the right answer all the same: 1/2 for a comparison of two.
        max_searches: an episode's limit, recalls counted.
        notes: what may be asked before the engine; None: there are none.

    Raises:
        ValueError: a number that is no chance.

    Half sure, a free reader, a search for a fifth: searching earns 0.8, answering 0.5.

    >>> Optimum((0.5,), price=0.2, skill=Skill()).act_values()
    {'trust': 0.5, 'search full': 0.8, 'search short': 0.8, 'unknown': 0.0}
    """

    levels: tuple[Level, ...]
    price: float
    skill: Skill
    unknown: float = 0.0
    guess: float = 0.0
    max_searches: int = 4
    notes: Notes | None = None

    def __post_init__(self):
        levels = [p for level in self.levels for p in _spread(level)[1]]
        chances = {"price": [self.price], "unknown": [self.unknown], "guess": [self.guess], "levels": levels}
        chances |= {name: _listed(getattr(self.skill, name)) for name in ("found", "again", "read")}
        if self.notes:
            chances |= {"notes": [self.notes.found, self.notes.price]}
        for name, values in chances.items():
            if wrong := [value for value in values if not 0 <= value <= 1]:
                raise ValueError(f"{name} must be between 0 and 1, got {wrong[0]}")

    @property
    def ways(self) -> tuple[str, ...]:
        """How a passage may be looked for."""
        return (*WORDINGS, RECALL) if self.notes else WORDINGS

    @cached_property
    def value(self) -> float:
        """V*: the expected reward of the best policy, before anything is said."""
        return self._enter(State())

    def act_values(self, state: State = State(), level: float | None = None) -> dict[str, float]:
        """Q* of each act that is open in a state, in the order in which ties are broken.

        Args:
            level: what is stated of the state's hop; needed where ``levels`` leaves it open.
        """
        if state.hop == len(self.levels):
            return {TRUST: self._answer(state), UNKNOWN: self.unknown}
        level = self._stated(state, level)
        values = {TRUST: self._enter(state.trusted(level))}
        for number, way in enumerate(self.ways):
            if number not in state.tried and state.searches + state.recalls < self.max_searches:
                chance = self._finds(state, number)
                found, failed = self.after_search(state, number)
                values[way] = chance * self._enter(found) + (1 - chance) * self._value(failed, level)
        return values | {UNKNOWN: self.unknown}

    def after_search(self, state: State, way: int) -> tuple[State, State]:
        """The state after a search (or a recall) that found the passage, and after one that did not."""
        once = state.asked(notes=self.ways[way] == RECALL)
        found = replace(once, hop=state.hop + 1, right=state.right * self.skill.read, tried=())
        return found, replace(once, tried=(*state.tried, way))

    def _finds(self, state: State, way: int) -> float:
        """The chance that this way to look for it brings the passage."""
        if self.notes and self.ways[way] == RECALL:
            return self.notes.found
        return (self.skill.again if state.searched_in_vain else self.skill.found)[way]

    def _stated(self, state: State, level: float | None) -> float:
        _, levels = _spread(self.levels[state.hop])
        if level is None and len(levels) > 1:
            raise ValueError(f"hop {state.hop + 1} may have {len(levels)} levels: give the one that is stated")
        return levels[0] if level is None else level

    def _answer(self, state: State) -> float:
        kept = (1 - self.price) ** state.searches
        if self.notes:
            kept *= (1 - self.notes.price) ** state.recalls
        return (state.right + (1 - state.right) * self.guess) * kept

    def _enter(self, state: State) -> float:
        """V* where a hop begins and nothing is stated of it yet."""
        if state.hop == len(self.levels):
            return max(self.act_values(state).values())
        return sum(chance * self._value(state, level) for chance, level in zip(*_spread(self.levels[state.hop])))

    @lru_cache(maxsize=100_000)  # noqa: B019  # all that is kept are numbers by frozen dataclasses
    def _value(self, state: State, level: float) -> float:
        return max(self.act_values(state, level).values())

    def choice_regret(self, policy: Policy) -> float:
        """The expected sum over its decisions of V* - Q* of what a policy does, exactly.

        Args:
            policy: given a state, the level that is stated of its hop (None behind the last) and the values of the
                open acts; returns acts with their probabilities.

        >>> never = lambda state, level, values: {TRUST: 1.0}
        >>> round(Optimum((0.5,), price=0.2, skill=Skill()).choice_regret(never), 6)
        0.3
        """

        def enter(state: State) -> float:
            if state.hop == len(self.levels):
                return visit(state, None)
            return sum(chance * visit(state, level) for chance, level in zip(*_spread(self.levels[state.hop])))

        @cache
        def visit(state: State, level: float | None) -> float:
            values = self.act_values(state, level)
            total = 0.0
            for act, chance in policy(state, level, values).items():
                if chance:
                    total += chance * (max(values.values()) - values[act] + after(state, level, act))
            return total

        def after(state: State, level: float | None, act: str) -> float:
            if act == UNKNOWN or level is None:
                return 0.0
            if act == TRUST:
                return enter(state.trusted(level))
            number = self.ways.index(act)
            chance = self._finds(state, number)
            found, failed = self.after_search(state, number)
            return chance * enter(found) + (1 - chance) * visit(failed, level)

        return enter(State())


def _spread(level: Level) -> tuple[list[float], list[float]]:
    """Chances and levels."""
    pairs = level if isinstance(level, tuple) else ((1.0, level),)
    return [chance for chance, _ in pairs], [value for _, value in pairs]


def _listed(value: float | Iterable[float]) -> list[float]:
    return list(value) if isinstance(value, tuple) else [value]  # type: ignore[list-item]


def boundary(
    advantages: Callable[[list[float], int], Iterable[float]],
    *,
    price: float,
    read: float = 1.0,
    num_generations: int = 8,
    share: float = 0.5,
) -> float:
    """The sureness at which learning pushes neither towards searching nor towards answering, one hop, exactly.

    A memory is right or wrong for a whole group, a search is read rightly with ``read`` each time. Below the boundary
    the expected gradient of GRPO raises the chance of a search. The best boundary is ``read * (1 - price)``.

    Args:
        advantages: of the rewards of groups, as ``lambda rewards, size: group_advantages(rewards, size)``.
        share: of the rollouts that search now.

    Returns:
        the boundary; outside [0, 1] where the push has one sign for every sureness.

    >>> plain = lambda rewards, size: [r - sum(rewards) / size for r in rewards]
    >>> round(boundary(plain, price=0.15, read=0.95), 4)
    0.8075
    """
    push = [0.0, 0.0]  # towards searching, where the memory is wrong and where it is right
    size = num_generations
    for memory, searches in product((0, 1), range(size + 1)):
        for hits in range(searches + 1):
            chance = comb(size, searches) * share**searches * (1 - share) ** (size - searches)
            chance *= comb(searches, hits) * read**hits * (1 - read) ** (searches - hits)
            if chance:
                rewards = [1 - price] * hits + [0.0] * (searches - hits) + [float(memory)] * (size - searches)
                given = list(map(float, advantages(rewards, size)))
                push[memory] += chance * (sum(given[:searches]) - share * sum(given))
    return push[0] / (push[0] - push[1])
