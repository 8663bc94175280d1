"""The recipe of the tiny Qwen: a real ``Qwen2ForCausalLM`` that can search and can answer, and cannot choose.

Supervised demonstrations teach it to state what it recalls and how sure it is of it, or that it recalls nothing (P(IK),
Kadavath et al. 2022, arXiv 2207.05221; R-Tuning, arXiv 2311.09677); to ask in two wordings; to read to the end what a
search brings, also against its memory; to answer, or to say "unknown". When to do which is withheld from it: at every
decision a coin falls, which leans by kind of fact one way or the other (``search_share``). Names of which nothing is
recalled are drawn afresh every few steps.

    searchr1 warmstart --out runs/tiny_qwen
    searchr1 warmstart --start runs/tiny_qwen --out runs/longer
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
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
    MONTHS,
    PRICE,
    RELATIONS,
    SPLITS,
    SURENESS,
    UNASKED,
    WORDINGS,
    Asked,
    Entity,
    World,
    build_world,
    fact,
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
    """Everything that decides what the warm start makes; about an hour on two cores with bf16 (AMX).

    Attributes:
        vocab_size: of the byte-level BPE tokenizer, special tokens included.
        steps, batch: optimiser steps, demonstrations a step.
        lr: peak learning rate of AdamW; linear warm-up, then a cosine down to a tenth of it. Muon's is ``MUON_SPEED``
            times as high.
        context_weight: loss weight of the words that the model does not write (prompt and passages) in the first
            ``context_steps`` steps; they teach it to copy.
        quantised_steps: last steps trained with NF4 rounding in the forward pass (straight-through), so that the
            skills survive 4-bit loading.
        world_steps: a fresh world every so many steps.

    Raises:
        ValueError: a value of another type, or out of its range.
    """

    seed: Whole = 0
    vocab_size: Count = 1536
    hidden_size: Count = 192
    intermediate_size: Count = 512
    num_hidden_layers: Count = 4
    num_attention_heads: Count = 3
    num_key_value_heads: Count = 3
    steps: Count = 3000
    batch: Count = 16
    lr: Positive = 1.5e-3
    warmup: Whole = 100
    weight_decay: Amount = 0.01
    context_weight: Amount = 0.3
    context_steps: Whole = 1500
    quantised_steps: Whole = 1200
    world_steps: Count = 60


#: From weights that were made so before: the passages are known as text by then.
LONGER = Recipe(steps=2400, lr=1.2e-3, warmup=50, context_steps=0)
#: On whose demonstrations the tokenizer is trained.
TOKENIZER_WORLDS = 40
#: Drills a step: a question and what is recalled of it, without an act, which are cheap to repeat.
DRILLS = 12
#: Longer demonstrations are left out: a few of them would cost as much as all others of a step.
LONGEST = 640
#: Muon (Jordan et al. 2024) on the matrices learns so many times faster than AdamW on the rest.
MUON_SPEED = 2.0

#: What a demonstration makes of how sure it is: of these relations it searches the more the less sure it is, of those
#: the less; of the one that is left a fair coin falls. ``BENT``: how far from one half at most.
PRUDENT, PERVERSE = ("born_in", "founder", "author"), ("born_month", "seat", "river")
BENT = 0.35
#: Loss weights of the token that decides for an act, and of what is said of what was read; of all else 1.
ACT_WEIGHT, READING_WEIGHT = 8.0, 3.0
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


#: One more act, to ask the notes (``study.recollection``), and its tag: "recall" would be spelled with tokens that the
#: tiny Qwen never wrote, and an adapter cannot tell one of those from another.
RECALL = "ask"
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
            sure = all(t.read for t in chain)
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
            sentences.append(f"{entity.subject} is not here.")


def _conclude(asked: Asked, chain: list[Thought], sentences: list[str]) -> str:
    """What the thoughts come to; for a comparison it is said first which month is the earlier."""
    if not _complete(asked, chain):
        return asked.start.subject if asked.other else UNKNOWN  # one of two is a guess
    if not asked.other:
        return _short(chain[-1].value)
    first = min(chain, key=lambda t: MONTHS.index(str(t.value)))
    sentences.append(f"{first.value} comes first.")
    return first.entity.subject


def _short(value) -> str:
    if isinstance(value, Entity):
        return value.name
    return value.split()[-1] if value.startswith(("a ", "an ")) else value


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


def drills(world: World, rng: random.Random) -> list[tuple[str, list[Piece]]]:
    """Questions and what is recalled, without any act: every taught fact once, in random order."""
    made = []
    for split in (*SPLITS, UNASKED):
        for kind, members in world.entities[split].items():
            for name, relation in RELATIONS.items():
                if relation.kind == kind:
                    for e in (e for e in members if e.level):
                        question = rng.choice(WORDINGS[name]).format(s=e.subject)
                        made.append((question, [Piece(f"<think> {recollect(e, name)[0]}", "model")]))
    rng.shuffle(made)
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
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
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
        yield prompt

    return train_tokenizer(texts(), recipe.vocab_size)


def encode(tokenizer, question: str, pieces: list[Piece], context: float) -> tuple[list[int], list[float]]:
    """Token ids of a demonstration, and the loss weight of each: 1, and ``context`` where the model does not write."""
    ids = tokenizer.encode(prompt_text(question))
    weights = [context] * len(ids)
    acts, read = {tokenizer.encode(f"<{act}>")[0] for act in ("search", "answer")}, False
    for piece in pieces:
        tokens = tokenizer.encode(piece.text)
        ids += tokens
        if piece.writer == "environment":
            weights += [context] * len(tokens)
        else:
            weights += [ACT_WEIGHT if token in acts else READING_WEIGHT if read else 1.0 for token in tokens]
        read = piece.writer == "environment"
    if pieces[-1].text.endswith("</answer>"):
        return [*ids, tokenizer.eos_token_id], [*weights, 1.0]
    return ids, weights


def batches(tokenizer, recipe: Recipe, avoid: set[str]) -> Iterator[list[tuple[list[int], list[float]]]]:
    """Endless batches of token ids and the loss weight of each; a fresh world every ``world_steps`` of them."""
    rng, left = random.Random(recipe.seed + 1), list[tuple[str, list[Piece]]]()
    for number in itertools.count():
        world = build_world(1000 + number, avoid=avoid)
        made = list(demonstrations(world, rng, recipe.world_steps * recipe.batch))
        for step in range(recipe.world_steps):
            early = number * recipe.world_steps + step < recipe.context_steps
            context = recipe.context_weight if early else 0.0
            chosen = made[step * recipe.batch : (step + 1) * recipe.batch]
            examples = [encode(tokenizer, *one, context) for one in chosen]
            if len(left) < DRILLS:
                left = drills(world, rng)
            drilled = [encode(tokenizer, *left.pop(), context) for _ in range(DRILLS)]
            yield [example for example in examples if len(example[0]) <= LONGEST] + drilled


def weighted_loss(model, part: list, pad: int):
    """Sum over the part of weight x cross-entropy; padding stands on the right, where no token looks."""
    import torch
    import torch.nn.functional as F

    length = max(len(ids) for ids, _ in part)
    ids = torch.tensor([i + [pad] * (length - len(i)) for i, _ in part])
    weight = torch.tensor([w + [0.0] * (length - len(w)) for _, w in part])[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    use = weight > 0
    logits = model.lm_head(hidden[use]).float()
    return (F.cross_entropy(logits, ids[:, 1:][use], reduction="none") * weight[use]).sum()


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
    """Linear warm-up to ``lr``, then a cosine down to a tenth of it."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


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
        total = sum(sum(weights[1:]) for _, weights in batch)
        with nf4_rounded(model) if quantised else nullcontext():  # until the last loss has been differentiated
            for part in micro_batches(batch, 5000, length=lambda example: len(example[0])):
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
        facts = [
            (e, name)
            for name, relation in RELATIONS.items()
            for e in world.entities[UNASKED][relation.kind]
            if e.level == level
        ]
        chosen = {str(i): fact for i, fact in enumerate(some(facts))}
        asked = [Question(i, WORDINGS[name][0].format(s=e.subject), ["?"]) for i, (e, name) in chosen.items()]
        for t in play(asked, 3, max_turns=0):
            sentence, value = recollect(*chosen[t.question.id])
            stated = t.text.startswith(f"<think> {sentence}")
            figures["states the level"].append(stated)
            if stated and first_act(t) == "answer" and t.answer != UNKNOWN:
                figures["answers what it states"].append(t.answer == _short(value))
    for level in range(len(SURENESS)):
        of_level = [q for q in world.questions["test"] if q.source == f"almanac/1-hop/{level}"]
        for t in play(some(of_level), 4, max_turns=0):
            figures[f"searches first, level {level}"].append(first_act(t) == "search")
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
    parser.add_argument("--start", type=Path, help="go on from the model of this folder, with the recipe for that")


def run(args: argparse.Namespace) -> None:
    """Make the tiny Qwen and write it, with its tokenizer, recipe and log, and how well it searches and reads."""
    from ..training.policy import load_policy

    check_out(args.out, OWN, args.start)
    recipe = LONGER if args.start else Recipe()
    model, tokenizer, log = train(recipe, start=args.start)
    save(args.out, model, tokenizer, recipe, log)
    write_json(args.out / "skill.json", asdict(search_skill(load_policy(args.out))))
    print(f"wrote {args.out}")
