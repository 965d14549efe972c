import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import equipoise
from equipoise.load import expert_load
from equipoise.metrics import (
    coefficient_of_variation,
    dead_experts,
    domain_information,
    effective_experts,
    load_entropy,
    max_domain_share,
    max_violation,
    min_violation,
    sampling_floor,
)
from equipoise.routing import route

# metric: (reference, value at [4, 2, 2, 0], at balance, when one of four experts takes all)
METRICS = {
    max_violation: (reference.max_violation, 1.0, 0.0, 3.0),
    min_violation: (reference.min_violation, -1.0, 0.0, -1.0),
    coefficient_of_variation: (reference.coefficient_of_variation, 2**-0.5, 0.0, 3**0.5),
    load_entropy: (reference.normalised_entropy, 0.75, 1.0, 0.0),  # 1.5 ln 2 / ln 4
    effective_experts: (reference.effective_experts, 2**1.5, 4.0, 1.0),
    dead_experts: (reference.dead_experts, 1.0, 0.0, 3.0),
}
metrics = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)


def _loads(*shape, seed=0):
    return torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(seed))


def _f64(value):
    return torch.tensor(value, dtype=torch.float64)


@metrics
def test_metric_by_hand(metric):
    _, uneven, even, collapse = METRICS[metric]
    for load, expected in (([4, 2, 2, 0], uneven), ([3, 3, 3, 3], even), ([0, 9, 0, 0], collapse)):
        assert_close(metric(torch.tensor(load)), _f64(expected), rtol=1e-12, atol=1e-12)


@metrics
def test_metric_equals_the_reference_and_keeps_leading_dimensions(metric):
    load = _loads(3, 2, 9)
    load[1, 1, 4] = 0
    values = metric(load)
    assert values.shape == (3, 2) and values.dtype == torch.float64
    for i in range(3):
        for j in range(2):
            assert_close(values[i, j], _f64(float(METRICS[metric][0](load[i, j].tolist()))), rtol=1e-12, atol=1e-12)


@metrics
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_metric_is_independent_of_the_order_of_experts_and_of_a_common_factor(metric, seed):
    load = _loads(7, seed=seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert_close(metric(load[order]), metric(load), rtol=1e-12, atol=1e-12)
    assert_close(metric(load * 12345), metric(load), rtol=1e-9, atol=1e-9)  # std of large numbers cancels


@metrics
def test_metric_of_a_mapping_is_the_mean_over_its_layers(metric):
    load = {"a": torch.tensor([4, 2, 2, 0]), "b": torch.tensor([3, 3, 3, 3]), "c": torch.tensor([1, 1])}
    values = [float(metric(layer)) for layer in load.values()]
    expected = sum(values) if metric is dead_experts else sum(values) / 3
    assert_close(metric(load), _f64(expected), rtol=1e-12, atol=1e-12)


def test_dead_experts_of_a_mapping_is_a_sum():
    assert dead_experts({"a": torch.tensor([4, 0, 0]), "b": torch.tensor([0, 1])}) == 3


@metrics
def test_metric_of_a_load_without_tokens_is_nan(metric):
    assert metric(torch.zeros(4, dtype=torch.int64)).isnan()
    values = metric(torch.tensor([[0, 0], [1, 1]]))
    assert values[0].isnan() and not values[1].isnan()
    assert metric({"a": torch.tensor([0, 0]), "b": torch.tensor([1, 1])}).isnan()


@metrics
def test_metric_of_one_expert(metric):
    even = {max_violation: 0.0, min_violation: 0.0, coefficient_of_variation: 0.0, load_entropy: 1.0}
    value = metric(torch.tensor([5]))
    assert value == even.get(metric, 1.0 if metric is effective_experts else 0.0)
    assert value.dtype == torch.float64
    assert metric(torch.tensor([0])).isnan()


@metrics
def test_metric_is_exact_for_counts_beyond_float32(metric):
    load = torch.tensor([2**40 + 1, 2**40 - 1, 2**40, 2**40])
    expected = METRICS[metric][0](load.tolist())
    assert_close(metric(load), _f64(float(expected)), rtol=0, atol=1e-15 if metric is max_violation else 1e-11)


@metrics
@pytest.mark.parametrize(
    ("load", "message"),
    [
        (torch.tensor(3), r"shape \(\.\.\., experts\), experts > 0: got \(\)"),
        (torch.zeros(2, 0), r"experts > 0: got \(2, 0\)"),
        ({}, "load must hold at least one layer"),
        (torch.tensor([5, -1, 2]), "load must hold counts, 0 or more: got -1"),
    ],
    ids=["scalar", "no-experts", "no-layers", "negative"],
)
def test_metric_refuses_bad_input(metric, load, message):
    with pytest.raises(ValueError, match=message):
        metric(load)


def test_every_metric_tells_an_even_router_from_a_skewed_one():
    logits = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    skewed = expert_load(route(logits + torch.tensor([2.0] + [0.0] * 7), 2).expert_ids, 8)
    even = expert_load(route(logits, 2).expert_ids, 8)
    assert max_violation(skewed) > 1 > 0.15 > max_violation(even)
    assert coefficient_of_variation(skewed) > coefficient_of_variation(even)
    assert min_violation(skewed) < min_violation(even)
    assert load_entropy(skewed) < load_entropy(even) and effective_experts(skewed) < effective_experts(even)


# ---- the floor ----


@pytest.mark.parametrize(("experts", "m"), [(8, 1.42), (32, 2.07), (64, 2.34), (256, 2.83)])
def test_sampling_floor_has_the_documented_constants(experts, m):
    # k = E/2 and one token: sqrt((1/2) / (1/2)) = 1
    of_sum = math.sqrt(experts / (experts - 1))
    assert round(sampling_floor(1, experts // 2, experts) / of_sum, 2) == m
    expected = reference.expected_maximum(experts) * of_sum
    assert sampling_floor(1, experts // 2, experts) == pytest.approx(expected, rel=1e-5)


def test_sampling_floor_by_hand():
    # two experts deviate by |Z| one way and the other: E|Z| = sqrt(2/pi), times 1/10
    assert sampling_floor(100, 1, 2) == pytest.approx(0.1 * math.sqrt(2 / math.pi), rel=1e-5)
    # m(3) = 3/(2 sqrt(pi)), sqrt(3/2); 2 of 8 experts and 300 tokens: sqrt((3/4) / 75) = 1/10, sqrt(8/7)
    assert sampling_floor(50, 1, 3) == pytest.approx(1.5 / math.sqrt(math.pi) * math.sqrt(1.5) * 0.2, rel=1e-5)
    assert sampling_floor(300, 2, 8) == pytest.approx(reference.expected_maximum(8) / 10 * math.sqrt(8 / 7), rel=1e-5)
    assert sampling_floor(300, 8, 8) == 0
    assert sampling_floor(0, 2, 8) == math.inf


@pytest.mark.parametrize("tokens", [100, 1000])
def test_sampling_floor_of_two_experts_is_the_mean_of_all_outcomes(tokens):
    """n of N tokens choose the first expert with the probability C(N, n) / 2^N; then MaxVio is |2n - N| / N."""
    outcomes = (math.comb(tokens, n) * abs(2 * n - tokens) for n in range(tokens + 1))
    exact = float(Fraction(sum(outcomes), tokens * 2**tokens))
    assert sampling_floor(tokens, 1, 2) == pytest.approx(exact, rel=1 / tokens)  # normal to the order 1 / (4 N)


@pytest.mark.parametrize(("tokens", "k", "experts"), [(4096, 1, 2), (4096, 2, 3), (4096, 2, 8), (4096, 4, 32)])
def test_sampling_floor_is_the_mean_violation_of_an_even_router(tokens, k, experts):
    generator, windows = torch.Generator().manual_seed(0), 200
    violations = []
    for _ in range(windows):
        ids = torch.rand(tokens, experts, generator=generator).topk(k).indices
        violations.append(float(max_violation(expert_load(ids, experts))))
    mean, sigma = statistics.mean(violations), statistics.stdev(violations) / math.sqrt(windows)
    # a normal maximum is right to the order of the counts' skewness, about 1/sqrt(512) of a standard deviation
    assert mean == pytest.approx(sampling_floor(tokens, k, experts), abs=4 * sigma, rel=0.01)


@pytest.mark.parametrize("k", [0, 9, 1.5])
def test_sampling_floor_refuses_an_impossible_k(k):
    message = f"k must be an integer between 1 and the number of experts: got k={k}, num_experts=8"
    with pytest.raises(ValueError, match=message):
        sampling_floor(10, k, 8)


def test_sampling_floor_without_tokens_and_with_all_experts():
    assert sampling_floor(0, 2, 8) == sampling_floor(0, 8, 8) == math.inf
    assert str(sampling_floor(5, 8, 8)) == str(sampling_floor(5, 1, 1)) == "0.0"
    for tokens in (-3, math.nan):
        with pytest.raises(ValueError, match="num_tokens must be 0 or more"):
            sampling_floor(tokens, 1, 8)


def test_metrics_take_lists_and_arrays():
    for load in ([4, 2, 2, 0], np.array([4, 2, 2, 0])):
        assert float(max_violation(load)) == 1.0
    assert float(max_domain_share([[3, 1], [2, 2]])) == 0.75


# ---- domains ----


def test_domain_information_by_hand():
    # see reference._self_check: 1 bit + 1/16 nats; 1.5 - (3/4) log2 3 bits - 3/64 nats
    assert_close(domain_information(torch.tensor([[4, 0], [0, 0], [0, 4]])), _f64(1 + 1 / 16 / math.log(2)))
    expected = 1.5 - 0.75 * math.log2(3) - 3 / 64 / math.log(2)
    assert_close(domain_information(torch.tensor([[1, 1], [8, 0]])), _f64(expected))


def test_domain_information_equals_the_reference_for_every_layer():
    load = _loads(5, 3, 16) ** 2
    load[2, 1] = 0  # a domain that one layer never saw
    load[:, 2, 3] = 0  # an expert that nobody uses
    information = domain_information(load)
    assert information.shape == (3,)
    for layer in range(3):
        expected = reference.domain_information(load[:, layer].tolist())
        assert_close(information[layer], _f64(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("domains", [2, 4, 8])
def test_domain_information_of_an_exact_split_is_log2_of_the_domains(domains):
    load = torch.eye(domains, dtype=torch.int64) * 10**9
    assert_close(domain_information(load), _f64(math.log2(domains)), rtol=0, atol=1e-6)  # correction: E / 2n


def test_domain_information_of_independent_choices_is_zero_within_its_noise():
    generator, corrected, plain = torch.Generator().manual_seed(0), [], []
    for _ in range(50):
        ids = torch.rand(8, 2000, 32, generator=generator).topk(2).indices
        load = torch.stack([expert_load(domain, 32) for domain in ids])
        corrected.append(float(domain_information(load)))
        plain.append(reference.domain_information_plugin(load.tolist()))
    # uncorrected it is (D-1)(E-1)/(2 n D) nats = 0.005 bits; the rest is noise of 50 draws
    assert sum(plain) / 50 > 3e-3
    assert abs(sum(corrected) / 50) < 5e-4


def test_domains_weigh_equally_however_many_tokens_they_have():
    rows = torch.tensor([[600, 300, 100], [100, 300, 600]]) * 10**6
    uneven = rows * torch.tensor([[1], [1000]])
    assert_close(domain_information(uneven), domain_information(rows), rtol=0, atol=1e-5)  # the corrections differ


def test_a_domain_without_tokens_is_left_out():
    rows = torch.tensor([[60, 30, 10], [10, 30, 60]])
    empty = torch.zeros(1, 3, dtype=torch.int64)
    assert_close(domain_information(torch.cat([rows[:1], empty, rows[1:]])), domain_information(rows))
    assert domain_information(torch.zeros(2, 3, dtype=torch.int64)).isnan()
    assert_close(domain_information(rows[:1]), _f64(0.0))


@pytest.mark.parametrize("metric", [domain_information, max_domain_share])
@pytest.mark.parametrize(
    ("load", "message"),
    [
        (torch.tensor([1, 2, 3]), r"\(domains, \.\.\., experts\), none of them 0: got \(3,\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"none of them 0: got \(0, 3\)"),
        (torch.tensor([[0.5, 0.5], [0.1, 0.9]]), "counts, integers: got torch.float32"),
        (torch.tensor([[3, -1], [2, 2]]), "0 or more: got -1"),
    ],
    ids=["one-row", "no-domain", "shares", "negative"],
)
def test_metrics_of_domains_refuse_bad_input(metric, load, message):
    with pytest.raises(ValueError, match=message):
        metric(load)


def test_max_domain_share_by_hand():
    assert max_domain_share(torch.tensor([[3, 1], [0, 0], [50, 50]])) == 0.75
    assert max_domain_share(torch.full((3, 8), 7)) == 1 / 8  # even
    assert max_domain_share(torch.eye(4, dtype=torch.int64)) == 1  # an expert for each
    assert max_domain_share(torch.tensor([[9, 0, 0, 0]] * 2)) == 1  # one expert takes all: share, not specialisation


def test_max_domain_share_equals_the_reference_for_every_layer():
    load = _loads(5, 3, 16) ** 2
    load[2, 1] = 0
    load[:, 2] = 0  # a layer without tokens
    shares = max_domain_share(load)
    assert shares.shape == (3,) and shares.dtype == torch.float64
    for layer in range(3):
        assert_close(shares[layer], _f64(reference.max_domain_share(load[:, layer].tolist())), equal_nan=True)
    assert shares[2].isnan() and not shares[:2].isnan().any()


def test_max_domain_share_is_independent_of_expert_order_and_domain_size():
    load, generator = _loads(5, 16), torch.Generator().manual_seed(1)
    share = max_domain_share(load)
    assert_close(max_domain_share(load[:, torch.randperm(16, generator=generator)]), share)
    assert_close(max_domain_share(load * torch.tensor([1, 10, 100, 3, 7])[:, None]), share)


def test_max_domain_share_is_larger_if_choices_depend_on_the_domain():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2000, 8, generator=generator)
    favour = 3 * torch.eye(4, 8)[:, None]
    plain, favoured = (
        torch.stack([expert_load(route(domain, 2).expert_ids, 8) for domain in x]) for x in (logits, logits + favour)
    )
    assert 1 / 8 < max_domain_share(plain) < 0.15
    assert 0.4 < max_domain_share(favoured) <= 0.5  # a token takes two different experts


@pytest.mark.parametrize("metric", [max_violation, equipoise.metrics.load_entropy, domain_information])
def test_metrics_compile_as_one_graph_and_take_unsigned_counts(metric):
    load = torch.tensor([[30, 10], [50, 50]])
    expected = metric(load)
    assert_close(torch.compile(metric, backend="aot_eager", fullgraph=True)(load), expected)
    assert_close(metric(load.to(torch.uint8)), expected)
    if metric is not domain_information:
        assert_close(torch.vmap(metric)(load), expected)
