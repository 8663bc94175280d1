"""Public question sets and corpora: by name, from the hub, and in the layouts in which others publish them.

A source is one of
    - a path (``.jsonl``, ``.jsonl.gz`` or ``.parquet``), or a folder with such a file for each split;
    - the name of a public question set (see ``SETS``: the seven of the Search-R1 paper, "nq", "hotpotqa", ..., and
      its training set, "search-r1") or of a corpus (``CORPORA``: "wiki-18"). A folder of that name comes first;
    - any data set on the Hugging Face hub, written ``hub:owner/name``.
The hub is streamed, so a row limit is enough to keep it small; it is the only thing here that touches the network.

Rows may be in the forms of ``data``, in Search-R1's (passages with ``contents``, ``"Title"\\ntext``, and questions
with ``reward_model.ground_truth.target``), in FlashRAG's (``golden_answers``) or in that of HotpotQA,
2WikiMultihopQA and MuSiQue, whose rows carry the passages that they need, as they were published or as on the hub: see
``load_with_passages``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..data import DataError, field, filled, id_of, passage_of, question_of, records, rows_of, text_of
from ..records import Passage, Question, texts

HUB = "hub:"
_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_SEARCH_R1 = "PeterJinGo/nq_hotpotqa_train"
_PUBLIC = "nq:test triviaqa:test popqa:test hotpotqa:dev 2wikimultihopqa:dev musique:dev bamboogle:test search-r1:test"

#: The question sets that are known by name, with the split that papers report on. The first seven are those of the
#: Search-R1 paper, in the order of its tables; "search-r1" is what it trains on, its test split all seven in one.
SETS = dict(pair.split(":") for pair in _PUBLIC.split())
#: The corpora that are known by name.
CORPORA = {"wiki-18": HUB + "PeterJinGo/wiki-18-corpus"}


def load_questions(
    source: str | os.PathLike,
    *,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    on_error: str = "raise",
) -> list[Question]:
    """Read questions.

    Args:
        source: a path, a name of ``SETS``, or ``hub:owner/name``. Rows of a named set without a source of their own
            get its name as ``source`` and before their ids, so that sets can be put together.
        split: None is the split that papers report on (``SETS``); in a folder the first of test, dev, validation
            and train that is there; of another hub data set "train". Unused for a file.
        config: which part of a ``hub:`` data set.
        limit: read at most this many rows; required for ``hub:`` data sets.
        on_error: "raise", or "skip" to leave broken rows out with one warning that counts them.

    Raises:
        FileNotFoundError: no such file.
        DataError: a broken row, an id that stands twice, no question at all, or the hub out of reach.
    """
    make = partial(_question, label=_set_name(source))
    return list(_records(source, make, split=split, config=config, limit=limit, on_error=on_error))


def load_passages(source: str | os.PathLike, **how: Any) -> list[Passage]:
    """Read a corpus: a path, "wiki-18" or ``hub:owner/name``; arguments and errors as in ``load_questions``."""
    return list(_records(CORPORA.get(str(source), source), passage_of, **how))


def load_with_passages(source: str | os.PathLike, **how: Any) -> tuple[list[Question], list[Passage]]:
    """Read questions and the passages that their rows carry, gold and distractors, each once.

    So a part of HotpotQA, 2WikiMultihopQA or MuSiQue comes with a corpus that fits in memory, and ``passages`` of
    each question names its gold ones. (FlashRAG's MuSiQue carries gold passages only: those of the other questions
    are the distractors.) Arguments and errors as in ``load_questions``.

    Raises:
        DataError: also when no row carries a passage.
    """
    passages: dict[str, Passage] = {}
    label = _set_name(source)

    def make(row: dict) -> Question:
        question = _question(row, label)
        passages.update((p.id, p) for p in _carried(row)[0])
        return question

    questions = list(_records(source, make, **how))
    if not passages:
        raise DataError(
            f"{source}: its rows carry no passages. Search a retrieval server (RemoteSearch), or read a corpus: "
            "load_passages('wiki-18', limit=...), or its part about these questions with select_passages"
        )
    return questions, list(passages.values())


def select_passages(
    source: str | os.PathLike, questions: Iterable[Question], *, others: int = 0, **how: Any
) -> list[Passage]:
    """The part of a large corpus that is about the questions: read row by row, only that part is kept.

    A passage is kept if it is named as a gold one, or if its title (without what stands in brackets) is an answer or
    a run of words of a question. That is a rule of thumb: the passage of a second hop can be missed.

    Args:
        source: as in ``load_passages``, e.g. "wiki-18".
        others: keep every so many-th other passage too, as a distractor; 0: none.
        **how: split, config, limit and on_error of ``load_passages``; limit is the number of rows to read.
    """
    questions = list(questions)
    gold = {id for q in questions for id in q.passages}
    names = {name for q in questions for text in (q.text, *q.answers) for name in _runs(text)}
    kept: dict[str, Passage] = {}
    corpus = _records(CORPORA.get(str(source), source), passage_of, unique=False, **how)
    for number, passage in enumerate(corpus):
        about = passage.id in gold or " ".join(_words(re.sub(r"\(.*?\)", "", passage.title))) in names
        if about or (others and number % others == 0):
            kept.setdefault(passage.id, passage)
    return list(kept.values())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(text: str, longest: int = 8) -> Iterator[str]:
    """Every run of up to so many words, in lower case; a single word only if it has four letters or more."""
    words = _words(text)
    for start in range(len(words)):
        for end in range(start + 1, min(start + longest, len(words)) + 1):
            if end - start > 1 or len(words[start]) > 3:
                yield " ".join(words[start:end])


def _records(
    source: Any, make: Callable, *, split: str | None = None, config: str | None = None, limit=None, **how: Any
) -> Iterator[Any]:
    return records(source, *_rows(source, split, config, limit), make, limit=limit, **how)


def _rows(source, split: str | None, config: str | None, limit: int | None) -> tuple[Iterator[tuple[int, Any]], str]:
    """As ``data.rows_of``, also of a name and of the hub."""
    if isinstance(source, str) and source.startswith(HUB):
        if limit is None:
            raise ValueError(f"{source}: give limit=, the number of rows to stream from the hub")
        return enumerate(_hub_rows(source[len(HUB) :], split or "train", limit, name=config), 1), "row"
    path = Path(source)
    if not path.exists() and source in SETS:
        return enumerate(_set_rows(source, split or SETS[source], limit), 1), "row"
    if path.is_dir():
        path = split_file(path, split)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file (for a data set on the hub write {HUB}owner/name or one of {', '.join(SETS)})"
        )
    return rows_of(path)


def _set_name(source: str | os.PathLike) -> str:
    """The name of the set that a source is: the name itself, or that of a folder or of a file's folder; else ""."""
    path = Path(source)
    name = path.parent.name if path.is_file() else path.name
    return name if name in SETS else ""


def split_file(folder: Path, split: str | None) -> Path:
    """The file of a split in a folder; None: the first of test, dev, validation and train that is there."""
    splits = [split] if split else ["test", "dev", "validation", "train"]
    files = [folder / f"{s}{end}" for s in splits for end in (".jsonl", ".jsonl.gz", ".parquet")]
    return next((f for f in files if f.exists()), files[0])


def _set_rows(name: str, split: str, limit: int | None) -> Iterator[dict]:
    if name == "search-r1":  # its two files differ in their columns, so the hub's client must see only one of them
        return _hub_rows(_SEARCH_R1, split, limit, data_files={split: f"{split}.parquet"})
    return _hub_rows(_FLASHRAG, split, limit, name=name)


def _hub_rows(repository: str, split: str, limit: int | None, **which: Any) -> Iterator[dict]:
    import datasets

    try:
        rows = datasets.load_dataset(repository, split=split, streaming=True, **which)
        yield from rows if limit is None else rows.take(limit)
    except Exception as e:  # the hub's client raises many kinds: no network, no such name, gated, offline mode
        raise DataError(
            f"{HUB}{repository}: cannot stream split {split!r} from the hub ({type(e).__name__}: {e}). Check the name, "
            "the network and HF_HUB_OFFLINE, or give the path of a local .jsonl or .parquet file"
        ) from e


def _question(row: dict, label: str = "") -> Question:
    """The question of a row in any of the layouts; in a set named ``label`` it gets that name where it has none."""
    plain = {name: value for name, value in row.items() if value is not None}
    if "data_source" in plain:
        plain["id"] = _search_r1_id(plain)
    if not {"text", "question"} & plain.keys() and "prompt" in plain:
        plain["question"] = _search_r1_question(plain["prompt"])
    if not {"passages", "gold_ids"} & plain.keys():
        plain["passages"] = _carried(row)[1]
    question = question_of(plain)
    if label and not question.source:
        question.id, question.source = f"{label}/{question.id}", label
    return question


def _search_r1_id(row: dict) -> str:
    """Search-R1 numbers each of its data sets from 0, so their name becomes part of the id."""
    source = text_of(*field(row, "source", "data_source"))
    if "id" in row:
        return f"{source}/{id_of('id', row['id'])}"
    place = (str(field(row, f"extra_info.{name}", default="")[1]) for name in ("split", "index"))
    return "/".join(part for part in (source, *place) if part)


def _search_r1_question(prompt: Any) -> str:
    try:
        message = filled("prompt[-1].content", prompt[-1]["content"])
    except (TypeError, KeyError, IndexError):
        raise ValueError("field 'prompt': expected a list of messages with role and content") from None
    return filled("prompt[-1].content", re.split(r"Question:\s*", message)[-1].strip())


def _carried(row: dict) -> tuple[list[Passage], list[str]]:
    """The passages that a row brings along, and the ids of the gold ones in the order of the hops."""
    name, context = field(row, "metadata.context", "context", default=None)
    try:
        if isinstance(context, dict | list):
            passages, gold = _as_in_hotpotqa(row, context)
        else:
            name = "question_decomposition"
            passages, gold = _as_in_musique(row)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"field '{name}': its passages are not laid out as in HotpotQA or MuSiQue") from None
    ids = dict.fromkeys(p.id for p in gold if p.text.strip())  # a title can be named twice; the order is that of hops
    return [p for p in passages if p.text.strip()], list(ids)


def _as_in_hotpotqa(row: dict, context: dict | list) -> tuple[list[Passage], list[Passage]]:
    """HotpotQA and 2WikiMultihopQA: titles and their sentences, and the titles that are gold. They were published in
    rows, ``[[title, sentences]]`` and ``[[title, number]]``; the hub has columns, ``{"title": […], "sentences": […]}``.
    """
    if isinstance(context, dict):
        context = list(zip(context["title"], field(context, "sentences", "content", default=[])[1]))
    passages = [
        _passage(title, " ".join(s.strip() for s in texts("context", part))) for title, part in map(_pair, context)
    ]
    facts = field(row, "metadata.supporting_facts", "supporting_facts", default=[])[1]
    gold = facts["title"] if isinstance(facts, dict) else [fact[0] for fact in facts]
    by_title = {p.title: p for p in passages}
    return passages, [by_title[title] for title in gold if title in by_title]


def _pair(item: Any) -> tuple[Any, Any]:
    """Title and sentences of an entry of a context; a text alone has no title."""
    match item:
        case str():
            return "", item
        case [title, sentences]:
            return title, sentences
        case {"title": title}:
            return title, field(item, "sentences", "content", "paragraph_text", "text")[1]
    raise TypeError


def _as_in_musique(row: dict) -> tuple[list[Passage], list[Passage]]:
    """MuSiQue: a list of paragraphs to which each step of the question points; FlashRAG keeps only those."""
    steps = field(row, "metadata.question_decomposition", "question_decomposition", default=[])[1]
    paragraphs = field(row, "metadata.paragraphs", "paragraphs", default=None)[1]
    if paragraphs is None:
        supports = [step["support_paragraph"] for step in steps if step["support_paragraph"]]
        passages = [_passage(p["title"], p["paragraph_text"]) for p in supports]
        return passages, passages
    passages = [_passage(p["title"], p["paragraph_text"]) for p in paragraphs]
    order = [step["paragraph_support_idx"] for step in steps]
    order = order or [i for i, p in enumerate(paragraphs) if p.get("is_supporting")]
    return passages, [passages[i] for i in order if i is not None]  # a question made unanswerable has a step without


def _passage(title: str, text: str) -> Passage:
    """A passage without an id of its own gets one from what it says, so that the same one is kept once."""
    title, text = text_of("title", title), text_of("paragraph_text", text)
    return Passage(hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:12], title, text)
