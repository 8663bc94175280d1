"""Dense search: sentence vectors in a FAISS index, compared by cosine (Karpukhin et al. 2020, arXiv 2004.04906).

Encoding is the costly part, so it is a function of its own: ``encode_passages`` keeps what it has done in a
folder and goes on from there, and several indexes can be built from the same vectors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..files import read_json, write_json
from ..records import Hit, Passage
from .base import Engine, IndexFolderError, check_batch, corpus_sha256, identity_of, new_index, open_index, reading
from .encoders import MINILM, Encoder, load_encoder, vectors_of
from .words import clean, indexed

INDEX, VECTORS, STATE = "index.faiss", "vectors.f32", "vectors.json"
_CHUNK = 256  # passages encoded between two writes
_TRAIN = 20_000  # vectors that an index is trained on, more where it has many lists
#: A product quantiser; "np" after it leaves out its polysemous training, which we never use and which takes minutes.
_PLAIN_PQ = re.compile(r"(?<![A-Z])(PQ\d+(?:x\d+)?)(?![\dx+a-z])")
_PROBE = "Which river flows through the town?"  # tells one encoder from another

#: What the families of encoders were trained to see before a query and before a passage.
PREFIXES = (
    (r"(^|/)(multilingual-)?e5-(small|base|large)(-v2)?$", "query: ", "passage: "),
    (r"(^|/)bge-(small|base|large)-en(-v1\.5)?$", "Represent this sentence for searching relevant passages: ", ""),
)


def prefixes(encoder_name: str) -> tuple[str, str]:
    """The ``(query, passage)`` prefixes of a known family of encoders, empty for all others.

    >>> prefixes("intfloat/e5-base-v2")
    ('query: ', 'passage: ')
    """
    known = ((query, passage) for pattern, query, passage in PREFIXES if re.search(pattern, encoder_name))
    return next(known, ("", ""))


def encode_passages(
    passages: Sequence[Passage],
    encoder: str | Encoder = MINILM,
    *,
    prefix: str | None = None,
    vectors_dir: str | os.PathLike | None = None,
    progress: Any = True,
) -> np.ndarray:
    """Unit vectors of ``title\\ntext``, float32 (number of passages, dimension).

    Args:
        passages: the corpus.
        encoder: a name for ``load_encoder``, or a loaded encoder.
        prefix: stands before each passage; None takes the one of the encoder's family.
        vectors_dir: a folder that keeps the vectors while they are made. Called again after an interruption,
            the function goes on where it stopped; called again after the end, it only reads.
        progress: whether a terminal is shown how far it is.

    Raises:
        ValueError: no passages; a vector that is not finite or of another length, with the passage's id; or
            ``vectors_dir`` holds vectors of another corpus, encoder or prefix, or another process writes into it at
            the same time.
        EncoderError: the encoder cannot be loaded.
    """
    if not passages:
        raise ValueError("no passages to encode")
    encoder = load_encoder(encoder)
    prefix = prefixes(encoder.name)[1] if prefix is None else prefix
    if vectors_dir is None:
        return np.concatenate(list(_encode(passages, encoder, prefix, 0, progress)))
    path, row = Path(vectors_dir) / VECTORS, 4 * encoder.dimension
    _claim(Path(vectors_dir), encoder, prefix, passages)
    if not path.exists() or path.stat().st_size != len(passages) * row:  # what is whole may be read-only
        with open(path, "ab") as f:
            done = min(f.tell() // row, len(passages))
            f.truncate(done * row)
            for chunk in _encode(passages, encoder, prefix, done, progress):
                f.write(chunk.tobytes())
                f.flush()
            if f.tell() != len(passages) * row:
                raise ValueError(f"{path}: another process writes here too; end it and start again in another folder")
    return np.memmap(path, np.float32, "r", shape=(len(passages), encoder.dimension))


def _encode(passages, encoder, prefix, start, progress):
    width, total = getattr(encoder, "dimension", None), len(passages)
    with tqdm(None, "encoding passages", total, initial=start, disable=None if progress else True, delay=1) as bar:
        for first in range(start, total, _CHUNK):
            chunk = passages[first : first + _CHUNK]
            texts, names = [prefix + indexed(p) for p in chunk], [f"passage {p.id}" for p in chunk]
            vectors = vectors_of(encoder, texts, names, width)
            width = vectors.shape[1]
            yield vectors
            bar.update(len(chunk))


def _claim(folder: Path, encoder: Encoder, prefix: str, passages: Sequence[Passage]) -> None:
    """Write into the folder whose vectors it holds, or check that they are these."""
    made_with = {"encoder": identity_of(encoder), "dimension": encoder.dimension, "prefix": prefix}
    state, path = made_with | {"count": len(passages), "corpus_sha256": corpus_sha256(passages)}, folder / STATE
    if not path.exists():
        write_json(path, state)
    held = dict(read_json(path))
    if other := [name for name in state if held.get(name) != state[name]]:
        raise ValueError(f"{folder}: holds vectors of another {', '.join(other)}; give another folder")


_KEPT = ("index", "parameters", "query_prefix", "passage_prefix")  # in the manifest


class DenseSearch(Engine):
    """Nearest passages by cosine of sentence vectors.

    Args:
        passages: the corpus.
        encoder: a name for ``load_encoder``, or a loaded encoder.
        index: a string for ``faiss.index_factory``: "Flat" is exact; "HNSW" is fast; "IVF,PQ" is small
            (the same with numbers, such as "HNSW32" or "IVF1024,PQ48", takes those).
        parameters: FAISS search parameters, e.g. "efSearch=64" or "nprobe=8"; more of them finds more and takes
            longer. None takes efSearch=256 for HNSW and nprobe=32 for IVF.
        query_prefix, passage_prefix: stand before each text; None takes those of the encoder's family.
        vectors_dir, progress: as in ``encode_passages``.

    Raises:
        ValueError: see ``encode_passages``; or an index string that FAISS does not know or that needs more passages.
        EncoderError: the encoder cannot be loaded.
    """

    decides = ("passages", "encoder", *_KEPT)

    def __init__(
        self,
        passages: Sequence[Passage],
        encoder: str | Encoder = MINILM,
        *,
        index: str = "Flat",
        parameters: str | None = None,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        vectors_dir: str | os.PathLike | None = None,
        progress: Any = True,
    ):
        self.passages: Sequence[Passage] = list(passages)
        self.encoder = load_encoder(encoder)
        known = zip((query_prefix, passage_prefix), prefixes(self.encoder.name))
        self.query_prefix, self.passage_prefix = (own if given is None else given for given, own in known)
        how: dict[str, Any] = {"prefix": self.passage_prefix, "vectors_dir": vectors_dir, "progress": progress}
        vectors = encode_passages(self.passages, self.encoder, **how)
        self.index, self.parameters = index, _parameters(index) if parameters is None else parameters
        self._index = build_index(vectors, index)
        _set_parameters(self._index, self.parameters)

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Hit]]:
        queries = check_batch(queries, k)
        filled = [self.query_prefix + clean(query, "NFKC") for query in queries if query.strip()]
        answers = iter(self.search_vectors(vectors_of(self.encoder, filled, width=self._index.d), k) if filled else ())
        return [next(answers) if query.strip() else [] for query in queries]

    def search_vectors(self, vectors: np.ndarray, k: int = 3) -> list[list[Hit]]:
        """Search with unit vectors (B, dimension) that were encoded before."""
        batch = zip(*self._index.search(vectors, min(k, len(self.passages))))
        return [[Hit(self.passages[n], score) for score, n in _in_order(scores, ids)] for scores, ids in batch]

    def save(self, index_dir: str | os.PathLike) -> None:
        """Write the index to a folder, whole or not at all; an index that stands there is replaced."""
        import faiss

        made_with = {"encoder": self.encoder.name, **{name: getattr(self, name) for name in _KEPT}}
        made_with["probe"] = [round(x, 5) for x in self.encoder.encode([_PROBE])[0].tolist()]
        with new_index(index_dir, "dense", self.passages, **made_with) as (folder, manifest):
            faiss.write_index(self._index, str(folder / INDEX))
            manifest["index_bytes"] = (folder / INDEX).stat().st_size

    @classmethod
    def load(cls, index_dir: str | os.PathLike, encoder: str | Encoder | None = None) -> DenseSearch:
        """Open a saved index, memory-mapped; ``encoder`` None takes the one that its manifest names.

        Raises:
            IndexFolderError: no dense index there, a broken one, another corpus than it was built from, or an
                encoder whose vectors differ from those of the encoder that it was built with.
            EncoderError: the encoder cannot be loaded.
        """
        engine = cls.__new__(cls)
        manifest, engine.passages = open_index(index_dir, "dense")
        with reading(index_dir):
            engine._index = _read_index(Path(index_dir) / INDEX, manifest)
            engine.encoder = load_encoder(manifest["encoder"] if encoder is None else encoder)
            _check_encoder(index_dir, manifest, engine.encoder)
            for name in _KEPT:
                setattr(engine, name, manifest.get(name, ""))
            _set_parameters(engine._index, engine.parameters)
        return engine


def build_index(vectors: np.ndarray, index: str):
    """A FAISS index for inner product over ``vectors`` (N, dimension); trained where its kind needs it.

    "IVF" and "PQ" without a number, as in "IVF,PQ", get numbers that fit the vectors.

    Raises:
        ValueError: FAISS does not know the string, or there are too few vectors to train it.
    """
    import faiss

    try:
        kind = _PLAIN_PQ.sub(r"\1np", _with_numbers(index, *vectors.shape))
        built = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        if not built.is_trained:
            _quieten(built)
            lists = getattr(faiss.try_extract_index_ivf(built), "nlist", 0)  # none where it has no inverted lists
            step = max(1, len(vectors) // max(_TRAIN, 64 * lists))
            built.train(np.ascontiguousarray(vectors[::step]))
        for start in range(0, len(vectors), 65536):
            built.add(np.ascontiguousarray(vectors[start : start + 65536]))
    except RuntimeError as e:
        reason = re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(e)) + " (few passages: 'Flat' or 'HNSW32')"
        number, size = vectors.shape
        raise ValueError(f"index={index!r} cannot be built over {number} vectors of {size}: {reason}") from None
    return built


def _with_numbers(index: str, number: int, dimension: int) -> str:
    """The string with four lists for each root of the passages, and a code of a byte for four dimensions.

    >>> _with_numbers("IVF,PQ", 100_000, 384)
    'IVF1265,PQ96'
    """
    lists = max(1, min(round(4 * number**0.5), number // 40))
    codes = next(m for m in range(max(1, dimension // 4), 0, -1) if dimension % m == 0)
    index = re.sub(r"(?<![A-Z])IVF(?![\d(])", f"IVF{lists}", index)
    return re.sub(r"(?<![A-Z])PQ(?!\d)", f"PQ{codes}", index)


def _quieten(index) -> None:
    """FAISS warns once for every quantiser that has less than 39 vectors a centroid: hundreds of lines."""
    import faiss

    for part in (index, faiss.try_extract_index_ivf(index)):
        part = part and faiss.downcast_index(part)
        for owner in (part, getattr(part, "pq", None)):
            if hasattr(owner, "cp"):
                owner.cp.min_points_per_centroid = 1


def _in_order(scores: np.ndarray, ids: np.ndarray) -> list[tuple[float, int]]:
    """``(score, passage number)``, best first, equal scores by number; -1 stands for no hit in FAISS."""
    return sorted(((float(s), int(n)) for s, n in zip(scores, ids) if n >= 0), key=lambda hit: (-hit[0], hit[1]))


def _parameters(index: str) -> str:
    return "efSearch=256" if "HNSW" in index else "nprobe=32" if "IVF" in index else ""


def _set_parameters(index, parameters: str) -> None:
    import faiss

    try:
        faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
    except RuntimeError as e:
        raise ValueError(f"parameters={parameters!r} does not fit this index: {e}") from None


def _read_index(path: Path, manifest: dict):
    import faiss

    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as e:
        raise ValueError(e) from None
    held, told = (index.ntotal, index.d, size), (manifest["count"], len(manifest["probe"]), manifest["index_bytes"])
    if held != told:
        raise ValueError(f"{INDEX} holds {held} vectors, dimensions and bytes, not {told}")
    return index


def _check_encoder(index_dir, manifest: dict, encoder: Encoder) -> None:
    expected, actual = np.array(manifest["probe"]), encoder.encode([_PROBE])[0]
    if expected.shape != actual.shape or float(expected @ actual) < 0.999:
        other = f"whose vectors are not those of {encoder.name!r}; open it with that encoder or build it again"
        raise IndexFolderError(f"{index_dir}: built with the encoder {manifest['encoder']!r}, {other}")
