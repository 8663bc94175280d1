"""Shared set-up of the tests: no network, no display, no timing assumptions on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: several threads would mostly wait for one another
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.worlds.almanac import build_world

settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")


@pytest.fixture(scope="module")
def world():
    """The almanac as it ships, with what each question is about."""
    return build_world(0)


@pytest.fixture(scope="module")
def engine(world):
    return BM25Search(world.passages)
