"""Files that are whole or not there: the only place that knows how a file is made safe.

What is written stands under a temporary name until it is on the disk, and only then takes its own name. JSON Lines
that grow (the trajectory log) are appended to; a line that a crash cut off is no line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .records import Trajectory


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` if all goes well and nothing otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _to_disk(temporary)  # content first, then the name: after a power cut no name may mean an empty file
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` if all goes well, and vanishes otherwise.

    A folder that stands at ``path`` is replaced; no system can do that in one step, so a kill just between the two
    leaves it beside its place (as ``.NAME.PID.old``).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _to_disk(file)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        _to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all; half a surrogate pair becomes its escape."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write one value as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, whole or not at all; more rows than fit into memory are no problem."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        file.writelines(map(_line, rows))


def append_json_lines(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Add one JSON object a line and flush them to disk; a last line that a crash cut off is removed first.

    One process appends to a file at a time; others may read it meanwhile.
    """
    lines, path = b"".join(map(_line, rows)), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _drop_cut_line(file)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None


def read_json_lines(path: str | os.PathLike, make: Callable[[Any], Any] = lambda row: row) -> Iterator:
    """Yield ``make(row)`` for every line in order; a last one that a crash cut off is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON, or ``make`` refuses it with a ValueError; names file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield make(json.loads(line))
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: {e}") from None


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TrajectoryLog:
    """Trajectories as JSON Lines: appended, never rewritten, readable after a crash in mid-write."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, trajectories: Iterable[Trajectory]) -> None:
        """Add trajectories and flush them to disk, see ``append_json_lines``."""
        append_json_lines(self.path, (t.to_dict() for t in trajectories))

    def __iter__(self) -> Iterator[Trajectory]:
        """Yield the trajectories in the order of writing, one at a time.

        Raises:
            FileNotFoundError: there is no log.
            ValueError: a line other than a cut last one is broken; names file and line.
        """
        if not self.path.exists():
            raise FileNotFoundError(f"no trajectory log at {self.path}")
        return read_json_lines(self.path, Trajectory.from_dict)

    def read(self) -> list[Trajectory]:
        """All trajectories; see ``__iter__`` for the errors."""
        return list(self)


def _line(row: Any) -> bytes:
    """A row as a line of JSON; half a surrogate pair, which UTF-8 cannot hold, stays as its JSON escape."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _to_disk(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _drop_cut_line(file) -> None:
    """Cut a file open for binary reading and writing back to the end of its last whole line."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        if (newline := file.read(end - start).rfind(b"\n")) >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
    file.seek(end)
