"""What a run is made of, by content, so that no folder goes on with another reward, engine or model than its own."""

from __future__ import annotations

import dis
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from ..records import Question

_PLAIN = (str, bytes, int, float, complex, type(None))


def identity(thing: Any) -> str:
    """A name for what a reward or a function computes, such as "OTC 3f0a96b1c24d": equal content has an equal name.

    A thing may say it itself, in a text ``identity``. Else an object is its class and its public attributes; a function
    its code, its defaults and what it reads from around it; what is installed is known by its name. Nothing can be
    read back from it.

    >>> identity(partial(max, key=len)) == identity(partial(max, key=len))
    True
    >>> identity(partial(max, key=len)) == identity(partial(max, key=str))
    False
    """
    name = getattr(thing, "__name__", type(thing).__name__)
    return f"{name} {_sha256([repr(_content(thing, frozenset()))])}"


def of_questions(questions: Iterable[Question]) -> str:
    """Which questions, in which order."""
    return _sha256(json.dumps(asdict(question)) for question in questions)


def of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Which weights, by the first 4,096 numbers of each."""
    beginning = lambda w: w.detach().flatten()[:4096].cpu().contiguous().view(torch.uint8).numpy().tobytes().hex()
    return _sha256(f"{name} {w.dtype} {tuple(w.shape)} {beginning(w)}" for name, w in sorted(weights.items()))


def _sha256(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()[:12]


def _content(x: Any, around: frozenset[int]) -> Any:
    """A thing as nested plain values; ``around`` are the ids of what it stands in."""
    if id(x) in around:
        return "itself"
    inner = lambda value: _content(value, around | {id(x)})
    if isinstance(x, _PLAIN):
        return x
    if isinstance(x, ModuleType):
        return x.__name__
    if isinstance(said := getattr(x, "identity", None), str):
        return said
    if isinstance(x, Mapping):
        return sorted((repr(key), inner(value)) for key, value in x.items())
    if isinstance(x, Sequence):
        return [inner(value) for value in x]
    if isinstance(x, (set, frozenset)):
        return sorted(repr(inner(value)) for value in x)
    if isinstance(x, CodeType):
        return [x.co_code, x.co_names, inner(x.co_consts)]
    if isinstance(x, (MethodType, partial)):
        return [
            inner(getattr(x, name)) for name in ("__self__", "__func__", "func", "args", "keywords") if hasattr(x, name)
        ]
    if isinstance(x, FunctionType) and not _installed(x):
        read = {name: x.__globals__[name] for name in _names(x.__code__) if name in x.__globals__}
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        return inner([x.__code__, x.__defaults__, x.__kwdefaults__, read, cells])
    if hasattr(x, "tobytes"):  # an array
        return x.tobytes()
    kind = x if hasattr(x, "__qualname__") else type(x)
    own = {} if kind is x else {name: value for name, value in getattr(x, "__dict__", {}).items() if name[0] != "_"}
    methods = [f for f in vars(type(x)).values() if isinstance(f, FunctionType) and not _installed(f)]
    return [f"{kind.__module__}.{kind.__qualname__}", inner(own), inner(methods if kind is not x else [])]


def _names(code: CodeType) -> set[str]:
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}  # co_names has attributes too
    return own.union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _installed(function: FunctionType) -> bool:
    return "site-packages" in function.__code__.co_filename or function.__module__.startswith("searchr1_lib.")
