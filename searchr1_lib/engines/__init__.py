"""Where else does it run? The same episodes in other people's engines, one file an engine.

Nothing here is imported by the rest of the library, and a file imports its engine only when it is itself imported:

    formats     a trajectory as the record of any of them, and back (needs none of them)
    world       episodes in text alone, for engines that keep the tokens to themselves; questions as their Parquet
    served      a decoder behind a server of vLLM or SGLang
    trl, verl, skyrl, openenv, verifiers

docs/engines.md is the page to read.
"""
