"""Batched multi-turn rollouts: the model writes, the environment answers, until every episode is over.

All rollouts of a step go through one loop between a ``Decoder``, which knows tokens and no protocol, and an
``Environment`` for each episode, which knows the protocol and no tokens. Here the two meet: ids become the text of a
turn, what the environment writes becomes ids, and of every token is recorded once who wrote it and where its text
stands. Departures from the public Search-R1 code are listed in docs/differences.md.
"""

from __future__ import annotations

import codecs
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..environment.base import Done, Environment, Observation, step_all
from ..environment.limits import Amount, Count, Limits, Whole, check
from ..environment.search import SearchEnvironment, tools_of
from ..records import ENVIRONMENT, Question, Segment, Trajectory
from .decoder import Decoder, Written
from .policy import Policy


@dataclass
class _Episode:
    """One rollout in the making: ``t`` grows, and ``ids`` with it, the decoder's row of prompt and completion."""

    policy: Policy
    environment: Environment
    t: Trajectory
    ids: list[int]
    turn_start: int = 0  # the completion's token at which the turn begins that is being written
    ended: bool = False  # the model has ended its message
    writer: int = 0  # the place among the policy's authors of who writes on

    @property
    def readers(self) -> list[int]:
        """Who reads each of ``ids``, see ``Policy.hidden``."""
        return [*self.policy.readers_of(self.t), self.writer]

    @property
    def room(self) -> int:
        """How many tokens the turn may still have."""
        limits, length = self.environment.limits, len(self.t.mask)
        return min(limits.max_turn_tokens - (length - self.turn_start), limits.max_completion_length - length)

    @property
    def end(self) -> str | None:
        """Why the model cannot go on, see ``Environment.act``."""
        if len(self.t.mask) >= self.environment.limits.max_completion_length:
            return "length"
        return "stop" if self.ended else None

    @property
    def text(self) -> str:
        """What the model wrote in this turn."""
        return self.policy.decode(self.t.completion_ids[self.turn_start :])

    def write(self, written: Written) -> None:
        authors = [self.policy.authors[place] for place in written.authors or [0] * len(written.ids)]
        self._append(written.ids, 1, written.logprobs, written.entropy, authors)
        self.ended, self.writer = written.ended, written.writer

    def _append(self, ids: list[int], mask: int, logprobs: list[float], entropy: list[float], authors=()) -> None:
        self.ids += ids
        self.t.completion_ids += ids
        self.t.mask += [mask] * len(ids)
        self.t.logprobs += logprobs
        self.t.token_values["entropy"] += entropy
        self.t.tokens += map(self.policy.token_text, ids)
        if self.policy.authors != Policy.authors:
            self.t.authors += authors

    def _append_unsampled(self, ids: list[int], author: str) -> None:
        self._append(ids, 0, [0.0] * len(ids), [0.0] * len(ids), [author] * len(ids))

    def turn_is_over(self, text: str) -> bool:
        """False where only another episode's stop has interrupted the turn, of which this is the text."""
        return self.ended or self.room <= 0 or any(stop in text for stop in self.environment.stops)

    def take(self, outcome: Observation | Done, text: str) -> None:
        """Go on, or end, as the environment says of the ``text`` of the turn."""
        if isinstance(outcome, Observation) and outcome.decides is not None:
            self._force(outcome.text, outcome.decides)
            return
        self._close_turn(text)
        world, turn = self.environment, self.t.turns
        self.t.calls, self.t.turns, self.t.invalid_turns = world.calls, world.turn, world.invalid_turns
        self.ended, self.writer = False, 0
        if isinstance(outcome, Observation):
            # whatever escaping may have missed: no text from outside ever becomes a special token
            ids, start = self.policy.encode(outcome.text, split_special_tokens=True), len(self.t.mask)
            if start + len(ids) < self.environment.limits.max_completion_length:
                self._append_unsampled(ids, ENVIRONMENT)
                where = turn, start, len(self.t.mask)
                self.t.segments.append(Segment(ENVIRONMENT, outcome.kind, self.policy.decode(ids), *where))
                self._record_ends(start)
                self.turn_start = len(self.t.mask)
                return
            outcome = Done("length")
        self.t.answer, self.t.finish_reason = outcome.answer, outcome.reason

    def _force(self, text: str, decides: int) -> None:
        """Put text into the model's mouth; of its tokens the one that decides is remembered, to be trained."""
        ids, start = self.policy.encode(text), len(self.t.mask)
        self._append_unsampled(ids, self.policy.authors[0])
        roles = (role for tag, role in self.environment.roles.items() if text.endswith(tag))
        self.writer = self.policy.places.get(next(roles, ""), 0)
        ends = token_ends([self.policy.token_bytes[i] for i in ids])
        self.t.forced = start + next(i for i, end in enumerate(ends) if end > decides)

    def _record_ends(self, start: int) -> list[int]:
        """Where the tokens of the completion from ``start`` on end, in its text; returned in their own text."""
        before = self.t.ends[-1] if self.t.ends else 0
        ends = token_ends([self.policy.token_bytes[i] for i in self.t.completion_ids[start:]])
        self.t.ends += [before + end for end in ends]
        return ends

    def _close_turn(self, text: str) -> None:
        """Cut what the model wrote in this turn into segments."""
        ends = self._record_ends(self.turn_start)
        starts = [0, *ends]
        for kind, start, end in self.environment.parts(text):
            # the first bytes of a character that another token completes begin where it stands
            first = min(bisect_right(ends, start), bisect_left(starts, start))
            span = self.turn_start + first, self.turn_start + bisect_left(ends, end) + 1
            author = self.t.authors[span[1] - 1] if self.t.authors else self.policy.authors[0]
            self.t.segments.append(Segment(author, kind, text[start:end], self.t.turns, *span))


def token_ends(tokens: list[bytes]) -> list[int]:
    """Where each token ends in the text of all, in characters; a character belongs to the token that completes it."""
    decoder, ends, at = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
    for number, token in enumerate(tokens, 1):
        at += len(decoder.decode(token, final=number == len(tokens)))
        ends.append(at)
    return ends


def _switches(policy: Policy, environment: Environment) -> dict[bytes, int]:
    """Behind which tags another author writes, and its place; nothing where there is one author."""
    if len(policy.authors) == 1:
        return {}
    roles, first = environment.roles, policy.authors[0]
    elsewhere = {author for tool in environment.tools for author in tool.authors}
    if policy.sampler or (idle := set(policy.authors[1:]) - set(roles.values()) - elsewhere):
        why = "a server samples with one adapter" if policy.sampler else f"nothing to write for {', '.join(idle)}"
        names = ", ".join(sorted({*roles.values()} - {""}))
        raise ValueError(f"authors: {why}; {first!r} writes all but what the others are named after, of {names}")
    return {tag.encode(): policy.places.get(role, 0) for tag, role in roles.items()}


def turn_start(t: Trajectory, turn: int) -> int:
    """The completion token with which a turn begins."""
    return max((s.end for s in t.segments if s.turn < turn), default=0)


def _resumed(policy: Policy, environment: Environment, t: Trajectory, turn: int) -> _Episode:
    """The episode of a trajectory as it stood when a turn began.

    Nothing is sampled, asked of a tool or tokenised again: the environment is told the turns before, and what the
    tools answered then.
    """
    last = max(0, t.turns - (t.finish_reason is not None))
    if not 0 <= turn <= last:
        raise ValueError(f"turn is {turn}: the rollout of question {t.question.id!r} has turns 0 to {last}")
    environment.reset(t.question)
    calls = iter(t.calls)
    for k in range(turn):
        outcome = environment.act("".join(s.text for s in t.segments if s.turn == k and s.by_model))
        if isinstance(outcome, Done):
            raise ValueError(f"limits: with these the rollout of question {t.question.id!r} ends in turn {k}")
        if not isinstance(outcome, Observation):
            environment.calls.append(next(calls))
            environment.observe(environment.calls[-1])
    start = turn_start(t, turn)
    begun = Trajectory(t.question, t.prompt_ids, t.completion_ids[:start], t.mask[:start], t.logprobs[:start])
    begun.segments = [s for s in t.segments if s.turn < turn]
    begun.tokens, begun.ends, begun.authors = t.tokens[:start], t.ends[:start], t.authors[:start]
    begun.token_values = {"entropy": t.token_values["entropy"][:start]}
    begun.group, begun.prompt, begun.finish_reason, begun.shared = t.group, t.prompt, None, start
    begun.calls, begun.turns, begun.invalid_turns = environment.calls, environment.turn, environment.invalid_turns
    if turn:
        begun.first_action, begun.forced = t.first_action, t.forced
    return _Episode(policy, environment, begun, [*t.prompt_ids, *begun.completion_ids], start)


def rollout(
    policy: Policy,
    questions: Sequence[Question],
    engine,
    *,
    num_generations: int = 8,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    first_action: str | Sequence[str | None] | None = None,
    trees: int = 0,
    on_turn: Callable[[list[Trajectory]], None] | None = None,
    environment: Callable[..., Environment] = SearchEnvironment,
    **limits,
) -> list[Trajectory]:
    """Sample ``num_generations`` rollouts for each question.

    Args:
        policy: what writes.
        questions: what is asked.
        engine: anything with ``search_batch(queries, k)`` or ``search(query)``; may return hits,
            passages or plain text. Or a list of an engine and further ``Tool``s. One that fails or finds
            nothing never stops the step: the observation says so and ``ToolCall.error`` keeps the reason.
        temperature, generator: see ``Decoder``.
        batch_size: at most this many rollouts at a time (None: all; halved by itself when memory runs out).
        first_action: "search" or "answer": once the model has thought, this tag is put into its mouth
            (mask 0); or one value (or None) for each rollout of a group.
        trees: of a question only so many rollouts begin at the prompt. Each of the others branches off one of them and
            takes over the tokens before that, their cache included: fewer tokens for the same number of rollouts
            (Tree-GRPO, arXiv 2509.21240, with one round of expansion). It branches where a turn begins, the first to
            the last possible one with the same chance, or the last one where the rollout had fewer: drawn beforehand,
            so that a branch grows beside its trunk instead of after it. 0: every rollout begins at the prompt.
        on_turn: is shown the rollouts of the batch after each turn, as far as they have come (those that go on
            have no ``finish_reason`` yet). To look at, not to keep: they grow.
        environment: makes the environment of an episode; takes the arguments of ``Environment`` by name.
        **limits: see ``Limits``: max_turns, max_turn_tokens, max_observation_tokens,
            max_completion_length, topk, search_timeout.

    Returns:
        trajectories, those of one question next to each other, in the order of ``questions``.

    Raises:
        ValueError: a parameter that cannot be.
    """
    counts = {"num_generations": (num_generations, Count), "batch_size": (batch_size, Count | None)}
    check(**counts, temperature=(temperature, Amount), trees=(trees, Whole))
    tools, bounds = tools_of(engine), Limits(**limits)
    firsts = [first_action] * num_generations if first_action is None or isinstance(first_action, str) else first_action
    acts = {None, "answer", *(tool.name for tool in tools)}
    if len(firsts) != num_generations or not set(firsts) <= acts:
        known = f"{', '.join(sorted(map(repr, acts)))}, or {num_generations} of these (one a rollout of a group)"
        raise ValueError(f"first_action must be {known}, got {first_action!r}")
    if trees and (num_generations % trees or any(firsts)):
        raise ValueError(f"trees={trees} must divide num_generations={num_generations}, and goes with no first_action")
    of_tree = num_generations // trees if trees else 1
    world = partial(environment, tools=tools, limits=bounds, measure=policy.measure, prompt=policy.prompt)

    def begin(number: int) -> _Episode:
        """The episode of the rollout of this number, over all groups."""
        place, member = divmod(number, num_generations)
        question, here = questions[place], world(first_action=firsts[member])
        prompt = policy.chat(here.reset(question))
        t = Trajectory(question, policy.encode(prompt), [], [], [], finish_reason=None)
        t.group, t.prompt, t.first_action = f"{place}:{question.id}", prompt, here.first_action
        t.tree = member // of_tree if trees else None
        t.token_values["entropy"] = []
        return _Episode(policy, here, t, list(t.prompt_ids))

    def branch(trunk: Trajectory, turn: int) -> _Episode:
        episode = _resumed(policy, world(), trunk, turn)
        episode.t.tree = trunk.tree
        return episode

    def play(part: range) -> list[Trajectory]:
        trunks = [begin(i) for i in part[::of_tree]]
        size = len(trunks), of_tree - 1
        where = generator.device if generator else None  # what a server samples for has no weights, and no device
        plans = torch.randint(bounds.max_turns + 1, size, generator=generator, device=where)
        return _play(
            trunks, (policy.sampler or Decoder)(policy, temperature, generator), on_turn, branch, plans.tolist()
        )

    return _in_parts(play, len(questions) * num_generations, batch_size, of_tree)


def continuations(
    policy: Policy,
    decisions: Sequence[tuple[Trajectory, int]],
    engine,
    *,
    num_generations: int = 16,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    environment: Callable[..., Environment] = SearchEnvironment,
    **limits,
) -> list[Trajectory]:
    """Sample ``num_generations`` ways in which recorded rollouts could have gone on from a decision.

    Args:
        decisions: (trajectory, turn): from the beginning of this turn on, counted from 0, all is sampled anew.
        **limits: those of the recorded rollouts; for the other arguments see ``rollout``.

    Returns:
        whole trajectories, what stood before the turn included; those of a decision next to each other and in one
        ``group``, in the order of ``decisions``.

    Raises:
        ValueError: a parameter that cannot be, a turn that the rollout does not have, or limits under which it would
            have ended before it.
    """
    check(num_generations=(num_generations, Count), batch_size=(batch_size, Count | None))
    check(temperature=(temperature, Amount))
    world = partial(environment, tools=tools_of(engine), limits=Limits(**limits), measure=policy.measure)

    def begin(number: int) -> _Episode:
        place = number // num_generations
        episode = _resumed(policy, world(prompt=policy.prompt), *decisions[place])
        episode.t.group = f"{place}:{episode.t.group}"
        return episode

    def play(part: range) -> list[Trajectory]:
        return _play([begin(i) for i in part], (policy.sampler or Decoder)(policy, temperature, generator))

    return _in_parts(play, len(decisions) * num_generations, batch_size)


def _in_parts(
    play: Callable[[range], list[Trajectory]], total: int, batch_size: int | None, least: int = 1
) -> list[Trajectory]:
    """``play`` all numbers, ``batch_size`` at a time, or fewer where memory runs out; ``least`` belong together."""
    trajectories: list[Trajectory] = []
    size = batch_size or max(1, total)
    while len(trajectories) < total:
        size = max(least, size // least * least)
        part = range(len(trajectories), min(len(trajectories) + size, total))
        try:
            trajectories += play(part)
        except torch.OutOfMemoryError:
            if len(part) == least:
                raise
            size = len(part) // 2
            torch.cuda.empty_cache()
    return trajectories


def _play(
    episodes: Sequence[_Episode],
    decoder: Decoder,
    on_turn: Callable | None = None,
    branch: Callable[[Trajectory, int], _Episode] | None = None,
    plans: Sequence[list[int]] = (),
) -> list[Trajectory]:
    """Play a batch of episodes to their ends; ``plans`` are the turns at which others ``branch`` off each of them, and
    stand behind it.
    """
    started = time.perf_counter()
    switches = _switches(episodes[0].policy, episodes[0].environment)
    families = [[e] for e in episodes]
    with decoder:
        branches = lambda: [e for family, plan in zip(families, plans) for e in _grown(family, plan, branch, decoder)]
        going = [*episodes, *branches()]
        while going:
            stops = sorted({stop for e in going for stop in e.environment.stops})
            told = ([e.readers for e in going], switches) if switches else ()
            written = decoder.write([e.ids for e in going], [s.encode() for s in stops], [e.room for e in going], *told)
            for e, w in zip(going, written):
                e.write(w)
            over = [(e, text) for e in going if e.turn_is_over(text := e.text)]
            outcomes = step_all([e.environment for e, _ in over], [text for _, text in over], [e.end for e, _ in over])
            for (e, text), outcome in zip(over, outcomes):
                e.take(outcome, text)
            going = [e for e in going if e.t.finish_reason is None] + branches()
            if on_turn:
                on_turn([e.t for family in families for e in family])
    for e in (every := [e for family in families for e in family]):
        e.t.seconds = time.perf_counter() - started
    return [e.t for e in every]


def _grown(family: list[_Episode], plan: list[int], branch: Callable, decoder: Decoder) -> list[_Episode]:
    """The episodes that branch off the first of a family now, by its ``plan``; they join the family."""
    trunk = family[0].t
    is_over = trunk.finish_reason is not None
    due = [turn for turn in plan if is_over or turn == trunk.turns]
    plan[:] = [turn for turn in plan if turn not in due]
    new = [branch(trunk, trunk.turns - is_over) for _ in due]
    for e in new:
        decoder.fork(e.ids, family[0].ids)
    family += new
    return new
