"""Questions and passages from JSON Lines and Parquet; every broken row is reported with file, line and field.

Rows are in our own form (the fields of ``Question`` and ``Passage``) or call these fields as common data sets do
("question", "gold_ids", "golden_answers", "contents", ...). Public sets by name, the hub, and layouts whose rows carry
their passages are in ``worlds.public``, which builds on this.
"""

from __future__ import annotations

import gzip
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from .files import write_json_lines
from .records import Passage, Question, texts


class DataError(ValueError):
    """A source that cannot be read as asked; the message names the file, the line and the field."""


def load_questions(path: str | os.PathLike, *, limit: int | None = None, on_error: str = "raise") -> list[Question]:
    """Read questions.

    Args:
        path: a file: ``.jsonl``, ``.jsonl.gz`` or ``.parquet``.
        limit: read at most this many rows.
        on_error: "raise", or "skip" to leave broken rows out with one warning that counts them.

    Raises:
        FileNotFoundError: no such file.
        DataError: a broken row, an id that stands twice, or no question at all.
    """
    return list(records(path, *rows_of(path), question_of, limit=limit, on_error=on_error))


def load_passages(path: str | os.PathLike, *, limit: int | None = None, on_error: str = "raise") -> list[Passage]:
    """Read a corpus; arguments and errors as in ``load_questions``."""
    return list(records(path, *rows_of(path), passage_of, limit=limit, on_error=on_error))


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


def records(
    source: Any,
    rows: Iterable[tuple[int, Any]],
    unit: str,
    make: Callable[[dict], Any],
    *,
    limit: int | None = None,
    on_error: str = "raise",
    unique: bool = True,
) -> Iterator[Any]:
    """Yield ``make(row)`` for each of ``rows``; it raises ValueError with the field's name where a row is broken.

    Args:
        source: where the rows are from, for messages.
        rows, unit: what ``rows_of`` gives.
        limit, on_error: see ``load_questions``.
        unique: False does not look for ids that stand twice: remembering 21 million of them takes gigabytes.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    seen: dict[str, int] = {}
    read, skipped, first = 0, 0, ""
    for number, row in islice(rows, limit):
        read += 1
        try:
            record = make(_parse(row) if isinstance(row, bytes) else row)
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


def rows_of(path: str | os.PathLike) -> tuple[Iterator[tuple[int, Any]], str]:
    """``(number from 1, row)`` for each row of a file, and what a row is called; a line of JSON is not parsed yet."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path), "line"
    if path.suffix == ".parquet":
        return enumerate(_parquet_rows(path), 1), "row"
    raise DataError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file")


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
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


_MISSING = object()


def field(row: dict, *names: str, default: Any = _MISSING) -> tuple[str, Any]:
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


def text_of(name: str, value: Any) -> str:
    """The value of a field that must be text."""
    if not isinstance(value, str):
        raise ValueError(f"field '{name}': expected text, found {type(value).__name__}")
    if value.encode("utf-8", "ignore").decode() != value:
        raise ValueError(f"field '{name}': holds half a surrogate pair")
    return value


def filled(name: str, value: Any) -> str:
    """The value of a field that must be text, and not blank."""
    if not text_of(name, value).strip():
        raise ValueError(f"field '{name}' is empty")
    return value


def id_of(name: str, value: Any) -> str:
    """An id, which may also be a whole number; True is none."""
    if type(value) not in (str, int):
        raise ValueError(f"field '{name}': expected text or a whole number, found {type(value).__name__}")
    return filled(name, str(value))


def passage_of(row: dict) -> Passage:
    """The passage of a row."""
    id = id_of(*field(row, "id", "_id"))
    if row.get("text") is None and row.get("contents") is not None:
        return Passage(id, *split_contents(filled("contents", row["contents"])))
    return Passage(id, text_of(*field(row, "title", default="")), filled(*field(row, "text")))


def question_of(row: dict) -> Question:
    """The question of a row."""
    name, answers = field(row, "answers", "reward_model.ground_truth.target", "golden_answers", "answer")
    answers = texts(name, answers) + texts(*field(row, "answer_aliases", default=[]))
    # an alias may be empty, as long as another one is not
    answers = [a for a in answers if text_of(name, a).strip()]
    if not answers:
        raise ValueError(f"field '{name}': expected a list with at least one answer that is not empty")
    name, passages = field(row, "passages", "gold_ids", default=[])
    if not isinstance(passages, list):
        raise ValueError(f"field '{name}': expected a list of passage ids")
    passages = [id_of(name, p) for p in passages]
    name, hops = field(row, "hops", default=max(1, len(passages)))
    if type(hops) is not int or hops < 1:
        raise ValueError(f"field '{name}': expected a whole number from 1, found {hops!r}")
    name, known = field(row, "known", default=None)
    if known is not None and not isinstance(known, bool):
        raise ValueError(f"field '{name}': expected true, false or null, found {known!r}")
    id, text = id_of(*field(row, "id", "_id")), filled(*field(row, "text", "question"))
    source = text_of(*field(row, "source", "data_source", default=""))
    return Question(id, text, answers, passages=passages, hops=hops, known=known, source=source)
