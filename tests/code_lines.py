"""Code lines (no blanks, comments, docstrings) of the core and of the whole library: ``python tests/code_lines.py``."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

HOME = Path(__file__).resolve().parents[1] / "searchr1_lib"
#: What people mean by a thin library: enough to train. A folder stands for all in it.
CORE_FILES = (
    "records files data metrics environment training "
    "rewards/base rewards/answer rewards/cost rewards/process rewards/composite "
    "search/base search/http search/bm25 search/local search/remote search/words"
).split()
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def files() -> dict[str, Path]:
    """The library's files by their name without ending, such as "rewards/base"."""
    return {path.relative_to(HOME).with_suffix("").as_posix(): path for path in sorted(HOME.rglob("*.py"))}


def in_core(name: str) -> bool:
    return name in CORE_FILES or name.split("/")[0] in CORE_FILES


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code; a text that stands alone is a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def functions(source: str) -> dict[str, int]:
    """Code lines of every function, nested ones included, by "name (line)"."""
    lines = code_lines(source)
    defined = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{n.name} (line {n.lineno})": len(lines & set(range(n.lineno, n.end_lineno + 1))) for n in defined}


def total(names: Iterable[str]) -> int:
    return sum(len(code_lines(files()[name].read_text(encoding="utf-8"))) for name in names)


if __name__ == "__main__":
    for name in files():
        print(f"{total([name]):6,}  {name}{' (core)' * in_core(name)}")
    print(f"{total(filter(in_core, files())):6,}  the core\n{total(files()):6,}  the library")
