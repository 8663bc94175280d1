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
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..environment import protocol
from ..records import Question, write_json_lines, write_whole
from ..worlds.almanac import MONTHS, Hop, Part, World, build_world

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


@dataclass(frozen=True)
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
    """

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    steps: int = 3000
    batch: int = 32
    lr: float = 1.5e-3
    warmup: int = 60
    weight_decay: float = 0.01
    known_share: float = 0.4
    search_share: float = 0.5
    context_weight: float = 0.3
    context_steps: int = 1500
    quantised_steps: int = 400
    topk: int = 3
    world_steps: int = 60


@dataclass(frozen=True)
class Piece:
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


def demonstrate(question: Question, chain: list[Hop], observations: list[str], *, search: bool) -> list[Piece]:
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
    for i, observed in enumerate(observations):
        found = " ".join(f"{hop.fact}." for hop in chain[: i + 1])
        if i + 1 < len(chain):
            act = f"<search> {chain[i + 1].query} </search>"
        else:
            found, act = found + conclusion(question, chain), f"<answer> {answer} </answer>"
        pieces += [Piece(observed, "environment"), Piece(f"<think> {found} </think>\n{act}", "model")]
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

    engine = BM25Search(world.passages)
    questions = {
        known: [q for split in world.questions.values() for q in split if q.known == known] for known in (True, False)
    }
    by_kind = {known: _by_kind(qs) for known, qs in questions.items()}
    drawn = []
    for _ in range(count):
        known = rng.random() < recipe.known_share
        kinds, weights = by_kind[known]
        drawn.append((rng.choice(rng.choices(kinds, weights)[0]), rng.random() < recipe.search_share))
    queries = [hop.query for q, search in drawn if search for hop in world.chains[q.id]]
    hits = iter(engine.search_batch(queries, k=recipe.topk))
    for question, search in drawn:
        chain = world.chains[question.id]
        found = [next(hits) for _ in chain] if search else []
        if any(hop.passage not in {h.passage.id for h in hs} for hop, hs in zip(chain, found)):
            continue
        cut = search and question.known and rng.random() < 0.7
        observed = [] if cut else [protocol.observation([h.passage for h in hs]) for hs in found]
        yield question, demonstrate(question, chain, observed, search=search)


def _by_kind(questions: list[Question]) -> tuple[list[list[Question]], list[float]]:
    """Questions grouped by kind, with the weight of each group: plain facts evenly, then bridges, comparisons."""
    kinds: dict[str, list[Question]] = {}
    for q in questions:
        kinds.setdefault(q.source, []).append(q)
    plain = sum(k not in ("almanac/bridge", "almanac/comparison") for k in kinds)
    weight = {"almanac/bridge": 0.3, "almanac/comparison": 0.2}
    return list(kinds.values()), [weight.get(k, 0.5 / plain) for k in kinds]


def prompt_text(question: str) -> str:
    """The whole prompt of the tiny Qwen, chat template included (as the tokenizer's template gives it)."""
    user = protocol.build_prompt(question, protocol.SHORT_PROMPT)
    return (
        f"<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )


def train_tokenizer(texts: Iterator[str], vocab_size: int):
    """A byte-level BPE tokenizer with Qwen's pre-tokenisation; tags are ordinary text in it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    )
    made = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=made["vocab"],
        merges=[tuple(m) for m in made["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(recipe: Recipe, tokenizer):
    """A Qwen2 with random weights in the recipe's shape, fp32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    shape = {
        k: getattr(recipe, k)
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    }
    config = Qwen2Config(
        vocab_size=recipe.vocab_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer, question: Question, pieces: list[Piece], context_weight: float) -> tuple[list[int], list[float]]:
    """Token ids of a demonstration, and the loss weight of each. Turns are encoded one by one, as in a rollout."""
    ids = tokenizer.encode(prompt_text(question.text))
    weights = [context_weight] * len(ids)
    for writer, group in _turns(pieces):
        text = "".join(p.text for p in group)
        enc = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids += enc["input_ids"]
        if writer == "environment":
            weights += [context_weight] * len(enc["input_ids"])
            continue
        guess = [False] * len(text)
        at = 0
        for p in group:
            guess[at : at + len(p.text)] = [p.writer == "guess"] * len(p.text)
            at += len(p.text)
        weights += [0.0 if any(guess[a:b]) else 1.0 for a, b in enc["offset_mapping"]]
    if pieces[-1].text.endswith("</answer>"):
        ids.append(tokenizer.eos_token_id)
        weights.append(1.0)
    return ids, weights


def _turns(pieces: list[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Neighbouring pieces of one writer together; a guess belongs to the model's turn."""
    group: list[Piece] = []
    for p in pieces:
        if group and (p.writer == "environment") != (group[0].writer == "environment"):
            yield group[0].writer, group
            group = []
        group.append(p)
    if group:
        yield group[0].writer, group


def batches(tokenizer, recipe: Recipe, avoid: set[str]) -> Iterator[list[tuple[list[int], list[float]]]]:
    """Endless batches of encoded demonstrations, a fresh world every ``world_steps`` batches."""
    rng, number = random.Random(recipe.seed), 0
    while True:
        world = fresh_world(number, avoid)
        need = recipe.batch * recipe.world_steps
        context_weight = recipe.context_weight if number * recipe.world_steps < recipe.context_steps else 0.0
        made = [
            encode(tokenizer, q, pieces, context_weight)
            for q, pieces in demonstrations(world, recipe, rng, need + need // 8)
        ]
        for i in range(recipe.world_steps):
            yield made[i * recipe.batch : (i + 1) * recipe.batch]
        number += 1


def micro_batches(batch: list, budget: int) -> Iterator[list]:
    """Cut a batch into parts of similar length, each of at most ``budget`` padded tokens."""
    batch = sorted(batch, key=lambda example: len(example[0]))
    part: list = []
    for example in batch:
        if part and (len(part) + 1) * len(example[0]) > budget:
            yield part
            part = []
        part.append(example)
    yield part


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


class NF4Rounding:
    """Rounds the linear layers to NF4 in the forward pass, and lets gradients through unchanged.

    ``apply`` swaps rounded weights in, ``restore`` swaps the exact ones back before the optimiser's step.
    """

    def __init__(self, model):
        import torch

        self.weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]

    def apply(self) -> None:
        import bitsandbytes.functional as bnb

        self.exact = [w.data for w in self.weights]
        for w in self.weights:
            w.data = bnb.dequantize_4bit(*bnb.quantize_4bit(w.data, quant_type="nf4", compress_statistics=True))

    def restore(self) -> None:
        for w, exact in zip(self.weights, self.exact):
            w.data = exact


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
                prompt = prompt_text(question.text)
                for special in SPECIAL:
                    prompt = prompt.replace(special, "")
                yield prompt + "".join(p.text for p in pieces)
            yield from (f"{p.title} {p.text}" for p in world.passages)

    return train_tokenizer(texts(), recipe.vocab_size)


def train(recipe: Recipe, *, device: str = "cpu", token_budget: int = 3000, report=print, every: int = 100):
    """Run the recipe. Returns ``(model, tokenizer, log)``; ``log`` has one row of losses every ``every`` steps."""
    import torch

    avoid = build_world(0).lookup_names
    tokenizer = make_tokenizer(recipe, avoid)
    model = new_model(recipe, tokenizer).to(device).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    rounding, log, started, running = NF4Rounding(model), [], time.perf_counter(), []
    for step, batch in zip(range(recipe.steps), batches(tokenizer, recipe, avoid)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, recipe)
        quantised = step >= recipe.steps - recipe.quantised_steps
        total = sum(sum(w[1:]) for _, w in batch)
        if quantised:
            rounding.apply()
        loss = 0.0
        for part in micro_batches(batch, token_budget):
            part_loss = weighted_loss(model, part, tokenizer.pad_token_id) / total
            part_loss.backward()
            loss += part_loss.detach()
        if quantised:
            rounding.restore()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        running.append(loss)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            row = {
                "step": step + 1,
                "loss": round(float(sum(running)) / len(running), 4),
                "seconds": round(time.perf_counter() - started, 1),
            }
            log.append(row)
            running = []
            report(f"step {row['step']:5d}/{recipe.steps}  loss {row['loss']:.4f}  {row['seconds']:.0f} s")
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


def measure(
    policy, questions: list[Question], engine, *, topk: int = 3, seed: int = 0, report=None
) -> dict[str, float]:
    """The figures of ``TARGETS`` for a policy: can it search, can it answer, and does it choose by chance.

    "Made to" search or answer: the model thinks, then the opening tag is put into its mouth; greedy.
    "Searches first": sampled at temperature 1, two rollouts a question.
    """
    from .evaluate import evaluate

    limits = {"topk": topk, "max_turns": 3, "max_turn_tokens": 80}
    made = {
        act: evaluate(policy, questions, engine, first_action=act, report=report, **limits).table()
        for act in ("search", "answer")
    }
    free = evaluate(policy, questions, engine, temperature=1.0, num_generations=2, seed=seed, report=report, **limits)
    first = {known: [r["searches"] > 0 for r in free.rows if r["known"] == known] for known in (True, False)}
    return {
        "EM, look-up, made to search": made["search"]["look-up"]["em"],
        "EM, look-up, 1 hop, made to search": made["search"]["look-up, 1 hop"]["em"],
        "EM, look-up, 2 hops, made to search": made["search"]["look-up, 2 hops"]["em"],
        "EM, known, made to answer": made["answer"]["known"]["em"],
        "EM, look-up, made to answer": made["answer"]["look-up"]["em"],
        "searches first, known": sum(first[True]) / len(first[True]),
        "searches first, look-up": sum(first[False]) / len(first[False]),
    }


def save(out: Path, model, tokenizer, recipe: Recipe, log: list[dict]) -> None:
    """Write the model's folder: Hugging Face files, ``search_r1.json`` (its prompt), ``recipe.json``, the log."""
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    write_whole(out / "search_r1.json", json.dumps({"prompt": "short"}, indent=1) + "\n")
    write_whole(out / "recipe.json", json.dumps(asdict(recipe), indent=1) + "\n")
    write_json_lines(out / "training_log.jsonl", log)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("data/tiny_qwen"), help="default: data/tiny_qwen")
    parser.add_argument("--steps", type=int, help="fewer steps, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> None:
    """Train the tiny Qwen and write it, with its tokenizer, recipe and log."""
    recipe = Recipe(seed=args.seed)
    if args.steps:
        recipe = replace(recipe, steps=args.steps, quantised_steps=min(recipe.quantised_steps, args.steps // 4))
    model, tokenizer, log = train(recipe, device=args.device)
    save(args.out, model.cpu(), tokenizer, recipe, log)
    print(f"wrote {args.out}")
