"""The name under which the loader of verifiers finds our task set and harness."""

from searchr1_lib.engines.verifiers import *  # noqa: F403
from searchr1_lib.engines.verifiers import __all__  # noqa: F401
