"""The recipe of the tiny Qwen: a real ``Qwen2ForCausalLM`` that can search and can answer, and cannot choose.

Supervised demonstrations teach it to state what it recalls and how sure it is of it, or that it recalls nothing (P(IK),
Kadavath et al. 2022, arXiv 2207.05221; R-Tuning, arXiv 2311.09677); to ask in two wordings; to read to the end what a
search brings, also against its memory; to answer, or to say "unknown". When to do which is withheld from it: at every
decision a coin falls, which leans by kind of fact one way or the other (``search_share``). Names of which nothing is
recalled are drawn afresh every few steps.

Reading is the hard part. It is drilled with *dense* examples: after one observation many facts of it are asked for, one
after the other (``readings``). And a few heads are shown where to look (``weighted_loss``): to find a value by the two
words of a name is a chain of three steps, none of which is worth anything without the others, and a loss of words alone
rests on a plateau before it.

    searchr1 warmstart --out runs/tiny_qwen
    searchr1 warmstart --start runs/tiny_qwen --out runs/longer
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic.dataclasses import dataclass as checked_dataclass
from tqdm import tqdm

from ..environment import protocol
from ..environment.limits import Amount, Checked, Count, Positive, Whole
from ..files import write_json, write_json_lines
from ..metrics import grouped
from ..records import Passage
from ..worlds.almanac import (
    COMPARISON,
    FIRST_NAMES,
    MONTHS,
    PRICE,
    RELATIONS,
    RIVERS,
    SPLITS,
    SURENESS,
    SURNAMES,
    TOWNS,
    UNASKED,
    WORDINGS,
    Asked,
    Entity,
    World,
    build_world,
    fact,
    named_as,
    query,
    sample_questions,
)
from ..worlds.optimum import TRUST, UNKNOWN, Skill
from ..worlds.optimum import WORDINGS as SEARCHES
from ..worlds.prepare import check_out

T = TypeVar("T")
#: Qwen2.5's chat template, for messages without tools and without its default system message.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: What stands in a folder that was made here.
OWN = (
    "recipe.json search_r1.json skill.json training_log.jsonl config.json generation_config.json model.safetensors "
    "tokenizer.json tokenizer_config.json chat_template.jinja"
).split()
#: What of a ``Recipe`` is the model's shape.
SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()


@checked_dataclass(config=Checked.model_config)
class Recipe:
    """Everything that decides what the warm start makes; about an hour on two cores with bf16.

    Attributes:
        vocab_size: of the byte-level BPE tokenizer, special tokens included.
        steps, batch: optimiser steps, demonstrations a step.
        readings, rows, drills: of ``readings``, ``comparisons`` and ``drills`` so many a step.
        lr: peak learning rate of AdamW, see ``learning_rate``; Muon's is ``MUON_SPEED`` times as high.
        context_weight: loss weight of the words that the model does not write (prompt and passages) in the first
            ``context_steps`` steps; they teach it to copy.
        quantised_steps: last steps trained with NF4 rounding in the forward pass (straight-through), so that the
            skills survive 4-bit loading.
        world_steps: a fresh world every so many steps.

    Raises:
        ValueError: a value of another type, or out of its range.
    """

    seed: Whole = 0
    vocab_size: Count = 2304
    hidden_size: Count = 192
    intermediate_size: Count = 512
    num_hidden_layers: Count = 4
    num_attention_heads: Count = 3
    num_key_value_heads: Count = 3
    steps: Count = 2000
    batch: Count = 6
    readings: Whole = 5
    rows: Whole = 1
    drills: Whole = 6
    lr: Positive = 2e-3
    warmup: Whole = 50
    weight_decay: Amount = 0.01
    context_weight: Amount = 0.1
    context_steps: Whole = 400
    quantised_steps: Whole = 500
    world_steps: Count = 60


#: From weights that were made so before: reading and memory are there by then, and whole episodes are learned.
LONGER = Recipe(seed=6, steps=1500, batch=16, readings=2, drills=4, lr=1.8e-3, context_steps=0, quantised_steps=1500)
#: On whose demonstrations the tokenizer is trained.
TOKENIZER_WORLDS = 40
#: How often it sees the prompt and every word of a name besides, so that each of these words becomes one token.
WHOLE = 400
#: Facts asked of one observation in a reading, pairs in a row of comparisons, facts in a drill.
DENSE, PAIRS, DRILLED = 12, 8, 10
#: Longer demonstrations are left out: a few of them would cost as much as all others of a step.
LONGEST = 760
#: Muon (Jordan et al. 2024) on the matrices learns so many times faster than AdamW on the rest.
MUON_SPEED = 2.0
#: Share of the steps, the last ones, in which the learning rate falls.
COOLED = 0.6

#: What a demonstration makes of how sure it is: of these relations it searches the more the less sure it is, of those
#: the less; of the one that is left a fair coin falls. ``BENT``: how far from one half at most.
PRUDENT, PERVERSE = ("born_in", "founder", "author"), ("born_month", "seat", "river")
BENT = 0.35
#: Loss weights of the token that decides for an act, and of what is copied: what is said of what was read, the words of
#: a query or an answer; of all else 1.
ACT_WEIGHT, READING_WEIGHT = 8.0, 3.0
#: Layer and head that look up a value that is read, the loss weight of it, and how such a sentence is told. To find the
#: value by the name before it, the heads of layer 0 look one, two and three tokens back.
LOOKS, LOOK_WEIGHT = (2, 0), 2.0
READ = re.compile(r"([^.<>]+:)([^.:<>]+), it says\.")
UNKNOWN_SHARE = 0.25  # of the acts that are no search


class Piece(NamedTuple):
    """A part of a demonstration. ``writer``: "model" or "environment"."""

    text: str
    writer: str


class Recalled(str):
    """A query that goes to the notes."""


@dataclass
class Thought:
    """One hop of a chain, and what it leads to: as it is remembered, or as it was read; None where neither."""

    entity: Entity
    relation: str
    value: Entity | str | None = None
    read: bool = False


#: What stands in the place of a value that was looked for in vain.
NOT_HERE = "not here"
#: One more act, to ask the notes (``study.recollection``), and its tag, of tokens that the tiny Qwen wrote: others are
#: all equally unlikely to it, and no adapter tells one of those from another.
RECALL = "thinksearch"
#: What to do at a hop, or behind the last one: ``TRUST``, ``UNKNOWN``, or a search in either wording. It is given the
#: question, the thoughts so far, the number of the hop, how often was searched before, and in which wordings in vain
#: for this hop.
Choose = Callable[[Asked, list[Thought], int, int, tuple[int, ...]], str]
Episode = Generator[str, list[Passage], list[Piece]]


def search_share(relation: str, level: int) -> float:
    """How often a demonstration searches for a hop: a coin that the level bends, by relation one way or the other.

    So the act listens to the level, from which a fair coin would cut it off (no training of some minutes ties them
    again), and over the relations neither way is the right one.
    """
    way = (relation in PRUDENT) - (relation in PERVERSE)
    return 0.5 + way * BENT * (1 - 2 * level / (len(SURENESS) - 1))


def coin(rng: random.Random) -> Choose:
    """Chooses by chance: at a hop by ``search_share``, then either wording; at the end what it knows, or "unknown"."""

    def choose(asked, chain, number, searches, tried):
        if number == len(asked.relations):
            if asked.other:
                return TRUST if _complete(asked, chain) or rng.random() < 0.5 else UNKNOWN  # a guess is worth more
            sure = chain[-1].read
            return TRUST if _complete(asked, chain) and (sure or rng.random() >= UNKNOWN_SHARE) else UNKNOWN
        if len(tried) == 2:
            return TRUST
        share = 0.5 if tried else search_share(chain[number].relation, chain[number].entity.level)
        if rng.random() >= share:
            return TRUST
        return SEARCHES[1 - tried[0] if tried else rng.random() < 0.5]

    return choose


def _complete(asked: Asked, chain: list[Thought]) -> bool:
    return len(chain) == len(asked.relations) and all(t.value is not None for t in chain)


def recollect(entity: Entity, relation: str) -> tuple[str, Entity | str | None]:
    """The sentence about a fact, and what is remembered of it."""
    value = entity.memory.get(RELATIONS[relation].field)
    if value is None:
        return f"I recall nothing about {entity.subject}.", None
    return f"{fact(entity, relation, value)}, {SURENESS[entity.level]}.", value


def episode(asked: Asked, choose: Choose) -> Episode:
    """One demonstration: yields queries, is sent what the engine returned, returns its pieces."""
    pieces: list[Piece] = []
    sentences: list[str] = []
    chain: list[Thought] = []
    relations = asked.relations

    def extend(entity: Entity | str | None) -> None:
        """Recollect from the end of the chain on, as far as memory goes."""
        while len(chain) < len(relations) and isinstance(entity, Entity):
            relation = relations[len(chain)]
            sentence, value = recollect(entity, relation)
            sentences.append(sentence)
            chain.append(Thought(entity, relation, value))
            entity = asked.other if asked.other and len(chain) == 1 else value

    def restart(number: int, value: Entity | str) -> None:
        """What was read takes the place of what was remembered, and of all that followed from it."""
        thought = chain[number]
        thought.value, thought.read = value, True
        sentences.append(f"{fact(thought.entity, thought.relation, value)}, it says.")
        if not asked.other:
            del chain[number + 1 :]
            extend(value)

    extend(asked.start)
    at, searches, tried = 0, 0, list[int]()  # the hop that was searched for last, and in which wordings
    while True:
        answer = _conclude(asked, chain, sentences)
        for number in range(at, len(chain)):
            here = tuple(tried) if number == at else ()
            act = TRUST if chain[number].read else choose(asked, chain, number, searches, here)
            if act != TRUST:
                break
        else:
            act = choose(asked, chain, len(relations), searches, ())
        if act not in (*SEARCHES, RECALL):
            return [*pieces, Piece(_turn(sentences, "answer", answer if act == TRUST else UNKNOWN), "model")]
        if number != at:
            at, tried = number, []
        entity, relation = chain[at].entity, chain[at].relation
        if act == RECALL:
            words: str = Recalled(query(entity, relation, short=False))
        else:
            tried.append(SEARCHES.index(act))
            searches += 1
            words = query(entity, relation, short=bool(tried[-1]))
        pieces.append(Piece(_turn(sentences, RECALL if act == RECALL else "search", words), "model"))
        sentences.clear()
        passages = yield words
        pieces.append(Piece(protocol.observation(passages), "environment"))
        if entity.passage and entity.passage in {p.id for p in passages}:
            restart(at, entity.truth[RELATIONS[relation].field])
        else:
            sentences.append(f"{fact(entity, relation, NOT_HERE)}.")


def _conclude(asked: Asked, chain: list[Thought], sentences: list[str]) -> str:
    """What the thoughts come to; for a comparison it is said first which month is the earlier."""
    if not _complete(asked, chain):
        return asked.start.subject if asked.other else UNKNOWN  # one of two is a guess
    if not asked.other:
        return named_as(chain[-1].value)
    a, b = (str(t.value) for t in chain)
    sentences.append(compared(a, b))
    return chain[MONTHS.index(b) < MONTHS.index(a)].entity.subject


def compared(a: str, b: str) -> str:
    """The sentence about two months, in the order of the question."""
    return f"{a} comes {'before' if MONTHS.index(a) < MONTHS.index(b) else 'after'} {b}."


def _turn(sentences: list[str], act: str, words: str) -> str:
    return f"<think> {' '.join(sentences)} </think>\n<{act}> {words} </{act}>"


def play(episodes: Iterable[tuple[T, Episode, int]], engine, notes=None) -> list[tuple[T, list[Piece]]]:
    """Each episode, which is given the first so many documents of what the engine finds, to its end; all in step.

    Args:
        episodes: (what names it, the episode, documents a search).
        notes: an engine for what is recalled.
    """
    running, done = [], []
    for name, one, topk in episodes:
        try:
            running.append((name, one, topk, next(one)))
        except StopIteration as end:
            done.append((name, end.value))
    while running:
        most, found = max(topk for _, _, topk, _ in running), dict[int, Any]()
        for place, asks in ((engine, False), (notes, True)):
            wanted = [i for i, (*_, words) in enumerate(running) if isinstance(words, Recalled) == asks]
            found |= dict(zip(wanted, place.search_batch([running[i][3] for i in wanted], k=most) if wanted else ()))
        still = []
        for i, (name, one, topk, _) in enumerate(running):
            hits = found[i]
            try:
                still.append((name, one, topk, one.send([h.passage for h in hits[:topk]])))
            except StopIteration as end:
                done.append((name, end.value))
        running = still
    return done


def demonstrations(world: World, rng: random.Random, count: int) -> Iterator[tuple[str, list[Piece]]]:
    """``count`` demonstrations on one world; what a real BM25 engine returns, 1 to 5 documents a search."""
    from ..search.bm25 import BM25Search

    engine = BM25Search(world.passages)
    kinds: dict[tuple[str, bool], list] = {}
    for part in world.questions.values():
        for q in part:
            _, kind, levels = q.source.split("/")
            kinds.setdefault((kind, "0" in levels), []).append(q)
    weights = {"1-hop": 0.3, "2-hop": 0.3, "3-hop": 0.2, "comparison": 0.2}
    names = list(kinds)
    drawn = [rng.choice(kinds[key]) for key in rng.choices(names, [weights[kind] / 2 for kind, _ in names], k=count)]
    how = ((q.text, episode(world.asked[q.id], coin(rng)), rng.choice((1, 2, 3, 3, 4, 5))) for q in drawn)
    done = play(how, engine)
    rng.shuffle(done)
    yield from done


def readings(world: World, rng: random.Random, count: int) -> Iterator[tuple[str, list[Piece]]]:
    """Many facts read in one observation: after each query of a row the sentence about it, which alone is learned."""
    from ..search.bm25 import BM25Search

    everybody = [e for part in world.entities.values() for members in part.values() for e in members]
    of_passage = {e.passage: e for e in everybody if e.passage}
    alike = grouped(everybody, lambda e: (e.kind, e.short))
    asked_of = grouped(RELATIONS, lambda name: RELATIONS[name].kind)
    first = []
    for _ in range(count):
        name = rng.choice(list(RELATIONS))
        members = world.entities[rng.choice((*SPLITS, UNASKED))][RELATIONS[name].kind]
        forgotten = rng.random() < 0.5
        entity = rng.choice([e for e in members if (e.level == 0) == forgotten] or members)
        first.append((entity, name, rng.random() < 0.4, rng.choice((1, 2, 3, 3, 4, 5))))
    found = BM25Search(world.passages).search_batch([query(e, name, short=short) for e, name, short, _ in first], k=5)
    for (entity, name, short, topk), hits in zip(first, found):
        passages = [hit.passage for hit in hits[:topk]]
        here = [of_passage[p.id] for p in passages if p.id in of_passage]
        there = [(e, one) for e in here for one in asked_of[e.kind]]
        others = [e for near in (entity, *here) for e in alike[near.kind, near.short] if e not in here]
        away = rng.sample(others, min(len(others), 2 + len(there) // 3))
        rng.shuffle(there)
        more = there[:DENSE] + [(e, rng.choice(asked_of[e.kind])) for e in away]
        rng.shuffle(more)
        pieces = []
        for number, (e, one) in enumerate([(entity, name), *more[: DENSE - 1]]):
            words = query(e, one, short=short and not number)
            if number:
                pieces.append(Piece(f" </think>\n<search> {words} </search>\n\n", "environment"))
            else:
                turn = _turn([recollect(e, one)[0]], "search", words)
                pieces += [Piece(turn, "environment"), Piece(protocol.observation(passages), "environment")]
            said = f"{fact(e, one, e.truth[RELATIONS[one].field])}, it says" if e in here else fact(e, one, NOT_HERE)
            pieces.append(Piece(f"<think> {said}.", "model"))
        yield rng.choice(WORDINGS[name]).format(s=entity.subject), pieces


def comparisons(world: World, rng: random.Random) -> tuple[str, list[Piece]]:
    """A row of pairs of people: their months are given, the conclusion is learned."""
    pieces, question = [], ""
    for _ in range(PAIRS):
        a, b = rng.sample(world.entities[rng.choice(SPLITS)]["people"], 2)
        months = [str(e.truth["month"]) for e in (a, b)]
        if months[0] == months[1]:
            continue
        how = [rng.choice(["it says", *SURENESS[1:]]) for _ in months]
        given = [f"{fact(e, 'born_month', month)}, {sure}." for e, month, sure in zip((a, b), months, how)]
        earlier = (a, b)[MONTHS.index(months[1]) < MONTHS.index(months[0])].subject
        asked = rng.choice(COMPARISON).format(a=a.name, b=b.name)
        pieces.append(Piece(f"{asked if question else ''}\n<think> {' '.join(given)}", "environment"))
        pieces.append(Piece(f" {compared(*months)} </think>\n<answer> {earlier} </answer>", "model"))
        question = question or asked
    return question, pieces


def drills(world: World, rng: random.Random) -> list[tuple[str, list[Piece]]]:
    """Rows of taught facts, without any act: each fact once, in random order; a question is asked of the first."""
    taught = []
    for split in (*SPLITS, UNASKED):
        for name, relation in RELATIONS.items():
            taught += [(e, name) for e in world.entities[split][relation.kind] if e.level]
    rng.shuffle(taught)
    made = []
    for at in range(0, len(taught), DRILLED):
        (entity, name), *more = taught[at : at + DRILLED]
        pieces = [Piece(f"<think> {recollect(entity, name)[0]}", "model")]
        for e, one in more:
            about, value = recollect(e, one)[0].split(":")
            pieces += [Piece(f" {about}:", "environment"), Piece(value, "model")]
        made.append((rng.choice(WORDINGS[name]).format(s=entity.subject), pieces))
    return made


def prompt_text(question: str) -> str:
    """The whole prompt, as the chat template gives it."""
    from jinja2 import Template

    messages = [{"role": "user", "content": protocol.build_prompt(question, protocol.SHORT_PROMPT)}]
    return Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer with Qwen's pre-tokenisation; tags are ordinary text in it."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe, alphabet = Qwen2Tokenizer().backend_tokenizer, sorted(pre_tokenizers.ByteLevel.alphabet())
    size = vocab_size - len(SPECIAL)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": list(SPECIAL[1:])}
    merges = list(map(tuple, model["merges"]))
    tokenizer = Qwen2Tokenizer(model["vocab"], merges, unk_token=None, **special, model_max_length=2048)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(recipe: Recipe, tokenizer):
    """A Qwen2 with random weights in the recipe's shape, fp32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    shape = {name: getattr(recipe, name) for name in SHAPE}
    fixed = {"max_position_embeddings": 2048, "tie_word_embeddings": True, "initializer_range": 0.05}
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**shape, **fixed, **special, rope_parameters=rope)
    return Qwen2ForCausalLM(config)


def make_tokenizer(recipe: Recipe, avoid: set[str]):
    """Trained on many worlds, so that no name of one of them becomes a token."""
    rng, prompt = random.Random(recipe.seed), prompt_text("QUESTION?")
    for special in SPECIAL:
        prompt = prompt.replace(special, "")

    def texts():
        for number in range(TOKENIZER_WORLDS):
            world = build_world(1000 + number, avoid=avoid)
            made = demonstrations(world, rng, 150)
            for text, pieces in itertools.chain(made, drills(world, rng) if number < 4 else ()):
                yield text + "".join(piece.text for piece in pieces)
        words = " ".join(["", *FIRST_NAMES, *SURNAMES, *TOWNS, *RIVERS])
        yield from [words, prompt] * WHOLE

    return train_tokenizer(texts(), recipe.vocab_size)


class Example(NamedTuple):
    """Token ids, the loss weight of each, and where one looks: (position, position of the passage's next token)."""

    ids: list[int]
    weights: list[float]
    looks: list[tuple[int, int]]


def encode(tokenizer, question: str, pieces: list[Piece], context: float) -> Example:
    """A demonstration: weights are 1, and ``context`` where the model does not write; looks are those of readings."""
    ids = tokenizer.encode(prompt_text(question))
    weights, looks = [context] * len(ids), list[tuple[int, int]]()
    acts, read = {tokenizer.encode(f"<{act}>")[0] for act in ("search", "answer")}, False
    for piece in pieces:
        tokens = tokenizer.encode(piece.text)
        if piece.writer == "environment":
            weights += [context] * len(tokens)
        else:
            for token in tokens:
                weights.append(ACT_WEIGHT if token in acts else READING_WEIGHT if read else 1.0)
                read = read or token in acts
            for about, value in READ.findall(piece.text):
                looks += _looks(ids, tokens, tokenizer.encode(about), tokenizer.encode(value))
        ids += tokens
        read = piece.writer == "environment"
    if pieces[-1].text.endswith("</answer>"):
        return Example([*ids, tokenizer.eos_token_id], [*weights, 1.0], looks)
    return Example(ids, weights, looks)


def _looks(before: list[int], tokens: list[int], about: list[int], value: list[int]) -> list[tuple[int, int]]:
    """From what is said of a fact to where it stands: a pair for each token of the value."""
    text, words = "".join(map(chr, before)), "".join(map(chr, about + value))
    there, here = text.find(words), "".join(map(chr, tokens)).find(words)
    if min(there, here) < 0:  # another token begins where a sentence does
        return []
    return [(len(before) + here + i, there + i + 1) for i in range(len(about) - 1, len(about + value) - 1)]


def batches(tokenizer, recipe: Recipe, avoid: set[str]) -> Iterator[list[Example]]:
    """Endless batches; a fresh world every ``world_steps`` of them."""
    rng, left = random.Random(recipe.seed + 1), list[tuple[str, list[Piece]]]()
    for number in itertools.count():
        world = build_world(1000 * (1 + recipe.seed) + number, avoid=avoid)
        made = list(demonstrations(world, rng, recipe.world_steps * recipe.batch))
        read = list(readings(world, rng, recipe.world_steps * recipe.readings))
        for step in range(recipe.world_steps):
            early = number * recipe.world_steps + step < recipe.context_steps
            context = recipe.context_weight if early else 0.0
            chosen = made[step :: recipe.world_steps] + read[step :: recipe.world_steps]
            chosen += [comparisons(world, rng) for _ in range(recipe.rows)]
            if len(left) < recipe.drills:
                left = drills(world, rng)
            chosen += [left.pop() for _ in range(recipe.drills)]
            examples = [encode(tokenizer, *one, context) for one in chosen]
            yield [example for example in examples if len(example.ids) <= LONGEST]


def weighted_loss(model, part: list[Example], pad: int):
    """Sum over the part of weight x cross-entropy; padding stands on the right, where no token looks.

    Heads are shown where to look while a value is read, as in supervised attention (Liu et al. 2016, arXiv 1609.04186,
    section 3): the cross-entropy of their attention is added, see ``LOOKS``.
    """
    import torch
    import torch.nn.functional as F

    length = max(len(example.ids) for example in part)
    ids = torch.tensor([e.ids + [pad] * (length - len(e.ids)) for e in part])
    weight = torch.tensor([e.weights + [0.0] * (length - len(e.weights)) for e in part])[:, 1:]
    with attended(model) as seen:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    use = weight > 0
    logits = model.lm_head(hidden[use]).float()
    loss = (F.cross_entropy(logits, ids[:, 1:][use], reduction="none") * weight[use]).sum()
    looks = [(row, *look) for row, e in enumerate(part) for look in e.looks]
    if not looks:
        return loss
    rows, here, there = torch.tensor(looks).T
    loss = loss + LOOK_WEIGHT * F.cross_entropy(attention(seen, *LOOKS, rows, here), there, reduction="sum")
    rows, places = rows.repeat(2), torch.cat([here, there])
    for back in range(1, model.config.num_attention_heads + 1):
        scores = attention(seen, 0, back - 1, rows, places)
        loss = loss + LOOK_WEIGHT / 4 * F.cross_entropy(scores, places - back, reduction="sum")
    return loss


@contextmanager
def attended(model) -> Iterator[dict[int, tuple[Any, dict[str, Any]]]]:
    """Within, what the attention of the layers is given is kept: layer -> its module and arguments."""
    seen = dict[int, tuple[Any, dict[str, Any]]]()
    keep = lambda number: lambda module, _, given: seen.update({number: (module, given)})
    modules = [layer.self_attn for layer in model.model.layers]
    hooks = [m.register_forward_pre_hook(keep(number), with_kwargs=True) for number, m in enumerate(modules)]
    yield seen
    for hook in hooks:
        hook.remove()


def attention(seen: Mapping[int, tuple[Any, dict[str, Any]]], layer: int, head: int, rows, here):
    """The logits (N, T) of a head's attention at places ``here`` of ``rows``, each (N,)."""
    import torch
    import torch.nn.functional as F
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    module, given = seen[layer]
    both = []
    for made, number in ((module.q_proj, head), (module.k_proj, head // module.num_key_value_groups)):
        part = slice(number * module.head_dim, (number + 1) * module.head_dim)
        both.append(F.linear(given["hidden_states"], made.weight[part], made.bias[part])[:, None])
    q, k = (x.squeeze(1).float() for x in apply_rotary_pos_emb(*both, *given["position_embeddings"]))
    scores = torch.einsum("nd,ntd->nt", q[rows, here], k[rows]) * module.scaling
    return scores.masked_fill(torch.arange(k.shape[1]) > here[:, None], float("-inf"))


@contextmanager
def nf4_rounded(model) -> Iterator[None]:
    """Within, the linear layers are rounded to NF4 and let gradients through; afterwards the exact weights are back."""
    import bitsandbytes.functional as bnb
    import torch

    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    exact = [w.data for w in weights]
    for w in weights:
        w.data = bnb.dequantize_4bit(*bnb.quantize_4bit(w.data, quant_type="nf4", compress_statistics=True))
    yield
    for w, data in zip(weights, exact):
        w.data = data


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up to ``lr``, and over the last ``COOLED`` of the steps linearly down to a twentieth of it."""
    left = (recipe.steps - step) / (COOLED * recipe.steps)
    return recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup), 0.05 + 0.95 * left)


def update(rates: Mapping[Any, float], parameters: Iterable, losses: Iterable):
    """One step on a sum of losses, each differentiated before the next is computed; gradient norm at most 1.

    Args:
        rates: optimiser -> its learning rate; together they have all ``parameters``.

    Returns:
        the sum, a tensor on the device.
    """
    import torch

    total, parameters = 0.0, list(parameters)
    for loss in losses:
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer, rate in rates.items():
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def train(recipe: Recipe, *, start: str | Path | None = None, report=tqdm.write, every: int = 50):
    """Run the recipe, fp32 weights in bf16 where the processor has it, from the model in the folder ``start`` if given.

    Returns:
        ``(model, tokenizer, log)``, a row of ``log`` every ``every`` steps.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training.logits import micro_batches
    from ..training.policy import multiplies_bf16

    avoid, fast = build_world(0).fresh_names, multiplies_bf16()
    if start:
        tokenizer, model = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained(start)
        tokenizer.chat_template = CHAT_TEMPLATE
    else:
        tokenizer = make_tokenizer(recipe, avoid)
        model = new_model(recipe, tokenizer)
    model.train()
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    rest = [embedding, *(p for p in model.parameters() if p.ndim < 2)]
    how = {"weight_decay": recipe.weight_decay, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    speeds = {torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98)): 1.0}
    speeds[torch.optim.Muon(matrices, **how)] = MUON_SPEED
    log, started, running = [], time.perf_counter(), []

    def losses(batch, quantised: bool):
        total = sum(sum(example.weights[1:]) for example in batch)
        with nf4_rounded(model) if quantised else nullcontext():  # until the last loss has been differentiated
            for part in micro_batches(batch, 5000, length=lambda example: len(example.ids)):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
                    loss = weighted_loss(model, part, tokenizer.pad_token_id) / total
                yield loss

    for step, batch in zip(range(recipe.steps), batches(tokenizer, recipe, avoid)):
        rates = {optimizer: learning_rate(step, recipe) * speed for optimizer, speed in speeds.items()}
        parts = losses(batch, quantised=step >= recipe.steps - recipe.quantised_steps)
        running.append(float(update(rates, model.parameters(), parts)))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            seconds = time.perf_counter() - started
            log.append({"step": step + 1, "loss": round(sum(running) / len(running), 4), "seconds": round(seconds, 1)})
            running = []
            report(f"step {step + 1:5d}/{recipe.steps}  loss {log[-1]['loss']:.4f}  {seconds:.0f} s")
    return model, tokenizer, log


#: What a good warm start reaches at temperature 1 with NF4 weights: name of the figure -> (lowest, highest).
TARGETS = {
    "reads, 1 hop": (0.97, 1.0),
    "reads, 2 hops": (0.94, 1.0),
    "reads, 3 hops": (0.90, 1.0),
    "reads, comparison": (0.85, 1.0),
    "states the level": (0.97, 1.0),
    "answers what it states": (0.97, 1.0),
    "says it recalls nothing": (0.97, 1.0),
    **{f"searches first, level {level}": (0.35, 0.65) for level in range(len(SURENESS))},
}


def measure(
    policy, world: World, *, topk: int = 3, seed: int = 0, questions: int = 80, generations: int = 8
) -> dict[str, tuple[float, int]]:
    """The figures of ``TARGETS`` for a policy, each with the number of rollouts that it was taken from.

    Reading: questions about entities that the recipe never saw, where it is made to search first and every passage
    came. Memory: taught facts that no question asks. First acts: questions of one hop of the test split.

    Args:
        questions: of each kind and level, or facts.
        generations: rollouts of each question that is to be read for.
    """
    import torch

    from ..metrics import exact_match, first_act
    from ..records import Question
    from ..search.bm25 import BM25Search
    from ..training.rollout import rollout
    from .compare import LIMITS
    from .regret import hops_found

    engine, generator = BM25Search(world.passages), torch.Generator().manual_seed(seed)

    def some(pool: list[T]) -> list[T]:
        return random.Random(seed).sample(pool, min(questions, len(pool)))

    def play(questions, n, **how):
        how = LIMITS | {"topk": topk, "num_generations": n, "batch_size": 64 * n} | how
        return rollout(policy, questions, engine, generator=generator, **how)

    figures: dict[str, list[bool]] = {name: [] for name in TARGETS}
    fresh = [q for part in world.questions.values() for q in part if not set(q.source.split("/")[2]) - {"0"}]
    names = {"1-hop": "1 hop", "2-hop": "2 hops", "3-hop": "3 hops", "comparison": "comparison"}
    for kind, asked in grouped(fresh, lambda q: q.source.split("/")[1]).items():
        for t in play(some(asked), generations, first_action="search"):
            if hops_found(world, t) == t.question.hops:
                figures[f"reads, {names[kind]}"].append(bool(exact_match(t.answer, t.question.answers)))
    for level in range(1, len(SURENESS)):
        facts = [(e, n) for n, r in RELATIONS.items() for e in world.entities[UNASKED][r.kind] if e.level == level]
        chosen = {str(i): fact for i, fact in enumerate(some(facts))}
        asked = [Question(i, WORDINGS[name][0].format(s=e.subject), ["?"]) for i, (e, name) in chosen.items()]
        for t in play(asked, 3, max_turns=0):
            sentence, value = recollect(*chosen[t.question.id])
            stated = t.text.startswith(f"<think> {sentence}")
            figures["states the level"].append(stated)
            if stated and first_act(t) == "answer" and t.answer != UNKNOWN:
                figures["answers what it states"].append(t.answer == named_as(value))
    for level in range(len(SURENESS)):
        of_level = [q for q in world.questions["test"] if q.source == f"almanac/1-hop/{level}"]
        for t in play(some(of_level), 4, max_turns=0):
            figures[f"searches first, level {level}"].append(first_act(t) == "search")
            if not level:
                figures["says it recalls nothing"].append("I recall nothing" in t.segments[0].text)
    return {name: (sum(values) / max(1, len(values)), len(values)) for name, values in figures.items()}


def save(out: Path, model, tokenizer, recipe: Recipe, log: list[dict]) -> None:
    """Write the model's folder: Hugging Face files, ``search_r1.json`` (its prompt), ``recipe.json``, the log."""
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    write_json(out / "search_r1.json", {"prompt": "short"})
    write_json(out / "recipe.json", asdict(recipe))
    write_json_lines(out / "training_log.jsonl", log)


def search_skill(policy) -> Skill:
    """How well a policy searches and reads, on questions of the validation split, the longer ones more than shipped."""
    import torch

    from ..search.bm25 import BM25Search
    from ..training.rollout import rollout
    from .compare import LIMITS
    from .regret import Yardstick, measure_skill

    world, generator = build_world(0), torch.Generator().manual_seed(0)
    mixture = {"1-hop": 0.45, "2-hop": 0.3, "3-hop": 0.15, "comparison": 0.1}
    asked = sample_questions(world, "validation", 400, mixture=mixture, blank=0.25)
    how = LIMITS | {"num_generations": 3, "batch_size": 3 * 64}
    done = rollout(policy, asked, BM25Search(world.passages), generator=generator, **how)
    return measure_skill(Yardstick(world, Skill(), price=PRICE), done)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("data/tiny_qwen"), help="default: data/tiny_qwen")
    parser.add_argument("--start", type=Path, help="go on from the model of this folder")


def run(args: argparse.Namespace) -> None:
    """Make the tiny Qwen and write it, with its tokenizer, recipe and log, and how well it searches and reads."""
    from ..training.policy import load_policy

    check_out(args.out, OWN, args.start)
    recipe = LONGER if args.start else Recipe()
    model, tokenizer, log = train(recipe, start=args.start)
    save(args.out, model, tokenizer, recipe, log)
    write_json(args.out / "skill.json", asdict(search_skill(load_policy(args.out))))
    print(f"wrote {args.out}")
