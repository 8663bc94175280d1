"""Log-probabilities and entropy of tokens without holding all logits: the output layer, chunk by chunk.

With a vocabulary of 151,936 the logits of a batch do not fit into a GPU of 16 GB; here they are made, reduced and
dropped some tokens at a time, and made again in the backward pass where it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..records import Trajectory

CHUNK_LOGITS = 2**24  # logits of one chunk: 64 MiB in fp32
WIDENED = 2**22  # 16-bit weights that are widened at a time on a CPU: 16 MiB in fp32


def padded(rows: Sequence[Sequence[float]], value: float, device: torch.device | None = None) -> torch.Tensor:
    """Rows of different length as one tensor (B, longest), with ``value``, which is of their type, on their right."""
    width = max(map(len, rows))
    dtype = torch.float32 if isinstance(value, float) else torch.long
    # in one piece: a tensor for each row would leave holes in the memory
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype, device=device)


def _length(t: Trajectory) -> int:
    return len(t.prompt_ids) + len(t.completion_ids)


def micro_batches(items: Iterable, token_budget: int, length: Callable[[Any], int] = _length) -> Iterator[list]:
    """Parts of similar length, each of at most ``token_budget`` padded tokens (one item at least).

    Args:
        items: trajectories, or anything of which ``length`` says how many tokens it has.
    """
    part: list = []
    for item in sorted(items, key=length):
        if part and (len(part) + 1) * length(item) > token_budget:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (N, V) of last hidden states (N, H) in fp32 at least, for use without gradients.

    In bf16 a logit of 20 would be off by up to 0.06. A GPU sums the products of 16-bit numbers in fp32 anyhow and is
    told to leave them so; a CPU widens the factors, a few rows of the head at a time, which its cache holds. In fp32 it
    is the plain linear layer. Where a CPU multiplies bf16 faster, it narrows what was widened again: nothing is lost.
    """
    if weight.dtype.itemsize > 2:
        return torch.nn.functional.linear(hidden, weight, bias)
    if hidden.is_cuda and torch.version.cuda:  # ROCm has no such product
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        wide, precision = hidden.float(), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if hidden.dtype == weight.dtype == torch.bfloat16 else "highest")
        try:
            for rows in _chunks(len(weight), max(1, WIDENED // weight.shape[1])):
                logits[:, rows] = wide @ weight[rows].float().t()
        finally:
            torch.set_float32_matmul_precision(precision)
    return logits if bias is None else logits + bias


def token_logprobs_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and entropy of each distribution, without ever holding B x T x V logits.

    The logits of ``chunk_tokens`` tokens at a time are made, reduced and dropped; the backward pass makes them again
    where it needs them. Matrix products run in autocast's type, or else in that of ``weight`` (see ``head_logits``);
    the softmax in fp32 at least.

    Args:
        hidden: (B, T, H), last hidden states; ``hidden[:, t]`` is the one that *predicts* ``ids[:, t]``.
        weight: (V, H), the language-model head; ``bias`` (V,) if it has one. They get a gradient if they require it.
        ids: (B, T) long.
        mask: (B, T); positions with 0 cost nothing and give 0. Their ids may be anything. None: all count.
        temperature: divides the logits, as it did while sampling.
        chunk_tokens: tokens a chunk; None: as many as make 64 MiB of fp32 logits.

    Returns:
        logprobs and entropy (nats), each (B, T), fp32 (fp64 for fp64 states).

    Raises:
        ValueError: shapes do not fit, an id is outside the vocabulary, temperature or chunk_tokens not positive.

    >>> hidden, head = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> logprobs, entropy = token_logprobs_and_entropy(hidden, head, torch.tensor([[1]]))
    >>> round(logprobs.item(), 4), round(entropy.item(), 4)        # log(e / (1 + e))
    (-0.3133, 0.5822)
    """
    if hidden.dim() != 3 or hidden.shape[:2] != ids.shape or weight.shape[1:] != hidden.shape[2:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and ids {tuple(ids.shape)}"
        raise ValueError(f"{shapes} must be (B, T, H), (V, H) and (B, T)")
    if not temperature > 0 or (chunk_tokens is not None and chunk_tokens < 1):
        raise ValueError(f"temperature ({temperature}) and chunk_tokens ({chunk_tokens}) must be positive")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    targets = ids[kept]
    if targets.numel() and not 0 <= targets.min() <= targets.max() < len(weight):
        raise ValueError(f"ids must lie in 0..{len(weight) - 1}, not {targets.min()}..{targets.max()}")
    chunk_tokens = chunk_tokens or max(1, CHUNK_LOGITS // len(weight))
    logprobs, entropy = _ChunkedHead.apply(hidden[kept], weight, bias, targets, temperature, chunk_tokens)
    empty = logprobs.new_zeros(ids.shape)
    return empty.masked_scatter(kept, logprobs), empty.masked_scatter(kept, entropy)


class _ChunkedHead(torch.autograd.Function):
    """(N, H) states to (N,) log-probabilities and entropies, the logits living only chunk by chunk.

    With ``p = softmax(z)``: ``d logp_y / dz = onehot(y) - p`` and ``d entropy / dz = -p (log p + entropy)``.
    While the head is frozen, as under LoRA, the gradient of a log-probability is a vector of length H times the
    number that comes in, so the forward pass makes that vector (``toward``) at once from the chunk it holds. Only
    gradients of the head or of the entropy make the chunks again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, chunk_tokens):
        ctx.set_materialize_grads(False)  # entropy is often only reported: its gradient is then None, and skipped
        autocast = torch.is_autocast_enabled(hidden.device.type)
        ctx.dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else weight.dtype
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        exact = torch.promote_types(ctx.dtype, torch.float32)
        head = weight.to(ctx.dtype)
        logprobs, entropy, log_norm = (hidden.new_empty(len(ids), dtype=exact) for _ in range(3))
        toward = torch.empty_like(hidden) if ctx.needs_input_grad[:3] == (True, False, False) else None
        for rows in _chunks(len(ids), chunk_tokens):
            z = _logits(hidden[rows], head, bias, temperature, exact)
            top = z.amax(1, keepdim=True)
            e = z.sub_(top).exp()
            total = e.sum(1)
            log_norm[rows] = total.log() + top.squeeze(1)
            logprobs[rows] = z.gather(1, ids[rows].unsqueeze(1)).squeeze(1) - total.log()
            entropy[rows] = total.log() - z.mul_(e).sum(1) / total
            if toward is not None:
                slope = e.div_(-total.unsqueeze(1)).scatter_add_(1, ids[rows].unsqueeze(1), torch.ones_like(top))
                toward[rows] = (slope.to(ctx.dtype) @ head).div_(temperature)
        ctx.save_for_backward(hidden, weight, bias, ids, log_norm, entropy, toward)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, ids, log_norm, entropy, toward = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_norm)
        if toward is not None and grad_entropy is None:
            return (toward * grad_logprobs.unsqueeze(1)).to(hidden.dtype), None, None, None, None, None
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head, exact = weight.to(ctx.dtype), log_norm.dtype
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if wants_bias else None
        for rows in _chunks(len(ids), ctx.chunk_tokens):
            log_p = _logits(hidden[rows], head, bias, ctx.temperature, exact).sub_(log_norm[rows].unsqueeze(1))
            grad, chosen = log_p.exp(), grad_logprobs[rows].unsqueeze(1)
            if grad_entropy is not None:
                factor = log_p.add_(entropy[rows].unsqueeze(1)).mul_(grad_entropy[rows].unsqueeze(1))
                grad.mul_(factor.add_(chosen).neg_())
            else:
                grad.mul_(-chosen)
            grad.scatter_add_(1, ids[rows].unsqueeze(1), chosen).div_(ctx.temperature)
            if wants_bias:
                grad_bias += grad.sum(0)
            grad = grad.to(ctx.dtype)
            if wants_hidden:
                grad_hidden[rows] = (grad @ head).to(hidden.dtype)
            if wants_weight:
                grad_weight += grad.T @ hidden[rows].to(ctx.dtype)
        cast = lambda g, x: None if g is None else g.to(x.dtype)
        return grad_hidden, cast(grad_weight, weight), cast(grad_bias, bias), None, None, None


def _logits(hidden, head, bias, temperature, exact):
    z = head_logits(hidden.to(head.dtype), head, None if bias is None else bias.to(head.dtype)).to(exact)
    return z.div_(temperature) if temperature != 1 else z


def _chunks(count: int, size: int) -> Iterable[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
