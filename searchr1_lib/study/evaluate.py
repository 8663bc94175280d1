"""A policy on questions: how often it is right, how often it searches, and whether it had to.

"Need" is the number of hops for a question that is not known and 0 for a known one; a policy that knows when to search
has searches = need. Where memories may be wrong, as on the almanac, what is best there says ``study.regret``.

From the shell, the table of the Search-R1 paper (Jin et al. 2025, arXiv 2503.09516, table 2), for one model:

    searchr1 evaluate --model Qwen/Qwen2.5-1.5B-Instruct --engine http://127.0.0.1:8000 --data all

Every answer goes to a log at once; the same command, started again, goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from .. import __version__
from ..environment.limits import Amount, Count, Limits, Whole, check
from ..files import TrajectoryLog, read_json, write_json
from ..metrics import grouped, groups, means, row_of
from ..records import Question, Trajectory
from ..training.settings import DECIDING
from ..worlds.prepare import check_out
from ..worlds.public import SETS, load_questions, load_with_passages

#: The sets of the paper's table by name (see ``public.SETS``): in which part of it they stand, and under which title.
PAPER = {
    "nq": ("General QA", "NQ"),
    "triviaqa": ("General QA", "TriviaQA"),
    "popqa": ("General QA", "PopQA"),
    "hotpotqa": ("Multi-hop QA", "HotpotQA"),
    "2wikimultihopqa": ("Multi-hop QA", "2Wiki"),
    "musique": ("Multi-hop QA", "MuSiQue"),
    "bamboogle": ("Multi-hop QA", "Bamboogle"),
}


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Their versions, and ours; None for one that is not installed."""
    found = {name: next(iter(distributions(name=name)), None) for name in packages}
    return {"searchr1_lib": __version__, **{name: d.version if d else None for name, d in found.items()}}


def hashes(place: str | os.PathLike, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of each file of a folder by its name there (of a file: its own); of one above 64 MiB that of 64 samples.

    A name that is no path, such as one on the hub, has none; neither have hidden files, what only people read, and what
    SQLite leaves beside a file that is open.

    Args:
        pattern: which files; "*" are those that stand in the folder itself.
    """
    place, found = Path(place), {}
    home, files = (place.parent, [place]) if place.is_file() else (place, sorted(place.glob(pattern)))
    for path in files:
        if path.name.startswith(".") or path.name.endswith((".md", "-wal", "-shm")) or not path.is_file():
            continue
        digest, size = hashlib.sha256(), path.stat().st_size
        with open(path, "rb") as file:
            for at in range(0, size, max(2**20, size // 64)):
                file.seek(at)
                digest.update(file.read(2**20))
        found[path.relative_to(home).as_posix()] = digest.hexdigest()
    return found


@dataclass
class Report:
    """The outcome of an evaluation: one row a rollout (see ``metrics.row_of``), and the rollouts."""

    rows: list[dict]
    trajectories: list[Trajectory]

    def table(self) -> dict[str, dict[str, float | None]]:
        """Group -> metric -> mean over its rollouts, see ``metrics.groups`` and ``metrics.means``."""
        return {name: means(rows) for name, rows in groups(self.rows).items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write table and rows as JSON, whole or not at all; the rollouts go to a TrajectoryLog."""
        write_json(path, {"table": self.table(), "rows": self.rows})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Report:
        """Read a saved report, without rollouts.

        Raises:
            ValueError: the file is not a report.
        """
        try:
            return cls(read_json(path)["rows"], [])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is not a saved report ({e})") from None

    def __str__(self) -> str:
        lines = [["", "n", "EM", "F1", "searches", "per need", "reward"]]
        for name, m in self.table().items():
            cells = [m[metric] for metric in ("em", "f1", "searches", "searches_per_need", "reward")]
            lines.append([name, str(m["n"]), *("–" if c is None else f"{c:.3f}" for c in cells)])
        return "\n".join("".join(c.ljust(17) if i == 0 else c.rjust(10) for i, c in enumerate(line)) for line in lines)


def evaluate(
    policy,
    questions: Sequence[Question],
    engine,
    *,
    reward: Callable[[list[Trajectory]], list[float]] | None = None,
    temperature: float = 0.0,
    num_generations: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    **rollout_settings,
) -> Report:
    """Roll out ``policy`` on every question and count.

    Args:
        reward: scores the rollouts too, where given.
        temperature: 0 is greedy.
        batch_size: rollouts at a time.
        seed: of the sampling; the same call gives the same report.
        **rollout_settings: limits and ``first_action``, see ``searchr1_lib.training.rollout.rollout``.

    Raises:
        ValueError: no questions, or a parameter that cannot be.
    """
    import torch

    from ..rewards import score

    counts = {"num_generations": (num_generations, Count), "batch_size": (batch_size, Count), "seed": (seed, Whole)}
    check(temperature=(temperature, Amount), **counts)
    if not questions:
        raise ValueError("evaluate: no questions")
    how = {"temperature": temperature, "generator": torch.Generator(device=policy.device).manual_seed(seed)}
    how |= {"num_generations": num_generations, **rollout_settings}
    batches = _batches(policy, questions, engine, max(1, batch_size // num_generations), **how)
    trajectories = [t for batch in batches for t in batch]
    if reward is not None:
        score(reward, trajectories).keep(trajectories)
    return Report([row_of(t) for t in trajectories], trajectories)


def _batches(policy, questions: Sequence[Question], engine, size: int, **how) -> Iterator[list[Trajectory]]:
    """The rollouts, so many questions at a time."""
    from ..training.rollout import rollout

    for i in tqdm(range(0, len(questions), size), desc="evaluate", unit="batch", disable=None):
        yield rollout(policy, questions[i : i + size], engine, **how)


# -- the paper's table ----------------------------------------------------------------------------------------------


def paper_table(rows: Iterable[Mapping]) -> dict[str, dict]:
    """EM, F1 and searches by question set, and averaged over the sets, with 95 % intervals.

    Args:
        rows: as in ``Report.rows``; the part of ``source`` before a slash names the set.

    Returns:
        set -> {"n", "em", "f1", "searches"}, each of the three {"mean", "low", "high"}: Wilson's interval for the EM
        of a set, a percentile bootstrap (1,000 samples) over its questions for the others. The paper's sets come
        first, in its order. "average" is the unweighted mean over the paper's sets that are there (over all, where
        none of them is), its "n" their number, and its interval draws the questions of each set anew.

    Raises:
        ValueError: no rows.
    """
    import numpy as np

    from .analysis import wilson

    sets = grouped(rows, lambda row: set_of(row["source"]))
    sets = {name: sets[name] for name in [*PAPER, *sets] if name in sets}
    if not sets:
        raise ValueError("paper_table: no rows")
    averaged = [name for name in sets if name in PAPER] or list(sets)
    table: dict[str, dict] = {name: {"n": len(part)} for name, part in sets.items()} | {"average": {"n": len(averaged)}}
    figure = lambda *values: dict(zip(("mean", "low", "high"), map(float, values)))
    ends: Callable[..., Iterable[float]] = lambda means: np.quantile(means, (0.025, 0.975))
    for metric in ("em", "f1", "searches"):
        rng, resampled = np.random.default_rng(0), {}
        for name, part in sets.items():
            values, n = np.array([row[metric] for row in part], float), len(part)
            # a sample at a time: all at once would be gigabytes for a set of 14,000 questions
            resampled[name] = np.array([values[rng.integers(0, n, n)].mean() for _ in range(1000)])
            interval = wilson(round(values.sum()), n) if metric == "em" else ends(resampled[name])
            table[name][metric] = figure(values.mean(), *interval)
        mean = fmean(table[name][metric]["mean"] for name in averaged)
        table["average"][metric] = figure(mean, *ends(np.mean([resampled[name] for name in averaged], axis=0)))
    return table


def format_paper_table(table: Mapping[str, Mapping]) -> str:
    """``paper_table`` as text, laid out as in the paper; a set that was not asked has "–"."""
    others = [name for name in table if name not in PAPER and name != "average"]
    columns = [*PAPER, *others, "average"] if set(PAPER) & set(table) else [*others, "average"]
    titles = [PAPER[c][1] if c in PAPER else "Avg." if c == "average" else c for c in columns]
    widths = [max(13, len(t) + 2) for t in titles]
    heads = ["Others" if c in others else PAPER.get(c, ("",))[0] for c in columns]
    heads = ["" if i and h == heads[i - 1] else h for i, h in enumerate(heads)]

    def line(name: str, cells: Iterable[str]) -> str:
        return name.ljust(10) + "".join(cell.rjust(width) for cell, width in zip(cells, widths))

    parts = [table.get(c) for c in columns]
    lines = [line("", heads), line("", titles), line("n", [f"{m['n']:,}" if m else "–" for m in parts])]
    for metric, name in (("em", "EM"), ("f1", "F1"), ("searches", "searches")):
        figures = [m and m[metric] for m in parts]
        lines.append(line(name, [f"{f['mean']:.3f}" if f else "–" for f in figures]))
        lines.append(line("  95 %", [f"{f['low']:.3f}–{f['high']:.3f}" if f else "–" for f in figures]))
    if (n := table["average"]["n"]) < len(PAPER):
        lines.append(f"Avg.: over {n} set{'s' * (n != 1)}" + " of the paper's seven" * bool(set(PAPER) & set(table)))
    return "\n".join(lines)


def set_of(source: str) -> str:
    """The question set that a source belongs to: what stands before the first slash."""
    return source.split("/")[0]


# -- from the shell -------------------------------------------------------------------------------------------------


def answered(log: TrajectoryLog, questions: Sequence[Question]) -> dict[tuple[str, str], dict]:
    """The rows (see ``Report``) of the questions that stand in a log, by set and id; the last one counts.

    A row also says how many of its searches failed ("failed").

    Raises:
        ValueError: the log has another question under the same set and id.
    """
    wanted = {key_of(q): q for q in questions}
    rows = {}
    for t in log if log.path.exists() else ():
        key = key_of(t.question)
        if key not in wanted:
            continue
        if t.question.text != wanted[key].text:
            raise ValueError(f"{log.path} answers another question {key[1]!r} of {key[0]}; choose another --out")
        t.question = wanted[key]
        rows[key] = row_of(t) | {"failed": sum(bool(c.error) for c in t.searches)}
    return {key: rows[key] for key in wanted if key in rows}


def key_of(question: Question) -> tuple[str, str]:
    """What tells a question from those of other sets."""
    return set_of(question.source), question.id


def read_sets(sources: Sequence[str], limit: int | None) -> list[Question]:
    """The questions of several sources, each with a source that names its set.

    Args:
        sources: names of ``public.SETS``, "all" (the paper's seven), paths, ``hub:owner/name``, or ``set=path`` to say
            to which set a file without sources belongs.
        limit: at most so many questions of each set.

    Raises:
        ValueError: two questions of one set with one id; what ``load_questions`` raises.
    """
    kept: dict[tuple[str, str], Question] = {}
    counts: Counter[str] = Counter()
    for source in _each(sources):
        label, path = _split(source)
        several = Path(path).exists() or path == "search-r1"  # may hold more than one set
        for q in load_questions(path, limit=None if several else limit):
            q.source = label or q.source or _label(path)
            name = set_of(q.source)
            counts[name] += 1
            if limit is not None and counts[name] > limit:
                continue
            if key_of(q) in kept:
                raise ValueError(f"{source}: {name} has another question {q.id!r}; name its set with SET={path}")
            kept[key_of(q)] = q
    return list(kept.values())


def _each(sources: Sequence[str]) -> list[str]:
    return [name for s in sources for name in (PAPER if s == "all" else [s])]


def _split(source: str) -> tuple[str, str]:
    """("nq", "my/file.jsonl") from "nq=my/file.jsonl"; the set is "" where none is named."""
    named = re.fullmatch(r"([\w-]+)=(.+)", source)
    return (named[1], named[2]) if named else ("", source)


def _label(path: str) -> str:
    """The set of a file that does not say: its name, or its folder's where the name is that of any file."""
    file = Path(path.removeprefix("hub:"))
    name = file.name.split(".")[0]
    return file.resolve().parent.name if name in ("questions", "train", "dev", "validation", "test") else name


def open_engine(name: str, sources: Sequence[str] = (), limit: int | None = None):
    """The engine that a name stands for.

    Args:
        name: a folder that ``LocalSearch`` opens; the address of a retrieval server; "web:serper" or another
            provider of ``WebSearch``; or "passages": BM25 over the passages that the rows of ``sources`` carry.
        sources, limit: see ``read_sets``; for "passages".

    Raises:
        ValueError, FileNotFoundError: what the engine raises that cannot be opened.
    """
    from .. import search

    if name.startswith(("http://", "https://")):
        return search.RemoteSearch(name)
    if name.startswith("web:"):
        return search.WebSearch(name.removeprefix("web:"))
    if name == "passages":
        passages = {p.id: p for s in _each(sources) for p in load_with_passages(_split(s)[1], limit=limit)[1]}
        return search.BM25Search(list(passages.values()))
    return search.LocalSearch(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a model's folder, or its name on the hub")
    add("--adapter", help="a folder with a LoRA adapter in PEFT's format")
    engines = "an index's folder, a retrieval server's address, web:PROVIDER, or passages"
    add("--engine", required=True, help=f"{engines} (BM25 over what the questions' own rows carry)")
    sets = f"{', '.join(SETS)}, all (the paper's seven), files, SET=FILE or hub:OWNER/NAME"
    add("--data", required=True, nargs="+", help=sets)
    add("--limit", type=Count, help="at most so many questions of each set")
    add("--out", type=Path, help="folder of the log and the report (default: runs/evaluate/NAME of the model)")
    add("--batch-size", type=Count, default=64, help="rollouts at a time")
    add("--prompt", type=Path, help="a file with the user message, {question} in it (default: the model's own)")
    add("--no-quantize", action="store_true", help="16 or 32 bits a weight instead of NF4's 4")
    add("--thinking", action="store_true", help="switch Qwen3's thinking mode on; give it a larger --max-turn-tokens")
    add_fields(parser, Limits)


def add_fields(parser: argparse.ArgumentParser, kind: type[Limits]) -> None:
    """An argument for each field; its range is checked when ``kind`` is made of them."""
    for name, field in kind.model_fields.items():
        told = f"{field.description} (default: {field.default})"
        how: dict[str, Any] = {"type": type(field.default), "default": field.default, "metavar": "VALUE", "help": told}
        parser.add_argument("--" + name.replace("_", "-"), **how)


def run(args: argparse.Namespace) -> None:
    """Answer what is not answered yet, print the table, and write it to ``report.json``."""
    args.out = args.out or Path("runs/evaluate") / re.sub(r"[^\w.-]+", "_", args.adapter or args.model).strip("_.")
    print(_evaluate_from_shell(args))


def _evaluate_from_shell(args: argparse.Namespace) -> str:
    """The table's text; everything that can be refused is refused before the model is loaded."""
    from ..training.policy import check_model_folder, load_policy

    say = lambda line: print(line, file=sys.stderr, flush=True)
    limits = Limits(**{name: vars(args)[name] for name in Limits.model_fields}).limits()
    check_out(args.out, ("settings.json", "trajectories.jsonl", "report.json"))
    questions = read_sets(args.data, args.limit)
    check_model_folder(args.model)
    prompt = args.prompt.read_text(encoding="utf-8") if args.prompt else None
    if prompt is not None and "{question}" not in prompt:
        raise ValueError(f"{args.prompt}: the prompt has no {{question}}")
    with redirect_stdout(sys.stderr):  # what an engine says of itself is no part of the table
        engine = open_engine(args.engine, args.data, args.limit)
    loading = {"prompt": prompt, "quantize": not args.no_quantize, "thinking": args.thinking}
    how = {"num_generations": 1, "temperature": 0.0, **limits}
    settings = {"model": args.model, "weights": hashes(args.model), "adapter": args.adapter and hashes(args.adapter)}
    settings |= {"engine": engine.identity, **loading, "limits": how, "versions": versions(DECIDING)}
    log = TrajectoryLog(args.out / "trajectories.jsonl")
    if log.path.exists():
        _check_same(args.out / "settings.json", settings)
    done = answered(log, questions)
    left = [q for q in questions if key_of(q) not in done or done[key_of(q)]["failed"]]
    if left:
        say(f"{len(left):,} of {len(questions):,} questions to answer; the log is {log.path}")
        engine.search(left[0].text, k=1)  # an engine that is down must not cost an evaluation
        policy = load_policy(args.model, adapter=args.adapter, lora=bool(args.adapter), **loading)
        write_json(args.out / "settings.json", settings)
        for batch in _batches(policy, left, engine, args.batch_size, **how):
            log.append(batch)
        done = answered(log, questions)
    table, failed = paper_table(done.values()), sum(row["failed"] for row in done.values())
    write_json(args.out / "report.json", {"table": table, "failed_searches": failed})
    if failed:
        say(f"{failed} searches failed, so the figures are too low: the same command again redoes those questions")
    say(f"the table is also in {args.out / 'report.json'}")
    return format_paper_table(table)


def _check_same(file: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError where a folder holds the evaluation of something else."""
    before = read_json(file)
    if not isinstance(before, dict):
        raise ValueError(f"{file}: no settings of an evaluation; choose another --out")
    if differ := sorted(name for name in settings if before.get(name) != settings[name]):
        raise ValueError(f"{file.parent} holds an evaluation with another {', '.join(differ)}; choose another --out")
