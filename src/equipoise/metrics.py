"""load -> numbers: every metric of a load, each defined once and computed from pooled counts.

A load is a tensor ``(..., experts)`` of counts. Leading dimensions (layers, steps) are kept. For a mapping from layer
name to load, as from ``Balance.load`` or ``Balance.measuring``, a metric is the mean over the layers; ``dead_experts``
is the sum. A load without tokens gives nan, because an idle layer is not a balanced one. An empty mapping, a load
without experts and a count below 0 (on a CPU) raise ``ValueError``. Results are float64 (float32 on a device without
it).
"""

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import widest_float
from equipoise.torch_internals import has_no_numbers

__all__ = [
    "coefficient_of_variation",
    "dead_experts",
    "domain_information",
    "effective_experts",
    "load_entropy",
    "max_domain_share",
    "max_violation",
    "min_violation",
    "sampling_floor",
]

Load = Int[Tensor, "*layers experts"] | Mapping[str, Int[Tensor, " experts"]]


def _by_layer(metric: Callable[[Tensor], Tensor], load: Load) -> Tensor:
    if isinstance(load, Mapping):
        if not load:
            raise ValueError("load must hold at least one layer: got an empty mapping.")
        return torch.stack([_by_layer(metric, layer) for layer in load.values()]).mean(0)
    load = load if isinstance(load, Tensor) else torch.as_tensor(load, device="cpu")
    if load.dim() == 0 or load.shape[-1] == 0:
        raise ValueError(f"load must have the shape (..., experts), experts > 0: got {tuple(load.shape)}.")
    _check_sign(load)
    return metric(load.to(widest_float(load.device)))


def _check_sign(load: Tensor) -> None:
    """Skipped on a GPU, where the check would wait, and under tracing, where a tensor has no numbers."""
    if torch.compiler.is_compiling() or type(load) is not Tensor or load.device.type != "cpu" or not load.is_signed():
        return
    if not has_no_numbers(load) and (load < 0).any():
        raise ValueError(f"load must hold counts, 0 or more: got {load.min().item():g}.")


def _by_domain(load: Tensor) -> Tensor:
    load = load if isinstance(load, Tensor) else torch.as_tensor(load, device="cpu")
    if load.dim() < 2 or load.shape[0] == 0 or load.shape[-1] == 0:
        raise ValueError(f"load must have the shape (domains, ..., experts), none of them 0: got {tuple(load.shape)}.")
    if load.is_floating_point():
        raise ValueError(f"load must hold counts, integers: got {load.dtype}. Shares lack the number of tokens.")
    _check_sign(load)
    return load.to(widest_float(load.device))


def max_violation(load: Load) -> Float[Tensor, "*layers"]:
    """MaxVio: how far the busiest expert is above the mean, ``(max_e c_e - mean c) / mean c``.

    Range: 0 (even) to experts/k - 1 (every token takes the same k experts). Dimensionless. Its name in logs is
    ``maxvio_batch`` for a window, ``maxvio_global`` for an evaluation set, ``maxvio_micro`` for one micro-batch on one
    rank.

    Args:
        load: counts ``(..., experts)``, or a mapping from layer name to counts.

    Source: Wang et al. 2024, arXiv:2408.15664, Eq. 4.

    Examples:
        >>> max_violation(torch.tensor([4, 2, 2, 0]))
        tensor(1., dtype=torch.float64)
    """
    return _by_layer(lambda c: c.amax(-1) / c.mean(-1) - 1, load)


def min_violation(load: Load) -> Float[Tensor, "*layers"]:
    """How far the idlest expert is below the mean, ``(min_e c_e - mean c) / mean c``: 0 is even, -1 a dead expert.

    Args:
        load: as for ``max_violation``.
    """
    return _by_layer(lambda c: c.amin(-1) / c.mean(-1) - 1, load)


def coefficient_of_variation(load: Load) -> Float[Tensor, "*layers"]:
    """``std(c) / mean(c)`` over the experts, with the population std. 0 is even; collapse is sqrt(E / k - 1).

    Args:
        load: as for ``max_violation``.

    Source: its square is the load loss of Shazeer et al. 2017, arXiv:1701.06538.

    Examples:
        >>> coefficient_of_variation(torch.tensor([3, 1]))
        tensor(0.5000, dtype=torch.float64)
    """
    return _by_layer(lambda c: c.std(-1, correction=0) / c.mean(-1), load)


def _entropy(c: Tensor) -> Tensor:
    share = c / c.sum(-1, keepdim=True)
    smallest = torch.finfo(share.dtype).tiny
    return -torch.where(share > 0, share * share.clamp_min(smallest).log(), share).sum(-1)  # a nan share stays nan


def load_entropy(load: Load) -> Float[Tensor, "*layers"]:
    """Normalised entropy of the shares, ``-sum_e q_e log q_e / log E``: 1 is even or a single expert.

    Collapse onto k experts is log k / log E, so 0 for k = 1.

    Args:
        load: as for ``max_violation``.

    Examples:
        >>> load_entropy(torch.tensor([1, 1, 0, 0]))
        tensor(0.5000, dtype=torch.float64)
    """

    def normalised(c: Tensor) -> Tensor:
        one = torch.where(c.sum(-1) > 0, 1.0, math.nan).to(c.dtype)
        return _entropy(c) / math.log(c.shape[-1]) if c.shape[-1] > 1 else one

    return _by_layer(normalised, load)


def effective_experts(load: Load) -> Float[Tensor, "*layers"]:
    """``exp(-sum_e q_e log q_e)``, a number of experts: E is even, k is collapse onto k experts.

    Args:
        load: as for ``max_violation``.

    Examples:
        >>> effective_experts(torch.tensor([5, 5, 0, 0]))
        tensor(2., dtype=torch.float64)
    """
    return _by_layer(lambda c: _entropy(c).exp(), load)


def dead_experts(load: Load) -> Float[Tensor, "*layers"]:
    """Experts that got no token, ``#{e : c_e = 0}``. Range: 0 to E - k.

    Small windows have dead experts by chance, so read it beside the number of tokens.

    Args:
        load: as for ``max_violation``. A mapping gives the *sum* over layers.

    Examples:
        >>> dead_experts(torch.tensor([4, 2, 2, 0]))
        tensor(1., dtype=torch.float64)
    """
    if isinstance(load, Mapping) and load:
        return torch.stack([dead_experts(layer) for layer in load.values()]).sum(0)
    return _by_layer(lambda c: torch.where(c.sum(-1) > 0, (c == 0).to(c.dtype).sum(-1), math.nan), load)


@cache
def _expected_max_of_normals(n: int) -> float:
    # E max = int_0^inf (1 - Phi^n) dx - int_-inf^0 Phi^n dx; the trapezoid rule over 8.5 sigma is exact to 1e-6
    points, end, total = 4000, 8.5, 0.0
    step = 2 * end / points
    for i in range(points + 1):
        power = (0.5 * math.erfc(-(-end + i * step) / math.sqrt(2))) ** n  # Phi^n
        value = 1 - power if i > points // 2 else -power if i < points // 2 else 0.5 - 0.5**n
        total += value * (0.5 if i in (0, points) else 1.0)
    return total * step


def sampling_floor(num_tokens: float, k: int, num_experts: int) -> float:
    """The MaxVio that chance alone gives to a perfectly even router:

        m(E) * sqrt(E / (E - 1)) * sqrt((1 - k/E) / (N k/E))

    N tokens choose independently, each expert with probability k/E. m(E) is the expected maximum of E standard normals:
    1.42, 2.07, 2.34, 2.83 for 8, 32, 64, 256. The second factor is there because counts sum to N k: a count that is
    above the mean takes from the others. A MaxVio this low cannot be told from balance. 0 at k = E, inf at N = 0.

    It is a lower bound: the tokens of a text are not independent. It takes counts as normal, which fails for few: with
    64 experts and k = 1, chance gives about 1.1 times as much at 16 assignments per expert and 1.3 times at one.

    Args:
        num_tokens: N, 0 or more.
        k: experts per token.
        num_experts: E.

    Raises:
        ValueError: the numbers do not fit.

    Examples:
        >>> round(sampling_floor(8192, k=4, num_experts=32), 4)
        0.0615
    """
    if int(k) != k or int(num_experts) != num_experts or not 1 <= k <= num_experts:
        raise ValueError(f"k must be an integer between 1 and the number of experts: got {k=}, {num_experts=}.")
    if not num_tokens >= 0:
        raise ValueError(f"num_tokens must be 0 or more: got {num_tokens!r}.")
    if num_tokens == 0:
        return math.inf
    if k == num_experts:
        return 0.0
    p = k / num_experts
    of_sum = num_experts / (num_experts - 1)  # deviations from a common mean are negatively correlated
    return _expected_max_of_normals(num_experts) * math.sqrt(of_sum * (1 - p) / (num_tokens * p))


def domain_information(load: Int[Tensor, "domains *layers experts"]) -> Float[Tensor, "*layers"]:
    """How much an assignment tells about the domain of its token: I(domain; expert) in bits.

        p_d = share of each expert in the assignments of domain d
        I   = H(mean_d p_d) - mean_d H(p_d)
              H is corrected by (number of used experts - 1) / (2 n)   (Miller-Madow)
        n   = assignments of the domain; for the mixture 1 / sum_d (w_d^2 / n_d)

    Range: 0 (experts ignore the domain) to log2(domains) (each expert serves one domain); nan without assignments.
    Average it over layers. Domains weigh equally, w_d = 1 / domains, however many tokens they have. A domain without
    tokens is left out.

    The correction is of first order and good from about five assignments per expert and domain. With fewer, part of
    what chance gives remains. A value can be slightly above log2(domains) or below 0 (for k > 1 even on average,
    because the k experts of a token differ).

    Args:
        load: counts, integers, ``(domains, ..., experts)``.

    Raises:
        ValueError: ``load`` is anything but counts.

    Examples:
        >>> domain_information(torch.tensor([[1000, 0], [0, 1000]])).round(decimals=2)
        tensor(1., dtype=torch.float64)
    """
    counts = _by_domain(load).movedim(0, -2)  # (..., domains, experts)
    n = counts.sum(-1)  # assignments of each domain
    used = (n > 0).to(n.dtype)
    weight = used / used.sum(-1, keepdim=True)
    share = counts / n.clamp_min(1).unsqueeze(-1)
    mixture = (weight.unsqueeze(-1) * share).sum(-2)

    def entropy(p: Tensor, n: Tensor) -> Tensor:
        return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1) + ((p > 0).sum(-1) - 1) / (2 * n)

    within = (weight * entropy(share, n.clamp_min(1))).sum(-1)
    return (entropy(mixture, 1 / (weight.square() / n.clamp_min(1)).sum(-1)) - within) / math.log(2)


def max_domain_share(load: Int[Tensor, "domains *layers experts"]) -> Float[Tensor, "*layers"]:
    """The largest share that one expert has in the assignments of one domain, ``max_de c_de / sum_e c_de``.

    Range: 1/experts (every domain is spread evenly) to 1/k (every token of some domain takes the same k experts). A
    domain without assignments is left out. Average it over layers.

    Args:
        load: as for ``domain_information``.

    Source: Qiu et al. 2025, arXiv:2501.11873, Fig. 1. There freq(E|D) counts per token of the domain, which is k times
    this share.

    Examples:
        >>> max_domain_share(torch.tensor([[30, 10], [50, 50]]))
        tensor(0.7500, dtype=torch.float64)
    """
    counts = _by_domain(load)
    total = counts.sum(-1, keepdim=True)
    share = counts / total.clamp_min(1)
    return torch.where((total > 0).any(0).squeeze(-1), share.amax((0, -1)), math.nan)
