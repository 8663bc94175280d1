"""Search engines, one a file, all with ``search(query, k)`` and ``search_batch(queries, k)``.

An engine's module is imported when its name is first used, so ``import searchr1_lib.search`` stays light.
"""

from importlib import import_module

_NAMES = {
    "base": "Engine IndexFolderError SearchError",
    "bm25": "BM25Search",
    "cached": "CachedSearch",
    "dense": "DenseSearch encode_passages",
    "hybrid": "HybridSearch",
    "local": "LocalSearch",
    "memory": "Mem0Store MemoryStore",
    "quality": "measure",
    "remote": "RemoteSearch",
    "rerank": "RerankedSearch cosine_scorer cross_encoder",
    "server": "make_app",
    "sharded": "ShardedSearch",
    "sqlite": "SQLiteSearch",
    "web": "WebSearch",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__
