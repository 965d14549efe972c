"""Quantile balancing: the bias jumps to where every expert would have got its share of the window's tokens."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.balancers.base import Balancer, LayerStack, Load, check_load, check_number, check_whole
from equipoise.routing import Routing, widest_float

__all__ = ["Quantile"]

OCTAVES, SMALLEST = 64, -61  # bins reach from 2^-61 to 2^3: a peaked softmax router chooses by scores of 1e-12
SIGNIFICANT_LAYER, SIGNIFICANT_EXPERT = 3.0, 4.0  # standard deviations beyond which an imbalance is not chance


def _margins(
    scores: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens k"], bias: Float[Tensor, " experts"]
) -> Float[Tensor, "tokens experts"]:
    """``a_t - s_te - b_e``: what each expert lacks to be chosen, below 0 for the chosen ones."""
    biased = scores.detach() + bias
    last_chosen = biased.gather(-1, expert_ids).amin(-1, keepdim=True)
    first_other = biased.scatter(-1, expert_ids, float("-inf")).amax(-1, keepdim=True)
    return torch.lerp(last_chosen, first_other, 0.5) - biased


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
    margins: Float[Tensor, "tokens experts"], k: int, gain: Float[Tensor, " experts"]
) -> tuple[Float[Tensor, " experts"], Int[Tensor, ""]]:
    """The margin of each expert at the wanted count, the larger of the two there, and N, the number of finite rows."""
    margins = margins.masked_fill(~margins.isfinite().all(-1, keepdim=True), float("inf"))  # nan logits do not count
    num_tokens = (margins[:, :1] < float("inf")).sum()
    if margins.shape[0] == 0:
        return margins.new_zeros(margins.shape[-1]), num_tokens
    num_chosen, num_wanted = (margins < 0).sum(0).to(gain.dtype), (num_tokens * k).to(gain.dtype) / margins.shape[-1]
    wanted = torch.lerp(num_chosen, num_wanted, gain)
    place = wanted.long().clamp(max=margins.shape[0] - 1)
    return margins.sort(0).values.gather(0, place[None])[0], num_tokens


def edges(bins: int, device: torch.device | None = None) -> Float[Tensor, " edges"]:
    """The bins + 1 edges of the histogram: 0 in the middle, ``bins / 128`` bins per octave from 2^-61 to 2^3."""
    step = torch.arange(bins // 2 + 1, dtype=widest_float(device), device=device)
    per_octave = bins // (2 * OCTAVES)
    octave = (step / per_octave).floor()
    positive = torch.exp2(SMALLEST + octave) * (1 + (step - octave * per_octave) / per_octave)
    positive[0] = 0  # the first bin reaches down to zero
    return torch.cat([-positive.flip(0)[:-1], positive])


def _bin(margins: Float[Tensor, "tokens experts"], bins: int) -> Int[Tensor, "tokens experts"]:
    margins = margins.float()  # a bin is the exponent and the first mantissa bits
    mantissa_bits = (bins // (2 * OCTAVES)).bit_length() - 1
    index = (margins.abs().view(torch.int32) >> (23 - mantissa_bits)) - ((127 + SMALLEST) << mantissa_bits)
    index = index.clamp(0, bins // 2 - 1)
    return torch.where(margins < 0, bins // 2 - 1 - index, bins // 2 + index).long()


def _from_histogram(
    histogram: Int[Tensor, "*layers experts bins"], k: int, gain: Float[Tensor, "*layers experts"]
) -> tuple[Float[Tensor, "*layers experts"], Int[Tensor, "*layers experts"]]:
    """The margin at which the cumulated count passes the wanted count, interpolated within its bin, and N."""
    num_experts, bins = histogram.shape[-2:]
    num_tokens = histogram.sum(-1)
    precise = widest_float(histogram.device)
    chosen = histogram[..., : bins // 2].sum(-1).to(precise)
    wanted = torch.lerp(chosen, (num_tokens * k).to(precise) / num_experts, gain)
    cumulated = histogram.cumsum(-1)
    index = (cumulated <= wanted.unsqueeze(-1)).sum(-1, keepdim=True).clamp(max=bins - 1)
    in_bin = histogram.gather(-1, index).squeeze(-1)
    below = cumulated.gather(-1, index).squeeze(-1) - in_bin
    index = index.squeeze(-1)
    edge = edges(bins, histogram.device)
    lower, upper = edge[index], edge[index + 1]
    margin = lower + (upper - lower) * (wanted - below) / in_bin.clamp_min(1)
    return margin.masked_fill((index == bins // 2) | (index == bins // 2 - 1), 0), num_tokens


@final
class Quantile(Balancer):
    """Quantile balancing: a bias without a step size. Once per window, over its N tokens on all ranks:

        a_t   = half-way between the k-th and the (k + 1)-th largest of s_t + b    what a token asks of an expert
        n_e   = tokens with s_te + b_e > a_t: those that chose e
        b_e  <- b with which n_e + g_e (N k / E - n_e) tokens have s_te + b > a_t;  then minus the median over e

    With g = 1 this is the exact minimum, expert by expert, of the dual problem on which Loss-Free's sign rule takes
    small steps. The gain g_e is the part of the deviation that is not chance: 1 - (what chance gives) / deviation^2, at
    least 0, from 3 standard deviations of a layer or 4 of an expert on. An even layer stays as it is.

    Where a router selects by logits, s are the logits. Tokens are routed with the bias of the window before, so nothing
    leaks from later tokens. Ties follow the sort.

    Args:
        bins: bins of each expert's histogram of ``a_t - s_te - b_e``; a power of two from 128. The new bias is
            interpolated within a bin. There are ``bins / 128`` bins per octave from 2^-61 to 2^3 around the present
            bias: the first, long moves are coarse, and resolution grows as the load evens out, whatever the range of
            the scores. Margins below 2^-61 count as 0. 0: exact, for small batches: all values of the window are
            gathered (4 N E bytes per layer).
        ema: share of the old bias that is kept, from 0 to below 1.
        fraction: share of the tokens that is looked at, above 0 to 1. A hash of a token's logits decides, so it is the
            same on every rank and never just the first tokens.

    Without tokens, and with k = E, the bias stays. Tokens with logits that are not finite do not count if bins = 0.
    In windows with less than about 16 tokens per expert, a dead expert may be chance, and is revived later.

    Limit: a bias is float32 and the same for all tokens. A softmax router whose logits spread by 10 or more *and* that
    prefers some experts in the mean has tokens with scores of 1e-12, which no bias of 1e-3 tells apart. It becomes more
    even, but not even. Sigmoid routers and selection by logits have no such tokens.

    Source: Su 2026, kexue.fm/archives/11619; Kimi K3, arXiv:2607.24653, section 2.3.3. Where we differ: they take the
    (k + 1)-th largest, with which experts that have too few tokens wait for the others to sink; they have no gain, so
    noise moves an even layer; they subtract the mean, which costs float32 its resolution if one expert has a large
    bias; and K3 keeps 1000 bins of equal width on [min b - 1, max b + 1].
    With group-limited routing it is approximate: the best expert that was not chosen may lie in a closed expert group.
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
        """The margins of a call's tokens: a histogram, int64 ``[experts, bins]``; exact: ``[tokens, experts]``."""
        num_experts = routing.scores.shape[-1]
        if self._k == num_experts:  # every expert is chosen, whatever the bias
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
    def update(self, load: Load, statistic: Sequence[Tensor] | None = None, window: int = 0) -> None:
        check_load(load, self._bias)
        if self._k == load.shape[-1]:
            return
        if statistic is None:
            raise ValueError("quantile balancing must have the statistic of its calls: got none.")
        gain = _gain(load, self._k)
        if self.gathers:
            exact = (_exact(m, self._k, g) for m, g in zip(statistic, gain, strict=True))
            missing, num_tokens = map(torch.stack, zip(*exact, strict=True))
            num_tokens = num_tokens[:, None]
        else:
            missing, num_tokens = _from_histogram(torch.stack(list(statistic)), self._k, gain)
        bias = self._bias.to(gain.dtype)
        target = bias + missing.masked_fill(gain == 0, 0)
        target = self.ema * bias + (1 - self.ema) * (target - target.median(-1, keepdim=True).values)
        moves = (num_tokens > 0) & (gain > 0).any(-1, keepdim=True)
        self._bias.copy_(torch.where(moves, target, bias))


def _draw(logits: Float[Tensor, "tokens experts"], fraction: float) -> Bool[Tensor, " tokens"]:
    bits = logits.float().contiguous().view(torch.int32).long()
    weights = torch.arange(1, 2 * bits.shape[-1], 2, device=bits.device) * 0x9E3779B97F4A7C1
    mixed = (bits * weights).sum(-1)
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
    return ((mixed >> 33) & 0xFFFFFF) < fraction * 2**24
