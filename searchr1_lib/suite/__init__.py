"""The suite: numbered notebooks, run in reading order by papermill under one profile, into one run's folder.

    searchr1 run --profile cpu -p steps=20
    searchr1 sweep experiments/search_cost.yaml --jobs 2

Notebooks use it as ``from searchr1_lib import suite``; a name loads its module when it is first used.
"""

from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository's root, where ``notebooks/``, ``data/`` and ``runs/`` stand."""

_NAMES = {
    "profiles": "Profile load_profile parameters read_given resolve_profile",
    "runs": "Outcome failure_of notebooks open_run record require results_table run_suite",
    "sweep": "Experiment experiment_runs read_experiment read_runs run_sweep",
    "cli": "main",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
