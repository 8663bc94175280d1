"""Demonstrations on the half-known world (worlds/halfknown.py): to state what is recalled and how sure, to act by a
coin at every decision, to read on to the end. WIP: becomes study/warmstart.py."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from ..environment import protocol
from ..records import Passage
from ..worlds.almanac import MONTHS
from ..worlds.halfknown import RELATIONS, SPLITS, SURENESS, UNASKED, Asked, Entity, World, answers_of, fact, query, text_of
from .warmstart import Piece

#: How often a demonstration searches at a decision, by the level of the least sure memory that it rests on. The coin
#: is bent up and down by turns, so that the act listens to the level and no direction is the right one.
COIN = (0.62, 0.38, 0.62, 0.38, 0.62, 0.38, 0.62)
UNKNOWN = 0.25  # of the acts that are no search


@dataclass
class Thought:
    """What is known so far along one chain."""

    entity: Entity
    relation: str
    value: Entity | str | None = None
    level: int = 0  # of the memory; what was read has none
    read: bool = False


def recollect(entity: Entity, relation: str) -> tuple[str, Entity | str | None]:
    """The sentence about a fact, and what is remembered of it."""
    value = entity.memory.get(RELATIONS[relation].field)
    if value is None:
        return f"I recall nothing about {entity.subject}.", None
    return f"{fact(entity, relation, value)}, {SURENESS[entity.level]}.", value


def episode(asked: Asked, rng: random.Random) -> Generator[str, list[Passage], list[Piece]]:
    """One demonstration: yields queries, is sent what the engine returned, returns its pieces."""
    pieces: list[Piece] = []
    sentences: list[str] = []
    chain: list[Thought] = []
    relations = ("born_month", "born_month") if asked.other else asked.relations

    def extend(entity: Entity | str | None) -> None:
        """Recollect from the end of the chain on, as far as memory goes."""
        while len(chain) < len(relations) and isinstance(entity, Entity):
            relation = relations[len(chain)]
            sentence, value = recollect(entity, relation)
            sentences.append(sentence)
            chain.append(Thought(entity, relation, value, entity.level))
            entity = asked.other if asked.other and len(chain) == 1 else value

    def restart(number: int, value: Entity | str) -> None:
        """What was read takes the place of what was remembered, and of all that followed from it."""
        thought = chain[number]
        thought.value, thought.read = value, True
        sentences.append(f"{fact(thought.entity, thought.relation, value)}, it says.")
        if not asked.other:
            del chain[number + 1 :]
            extend(value)

    extend(asked.start)
    tried: dict[int, list[bool]] = {}
    failed = 0
    while True:
        complete = len(chain) == len(relations) and all(t.value is not None for t in chain)
        if complete and asked.other:
            first = min(chain, key=lambda t: MONTHS.index(str(t.value)))
            sentences.append(f"{first.value} comes first.")
            answer = first.entity.subject
        elif complete:
            answer = _short(chain[-1].value)
        open_hops = [i for i, t in enumerate(chain) if not t.read and len(tried.get(i, ())) < 2]
        blank = [i for i, t in enumerate(chain) if t.value is None]
        if blank:  # a hop of which nothing is recalled comes first: nothing else can be done for it
            open_hops = [i for i in open_hops if i in blank]
        weakest = min((t.level for t in chain if not t.read), default=None)
        search = bool(open_hops) and weakest is not None and rng.random() < (0.5 if failed else COIN[weakest])
        if search:
            number = rng.choice(open_hops)
            short = not tried[number][0] if number in tried else rng.random() < 0.5
            tried.setdefault(number, []).append(short)
            words = query(chain[number].entity, chain[number].relation, short=short)
            pieces.append(Piece(_turn(sentences, "search", words), "model"))
            sentences.clear()
            passages = yield words
            pieces.append(Piece(protocol.observation(passages), "environment"))
            entity = chain[number].entity
            if entity.passage and entity.passage in {p.id for p in passages}:
                restart(number, entity.truth[RELATIONS[chain[number].relation].field])
            else:
                failed += 1
                sentences.append(f"Nothing here about {entity.subject}.")
            continue
        sure = complete and all(t.read for t in chain)
        say = answer if complete and (sure or rng.random() >= UNKNOWN) else "unknown"
        return [*pieces, Piece(_turn(sentences, "answer", say), "model")]


def _short(value) -> str:
    if isinstance(value, Entity):
        return value.name
    return value.split()[-1] if value.startswith(("a ", "an ")) else value


def _turn(sentences: list[str], act: str, words: str) -> str:
    return f"<think> {' '.join(sentences)} </think>\n<{act}> {words} </{act}>"


def demonstrations(world: World, rng: random.Random, count: int, sets=(*SPLITS,)) -> Iterator[tuple[str, list[Piece]]]:
    """``count`` demonstrations on one world; what a real BM25 engine returns, 1 to 5 documents a search."""
    from ..search.bm25 import BM25Search

    engine = BM25Search(world.passages)
    kinds: dict[tuple[str, bool], list] = {}
    for split in sets:
        for q in world.questions[split]:
            _, kind, levels = q.source.split("/")
            kinds.setdefault((kind, "0" in levels), []).append(q)
    weights = {"1-hop": 0.35, "2-hop": 0.3, "3-hop": 0.2, "comparison": 0.15}
    names = list(kinds)
    drawn = [rng.choice(kinds[key]) for key in rng.choices(names, [weights[kind] / 2 for kind, _ in names], k=count)]
    running = []
    done: list[tuple[str, list[Piece]]] = []
    for q in drawn:
        play, k = episode(world.asked[q.id], rng), rng.choice((1, 2, 3, 3, 4, 5))
        try:
            running.append((q, play, k, next(play)))
        except StopIteration as end:
            done.append((q.text, end.value))
    while running:
        found = engine.search_batch([words for *_, words in running], k=5)
        still = []
        for (q, play, k, _), hits in zip(running, found):
            try:
                still.append((q, play, k, play.send([h.passage for h in hits[:k]])))
            except StopIteration as end:
                done.append((q.text, end.value))
        running = still
    rng.shuffle(done)
    yield from done


def drills(world: World, rng: random.Random) -> Iterator[str]:
    """Questions and what is recalled, without any act: every taught fact once, in random order. Cheap to repeat."""
    from ..worlds.halfknown import WORDINGS

    lines = []
    for split in (*SPLITS, UNASKED):
        for kind, members in world.entities[split].items():
            for name, relation in RELATIONS.items():
                if relation.kind == kind:
                    lines += [
                        f"{rng.choice(WORDINGS[name]).format(s=e.subject)} {recollect(e, name)[0]}"
                        for e in members
                        if e.level
                    ]
    rng.shuffle(lines)
    return iter(lines)
