"""The sentence encoder: where it is found, that it is the real one, and what happens where it is not."""

import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from searchr1_lib.search import encoders
from searchr1_lib.search.encoders import EncoderError, load_encoder

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def minilm():
    try:
        return load_encoder("all-MiniLM-L6-v2", device="cpu")
    except EncoderError as e:
        pytest.skip(f"no encoder here: {e}")


def test_the_real_minilm_gives_the_library_vectors(minilm):
    from sentence_transformers import SentenceTransformer

    texts = ["The capital of France is Paris.", "Paris is the capital of France.", "A cat sat on a mat.", ""]
    bare = SentenceTransformer(str(minilm.folder), device="cpu", local_files_only=True)
    vectors = minilm.encode(texts)
    assert vectors.dtype == np.float32 and vectors.shape == (4, minilm.dimension) == (4, 384)
    assert np.allclose(vectors, bare.encode(texts, normalize_embeddings=True), atol=1e-5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.9 > 0.3 > vectors[0] @ vectors[2]
    assert minilm.encode([]).shape == (0, 384)
    raw = minilm.encode(texts[:1], normalize=False)
    assert np.allclose(raw / np.linalg.norm(raw), vectors[:1], atol=1e-5)
    with pytest.raises(TypeError, match="list of strings"):
        minilm.encode("one string")


def test_it_is_loaded_once_and_threads_may_share_it(minilm):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_encoder("all-MiniLM-L6-v2", device="cpu"), range(8)))
        assert all(e is minilm for e in found)
        texts = [[f"sentence {i} of thread {t}" for i in range(5)] for t in range(8)]
        together = list(pool.map(minilm.encode, texts))
    for got, t in zip(together, texts):
        assert np.allclose(got, minilm.encode(t), atol=1e-5)


def test_a_local_folder_is_an_encoder(minilm, tmp_path):
    shutil.copytree(minilm.folder, tmp_path / "model")
    own = load_encoder(str(tmp_path / "model"), device="cpu")
    assert own is not minilm and np.allclose(own.encode(["x"]), minilm.encode(["x"]), atol=1e-6)


@pytest.mark.parametrize(
    "name, says",
    [
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("some/encoder", "hub cannot be reached"),
        ("", "no such"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(name, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match=says):
        load_encoder(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(EncoderError, match=str(tmp_path)):
        load_encoder(str(tmp_path))


def test_a_damaged_package_is_not_used(minilm, tmp_path, monkeypatch):
    (tmp_path / encoders._MINILM_PACKAGE / "model").mkdir(parents=True)
    (tmp_path / encoders._MINILM_PACKAGE / "__init__.py").write_text("raise SystemExit('never imported')")
    (tmp_path / encoders._MINILM_PACKAGE / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EncoderError, match="sha256"):
        encoders._packaged(encoders.MINILM)


def test_a_hub_that_never_answers_costs_seconds_only(monkeypatch):
    server = socket.create_server(("127.0.0.1", 0))  # accepts and stays silent
    monkeypatch.setattr(encoders, "_HUB_WAIT", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    done = threading.Event()

    def ask():
        with pytest.raises(EncoderError, match="cannot be reached"):
            load_encoder("some/encoder")
        done.set()

    with server:
        threading.Thread(target=ask, daemon=True).start()
        assert done.wait(30)


def test_an_identity_is_that_of_the_weights(minilm, tmp_path):
    shutil.copytree(minilm.folder, tmp_path / "copy")
    copy = load_encoder(str(tmp_path / "copy"), device="cpu")
    assert copy.identity == minilm.identity
    (weights,) = (tmp_path / "copy").rglob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    again = load_encoder(str(tmp_path / "copy"), device="cpu")
    assert again is not copy and again.identity != minilm.identity


def test_vectors_of_anybodys_encoder_are_checked():
    class Own:
        def encode(self, texts):
            return [[1.0, float("nan") if text == "b" else 0.0] for text in texts]

    assert encoders.vectors_of(Own(), ["a"]).dtype == np.float32
    for texts, names, says in ((["a", "b"], [], "'b'"), (["a", "b"], ["p1", "p2"], "'p2'")):
        with pytest.raises(ValueError, match=f"not finite for {says}"):
            encoders.vectors_of(Own(), texts, names)
