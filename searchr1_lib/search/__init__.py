"""Search engines, one a file, all with ``search(query, k)`` and ``search_batch(queries, k)``.

An engine's module is imported when its name is first used, so ``import searchr1_lib.search`` stays light.
"""

from importlib import import_module

_HOMES = {
    "BM25Search": "bm25",
    "CachedSearch": "cached",
    "cosine_scorer": "rerank",
    "cross_encoder": "rerank",
    "DenseSearch": "dense",
    "encode_passages": "dense",
    "Engine": "base",
    "HybridSearch": "hybrid",
    "IndexFolderError": "base",
    "LocalSearch": "local",
    "make_app": "server",
    "measure": "quality",
    "RemoteSearch": "remote",
    "RerankedSearch": "rerank",
    "SearchError": "base",
    "SQLiteSearch": "sqlite",
    "WebSearch": "web",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__
