"""How far from the best a policy is: each of its decisions against the optimum of ``worlds.optimum``.

A trajectory is read as a walk through the optimum's states: which hop it searched for, in which wording, whether the
passage came, when it answered. *Choice regret* is the sum of V* - Q*(what it did) over these decisions, so that what
follows from chance or from bad reading is not counted; how well the policy reads, ``skill`` says, and V* - reward.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from ..files import read_json
from ..metrics import exact_match, grouped, mean, normalize_answer
from ..records import ToolCall, Trajectory
from ..rewards.base import turn_count
from ..rewards.cost import Discounted
from ..rewards.steps import search_turns
from ..worlds.almanac import RELATIONS, TRUE_SHARE, UNKNOWN_PAYS, Asked, Entity, World, world_of
from ..worlds.optimum import RECALL, TRUST, UNKNOWN, WORDINGS, Level, Notes, Optimum, Skill, State

#: An act that no optimum takes: a search for what was not asked, or once more in the same words.
WASTED = "wasted"


@dataclass(frozen=True)
class Decision:
    """One decision of a trajectory.

    Attributes:
        level: the chance that the memory of this hop is true, as the policy states it; None behind the last hop.
        values: Q* of the acts that were open.
        found: whether a search brought the passage; None for another act.
        turn: in which it was made, from 0; in one turn a memory may be trusted and the next hop searched for.
    """

    state: State
    level: float | None
    act: str
    values: dict[str, float]
    value: float
    found: bool | None = None
    turn: int = 0

    @property
    def regret(self) -> float:
        return max(self.values.values()) - self.value


@lru_cache(maxsize=100_000)
def _optimum(levels, price, skill, unknown, guess, max_searches, notes) -> Optimum:
    return Optimum(levels, price, skill, unknown, guess, max_searches, notes)


@dataclass(frozen=True)
class Yardstick:
    """The optimum for the questions of a world, and the walk of a trajectory through it.

    Args:
        price, unknown: as in ``rewards.Discounted``.
        max_searches: of an episode, ``Limits.max_turns``.
        notes: that the policy may ask; the optimum may ask them too.
    """

    world: World
    skill: Skill
    price: float
    unknown: float = 0.0
    max_searches: int = 4
    notes: Notes | None = None

    @property
    def reward(self) -> Discounted:
        """The reward whose optimum this is."""
        tools = {self.notes.tool: self.notes.price} if self.notes else {}
        return Discounted(self.price, self.unknown, tools)

    def optimum(self, asked: Asked, read: frozenset[int] = frozenset()) -> Optimum:
        """For a question of which the values of some hops were read."""
        guess = 0.5 if asked.other else 0.0
        levels = self._levels(asked, read)
        return _optimum(levels, self.price, self.skill, self.unknown, guess, self.max_searches, self.notes)

    def value(self, question_id: str) -> float:
        """V* of a question."""
        return self.optimum(self.world.asked[question_id]).value

    def _levels(self, asked: Asked, read: frozenset[int]) -> tuple[Level, ...]:
        """What is stated of each hop; where memory ends, all that may come, with its chance."""
        levels: list[Level] = []
        for entity, relation in zip(_chain(asked, read), asked.relations):
            levels.append(TRUE_SHARE[entity.level] if entity else self._spread(asked.split, RELATIONS[relation].kind))
        return tuple(levels)

    def _spread(self, split: str, kind: str) -> Level:
        counts = Counter(e.level for e in self.world.entities[split][kind])
        return tuple((n / counts.total(), TRUE_SHARE[level]) for level, n in sorted(counts.items()))

    def decisions(self, t: Trajectory) -> list[Decision]:
        """What the policy decided, one after the other."""
        walk = _Walk(self, self.world.asked[t.question.id])
        tools = ("search", self.notes.tool) if self.notes else ("search",)
        calls = [call for call in t.calls if call.tool in tools]
        for call, walk.turn in zip(calls, search_turns(t, tools)):
            walk.search(call)
        asks = [s for s in t.segments if s.by_model and s.kind in tools]
        for s in asks[len(calls) :]:
            walk.turn = s.turn
            walk.waste(s.kind)  # asked for where no search was left
        walk.turn = turn_count(t) - 1
        if t.answer is None:
            walk.end("nothing", 0.0)
        elif normalize_answer(t.answer) == UNKNOWN:
            walk.end(UNKNOWN, self.unknown)
        else:
            walk.trust_up_to(len(walk.asked.relations))
            walk.end(TRUST, None)
        return walk.made


class _Walk:
    """Where a trajectory stands among the optimum's states."""

    def __init__(self, yardstick: Yardstick, asked: Asked):
        self.yardstick, self.asked = yardstick, asked
        self.state, self.made = State(), list[Decision]()
        self.read: frozenset[int] = frozenset()
        self.turn = 0

    def _open(self) -> tuple[Optimum, float | None, dict[str, float]]:
        optimum = self.yardstick.optimum(self.asked, self.read)
        level = None
        if self.state.hop < len(self.asked.relations):
            entity = _chain(self.asked, self.read)[self.state.hop]
            level = TRUE_SHARE[entity.level] if entity else 0.0  # behind a blank that it trusted: nothing is known
        return optimum, level, optimum.act_values(self.state, level)

    def _record(self, act: str, value: float | None = None, found: bool | None = None) -> None:
        _, level, values = self._open()
        value = values.get(act, 0.0) if value is None else value
        self.made.append(Decision(self.state, level, act, values, value, found, self.turn))

    def trust_up_to(self, hop: int) -> None:
        while self.state.hop < hop:
            self._record(TRUST)
            level = self.made[-1].level or 0.0
            self.state = self.state.trusted(level)

    def search(self, call: ToolCall) -> None:
        hop, way = self._meant(call.argument)
        if call.tool != "search":
            way = len(WORDINGS)  # a recall, in whichever wording
        if hop is None or (hop == self.state.hop and way in self.state.tried):
            return self.waste(call.tool)
        self.trust_up_to(hop)
        entity = _chain(self.asked, self.read)[hop]
        found = entity is not None and entity.passage != "" and entity.passage in {h.passage.id for h in call.result}
        optimum = self.yardstick.optimum(self.asked)
        self._record(optimum.ways[way], found=found)
        after = optimum.after_search(self.state, way)
        if found:
            self.read |= {hop}
        self.state = after[0] if found else after[1]

    def waste(self, tool: str = "search") -> None:
        """A search or a recall that changes nothing but the price."""
        optimum, level, values = self._open()
        dearer = self.state.asked(notes=tool != "search")
        value = max(optimum.act_values(dearer, level).values())
        self.made.append(Decision(self.state, level, WASTED, values, value, turn=self.turn))
        self.state = dearer

    def end(self, act: str, value: float | None) -> None:
        self._record(act, value)

    def _meant(self, query: str) -> tuple[int | None, int]:
        """For which hop a query asks, None for none that is left, and in which wording."""
        candidates = []
        chain = _chain(self.asked, self.read)
        for hop in range(self.state.hop, len(chain)):
            entity, relation = chain[hop], RELATIONS[self.asked.relations[hop]]
            tail = relation.query.removeprefix("{s}")
            if query.endswith(tail):
                subject = query.removesuffix(tail)
                whole = entity.subject if entity else subject
                wording = int(len(subject.split()) < len(whole.split()))
                exact = entity is not None and subject in (entity.subject, entity.short)
                candidates.append((not exact, hop, wording))
        return min(candidates)[1:] if candidates else (None, 0)


def _chain(asked: Asked, read: frozenset[int]) -> list[Entity | None]:
    """The entity of each hop: along what was read, else along what is remembered; None where that ends."""
    if asked.other:
        return [asked.start, asked.other]
    chain: list[Entity | None] = []
    entity: Entity | None = asked.start
    for hop, relation in enumerate(asked.relations):
        chain.append(entity)
        facts = (entity.truth if hop in read else entity.memory) if entity else {}
        value = facts.get(RELATIONS[relation].field)
        entity = value if isinstance(value, Entity) else None
    return chain


def hops_found(world: World, t: Trajectory) -> int:
    """For how many hops of its question a trajectory was shown the passage."""
    read = {hit.passage.id for call in t.searches for hit in call.result}
    return sum(entity.passage in read for entity, _ in world.asked[t.question.id].hops() if entity.passage)


def measure_skill(yardstick: Yardstick, trajectories: Iterable[Trajectory], otherwise: Skill | None = None) -> Skill:
    """How well a policy searches and reads, from what it did.

    Wordings, and asking again: the share of its queries that brought the passage. Reading: of the questions with one
    hop whose passage came, the share that was answered rightly.

    Args:
        otherwise: stands in for what was never done; a trained policy has given some ways up.

    Raises:
        ValueError: something was never done, and nothing stands in for it.
    """
    first: tuple[list, list] = ([], [])
    again: tuple[list, list] = ([], [])
    right: list[float] = []
    for t in trajectories:
        made = yardstick.decisions(t)
        for d in made:
            if d.act in WORDINGS:
                (again if d.state.searched_in_vain else first)[WORDINGS.index(d.act)].append(d.found)
        if len(yardstick.world.asked[t.question.id].relations) == 1 and any(d.found for d in made):
            right.append(exact_match(t.answer, t.question.answers))
    seen = [*first, *again, right]
    if not otherwise and not all(seen):
        raise ValueError("the rollouts do not show every way to search: give more, of a policy that tries all")
    before = [*otherwise.found, *otherwise.again, otherwise.read] if otherwise else seen
    shares: list = [fmean(s) if s else b for s, b in zip(seen, before)]
    return Skill((shares[0], shares[1]), (shares[2], shares[3]), shares[4])


def table(yardstick: Yardstick, trajectories: Sequence[Trajectory]) -> list[dict]:
    """One row for each question: its choice regret, reward and V*, means over its rollouts."""
    rows = []
    for id, ts in grouped(trajectories, lambda t: t.question.id).items():
        rows.append(
            {
                "id": id,
                "source": ts[0].question.source,
                "regret": fmean(sum(d.regret for d in yardstick.decisions(t)) for t in ts),
                "reward": fmean(t.reward or 0.0 for t in ts),
                "best": yardstick.value(id),
            }
        )
    return rows


def skill_of(model: str | os.PathLike) -> Skill:
    """How well the model of a folder searches and reads, as it was measured when it was made.

    Raises:
        ValueError: the folder does not say.
    """
    try:
        made = read_json(Path(model) / "skill.json")
        return Skill(tuple(made["found"]), tuple(made["again"]), made["read"])
    except (OSError, TypeError, KeyError, ValueError) as e:
        raise ValueError(
            f"{model} holds no readable skill.json ({e}): only a model of this world can be compared"
        ) from None


def yardstick_of(*, data: str | Path, model: str | os.PathLike, price: float) -> Yardstick | None:
    """The yardstick for questions of a folder, and for policies that began as the model of another.

    Returns:
        None where nobody knows the optimum: ``data`` is no almanac, or of the model no skill was measured.

    Raises:
        ValueError: the almanac is of another version, or the model's skill cannot be read.
    """
    if not (Path(data) / "almanac.json").exists() or not (Path(model) / "skill.json").exists():
        return None
    return Yardstick(world_of(data, "choice regret"), skill_of(model), price, UNKNOWN_PAYS)


def table_of(
    trajectories: Sequence[Trajectory], *, data: str | Path, model: str | os.PathLike, price: float
) -> list[dict] | None:
    """``table`` by the yardstick of ``yardstick_of``, or None with it."""
    yardstick = yardstick_of(data=data, model=model, price=price)
    return table(yardstick, trajectories) if yardstick else None


def by_level(yardstick: Yardstick, trajectories: Iterable[Trajectory]) -> list[dict]:
    """When a policy searches for a hop, and when it should: one row for each level that it states, lowest first.

    Of each hop the first decision counts, before any search for it has failed; a wasted search is a search.

    Returns:
        rows of "level", "n" decisions, and shares of these: "searches", "best" (searching is best), "over" (it searched
        and should not have), "under" (it should have searched and did not).
    """
    made = [d for t in trajectories for d in yardstick.decisions(t) if d.level is not None and not d.state.tried]
    rows = []
    for level, decisions in sorted(grouped(made, lambda d: d.level).items()):
        did = [d.act in (*WORDINGS, WASTED) for d in decisions]
        should = [max(d.values, key=d.values.__getitem__) in WORDINGS for d in decisions]
        pairs = list(zip(did, should))
        over, under = fmean(a and not b for a, b in pairs), fmean(b and not a for a, b in pairs)
        shares = {"searches": fmean(did), "best": fmean(should), "over": over, "under": under}
        rows.append({"level": level, "n": len(decisions), **shares})
    return rows


def by_own_skill(yardstick: Yardstick, trajectories: Sequence[Trajectory]) -> dict:
    """Choice "regret" and V* ("best") by the "skill" that a policy shows, and by what its recalls brought, in place of
    what it began with.
    """
    own = replace(yardstick, skill=measure_skill(yardstick, trajectories, yardstick.skill))
    if own.notes:
        recalls = [bool(d.found) for t in trajectories for d in yardstick.decisions(t) if d.act == RECALL]
        own = replace(own, notes=replace(own.notes, found=fmean(recalls))) if recalls else own
    rows = table(own, trajectories)
    return {"skill": asdict(own.skill)} | {figure: fmean(row[figure] for row in rows) for figure in ("regret", "best")}


def queries(yardstick: Yardstick, trajectories: Iterable[Trajectory]) -> dict[str, float | None]:
    """How a policy asks: of its first queries for a hop the share "full", and that which "found" the passage; of all
    searches the share "wasted"; of the rollouts that searched the share answered "right". None where there are none.
    """
    trajectories = list(trajectories)
    made = [d for t in trajectories for d in yardstick.decisions(t) if d.act in (*WORDINGS, WASTED)]
    rows: list[dict] = [{"wasted": d.act == WASTED} for d in made]
    rows += [{"full": d.act == WORDINGS[0], "found": d.found} for d in made if d.act != WASTED and not d.state.tried]
    rows += [{"right": exact_match(t.answer, t.question.answers)} for t in trajectories if t.searches]
    return {name: mean(rows, name) for name in ("full", "found", "wasted", "right")}


def _always(state: State, level: float | None, values: dict[str, float]) -> dict[str, float]:
    """Searches once for every hop, in the full wording."""
    if level is not None and WORDINGS[0] in values and not state.tried:
        return {WORDINGS[0]: 1.0}
    return _never(state, level, values)


def _never(state: State, level: float | None, values: dict[str, float]) -> dict[str, float]:
    return {UNKNOWN if level == 0 else TRUST: 1.0}


def _blanks_only(state: State, level: float | None, values: dict[str, float]) -> dict[str, float]:
    return (_always if level == 0 else _never)(state, level, values)


def _at_random(state: State, level: float | None, values: dict[str, float]) -> dict[str, float]:
    return {TRUST: 1.0} if level is None else dict.fromkeys(values, 1 / len(values))


#: Policies that a learned one has to beat.
SIMPLE = {
    "always searches": _always,
    "never": _never,
    "where nothing is recalled": _blanks_only,
    "at random": _at_random,
}


def simple_policies(yardstick: Yardstick, ids: Iterable[str]) -> dict[str, float]:
    """Choice regret of the policies of ``SIMPLE``, the mean over questions, exactly."""
    counts = Counter(yardstick.optimum(yardstick.world.asked[id]) for id in ids)
    return {
        name: sum(n * optimum.choice_regret(policy) for optimum, n in counts.items()) / counts.total()
        for name, policy in SIMPLE.items()
    }
