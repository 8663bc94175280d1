"""Shared set-up of the tests: no network, no display, no timing assumptions on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: several threads would mostly wait for one another
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")
