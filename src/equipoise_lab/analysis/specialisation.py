"""What experts specialise in, from counts: by domain, by token, jointly, and over training. Imports no torch.

Every function takes one layer. Average over layers for a model.

A finite sample shows some specialisation even if there is none. So a statistic comes as ``Measured``: its value, its
value at chance, and the bound that 95 of 100 samples of this size stay below at chance. Tokens of a text are not
independent, so the true bound is higher: a value below ``bound`` shows nothing, and one just above it little.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "Measured",
    "Typical",
    "coactivation",
    "coactivation_of",
    "domain_distances",
    "domain_information",
    "information_by_level",
    "mean_domain_distance",
    "partners",
    "rank_load",
    "router_saturation",
    "selection_frequency",
    "typical_tokens",
    "vocabulary_specialisation",
]

Counts = Int[np.ndarray, "domains experts"]
Samples = Int[np.ndarray, "*samples domains experts"]
DRAWS = 200  # random samples at chance
RANKS = (2, 4, 8, 16, 32, 64)  # numbers of expert-parallel ranks


@dataclass(frozen=True)
class Measured:
    """A statistic of a sample.

    ``chance`` is its value for infinitely many tokens if the choice of experts is independent of what is measured.
    ``bound`` is the value that 95 % of samples of this size stay below in that case.
    """

    value: float
    chance: float
    bound: float

    @property
    def stands_out(self) -> bool:
        return bool(self.value > self.bound)


def _check(load: Counts, name: str = "load") -> Int[np.ndarray, "domains experts"]:
    counts = np.asarray(load)
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(
            f"{name} must hold integers of at least 0, of shape (domains, experts): got {counts.dtype} of shape "
            f"{counts.shape}. Pass one layer at a time."
        )
    if not (counts.sum(-1) > 0).all():
        empty = np.flatnonzero(counts.sum(-1) == 0).tolist()
        raise ValueError(f"{name} must have at least one assignment per domain: rows {empty} have none. Drop them.")
    return counts.astype(np.int64)


def _at_chance(counts: Counts, statistic: Callable[[Samples], Any], seed: int = 0) -> Any:
    """The 95 % quantile of ``statistic`` (one number or several of each sample) if every domain draws its experts from
    the same distribution."""
    num_tokens = counts.sum(-1)
    share = counts / num_tokens[:, None]
    samples = np.random.default_rng(seed).multinomial(num_tokens, share.mean(0), size=(DRAWS, len(counts)))
    return np.quantile(statistic(samples), 0.95, axis=0)


def selection_frequency(
    load: Counts, tokens: Int[np.ndarray, " domains"], k: int
) -> tuple[Float[np.ndarray, "domains experts"], float]:
    """freq(E|D), the share of domain D's tokens that have expert E among their k, and its value at chance, k/E.

    Range 0 to 1. The frequencies of a domain sum to k. With N tokens, its standard deviation at chance is
    ``sqrt(p (1 - p) / N)``, p = k/E.
    Source: Qiu et al. 2025, arXiv:2501.11873, Fig. 1b; OLMoE, arXiv:2409.02060, Eq. 7.

    >>> selection_frequency(np.array([[30, 10]]), np.array([40]), k=1)
    (array([[0.75, 0.25]]), 0.5)
    """
    counts, tokens = _check(load), np.asarray(tokens)
    if tokens.shape != counts.shape[:1] or (counts.sum(-1) != k * tokens).any():
        raise ValueError(
            f"load must hold k = {k} assignments per token: got {counts.sum(-1).tolist()} assignments of "
            f"{tokens.tolist()} tokens by domain. Pass the tokens that load was counted on."
        )
    return counts / tokens[:, None], k / counts.shape[1]


def _information(
    counts: Samples, labels: Sequence[Hashable] | None = None
) -> Float[np.ndarray, "*samples"] | np.float64:
    """I(label; expert) in bits, with equal weight for every domain. By default each domain is its own label."""
    n = counts.sum(-1)
    share, num_domains = counts / n[..., None], counts.shape[-2]

    def entropy(rows: list[int]) -> Float[np.ndarray, "*samples"]:
        """In nats, of the mean distribution of some domains, Miller-Madow corrected for its effective sample size."""
        p = share[..., rows, :].mean(-2)
        is_used = p > 0
        effective_size = len(rows) ** 2 / (1 / n[..., rows]).sum(-1)
        of_shares = -(p * np.log(p, where=is_used, out=np.zeros_like(p))).sum(-1)
        return np.asarray(of_shares + (is_used.sum(-1) - 1) / (2 * effective_size))

    domains_by_label: dict[Hashable, list[int]] = {}
    for domain, label in enumerate(range(num_domains) if labels is None else labels):
        domains_by_label.setdefault(label, []).append(domain)
    within = sum(len(rows) * entropy(rows) for rows in domains_by_label.values()) / num_domains
    return (entropy(list(range(num_domains))) - within) / math.log(2)


def domain_information(load: Counts) -> tuple[Measured, float]:
    """I(domain; expert) in bits, with equal weight for every domain, and its share of the maximum, log2(domains).

    Same formula as ``equipoise.metrics.domain_information`` (Miller-Madow corrected). Range about 0 to log2(domains),
    chance 0; the share is 0 to 1.

    >>> information, share = domain_information(np.array([[900, 100], [100, 900]]))
    >>> round(information.value, 2), round(share, 2), information.stands_out
    (0.53, 0.53, True)
    """
    counts = _check(load)
    value = float(_information(counts))
    maximum = math.log2(len(counts))
    measured = Measured(value, 0.0, float(_at_chance(counts, _information)))
    return measured, value / maximum if maximum else 0.0


def information_by_level(load: Counts, levels: Mapping[str, Sequence[Hashable]]) -> dict[str, Measured]:
    """``domain_information`` split by level, such as script and language: the bits each level adds to coarser ones.

        I_j = I((l_1, ..., l_j); expert) - I((l_1, ..., l_(j-1)); expert)

    ``levels`` maps each level to a label per domain, the coarsest level first. A last level, ``"domain"``, is added for
    the rest. Experts that separate Chinese from Latin letters know the script. This proves nothing about language, and
    even less about genre.

    The values sum to ``domain_information``. Range about 0 to log2(domains), chance 0. Source: the chain rule (Cover
    and Thomas, Elements of Information Theory, 2.5).

    >>> load = np.array([[900, 100], [900, 100], [100, 900]])
    >>> split = information_by_level(load, {"script": ["Latin", "Latin", "Han"]})
    >>> {level: round(abs(bits.value), 2) for level, bits in split.items()}
    {'script': 0.48, 'domain': 0.0}
    """
    counts = _check(load)
    for level, labels in levels.items():
        if len(labels) != len(counts) or level == "domain":
            raise ValueError(
                f"A level must have one label per domain, and must not be called 'domain': got {len(labels)} labels "
                f"of level {level!r} for {len(counts)} domains."
            )
    joint_labels = [tuple(zip(*list(levels.values())[: depth + 1], strict=True)) for depth in range(len(levels))]

    def bits_added(samples: Samples) -> Float[np.ndarray, "*samples levels"]:
        cumulative = [*(_information(samples, labels) for labels in joint_labels), _information(samples)]
        return np.diff(np.stack(cumulative, axis=-1), prepend=0.0)

    names, bounds = [*levels, "domain"], _at_chance(counts, bits_added)
    return {
        level: Measured(float(value), 0.0, float(bound))
        for level, value, bound in zip(names, bits_added(counts), bounds, strict=True)
    }


def _distances(counts: Counts) -> Float[np.ndarray, "domains domains"]:
    share = counts / counts.sum(-1, keepdims=True)
    first, second = share[:, None], share[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        to_middle = np.where(first > 0, first * np.log2(first / ((first + second) / 2)), 0.0).sum(-1)
    return np.sqrt(np.clip((to_middle + to_middle.T) / 2, 0, 1))


def domain_distances(load: Counts) -> Float[np.ndarray, "domains domains"]:
    """The Jensen-Shannon distance between the expert distributions of any two domains: the root of the divergence in
    bits.

        d(p, q) = sqrt((KL(p || m) + KL(q || m)) / 2),   m = (p + q) / 2

    Range 0 (same experts) to 1 (no expert in common); a metric. ``mean_domain_distance`` has the bound at chance.
    Source: Endres and Schindelin 2003, IEEE Trans. Inf. Theory 49, 1858-1860.

    >>> domain_distances(np.array([[10, 0], [0, 10], [5, 5]])).round(3)
    array([[0.   , 1.   , 0.558],
           [1.   , 0.   , 0.558],
           [0.558, 0.558, 0.   ]])
    """
    return _distances(_check(load))


def _mean_distance(counts: Counts) -> float:
    num = len(counts)
    return float(_distances(counts).sum() / (num * (num - 1))) if num > 1 else 0.0


def mean_domain_distance(load: Counts) -> Measured:
    """The mean of ``domain_distances`` over pairs of domains. Chance 0, reached only with infinitely many tokens."""
    counts = _check(load)

    def distances(samples: Samples) -> list[float]:  # one by one: all at once take memory by pairs of domains
        return [_mean_distance(sample) for sample in samples]

    return Measured(_mean_distance(counts), 0.0, float(_at_chance(counts, distances)))


def coactivation(expert_ids: Int[np.ndarray, "tokens k"], num_experts: int) -> Float[np.ndarray, "experts experts"]:
    """Row i, column j: of the tokens that chose expert i, the share that also chose j. The diagonal is 1.

    Not symmetric. Range 0 to 1. Off the diagonal a row sums to k - 1, and each entry is ``(k - 1) / (E - 1)`` at chance
    and even load. The row of an expert without tokens is nan. Source: OLMoE, arXiv:2409.02060, Eq. 6.

    >>> coactivation(np.array([[0, 1], [0, 1], [0, 2]]), 3).round(2)
    array([[1.  , 0.67, 0.33],
           [1.  , 1.  , 0.  ],
           [1.  , 0.  , 1.  ]])
    """
    ids = _check_ids(expert_ids, num_experts)
    chosen = np.zeros((len(ids), num_experts), np.int64)
    np.put_along_axis(chosen, ids, 1, axis=1)
    return coactivation_of(chosen.T @ chosen)


def coactivation_of(together: Int[np.ndarray, "experts experts"]) -> Float[np.ndarray, "experts experts"]:
    """``coactivation`` from token counts: entry (i, j) counts tokens that chose both i and j, (i, i) those that chose
    i."""
    counts = np.asarray(together)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or (counts > np.diag(counts)[:, None]).any():
        raise ValueError(
            f"together must be square, and no entry may exceed the diagonal of its row: got shape {counts.shape}."
        )
    with np.errstate(invalid="ignore"):
        return counts / np.diag(counts)[:, None].astype(float)


def partners(together: Int[np.ndarray, "experts experts"], most: int = 8) -> list[list[tuple[int, float]]]:
    """For each expert, the other experts that its tokens choose most often, and the share of its tokens that do.

    These are the largest entries in its row of ``coactivation_of``; each is (k - 1) / (E - 1) at chance. The list of an
    expert without tokens is empty.

    >>> partners(np.array([[4, 3, 1], [3, 3, 0], [1, 0, 1]]), most=1)
    [[(1, 0.75)], [(0, 1.0)], [(0, 1.0)]]
    """
    share = np.nan_to_num(coactivation_of(together))
    np.fill_diagonal(share, 0)
    order = np.argsort(-share, axis=1, kind="stable")[:, :most]
    return [
        [(int(other), float(share[expert, other])) for other in others if share[expert, other] > 0]
        for expert, others in enumerate(order)
    ]


def _check_ids(expert_ids: Int[np.ndarray, "tokens k"], num_experts: int) -> Int[np.ndarray, "tokens k"]:
    ids = np.asarray(expert_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"expert_ids must be integers of shape (tokens, k): got {ids.dtype} of shape {ids.shape}.")
    if ids.size and (ids.min() < 0 or ids.max() >= num_experts):
        raise ValueError(f"expert_ids must lie in 0 ... {num_experts - 1}: got {ids.min()} ... {ids.max()}.")
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("expert_ids must name k different experts per token: a token names one of them twice.")
    return ids


def router_saturation(
    earlier: Int[np.ndarray, "tokens k"], later: Int[np.ndarray, "tokens k"], num_experts: int
) -> Measured:
    """Of the experts that tokens chose at one checkpoint, the share that they still choose at a later one.

    Both checkpoints must have read the same text.

        (1 / N) sum_t |E_t(earlier) ∩ E_t(later)| / k

    Range 0 to 1; chance k/E. Source: OLMoE, arXiv:2409.02060, Section 5.1.

    >>> router_saturation(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 4]]), 8).value
    0.75
    """
    first, second = _check_ids(earlier, num_experts), _check_ids(later, num_experts)
    if first.shape != second.shape or not len(first):
        raise ValueError(
            f"Both checkpoints must hold choices for the same tokens: got shapes {first.shape} and {second.shape}."
        )
    num_tokens, k = first.shape
    shared = (first[:, :, None] == second[:, None, :]).sum((1, 2))
    chance = k / num_experts
    # |A ∩ B| of independent k-subsets is hypergeometric, with variance k p (1 - p) (E - k) / (E - 1)
    sd = math.sqrt(k * chance * (1 - chance) * (num_experts - k) / max(num_experts - 1, 1) / num_tokens) / k
    return Measured(float(shared.mean() / k), chance, chance + 1.645 * sd)


def vocabulary_specialisation(
    load: Int[np.ndarray, "vocabulary experts"], num_occurrences: Int[np.ndarray, " vocabulary"]
) -> Float[np.ndarray, "vocabulary experts"]:
    """Of the occurrences of token id x, the share that chose expert E: ``N_(x,E) / N_x``.

    ``load`` counts assignments by token id. Range 0 to 1; chance k/E at even load. Ids that do not occur are nan.
    Source: OLMoE, arXiv:2409.02060, Eq. 8, with x the input token.

    >>> vocabulary_specialisation(np.array([[4, 0], [1, 3]]), np.array([4, 4]))
    array([[1.  , 0.  ],
           [0.25, 0.75]])
    """
    counts, occurrences = np.asarray(load), np.asarray(num_occurrences)
    if counts.ndim != 2 or occurrences.shape != counts.shape[:1] or (counts > occurrences[:, None]).any():
        raise ValueError(
            "load must have one row per token id, and num_occurrences must be at least every count of that row: got "
            f"shapes {counts.shape} and {occurrences.shape}."
        )
    with np.errstate(invalid="ignore"):
        return counts / occurrences[:, None].astype(float)


@dataclass(frozen=True)
class Typical:
    """A token that an expert gets more often than tokens on average.

    ``lift`` is the token's share of the expert's tokens over its share of all tokens: 1 means no preference.
    """

    token_id: int
    share: float  # of its occurrences that chose the expert
    lift: float
    count: int  # of its occurrences that chose the expert


def typical_tokens(
    load: Int[np.ndarray, "vocabulary experts"],
    num_occurrences: Int[np.ndarray, " vocabulary"],
    *,
    most: int = 10,
    fewest: int = 8,
) -> list[list[Typical]]:
    """For each expert its ``most`` most typical tokens, by the share of their occurrences that chose it, then by count.

    Ids that occur fewer than ``fewest`` times are left out, because their share is mostly chance. So are ids that chose
    the expert no more often than the average token.

    >>> [[t.token_id for t in expert] for expert in typical_tokens(np.array([[9, 0], [2, 7]]), np.array([9, 9]))]
    [[0], [1]]
    """
    share = vocabulary_specialisation(load, num_occurrences)
    counts, occurrences = np.asarray(load), np.asarray(num_occurrences)
    total = occurrences.sum()
    by_expert = []
    for expert in range(counts.shape[1]):
        average = counts[:, expert].sum() / max(total, 1)
        ids = np.flatnonzero((occurrences >= fewest) & (counts[:, expert] > average * occurrences))
        ordered = ids[np.lexsort((ids, -counts[ids, expert], -share[ids, expert]))][:most]
        by_expert.append(
            [
                Typical(int(x), float(share[x, expert]), float(share[x, expert] / average), int(counts[x, expert]))
                for x in ordered
            ]
        )
    return by_expert


def rank_load(load: Sequence[int], ranks: int) -> float | None:
    """The busiest rank's load over the mean load, with consecutive experts on each of ``ranks`` expert-parallel ranks.

    All ranks wait for the busiest one: at 1.3, a layer's experts take 1.3 times as long as with an even load. None if
    ``ranks`` does not divide the number of experts, or if nothing was assigned.

    >>> rank_load([3, 1, 2, 2], 2), rank_load([3, 3, 1, 1], 2), rank_load([1, 1], 4)
    (1.0, 1.5, None)
    """
    counts = np.asarray(load)
    if len(counts) % ranks or not counts.sum():
        return None
    by_rank = counts.reshape(ranks, -1).sum(1)
    return float(by_rank.max() / by_rank.mean())
