"""The almanac: a fictional world whose facts exist nowhere else, so what a model knows is ours to decide.

A world has two parts. The *known* part (people, companies, books) is the same for every seed: it is what
the tiny Qwen is taught. The *look-up* part is drawn from the seed: its facts stand only in passages.
``build_world(0)`` is the shipped almanac; the warm start trains on other seeds, whose names never meet
those of the shipped one.

Every question follows a chain of ``Hop``s (one for a plain fact, two for a bridge or a comparison), which
tells the warm start what to search for and what to conclude.

    searchr1 almanac --out data/almanac
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..files import read_json, write_json, write_json_lines
from ..metrics import grouped
from ..records import Passage, Question
from .prepare import check_out

KNOWN_SEED = 20_250_301
SPLITS = ("train", "validation", "test")
#: How many questions the shipped almanac asks of each part (known, look-up), by split.
ASKED = {"train": 300, "validation": 50, "test": 150}

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


@dataclass(frozen=True)
class Entity:
    """What facts are about: ``subject`` in questions, ``title`` over its passage."""

    name: str
    subject = title = property(lambda self: self.name)


@dataclass(frozen=True)
class City(Entity):
    country: str
    river: str
    subject = property(lambda self: f"{self.name} in {self.country}")
    title = property(lambda self: f"{self.name} ({self.country})")
    place = property(lambda self: f"{self.name}, {self.country}")


@dataclass(frozen=True)
class Person(Entity):
    city: City
    trade: str  # with its article
    month: str  # of birth


@dataclass(frozen=True)
class Company(Entity):
    founder: Person
    city: City
    product: str


@dataclass(frozen=True)
class Book(Entity):
    author: Person
    year: int
    genre: str


class Relation(NamedTuple):
    """A kind of fact: the entity's field that holds the value, and how the fact is searched and stated.

    In the texts ``{s}`` is the subject and ``{v}`` the value.
    """

    field: str
    query: str
    fact: str


RELATIONS = {
    "born_in": Relation("city", "{s} born in", "{s} was born in {v}"),
    "born_month": Relation("month", "{s} born month", "{s} was born in the month of {v}"),
    "trade": Relation("trade", "{s} trade", "{s} worked as {v}"),
    "founder": Relation("founder", "{s} founded by", "{s} was founded by {v}"),
    "seat": Relation("city", "{s} seat", "{s} has its seat in {v}"),
    "author": Relation("author", "{s} written by", "{s} was written by {v}"),
    "river": Relation("river", "{s} river", "{s} lies on the {v}"),
}
#: How a chain of relations is asked for; the value of one is the subject of the next.
WORDINGS = {
    "born_in": ("Where was {s} born?", "In which town was {s} born?", "What is the birthplace of {s}?"),
    "born_month": ("In which month was {s} born?", "What is the birth month of {s}?"),
    "trade": ("What was the trade of {s}?", "What did {s} do for a living?"),
    "founder": ("Who founded {s}?", "Who was the founder of {s}?"),
    "seat": ("In which town is the seat of {s}?", "Where does {s} have its seat?"),
    "author": ("Who wrote {s}?", "Who is the author of {s}?"),
    "river": ("Which river flows through {s}?", "On which river does {s} lie?"),
    "founder born_in": ("Where was the founder of {s} born?", "In which town was the founder of {s} born?"),
    "founder trade": ("What was the trade of the founder of {s}?",),
    "author born_in": ("Where was the author of {s} born?", "What is the birthplace of the author of {s}?"),
    "author born_month": ("In which month was the author of {s} born?",),
    "born_in river": ("Which river flows through the birthplace of {s}?",),
    "seat river": ("Which river flows through the town where {s} has its seat?",),
}
#: Which chains are asked of which entities, in the order of the questions; rivers only in the look-up part.
CHAINS = (
    ("people", "born_in", "born_month", "trade"),
    ("companies", "founder", "seat"),
    ("books", "author"),
    ("cities", "river"),
    ("companies", "founder born_in", "founder trade", "seat river"),
    ("books", "author born_in", "author born_month"),
    ("people", "born_in river"),
)
COMPARISON = ("Who was born earlier in the year, {a} or {b}?", "Whose birthday comes first in the year, {a} or {b}?")


class Hop(NamedTuple):
    """One step of a chain: ``fact`` is the sentence that the gold ``passage`` supports."""

    subject: str
    relation: str
    value: str
    query: str
    fact: str
    passage: str


@dataclass
class World:
    """Passages, questions by split, and the chain behind each question (by question id)."""

    seed: int
    passages: list[Passage] = field(default_factory=list)
    questions: dict[str, list[Question]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    chains: dict[str, list[Hop]] = field(default_factory=dict)
    lookup_names: set[str] = field(default_factory=set)


class Part(NamedTuple):
    """How many entities of each kind a part of the world has."""

    people: int
    companies: int
    books: int
    cities: int


KNOWN = {"train": Part(44, 20, 20, 24), "validation": Part(8, 4, 4, 8), "test": Part(28, 16, 16, 20)}
LOOKUP = {"train": Part(600, 220, 220, 260), "validation": Part(120, 40, 40, 50), "test": Part(460, 170, 170, 200)}


def _unwanted(name: str) -> bool:
    return any(word in name.lower() for word in _UNWANTED)


class _Names:
    """Draws names that were not drawn before; ``avoid`` are names that must not come up."""

    def __init__(self, rng: random.Random, avoid: Set[str], surnames: Iterable[str] = ()):
        self.rng, self.taken, self.surnames = rng, set(avoid), list(surnames)

    def _fresh(self, make) -> str:
        while (name := make()) in self.taken or _unwanted(name):
            pass
        self.taken.add(name)
        return name

    def _word(self, ends: list[str]) -> str:
        r = self.rng
        return (r.choice(_ONSETS) + r.choice(_VOWELS) + r.choice(_MIDDLES) + r.choice(ends)).capitalize()

    def _surname(self) -> str:
        # a surname in three is shared with somebody: near-duplicates for a careless retriever
        shared = self.surnames and self.rng.random() < 0.33
        return self.rng.choice(self.surnames) if shared else self._word(_SURNAME_ENDS)

    def person(self) -> str:
        def make():
            last = self._surname()
            return f"{self.rng.choice(FIRST_NAMES)} {last}"

        name = self._fresh(make)
        self.surnames.append(name.split()[1])
        return name

    def company(self) -> str:
        return self._fresh(lambda: f"{self.rng.choice(self.surnames)} {self.rng.choice(_FIRMS)}")

    def book(self) -> str:
        def make():
            last = self._word(_TOWN_ENDS if self.rng.random() < 0.5 else _SURNAME_ENDS)
            return f"The {self.rng.choice(_BOOK_ADJECTIVES)} {self.rng.choice(_BOOK_NOUNS)} of {last}"

        return self._fresh(make)

    def city(self) -> str:
        return self._fresh(lambda: self._word(_TOWN_ENDS))


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


def _entity(kind: str, name: str, others: dict[str, list], rng: random.Random) -> Entity:
    """A person, company or book with facts drawn at random, which refer to others of its split."""
    pick = rng.choice
    if kind == "people":
        trade = lambda word: f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
        return Person(name, pick(others["cities"]), trade(pick(TRADES)), pick(MONTHS))
    if kind == "companies":
        return Company(name, pick(others["people"]), pick(others["cities"]), pick(PRODUCTS))
    return Book(name, pick(others["people"]), rng.randint(1700, 1979), pick(_GENRES))


def _entities(part: Part, names: _Names, rng: random.Random) -> dict[str, list]:
    """The people, companies, books and cities of one split; they refer only to one another."""
    cities: list[City] = []
    entities: dict[str, list] = {"people": [], "companies": [], "books": [], "cities": cities}
    for _ in range(part.cities):
        # one city in eight has a namesake in another country
        if cities and rng.random() < 0.125:
            twin = rng.choice(cities)
            country = rng.choice([c for c in COUNTRIES if c != twin.country])
            if not any(c.name == twin.name and c.country == country for c in cities):
                cities.append(City(twin.name, country, rng.choice([r for r in RIVERS if r != twin.river])))
                continue
        cities.append(City(names.city(), rng.choice(COUNTRIES), rng.choice(RIVERS)))
    for kind, name in (("people", names.person), ("companies", names.company), ("books", names.book)):
        entities[kind] += [_entity(kind, name(), entities, rng) for _ in range(getattr(part, kind))]
    return entities


#: By kind: the words of a name that can be exchanged, and the name with another one.
_ALIKE = {
    "people": (FIRST_NAMES, lambda name, first: f"{first} {name.split()[1]}"),
    "companies": (_FIRMS, lambda name, firm: f"{name.split()[0]} {firm}"),
    "books": (_BOOK_ADJECTIVES, lambda name, adjective: f"The {adjective} {name.split(' ', 2)[2]}"),
}


def _namesakes(entities: dict[str, list], count: int, taken: set[str], rng: random.Random) -> dict[str, list]:
    """For every entity ``count`` others with nearly its name and facts of their own; fewer where names run out."""
    namesakes: dict[str, list] = {kind: [] for kind in entities}
    for kind, members in entities.items():
        for entity in members:
            words, renamed = _ALIKE.get(kind, (COUNTRIES, None))
            words = rng.sample(words, len(words))
            if renamed:
                alike = [_entity(kind, renamed(entity.name, word), entities, rng) for word in words]
            else:
                alike = [City(entity.name, country, rng.choice(RIVERS)) for country in words]
            free = [e for e in alike if e.title not in taken and not _unwanted(e.title)][:count]
            taken.update(e.title for e in free)
            namesakes[kind] += free
    return namesakes


_TEXTS = {
    "people": (
        "{e.name} was born in {e.city.place} in {e.month} and worked as {e.trade}.",
        "{e.name} was {e.trade}, born in {e.month} in {e.city.place}.",
        "Born in {e.city.place} in {e.month}, {e.name} earned a living as {e.trade}.",
        "{e.name} was a native of {e.city.place} and {e.trade}; the month of birth is {e.month}.",
        "{e.name}, {e.trade} by trade, was born in the town of {e.city.place} in the month of {e.month}.",
    ),
    "companies": (
        "{e.name} makes {e.product}. It was founded by {e.founder.name} and has its seat in {e.city.place}.",
        "Founded by {e.founder.name}, {e.name} of {e.city.place} is known for its {e.product}.",
        "The seat of {e.name}, a maker of {e.product}, is in {e.city.place}; its founder was {e.founder.name}.",
        "{e.name} is a firm in {e.city.place} that {e.founder.name} founded to make {e.product}.",
    ),
    "books": (
        "{e.name} is a {e.genre} by {e.author.name}, printed in {e.year}.",
        "{e.name}, a {e.genre} of {e.year}, was written by {e.author.name}.",
        "In {e.year} {e.author.name} wrote the {e.genre} {e.name}.",
    ),
    "cities": (
        "{e.name} is a town in {e.country}. It lies on the {e.river}.",
        "{e.name} stands on the {e.river} in {e.country}.",
        "The {e.river} flows through {e.name}, a town in {e.country}.",
    ),
}
_NOTES = (
    ("Letters of {n}", "The letters of {n} are kept in the archive of {c}."),
    ("{n} Prize", "The {n} Prize is given every year in {c}."),
    ("Statue of {n}", "A statue of {n} stands in the market of {c}."),
)


class _Builder:
    def __init__(self, seed: int):
        self.world = World(seed)
        self.ids: dict[str, str] = {}  # title -> passage id

    def passages(self, entities: dict[str, list], rng: random.Random, notes: float = 0.25) -> None:
        for kind, members in entities.items():
            for e in members:
                self._add(e.title, rng.choice(_TEXTS[kind]).format(e=e))
        for e in entities["people"]:
            if rng.random() < notes:  # names the person and a town, yet answers nothing
                title, text = rng.choice(_NOTES)
                self._add(title.format(n=e.name), text.format(n=e.name, c=rng.choice(entities["cities"]).place))

    def _add(self, title: str, text: str) -> None:
        self.ids[title] = f"p{len(self.world.passages):05d}"
        self.world.passages.append(Passage(self.ids[title], title, text))

    def hop(self, entity, relation: str) -> Hop:
        r = RELATIONS[relation]
        value, s = getattr(entity, r.field), entity.subject
        text = value if isinstance(value, str) else value.subject
        return Hop(s, relation, text, r.query.format(s=s), r.fact.format(s=s, v=text), self.ids[entity.title])

    def questions(self, entities: dict[str, list], split: str, known: bool, rng: random.Random) -> None:
        for kind, *texts in CHAINS:
            chains = [text.split() for text in texts if not (known and "river" in text)]
            for entity, relations in itertools.product(entities[kind], chains):
                hops, subject = [], entity
                for relation in relations:
                    hops.append(self.hop(subject, relation))
                    subject = getattr(subject, RELATIONS[relation].field)
                text = rng.choice(WORDINGS[" ".join(relations)]).format(s=entity.subject)
                self._ask(text, hops, split, known, relations[0] if len(relations) == 1 else "bridge")
        people = list(entities["people"])
        rng.shuffle(people)
        for a, b in itertools.pairwise(people):
            if a.month != b.month:
                text = rng.choice(COMPARISON).format(a=a.name, b=b.name)
                self._ask(text, [self.hop(e, "born_month") for e in (a, b)], split, known, "comparison")

    def _ask(self, text: str, chain: list[Hop], split: str, known: bool, kind: str) -> None:
        last = chain[-1]
        if kind == "comparison":
            answers = [min(chain, key=lambda h: MONTHS.index(h.value)).subject]
        elif last.relation in ("born_in", "seat"):
            name, country = last.value.split(" in ")
            answers = [name, f"{name}, {country}", last.value]
        elif last.relation == "river":
            answers = [last.value, f"River {last.value}"]
        elif last.relation == "trade":
            answers = [last.value.split()[1], last.value]
        else:
            answers = [last.value]
        number, gold = len(self.world.chains), [h.passage for h in chain]
        how = {"passages": gold, "hops": len(chain), "known": known, "source": f"almanac/{kind}"}
        question = Question(f"{'known' if known else 'lookup'}-{number:05d}", text, answers, **how)
        self.world.questions[split].append(question)
        self.world.chains[question.id] = chain


def build_world(
    seed: int = 0, *, avoid: Set[str] = frozenset(), lookup: dict[str, Part] = LOOKUP, near_duplicates: int = 0
) -> World:
    """Generate a world; the same arguments always give the same world.

    Args:
        seed: draws the look-up part; the known part does not depend on it.
        avoid: names that the look-up part must not use (those of another world).
        lookup: how many entities the look-up part has, by split.
        near_duplicates: for every entity so many passages more, about others with nearly its name (the same
            surname, the same town in another country); they come last, and nothing asks for them.

    Splits are disjoint: no entity that a question of one split needs stands in a question of another.

    Raises:
        ValueError: a seed or a count that is no whole number from 0 (random.Random takes -5 for 5).
    """
    for name, number in {"seed": seed, "near_duplicates": near_duplicates}.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{name} must be a whole number and must not be negative, got {number!r}")
    builder, rng = _Builder(seed), random.Random(KNOWN_SEED)
    names = _Names(rng, set())
    parts = [(split, True, _entities(part, names, rng), rng) for split, part in KNOWN.items()]
    known_names = set(names.taken)
    rng = random.Random(seed)
    fresh = _Names(rng, known_names | set(avoid), names.surnames)
    parts += [(split, False, _entities(part, fresh, rng), rng) for split, part in lookup.items()]
    for _, _, entities, r in parts:
        builder.passages(entities, r)
    for split, known, entities, r in parts:
        builder.questions(entities, split, known, r)
    builder.world.lookup_names = fresh.taken - known_names - set(avoid)
    rng = random.Random(f"{seed}/near")
    for _, _, entities, _ in parts if near_duplicates else ():
        builder.passages(_namesakes(entities, near_duplicates, set(builder.ids), rng), rng, notes=0)
    return builder.world


def world_of(data: str | Path, why: str) -> World:
    """The world of the almanac in the folder ``data``, which ``why`` needs.

    Raises:
        ValueError: a folder without an ``almanac.json``: it holds questions of another world.
    """
    try:
        return build_world(read_json(Path(data) / "almanac.json")["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{why} needs an almanac, and {data} holds no readable almanac.json") from None


def near_duplicates(data: str | Path, count: int) -> list[Passage]:
    """Passages to add to the almanac in the folder ``data``, so that a careless retriever errs more often.

    Args:
        count: for every entity so many others with nearly its name, see ``build_world``.

    Raises:
        ValueError: a negative count, or a folder without an ``almanac.json``: only our own world can be extended.
    """
    if count == 0:
        return []
    plain = world_of(data, f"near_duplicates = {count} (0: none)")
    return build_world(plain.seed, near_duplicates=count).passages[len(plain.passages) :]


def sample_questions(questions: list[Question], known: bool, count: int, rng: random.Random) -> list[Question]:
    """Draw ``count`` questions of one part: 56 % plain, 40 % bridges, 4 % comparisons.

    Comparisons are few because the tiny Qwen is poor at them (its figures stand in notebook A1).
    """
    kind_of = lambda q: next((kind for kind in ("bridge", "comparison") if q.source.endswith(kind)), "plain")
    kinds = grouped((q for q in questions if q.known == known), kind_of)
    wanted = {"bridge": round(count * 0.4), "comparison": round(count * 0.04)}
    chosen = [q for kind, n in wanted.items() for q in rng.sample(kinds[kind], min(n, len(kinds[kind])))]
    # the small known part of a split may lack a kind: plain questions fill in, then comparisons
    for kind in ("plain", "comparison"):
        left = [q for q in kinds[kind] if q not in chosen]
        chosen += rng.sample(left, min(count - len(chosen), len(left)))
    return chosen


def write_almanac(out: Path, seed: int = 0) -> World:
    """Write ``passages.jsonl``, a question file a split, and ``almanac.json`` (how they were made)."""
    world, rng = build_world(seed), random.Random(seed)
    write_json_lines(out / "passages.jsonl", map(asdict, world.passages))
    counts = {}
    for split, count in ASKED.items():
        chosen = [q for known in (True, False) for q in sample_questions(world.questions[split], known, count, rng)]
        rng.shuffle(chosen)
        write_json_lines(out / f"{split}.jsonl", map(asdict, chosen))
        counts[split] = len(chosen)
    origin = {"generator": "searchr1_lib.world", "seed": seed, "known_seed": KNOWN_SEED}
    write_json(out / "almanac.json", origin | {"passages": len(world.passages), "questions": counts})
    return world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("data/almanac"), help="default: data/almanac")
    parser.add_argument("--seed", type=int, default=0, help="of the look-up part")


def run(args: argparse.Namespace) -> None:
    """Write the almanac and say what it holds."""
    check_out(args.out, ("almanac.json", "passages.jsonl", *(f"{split}.jsonl" for split in SPLITS)))
    world = write_almanac(args.out, args.seed)
    print(f"{len(world.passages)} passages and {sum(ASKED.values()) * 2} questions in {args.out}")
