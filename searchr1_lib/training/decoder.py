"""Sampling with a key-value cache that lives across turns: tokens in, tokens out, and no idea of what they say.

A row is encoded once. Rows with the same beginning share the encoding of it; what is put behind a row later (an
observation) is fed to the cache as one chunk. In the cache a token stands at its position, whatever the other rows
hold. Rows are in step with one another: one that is done early waits for the others; when half of them wait, the
model goes on with the rest alone.

Token in, token out: the sampled ids are the trained ids. Stop strings are looked for in the bytes of the tokens, and a
token in which one ends stays whole, because to cut it and encode it again would train on ids that nobody sampled.

Another decoder (a server) can stand in its place: a context manager with ``write`` and ``fork``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from .logits import head_logits, padded
from .policy import Policy

#: A stop string lies in at most this many tokens: one a byte, and the tokens that straddle its ends.
_STOP_TOKENS = 12
#: Tokens of one forward pass over prompts or observations: more gain nothing, and need memory.
_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class Written:
    """What was sampled for a row: ``ids``, ``logprobs`` and ``entropy`` (nats) of equal length.

    ``ended``: the last id ends the model's message. ``authors``: the place among the policy's of who wrote each id, and
    ``writer`` of who goes on; a decoder that is told of no ``switches`` leaves them as they are.
    """

    ids: list[int]
    logprobs: list[float]
    entropy: list[float]
    ended: bool
    authors: Sequence[int] = ()
    writer: int = 0


class Decoder:
    """Writes behind rows of token ids with a transformers model. Use it in a ``with``: its cache takes much memory.

    Args:
        policy: what writes.
        temperature: logits are divided by it, nothing is cut off (top-p 1, top-k off), so the recorded
            log-probabilities are those of the sampling distribution. 0 takes the most likely token and records those
            at temperature 1.
        generator: the source of randomness (None: torch's own).
    """

    def __init__(self, policy: Policy, temperature: float = 1.0, generator: torch.Generator | None = None):
        self.policy, self.temperature, self.generator = policy, temperature, generator
        closers = [b">" in b or i in policy.stop_ids for i, b in enumerate(policy.token_bytes)]
        self.closers = torch.tensor(closers, device=policy.device)

    def __enter__(self) -> Decoder:
        self.cache: RowCache | None = None
        self.held: list[list[int]] = []  # the rows in the cache, in its order
        self.filled: list[int] = []  # how many tokens of each are in it
        self.parents: dict[int, list[int]] = {}  # id of a row that is yet to be held -> the row that it branches off
        self._sampling = self.policy.sampling()
        self._sampling.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.cache, self.held = None, []
        self._sampling.__exit__(*error)

    @torch.no_grad()
    def write(
        self,
        rows: Sequence[list[int]],
        stops: Sequence[bytes],
        room: Sequence[int],
        readers: Sequence[list[int]] = (),
        switches: Mapping[bytes, int] = MappingProxyType({}),
    ) -> list[Written]:
        """Sample behind each row until a stop string, the end of the message, or ``room[i]`` tokens.

        Args:
            rows: the ids so far, prompt included. Rows are known by identity: in a later call some may be missing, and
                each that is there holds its earlier ids, what was written, and maybe more. New ones: see ``fork``.
            readers: who reads each token of each row, see ``Policy.hidden``; of its last one, who writes on. Not given:
                the first author.
            switches: strings after which, from the token on that follows the one in which it ends, the author of this
                place writes; also where it began before these ids.
        """
        readers = readers or [[0] * len(row) for row in rows]
        logits = self._read(rows, readers) if self.cache is not None else self._prefill(rows, readers)
        self.switches, self.writers = switches, [by[-1] for by in readers]
        written = self._write(logits, rows, stops, [max(1, n) for n in room])
        self.filled = [len(row) + len(w.ids) - 1 for row, w in zip(rows, written)]  # the last one is never fed here
        self.parents = {}
        return written

    def fork(self, row: list[int], parent: list[int]) -> None:
        """Let ``row`` be in the next ``write``, with the cache of ``parent``, which was in the last one and begins with
        the same ids. What both of them add is encoded once.
        """
        self.parents[id(row)] = parent

    def _prefill(self, rows: Sequence[list[int]], readers: Sequence[list[int]]) -> torch.Tensor:
        """Encode each distinct row once, and expand the cache; the logits (A, V) behind each."""
        places: dict[tuple[tuple[int, int], ...], int] = {}
        chosen = [places.setdefault((*zip(row, by),), len(places)) for row, by in zip(rows, readers)]
        ids, lengths, by = self._padded(list(places))
        self.cache, self.position, self.longest = RowCache(len(places)), torch.zeros_like(lengths), 0
        logits = self._forward(ids, lengths, by)
        self.cache, self.held = self.cache.take(chosen), list(rows)
        self._stand_at([len(row) for row in rows])
        return logits[chosen]

    def _read(self, rows: Sequence[list[int]], readers: Sequence[list[int]]) -> torch.Tensor:
        """Feed what is new in each row (at least its last sampled token); the logits (A, V) behind it."""
        place = {id(row): i for i, row in enumerate(self.held)}
        kept = [place[id(row if id(row) in place else self.parents[id(row)])] for row in rows]
        starts = [min(self.filled[i], len(row) - 1) for i, row in zip(kept, rows)]
        states: dict[tuple, int] = {}  # the held row, how much of it counts, and what is new: fed once
        new = [zip(row[n:], by[n:]) for n, row, by in zip(starts, rows, readers)]
        chosen = [states.setdefault((i, n, *pairs), len(states)) for i, n, pairs in zip(kept, starts, new)]
        if (distinct := [state[0] for state in states]) != list(range(len(self.held))):
            self.cache = self.cache.take(distinct)
        self._stand_at([state[1] for state in states])
        logits = self._forward(*self._padded([state[2:] for state in states]))
        if len(states) < len(rows):
            self.cache, logits = self.cache.take(chosen), logits[chosen]
        self.held = list(rows)
        self._stand_at([len(row) for row in rows])
        return logits

    def _stand_at(self, lengths: list[int]) -> None:
        """So many tokens of each row are in the cache."""
        self.position, self.longest = torch.tensor(lengths, device=self.policy.device), max(lengths)

    def _padded(self, rows: Sequence[Sequence[tuple[int, int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of token ids, each with its reader: ids (A, N), filled up on the right, lengths (A,), readers (A, N)."""
        device = self.policy.device
        ids, readers = (
            padded([[pair[i] for pair in row] for row in rows], fill, device)
            for i, fill in enumerate((self.policy.pad_id, 0))
        )
        return ids, torch.tensor([len(row) for row in rows], device=device), readers

    def _forward(self, ids: torch.Tensor, lengths: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
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
            how = {"attention_mask": self._masks(ahead[part]), "position_ids": ahead[part], "use_cache": True}
            hidden = self.policy.hidden(ids[part], readers[part], past_key_values=self.cache, **how)
            last.append(hidden[rows - part.start, (lengths[part] - 1).clamp(min=0)])
        self.position = self.position + lengths
        head = self.policy.lm_head
        return head_logits(torch.cat(last), head.weight, head.bias)

    def _masks(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the tokens at ``positions`` (A, N) may look at: all places up to their own, (A, 1, N, L), added."""
        places = torch.arange(self.longest, device=positions.device)
        # the cache's index is the position, so this also hides what padding wrote behind a shorter row's end
        hidden = places > positions[:, None, :, None]
        dtype = self.policy.lm_head.weight.dtype
        low = torch.finfo(dtype).min
        full = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, low)
        if "sliding_attention" not in (getattr(self.policy.config, "layer_types", None) or ()):
            return full
        passed = places <= positions[:, None, :, None] - self.policy.config.sliding_window
        return {"full_attention": full, "sliding_attention": full.masked_fill(passed, low)}

    def _sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token (A,), its log-probability (A,) and the entropy (A,) of the sampling distribution."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)
        probs = logprobs.exp()
        token = logits.argmax(-1) if self.temperature == 0 else draw(probs, self.generator)
        entropy = -(probs * logprobs.clamp(min=-1e4)).sum(-1)
        return token, logprobs.gather(1, token.unsqueeze(1)).squeeze(1), entropy

    def _write(
        self, logits: torch.Tensor, before: Sequence[list[int]], stops: Sequence[bytes], room: list[int]
    ) -> list[Written]:
        """Sample until every row is done. The last token of each stays out of the cache."""
        count_at, ended = [0] * len(room), [False] * len(room)  # of the rows that are done
        authors: list[list[int]] = [[] for _ in room]
        whole, self.rows = self.cache, list(range(len(room)))
        still = set(self.rows)
        columns: list[list[torch.Tensor]] = [[], [], []]
        for count in range(1, max(room) + 1):
            drawn = self._sample(logits)
            rows = torch.tensor(self.rows, device=logits.device)
            for column, values in zip(columns, drawn):
                column.append(values.new_zeros(len(room)).index_copy(0, rows, values))
            token = drawn[0]
            for i in still:
                authors[i].append(self.writers[i])
            done = {i for i in still if count >= room[i]}
            for i in rows[self.closers[token]].tolist():  # few tokens can end a turn: only these are looked at
                if i in still:
                    ids = torch.stack([t[i] for t in columns[0][-_STOP_TOKENS:]]).tolist()
                    ended[i] = ids[-1] in self.policy.stop_ids
                    if ended[i] or self._has_stop(ids, stops):
                        done.add(i)
                    if self.switches:
                        self._switch(i, [*before[i][-_STOP_TOKENS:], *ids][-_STOP_TOKENS:])
            for i in done:
                count_at[i] = count
            still -= done
            if not still:
                break
            if 2 * len(still) <= len(self.rows):
                token = token[self._narrow(whole, sorted(still))]
            is_open = torch.tensor([i in still for i in self.rows], device=logits.device)
            readers = torch.tensor([[self.writers[i]] for i in self.rows], device=logits.device)
            logits = self._forward(token.unsqueeze(1), is_open.long(), readers)
        if self.cache is not whole:
            whole.put(self.rows, self.cache)
            self.cache = whole
        ids, logprobs, entropy = (torch.stack(column, 1).tolist() for column in columns)
        each = zip(count_at, ids, logprobs, entropy, ended, authors, self.writers)
        return [Written(row[:n], p[:n], h[:n], *state) for n, row, p, h, *state in each]

    def _narrow(self, whole: RowCache, rows: list[int]) -> list[int]:
        """Go on with some rows only; returns where they stood among ``self.rows``."""
        kept = [self.rows.index(i) for i in rows]
        if self.cache is not whole:
            whole.put(self.rows, self.cache)
        self.cache, self.rows, self.position = whole.take(rows), rows, self.position[kept]
        return kept

    def _switch(self, row: int, ids: list[int]) -> None:
        """Who writes behind these ids of a row: another one where a switch ends in the last of them."""
        tail, new = self.policy.bytes_of(ids), len(self.policy.token_bytes[ids[-1]])
        ends = {tail.rfind(s) + len(s): by for s, by in self.switches.items() if s in tail}
        if ends and max(ends) > len(tail) - new:
            self.writers[row] = ends[max(ends)]

    def _has_stop(self, ids: list[int], stops: Sequence[bytes]) -> bool:
        """Whether a stop string ends in the last token of ``ids`` (it may have begun tokens before)."""
        tail = self.policy.bytes_of(ids)
        new = len(self.policy.token_bytes[ids[-1]])  # a stop that ended before these bytes was seen then
        return any(tail.find(s, max(0, len(tail) - new - len(s) + 1)) >= 0 for s in stops)


class RowCache(DynamicCache):
    """A key-value cache of R rows, each with a length of its own: a token stands at the place of its position.

    Before a forward pass ``write_at`` says where its tokens go. What padding writes stands behind its row's
    end, where no token looks (see ``Decoder._masks``), until the next token takes its place. There is room
    to grow, so a token costs no copy of what is held; transformers' own cache copies all for every token.

    Attributes:
        rooms: keys and values of each layer, (2, R, places, heads, size of a head).
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.length, self.places = rows, 0, 0
        self.rooms: list[torch.Tensor] = []

    def reserve(self, length: int) -> None:
        """Make room for rows of this length; the next forward pass looks at so many places."""
        self.length = length
        if length > self.places:
            before, self.places = self.places, length * 3 // 2 + 16
            self.rooms = [pad(room, (0, 0, 0, 0, 0, self.places - before)) for room in self.rooms]

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
        taken = RowCache(len(rows))
        taken.length, taken.places = self.length, self.places
        taken.rooms = [room[:, rows] for room in self.rooms]
        return taken

    def put(self, rows: list[int], other: RowCache) -> None:
        """Write the rows of ``other`` over these rows."""
        self.reserve(other.length)
        for room, new in zip(self.rooms, other.rooms):
            room[:, rows, : other.length] = new[:, :, : other.length]


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token a row from probabilities (A, V), by inverting the distribution function.

    A uniform number a row instead of ``multinomial``'s one a token: many times faster on a CPU. Summed in
    double precision, so that a large vocabulary loses nothing; a token of probability 0 is never drawn.
    """
    summed = probs.double().cumsum(-1)
    uniform = torch.rand(len(probs), 1, dtype=torch.double, device=probs.device, generator=generator)
    return torch.searchsorted(summed, uniform * summed[:, -1:], right=True).clamp(max=probs.shape[1] - 1).squeeze(1)
