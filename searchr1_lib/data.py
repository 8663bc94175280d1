"""Questions and corpora from JSON Lines, Parquet or the hub; every broken row is reported with its number.

A source is a path (``.jsonl``, ``.jsonl.gz`` or ``.parquet``) or the name of a data set on the Hugging Face
hub, written ``hub:owner/name``. The hub is streamed, so a row limit is enough to keep it small; it is the only
thing here that touches the network.

Rows may be in our own form (the fields of ``Question`` and ``Passage``), in the plain form
``{"question", "answers", "gold_ids"}``, or in Search-R1's: passages with ``contents`` (``"Title"\\ntext``) and
questions with ``reward_model.ground_truth.target``.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from .records import Passage, Question

HUB = "hub:"


class DataError(ValueError):
    """A source that cannot be read as asked; the message names the file, the line and the field."""


def load_questions(
    source: str | os.PathLike, *, split: str = "train", config: str | None = None,
    limit: int | None = None, on_error: str = "raise",
) -> list[Question]:
    """Read questions.

    Args:
        source: a path, or ``hub:owner/name``.
        split, config: which part of a hub data set; unused for a path.
        limit: read at most this many rows; required for the hub.
        on_error: "raise", or "skip" to leave broken rows out with one warning that counts them.

    Raises:
        FileNotFoundError: no such file.
        DataError: a broken row, an id that stands twice, no question at all, or the hub out of reach.
    """
    return list(_records(source, _question, split, config, limit, on_error))


def load_passages(
    source: str | os.PathLike, *, split: str = "train", config: str | None = None,
    limit: int | None = None, on_error: str = "raise",
) -> list[Passage]:
    """Read a corpus; arguments and errors as in ``load_questions``."""
    return list(_records(source, _passage, split, config, limit, on_error))


def save_questions(path: str | os.PathLike, questions: Iterable[Question]) -> None:
    """Write questions as JSON Lines in our own form; the file appears whole or not at all."""
    _save(path, questions)


def save_passages(path: str | os.PathLike, passages: Iterable[Passage]) -> None:
    """Write passages as JSON Lines in our own form; the file appears whole or not at all."""
    _save(path, passages)


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of Search-R1's ``contents``; without a line break all of it is text.

    >>> split_contents('"Penicillin"\\nIt was discovered by Fleming.')
    ('Penicillin', 'It was discovered by Fleming.')
    """
    title, newline, text = contents.partition("\n")
    return (title.strip().removeprefix('"').removesuffix('"'), text) if newline else ("", title)


def _save(path: str | os.PathLike, records: Iterable) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as f:
            for record in records:
                f.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _records(source, make: Callable, split, config, limit, on_error) -> Iterator:
    """Yield one record a row; ``make(row)`` raises ValueError with the field's name where a row is broken."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    rows, unit = _rows(source, split, config, limit)
    seen: dict[str, int] = {}
    skipped, first = 0, ""
    for number, row in rows:
        if limit is not None and len(seen) + skipped >= limit:
            break
        try:
            record = make(row() if callable(row) else row)
            if (before := seen.setdefault(record.id, number)) != number:
                raise ValueError(f"field 'id': {record.id!r} stood already in {unit} {before}")
        except ValueError as e:
            message = f"{source}, {unit} {number}: {e}"
            if on_error == "raise":
                raise DataError(message + " (on_error='skip' leaves such rows out)") from None
            skipped, first = skipped + 1, first or message
            continue
        yield record
    if not seen:
        raise DataError(first or f"{source}: holds no rows")
    if skipped:
        warnings.warn(f"{skipped} broken row(s) skipped, the first: {first}", stacklevel=3)


def _rows(source, split, config, limit) -> tuple[Iterator[tuple[int, Any]], str]:
    """``(number from 1, row or a function that parses it)`` for each row, and what a row is called."""
    if isinstance(source, str) and source.startswith(HUB):
        return enumerate(_hub_rows(source, split, config, limit), 1), "row"
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file (for a data set on the hub write {HUB}owner/name)")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path), "line"
    if path.suffix == ".parquet":
        return enumerate(_parquet_rows(path), 1), "row"
    raise DataError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file")


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


def _hub_rows(source: str, split: str, config: str | None, limit: int | None) -> Iterator[dict]:
    if limit is None:
        raise ValueError(f"{source}: give limit=, the number of rows to stream from the hub")
    import datasets

    try:
        yield from datasets.load_dataset(source[len(HUB):], config, split=split, streaming=True).take(limit)
    except Exception as e:  # the hub's client raises many kinds: no network, no such name, gated, offline mode
        raise DataError(
            f"{source}: cannot stream split {split!r} from the hub ({type(e).__name__}: {e}). Check the name, the "
            "network and HF_HUB_OFFLINE, or give the path of a local .jsonl or .parquet file"
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


def _question(row: dict) -> Question:
    source = _text(*_get(row, "source", "data_source", default=""))
    name, answers = _get(row, "answers", "reward_model.ground_truth.target", "golden_answers", "answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"field '{name}': expected a list with at least one answer")
    answers = [_filled(name, a) for a in answers]
    name, passages = _get(row, "passages", "gold_ids", default=[])
    if not isinstance(passages, list):
        raise ValueError(f"field '{name}': expected a list of passage ids")
    passages = [_id(name, p) for p in passages]
    name, hops = _get(row, "hops", default=max(1, len(passages)))
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 1:
        raise ValueError(f"field '{name}': expected a whole number from 1, found {hops!r}")
    name, known = _get(row, "known", default=None)
    if known is not None and not isinstance(known, bool):
        raise ValueError(f"field '{name}': expected true, false or null, found {known!r}")
    return Question(_question_id(row, source), _question_text(row), answers,
                    passages=passages, hops=hops, known=known, source=source)


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
