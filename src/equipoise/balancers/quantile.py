"""Quantile balancing: the bias jumps to where every expert would have got its share of the window's tokens."""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.balancers.base import Balancer, LayerStack, Load, check_load, check_number, check_whole
from equipoise.routing import Routing, widest_float

__all__ = ["Quantile"]

OCTAVES, SMALLEST = 64, -61  # bins reach from 2^-61 to 2^3: a peaked softmax router chooses by scores of 1e-12
SIGNIFICANT_LAYER, SIGNIFICANT_EXPERT = 3.0, 4.0  # standard deviations beyond which an imbalance is not chance


def _around_threshold(
    biased: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens k"]
) -> tuple[Tensor, ...]:
    """The k-th and the (k + 1)-th largest of each token, ``[tokens, 1]``."""
    if biased.device.type == "cpu":  # there a top-k takes three times as long as to look at the chosen and the others
        last = biased.gather(-1, expert_ids).amin(-1, keepdim=True)
        first_other = biased.scatter(-1, expert_ids, float("-inf")).amax(-1, keepdim=True)
        if not (first_other > last).any():  # else expert groups limit the choice
            return last, first_other
    return biased.topk(expert_ids.shape[-1] + 1).values[:, -2:].split(1, dim=-1)


def _margins(
    scores: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens k"], bias: Float[Tensor, " experts"]
) -> Float[Tensor, "tokens experts"]:
    """``a_t - s_te - b_e``: what each expert lacks to be among the k best, below 0 for these."""
    biased = scores.detach() + bias
    last, first_other = _around_threshold(biased, expert_ids)
    return torch.lerp(last, first_other, 0.5) - biased


def _gain(load: Load, k: int) -> Float[Tensor, "layers experts"]:
    """The part of each expert's deviation from its share that is not chance, 0 to 1.

    If N tokens choose evenly, a count has the variance ``v = N p (1 - p)``, ``p = k / E``. The counts sum to N k, so
    the sum of their squared deviations is ``v E / (E - 1)`` times a chi-square of E - 1 degrees of freedom. A layer
    counts from 3 standard deviations of this sum on, a single expert from 4 of its count.
    """
    num_experts = load.shape[-1]
    share = load.sum(-1, keepdim=True).to(widest_float(load.device)) / num_experts
    variance = (share * (1 - k / num_experts)).clamp_min(1e-9)  # without tokens there is no gain
    squares = (load - share).square()
    by_chance = num_experts * variance * (1 + SIGNIFICANT_LAYER * (2 / (num_experts - 1)) ** 0.5)
    of_layer = 1 - by_chance / squares.sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.maximum(of_layer, 1 - SIGNIFICANT_EXPERT**2 * variance / squares.clamp_min(1e-9)).clamp_min(0)


def _exact(
    margins: Float[Tensor, "tokens experts"], wanted: Float[Tensor, " experts"]
) -> tuple[Float[Tensor, " experts"], Int[Tensor, ""]]:
    """How far each bias moves, by all margins, and N, the number of finite rows.

    ``wanted`` is how many tokens an expert lacks, by token.
    """
    margins = margins.masked_fill(~margins.isfinite().all(-1, keepdim=True), float("inf"))  # nan logits do not count
    num_tokens = (margins[:, :1] < float("inf")).sum()
    if margins.shape[0] == 0:
        return margins.new_zeros(margins.shape[-1]), num_tokens
    place = (margins < 0).sum(0) + wanted * num_tokens
    place = place.long().clamp(0, margins.shape[0] - 1)
    return margins.sort(0).values.gather(0, place[None])[0], num_tokens


def edges(bins: int, device: torch.device | None = None) -> Float[Tensor, " edges"]:
    """The bins + 1 edges of the histogram: 0 in the middle, ``bins / 128`` bins per octave from 2^-61 to 2^3."""
    step = torch.arange(bins // 2 + 1, dtype=widest_float(device), device=device)
    per_octave = bins // (2 * OCTAVES)
    octave = (step / per_octave).floor()
    positive = torch.exp2(SMALLEST + octave) * (1 + (step - octave * per_octave) / per_octave)
    positive[0] = 0  # the first bin reaches down to zero
    return torch.cat([-positive.flip(0)[:-1], positive])


class _Bins(NamedTuple):
    """What the histograms of one device need."""

    edges: Float[Tensor, " edges"]
    inner: Float[Tensor, " edges"]  # float32; exact
    one: Int[Tensor, ""]

    @classmethod
    def on(cls, device: torch.device, bins: int) -> "_Bins":
        edge = edges(bins, device)
        return cls(edge, edge[1:-1].float(), torch.ones((), dtype=torch.int64, device=device))

    def of(self, margins: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens experts"]:
        """The bin of each. A bin holds its lower edge; the first and the last one also what lies beyond."""
        if margins.device.type == "cpu":
            return self._by_bits(margins.float())
        return torch.bucketize(margins.float(), self.inner, right=True)

    def _by_bits(self, margins: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens experts"]:
        """The same, faster on a CPU. The bits of a float, shifted right, are the number of its bin.

        They are the exponent and the first bits of the mantissa. Bins of negative numbers are mirrored.
        """
        half = len(self.edges) // 2
        mantissa_bits = (half // OCTAVES).bit_length() - 1
        is_below, index = margins < 0, margins.abs().view(torch.int32)
        index.add_(is_below, alpha=-1)  # below 0 the lower edge is the one that is further from 0
        index.bitwise_right_shift_(23 - mantissa_bits).sub_((127 + SMALLEST) << mantissa_bits).clamp_(0, half - 1)
        return index.bitwise_xor_(is_below.int().neg_()).add_(half).long()  # x xor -1 is -1 - x


def _from_histogram(
    histogram: Int[Tensor, "layers bins experts"],
    wanted: Float[Tensor, "layers experts"],
    edge: Float[Tensor, " edges"],
) -> tuple[Float[Tensor, "layers experts"], Int[Tensor, "layers experts"]]:
    """How far each bias moves, interpolated within the bin, and N. ``wanted`` as for ``_exact``."""
    bins = histogram.shape[-2]
    cumulated = histogram.cumsum(-2)
    num_tokens, num_chosen = cumulated[:, -1], cumulated[:, bins // 2 - 1]
    place = num_chosen + wanted * num_tokens
    index = (cumulated <= place[:, None]).sum(-2, keepdim=True).clamp(max=bins - 1)
    in_bin = histogram.gather(-2, index).squeeze(-2)
    below = cumulated.gather(-2, index).squeeze(-2) - in_bin
    index = index.squeeze(-2)
    margin = torch.lerp(edge[index], edge[index + 1], (place - below) / in_bin.clamp_min(1))
    return margin.masked_fill((index == bins // 2) | (index == bins // 2 - 1), 0), num_tokens


@final
class Quantile(Balancer):
    """Quantile balancing: a bias without a step size. Once per window, over its N tokens on all ranks:

        a_t   = half-way between the k-th and the (k + 1)-th largest of s_t + b
                what a token asks of an expert
        n_e   = tokens with s_te + b_e > a_t
        c_e   = tokens that chose e: n_e, unless expert groups limit the choice
        b_e  <- b with which n_e + g_e (N k / E - c_e) tokens have s_te + b > a_t
                then minus the median over e

    With g = 1 this is the exact minimum, expert by expert, of the dual problem on which Loss-Free's sign rule takes
    small steps. The gain g_e is the part of the deviation that is not chance: 1 - (what chance gives) / deviation^2, at
    least 0, from 3 standard deviations of a layer or 4 of an expert on. An even layer stays as it is.

    Where a router selects by logits, s are the logits. Tokens are routed with the bias of the window before, so nothing
    leaks from later tokens. Ties follow the sort.

    Args:
        bins: bins of each expert's histogram of ``a_t - s_te - b_e``, or 0 for exact values. A power of two from 128.
            The new bias is interpolated within a bin. There are ``bins / 128`` bins per octave from 2^-61 to 2^3 around
            the present bias: the first, long moves are coarse, and resolution grows as the load evens out, whatever the
            range of the scores. Margins below 2^-61 count as 0. Exact is for small batches: all values of the window
            are gathered (4 N E bytes per layer).
        ema: share of the old bias that is kept. From 0 to below 1.
        fraction: share of the tokens that is looked at. Above 0, at most 1. A hash of a token's logits decides, so it
            is the same on every rank and never just the first tokens. It saves time with ``attach(..., fused=True)``
            only: there the other tokens add nothing to a histogram.

    Raises:
        ValueError: a value is not allowed.

    Without tokens, and with k = E, the bias stays. Tokens with logits that are not finite do not count if bins = 0.
    Else a token with nan counts as one that no bias wins.
    In windows with less than about 16 tokens per expert, a dead expert may be chance, and is revived later.

    Limit: a bias is float32 and the same for all tokens. A softmax router whose logits spread by 10 or more *and* that
    prefers some experts in the mean has tokens with scores of 1e-12, which no bias of 1e-3 tells apart. It becomes more
    even, but not even. Sigmoid routers and selection by logits have no such tokens.

    Source: Su 2026, kexue.fm/archives/11619; Kimi K3, arXiv:2607.24653, section 2.3.3. Where we differ: they take the
    (k + 1)-th largest, with which experts that have too few tokens wait for the others to sink; they have no gain, so
    noise moves an even layer; they subtract the mean, which costs float32 its resolution if one expert has a large
    bias; and K3 keeps 1000 bins of equal width on [min b - 1, max b + 1]. Their n_e is our c_e: if expert groups limit
    the choice, their update stops before the load is even.
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
        self._bins = None if self.gathers else _Bins.on(self._bias.device, self.bins)
        self._fused = layers.fused and not self.gathers

    def bias(self) -> Float[Tensor, "layers experts"]:
        return self._bias

    @torch.no_grad()
    def statistic(self, routing: Routing, row: int) -> Tensor | None:
        """The margins of a call's tokens: a histogram, int64 ``[bins, experts]``; exact: ``[tokens, experts]``."""
        num_experts = routing.scores.shape[-1]
        if self._k == num_experts:  # every expert is chosen, whatever the bias
            return None
        values = routing.logits if self._by_logits else routing.scores
        values = values.to(routing.scores.dtype)
        if self._fused:
            from equipoise import kernels

            if kernels.can_take(values):
                drawn_by = routing.logits.detach() if self.fraction < 1 else None
                return kernels.margin_histogram(
                    values, self._bias[row], self._k, routing.mask, self.bins, SMALLEST, drawn_by, self.fraction
                )
        mask: Tensor | None = routing.mask
        if self.fraction < 1:
            drawn = _draw(routing.logits, self.fraction)
            mask = drawn if mask is None else (mask != 0) & drawn
        margins = _margins(values, routing.expert_ids, self._bias[row])
        if self.gathers:
            return margins if mask is None else margins.masked_fill((mask == 0)[:, None], float("inf"))
        bins = self._bins_on(margins.device)
        index, one = bins.of(margins), bins.one if mask is None else (mask != 0).long()[:, None]
        histogram = torch.zeros(self.bins, num_experts, dtype=torch.int64, device=index.device)
        return histogram.scatter_add_(0, index, one.expand_as(index))

    def _bins_on(self, device: torch.device) -> _Bins:
        if self._bins is None or self._bins.edges.device != device:
            self._bins = _Bins.on(device, self.bins)
        return self._bins

    @torch.no_grad()
    def update(self, load: Load, statistic: Sequence[Tensor] | None = None, window: int = 0) -> None:
        check_load(load, self._bias)
        num_experts = load.shape[-1]
        if self._k == num_experts:
            return
        if statistic is None:
            raise ValueError("quantile balancing must have the statistic of its calls: got none.")
        gain = _gain(load, self._k)
        bias = self._bias.to(gain.dtype)
        share = load.to(gain.dtype) / load.sum(-1, keepdim=True).clamp_min(1)
        wanted = gain * (1 / num_experts - share) * self._k  # tokens that each expert lacks, by token
        if self.gathers:
            missing, num_tokens = map(torch.stack, zip(*map(_exact, statistic, wanted), strict=True))
            num_tokens = num_tokens[:, None]
        else:
            histogram = torch.stack(list(statistic))
            missing, num_tokens = _from_histogram(histogram, wanted, self._bins_on(load.device).edges)
        target = bias + missing.masked_fill(gain == 0, 0)
        # median() has no deterministic kernel for GPUs
        median = target.sort(-1).values[..., (num_experts - 1) // 2, None]
        target = self.ema * bias + (1 - self.ema) * (target - median)
        moves = (num_tokens > 0) & (gain > 0).any(-1, keepdim=True)
        self._bias.copy_(torch.where(moves, target, bias))


def _draw(logits: Float[Tensor, "tokens experts"], fraction: float) -> Bool[Tensor, " tokens"]:
    bits = logits.float().contiguous().view(torch.int32).long()
    weights = torch.arange(1, 2 * bits.shape[-1], 2, device=bits.device) * 0x9E3779B97F4A7C1
    mixed = (bits * weights).sum(-1)
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
    return ((mixed >> 33) & 0xFFFFFF) < fraction * 2**24
