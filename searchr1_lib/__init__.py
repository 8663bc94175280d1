"""Search-R1 for everyone: GRPO teaches a language model when to search and when to answer.

The main names can be had from here, ``from searchr1_lib import LocalSearch, train_grpo``; a name loads its module when
it is first used, so ``import searchr1_lib`` loads neither torch nor transformers nor faiss.

"""

from importlib import import_module

__version__ = "0.1.0"

_NAMES = {
    "records": "Passage Hit Question SearchCall Segment Trajectory",
    "files": "TrajectoryLog",
    "worlds.public": "load_passages load_questions",
    "search": "BM25Search CachedSearch DenseSearch HybridSearch LocalSearch RemoteSearch RerankedSearch SQLiteSearch "
    "ShardedSearch WebSearch",
    "rewards": "normalize_answer exact_match f1_score ExactMatch F1 SearchCost Composite",
    "training.grpo": "group_advantages policy_loss",
    "training.policy": "Policy export_merged load_policy",
    "training.settings": "Settings",
    "training.trainer": "Trainer train_grpo",
    "training.rollout": "rollout",
    "study.evaluate": "Report evaluate",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
