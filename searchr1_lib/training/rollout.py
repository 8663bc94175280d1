"""Batched multi-turn sampling: the model writes, searches, reads, and writes on, until it answers.

All rollouts of a step go through one loop. A prompt is encoded once and its key-value cache expanded to
the group; the cache lives on across turns, and an observation is fed to it as one chunk, so nothing is
ever encoded twice. In the cache a token stands at its position, whatever the other rows hold. Turns are
in step with one another: a rollout that ends its turn early waits, until the pending searches of all go to
the engine in one batch; when half of them wait, the model goes on with the others alone.

Token in, token out: the sampled ids are the trained ids. Stop strings are looked for in the bytes of the
tokens, and a token in which one ends stays whole. Departures from the public Search-R1 code are listed
in the README.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as SearchTimeout
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from ..environment import protocol
from ..records import Hit, Passage, Question, SearchCall, Segment, Trajectory
from .grpo import head_logits
from .policy import Policy
from .settings import Limits

#: A stop string lies in at most this many tokens: one a byte, and the tokens that straddle its ends.
_STOP_TOKENS = 12
#: Tokens of one forward pass over prompts or observations: more gain nothing, and need memory.
_CHUNK_TOKENS = 4096


@dataclass
class _Episode:
    """One rollout in the making. ``turn_*`` belong to the turn that is being written."""

    question: Question
    group: str
    prompt: str
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    searches: list[SearchCall] = field(default_factory=list)
    answer: str | None = None
    finish_reason: str | None = None
    turn: int = 0
    turn_start: int = 0
    invalid_turns: int = 0
    ended_by_eos: bool = False
    first_action: str | None = None

    def add(self, ids: list[int], *, sampled: bool, logprobs=None, entropy=None) -> None:
        self.ids += ids
        self.mask += [int(sampled)] * len(ids)
        self.logprobs += logprobs if sampled else [0.0] * len(ids)
        self.entropy += entropy if sampled else [0.0] * len(ids)


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
    on_turn: Callable[[list[Trajectory]], None] | None = None,
    **limits,
) -> list[Trajectory]:
    """Sample ``num_generations`` rollouts for each question.

    Args:
        policy: what writes.
        questions: what is asked.
        engine: anything with ``search_batch(queries, k)`` or ``search(query)``; may return hits,
            passages or plain text. An engine that fails or finds nothing never stops the step: the
            observation says so and ``SearchCall.error`` keeps the reason.
        temperature: logits are divided by it, nothing is cut off (top-p 1, top-k off), so the recorded
            log-probabilities are those of the sampling distribution. 0 takes the most likely token and
            records log-probabilities at temperature 1.
        generator: the source of randomness (None: torch's own).
        batch_size: at most this many rollouts at a time (None: all; halved by itself when memory runs out).
        first_action: "search" or "answer": once the model has thought, this tag is put into its mouth
            (mask 0); or one value (or None) for each rollout of a group.
        on_turn: is shown the rollouts of the batch after each turn, as far as they have come (those that go on
            have no ``finish_reason`` yet). To look at, not to keep: they grow.
        **limits: see ``Limits``: max_turns, max_turn_tokens, max_observation_tokens,
            max_completion_length, topk, search_timeout.

    Returns:
        trajectories, those of one question next to each other, in the order of ``questions``.

    Raises:
        ValueError: a parameter that cannot be.
    """
    limits = Limits(**limits)
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if first_action is None or isinstance(first_action, str):
        first_action = [first_action] * num_generations
    if len(first_action) != num_generations or not set(first_action) <= {None, "search", "answer"}:
        raise ValueError(
            f"first_action must be 'search', 'answer' or None, or {num_generations} of these (one a "
            f"rollout of a group), got {first_action!r}"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    episodes = []
    for number, question in enumerate(questions):
        prompt = policy.prompt_text(question.text)
        ids = policy.encode(prompt)
        episodes += [
            _Episode(question, f"{number}:{question.id}", prompt, ids, first_action=first) for first in first_action
        ]
    sampler = _Sampler(policy, engine, limits, temperature, generator, on_turn)
    trajectories: list[Trajectory] = []
    size = batch_size or max(1, len(episodes))
    while len(trajectories) < len(episodes):
        part = episodes[len(trajectories) : len(trajectories) + size]
        try:
            trajectories += sampler.run(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            size = max(1, len(part) // 2)
            torch.cuda.empty_cache()
            for i, e in enumerate(part):  # begin again with empty episodes
                episodes[len(trajectories) + i] = _Episode(
                    e.question, e.group, e.prompt, e.prompt_ids, first_action=e.first_action
                )
    return trajectories


class _Sampler:
    """The loop of ``rollout`` over one batch. A = episodes still going, L = places in the cache.

    While a turn is written, the cache holds the rows of ``active`` that ``self.rows`` names.
    """

    def __init__(self, policy, engine, limits, temperature, generator, on_turn=None):
        self.policy, self.engine, self.limits, self.on_turn = policy, engine, limits, on_turn
        self.temperature, self.generator = temperature, generator
        self.closers = torch.tensor([b">" in b for b in policy.token_bytes], device=policy.device)
        for i in policy.stop_ids:
            self.closers[i] = True

    @torch.no_grad()
    def run(self, episodes: list[_Episode]) -> list[Trajectory]:
        started = time.perf_counter()
        checkpointed = [m for m in self.policy.model.modules() if getattr(m, "gradient_checkpointing", False)]
        try:
            for module in checkpointed:  # it would switch the cache off
                module.gradient_checkpointing = False
            with self.policy.unpacked():
                self._run(episodes)
        finally:
            self.cache = None  # its memory is needed elsewhere
            for module in checkpointed:
                module.gradient_checkpointing = True
        seconds = time.perf_counter() - started
        return [self._trajectory(e, seconds) for e in episodes]

    def _run(self, episodes: list[_Episode]) -> None:
        logits = self._prefill(episodes)
        active, forcing = list(episodes), any(e.first_action for e in episodes)
        while active:
            stops = ("</think>",) + protocol.STOPS if forcing else protocol.STOPS
            self._write_turn(active, logits, stops)
            replies = self._force(active) if forcing else self._act(active)
            forcing = False
            keep = [i for i, e in enumerate(active) if e.finish_reason is None]
            if len(keep) < len(active):
                self.cache = self.cache.take(keep)
                active, replies = [active[i] for i in keep], [replies[i] for i in keep]
            if active:
                logits = self._feed_replies(active, replies)
            if self.on_turn:
                self.on_turn([self._trajectory(e, 0.0) for e in episodes])

    # -- the model side ------------------------------------------------------------------------------

    def _forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Feed ``ids`` (A, N) behind the rows' ends; of each row the first ``lengths`` (A,) are tokens.

        Returns the logits (A, V) after each row's last token; of no use where there is none.
        """
        width = ids.shape[1]
        self.longest += width
        self.cache.reserve(self.longest)
        ahead = self.position.unsqueeze(1) + torch.arange(width, device=ids.device)
        last = []
        for rows in torch.arange(len(ids), device=ids.device).split(max(1, _CHUNK_TOKENS // width)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            self.cache.write_at(part, ahead[part])
            hidden = self.policy.decoder(
                input_ids=ids[part],
                attention_mask=self._masks(ahead[part]),
                position_ids=ahead[part],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
            last.append(hidden[rows - part.start, (lengths[part] - 1).clamp(min=0)])
        self.position = self.position + lengths
        head = self.policy.lm_head
        return head_logits(torch.cat(last), head.weight, head.bias)

    def _masks(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the tokens at ``positions`` (A, N) may look at: all places up to their own, (A, 1, N, L), added."""
        places = torch.arange(self.longest, device=positions.device)
        hidden = places > positions[:, None, :, None]
        blank = torch.zeros(hidden.shape, dtype=self.policy.lm_head.weight.dtype, device=positions.device)
        low = torch.finfo(blank.dtype).min
        if "sliding_attention" not in (getattr(self.policy.config, "layer_types", None) or ()):
            return blank.masked_fill_(hidden, low)
        passed = places <= positions[:, None, :, None] - self.policy.config.sliding_window
        return {
            "full_attention": blank.masked_fill(hidden, low),
            "sliding_attention": blank.masked_fill(hidden | passed, low),
        }

    def _prefill(self, episodes: list[_Episode]) -> torch.Tensor:
        """Encode each distinct prompt once, and expand the cache to its group."""
        distinct = {e.group: e.prompt_ids for e in episodes}
        ids, lengths = self._padded(list(distinct.values()))
        self.cache, self.position, self.longest = RowCache(len(distinct)), torch.zeros_like(lengths), 0
        logits = self._forward(ids, lengths)
        row = {group: i for i, group in enumerate(distinct)}
        rows = [row[e.group] for e in episodes]
        self.cache = self.cache.take(rows)
        self._take_stock(episodes)
        return logits[rows]

    def _take_stock(self, active: list[_Episode], missing: int = 0) -> None:
        """How far each row of the cache is filled: all but the last ``missing`` tokens are in it."""
        ends = [len(e.prompt_ids) + len(e.ids) - missing for e in active]
        self.position, self.longest = torch.tensor(ends, device=self.policy.device), max(ends)

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of token ids as a tensor (A, N), filled up on the right, and their lengths (A,)."""
        lengths = [len(r) for r in rows]
        ids = [r + [self.policy.pad_id] * (max(lengths) - len(r)) for r in rows]
        return torch.tensor(ids, device=self.policy.device), torch.tensor(lengths, device=self.policy.device)

    def _feed_replies(self, active: list[_Episode], replies: list[list[int]]) -> torch.Tensor:
        """Feed each episode's last sampled token (not in the cache yet) and what the environment wrote."""
        chunks = [e.ids[-1:] + reply for e, reply in zip(active, replies)]
        self._take_stock(active, missing=1)
        logits = self._forward(*self._padded(chunks))
        for e, reply in zip(active, replies):
            e.add(reply, sampled=False)
        self._take_stock(active)
        return logits

    def _sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token (A,), its log-probability (A,) and the entropy (A,) of the sampling distribution."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)
        probs = logprobs.exp()
        token = logits.argmax(-1) if self.temperature == 0 else draw(probs, self.generator)
        entropy = -(probs * logprobs.clamp(min=-1e4)).sum(-1)
        return token, logprobs.gather(1, token.unsqueeze(1)).squeeze(1), entropy

    def _write_turn(self, active: list[_Episode], logits: torch.Tensor, stops: tuple[str, ...]) -> None:
        """Sample until every episode has ended its turn. The last token of each stays out of the cache."""
        stops = [s.encode() for s in stops]
        room = [max(1, self._room(e)) for e in active]
        closed_at = [0] * len(active)  # tokens sampled in this turn, once the episode has closed it
        whole, self.rows = self.cache, list(range(len(active)))
        still = set(self.rows)
        columns: list[list[torch.Tensor]] = [[], [], []]
        for count in range(1, max(room) + 1):
            drawn = self._sample(logits)
            rows = torch.tensor(self.rows, device=logits.device)
            for column, values in zip(columns, drawn):
                column.append(values.new_zeros(len(active)).index_copy(0, rows, values))
            token = drawn[0]
            ended = {i for i in still if count >= room[i]}
            for i in rows[self.closers[token]].tolist():
                ids = torch.stack([t[i] for t in columns[0][-_STOP_TOKENS:]]).tolist() if i in still else []
                if ids and ids[-1] in self.policy.stop_ids:
                    active[i].ended_by_eos = True
                    ended.add(i)
                elif ids and self._has_stop(ids, stops):
                    ended.add(i)
            for i in ended:
                closed_at[i] = count
            still -= ended
            if not still:
                break
            if 2 * len(still) <= len(self.rows):
                token = token[self._narrow(whole, sorted(still))]
            is_open = torch.tensor([i in still for i in self.rows], device=logits.device)
            logits = self._forward(token.unsqueeze(1), is_open.long())
        if self.cache is not whole:
            whole.put(self.rows, self.cache)
            self.cache = whole
        written = [torch.stack(column, 1).tolist() for column in columns]
        for i, e in enumerate(active):
            ids, logprobs, entropy = (values[i][: closed_at[i]] for values in written)
            e.add(ids, sampled=True, logprobs=logprobs, entropy=entropy)

    def _room(self, e: _Episode) -> int:
        """How many tokens the turn may still have."""
        written = len(e.ids) - e.turn_start
        return min(self.limits.max_turn_tokens - written, self.limits.max_completion_length - len(e.ids))

    def _narrow(self, whole: RowCache, rows: list[int]) -> list[int]:
        """Go on with some rows of ``active`` only; returns where they stood among ``self.rows``."""
        kept = [self.rows.index(i) for i in rows]
        if self.cache is not whole:
            whole.put(self.rows, self.cache)
        self.cache, self.rows, self.position = whole.take(rows), rows, self.position[kept]
        return kept

    def _has_stop(self, ids: list[int], stops: list[bytes]) -> bool:
        """Whether a stop string ends in the last token of ``ids`` (it may have begun tokens before)."""
        tail = self.policy.bytes_of(ids)
        new = len(self.policy.token_bytes[ids[-1]])
        return any(tail.find(s, max(0, len(tail) - new - len(s) + 1)) >= 0 for s in stops)

    # -- the environment side ------------------------------------------------------------------------

    def _force(self, active: list[_Episode]) -> list[list[int]]:
        """Put the opening tag of their ``first_action`` behind the thoughts of some; the turn of all goes on.

        It ends here for those that have acted already or have used up their turn.
        """
        replies: list[list[int]] = [[] for _ in active]
        acted = []
        for i, e in enumerate(active):
            text = self.policy.bytes_of(e.ids)
            done = e.ended_by_eos or any(s.encode() in text for s in protocol.STOPS)
            if done and e.first_action:  # it acted without thinking: nothing to force, end it here
                e.ended_by_eos, e.finish_reason = False, "stop"
                self._close_turn(e)
            elif e.first_action:
                newline = "" if text.endswith(b"\n") else "\n"
                replies[i] = self.policy.encode(f"{newline}<{e.first_action}>")
            elif done or self._room(e) <= 0:
                acted.append(i)
        for i, reply in zip(acted, self._act([active[i] for i in acted])):
            replies[i] = reply
        return replies

    def _act(self, active: list[_Episode]) -> list[list[int]]:
        """Carry out each episode's action: finish it, or return what the environment writes (token ids)."""
        replies: list[list[int]] = [[] for _ in active]
        pending: list[tuple[int, str]] = []
        for i, e in enumerate(active):
            text = self._close_turn(e)
            action = protocol.read_action(text)
            last_turn = e.turn >= self.limits.max_turns
            if action.kind == "answer":
                e.answer, e.finish_reason = _utf8(action.text), "answer"
            elif len(e.ids) >= self.limits.max_completion_length:
                e.finish_reason = "length"
            elif action.kind == "search" and not last_turn:
                pending.append((i, _utf8(action.text)))
            else:
                e.invalid_turns += action.kind is None
                if e.ended_by_eos and action.kind is None:
                    e.finish_reason = "stop"
                elif last_turn:
                    e.finish_reason = "turns"
                else:
                    replies[i] = self._reply(e, "invalid", protocol.INVALID_ACTION)
            e.ended_by_eos = False
        for (i, query), (call, text) in zip(pending, self._search([q for _, q in pending])):
            active[i].searches.append(call)
            replies[i] = self._reply(active[i], "information", text)
        for e in active:
            e.turn += 1
        return replies

    def _reply(self, e: _Episode, kind: str, text: str) -> list[int]:
        """Token ids of an environment message, or none and ``finish_reason`` "length" if it does not fit."""
        ids = self.policy.encode(text)
        if len(e.ids) + len(ids) >= self.limits.max_completion_length:
            e.finish_reason = "length"
            return []
        e.segments.append(Segment(kind, text, e.turn, len(e.ids), len(e.ids) + len(ids)))
        e.turn_start = len(e.ids) + len(ids)
        return ids

    def _close_turn(self, e: _Episode) -> str:
        """Cut what the model wrote in this turn into segments; returns it, one character a byte."""
        ids = e.ids[e.turn_start :]
        ends, size = [], 0
        for i in ids:
            size += len(self.policy.token_bytes[i])
            ends.append(size)
        text = self.policy.bytes_of(ids).decode("latin-1")
        for kind, start, end in protocol.split_turn(text):
            kind = "text" if kind == "information" else kind  # the model's own words, whatever they imitate
            first = next(k for k, stop in enumerate(ends) if stop > start)
            last = next(k for k, stop in enumerate(ends) if stop >= end)
            e.segments.append(
                Segment(kind, _utf8(text[start:end]), e.turn, e.turn_start + first, e.turn_start + last + 1)
            )
        return text

    def _search(self, queries: list[str]) -> list[tuple[SearchCall, str]]:
        """Ask the engine for all queries at once; returns each call and the observation's text."""
        if not queries:
            return []
        started = time.perf_counter()
        answers = ask_engine(self.engine, queries, self.limits.topk, self.limits.search_timeout)
        seconds = (time.perf_counter() - started) / len(queries)
        made = []
        for query, (hits, error) in zip(queries, answers):
            note = f"The search failed: {error}" if error else "Nothing was found."
            text = fit_observation(self.policy, hits, self.limits.max_observation_tokens, note)
            made.append((SearchCall(query, hits, seconds, error), text))
        return made

    def _trajectory(self, e: _Episode, seconds: float) -> Trajectory:
        special = {i: self.policy.tokenizer.convert_ids_to_tokens(i) for i in self.policy.stop_ids}
        tokens = [special.get(i) or self.policy.token_bytes[i].decode("utf-8", "replace") for i in e.ids]
        return Trajectory(
            question=e.question,
            prompt_ids=list(e.prompt_ids),
            completion_ids=e.ids,
            mask=e.mask,
            logprobs=e.logprobs,
            segments=e.segments,
            searches=e.searches,
            answer=e.answer,
            finish_reason=e.finish_reason,
            group=e.group,
            prompt=e.prompt,
            tokens=tokens,
            turns=e.turn,
            invalid_turns=e.invalid_turns,
            first_action=e.first_action,
            seconds=seconds,
            token_values={"entropy": e.entropy},
        )


class RowCache(DynamicCache):
    """A key-value cache of R rows, each with a length of its own: a token stands at the place of its position.

    Before a forward pass ``write_at`` says where its tokens go. What padding writes stands behind its row's
    end, where no token looks (see ``_Sampler._masks``), until the next token takes its place. There is room
    to grow, so a token costs no copy of what is held; transformers' own cache copies all for every token.

    Attributes:
        rooms: keys and values of each layer, (2, R, places, heads, size of a head).
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.rooms, self.length, self.places = rows, [], 0, 0

    def reserve(self, length: int) -> None:
        """Make room for rows of this length; the next forward pass looks at so many places."""
        self.length = length
        if length > self.places:
            self.places = length * 3 // 2 + 16
            self.rooms = [_enlarged(room, self.places) for room in self.rooms]

    def write_at(self, rows: slice, positions: torch.Tensor) -> None:
        """The next forward pass is over these rows, its tokens go to ``positions`` (rows, N)."""
        first = torch.arange(rows.start, rows.stop, device=positions.device).unsqueeze(1) * self.places
        self.now, self.index = rows, (first + positions).flatten()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write keys and values (rows, heads, N, size) of a layer; returns all that the rows hold."""
        if layer_idx == len(self.rooms):
            _, heads, _, size = key_states.shape
            self.rooms.append(key_states.new_zeros(2, self.rows, self.places, heads, size))
        room = self.rooms[layer_idx]
        for part, states in zip(room, (key_states, value_states)):
            part.flatten(0, 1).index_copy_(0, self.index, states.transpose(1, 2).flatten(0, 1))
        keys, values = room[:, self.now, : self.length].transpose(2, 3)
        return keys, values

    def take(self, rows: list[int]) -> RowCache:
        """A copy of some rows, in this order; a row may come more than once."""
        made = RowCache(len(rows))
        made.length, made.places = self.length, self.places
        made.rooms = [room[:, rows] for room in self.rooms]
        return made

    def put(self, rows: list[int], other: RowCache) -> None:
        """Write the rows of ``other`` over these rows."""
        self.reserve(other.length)
        for room, new in zip(self.rooms, other.rooms):
            room[:, rows, : other.length] = new[:, :, : other.length]


def _enlarged(room: torch.Tensor, places: int) -> torch.Tensor:
    made = room.new_zeros(*room.shape[:2], places, *room.shape[3:])
    made[:, :, : room.shape[2]] = room
    return made


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token a row from probabilities (A, V), by inverting the distribution function.

    A uniform number a row instead of ``multinomial``'s one a token: many times faster on a CPU. Summed in
    double precision, so that a large vocabulary loses nothing; a token of probability 0 is never drawn.
    """
    summed = probs.double().cumsum(-1)
    uniform = torch.rand(len(probs), 1, dtype=torch.double, device=probs.device, generator=generator)
    return torch.searchsorted(summed, uniform * summed[:, -1:], right=True).clamp(max=probs.shape[1] - 1).squeeze(1)


def ask_engine(engine, queries: list[str], k: int, timeout: float | None) -> list[tuple[list[Hit], str | None]]:
    """Hits and error for each query. A batch that fails is tried query by query, so one cannot spoil all."""
    if hasattr(engine, "search_batch"):
        try:
            found = _in_time(lambda: engine.search_batch(queries, k=k), timeout)
            if len(found) != len(queries):
                raise ValueError(f"the engine gave {len(found)} results for {len(queries)} queries")
            return [(_as_hits(f, k), None) for f in found]
        except Exception as e:
            if len(queries) == 1 or isinstance(e, SearchTimeout):
                return [([], _why(e))] * len(queries)
        return [ask_engine(engine, [q], k, timeout)[0] for q in queries]
    answers = []
    for query in queries:
        try:
            answers.append((_as_hits(_in_time(lambda: engine.search(query), timeout), k), None))
        except Exception as e:
            answers.append(([], _why(e)))
    return answers


def _in_time(call, timeout: float | None):
    """The result of ``call``; raises ``SearchTimeout`` after ``timeout`` seconds (the call is abandoned)."""
    if timeout is None:
        return call()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
    try:
        return pool.submit(call).result(timeout)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _why(error: Exception) -> str:
    if isinstance(error, SearchTimeout):
        return "the engine did not answer in time"
    return f"{type(error).__name__}: {str(error)[:200]}"


def _as_hits(found, k: int) -> list[Hit]:
    """What an engine may return, as hits: hits, passages, plain text, or a list of these."""
    if isinstance(found, str):
        found = [found] if found.strip() else []
    hits = []
    for rank, f in enumerate(list(found)[:k]):
        if isinstance(f, Hit):
            hits.append(f)
        elif isinstance(f, Passage):
            hits.append(Hit(f, float(-rank)))
        elif isinstance(f, str):
            hits.append(Hit(Passage("", "", f), float(-rank)))
        else:
            raise TypeError(f"the engine returned {type(f).__name__}; expected Hit, Passage or str")
    return hits


def fit_observation(policy: Policy, hits: Sequence[Hit], budget: int, note: str = "") -> str:
    """The observation of ``hits`` in at most ``budget`` tokens: the longest documents are cut, tags never.

    Documents that do not fit at all are left out from the end.
    """
    documents = [protocol.format_document(i, h.passage.title, h.passage.text) for i, h in enumerate(hits, 1)]
    whole = protocol.format_observation(documents) if documents else protocol.observation([], note=note)
    over = len(policy.encode(whole)) - budget
    if over <= 0 or not documents:
        return whole
    encoded = [policy.encode(d) for d in documents]
    cap = max(map(len, encoded))
    while cap > 0:
        cap = min(cap - 1, int(cap * 0.95))
        cut = [
            d if len(ids) <= cap else policy.decode(ids[:cap]).rstrip("\ufffd") + " …"
            for d, ids in zip(documents, encoded)
        ]
        if cap < 12:  # too little for a title: rather fewer documents
            return fit_observation(policy, hits[:-1], budget, note or "No document fits.")
        if len(policy.encode(text := protocol.format_observation(cut))) <= budget:
            return text
    return whole


def _utf8(text: str) -> str:
    """Undo one character a byte."""
    return text.encode("latin-1").decode("utf-8", "replace")
