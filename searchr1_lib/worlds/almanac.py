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
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..records import Passage, Question, write_json_lines, write_whole

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
    "lanterns",
    "compasses",
    "porcelain",
    "barometers",
    "umbrellas",
    "pianos",
    "bicycles",
    "telescopes",
    "gloves",
    "candles",
    "ink",
    "carpets",
    "tinned fish",
    "fountain pens",
    "sleigh bells",
)
MONTHS = "January February March April May June July August September October November December".split()
_FIRMS = "Works Brothers Mills Trading Foundry Workshop Press Company".split()
_GENRES = "novel play travelogue treatise ballad memoir".split()
_BOOK_NOUNS = "Harbour Winter Lantern Orchard Mirror Garden Bridge Letter Tower Shadow Island Hour".split()
_BOOK_ADJECTIVES = "Silent Crooked Distant Amber Hollow Second Burning Patient Forgotten Northern Narrow Pale".split()


@dataclass(frozen=True)
class City:
    name: str
    country: str
    river: str

    @property
    def subject(self) -> str:
        return f"{self.name} in {self.country}"

    @property
    def title(self) -> str:
        return f"{self.name} ({self.country})"


@dataclass(frozen=True)
class Person:
    name: str
    city: City
    trade: str
    month: str  # of birth

    @property
    def subject(self) -> str:
        return self.name

    title = subject


@dataclass(frozen=True)
class Company:
    name: str
    founder: Person
    city: City
    product: str

    @property
    def subject(self) -> str:
        return self.name

    title = subject


@dataclass(frozen=True)
class Book:
    name: str
    author: Person
    year: int
    genre: str

    @property
    def subject(self) -> str:
        return self.name

    title = subject


@dataclass(frozen=True)
class Relation:
    """How a kind of fact is asked for, searched and stated; ``{s}`` the subject, ``{v}`` the value."""

    questions: tuple[str, ...]
    query: str
    fact: str
    value: object  # entity -> entity or text


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


RELATIONS = {
    "born_in": Relation(
        ("Where was {s} born?", "In which town was {s} born?", "What is the birthplace of {s}?"),
        "{s} born in",
        "{s} was born in {v}",
        lambda e: e.city,
    ),
    "born_month": Relation(
        ("In which month was {s} born?", "What is the birth month of {s}?"),
        "{s} born month",
        "{s} was born in the month of {v}",
        lambda e: e.month,
    ),
    "trade": Relation(
        ("What was the trade of {s}?", "What did {s} do for a living?"),
        "{s} trade",
        "{s} worked as {v}",
        lambda e: _with_article(e.trade),
    ),
    "founder": Relation(
        ("Who founded {s}?", "Who was the founder of {s}?"),
        "{s} founded by",
        "{s} was founded by {v}",
        lambda e: e.founder,
    ),
    "seat": Relation(
        ("In which town is the seat of {s}?", "Where does {s} have its seat?"),
        "{s} seat",
        "{s} has its seat in {v}",
        lambda e: e.city,
    ),
    "author": Relation(
        ("Who wrote {s}?", "Who is the author of {s}?"), "{s} written by", "{s} was written by {v}", lambda e: e.author
    ),
    "river": Relation(
        ("Which river flows through {s}?", "On which river does {s} lie?"),
        "{s} river",
        "{s} lies on the {v}",
        lambda e: e.river,
    ),
}
#: Two relations in a row: the value of the first is the subject of the second.
BRIDGES = {
    ("founder", "born_in"): ("Where was the founder of {s} born?", "In which town was the founder of {s} born?"),
    ("founder", "trade"): ("What was the trade of the founder of {s}?",),
    ("author", "born_in"): ("Where was the author of {s} born?", "What is the birthplace of the author of {s}?"),
    ("author", "born_month"): ("In which month was the author of {s} born?",),
    ("born_in", "river"): ("Which river flows through the birthplace of {s}?",),
    ("seat", "river"): ("Which river flows through the town where {s} has its seat?",),
}
COMPARISON = ("Who was born earlier in the year, {a} or {b}?", "Whose birthday comes first in the year, {a} or {b}?")


@dataclass(frozen=True)
class Hop:
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


@dataclass(frozen=True)
class Part:
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

    def __init__(self, rng: random.Random, avoid: set[str], surnames: list[str] = ()):
        self.rng, self.taken, self.surnames = rng, set(avoid), list(surnames)

    def _fresh(self, make) -> str:
        while (name := make()) in self.taken or _unwanted(name):
            pass
        self.taken.add(name)
        return name

    def _word(self, ends: list[str]) -> str:
        r = self.rng
        return (r.choice(_ONSETS) + r.choice(_VOWELS) + r.choice(_MIDDLES) + r.choice(ends)).capitalize()

    def person(self) -> str:
        def make():
            # a surname in three is shared with somebody: near-duplicates for a careless retriever
            if self.surnames and self.rng.random() < 0.33:
                last = self.rng.choice(self.surnames)
            else:
                last = self._word(_SURNAME_ENDS)
            return f"{self.rng.choice(FIRST_NAMES)} {last}"

        name = self._fresh(make)
        self.surnames.append(name.split()[1])
        return name

    def company(self) -> str:
        return self._fresh(lambda: f"{self.rng.choice(self.surnames)} {self.rng.choice(_FIRMS)}")

    def book(self) -> str:
        r = self.rng

        def make():
            last = self._word(_TOWN_ENDS if r.random() < 0.5 else _SURNAME_ENDS)
            return f"The {r.choice(_BOOK_ADJECTIVES)} {r.choice(_BOOK_NOUNS)} of {last}"

        return self._fresh(make)

    def city(self) -> str:
        return self._fresh(lambda: self._word(_TOWN_ENDS))


def _first_names() -> list[str]:
    rng, names = random.Random(7), set()
    while len(names) < 160:
        name = rng.choice(_ONSETS) + rng.choice(_VOWELS[:5]) + rng.choice(_MIDDLES[:6])
        name = (name + rng.choice("a o i en is us el ette ine".split())).capitalize()
        if not _unwanted(name):
            names.add(name)
    return sorted(names)


FIRST_NAMES = _first_names()
RIVERS = sorted(
    {
        (o + v + e).capitalize()
        for r in [random.Random(11)]
        for _ in range(90)
        for o, v, e in [(r.choice(_ONSETS), r.choice("a e i o u".split()), r.choice(_RIVER_ENDS))]
    }
)


def _entities(part: Part, names: _Names, rng: random.Random) -> dict[str, list]:
    """The people, companies, books and cities of one split; they refer only to one another."""
    cities: list[City] = []
    for _ in range(part.cities):
        # one city in eight has a namesake in another country
        if cities and rng.random() < 0.125:
            twin = rng.choice(cities)
            country = rng.choice([c for c in COUNTRIES if c != twin.country])
            if not any(c.name == twin.name and c.country == country for c in cities):
                cities.append(City(twin.name, country, rng.choice([r for r in RIVERS if r != twin.river])))
                continue
        cities.append(City(names.city(), rng.choice(COUNTRIES), rng.choice(RIVERS)))
    people = [
        Person(names.person(), rng.choice(cities), rng.choice(TRADES), rng.choice(MONTHS)) for _ in range(part.people)
    ]
    companies = [
        Company(names.company(), rng.choice(people), rng.choice(cities), rng.choice(PRODUCTS))
        for _ in range(part.companies)
    ]
    books = [
        Book(names.book(), rng.choice(people), rng.randint(1700, 1979), rng.choice(_GENRES)) for _ in range(part.books)
    ]
    return {"people": people, "companies": companies, "books": books, "cities": cities}


def _namesakes(entities: dict[str, list], count: int, taken: set[str], rng: random.Random) -> dict[str, list]:
    """For every entity ``count`` others with nearly its name and facts of their own; fewer where names run out."""
    cities, people = entities["cities"], entities["people"]
    alike = {
        "people": lambda e: (
            Person(f"{first} {e.name.split()[1]}", rng.choice(cities), rng.choice(TRADES), rng.choice(MONTHS))
            for first in _shuffled(FIRST_NAMES, rng)
        ),
        "companies": lambda e: (
            Company(f"{e.name.split()[0]} {firm}", rng.choice(people), rng.choice(cities), rng.choice(PRODUCTS))
            for firm in _shuffled(_FIRMS, rng)
        ),
        "books": lambda e: (
            Book(
                f"The {adjective} {e.name.split(' ', 2)[2]}",
                rng.choice(people),
                rng.randint(1700, 1979),
                rng.choice(_GENRES),
            )
            for adjective in _shuffled(_BOOK_ADJECTIVES, rng)
        ),
        "cities": lambda e: (City(e.name, country, rng.choice(RIVERS)) for country in _shuffled(COUNTRIES, rng)),
    }
    found: dict[str, list] = {kind: [] for kind in entities}
    for kind, members in entities.items():
        for entity in members:
            free = [e for e in alike[kind](entity) if e.title not in taken and not _unwanted(e.title)][:count]
            taken.update(e.title for e in free)
            found[kind] += free
    return found


def _shuffled(values: list[str], rng: random.Random) -> list[str]:
    return rng.sample(values, len(values))


_PERSON = (
    "{n} was born in {c} in {m} and worked as {t}.",
    "{n} was {t}, born in {m} in {c}.",
    "Born in {c} in {m}, {n} earned a living as {t}.",
    "{n} was a native of {c} and {t}; the month of birth is {m}.",
    "{n}, {t} by trade, was born in the town of {c} in the month of {m}.",
)
_COMPANY = (
    "{n} makes {p}. It was founded by {f} and has its seat in {c}.",
    "Founded by {f}, {n} of {c} is known for its {p}.",
    "The seat of {n}, a maker of {p}, is in {c}; its founder was {f}.",
    "{n} is a firm in {c} that {f} founded to make {p}.",
)
_BOOK = (
    "{n} is a {g} by {a}, printed in {y}.",
    "{n}, a {g} of {y}, was written by {a}.",
    "In {y} {a} wrote the {g} {n}.",
)
_CITY = (
    "{n} is a town in {k}. It lies on the {r}.",
    "{n} stands on the {r} in {k}.",
    "The {r} flows through {n}, a town in {k}.",
)
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
        place = lambda c: f"{c.name}, {c.country}"
        for e in entities["people"]:
            self._add(
                e.title, rng.choice(_PERSON).format(n=e.name, c=place(e.city), m=e.month, t=_with_article(e.trade))
            )
        for e in entities["companies"]:
            self._add(e.title, rng.choice(_COMPANY).format(n=e.name, c=place(e.city), f=e.founder.name, p=e.product))
        for e in entities["books"]:
            self._add(e.title, rng.choice(_BOOK).format(n=e.name, a=e.author.name, y=e.year, g=e.genre))
        for e in entities["cities"]:
            self._add(e.title, rng.choice(_CITY).format(n=e.name, k=e.country, r=e.river))
        for e in entities["people"]:
            if rng.random() < notes:  # names the person and a town, yet answers nothing
                title, text = rng.choice(_NOTES)
                self._add(title.format(n=e.name), text.format(n=e.name, c=place(rng.choice(entities["cities"]))))

    def _add(self, title: str, text: str) -> None:
        self.ids[title] = f"p{len(self.world.passages):05d}"
        self.world.passages.append(Passage(self.ids[title], title, text))

    def hop(self, entity, relation: str) -> Hop:
        r, value = RELATIONS[relation], RELATIONS[relation].value(entity)
        text = value if isinstance(value, str) else value.subject
        s = entity.subject
        return Hop(s, relation, text, r.query.format(s=s), r.fact.format(s=s, v=text), self.ids[entity.title])

    def questions(self, entities: dict[str, list], split: str, known: bool, rng: random.Random) -> None:
        asked = {
            "people": ("born_in", "born_month", "trade"),
            "companies": ("founder", "seat"),
            "books": ("author",),
            "cities": () if known else ("river",),
        }
        for kind, relations in asked.items():
            for e in entities[kind]:
                for relation in relations:
                    self._ask(
                        rng.choice(RELATIONS[relation].questions).format(s=e.subject),
                        [self.hop(e, relation)],
                        split,
                        known,
                        f"almanac/{relation}",
                    )
        bridged = {
            "companies": [("founder", "born_in"), ("founder", "trade")],
            "books": [("author", "born_in"), ("author", "born_month")],
        }
        if not known:
            bridged["people"] = [("born_in", "river")]
            bridged["companies"].append(("seat", "river"))
        for kind, pairs in bridged.items():
            for e in entities[kind]:
                for first, second in pairs:
                    middle = RELATIONS[first].value(e)
                    self._ask(
                        rng.choice(BRIDGES[first, second]).format(s=e.subject),
                        [self.hop(e, first), self.hop(middle, second)],
                        split,
                        known,
                        "almanac/bridge",
                    )
        people = list(entities["people"])
        rng.shuffle(people)
        for a, b in itertools.pairwise(people):
            if a.month != b.month:
                self._ask(
                    rng.choice(COMPARISON).format(a=a.name, b=b.name),
                    [self.hop(a, "born_month"), self.hop(b, "born_month")],
                    split,
                    known,
                    "almanac/comparison",
                )

    def _ask(self, text: str, chain: list[Hop], split: str, known: bool, source: str) -> None:
        last = chain[-1]
        if source == "almanac/comparison":
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
        number = len(self.world.chains)
        q = Question(
            f"{'known' if known else 'lookup'}-{number:05d}",
            text,
            answers,
            passages=[h.passage for h in chain],
            hops=len(chain),
            known=known,
            source=source,
        )
        self.world.questions[split].append(q)
        self.world.chains[q.id] = chain


def build_world(
    seed: int = 0, *, avoid: set[str] = frozenset(), lookup: dict[str, Part] = LOOKUP, near_duplicates: int = 0
) -> World:
    """Generate a world; the same arguments always give the same world.

    Args:
        seed: draws the look-up part; the known part does not depend on it.
        avoid: names that the look-up part must not use (those of another world).
        lookup: how many entities the look-up part has, by split.
        near_duplicates: for every entity so many passages more, about others with nearly its name (the same
            surname, the same town in another country); they come last, and nothing asks for them.

    Splits are disjoint: no entity that a question of one split needs stands in a question of another.
    """
    builder, rng = _Builder(seed), random.Random(KNOWN_SEED)
    names = _Names(rng, set())
    parts = []
    for split, part in KNOWN.items():
        parts.append((split, True, _entities(part, names, rng), rng))
    known_names = set(names.taken)
    rng = random.Random(seed)
    fresh = _Names(rng, known_names | set(avoid), names.surnames)
    for split, part in lookup.items():
        parts.append((split, False, _entities(part, fresh, rng), rng))
    for _, _, entities, r in parts:
        builder.passages(entities, r)
    for split, known, entities, r in parts:
        builder.questions(entities, split, known, r)
    builder.world.lookup_names = fresh.taken - known_names - set(avoid)
    rng = random.Random(f"{seed}/near")
    for _, _, entities, _ in parts if near_duplicates else ():
        builder.passages(_namesakes(entities, near_duplicates, set(builder.ids), rng), rng, notes=0)
    return builder.world


def near_duplicates(data: str | Path, count: int) -> list[Passage]:
    """Passages to add to the almanac in the folder ``data``, so that a careless retriever errs more often.

    Args:
        count: for every entity so many others with nearly its name, see ``build_world``.

    Raises:
        ValueError: a negative count, or a folder without an ``almanac.json``: only our own world can be extended.
    """
    if count < 0:
        raise ValueError(f"near_duplicates must not be negative, got {count}")
    if count == 0:
        return []
    try:
        seed = json.loads((Path(data) / "almanac.json").read_text(encoding="utf-8"))["seed"]
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"near_duplicates = {count} needs an almanac, and {data} holds no readable almanac.json: set it to 0"
        ) from None
    return build_world(seed, near_duplicates=count).passages[len(build_world(seed).passages) :]


def sample_questions(questions: list[Question], known: bool, count: int, rng: random.Random) -> list[Question]:
    """Draw ``count`` questions of one part: 56 % plain, 40 % bridges, 4 % comparisons.

    Comparisons are few because the tiny Qwen is poor at them (its figures stand in notebook A1).
    """
    kinds = {"plain": [], "bridge": [], "comparison": []}
    for q in questions:
        if q.known == known:
            kind = q.source.split("/")[1]
            kinds[kind if kind in kinds else "plain"].append(q)
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
    write_json_lines(out / "passages.jsonl", [asdict(p) for p in world.passages])
    counts = {}
    for split, count in ASKED.items():
        asked = [q for known in (True, False) for q in sample_questions(world.questions[split], known, count, rng)]
        rng.shuffle(asked)
        write_json_lines(out / f"{split}.jsonl", [asdict(q) for q in asked])
        counts[split] = len(asked)
    made = {
        "generator": "searchr1_lib.world",
        "seed": seed,
        "known_seed": KNOWN_SEED,
        "passages": len(world.passages),
        "questions": counts,
    }
    write_whole(out / "almanac.json", json.dumps(made, indent=1) + "\n")
    return world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("data/almanac"), help="default: data/almanac")
    parser.add_argument("--seed", type=int, default=0, help="of the look-up part")


def run(args: argparse.Namespace) -> None:
    """Write the almanac and say what it holds."""
    world = write_almanac(args.out, args.seed)
    print(f"{len(world.passages)} passages and {sum(ASKED.values()) * 2} questions in {args.out}")
