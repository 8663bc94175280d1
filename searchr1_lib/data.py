"""Questions and corpora from JSON Lines, Parquet or the hub; every broken row is reported with its number.

A source is one of
    - a path (``.jsonl``, ``.jsonl.gz`` or ``.parquet``), or a folder with such a file for each split;
    - the name of a public question set (see ``SETS``: the seven of the Search-R1 paper, "nq", "hotpotqa", ..., and
      its training set, "search-r1") or of a corpus (``CORPORA``: "wiki-18"). A folder of that name comes first;
    - any data set on the Hugging Face hub, written ``hub:owner/name``.
The hub is streamed, so a row limit is enough to keep it small; it is the only thing here that touches the network.

Rows may be in our own form (the fields of ``Question`` and ``Passage``), in the plain form
``{"question", "answers", "gold_ids"}``, in Search-R1's (passages with ``contents``, ``"Title"\\ntext``, and questions
with ``reward_model.ground_truth.target``), in FlashRAG's (``golden_answers``) or in that of HotpotQA,
2WikiMultihopQA and MuSiQue, whose rows carry the passages that they need: see ``load_with_passages``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from .files import write_json_lines
from .records import Passage, Question

HUB = "hub:"
_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_SEARCH_R1 = "PeterJinGo/nq_hotpotqa_train"
_PUBLIC = "nq:test triviaqa:test popqa:test hotpotqa:dev 2wikimultihopqa:dev musique:dev bamboogle:test search-r1:test"

#: The question sets that are known by name, with the split that papers report on. The first seven are those of the
#: Search-R1 paper, in the order of its tables; "search-r1" is what it trains on, its test split all seven in one.
SETS = dict(pair.split(":") for pair in _PUBLIC.split())
#: The corpora that are known by name.
CORPORA = {"wiki-18": HUB + "PeterJinGo/wiki-18-corpus"}


class DataError(ValueError):
    """A source that cannot be read as asked; the message names the file, the line and the field."""


def load_questions(
    source: str | os.PathLike,
    *,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    on_error: str = "raise",
) -> list[Question]:
    """Read questions.

    Args:
        source: a path, a name of ``SETS``, or ``hub:owner/name``. Rows of a named set without a source of their own
            get its name as ``source`` and before their ids, so that sets can be put together.
        split: None is the split that papers report on (``SETS``); in a folder the first of test, dev, validation
            and train that is there; of another hub data set "train". Unused for a file.
        config: which part of a ``hub:`` data set.
        limit: read at most this many rows; required for ``hub:`` data sets.
        on_error: "raise", or "skip" to leave broken rows out with one warning that counts them.

    Raises:
        FileNotFoundError: no such file.
        DataError: a broken row, an id that stands twice, no question at all, or the hub out of reach.
    """
    make = partial(_question, label=_set_name(source))
    return list(_records(source, make, split=split, config=config, limit=limit, on_error=on_error))


def load_passages(source: str | os.PathLike, **how: Any) -> list[Passage]:
    """Read a corpus: a path, "wiki-18" or ``hub:owner/name``; arguments and errors as in ``load_questions``."""
    return list(_records(CORPORA.get(str(source), source), _passage, **how))


def load_with_passages(source: str | os.PathLike, **how: Any) -> tuple[list[Question], list[Passage]]:
    """Read questions and the passages that their rows carry, gold and distractors, each once.

    So a part of HotpotQA, 2WikiMultihopQA or MuSiQue comes with a corpus that fits in memory, and ``passages`` of
    each question names its gold ones. (FlashRAG's MuSiQue carries gold passages only: those of the other questions
    are the distractors.) Arguments and errors as in ``load_questions``.

    Raises:
        DataError: also when no row carries a passage.
    """
    passages: dict[str, Passage] = {}
    label = _set_name(source)

    def make(row: dict) -> Question:
        question = _question(row, label)
        passages.update((p.id, p) for p in _carried(row)[0])
        return question

    questions = list(_records(source, make, **how))
    if not passages:
        raise DataError(
            f"{source}: its rows carry no passages. Search a retrieval server (RemoteSearch), or read a corpus: "
            "load_passages('wiki-18', limit=...), or its part about these questions with select_passages"
        )
    return questions, list(passages.values())


def select_passages(
    source: str | os.PathLike, questions: Iterable[Question], *, others: int = 0, **how: Any
) -> list[Passage]:
    """The part of a large corpus that is about the questions: read row by row, only that part is kept.

    A passage is kept if it is named as a gold one, or if its title (without what stands in brackets) is an answer or
    a run of words of a question. That is a rule of thumb: the passage of a second hop can be missed.

    Args:
        source: as in ``load_passages``, e.g. "wiki-18".
        others: keep every so many-th other passage too, as a distractor; 0: none.
        **how: split, config, limit and on_error of ``load_passages``; limit is the number of rows to read.
    """
    questions = list(questions)
    gold = {id for q in questions for id in q.passages}
    names = {name for q in questions for text in (q.text, *q.answers) for name in _runs(text)}
    kept: dict[str, Passage] = {}
    rows = _records(CORPORA.get(str(source), source), _passage, unique=False, **how)
    for number, passage in enumerate(rows):
        about = passage.id in gold or " ".join(_words(re.sub(r"\(.*?\)", "", passage.title))) in names
        if about or (others and number % others == 0):
            kept.setdefault(passage.id, passage)
    return list(kept.values())


def save_questions(path: str | os.PathLike, questions: Iterable[Question]) -> None:
    """Write questions as JSON Lines in our own form; the file appears whole or not at all."""
    write_json_lines(path, map(asdict, questions))


def save_passages(path: str | os.PathLike, passages: Iterable[Passage]) -> None:
    """Write passages as JSON Lines in our own form; the file appears whole or not at all."""
    write_json_lines(path, map(asdict, passages))


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of Search-R1's ``contents``; without a line break all of it is text.

    >>> split_contents('"Penicillin"\\nIt was discovered by Fleming.')
    ('Penicillin', 'It was discovered by Fleming.')
    """
    title, newline, text = contents.partition("\n")
    return (title.strip().removeprefix('"').removesuffix('"'), text) if newline else ("", title)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(text: str, longest: int = 8) -> Iterator[str]:
    """Every run of up to so many words, in lower case; a single word only if it has four letters or more."""
    words = _words(text)
    for start in range(len(words)):
        for end in range(start + 1, min(start + longest, len(words)) + 1):
            if end - start > 1 or len(words[start]) > 3:
                yield " ".join(words[start:end])


def _records(
    source, make: Callable, *, split=None, config=None, limit=None, on_error="raise", unique: bool = True
) -> Iterator:
    """Yield one record a row; ``make(row)`` raises ValueError with the field's name where a row is broken.

    ``unique`` False does not look for ids that stand twice: remembering 21 million of them takes gigabytes.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    rows, unit = _rows(source, split, config, limit)
    seen: dict[str, int] = {}
    read, skipped, first = 0, 0, ""
    for number, row in islice(rows, limit):
        read += 1
        try:
            record = make(row() if callable(row) else row)
            if unique and (before := seen.setdefault(record.id, number)) != number:
                raise ValueError(f"field 'id': {record.id!r} stood already in {unit} {before}")
        except ValueError as e:
            message = f"{source}, {unit} {number}: {e}"
            if on_error == "raise":
                raise DataError(message + " (on_error='skip' leaves such rows out)") from None
            skipped, first = skipped + 1, first or message
            continue
        yield record
    if read == skipped:
        raise DataError(first or f"{source}: holds no rows")
    if skipped:
        warnings.warn(f"{skipped} broken row(s) skipped, the first: {first}", stacklevel=3)


def _rows(source, split, config, limit) -> tuple[Iterator[tuple[int, Any]], str]:
    """``(number from 1, row or a function that parses it)`` for each row, and what a row is called."""
    if isinstance(source, str) and source.startswith(HUB):
        if limit is None:
            raise ValueError(f"{source}: give limit=, the number of rows to stream from the hub")
        return enumerate(_hub_rows(source[len(HUB) :], split or "train", limit, name=config), 1), "row"
    path = Path(source)
    if not path.exists() and source in SETS:
        return enumerate(_set_rows(source, split or SETS[source], limit), 1), "row"
    if path.is_dir():
        path = _split_file(path, split)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file (for a data set on the hub write {HUB}owner/name or one of {', '.join(SETS)})"
        )
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path), "line"
    if path.suffix == ".parquet":
        return enumerate(_parquet_rows(path), 1), "row"
    raise DataError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file")


def _set_name(source: str | os.PathLike) -> str:
    """The name of the set that a source is: the name itself, or that of a folder or of a file's folder; else ""."""
    path = Path(source)
    name = path.parent.name if path.is_file() else path.name
    return name if name in SETS else ""


def _split_file(folder: Path, split: str | None) -> Path:
    splits = [split] if split else ["test", "dev", "validation", "train"]
    files = [folder / f"{s}{end}" for s in splits for end in (".jsonl", ".jsonl.gz", ".parquet")]
    return next((f for f in files if f.exists()), files[0])


def _set_rows(name: str, split: str, limit: int | None) -> Iterator[dict]:
    if name == "search-r1":  # its two files differ in their columns, so the hub's client must see only one of them
        return _hub_rows(_SEARCH_R1, split, limit, data_files={split: f"{split}.parquet"})
    return _hub_rows(_FLASHRAG, split, limit, name=name)


def _json_lines(path: Path) -> Iterator[tuple[int, Callable]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, lambda line=line: _parse(line)
        except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as e:
            raise DataError(f"{path}: the compressed file is broken: {e}") from None


def _parse(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable Parquet file: {e}") from None


def _hub_rows(repository: str, split: str, limit: int | None, **which: Any) -> Iterator[dict]:
    import datasets

    try:
        rows = datasets.load_dataset(repository, split=split, streaming=True, **which)
        yield from rows if limit is None else rows.take(limit)
    except Exception as e:  # the hub's client raises many kinds: no network, no such name, gated, offline mode
        raise DataError(
            f"{HUB}{repository}: cannot stream split {split!r} from the hub ({type(e).__name__}: {e}). Check the name, "
            "the network and HF_HUB_OFFLINE, or give the path of a local .jsonl or .parquet file"
        ) from e


_MISSING = object()


def _get(row: dict, *names: str, default=_MISSING):
    """``(name, value)`` of the first field of ``names`` that the row has; null counts as absent."""
    for name in names:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return name, value
    if default is _MISSING:
        raise ValueError(f"field '{names[0]}' is missing")
    return names[0], default


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field '{name}': expected text, found {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field '{name}': holds half a surrogate pair") from None
    return value


def _filled(name: str, value: Any) -> str:
    if not _text(name, value).strip():
        raise ValueError(f"field '{name}' is empty")
    return value


def _id(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"field '{name}': expected text or a whole number, found {type(value).__name__}")
    return _filled(name, str(value))


def _passage(row: dict) -> Passage:
    id = _id(*_get(row, "id"))
    if row.get("text") is None and row.get("contents") is not None:
        return Passage(id, *split_contents(_filled("contents", row["contents"])))
    return Passage(id, _text(*_get(row, "title", default="")), _filled(*_get(row, "text", "contents")))


def _question(row: dict, label: str = "") -> Question:
    source = _text(*_get(row, "source", "data_source", default=""))
    name, answers = _get(row, "answers", "reward_model.ground_truth.target", "golden_answers", "answer")
    answers = [answers, *_get(row, "answer_aliases", default=[])[1]] if isinstance(answers, str) else answers
    # an alias may be empty, as long as another one is not
    answers = [a for a in answers if _text(name, a).strip()] if isinstance(answers, list) else []
    if not answers:
        raise ValueError(f"field '{name}': expected a list with at least one answer that is not empty")
    name, passages = _get(row, "passages", "gold_ids", default=None)
    if passages is None:
        passages = _carried(row)[1]
    elif not isinstance(passages, list):
        raise ValueError(f"field '{name}': expected a list of passage ids")
    passages = [_id(name, p) for p in passages]
    name, hops = _get(row, "hops", default=max(1, len(passages)))
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 1:
        raise ValueError(f"field '{name}': expected a whole number from 1, found {hops!r}")
    name, known = _get(row, "known", default=None)
    if known is not None and not isinstance(known, bool):
        raise ValueError(f"field '{name}': expected true, false or null, found {known!r}")
    id = _question_id(row, source)
    if label and not source:
        id, source = f"{label}/{id}", label
    return Question(id, _question_text(row), answers, passages=passages, hops=hops, known=known, source=source)


def _carried(row: dict) -> tuple[list[Passage], list[str]]:
    """The passages that a row brings along, and the ids of the gold ones in the order of the hops."""
    name, context = _get(row, "metadata.context", "context", default=None)
    try:
        if isinstance(context, dict):
            passages, gold = _as_in_hotpotqa(row, context)
        else:
            name = "question_decomposition"
            passages, gold = _as_in_musique(row)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"field '{name}': its passages are not laid out as in HotpotQA or MuSiQue") from None
    gold = dict.fromkeys(p.id for p in gold if p.text.strip())
    return [p for p in passages if p.text.strip()], list(gold)


def _as_in_hotpotqa(row: dict, context: dict) -> tuple[list[Passage], list[Passage]]:
    """HotpotQA and 2WikiMultihopQA: a list of titles, a list of lists of sentences, and the titles that are gold."""
    sentences = _get(context, "sentences", "content", default=[])[1]
    passages = [_passage_of(t, " ".join(s.strip() for s in text)) for t, text in zip(context["title"], sentences)]
    gold = _get(row, "metadata.supporting_facts.title", "supporting_facts.title", default=[])[1]
    by_title = {p.title: p for p in passages}
    return passages, [by_title[title] for title in gold if title in by_title]


def _as_in_musique(row: dict) -> tuple[list[Passage], list[Passage]]:
    """MuSiQue: a list of paragraphs to which each step of the question points; FlashRAG keeps only those."""
    steps = _get(row, "metadata.question_decomposition", "question_decomposition", default=[])[1]
    if row.get("paragraphs") is not None:
        passages = [_passage_of(p["title"], p["paragraph_text"]) for p in row["paragraphs"]]
        return passages, [passages[step["paragraph_support_idx"]] for step in steps]
    supports = [step["support_paragraph"] for step in steps if step["support_paragraph"]]
    passages = [_passage_of(p["title"], p["paragraph_text"]) for p in supports]
    return passages, passages


def _passage_of(title: str, text: str) -> Passage:
    """A passage without an id of its own gets one from what it says, so that the same one is kept once."""
    title, text = _text("title", title), _text("paragraph_text", text)
    return Passage(hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:12], title, text)


def _question_id(row: dict, source: str) -> str:
    """The row's id; Search-R1 numbers each of its data sets from 0, so their name becomes part of it."""
    if "data_source" not in row:
        return _id(*_get(row, "id"))
    parts = [source, *(str(_get(row, f"extra_info.{n}", default="")[1]) for n in ("split", "index"))]
    id = _get(row, "id", default=None)[1]
    return "/".join([source, _id("id", id)] if id is not None else [p for p in parts if p])


def _question_text(row: dict) -> str:
    name, value = _get(row, "text", "question", "prompt")
    if name != "prompt":
        return _filled(name, value)
    try:
        message = _filled("prompt[-1].content", value[-1]["content"])
    except (TypeError, KeyError, IndexError):
        raise ValueError("field 'prompt': expected a list of messages with role and content") from None
    return _filled("prompt[-1].content", re.split(r"Question:\s*", message)[-1].strip())
