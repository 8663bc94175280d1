"""The baselines that a paper on Search-R1 shows, all on one model, one set of questions and one engine.

Ways of using the untrained model, each a loop over ``rollout``:

    direct         made to answer: never searches
    always-search  made to search first, with its own query, and free afterwards
    rag            one search with the question itself, then the answer (Lewis et al. 2020, arXiv 2005.11401)
    ircot          searches with its last thought until it answers (IRCoT, Trivedi et al. 2023, arXiv 2212.10509)
    untrained      left to itself

and trained ones, each a fresh LoRA on the same NF4 weights, left to themselves:

    sft            supervised fine-tuning on demonstrations of the right behaviour. Its teacher knows the chain of
                   facts and what the model knows: no other method is told so much
    rejection      samples, keeps of each question the cheapest right rollout, and fine-tunes on it
    no-search      GRPO without a search engine (R1 without search)
    grpo           a saved adapter, such as the one of notebook 05

    searchr1 baselines --out runs/baselines
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data import load_passages, load_questions
from ..environment import protocol
from ..environment.base import call_all
from ..environment.search import Search, SearchEnvironment, fit_observation
from ..files import read_json, write_whole
from ..records import ENVIRONMENT, Question, Segment, ToolCall, Trajectory
from ..rewards import SearchR1Reward, score
from ..worlds.almanac import world_of
from .analysis import bootstrap, markdown_table
from .evaluate import Report, evaluate, row_of

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
    policy,
    questions: Sequence[Question],
    engine,
    *,
    rounds: int | None = None,
    reward=None,
    max_turns: int = 4,
    topk: int = 3,
    max_observation_tokens: int = 500,
    search_timeout: float | None = 60.0,
    **how: Any,
) -> Report:
    """Search with the question; then, round by round, with the last sentence that the model thought.

    A question is done when the model answers; after the last search it is made to. What is searched for is never the
    model's own query, so the searching text counts as the environment's (mask 0).

    Args:
        rounds: searches at most (None: ``max_turns``); 1 is RAG.
        how: other arguments of ``evaluate``.
    """
    stories = [_Story(q, q.text) for q in questions]
    rounds = rounds or max_turns
    for number in range(1, rounds + 1):
        going = [s for s in stories if s.answered is None]
        if not going:
            break
        calls = call_all(Search(engine), [s.query for s in going], topk, search_timeout)
        for s, call in zip(going, calls):
            note = f"The search failed: {call.error}" if call.error else "Nothing was found."
            seen = fit_observation(policy.measure, call.result, max_observation_tokens, note)
            s.add_environment(policy, f"<search> {protocol.escape(s.query)} </search>{seen}")
            s.calls.append(replace(call, seconds=0.0))
        last = number == rounds
        begun = [_with_text(s.question, s.prompt(policy)) for s in going]
        limits: dict[str, Any] = {"max_turns": 0, "topk": topk, "first_action": "answer" if last else None}
        report = evaluate(_AsIs(policy), begun, engine, environment=_Whole, **limits, **how)
        for s, t in zip(going, report.trajectories):
            s.add_turn(t, last)
    trajectories = [s.trajectory(policy) for s in stories]
    if reward is not None:
        score(reward, trajectories).keep(trajectories)
    return Report([row_of(t) for t in trajectories], trajectories)


def _with_text(question: Question, text: str) -> Question:
    """The same question in other words."""
    fields = dict(vars(question), text=text)
    return Question(fields.pop("id"), fields.pop("text"), fields.pop("answers"), **fields)


class _Whole(SearchEnvironment):
    """Its questions are whole prompts."""

    def reset(self, question: Question) -> str:
        return question.text


class _AsIs:
    """A policy that takes a prompt as it is."""

    def __init__(self, policy):
        self._policy = policy

    def __getattr__(self, name: str):
        return getattr(self._policy, name)

    def chat(self, user: str) -> str:
        return user


@dataclass
class _Story:
    """One rollout of ``retrieve_first`` in the making."""

    question: Question
    query: str
    text: str = ""  # all that stands behind the prompt
    written: Trajectory = field(init=False)
    calls: list[ToolCall] = field(default_factory=list)
    answered: bool | None = None  # None: it goes on

    def __post_init__(self):
        self.written = Trajectory(self.question, [], [], [], [])

    def prompt(self, policy) -> str:
        return policy.prompt_text(self.question.text) + self.text

    def add_environment(self, policy, text: str) -> None:
        ids = policy.encode(text)
        start, n = len(self.written.completion_ids), len(ids)
        self.written.tokens += [policy.token_bytes[i].decode("utf-8", "replace") for i in ids]
        self._add(
            ids, [0] * n, [0.0] * n, [Segment(ENVIRONMENT, "information", text, self.written.turns, start, start + n)]
        )

    def add_turn(self, t: Trajectory, last: bool) -> None:
        """Take over what the model wrote: all of it if it is the end, otherwise up to the end of its last thought."""
        self.written.turns += 1
        if t.answer is not None or last:
            self.answered, self.written.answer = t.answer is not None, t.answer
            self.written.finish_reason = "answer" if self.answered else t.finish_reason
            kept = t.segments
        else:
            thoughts = [i for i, s in enumerate(t.segments) if s.kind == "think"]
            kept = t.segments[: thoughts[-1] + 1] if thoughts else []
        end, shift = (kept[-1].end if kept else 0), len(self.written.completion_ids)
        self.written.tokens += t.tokens[:end]
        self.written.seconds += t.seconds
        self._add(
            t.completion_ids[:end],
            t.mask[:end],
            t.logprobs[:end],
            [replace(s, turn=self.written.turns - 1, start=s.start + shift, end=s.end + shift) for s in kept],
        )
        if self.answered is None and kept:
            thought = kept[-1].text.removeprefix("<think>").removesuffix("</think>")
            self.query = next((s.strip() for s in reversed(thought.split(". ")) if s.strip()), self.query)

    def _add(self, ids: list[int], mask: list[int], logprobs: list[float], segments: list[Segment]) -> None:
        self.written.completion_ids += ids
        self.written.mask += mask
        self.written.logprobs += logprobs
        self.written.segments += segments
        # a chat token that the model spelled out must not become a real one in the next prompt
        self.text += "".join(s.text.replace("<|", "\u2039|") for s in segments)

    def trajectory(self, policy) -> Trajectory:
        prompt = policy.prompt_text(self.question.text)
        return replace(self.written, prompt=prompt, prompt_ids=policy.encode(prompt), calls=self.calls)


# ---- supervised fine-tuning and rejection sampling -------------------------------------------------------


def demonstrations(
    policy, questions: Sequence[Question], data: str | Path, engine, *, topk: int = 3
) -> list[Trajectory]:
    """The right behaviour on questions of the almanac: known ones answered, the others searched for hop by hop.

    A question whose gold passage the engine does not find is left out.

    Raises:
        ValueError: ``data`` holds no almanac, or a question is not of it: the chains of facts are missing then.
    """
    from .warmstart import demonstrate

    world = world_of(data, "the method sft")
    texts = {q.id: q.text for questions in world.questions.values() for q in questions}
    shown = []
    for q in questions:
        if texts.get(q.id) != q.text:
            raise ValueError(f"question {q.id!r} is not of the almanac in {data}: nobody can demonstrate it")
        chain = world.chains[q.id]
        results = [] if q.known else engine.search_batch([hop.query for hop in chain], k=topk)
        if all(hop.passage in {h.passage.id for h in hits} for hop, hits in zip(chain, results)):
            seen = [fit_observation(policy.measure, hits, 500) for hits in results]
            shown.append(_written(policy, q, demonstrate(q, chain, seen, search=not q.known)))
    return shown


def _written(policy, question: Question, pieces: Iterable) -> Trajectory:
    """A demonstration as a trajectory; mask 1 on what the model should write."""
    prompt = policy.prompt_text(question.text)
    t = Trajectory(
        question, policy.encode(prompt), [], [], [], answer=question.answers[0], finish_reason="answer", prompt=prompt
    )
    for by_model, group in groupby(pieces, key=lambda piece: piece.writer != "environment"):
        ids = policy.encode("".join(piece.text for piece in group))
        t.completion_ids += ids
        t.mask += [int(by_model)] * len(ids)
        t.logprobs += [0.0] * len(ids)
    return t


def cheapest_right(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Of each question the right rollout with the fewest searches, the first of several; none where none is right."""
    best: dict[str, Trajectory] = {}
    for t in trajectories:
        kept = best.get(t.question.id)
        if row_of(t)["em"] == 1 and (kept is None or len(t.searches) < len(kept.searches)):
            best[t.question.id] = t
    return list(best.values())


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

    from ..training.learner import Batch, micro_batches
    from ..training.logits import token_logprobs_and_entropy
    from .warmstart import update

    if not examples:
        raise ValueError("fine_tune: no examples (was no sampled rollout right?)")

    def mean_loss(part: list[Trajectory], total: int):
        rows = Batch.of(part, policy)
        hidden = policy.decoder(input_ids=rows.ids, use_cache=False).last_hidden_state[:, :-1]
        head = {"bias": policy.lm_head.bias, "mask": rows.mask}
        logprobs, _ = token_logprobs_and_entropy(hidden, policy.lm_head.weight, rows.ids[:, 1:], **head)
        return -(logprobs * rows.mask).sum() / total

    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    orders = [random.Random(f"{seed}/{epoch}").sample(list(examples), len(examples)) for epoch in range(epochs)]
    batches = [order[i : i + batch_size] for order in orders for i in range(0, len(order), batch_size)]
    losses = []
    for number, batch in enumerate(batches):
        parts = map(partial(mean_loss, total=sum(sum(t.mask) for t in batch)), micro_batches(batch, token_budget))
        rate = learning_rate * (1 - 0.9 * number / len(batches))
        losses.append(float(update(optimizer, policy.parameters(), rate, parts)))
    return losses


# ---- the comparison --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Everything that the methods share, and what the trained ones may spend.

    Attributes:
        model: folder or name on the hub, see ``load_policy``.
        adapter: folder of the adapter that the method grpo loads.
        data: folder with passages.jsonl, train.jsonl and test.jsonl.
        questions: test questions of ``data``, 0 for all.
        comparisons: fill the comparisons up to so many with further ones of the almanac's test split.
        train_questions: on which methods are trained, 0 for all.
        steps: of GRPO in no-search, as many as in notebook 05.
        num_generations: rollouts per question that rejection samples.
        epochs, learning_rate: of fine-tuning; no-search learns at 1.5e-3.
        temperature: when questions are answered; training samples at 1.
        search_cost, topk, max_turns, max_turn_tokens, seed: as in notebook 05.
    """

    model: str = "data/tiny_qwen"
    adapter: str = "data/tiny_qwen_grpo"
    data: str = "data/almanac"
    questions: int = 0
    comparisons: int = 50
    train_questions: int = 0
    steps: int = 150
    num_generations: int = 16
    epochs: int = 4
    learning_rate: float = 1e-3
    temperature: float = 0.0
    search_cost: float = 0.15
    topk: int = 3
    max_turns: int = 4
    max_turn_tokens: int = 128
    seed: int = 0

    def limits(self) -> dict[str, Any]:
        return {"topk": self.topk, "max_turns": self.max_turns, "max_turn_tokens": self.max_turn_tokens}


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

    start = time.perf_counter()
    spent: dict[str, float | int | None] = {"minutes": None, "rollouts": None, "examples": None}
    policy = load_policy(setup.model, adapter=setup.adapter if method == "grpo" else None, seed=setup.seed)
    if method in UNTRAINED or method == "grpo":
        return policy, spent
    questions = load_questions(Path(setup.data) / "train.jsonl")[: setup.train_questions or None]
    if method == "no-search":
        how = setup.limits() | {"steps": setup.steps, "decay_steps": 2 * setup.steps // 3, "seed": setup.seed}
        settings = Settings(learning_rate=1.5e-3, **how | {"max_turns": 0})
        trainer = Trainer(policy, questions, engine, SearchR1Reward(setup.search_cost), settings, out / method)
        trainer.train()
        minutes = sum(row["seconds"] for row in trainer.metrics) / 60
        rollouts = setup.steps * settings.questions_per_step * settings.num_generations
        return policy, spent | {"minutes": minutes, "rollouts": rollouts}
    if method == "sft":
        examples = demonstrations(policy, questions, setup.data, engine, topk=setup.topk)
    else:
        import torch

        generator = torch.Generator(device=policy.device).manual_seed(setup.seed)
        how = setup.limits() | {"num_generations": setup.num_generations, "generator": generator}
        parts = [questions[i : i + 8] for i in range(0, len(questions), 8)]
        sampled = [t for part in parts for t in rollout(policy, part, engine, **how)]
        examples, spent["rollouts"] = cheapest_right(sampled), len(sampled)
    fine_tune(policy, examples, epochs=setup.epochs, learning_rate=setup.learning_rate, seed=setup.seed)
    policy.save_adapter(out / method)
    return policy, spent | {"minutes": (time.perf_counter() - start) / 60, "examples": len(examples)}


def group_of(question: Question) -> str:
    """The column of the table: known, or by what a search has to find."""
    if question.known:
        return "known"
    kind = "comparison" if question.source.endswith("/comparison") else "1 hop" if question.hops == 1 else "2 hops"
    return kind if question.known is None else f"look-up, {kind}"


def questions_of(setup: Setup) -> list[Question]:
    """The questions of the comparison: the data's test split, and more comparisons where it is an almanac's."""
    questions = load_questions(Path(setup.data) / "test.jsonl")[: setup.questions or None]
    lacking = setup.comparisons - sum(group_of(q) == "look-up, comparison" for q in questions)
    if lacking > 0 and (Path(setup.data) / "almanac.json").exists():
        ids = {q.id for q in questions}
        others = [q for q in world_of(setup.data, "a comparison").questions["test"] if q.id not in ids]
        more = [q for q in others if group_of(q) == "look-up, comparison"]
        questions += random.Random(setup.seed).sample(more, min(lacking, len(more)))
    return questions


def run_method(method: str, setup: Setup, questions: Sequence[Question], engine, out: Path) -> dict[str, Any]:
    """Train a method if it trains, and ask it all questions, group by group, so that each group has its own time.

    Returns:
        the method's result: {"method", "setup", "training", "rows"}; a row a question with its "id", "group" and
        ``FIGURES``, "seconds" being the group's mean.
    """
    policy, spent = trained(method, setup, engine, out)
    how = {"reward": SearchR1Reward(setup.search_cost), "temperature": setup.temperature, "seed": setup.seed}
    rows = []
    for group, members in _grouped(questions, group_of).items():
        start = time.perf_counter()
        report = answer_with(method, policy, members, engine, **how, **setup.limits())
        seconds = (time.perf_counter() - start) / len(members)
        for row in report.rows:
            figures = {name: row[name] for name in FIGURES} | {"seconds": seconds}
            rows.append({"id": row["id"], "group": group} | figures)
    return {"method": method, "setup": vars(setup), "training": spent, "rows": rows}


def compare(
    methods: Sequence[str], setup: Setup, out: str | Path, *, report: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Results by method. Each is kept in ``out/METHOD.json`` and not made again for the same setup.

    Raises:
        ValueError: an unknown method, or ``out`` holds a result of another setup.
    """
    from ..search import BM25Search

    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"unknown method {', '.join(unknown)}: choose from {', '.join(METHODS)}")
    out = Path(out)
    results = {method: result for method, result in load(out).items() if method in methods}
    for method, result in results.items():
        if differ := [k for k, v in vars(setup).items() if result["setup"].get(k) != v]:
            raise ValueError(f"{out / method}.json was made with another {', '.join(differ)}: choose another folder")
    missing = [method for method in methods if method not in results]
    if missing:
        engine = BM25Search(load_passages(Path(setup.data) / "passages.jsonl"))
        questions = questions_of(setup)
    for method in missing:
        report(f"{method} ...")
        results[method] = run_method(method, setup, questions, engine, out)
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
        groups = _grouped(result["rows"], lambda row: row["group"]) | {"all": result["rows"]}
        for group, rows in groups.items():
            means = {name: fmean(row[name] for row in rows) for name in FIGURES}
            lines.append({"method": method, "group": group, "n": len(rows), **means})
    return lines


def _grouped(items: Iterable, key: Callable[[Any], str]) -> dict[str, list]:
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


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
    for name, value in vars(Setup()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default: {value}")


def run(args: argparse.Namespace) -> None:
    """Compare the methods, print the page and write it to ``baselines.md``."""
    results = compare(args.methods, Setup(**{name: vars(args)[name] for name in vars(Setup())}), args.out)
    write_whole(args.out / "baselines.md", text := page(results))
    print(text)
