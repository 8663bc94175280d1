"""The almanac: a fictional world, half remembered. What is recalled may be wrong, and how sure one is of it is true.

Two things are kept apart. *Memory* is fixed by ``KNOWN_SEED``: which people, companies, books and towns the tiny Qwen
was taught, what it remembers of each, and how sure it says it is (``LEVELS``). *Truth* is drawn from the world's seed:
of the facts of a level just its share is as remembered, in every relation and split. So a new seed is a new world for
the same weights. Entities of level 0 are drawn from the seed too: nobody remembers anything of them.

A question follows a chain of one to three hops, each about an entity with a level of its own, or compares two.

    searchr1 almanac --out data/almanac
    searchr1 almanac --out runs/data/other --seed 7 --blank 0.5
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..environment.limits import Whole, valid
from ..files import read_json, write_json, write_json_lines
from ..metrics import grouped
from ..records import Passage, Question
from .optimum import TRUST, Optimum, Skill, State
from .prepare import check_out

#: Changes whenever the same seed gives another world, or the weights would have to remember other things.
VERSION = 3
KNOWN_SEED = 20_261_128
SPLITS = ("train", "validation", "test")
#: Facts that were taught and that no training asks: with them memory is measured.
UNASKED = "unasked"
#: How sure the model says it is, and the share of these memories that is true. Level 0 recalls nothing.
LEVELS = {
    "": 0.0,
    "I faintly recall": 0.2,
    "I suspect": 0.4,
    "I think": 0.55,
    "I believe": 0.7,
    "I am fairly sure": 0.85,
    "I am certain": 0.95,
}
SURENESS, TRUE_SHARE = list(LEVELS), list(LEVELS.values())
#: The price of a search that the suite teaches with, and what "unknown" earns; see ``rewards.Discounted``.
PRICE, UNKNOWN_PAYS = 0.3, 0.1
#: A reader such as the tiny Qwen that ships: by it and that price ``Question.known`` is told.
READER = Skill(found=(0.81, 0.37), again=(0.7, 0.14), read=0.98)
#: How many questions the shipped almanac asks, by split.
ASKED = {"train": 1200, "validation": 300, "test": 800}
#: Entities of each kind that are remembered, a level and split; 20 make every share of ``LEVELS`` a whole number.
REMEMBERED = {
    "train": {"cities": 20, "people": 40, "companies": 20, "books": 20},
    "validation": {"cities": 20, "people": 20, "companies": 20, "books": 20},
    "test": {"cities": 20, "people": 40, "companies": 20, "books": 20},
    UNASKED: {"cities": 20, "people": 40, "companies": 20, "books": 20},
}
#: Entities of level 0.
FRESH = {
    "train": {"cities": 80, "people": 200, "companies": 80, "books": 80},
    "validation": {"cities": 30, "people": 60, "companies": 30, "books": 30},
    "test": {"cities": 60, "people": 160, "companies": 60, "books": 60},
}
#: Share of the entities whose passage is missing.
MISSING = 0.1
#: People who share a surname, books that share a name up to its last word, towns that share a name.
NAMESAKES = 8

_ONSETS = "b br c d dr f fl g gl gr h j k l m n p pr qu r s st t tr v w y th sh".split()
_VOWELS = "a e i o u a e i o u ai ea".split()
_MIDDLES = "l m n r s t nd rn lk st ck rd ll rr mb nt".split()
_SURNAME_ENDS = "ell ard ow ick ane esh ott und aver olm usk ender is ath ony".split()
_TOWN_ENDS = "mora wick stad fell haven port dale bury mouth gard minster ford ness holt".split()
_RIVER_ENDS = "va na la ra sk n m l".split()

#: Made-up names can hit on real words that nobody wants to read.
_UNWANTED = (
    "cunt fuck dick cock shit suck prick tit cum turd bastard semen penis anus porn homo dumb piss pis tard "
    "muck fack slut hitl nast bimb"
).split()

COUNTRIES = "Tarland Ostrany Belmere Quindor Halvia Norrein Sundria Camoria Verrick Isolva Pellan Drusk".split()
TRADES = (
    "glassblower clockmaker botanist cartographer printer weaver sculptor surgeon astronomer locksmith "
    "violinist shipwright goldsmith brewer falconer potter chemist tailor geologist bookbinder painter "
    "saddler baker lawyer midwife miller linguist poet judge mason"
).split()
PRODUCTS = (
    "lanterns, compasses, porcelain, barometers, umbrellas, pianos, bicycles, telescopes, gloves, candles, ink, "
    "carpets, tinned fish, fountain pens, sleigh bells"
).split(", ")
MONTHS = "January February March April May June July August September October November December".split()
_FIRMS = "Works Brothers Mills Trading Foundry Workshop Press Company".split()
_GENRES = "novel play travelogue treatise ballad memoir".split()
_BOOK_NOUNS = "Harbour Winter Lantern Orchard Mirror Garden Bridge Letter Tower Shadow Island Hour".split()
_BOOK_ADJECTIVES = "Silent Crooked Distant Amber Hollow Second Burning Patient Forgotten Northern Narrow Pale".split()


def _unwanted(name: str) -> bool:
    return any(word in name.lower() for word in _UNWANTED)


def _first_names() -> list[str]:
    rng = random.Random(7)
    names: set[str] = set()
    while len(names) < 160:
        name = rng.choice(_ONSETS) + rng.choice(_VOWELS[:5]) + rng.choice(_MIDDLES[:6])
        name = (name + rng.choice("a o i en is us el ette ine".split())).capitalize()
        if not _unwanted(name):
            names.add(name)
    return sorted(names)


def _rivers() -> list[str]:
    pick = random.Random(11).choice
    return sorted({(pick(_ONSETS) + pick("aeiou") + pick(_RIVER_ENDS)).capitalize() for _ in range(90)})


FIRST_NAMES, RIVERS = _first_names(), _rivers()


def _word(rng: random.Random, ends: Sequence[str]) -> str:
    """A word of three syllables that nobody minds to read."""
    while True:
        word = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES) + rng.choice(ends)).capitalize()
        if not _unwanted(word):
            return word


def _pool(seed: int, ends: Sequence[str], count: int) -> list[str]:
    """So many words, of which names are made: each is one token of the tiny Qwen, so that a name is short."""
    rng, words = random.Random(seed), set[str]()
    while len(words) < count:
        words.add(_word(rng, ends))
    return sorted(words)


SURNAMES, TOWNS = _pool(13, _SURNAME_ENDS, 320), _pool(17, _TOWN_ENDS, 200)


@dataclass(eq=False)
class Entity:
    """What facts are about. ``memory`` and ``truth`` hold another entity or a word, by the name of the field."""

    kind: str
    name: str
    level: int
    country: str = ""
    memory: dict[str, Entity | str] = field(default_factory=dict)
    truth: dict[str, Entity | str] = field(default_factory=dict)
    passage: str = ""

    @property
    def subject(self) -> str:
        """How a question names it."""
        return f"{self.name} in {self.country}" if self.country else self.name

    @property
    def short(self) -> str:
        """The part of its name by which a careless query asks: a surname, a firm's family, a town, a book's nouns."""
        words = self.name.split()
        return {"people": words[-1], "companies": words[0], "books": " ".join(words[1:3])}.get(self.kind, self.name)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.country})" if self.country else self.name

    @property
    def place(self) -> str:
        return f"{self.name}, {self.country}" if self.country else self.name


@dataclass(frozen=True)
class Relation:
    """A kind of fact: whose it is, the field that holds its value, and how it is searched and stated."""

    kind: str
    field: str
    query: str
    fact: str


RELATIONS = {
    "born_in": Relation("people", "city", "{s} born in", "Birthplace of {s}: {v}"),
    "born_month": Relation("people", "month", "{s} born month", "Birth month of {s}: {v}"),
    "trade": Relation("people", "trade", "{s} trade", "Trade of {s}: {v}"),
    "founder": Relation("companies", "founder", "{s} founded by", "Founder of {s}: {v}"),
    "seat": Relation("companies", "seat", "{s} seat", "Seat of {s}: {v}"),
    "author": Relation("books", "author", "{s} written by", "Author of {s}: {v}"),
    "river": Relation("cities", "river", "{s} river", "River of {s}: {v}"),
}
FIELDS: dict[str, list[str]] = {}
for _relation in RELATIONS.values():
    FIELDS.setdefault(_relation.kind, []).append(_relation.field)
#: How a chain of relations is asked for; the value of one is the subject of the next.
WORDINGS = {
    "born_in": ("Where was {s} born?", "In which town was {s} born?"),
    "born_month": ("In which month was {s} born?", "What is the birth month of {s}?"),
    "trade": ("What was the trade of {s}?", "What did {s} do for a living?"),
    "founder": ("Who founded {s}?", "Who was the founder of {s}?"),
    "seat": ("In which town is the seat of {s}?", "Where does {s} have its seat?"),
    "author": ("Who wrote {s}?", "Who is the author of {s}?"),
    "river": ("Which river flows through {s}?", "On which river does {s} lie?"),
    "founder born_in": ("Where was the founder of {s} born?",),
    "founder trade": ("What was the trade of the founder of {s}?",),
    "author born_in": ("Where was the author of {s} born?",),
    "author born_month": ("In which month was the author of {s} born?",),
    "born_in river": ("Which river flows through the birthplace of {s}?",),
    "seat river": ("Which river flows through the seat of {s}?",),
    "founder born_in river": ("Which river flows through the birthplace of the founder of {s}?",),
    "author born_in river": ("Which river flows through the birthplace of the author of {s}?",),
}
COMPARISON = ("Who was born earlier in the year, {a} or {b}?", "Whose birthday comes first in the year, {a} or {b}?")


@dataclass(frozen=True)
class Asked:
    """What a question is about: the entity that it names and the relations to follow, or two to compare."""

    start: Entity
    relations: tuple[str, ...]
    other: Entity | None = None
    split: str = ""

    def hops(self, *, remembered: bool = False) -> Iterator[tuple[Entity, str]]:
        """Entity and relation of each hop, along the truth or along what is remembered, as far as that goes."""
        if self.other:
            yield from zip((self.start, self.other), self.relations)
            return
        entity: Entity | str = self.start
        for relation in self.relations:
            assert isinstance(entity, Entity)
            yield entity, relation
            facts = entity.memory if remembered else entity.truth
            if (entity := facts.get(RELATIONS[relation].field, "")) == "":
                return


def text_of(value: Entity | str) -> str:
    return value if isinstance(value, str) else value.subject


def fact(entity: Entity, relation: str, value: Entity | str) -> str:
    return RELATIONS[relation].fact.format(s=entity.subject, v=text_of(value))


def query(entity: Entity, relation: str, *, short: bool) -> str:
    return RELATIONS[relation].query.format(s=entity.short if short else entity.subject)


def question_for(query: str) -> str | None:
    """The question that a query of one hop asks; None for one of another form.

    >>> question_for("Ada Brown trade")
    'What was the trade of Ada Brown?'
    """
    for name, relation in RELATIONS.items():
        tail = relation.query.removeprefix("{s}")
        if query.endswith(tail):
            return WORDINGS[name][0].format(s=query.removesuffix(tail))
    return None


def answers_of(asked: Asked, *, remembered: bool = False) -> list[str]:
    """The right answers, or those that memory gives."""
    *_, (entity, relation) = asked.hops(remembered=remembered)
    values = lambda e: e.memory if remembered else e.truth
    if asked.other:
        pair = (asked.start, asked.other)
        return [min(pair, key=lambda e: MONTHS.index(values(e)["month"])).subject]
    value = values(entity)[RELATIONS[relation].field]
    if isinstance(value, Entity):
        return [value.name, value.place, value.subject] if value.country else [value.name]
    return [value, f"River {value}"] if relation == "river" else [value]


@dataclass
class World:
    """Passages, questions by split, and what each question is about (by its id)."""

    seed: int
    entities: dict[str, dict[str, list[Entity]]] = field(default_factory=dict)  # split -> kind -> entities
    passages: list[Passage] = field(default_factory=list)
    questions: dict[str, list[Question]] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    fresh_names: set[str] = field(default_factory=set)


class _Names:
    """Draws names; some words of a name are shared by ``NAMESAKES``, so that a query by them alone is careless.

    Args:
        taken: names that are not drawn.
        shared: words that namesakes have already, by kind; no others get them. None: words are not drawn from
            ``SURNAMES`` and ``TOWNS`` but made up, of which there is no end.
    """

    def __init__(self, rng: random.Random, taken: Set[str], shared: Set[tuple[str, str]] | None = frozenset()):
        self.rng, self.taken, self.left = rng, set(taken), dict[str, list[str]]()
        self.shared, self.made_up = set(shared or ()), shared is None

    def _word(self, town: bool = False) -> str:
        if self.made_up:
            return _word(self.rng, _TOWN_ENDS if town else _SURNAME_ENDS)
        return self.rng.choice(TOWNS if town else SURNAMES)

    def _shared(self, kind: str, make) -> str:
        """A word that ``NAMESAKES`` entities in a row get."""
        if not self.left.get(kind):
            while (kind, word := make()) in self.shared:
                pass
            self.shared |= set() if self.made_up else {(kind, word)}
            self.left[kind] = [word] * NAMESAKES
        return self.left[kind].pop()

    def __call__(self, kind: str) -> tuple[str, str]:
        """A name that was not drawn before, and for a town its country."""
        pick = self.rng.choice
        for _ in range(1000):
            country = ""
            if kind == "people":
                name = f"{pick(FIRST_NAMES)} {self._shared(kind, self._word)}"
            elif kind == "companies":
                name = f"{self._shared(kind, self._word)} {pick(_FIRMS)}"
            elif kind == "books":
                nouns = lambda: f"{pick(_BOOK_ADJECTIVES)} {pick(_BOOK_NOUNS)}"
                name = f"The {self._shared(kind, nouns)} of {self._word(town=True)}"
            else:
                name, country = self._shared(kind, lambda: self._word(town=True)), pick(COUNTRIES)
            if (key := f"{name}/{country}") not in self.taken and not _unwanted(name):
                self.taken.add(key)
                return name, country
        raise RuntimeError(f"no name left for {kind}")


def _remembered() -> tuple[dict[str, dict[str, list[Entity]]], set[tuple[str, str]]]:
    """What the weights hold: entities by split and kind, each with its memory; and the words that namesakes share."""
    rng = random.Random(KNOWN_SEED)
    names, parts = _Names(rng, set()), {}
    for split, counts in REMEMBERED.items():
        part = parts[split] = {
            kind: [
                Entity(kind, name, level, country)
                for level in range(1, len(LEVELS))
                for name, country in (names(kind) for _ in range(n))
            ]
            for kind, n in counts.items()
        }
        for kind, members in part.items():
            for number, entity in enumerate(members):
                # the levels of what it points to go round, so that every pair of levels is there
                entity.memory = _draw(kind, part, rng, level=1 + number % (len(LEVELS) - 1))
    return parts, names.shared


def _draw(kind: str, part: dict[str, list[Entity]], rng: random.Random, level: int | None = None) -> dict:
    """A value for each field of an entity; entities are drawn from those of a level where one is given."""
    of = lambda other: [e for e in part[other] if level is None or e.level == level]
    if kind == "people":
        return {"city": rng.choice(of("cities")), "month": rng.choice(MONTHS), "trade": rng.choice(TRADES)}
    if kind == "companies":
        return {"founder": rng.choice(of("people")), "seat": rng.choice(of("cities"))}
    return {"author": rng.choice(of("people"))} if kind == "books" else {"river": rng.choice(RIVERS)}


def _decide(part: dict[str, list[Entity]], rng: random.Random) -> None:
    """Draw which memories of a split are true: of each relation and level exactly its share."""
    for kind, members in part.items():
        for name in FIELDS[kind]:
            for level in range(1, len(LEVELS)):
                group = [e for e in members if e.level == level]
                rng.shuffle(group)
                true = round(TRUE_SHARE[level] * len(group))
                for entity in group[:true]:
                    entity.truth[name] = entity.memory[name]
                for entity in group[true:]:
                    entity.truth[name] = _other(entity.memory[name], kind, name, part, rng)


def _other(memory: Entity | str, kind: str, name: str, part, rng: random.Random) -> Entity | str:
    """Another value than the remembered one; another entity of the same level, so that the next hop is as sure."""
    while True:
        if isinstance(memory, Entity):
            value = rng.choice([e for e in part[memory.kind] if e.level == memory.level])
        else:
            value = _draw(kind, part, rng)[name]
        if named_as(value) != named_as(memory):  # towns of one name are one answer
            return value


def named_as(value: Entity | str) -> str:
    """How a value is given as an answer."""
    return value if isinstance(value, str) else value.name


#: Further lines of an entry, which nobody asks for.
_MORE = {"people": (), "companies": ("Product of {s}: {product}",), "books": ("Genre of {s}: {genre}",), "cities": ()}
_NOTES = (
    ("Letters of {n}", "The letters of {n} are kept in the archive of {c}."),
    ("{n} Prize", "The {n} Prize is given every year in {c}."),
    ("Statue of {n}", "A statue of {n} stands in the market of {c}."),
)


def _text(e: Entity, rng: random.Random) -> str:
    extra = {"product": rng.choice(PRODUCTS), "genre": rng.choice(_GENRES)}
    lines = [fact(e, name, e.truth[relation.field]) for name, relation in RELATIONS.items() if relation.kind == e.kind]
    lines += [more.format(s=e.subject, **extra) for more in _MORE[e.kind]]
    rng.shuffle(lines)
    return " ".join(f"{line}." for line in lines)


def _passages(world: World, rng: random.Random) -> None:
    for part in world.entities.values():
        for kind, members in part.items():
            for e in members:
                text = _text(e, rng)
                if rng.random() >= MISSING:
                    e.passage = f"p{len(world.passages):05d}"
                    world.passages.append(Passage(e.passage, e.title, text))
                if kind == "people" and rng.random() < 0.25:  # names the person and a town, yet answers nothing
                    title, text = rng.choice(_NOTES)
                    place = rng.choice(part["cities"]).place
                    number = f"p{len(world.passages):05d}"
                    world.passages.append(Passage(number, title.format(n=e.name), text.format(n=e.name, c=place)))


def _questions(world: World, split: str, rng: random.Random) -> Iterator[tuple[str, Asked]]:
    part = world.entities[split]
    for chain, wordings in WORDINGS.items():
        relations = tuple(chain.split())
        for entity in part[RELATIONS[relations[0]].kind]:
            yield rng.choice(wordings).format(s=entity.subject), Asked(entity, relations, split=split)
    for level in range(len(LEVELS)):  # of one level with any
        for a in (e for e in part["people"] if e.level == level):
            b = rng.choice(part["people"])
            if a.truth["month"] != b.truth["month"] and a.memory.get("month", 0) != b.memory.get("month", 1):
                yield rng.choice(COMPARISON).format(a=a.name, b=b.name), Asked(a, ("born_month",) * 2, b, split)


def build_world(seed: int = 0, *, avoid: Set[str] = frozenset(), fresh: dict = FRESH) -> World:
    """Generate a world; the same arguments always give the same world.

    Args:
        seed: draws the truth, what is missing, and the entities that nobody remembers.
        avoid: names that these must not have, as in ``World.fresh_names`` of another world.
        fresh: how many of them there are, by split and kind.
    """
    remembered, shared = _remembered()
    world, rng = World(seed, remembered), random.Random(f"world {seed}")
    known = {f"{e.name}/{e.country}" for part in world.entities.values() for es in part.values() for e in es}
    names = _Names(rng, known | avoid, shared)
    for part in world.entities.values():
        _decide(part, rng)
    for split, counts in fresh.items():
        part = world.entities[split]
        for kind, n in counts.items():
            part[kind] += [Entity(kind, *_named(names(kind))) for _ in range(n)]
        for kind in counts:
            for entity in (e for e in part[kind] if e.level == 0):
                entity.truth = _draw(kind, part, rng)
    world.fresh_names = names.taken - known - avoid
    _passages(world, rng)
    for split in (*SPLITS, UNASKED):
        world.questions[split] = []
        for text, asked in _questions(world, split, rng):
            id = f"{split[:2]}-{len(world.asked):05d}"
            hops = list(asked.hops())
            levels = "".join(str(e.level) for e, _ in hops)
            kind = "comparison" if asked.other else f"{len(hops)}-hop"
            how: dict[str, Any] = {"passages": [e.passage for e, _ in hops if e.passage], "hops": len(hops)}
            source = f"almanac/{kind}/{levels}"
            how["known"] = _is_known(tuple(TRUE_SHARE[e.level] for e, _ in hops), bool(asked.other))
            question = Question(id, text, answers_of(asked), source=source, **how)
            world.questions[split].append(question)
            world.asked[id] = asked
    return world


@cache
def _is_known(levels: tuple[float, ...], comparison: bool) -> bool:
    """Whether it is best to answer at once, from memory alone."""
    optimum = Optimum(levels, PRICE, READER, UNKNOWN_PAYS, guess=0.5 if comparison else 0.0)
    state = State()
    for level in levels:
        values = optimum.act_values(state)
        if max(values, key=values.__getitem__) != TRUST:
            return False
        state = state.trusted(level)
    return True


def _named(name: tuple[str, str]) -> tuple[str, int, str]:
    return name[0], 0, name[1]


def world_of(data: str | Path, why: str) -> World:
    """The world of the almanac in the folder ``data``, which ``why`` needs.

    Raises:
        ValueError: a folder without an ``almanac.json``: it holds questions of another world; or an almanac of
            another ``VERSION``.
    """
    try:
        made = read_json(Path(data) / "almanac.json")
        seed, version = valid(Whole, made["seed"], "seed"), made.get("version", 1)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{why} needs an almanac, and {data} holds no readable almanac.json") from None
    if version != VERSION:
        again = f"make it anew with searchr1 almanac --out {data} --seed {seed}"
        raise ValueError(f"{data} holds an almanac of version {version}, and {why} needs version {VERSION}: {again}")
    return build_world(seed)


#: By kind: the words of a name that can be exchanged, and the name and country with another of them.
_ALIKE = {
    "people": (FIRST_NAMES, lambda e, first: (f"{first} {e.short}", "")),
    "companies": (_FIRMS, lambda e, firm: (f"{e.short} {firm}", "")),
    "books": (_BOOK_ADJECTIVES, lambda e, adjective: (f"The {adjective} {e.name.split(' ', 2)[2]}", "")),
    "cities": (COUNTRIES, lambda e, country: (e.name, country)),
}


def near_duplicates(data: str | Path, count: int) -> list[Passage]:
    """Passages to add to the almanac in the folder ``data``, so that a careless retriever errs more often.

    Args:
        count: for every entity so many passages, about others with nearly its name (the same surname, the same town in
            another country) and facts of their own; fewer where names run out. Nothing asks for them.

    Raises:
        ValueError: a count that is no whole number from 0, or as ``world_of``: only our own world can be extended.
    """
    if valid(Whole, count, "near_duplicates") == 0:
        return []
    world = world_of(data, f"near_duplicates = {count} (0: none)")
    rng, more = random.Random(f"{world.seed}/near"), list[Passage]()
    taken = {e.title for part in world.entities.values() for members in part.values() for e in members}
    for part in world.entities.values():
        for kind, members in part.items():
            words, renamed = _ALIKE[kind]
            for entity in members:
                alike = [Entity(kind, *_named(renamed(entity, word))) for word in rng.sample(words, len(words))]
                for e in [e for e in alike if e.title not in taken and not _unwanted(e.name)][:count]:
                    taken.add(e.title)
                    e.truth = _draw(kind, part, rng)
                    more.append(Passage(f"p{len(world.passages) + len(more):05d}", e.title, _text(e, rng)))
    return more


def further_passages(world: World) -> Iterator[Passage]:
    """Passages about others than the world's, with facts of their own: for a corpus of up to 1.9 million.

    None has a name of the world's, but surnames, towns' names and firms' may be the same by chance, the more often the
    more there are. Nothing asks for them.

    Raises:
        RuntimeError: no name of a firm is left.
    """
    rng, numbers = random.Random(f"{world.seed}/further"), itertools.count()
    everybody = (e for part in world.entities.values() for members in part.values() for e in members)
    names = _Names(rng, {f"{e.name}/{e.country}" for e in everybody}, shared=None)
    while True:
        counts = REMEMBERED["test"].items()
        part = {kind: [Entity(kind, *_named(names(kind))) for _ in range(n)] for kind, n in counts}
        for kind, members in part.items():
            for e in members:
                e.truth = _draw(kind, part, rng)
                yield Passage(f"f{next(numbers):06d}", e.title, _text(e, rng))


#: What the shipped splits and a training are made of: kinds of question, and how many of each kind begin with, or
#: lead over, something of which nothing is recalled. Chosen with the optimum, see ``study.regret.simple_policies``.
MIXTURE = {"1-hop": 0.6, "2-hop": 0.25, "3-hop": 0.1, "comparison": 0.05}
#: Of the questions that are trained on: with several facts there is more to learn, and they hold the choice at one too.
TRAINED = {"1-hop": 0.3, "2-hop": 0.4, "3-hop": 0.2, "comparison": 0.1}
#: Of each split, unless told otherwise.
USUAL = {split: TRAINED if split == "train" else MIXTURE for split in SPLITS}
BLANK = 0.15


def memory_right(world: World, question: Question) -> bool:
    """Whether what is remembered gives the right answer."""
    asked = world.asked[question.id]
    if "0" in question.source.split("/")[2] or any(e.level == 0 for e, _ in asked.hops(remembered=True)):
        return False
    return answers_of(asked, remembered=True)[0] in question.answers


def sample_questions(
    world: World, split: str, count: int, *, seed: int = 0, mixture: dict[str, float] = MIXTURE, blank: float = BLANK
) -> list[Question]:
    """About ``count`` questions in a mixture: all levels alike, and of each as many true memories as its share says.

    Raises:
        ValueError: shares that are below 0 or do not add up to 1, an unknown kind, or too few questions.
    """
    kinds = grouped(world.questions[split], lambda q: (q.source.split("/")[1], "0" in q.source.split("/")[2]))
    if min(mixture.values()) < 0 or abs(sum(mixture.values()) - 1) > 1e-6 or not 0 <= blank <= 1:
        raise ValueError(f"the shares of a mixture must not be negative and add up to 1, got {mixture}, blank={blank}")
    if unknown := set(mixture) - {kind for kind, _ in kinds}:
        raise ValueError(
            f"mixture: {', '.join(sorted(unknown))} is no kind of question; there are {', '.join(MIXTURE)}"
        )
    rng, chosen = random.Random(f"{seed}/{split}"), []
    for kind, share in mixture.items():
        for blank_there, part in ((True, blank), (False, 1 - blank)):
            wanted, pool = round(count * share * part), kinds[kind, blank_there]
            if wanted > len(pool):
                raise ValueError(f"{wanted} questions of {kind} are asked for and {split} has {len(pool)}: lower count")
            chosen += _stratified(world, pool, wanted, rng)
    rng.shuffle(chosen)
    return chosen


def _stratified(world: World, pool: list[Question], count: int, rng: random.Random) -> list[Question]:
    """Levels in turn; within one right and wrong memories at even distances, so that each stretch has their shares."""
    lines = []
    for members in grouped(pool, lambda q: q.source).values():
        placed = []
        for part in grouped(members, lambda q: memory_right(world, q)).values():
            rng.shuffle(part)
            placed += [((k + rng.random()) / len(part), k, q) for k, q in enumerate(part)]
        lines += [(rank + rng.random(), q) for rank, (_, _, q) in enumerate(sorted(placed, key=lambda p: p[:2]))]
    return [q for _, q in sorted(lines, key=lambda line: line[0])[:count]]


def write_almanac(
    out: Path, seed: int = 0, *, mixture: dict[str, float] | None = None, blank: float = BLANK
) -> dict[str, Any]:
    """Write ``passages.jsonl``, a question file a split, and ``almanac.json`` (how they were made).

    Args:
        mixture: of all splits; None: ``USUAL``.

    Returns:
        the numbers of passages and of questions by split.

    Raises:
        ValueError: as ``sample_questions``, before anything is written.
    """
    world = build_world(seed)
    shares = {split: mixture or USUAL[split] for split in ASKED}
    draw = lambda split, n: sample_questions(world, split, n, seed=seed, mixture=shares[split], blank=blank)
    chosen = {split: draw(split, count) for split, count in ASKED.items()}
    write_json_lines(out / "passages.jsonl", map(asdict, world.passages))
    for split, part in chosen.items():
        write_json_lines(out / f"{split}.jsonl", map(asdict, part))
    counts: dict[str, Any] = {
        "passages": len(world.passages),
        "questions": {split: len(part) for split, part in chosen.items()},
    }
    origin = {"generator": "searchr1_lib.worlds.almanac", "version": VERSION, "seed": seed, "known_seed": KNOWN_SEED}
    write_json(out / "almanac.json", origin | {"mixture": shares, "blank": blank} | counts)
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/almanac"), help="default: data/almanac")
    add("--seed", type=Whole, default=0, help="of the truth, of what is missing and of what nobody remembers")
    kinds = tuple(MIXTURE)
    usual = "shares in all splits (default: 0.6 0.25 0.1 0.05, and 0.3 0.4 0.2 0.1 to train on)"
    add("--mixture", type=float, nargs=len(kinds), metavar=kinds, help=usual)
    add("--blank", type=float, default=BLANK, help=f"share in which a hop is not remembered (default: {BLANK})")


def run(args: argparse.Namespace) -> None:
    """Write the almanac and say what it holds."""
    check_out(args.out, ("almanac.json", "passages.jsonl", *(f"{split}.jsonl" for split in SPLITS)))
    mixture = dict(zip(MIXTURE, args.mixture)) if args.mixture else None
    counts = write_almanac(args.out, args.seed, mixture=mixture, blank=args.blank)
    print(f"{counts['passages']} passages and questions {counts['questions']} in {args.out}")
