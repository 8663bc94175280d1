"""The baselines that a paper on Search-R1 shows, all on one model, one set of questions and one engine.

Ways of using the untrained model, each a loop over ``rollout``:

    direct         made to answer: never searches
    always-search  made to search first, with its own query, and free afterwards
    rag            one search with the question itself, then the answer (Lewis et al. 2020, arXiv 2005.11401)
    ircot          searches with its last thought until it answers (IRCoT, Trivedi et al. 2023, arXiv 2212.10509)
    untrained      left to itself

and trained ones, each a fresh LoRA on the same NF4 weights, left to themselves:

    sft            supervised fine-tuning on demonstrations of the right behaviour. Its teacher knows the chain of
                   facts, how sure the model's memories are, and the optimum: no other method is told so much
    rejection      samples, keeps of each question the cheapest right rollout, and fine-tunes on it
    no-search      GRPO without a search engine (R1 without search)
    grpo           a saved adapter, such as the one of notebook 05

    searchr1 baselines --out runs/baselines
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from ..data import load_passages, load_questions
from ..environment import protocol
from ..environment.base import call_all
from ..environment.limits import Amount, Count, Limits, Positive, Share, Whole
from ..environment.search import Search, SearchEnvironment
from ..files import read_json, write_whole
from ..metrics import grouped, right
from ..records import ENVIRONMENT, Question, Segment, ToolCall, Trajectory
from ..rewards import Discounted, score
from ..worlds.almanac import PRICE, TRUE_SHARE, UNKNOWN_PAYS, world_of
from ..worlds.optimum import State
from ..worlds.prepare import check_out
from .analysis import bootstrap, markdown_table
from .compare import LIMITS
from .evaluate import Report, add_fields, evaluate, hashes, row_of
from .regret import Yardstick, skill_of
from .warmstart import Choose, episode, play, update

UNTRAINED = ("untrained", "direct", "always-search", "rag", "ircot")
TRAINED = ("sft", "rejection", "no-search", "grpo")
METHODS = UNTRAINED + TRAINED
#: What is averaged over questions.
FIGURES = ("em", "f1", "searches", "tokens", "seconds", "reward")


# ---- ways of using a model -------------------------------------------------------------------------------


def answer_with(method: str, policy, questions: Sequence[Question], engine, **how: Any) -> Report:
    """Let a policy answer questions in one of the ways above (a trained one is left to itself).

    Args:
        how: as for ``evaluate``: reward, temperature, batch_size, seed and limits.

    Raises:
        ValueError: an unknown method, no questions, or a parameter that cannot be.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    if method in ("rag", "ircot"):
        return retrieve_first(policy, questions, engine, rounds=1 if method == "rag" else None, **how)
    if method == "no-search":
        how["max_turns"] = 0
    first = {"direct": "answer", "always-search": "search"}.get(method)
    return evaluate(policy, questions, engine, first_action=first, **how)


def retrieve_first(
    policy, questions: Sequence[Question], engine, *, rounds: int | None = None, reward=None, **how: Any
) -> Report:
    """Search with the question; then, round by round, with the last sentence that the model thought.

    A question is done when the model answers; after the last search it is made to. What is searched for is never the
    model's own query, so the searching text counts as the environment's (mask 0).

    Args:
        rounds: searches at most (None: ``max_turns``); 1 is RAG.
        how: limits, and other arguments of ``evaluate``.
    """
    limits = Limits(**{name: how.pop(name) for name in Limits.model_fields if name in how})
    environment = SearchEnvironment([Search(engine)], limits, policy.measure)
    without_chat = copy.copy(policy)
    without_chat.chat = lambda user: user
    stories = [_Story(policy, q) for q in questions]
    rounds = rounds or limits.max_turns
    for number in range(1, rounds + 1):
        going = [s for s in stories if not s.over]
        if not going:
            break
        calls = call_all(environment.tools[0], [s.query for s in going], limits.topk, limits.search_timeout)
        for s, call in zip(going, calls):
            s.read(replace(call, seconds=0.0), environment.observe(call).text)
        last = number == rounds
        bounds = limits.limits() | {"max_turns": 0, "first_action": "answer" if last else None}
        begun = [Question(s.written.question.id, s.prompt, []) for s in going]
        for s, t in zip(going, evaluate(without_chat, begun, engine, environment=_Whole, **bounds, **how).trajectories):
            s.write(t, last)
    trajectories = [s.written for s in stories]
    if reward is not None:
        score(reward, trajectories).keep(trajectories)
    return Report([row_of(t) for t in trajectories], trajectories)


class _Whole(SearchEnvironment):
    """Its questions are whole prompts."""

    def reset(self, question: Question) -> str:
        return question.text


class _Story:
    """One rollout of ``retrieve_first`` in the making: ``written`` so far, and what is searched for next."""

    def __init__(self, policy, question: Question):
        prompt = policy.prompt_text(question.text)
        self.policy, self.query, self.over = policy, question.text, False
        self.written = Trajectory(question, policy.encode(prompt), [], [], [], prompt=prompt)

    @property
    def prompt(self) -> str:
        # a chat token that the model spelled out must not become a real one in the next prompt
        return self.written.prompt + self.written.text.replace("<|", "\u2039|")

    def read(self, call: ToolCall, observation: str) -> None:
        """Add the search and what it gave."""
        text = f"<search> {protocol.escape(call.argument)} </search>{observation}"
        ids = self.policy.encode(text)
        tokens = [self.policy.token_bytes[i].decode("utf-8", "replace") for i in ids]
        unsampled = Trajectory(self.written.question, [], ids, [0] * len(ids), [0.0] * len(ids), tokens=tokens)
        self._add(unsampled, [Segment(ENVIRONMENT, "information", text, 0, 0, len(ids))])
        self.written.calls.append(call)

    def write(self, t: Trajectory, last: bool) -> None:
        """Take over what the model wrote: all of it if it is the end, otherwise up to the end of its last thought."""
        self.over, kept = t.answer is not None or last, t.segments
        if self.over:
            self.written.answer, self.written.finish_reason = t.answer, t.finish_reason
        else:
            while kept and kept[-1].kind != "think":
                kept = kept[:-1]
            thought = kept[-1].text.removeprefix("<think>").removesuffix("</think>") if kept else ""
            self.query = next((s.strip() for s in reversed(thought.split(". ")) if s.strip()), self.query)
        self._add(t, kept)
        self.written.seconds += t.seconds
        self.written.turns += 1

    def _add(self, t: Trajectory, segments: Sequence[Segment]) -> None:
        """Append these segments of ``t``, its first ones, and their tokens."""
        shift, end = len(self.written.mask), segments[-1].end if segments else 0
        for name in ("completion_ids", "mask", "logprobs", "tokens"):
            getattr(self.written, name).extend(getattr(t, name)[:end])
        moved = [replace(s, turn=self.written.turns, start=s.start + shift, end=s.end + shift) for s in segments]
        self.written.segments += moved


# ---- supervised fine-tuning and rejection sampling -------------------------------------------------------


def optimal(yardstick: Yardstick) -> Choose:
    """Chooses what is best by what the model states and how well it searches and reads; see ``worlds.optimum``."""

    def choose(asked, chain, number, searches, tried):
        right = prod(yardstick.skill.read if t.read else TRUE_SHARE[t.entity.level] for t in chain[:number])
        level = TRUE_SHARE[chain[number].entity.level] if number < len(chain) else None
        optimum = yardstick.optimum(asked, frozenset(i for i, t in enumerate(chain) if t.read))
        values = optimum.act_values(State(number, searches, right, tried), level)
        return max(values, key=values.__getitem__)

    return choose


def demonstrations(
    policy, questions: Sequence[Question], yardstick: Yardstick, engine, *, topk: int = 3
) -> list[Trajectory]:
    """The right behaviour on questions of the almanac: what the optimum does, at each decision.

    Raises:
        ValueError: a question is not of the yardstick's world: nobody knows what is recalled of it.
    """
    texts = {q.id: q.text for part in yardstick.world.questions.values() for q in part}
    if strange := next((q for q in questions if texts.get(q.id) != q.text), None):
        raise ValueError(f"question {strange.id!r} is not of this almanac: nobody can demonstrate it")
    choose = optimal(yardstick)
    shown = play(((q, episode(yardstick.world.asked[q.id], choose), topk) for q in questions), engine)
    return [written(policy, q, pieces, policy.prompt_text(q.text)) for q, pieces in shown]


def written(policy, question: Question, pieces: Iterable, prompt: str) -> Trajectory:
    """A demonstration as a trajectory; mask 1 on what the model should write."""
    t = Trajectory(question, policy.encode(prompt), [], [], [])
    for by_model, group in groupby(pieces, key=lambda piece: piece.writer != "environment"):
        ids = policy.encode("".join(piece.text for piece in group))
        t.completion_ids += ids
        t.mask += [int(by_model)] * len(ids)
        t.logprobs += [0.0] * len(ids)
    return t


def cheapest_right(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Of each question the right rollout with the fewest searches, the first of several; none where none is right."""
    by_question = grouped(filter(right, trajectories), lambda t: t.question.id)
    return [min(rollouts, key=lambda t: len(t.searches)) for rollouts in by_question.values()]


def fine_tune(
    policy,
    examples: Sequence[Trajectory],
    *,
    epochs: int = 4,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    token_budget: int = 8192,
    seed: int = 0,
) -> list[float]:
    """Maximum likelihood of the examples' sampled tokens (mask 1) under the LoRA of ``policy``, which it changes.

    AdamW, gradient norm clipped at 1, the learning rate falls linearly to a tenth.

    Args:
        epochs: passes over the examples, each in another order.
        batch_size: examples an update; ``token_budget``: padded tokens a forward pass.

    Returns:
        the mean loss per token of every update, in nats.

    Raises:
        ValueError: no examples.
    """
    import torch

    from ..training.learner import Batch
    from ..training.logits import micro_batches, token_logprobs_and_entropy

    if not examples:
        raise ValueError("fine_tune: no examples (was no sampled rollout right?)")

    def loss_of(part: list[Trajectory]):
        rows = Batch.of(part, policy)
        hidden = policy.hidden(rows.ids, rows.readers, use_cache=False)[:, :-1]
        head = {"bias": policy.lm_head.bias, "mask": rows.mask}
        logprobs, _ = token_logprobs_and_entropy(hidden, policy.lm_head.weight, rows.ids[:, 1:], **head)
        return -(logprobs * rows.mask).sum()

    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    orders = [random.Random(f"{seed}/{epoch}").sample(list(examples), len(examples)) for epoch in range(epochs)]
    batches = [order[i : i + batch_size] for order in orders for i in range(0, len(order), batch_size)]
    losses = []
    for number, batch in enumerate(tqdm(batches, desc="fine-tuning", disable=None)):
        total = sum(sum(t.mask) for t in batch)
        parts = (loss_of(part) / total for part in micro_batches(batch, token_budget))
        rate = learning_rate * (1 - 0.9 * number / len(batches))
        losses.append(float(update({optimizer: rate}, policy.parameters(), parts)))
    return losses


def save_taught(policy, out: Path) -> None:
    """Write the adapter that was fine-tuned, without PEFT's model card, of which nothing is filled in."""
    policy.save_adapter(out)
    (out / "README.md").unlink()


# ---- the comparison --------------------------------------------------------------------------------------


class Setup(Limits, use_attribute_docstrings=True):
    """Everything that the methods share, and what the trained ones may spend; the limits and costs of notebook 05."""

    model: str = "data/tiny_qwen"
    """folder or name on the hub, see ``load_policy``"""
    adapter: str = "data/tiny_qwen_grpo"
    """folder of the adapter that the method grpo loads"""
    data: str = "data/almanac"
    """folder with passages.jsonl, train.jsonl and test.jsonl"""
    questions: Whole = 0
    """test questions of ``data``, 0 for all"""
    train_questions: Whole = 0
    """on which methods are trained, 0 for all"""
    steps: Count = 150
    """of GRPO in no-search, which learns at 1.5e-3"""
    num_generations: Count = 16
    """rollouts per question that rejection samples"""
    epochs: Count = 4
    """of fine-tuning"""
    learning_rate: Positive = 1e-3
    """of fine-tuning"""
    temperature: Amount = 0.0
    """when questions are answered; training samples at 1"""
    search_cost: Share = PRICE
    """the share of a right answer's reward that a search takes, see ``rewards.Discounted``"""
    max_turn_tokens: Count = LIMITS["max_turn_tokens"]
    """tokens that the model may sample in one turn"""
    max_completion_length: Count = LIMITS["max_completion_length"]
    """tokens of the whole completion, observations included"""
    seed: Whole = 0
    """of all that is drawn"""


def reward_of(setup: Setup) -> Discounted:
    """The reward that trains and judges."""
    return Discounted(setup.search_cost, UNKNOWN_PAYS)


def trained(method: str, setup: Setup, engine, out: Path) -> tuple[Any, dict[str, float | int | None]]:
    """The policy of a method, trained where the method trains, and what the training took.

    ``out/METHOD/`` keeps what was made: the adapter, or for no-search the trainer's folder, which goes on after an
    interruption.

    Returns:
        the policy; {"minutes", "rollouts", "examples"}, None where a figure does not apply.
    """
    from ..training.policy import load_policy
    from ..training.rollout import rollout
    from ..training.trainer import Settings, Trainer

    start, rollouts = time.perf_counter(), None
    policy = load_policy(setup.model, adapter=setup.adapter if method == "grpo" else None, seed=setup.seed)
    if method in UNTRAINED or method == "grpo":
        return policy, dict.fromkeys(("minutes", "rollouts", "examples"))
    questions = load_questions(Path(setup.data) / "train.jsonl")[: setup.train_questions or None]
    if method == "no-search":
        how = setup.limits() | {"steps": setup.steps, "decay_steps": 2 * setup.steps // 3, "seed": setup.seed}
        settings = Settings(learning_rate=1.5e-3, **how | {"max_turns": 0})
        trainer = Trainer(policy, questions, engine, reward_of(setup), settings, out / method)
        trainer.train()
        minutes = sum(row["seconds"] for row in trainer.metrics) / 60
        rollouts = setup.steps * settings.questions_per_step * settings.num_generations
        return policy, {"minutes": minutes, "rollouts": rollouts, "examples": None}
    if method == "sft":
        world = world_of(setup.data, "the method sft")
        yardstick = Yardstick(world, skill_of(setup.model), setup.search_cost, UNKNOWN_PAYS, setup.max_turns)
        examples = demonstrations(policy, questions, yardstick, engine, topk=setup.topk)
    else:
        import torch

        generator = torch.Generator(device=policy.device).manual_seed(setup.seed)
        how = setup.limits() | {"num_generations": setup.num_generations, "generator": generator}
        starts = tqdm(range(0, len(questions), 8), desc="sampling", disable=None)
        sampled = [t for i in starts for t in rollout(policy, questions[i : i + 8], engine, **how)]
        examples, rollouts = cheapest_right(sampled), len(sampled)
    fine_tune(policy, examples, epochs=setup.epochs, learning_rate=setup.learning_rate, seed=setup.seed)
    policy.save_adapter(out / method)
    minutes = (time.perf_counter() - start) / 60
    return policy, {"minutes": minutes, "rollouts": rollouts, "examples": len(examples)}


def group_of(question: Question) -> str:
    """The column of the table: known, or by what a search has to find."""
    if question.known:
        return "known"
    hops = f"{question.hops} hop{'s' * (question.hops > 1)}"
    kind = "comparison" if "/comparison/" in question.source else hops
    return kind if question.known is None else f"look-up, {kind}"


def run_method(method: str, setup: Setup, questions: Sequence[Question], engine, out: Path) -> dict[str, Any]:
    """Train a method if it trains, and ask it all questions, group by group, so that each group has its own time.

    Returns:
        the method's result: {"method", "training", "rows"}; a row a question with its "id", "group" and ``FIGURES``,
        "seconds" being the group's mean.
    """
    policy, spent = trained(method, setup, engine, out)
    how = {"reward": reward_of(setup), "temperature": setup.temperature, "seed": setup.seed}
    rows = []
    for group, members in grouped(questions, group_of).items():
        start = time.perf_counter()
        report = answer_with(method, policy, members, engine, **how, **setup.limits())
        seconds = (time.perf_counter() - start) / len(members)
        for row in report.rows:
            figures = {name: row[name] for name in FIGURES} | {"seconds": seconds}
            rows.append({"id": row["id"], "group": group} | figures)
    return {"method": method, "training": spent, "rows": rows}


def compare(methods: Sequence[str], setup: Setup, out: str | Path) -> dict[str, dict[str, Any]]:
    """Results by method. Each is kept in ``out/METHOD.json`` and not made again for the same setup and the same files.

    Raises:
        ValueError: an unknown method, no adapter where one is needed, or ``out`` holds a result of another setup.
    """
    from ..search import BM25Search

    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"unknown method {', '.join(unknown)}: choose from {', '.join(METHODS)}")
    if "grpo" in methods and not (Path(setup.adapter) / "adapter_config.json").exists():
        raise ValueError(f"adapter must be a folder with an adapter_config.json, got {setup.adapter!r}")
    own = [*(f"{method}.json" for method in METHODS), *METHODS, "baselines.md"]
    own.sort(key=lambda name: not (Path(out) / name).exists())  # any of them marks the folder as ours
    check_out(out, own, setup.model, setup.adapter, setup.data)
    out, results = Path(out), load(out)
    missing = [method for method in methods if method not in results]
    made_of = vars(setup) | {f"files in {name}": hashes(getattr(setup, name)) for name in ("model", "adapter", "data")}
    for method in methods:
        if differ := [
            k for k, v in made_of.items() if method in results and results[method].get("setup", {}).get(k) != v
        ]:
            raise ValueError(f"{out / method}.json was made with another {', '.join(differ)}: choose another folder")
    if missing:
        engine = BM25Search(load_passages(Path(setup.data) / "passages.jsonl"))
        questions = load_questions(Path(setup.data) / "test.jsonl")[: setup.questions or None]
    for method in (bar := tqdm(missing, desc="baselines", disable=None)):
        bar.set_postfix_str(method)
        results[method] = run_method(method, setup, questions, engine, out) | {"setup": made_of}
        write_whole(out / f"{method}.json", json.dumps(results[method]) + "\n")
    return {method: results[method] for method in methods}


def load(out: str | Path) -> dict[str, dict[str, Any]]:
    """The results that ``compare`` left in a folder, by method; {} without any."""
    files = {method: Path(out) / f"{method}.json" for method in METHODS}
    return {method: read_json(file) for method, file in files.items() if file.exists()}


def table(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a method and group ("all" last): n and the means of em, f1, searches, tokens, seconds and reward."""
    lines = []
    for method, result in results.items():
        groups = grouped(result["rows"], lambda row: row["group"]) | {"all": result["rows"]}
        for group, rows in groups.items():
            means = {name: fmean(row[name] for row in rows) for name in FIGURES}
            lines.append({"method": method, "group": group, "n": len(rows), **means})
    return lines


def verdicts(results: Mapping[str, Mapping[str, Any]], method: str = "grpo") -> list[str]:
    """What ``method`` earns more or less than every other one, on the same questions, with 95 % intervals."""
    if method not in results:
        return []
    mine = {row["id"]: row for row in results[method]["rows"]}
    lines = []
    for name, result in results.items():
        if name == method:
            continue
        said = []
        for metric, word in (("em", "exact match"), ("searches", "searches"), ("reward", "reward")):  # the reward last
            d = [mine[row["id"]][metric] - row[metric] for row in result["rows"]]
            low, high = bootstrap(d)
            said.append(f"{word} {fmean(d):+.3f} ({low:+.3f} to {high:+.3f})")
        sure = "earns more" if low > 0 else "earns less" if high < 0 else "no difference in reward is shown"
        lines.append(f"{method} against {name}: {', '.join(said)}: {sure}")
    return lines


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Table and verdicts as Markdown."""
    head = ["method", "questions", "n", "exact match", "F1", "searches", "tokens", "seconds a question", "reward"]
    rows = [list(row.values()) for row in table(results)]
    spent = ("rollouts", "examples", "minutes")
    cost = [(name, *(results[name]["training"][k] for k in spent)) for name in results if name in TRAINED]
    parts = ["# Baselines", markdown_table(head, rows)]
    if cost:
        parts += ["What the training took:", markdown_table(["method", *spent], cost)]
    if lines := verdicts(results):
        parts += ["Differences on the same questions, 95 % intervals:", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"), help="folder for results (made if missing)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add_fields(parser, Setup)


def run(args: argparse.Namespace) -> None:
    """Compare the methods, print the page and write it to ``baselines.md``."""
    results = compare(args.methods, Setup(**{name: vars(args)[name] for name in Setup.model_fields}), args.out)
    write_whole(args.out / "baselines.md", text := page(results))
    print(text)
