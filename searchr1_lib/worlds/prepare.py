"""Makes a folder of data as the notebooks read it: ``passages.jsonl``, ``train``, ``validation`` and ``test.jsonl``.

    searchr1 prepare mixed --out data/real/mixed
    searchr1 prepare hotpotqa --out runs/data/hotpotqa
    searchr1 prepare nq --out runs/data/nq --corpus wiki-18 --rows 21100000
    searchr1 prepare questions.jsonl --out runs/data/mine --corpus corpus.jsonl --others 1

The parameter ``data`` of a notebook or a profile then names the folder.

"mixed" is for real models: common knowledge, which a Qwen has without searching, beside questions of the almanac, which
no real model can answer without. So "when to search" can be taught and measured with nothing to download
but the model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from .. import data
from ..environment.limits import Count, Whole
from ..files import whole_folder, write_json
from ..records import Passage, Question
from . import public

DATA = Path(__file__).resolve().parents[2] / "data"
#: Out of ten questions in a row, so many go to each split; the common knowledge stands in the order of its topics.
DEALT = {"train": 6, "validation": 1, "test": 3}
#: These public sets have no training split.
TEST_ONLY = ("popqa", "bamboogle")
#: How many questions of a public set go to each split.
COUNTS = {"train": 1000, "validation": 100, "test": 200}
#: What stands in a folder that was made here.
OWN = ("made.json", "passages.jsonl", *(f"{split}.jsonl" for split in COUNTS))


def mix_questions(
    known: Sequence[Question], lookup: Sequence[Question], known_share: float = 0.5, seed: int = 0
) -> list[Question]:
    """Known and look-up questions in a proportion, shuffled: as many as the scarcer of the two allows.

    Raises:
        ValueError: a share that is not between 0 and 1, or a part without questions.
    """
    if not 0 < known_share < 1:
        raise ValueError(f"known_share must be between 0 and 1, got {known_share}")
    if not known or not lookup:
        raise ValueError("mix_questions: one of the two parts is empty")
    total = min(len(known) / known_share, len(lookup) / (1 - known_share))
    counts = [max(1, round(total * share)) for share in (known_share, 1 - known_share)]
    rng = random.Random(seed)
    mixed = [q for part, n in zip((known, lookup), counts) for q in rng.sample(list(part), min(n, len(part)))]
    rng.shuffle(mixed)
    return mixed


def load_mixed(split: str, known_share: float = 0.5, seed: int = 0) -> list[Question]:
    """Common knowledge (``known`` True) mixed with questions of the almanac that are ``known`` False and have all their
    passages.

    The splits are disjoint, and so are the almanac's entities in them. Raises as ``mix_questions``; FileNotFoundError
    for a split other than train, validation and test.
    """
    order = cycle(name for name, n in DEALT.items() for _ in range(n))
    known = [q for q, name in zip(data.load_questions(DATA / "common_knowledge.jsonl"), order) if name == split]
    lookup = [q for q in data.load_questions(DATA / "almanac" / f"{split}.jsonl") if not q.known]
    lookup = [q for q in lookup if len(q.passages) == q.hops]
    return mix_questions(known, lookup, known_share, seed)


def load_set(
    source: str,
    counts: Mapping[str, int] = COUNTS,
    *,
    corpus: str | None = None,
    rows: int | None = None,
    others: int = 50,
) -> tuple[dict[str, list[Question]], list[Passage]]:
    """Questions by split, and the passages that they need.

    Args:
        source: a name of ``public.SETS`` or a folder in that layout: "train" and "validation" come from its training
            split, "test" from the split that papers report on. Or a file, or a folder with a training split alone: its
            rows go to the splits in order.
        counts: how many questions go to each split; a split with 0 is left out. Where there are fewer, they are shared
            out in these proportions. A training question that stands in the test split too is left out.
        corpus: where the passages are (see ``public.load_passages``); None: the questions' own rows carry them.
        rows: rows of the corpus to read; required if it comes from the hub.
        others: every so many-th passage that is not about the questions is kept too; 1: the whole corpus, 0: none.

    Raises:
        FileNotFoundError, data.DataError: as in ``public.load_questions``; also where there are no passages, too few
            questions for the splits, or where a set of test questions alone is asked for others.
    """
    path = Path(source)
    if not any(counts.values()):
        raise data.DataError(f"{source}: no questions are asked for; give --train, --validation or --test a number")
    if counts["train"] + counts["validation"] and path.name in TEST_ONLY and not list(path.glob("train.*")):
        raise data.DataError(
            f"{source} has no training split, only test questions: add --train 0 --validation 0. To train "
            "on some of them all the same, give a file: its rows go to the splits in order"
        )
    parts: list[tuple[list[str], str | None]] = [(["test"], None), (["validation", "train"], "train")]
    if path.is_file() or (path.is_dir() and public.split_file(path, None).name.startswith("train.")):
        parts = [(list(COUNTS), "train")]
    questions: dict[str, list[Question]] = {}
    passages: dict[str, Passage] = {}
    for splits, split in parts:
        asked = {name: counts[name] for name in COUNTS if name in splits and counts[name]}
        if not (limit := sum(asked.values())):
            continue
        if corpus:
            rest = public.load_questions(source, split=split, limit=limit)
        else:
            rest, carried = public.load_with_passages(source, split=split, limit=limit)
            passages |= {p.id: p for p in carried}
        for name, n in _shares(len(rest), asked, source).items():
            questions[name], rest = rest[:n], rest[n:]
    held_out: set[str] = set()
    for name in reversed(COUNTS):  # what is tested is never taught
        questions[name] = [q for q in questions.get(name, []) if q.text.strip().casefold() not in held_out]
        held_out |= {q.text.strip().casefold() for q in questions[name]}
    questions = {name: questions[name] for name in COUNTS if questions[name]}
    if not corpus:
        return questions, list(passages.values())
    if others == 1:
        return questions, public.load_passages(corpus, limit=rows)
    about = [q for part in questions.values() for q in part]
    return questions, public.select_passages(corpus, about, others=others, limit=rows)


def _shares(there: int, asked: dict[str, int], source: str) -> dict[str, int]:
    """How many questions each split gets: as many as asked, or its share of those that are there, at least one."""
    total = sum(asked.values())
    if there >= total:
        return asked
    if there < len(asked):
        raise data.DataError(f"{source}: holds {there} question(s), too few for {', '.join(asked)}")
    (first, most), *rest = asked.items()
    shares = {name: max(1, there * n // total) for name, n in rest}
    return {first: min(most, there - sum(shares.values()))} | shares


def check_out(out: str | Path, own: Sequence[str], *inputs: str | Path | None) -> None:
    """Refuse, before any work, to write a folder in place of what is not ours.

    Args:
        own: what may stand there and is replaced. Its first name marks the folder as ours: without it nothing is.
        inputs: what the work reads; a name that is no path is none.

    Raises:
        ValueError: it is a file, it holds something else, or an input stands in it, or it in an input.
    """
    out = Path(out)
    place = out.resolve()
    for read in [Path(i).resolve() for i in inputs if i and Path(i).exists()]:
        if place == read or place in read.parents or read in place.parents:
            raise ValueError(
                f"{out} and what is read, {read}, are one folder or one in the other: choose another --out"
            )
    found = [p.name for p in out.glob("*") if not re.fullmatch(r"\..+\.tmp", p.name)] or [
        "a file's text"
    ] * out.is_file()
    if foreign := sorted(name for name in found if own[0] not in found or name not in own):
        raise ValueError(f"{out} holds {foreign[0]}, which was not made by this command: choose another --out")


def write_folder(
    out: str | Path, questions: Mapping[str, Sequence[Question]], passages: Sequence[Passage], made: dict
) -> None:
    """Write a data folder, whole or not at all; ``made`` says how, in ``made.json``.

    Raises:
        ValueError: something else stands there, see ``check_out``.
    """
    check_out(out, OWN)
    with whole_folder(out) as folder:
        data.save_passages(folder / "passages.jsonl", passages)
        for split, part in questions.items():
            data.save_questions(folder / f"{split}.jsonl", part)
        counts = {"passages": len(passages), "questions": {split: len(part) for split, part in questions.items()}}
        write_json(folder / "made.json", {"by": "searchr1_lib.prepare", **made, **counts})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="mixed; a question set by name, e.g. hotpotqa; a folder or a file of one")
    add("--out", required=True, help="the folder to write")
    add("--known-share", type=float, default=0.5, help="mixed: share of common knowledge")
    add("--seed", type=Whole, default=0, help="mixed: of the choice and the order of the questions")
    for split, count in COUNTS.items():
        add(f"--{split}", type=Whole, default=count, help=f"questions in {split}.jsonl (default: {count})")
    add("--corpus", help="wiki-18, hub:owner/name or a file (default: what the questions carry)")
    add("--rows", type=Count, help="rows of the corpus to read")
    add("--others", type=Whole, default=50, help="keep every N-th passage that is about no question; 0: none")


def run(args: argparse.Namespace) -> None:
    """Write the folder and print its ``made.json``."""
    check_out(args.out, OWN, args.source, args.corpus)
    counts = {split: getattr(args, split) for split in COUNTS}
    if args.source == "mixed":
        counts, how = {}, {"known_share": args.known_share, "seed": args.seed}
        questions = {split: load_mixed(split, **how) for split in DEALT}
        passages = data.load_passages(DATA / "almanac" / "passages.jsonl")
    else:
        how = {"corpus": args.corpus, "rows": args.rows, "others": args.others}
        questions, passages = load_set(args.source, counts, **how)
    write_folder(args.out, questions, passages, {"source": Path(args.source).name, **how})
    made = (Path(args.out) / "made.json").read_text(encoding="utf-8")
    print(made, end="")
    got = json.loads(made)["questions"]
    if fewer := [f"{split} {got.get(split, 0)} of {n}" for split, n in counts.items() if got.get(split, 0) < n]:
        print(f"fewer questions than asked for: {', '.join(fewer)}", file=sys.stderr)
