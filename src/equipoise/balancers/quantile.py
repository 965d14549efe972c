"""Quantile balancing: the bias jumps to where every expert would have got its share of the window's tokens."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.balancers.base import Balancer, LayerStack, check_load, check_number, check_whole
from equipoise.routing import Routing

__all__ = ["Quantile", "quantile_bias"]

OCTAVES, SMALLEST = 32, -29  # from 2^-29, the grain of a float32 bias, to 2^3


def _margins(
    scores: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens k"], bias: Float[Tensor, " experts"]
) -> Float[Tensor, "tokens experts"]:
    """How much each expert lacks to be chosen: the best score + bias that was not, minus its own."""
    biased = scores.detach() + bias
    threshold = biased.scatter(-1, expert_ids, float("-inf")).amax(-1, keepdim=True)
    return threshold - biased


def _exact(margins: Float[Tensor, "tokens experts"], k: int) -> tuple[Float[Tensor, " experts"], Int[Tensor, ""]]:
    """The (N k / E + 1)-th smallest margin of each expert, and N, the number of rows that are not +inf."""
    margins = margins.masked_fill(~margins.isfinite().all(-1, keepdim=True), float("inf"))  # nan logits do not count
    num_tokens = (margins[:, :1] < float("inf")).sum()
    place = (num_tokens * k // margins.shape[-1]).clamp(max=max(margins.shape[0] - 1, 0))
    if margins.shape[0] == 0:
        return margins.new_zeros(margins.shape[-1]), num_tokens
    return margins.sort(0).values.index_select(0, place.reshape(1))[0], num_tokens


def edges(bins: int, device: torch.device | None = None) -> Float[Tensor, " edges"]:
    """The bins + 1 edges of the histogram: 0 in the middle, ``bins / 64`` bins an octave from 2^-29 to 2^3."""
    step = torch.arange(bins // 2 + 1, dtype=torch.float64, device=device)
    an_octave = bins // (2 * OCTAVES)
    octave = (step / an_octave).floor()
    positive = torch.exp2(SMALLEST + octave) * (1 + (step - octave * an_octave) / an_octave)
    positive[0] = 0  # the first bin reaches down to zero
    return torch.cat([-positive.flip(0)[:-1], positive])


def _bin(margins: Float[Tensor, "tokens experts"], bins: int) -> Int[Tensor, "tokens experts"]:
    """The bin of each margin, read off its bits: exponent and first binary places of a float32."""
    margins = margins.float()
    places = (bins // (2 * OCTAVES)).bit_length() - 1
    index = (margins.abs().view(torch.int32) >> (23 - places)) - ((127 + SMALLEST) << places)
    index = index.clamp(0, bins // 2 - 1)
    return torch.where(margins < 0, bins // 2 - 1 - index, bins // 2 + index).long()


def _from_histogram(
    histogram: Int[Tensor, "*layers experts bins"], k: int
) -> tuple[Float[Tensor, "*layers experts"], Int[Tensor, "*layers experts"]]:
    """Where the cumulated count passes N k / E, interpolated within its bin, and N."""
    num_tokens = histogram.sum(-1)
    wanted = (num_tokens * k).double() / histogram.shape[-2]
    cumulated = histogram.cumsum(-1)
    index = (cumulated <= wanted.unsqueeze(-1)).sum(-1, keepdim=True).clamp(max=histogram.shape[-1] - 1)
    inside = histogram.gather(-1, index).squeeze(-1)
    before = cumulated.gather(-1, index).squeeze(-1) - inside
    edge = edges(histogram.shape[-1], histogram.device)
    lower, upper = edge[index.squeeze(-1)], edge[index.squeeze(-1) + 1]
    return lower + (upper - lower) * (wanted - before) / inside.clamp_min(1), num_tokens


def quantile_bias(
    scores: Float[Tensor, "tokens experts"],
    k: int,
    bias: Float[Tensor, " experts"] | None = None,
    mask: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " experts"]:
    """The exact quantile bias of one batch: with it, each expert alone would have got its N k / E tokens.

        a_t   = (k + 1)-th largest of s_t + b                                 what a token asks of an expert
        b_e  <- (N k / E + 1)-th smallest over t of (a_t - s_te),  minus its mean over e

    N tokens that are unmasked and finite. b is what the tokens were routed by (default zero) and is not changed;
    without tokens, or with k = E, it comes back as it is. In score units. Deterministic; ties go where the sort puts
    them.

    Source: Su 2026, kexue.fm/archives/11619; Kimi K3, arXiv:2607.24653, section 2.3.3.

    >>> quantile_bias(torch.tensor([[0.9, 0.2], [0.8, 0.5], [0.7, 0.1], [0.6, 0.4]]), k=1)
    tensor([-0.1500,  0.1500])
    """
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point numbers: got {scores.dtype}.")
    if scores.dim() != 2 or not 1 <= k <= scores.shape[-1]:
        raise ValueError(
            f"scores must have the shape (tokens, experts), 1 <= k <= experts: got {tuple(scores.shape)} and k={k}."
        )
    num_experts = scores.shape[-1]
    before = scores.new_zeros(num_experts) if bias is None else bias
    if before.shape != (num_experts,):
        raise ValueError(
            f"bias must hold one number per expert: expected shape ({num_experts},), got {tuple(before.shape)}."
        )
    if mask is not None and mask.shape != scores.shape[:1]:
        raise ValueError(
            f"mask must hold one number per token: expected shape ({scores.shape[0]},), got {tuple(mask.shape)}."
        )
    if k == num_experts:
        return before.clone()
    margins = _margins(scores, (scores.detach() + before).topk(k, dim=-1).indices, before)
    if mask is not None:
        margins = margins.masked_fill((mask == 0)[:, None], float("inf"))
    missing, num_tokens = _exact(margins, k)
    return _moved(before, missing, num_tokens, 0.0)


def _moved(before: Tensor, missing: Tensor, num_tokens: Tensor, ema: float) -> Tensor:
    target = before.double() + missing
    target = ema * before + (1 - ema) * (target - target.mean(-1, keepdim=True))
    return torch.where(num_tokens > 0, target, before.double()).to(before.dtype)


@final
class Quantile(Balancer):
    """Quantile balancing: a bias without a step size. Once a window, over its tokens on all ranks,

        a_t   = (k + 1)-th largest of s_t + b
        b_e  <- the value with which N k / E of the tokens have  s_te + b_e > a_t;  minus its mean over e

    which is the exact minimum, expert by expert, of the dual problem on which Loss-Free's sign rule takes small steps.
    Where a router selects by logits, s are these. It works on scores of any range. The tokens route by the last
    window's bias, so nothing leaks.

    Args:
        bins: of the histogram of ``a_t - s_te - b_e`` that is kept for each expert, a power of two from 64; the new
            bias is interpolated in a bin. Bins are ``bins / 64`` an octave from 2^-29 to 2^3 around the present
            bias, so the closer the balance the finer they are, whatever the range of the scores; the first, long
            moves are coarse, by a part of a bin. 0: exact; all values of the window are kept and gathered (4 N E bytes
            a layer), for small batches.
        ema: share of the old bias that is kept, from 0 to below 1.
        fraction: share of the tokens that is looked at, above 0 to 1. Which ones is decided by a hash of a token's
            logits, the same wherever it is dealt; never the first ones.

    Source: Su 2026, kexue.fm/archives/11619; Kimi K3, arXiv:2607.24653, section 2.3.3. Where we differ: K3 keeps 1000
    bins of equal width on [min b - 1, max b + 1]; ours are fewer, and fit the 1e-7 of a peaked softmax router
    as well. With group-limited routing the best expert that was not chosen may lie in a group that was closed: an
    approximation.
    """

    name = "quantile"

    def __init__(self, bins: int = 128, ema: float = 0.0, fraction: float = 1.0):
        self.bins = check_whole("bins", bins, least=0)
        if self.bins and (self.bins < 2 * OCTAVES or self.bins.bit_count() != 1 or self.bins > 2**20):
            raise ValueError(f"bins must be 0 (exact) or a power of two from {2 * OCTAVES} to {2**20}: got {bins!r}.")
        self.gathers = self.bins == 0
        self.ema = check_number("ema", ema, positive=False)
        self.fraction = check_number("fraction", fraction, positive=True)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1: got {ema!r}.")
        if self.fraction > 1:
            raise ValueError(f"fraction must be at most 1: got {fraction!r}.")

    def prepare(self, layers: LayerStack) -> None:
        self._bias, self._k, self._by_logits = layers.bias.clone(), layers.k, layers.selection == "logits"

    def bias(self) -> Float[Tensor, "layers experts"]:
        return self._bias

    @torch.no_grad()
    def statistic(self, routing: Routing, row: int) -> Tensor | None:
        """The margins of a call's tokens: by bin, int64 ``[experts, bins]``; exact, ``[tokens, experts]``."""
        num_experts = routing.scores.shape[-1]
        if self._k == num_experts:  # every expert is chosen whatever the bias
            return None
        values = routing.logits if self._by_logits else routing.scores
        margins = _margins(values.to(routing.scores.dtype), routing.expert_ids, self._bias[row])
        counted = None if routing.mask is None else routing.mask != 0
        if self.fraction < 1:
            drawn = _draw(routing.logits, self.fraction)
            counted = drawn if counted is None else counted & drawn
        if self.gathers:
            return margins if counted is None else margins.masked_fill(~counted[:, None], float("inf"))
        cell = torch.arange(num_experts, device=margins.device) * self.bins + _bin(margins, self.bins)
        one = torch.ones((), dtype=torch.int64, device=cell.device) if counted is None else counted.long()[:, None]
        histogram = torch.zeros(num_experts * self.bins, dtype=torch.int64, device=cell.device)
        histogram.scatter_add_(0, cell.reshape(-1), one.expand_as(cell).reshape(-1))
        return histogram.view(num_experts, self.bins)

    @torch.no_grad()
    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        check_load(load, self._bias)
        if self._k == load.shape[-1]:
            return
        if statistic is None:
            raise ValueError("quantile balancing must have the statistic of its calls: got none.")
        if self.gathers:
            found = [_exact(margins, self._k) for margins in statistic]
            missing = torch.stack([layer for layer, _ in found])
            num_tokens = torch.stack([count for _, count in found])[:, None]
        else:
            missing, num_tokens = _from_histogram(torch.stack(list(statistic)), self._k)
        self._bias.copy_(_moved(self._bias, missing, num_tokens, self.ema))


def _draw(logits: Float[Tensor, "tokens experts"], fraction: float) -> Bool[Tensor, " tokens"]:
    """A random subset by a hash of the logits' bits."""
    bits = logits.float().contiguous().view(torch.int32).long()
    weights = torch.arange(1, 2 * bits.shape[-1], 2, device=bits.device) * 0x9E3779B97F4A7C1
    mixed = (bits * weights).sum(-1)
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
    return ((mixed >> 33) & 0xFFFFFF) < fraction * 2**24
