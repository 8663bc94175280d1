"""The warm start on the half-remembered world: to state what is recalled and how sure, to act by a coin at every
decision, to read what a search brings to the end, also against the memory. When to search is not taught.

    searchr1 teach --out runs/half_known
    searchr1 teach --start runs/half_known --out runs/longer
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ..environment import protocol
from ..files import write_json
from ..metrics import grouped
from ..records import Passage
from ..worlds.almanac import MONTHS
from ..worlds.halfknown import (
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
from ..worlds.optimum import Skill
from ..worlds.prepare import check_out
from .warmstart import CHAT_TEMPLATE as CHAT_TEMPLATE_OF_QWEN2
from .warmstart import OWN, SPECIAL, Piece, Recipe, learning_rate, new_model, nf4_rounded, save, train_tokenizer

#: Its shape and its schedule; about an hour on two cores with bf16 (AMX). ``batch`` are demonstrations a step.
RECIPE = Recipe(
    vocab_size=1536,
    hidden_size=192,
    intermediate_size=512,
    num_attention_heads=3,
    num_key_value_heads=3,
    steps=3000,
    batch=16,
    warmup=100,
    context_steps=1500,
    quantised_steps=1200,
)
#: From weights that were made so before: the passages are known as text by then.
LONGER = replace(RECIPE, steps=2400, lr=1.2e-3, warmup=50, context_steps=0)
#: Drills a step: a question and what is recalled of it, without an act, which are cheap to repeat.
DRILLS = 20
#: Qwen3's chat template, for messages without tools: without a system message there is none.
CHAT_TEMPLATE = CHAT_TEMPLATE_OF_QWEN2[CHAT_TEMPLATE_OF_QWEN2.index("{%- for") :]
#: Longer demonstrations are left out: a few of them would cost as much as all others of a step.
LONGEST = 640
#: Muon (Jordan et al. 2024) on the matrices learns so many times faster than AdamW on the rest.
MUON_SPEED = 2.0

#: How often a demonstration searches at a decision, by the level of the least sure memory that it rests on. The coin
#: is bent up and down by turns, so that the act listens to the level and no direction is the right one.
COIN = (0.57, 0.43, 0.57, 0.43, 0.57, 0.43, 0.57)
UNKNOWN = 0.25  # of the acts that are no search


@dataclass
class Thought:
    """What is known so far along one chain."""

    entity: Entity
    relation: str
    value: Entity | str | None = None
    level: int = 0  # of the memory; what was read has none
    read: bool = False


def recollect(entity: Entity, relation: str) -> tuple[str, Entity | str | None]:
    """The sentence about a fact, and what is remembered of it."""
    value = entity.memory.get(RELATIONS[relation].field)
    if value is None:
        return f"I recall nothing about {entity.subject}.", None
    return f"{fact(entity, relation, value)}, {SURENESS[entity.level]}.", value


def episode(asked: Asked, rng: random.Random) -> Generator[str, list[Passage], list[Piece]]:
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
            chain.append(Thought(entity, relation, value, entity.level))
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
    tried: list[bool] = []
    at = 0  # the hop where the last search was, and in which wordings it was made: short or not
    while True:
        complete = len(chain) == len(relations) and all(t.value is not None for t in chain)
        if complete and asked.other:
            first = min(chain, key=lambda t: MONTHS.index(str(t.value)))
            sentences.append(f"{first.value} comes first.")
            answer = first.entity.subject
        elif complete:
            answer = _short(chain[-1].value)
        for number in range(at, len(chain)):
            if chain[number].read or (number == at and len(tried) == 2):
                continue
            if rng.random() < (0.5 if tried and number == at else COIN[chain[number].level]):
                break
        else:
            sure = complete and all(t.read for t in chain)
            say = answer if complete and (sure or rng.random() >= UNKNOWN) else "unknown"
            return [*pieces, Piece(_turn(sentences, "answer", say), "model")]
        if number != at:
            at, tried = number, []
        entity, relation = chain[at].entity, chain[at].relation
        tried.append(not tried[0] if tried else rng.random() < 0.5)
        words = query(entity, relation, short=tried[-1])
        pieces.append(Piece(_turn(sentences, "search", words), "model"))
        sentences.clear()
        passages = yield words
        pieces.append(Piece(protocol.observation(passages), "environment"))
        if entity.passage and entity.passage in {p.id for p in passages}:
            restart(at, entity.truth[RELATIONS[relation].field])
        else:
            sentences.append(f"Nothing here about {entity.subject}.")


def _short(value) -> str:
    if isinstance(value, Entity):
        return value.name
    return value.split()[-1] if value.startswith(("a ", "an ")) else value


def _turn(sentences: list[str], act: str, words: str) -> str:
    return f"<think> {' '.join(sentences)} </think>\n<{act}> {words} </{act}>"


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
    running = []
    done: list[tuple[str, list[Piece]]] = []
    for q in drawn:
        play, k = episode(world.asked[q.id], rng), rng.choice((1, 2, 3, 3, 4, 5))
        try:
            running.append((q, play, k, next(play)))
        except StopIteration as end:
            done.append((q.text, end.value))
    while running:
        found = engine.search_batch([words for *_, words in running], k=5)
        still = []
        for (q, play, k, _), hits in zip(running, found):
            try:
                still.append((q, play, k, play.send([h.passage for h in hits[:k]])))
            except StopIteration as end:
                done.append((q.text, end.value))
        running = still
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


def make_tokenizer(recipe: Recipe, avoid: set[str]):
    """Trained on many worlds, so that no name of one of them becomes a token."""
    rng, prompt = random.Random(recipe.seed), prompt_text("QUESTION?")
    for special in SPECIAL:
        prompt = prompt.replace(special, "")

    def texts():
        for number in range(40):
            world = build_world(1000 + number, avoid=avoid)
            made = demonstrations(world, rng, 150)
            for text, pieces in itertools.chain(made, drills(world, rng) if number < 4 else ()):
                yield text + "".join(piece.text for piece in pieces)
        yield prompt

    return train_tokenizer(texts(), recipe.vocab_size)


def batches(tokenizer, recipe: Recipe, avoid: set[str]) -> Iterator[list[tuple[list[int], list[float]]]]:
    """Endless batches of token ids and the loss weight of each; a fresh world every ``world_steps`` of them."""
    rng, before = random.Random(recipe.seed + 1), prompt_text("QUESTION?")
    left: list[tuple[str, list[Piece]]] = []

    def encoded(text: str, pieces: list[Piece], context: float) -> tuple[list[int], list[float]]:
        ids = tokenizer.encode(before.replace("QUESTION?", text))
        weights = [context] * len(ids)
        for piece in pieces:
            tokens = tokenizer.encode(piece.text)
            ids += tokens
            weights += [context if piece.writer == "environment" else 1.0] * len(tokens)
        return ids, weights

    for number in itertools.count():
        world = build_world(1000 + number, avoid=avoid)
        made = list(demonstrations(world, rng, recipe.world_steps * recipe.batch))
        for step in range(recipe.world_steps):
            early = number * recipe.world_steps + step < recipe.context_steps
            context = recipe.context_weight if early else 0.0
            chosen = made[step * recipe.batch : (step + 1) * recipe.batch]
            whole = [encoded(*one, context) for one in chosen]
            examples = [([*ids, tokenizer.eos_token_id], [*w, 1.0]) for ids, w in whole if len(ids) < LONGEST]
            if len(left) < DRILLS:
                left = drills(world, rng)
            yield examples + [encoded(*left.pop(), context) for _ in range(DRILLS)]


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


def train(recipe: Recipe = RECIPE, *, start: Path | None = None, report=tqdm.write, every: int = 50):
    """Run the recipe, in bf16 with fp32 weights, from the model of a folder where ``start`` names one.

    Returns:
        ``(model, tokenizer, log)``, a row of ``log`` every ``every`` steps.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training.logits import micro_batches

    avoid = build_world(0).fresh_names
    if start:
        tokenizer, model = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained(start)
    else:
        tokenizer = make_tokenizer(recipe, avoid)
        model = new_model(recipe, tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    model.train()
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    rest = [embedding, *(p for p in model.parameters() if p.ndim < 2)]
    how = {"weight_decay": recipe.weight_decay, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    speeds = {torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98)): 1.0}
    speeds[torch.optim.Muon(matrices, **how)] = MUON_SPEED
    log, started, running = [], time.perf_counter(), []
    for step, batch in zip(range(recipe.steps), batches(tokenizer, recipe, avoid)):
        for optimizer, speed in speeds.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe) * speed
        total, loss = sum(sum(weights[1:]) for _, weights in batch), 0.0
        with nf4_rounded(model) if step >= recipe.steps - recipe.quantised_steps else nullcontext():
            for part in micro_batches(batch, 5000, length=lambda example: len(example[0])):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    each = weighted_loss(model, part, tokenizer.pad_token_id) / total
                each.backward()
                loss += float(each.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in speeds:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        running.append(loss)
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
    policy, world: World, *, topk: int = 3, seed: int = 0, generations: int = 8
) -> dict[str, tuple[float, int]]:
    """The figures of ``TARGETS`` for a policy, each with the number of rollouts that it was taken from.

    Reading: questions about entities that the recipe never saw, where it is made to search first and every passage
    came. Memory: taught facts that no question asks. First acts: questions of one hop of the test split.
    """
    import torch

    from ..metrics import exact_match
    from ..records import Question
    from ..search.bm25 import BM25Search
    from ..training.rollout import rollout
    from .compare import LIMITS
    from .regret import hops_found

    engine, generator = BM25Search(world.passages), torch.Generator().manual_seed(seed)

    def play(questions, n, **how):
        how |= LIMITS | {"topk": topk, "num_generations": n, "batch_size": 64 * n}
        return rollout(policy, questions, engine, generator=generator, **how)

    figures: dict[str, list[bool]] = {name: [] for name in TARGETS}
    fresh = [q for part in world.questions.values() for q in part if not set(q.source.split("/")[2]) - {"0"}]
    names = {"1-hop": "1 hop", "2-hop": "2 hops", "3-hop": "3 hops", "comparison": "comparison"}
    for kind, questions in grouped(fresh, lambda q: q.source.split("/")[1]).items():
        for t in play(
            random.Random(seed).sample(questions, min(64, len(questions))), generations, first_action="search"
        ):
            if hops_found(world, t) == t.question.hops:
                figures[f"reads, {names[kind]}"].append(bool(exact_match(t.answer, t.question.answers)))
    for level in range(1, len(SURENESS)):
        facts = [
            (e, name)
            for name, relation in RELATIONS.items()
            for e in world.entities[UNASKED][relation.kind]
            if e.level == level
        ]
        chosen = {str(i): fact for i, fact in enumerate(random.Random(seed).sample(facts, 80))}
        asked = [Question(i, WORDINGS[name][0].format(s=e.subject), ["?"]) for i, (e, name) in chosen.items()]
        for t in play(asked, 3):
            sentence, value = recollect(*chosen[t.question.id])
            stated = t.text.startswith(f"<think> {sentence}")
            figures["states the level"].append(stated)
            if stated and not t.searches and t.answer not in (None, "unknown"):
                figures["answers what it states"].append(t.answer == _short(value))
    for level in range(len(SURENESS)):
        of_level = [q for q in world.questions["test"] if q.source == f"almanac/1-hop/{level}"]
        for t in play(random.Random(seed).sample(of_level, 64), 4):
            figures[f"searches first, level {level}"].append(bool(t.searches))
    return {name: (sum(values) / max(1, len(values)), len(values)) for name, values in figures.items()}


def skill_of(policy) -> Skill:
    """How well a policy searches and reads, on questions of the validation split."""
    import torch

    from ..search.bm25 import BM25Search
    from ..training.rollout import rollout
    from .compare import LIMITS
    from .regret import Yardstick, measure_skill

    world, generator = build_world(0), torch.Generator().manual_seed(0)
    engine, asked = BM25Search(world.passages), sample_questions(world, "validation", 400)
    how = LIMITS | {"num_generations": 3, "batch_size": 3 * 64}
    done = rollout(policy, asked, engine, generator=generator, **how)
    return measure_skill(Yardstick(world, Skill(), price=0.3), done)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/half_known"), help="default: runs/half_known")
    parser.add_argument("--start", type=Path, help="go on from the model of this folder, with the recipe for that")


def run(args: argparse.Namespace) -> None:
    """Make the tiny Qwen of the half-remembered world, write it, and how well it searches and reads."""
    from ..training.policy import load_policy

    check_out(args.out, (*OWN, "skill.json"))
    recipe = LONGER if args.start else RECIPE
    model, tokenizer, log = train(recipe, start=args.start)
    save(args.out, model, tokenizer, recipe, log)
    write_json(args.out / "skill.json", asdict(skill_of(load_policy(args.out))))
    print(f"wrote {args.out}")
