"""Rewards: callables on a batch of trajectories, composable, safe against text the model did not write."""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "base": "Reward TurnReward RewardError score checked final_answer answer_flags model_turns",
    "answer": "normalize_answer exact_match f1_score substring_match ExactMatch F1 SubstringMatch",
    "cost": "Discounted SearchCost searches_by_turn",
    "process": "Format Malformed Retrieval format_errors",
    "composite": "Composite SearchR1Reward",
    "shaped": "Product Threshold Scaled Standardized",
    "steps": "HierarchicalReward InformationGain RepeatedSearch",
    "published": "SearchR1Format OTC IKEA ConfidentSearch OverlongPenalty search_confidence",
    "semantic": "SemanticSimilarity Affine Cutoff fit_affine fit_cutoff",
    "judge": "Judge JudgeBudgetError parse_score",
    "rubrics": "Rubric Ranking JudgeOfPairs",
    "endpoints": "ChatEndpoint LocalChat EmbeddingsEndpoint EndpointError Reply",
    "preference": "PreferenceReward Choice record_choice read_choices visible FEATURES",
    "byhand": "handwritten",
    "byname": "build",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
