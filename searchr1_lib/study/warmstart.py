"""The recipe of the tiny Qwen: a real ``Qwen2ForCausalLM`` that can search and can answer, and cannot choose.

It is taught three things by supervised demonstrations, and one thing is withheld from it:

1. the known facts of the almanac, and to state in ``<think>`` what it recalls, or that it recalls nothing
   (P(IK), Kadavath et al. 2022, arXiv 2207.05221; R-Tuning, arXiv 2311.09677);
2. to search, read what a real engine returns, and answer from it, up to two hops;
3. to answer straight away.

Which of 2 and 3 it does is a fair coin in the demonstrations, whatever it recalled. Tying the act to the
recollection is left to GRPO. Look-up names are drawn afresh (another world every few steps), so that
"I recall nothing" generalises; a guessed answer carries no loss on its words.

    searchr1 warm-start --out data/tiny_qwen
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass
from tqdm import tqdm

from ..environment import protocol
from ..environment.limits import Amount, Checked, Count, Positive, Share, Whole
from ..files import write_json, write_json_lines
from ..metrics import grouped
from ..records import Question
from ..worlds.almanac import MONTHS, Hop, Part, World, build_world
from ..worlds.prepare import check_out

#: Qwen2.5's chat template, for messages without tools: a default system message, then the turns.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: What of a ``Recipe`` is the model's shape.
#: What stands in a folder that was made here.
OWN = (
    "recipe.json search_r1.json training_log.jsonl config.json generation_config.json model.safetensors tokenizer.json "
    "tokenizer_config.json chat_template.jinja"
).split()
SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()


@dataclass(config=Checked.model_config)
class Recipe:
    """Everything that decides what the warm start makes.

    Attributes:
        vocab_size: of the byte-level BPE tokenizer, special tokens included.
        steps, batch: optimiser steps, demonstrations a step.
        lr: peak learning rate of AdamW; linear warm-up, then a cosine down to a tenth of it.
        known_share: share of demonstrations about known facts.
        search_share: how often the first act of a demonstration is a search.
        context_weight: loss weight of the words that the model does not write (prompt and passages) in
            the first ``context_steps`` steps; they teach it to copy. Guessed answers have weight 0 always.
        quantised_steps: last steps trained with NF4 rounding in the forward pass (straight-through),
            so that the skills survive 4-bit loading.
        topk: documents an observation holds.
        world_steps: a fresh world every so many steps.

    Raises:
        ValueError: a value of another type, or out of its range.
    """

    seed: Whole = 0
    vocab_size: Count = 2048
    hidden_size: Count = 128
    intermediate_size: Count = 384
    num_hidden_layers: Count = 4
    num_attention_heads: Count = 4
    num_key_value_heads: Count = 2
    steps: Count = 3000
    batch: Count = 32
    lr: Positive = 1.5e-3
    warmup: Whole = 60
    weight_decay: Amount = 0.01
    known_share: Share = 0.4
    search_share: Share = 0.5
    context_weight: Amount = 0.3
    context_steps: Whole = 1500
    quantised_steps: Whole = 400
    topk: Count = 3
    world_steps: Count = 60


class Piece(NamedTuple):
    """A part of a demonstration. ``writer``: "model", "environment", or "guess" (never any loss)."""

    text: str
    writer: str


def recollection(question: Question, chain: list[Hop]) -> str:
    """What the model says it recalls before it acts."""
    if question.known:
        return " ".join(f"I recall that {hop.fact}." for hop in chain) + conclusion(question, chain)
    return f"I recall nothing about {chain[0].subject}."


def conclusion(question: Question, chain: list[Hop]) -> str:
    """What has to be thought once all facts are there: for a comparison, which of the two comes first."""
    if question.source != "almanac/comparison":
        return ""
    return f" {min((hop.value for hop in chain), key=MONTHS.index)} comes first."


def demonstrate(question: Question, chain: list[Hop], observations: Iterable[str], *, search: bool) -> list[Piece]:
    """The turns of one demonstration; ``observations`` as the engine's hits were written, one a hop."""
    think = f"<think> {recollection(question, chain)} </think>\n"
    answer = question.answers[0]
    if not search:
        return [
            Piece(f"{think}<answer>", "model"),
            Piece(f" {answer}", "model" if question.known else "guess"),
            Piece(" </answer>", "model"),
        ]
    pieces = [Piece(f"{think}<search> {chain[0].query} </search>", "model")]
    for hops, observation in enumerate(observations, 1):
        thought = " ".join(f"{hop.fact}." for hop in chain[:hops])
        if hops < len(chain):
            act = f"<search> {chain[hops].query} </search>"
        else:
            thought, act = thought + conclusion(question, chain), f"<answer> {answer} </answer>"
        pieces += [Piece(observation, "environment"), Piece(f"<think> {thought} </think>\n{act}", "model")]
    return pieces


def fresh_world(number: int, avoid: set[str]) -> World:
    """A world for the warm start: the same known part, and look-up names that meet nothing shipped."""
    return build_world(1000 + number, avoid=avoid, lookup={"train": Part(420, 160, 160, 200)})


def demonstrations(
    world: World, recipe: Recipe, rng: random.Random, count: int
) -> Iterator[tuple[Question, list[Piece]]]:
    """``count`` demonstrations on one world, observations made by a real BM25 engine over its passages.

    Most demonstrations that search for a known fact stop after the query: what follows is taught by the
    look-up ones. A chain whose gold passages the engine does not find is left out, so a demonstration
    never concludes what it has not seen.
    """
    from ..search.bm25 import BM25Search

    engine, questions = BM25Search(world.passages), list(itertools.chain(*world.questions.values()))
    by_kind = {known: _by_kind(q for q in questions if q.known == known) for known in (True, False)}
    drawn = []
    for _ in range(count):
        known = rng.random() < recipe.known_share
        kinds, weights = by_kind[known]
        drawn.append((rng.choice(rng.choices(kinds, weights)[0]), rng.random() < recipe.search_share))
    queries = [hop.query for q, search in drawn if search for hop in world.chains[q.id]]
    hits = iter(engine.search_batch(queries, k=recipe.topk))
    for question, search in drawn:
        hops = world.chains[question.id]
        seen = [[hit.passage for hit in next(hits)] for _ in hops] if search else []
        if any(hop.passage not in {p.id for p in passages} for hop, passages in zip(hops, seen)):
            continue
        cut = search and question.known and rng.random() < 0.7
        yield question, demonstrate(question, hops, [] if cut else map(protocol.observation, seen), search=search)


def _by_kind(questions: Iterable[Question]) -> tuple[list[list[Question]], list[float]]:
    """Questions grouped by kind, with the weight of each group: plain facts evenly, then bridges, comparisons."""
    kinds = grouped(questions, lambda q: q.source)
    weight = {"almanac/bridge": 0.3, "almanac/comparison": 0.2}
    return list(kinds.values()), [weight.get(kind, 0.5 / len(kinds.keys() - weight)) for kind in kinds]


def prompt_text(question: str) -> str:
    """The whole prompt of the tiny Qwen, as the tokenizer's chat template gives it."""
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


def encode(tokenizer, question: Question, pieces: list[Piece], context_weight: float) -> tuple[list[int], list[float]]:
    """Token ids of a demonstration, and the loss weight of each. Turns are encoded one by one, as in a rollout."""
    ids = tokenizer.encode(prompt_text(question.text))
    weights, by_writer = [context_weight] * len(ids), {"environment": context_weight, "guess": 0.0, "model": 1.0}
    for _, neighbours in itertools.groupby(pieces, key=lambda p: p.writer == "environment"):  # a guess is the model's
        group = list(neighbours)
        tokens = tokenizer("".join(p.text for p in group), return_offsets_mapping=True, add_special_tokens=False)
        ids += tokens["input_ids"]
        letters = [by_writer[p.writer] for p in group for _ in p.text]
        weights += [min(letters[start:end]) for start, end in tokens["offset_mapping"]]
    if pieces[-1].text.endswith("</answer>"):
        ids.append(tokenizer.eos_token_id)
        weights.append(1.0)
    return ids, weights


def batches(tokenizer, recipe: Recipe, avoid: set[str]) -> Iterator[list[tuple[list[int], list[float]]]]:
    """Endless batches of encoded demonstrations, a fresh world every ``world_steps`` batches."""
    rng = random.Random(recipe.seed)
    for number in itertools.count():
        world = fresh_world(number, avoid)
        need = recipe.batch * recipe.world_steps
        context_weight = recipe.context_weight if number * recipe.world_steps < recipe.context_steps else 0.0
        drawn = demonstrations(world, recipe, rng, need + need // 8)
        examples = [encode(tokenizer, question, pieces, context_weight) for question, pieces in drawn]
        for i in range(recipe.world_steps):
            yield examples[i * recipe.batch : (i + 1) * recipe.batch]


def weighted_loss(model, part: list, pad: int):
    """Sum over the part of weight x cross-entropy; padding on the right carries no weight."""
    import torch
    import torch.nn.functional as F

    device, length = model.device, max(len(ids) for ids, _ in part)
    ids = torch.tensor([i + [pad] * (length - len(i)) for i, _ in part], device=device)
    weight = torch.tensor([w + [0.0] * (length - len(w)) for _, w in part], device=device)[:, 1:]
    mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i, _ in part], device=device)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    use = weight > 0
    logits = model.lm_head(hidden[use])
    return (F.cross_entropy(logits.float(), ids[:, 1:][use], reduction="none") * weight[use]).sum()


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


def make_tokenizer(recipe: Recipe, avoid: set[str]):
    """The tokenizer of the recipe, trained on demonstrations and passages of fresh worlds."""
    rng = random.Random(recipe.seed)

    def texts():
        for number in range(3):
            world = fresh_world(number, avoid)
            for question, pieces in demonstrations(world, recipe, rng, 1500):
                prompt = re.sub("|".join(map(re.escape, SPECIAL)), "", prompt_text(question.text))
                yield prompt + "".join(p.text for p in pieces)
            yield from (f"{p.title} {p.text}" for p in world.passages)

    return train_tokenizer(texts(), recipe.vocab_size)


def update(optimizer, parameters: Iterable, lr: float, losses: Iterable):
    """One optimiser step on a sum of losses, each differentiated before the next is computed; gradient norm at most 1.

    Returns:
        the sum, a tensor on the device.
    """
    import torch

    for group in optimizer.param_groups:
        group["lr"] = lr
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def train(recipe: Recipe, *, device: str = "cpu", report=tqdm.write, every: int = 100):
    """Run the recipe. Returns ``(model, tokenizer, log)``; ``log`` has one row of losses every ``every`` steps."""
    import torch

    from ..training.logits import micro_batches

    avoid = build_world(0).lookup_names
    tokenizer = make_tokenizer(recipe, avoid)
    model = new_model(recipe, tokenizer).to(device).train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    log, started, running = [], time.perf_counter(), []

    def losses(batch, quantised: bool):
        total = sum(sum(weights[1:]) for _, weights in batch)
        with nf4_rounded(model) if quantised else nullcontext():  # until the last loss has been differentiated
            for part in micro_batches(batch, 3000, length=lambda example: len(example[0])):
                yield weighted_loss(model, part, tokenizer.pad_token_id) / total

    steps = tqdm(range(recipe.steps), desc="warm start", disable=None)
    for step, batch in zip(steps, batches(tokenizer, recipe, avoid)):
        parts = losses(batch, quantised=step >= recipe.steps - recipe.quantised_steps)
        running.append(update(optimizer, model.parameters(), learning_rate(step, recipe), parts))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            loss, seconds = float(sum(running)) / len(running), time.perf_counter() - started
            log.append({"step": step + 1, "loss": round(loss, 4), "seconds": round(seconds, 1)})
            running = []
            report(f"step {step + 1:5d}/{recipe.steps}  loss {loss:.4f}  {seconds:.0f} s")
    return model, tokenizer, log


#: What a good warm start reaches on the test split: name of the figure -> (lowest, highest).
TARGETS = {
    "EM, look-up, made to search": (0.90, 1.0),
    "EM, look-up, 1 hop, made to search": (0.90, 1.0),
    "EM, look-up, 2 hops, made to search": (0.90, 1.0),
    "EM, known, made to answer": (0.95, 1.0),
    "EM, look-up, made to answer": (0.0, 0.10),
    "searches first, known": (0.35, 0.65),
    "searches first, look-up": (0.35, 0.65),
}


def measure(policy, questions: list[Question], engine, *, topk: int = 3, seed: int = 0) -> dict[str, float]:
    """The figures of ``TARGETS`` for a policy: can it search, can it answer, and does it choose by chance.

    "Made to" search or answer: the model thinks, then the opening tag is put into its mouth; greedy.
    "Searches first": sampled at temperature 1, two rollouts a question.
    """
    from .evaluate import evaluate

    how: dict[str, Any] = {"topk": topk, "max_turns": 3, "max_turn_tokens": 80}
    figures: dict[str, Any] = {}
    for act in ("search", "answer"):
        table = evaluate(policy, questions, engine, first_action=act, **how).table()
        figures |= {f"EM, {group}, made to {act}": row["em"] for group, row in table.items()}
    free = evaluate(policy, questions, engine, temperature=1.0, num_generations=2, seed=seed, **how)
    for known, group in ((True, "known"), (False, "look-up")):
        first = [row["searches"] > 0 for row in free.rows if row["known"] == known]
        figures[f"searches first, {group}"] = sum(first) / len(first)
    return {name: figures[name] for name in TARGETS}


def save(out: Path, model, tokenizer, recipe: Recipe, log: list[dict]) -> None:
    """Write the model's folder: Hugging Face files, ``search_r1.json`` (its prompt), ``recipe.json``, the log."""
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    write_json(out / "search_r1.json", {"prompt": "short"})
    write_json(out / "recipe.json", asdict(recipe))
    write_json_lines(out / "training_log.jsonl", log)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("data/tiny_qwen"), help="default: data/tiny_qwen")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="fewer steps, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> None:
    """Train the tiny Qwen and write it, with its tokenizer, recipe and log."""
    check_out(args.out, OWN)
    quantised_steps = min(Recipe.quantised_steps, args.steps // 4)
    recipe = Recipe(seed=args.seed, steps=args.steps, quantised_steps=quantised_steps)
    model, tokenizer, log = train(recipe, device=args.device)
    save(args.out, model.cpu(), tokenizer, recipe, log)
    print(f"wrote {args.out}")
