"""Specialisation against known values: by hand, by plain loops, at chance."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise
from equipoise_lab.analysis import (
    coactivation,
    domain_distances,
    domain_information,
    information_by_level,
    mean_domain_distance,
    router_saturation,
    selection_frequency,
    typical_tokens,
    vocabulary_specialisation,
)

counts = st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=2, max_size=5).filter(
    lambda rows: all(map(sum, rows))
)


def _chosen(tokens, experts, k, seed=0, weights=None):
    generator = np.random.default_rng(seed)
    return np.stack([generator.choice(experts, k, replace=False, p=weights) for _ in range(tokens)])


def _load(ids, experts):
    return np.bincount(ids.reshape(-1), minlength=experts)


# ---- by domain ----


def test_experts_that_split_by_domain_reveal_it_completely():
    load = np.kron(np.eye(8, dtype=np.int64), np.full((1, 2), 500))  # two experts to each of eight domains
    information, share = domain_information(load)
    assert information.value == pytest.approx(3.0, abs=0.01) and share == pytest.approx(1.0, abs=0.004)
    assert information.stands_out and information.chance == 0
    distance = mean_domain_distance(load)
    assert distance.value == 1.0 and distance.stands_out
    frequency, chance = selection_frequency(load, load.sum(-1), 1)
    assert frequency.max() == 0.5 and chance == 1 / 16


@pytest.mark.parametrize("seed", range(5))
def test_experts_that_ignore_the_domain_reveal_nothing(seed):
    load = np.stack([_load(_chosen(600, 16, 2, seed=10 * seed + d), 16) for d in range(6)])
    information, share = domain_information(load)
    assert abs(information.value) < 0.02 and abs(share) < 0.01
    assert information.value < 1.5 * information.bound and 0 < information.bound < 0.02
    distance = mean_domain_distance(load)
    assert 0 < distance.value < 1.2 * distance.bound, "the distance of a finite sample at chance stays near its bound"


def test_five_in_a_hundred_samples_at_chance_exceed_the_bound():
    generator = np.random.default_rng(5)
    share = generator.dirichlet(np.ones(8))
    passed = {domain_information: 0, mean_domain_distance: 0}
    for _ in range(200):
        load = generator.multinomial(400, share, size=4)
        for statistic in passed:
            measured = statistic(load)
            passed[statistic] += (measured[0] if isinstance(measured, tuple) else measured).stands_out
    for number in passed.values():
        assert 1 <= number <= 24  # of 200 with a probability of 0.05 and of the bound's own draw


@settings(max_examples=60, deadline=None)
@given(counts)
def test_domain_information_equals_that_of_the_metrics(rows):
    expected = float(equipoise.metrics.domain_information(torch.tensor(rows)))
    assert domain_information(np.array(rows))[0].value == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(counts)
def test_distances_are_a_metric_and_equal_the_loop(rows):
    result = domain_distances(np.array(rows))
    assert (np.diag(result) == 0).all() and np.array_equal(result, result.T) and (result <= 1).all()
    for a, b in itertools.combinations(range(len(rows)), 2):
        p, q = ([x / sum(row) for x in row] for row in (rows[a], rows[b]))
        m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        both = sum(x * math.log2(x / z) for r in (p, q) for x, z in zip(r, m, strict=True) if x) / 2
        assert result[a, b] == pytest.approx(math.sqrt(max(both, 0)), abs=1e-7)
    for a, b, c in itertools.permutations(range(len(rows)), 3):
        assert result[a, c] <= result[a, b] + result[b, c] + 1e-9


def test_frequencies_of_a_domain_sum_to_k():
    ids = _chosen(100, 6, 3)
    frequency, chance = selection_frequency(_load(ids, 6)[None], np.array([100]), 3)
    assert frequency.sum() == pytest.approx(3) and chance == 0.5
    assert frequency[0, 2] == (ids == 2).any(1).mean()


# ---- together ----


def test_coactivation_equals_the_loop_and_sums_to_k():
    ids = _chosen(200, 5, 3, weights=[0.4, 0.3, 0.1, 0.1, 0.1])
    result = coactivation(ids, 5)
    for i, j in itertools.product(range(5), repeat=2):
        with_i = [row for row in ids.tolist() if i in row]
        assert result[i, j] == pytest.approx(sum(j in row for row in with_i) / len(with_i))
    assert result.sum(1) == pytest.approx(np.full(5, 3.0))


def test_coactivation_of_fixed_pairs_and_of_an_unused_expert():
    result = coactivation(np.array([[0, 1]] * 4 + [[2, 3]] * 4), 5)
    assert result[:2, :2].tolist() == [[1, 1], [1, 1]] and result[0, 2] == 0
    assert np.isnan(result[4]).all()


def test_coactivation_at_chance():
    result = coactivation(_chosen(20_000, 8, 3), 8)
    off = result[~np.eye(8, dtype=bool)]
    assert off == pytest.approx(np.full(56, 2 / 7), abs=0.03)


# ---- over training ----


def test_saturation_by_hand_and_at_chance():
    one, same, other = _chosen(4000, 16, 4, 1), _chosen(4000, 16, 4, 1)[:, ::-1], _chosen(4000, 16, 4, 2)
    assert router_saturation(one, same, 16).value == 1.0  # whatever the order
    result = router_saturation(one, other, 16)
    assert result.chance == 0.25 and abs(result.value - 0.25) < 0.02
    by_hand = np.mean([len({*a} & {*b}) / 4 for a, b in zip(one.tolist(), other.tolist(), strict=True)])
    assert result.value == pytest.approx(by_hand)
    assert router_saturation(one[:, :1], (one[:, :1] + 1) % 16, 16).value == 0


def test_five_in_a_hundred_saturations_at_chance_exceed_the_bound():
    passed = sum(
        router_saturation(_chosen(60, 6, 2, 2 * s), _chosen(60, 6, 2, 2 * s + 1), 6).stands_out for s in range(300)
    )
    assert 4 <= passed <= 30


# ---- by token ----


def test_typical_tokens_are_ordered_by_their_share():
    seen = np.array([100, 100, 100, 5])
    load = np.array([[90, 10], [50, 50], [20, 80], [5, 0]])
    assert vocabulary_specialisation(load, seen).tolist() == [[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]
    first, second = typical_tokens(load, seen)
    assert [token.token_id for token in first] == [0] and [token.token_id for token in second] == [2, 1]
    assert first[0].count == 90 and first[0].share == 0.9
    assert first[0].lift == pytest.approx(0.9 / (165 / 305))
    assert [token.token_id for token in typical_tokens(load, seen, fewest=1)[0]] == [3, 0]
    assert len(typical_tokens(load, seen, most=1)[1]) == 1


def test_a_token_that_never_occurs_has_no_share():
    assert np.isnan(vocabulary_specialisation(np.array([[0, 0]]), np.array([0]))).all()
    assert typical_tokens(np.array([[0, 0]]), np.array([0])) == [[], []]


# ---- invalid arguments ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: domain_information(np.ones(3, int)),
            r"must hold integers of at least 0, of shape \(domains, experts\)",
        ),
        (lambda: domain_information(np.ones((2, 3))), "got float64"),
        (lambda: domain_distances(np.array([[1, -1]])), "at least 0"),
        (lambda: domain_distances(np.array([[1, 1], [0, 0]])), r"rows \[1\] have none"),
        (lambda: selection_frequency(np.array([[3, 1]]), np.array([3]), 1), "must hold k = 1 assignments per token"),
        (lambda: coactivation(np.array([[0, 0]]), 2), "names one of them twice"),
        (lambda: coactivation(np.array([[0, 5]]), 2), r"must lie in 0 ... 1: got 0 ... 5"),
        (lambda: router_saturation(np.array([[0, 1]]), np.array([[0]]), 3), "for the same tokens"),
        (lambda: vocabulary_specialisation(np.array([[3, 0]]), np.array([2])), "must be at least every count"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_information_by_level_adds_up_and_goes_to_the_level_that_has_it():
    even, first, second = [100, 100, 100, 100], [400, 0, 0, 0], [0, 400, 0, 0]
    levels = {"script": ["L", "L", "L", "H"], "language": ["en", "en", "fr", "zh"]}
    by_script = np.array([first, first, first, second]) * 100
    result = information_by_level(by_script, levels)
    # H(1/4) = 0.8113 bits; nothing is left for the other levels
    assert result["script"].value == pytest.approx(0.8113, abs=1e-3) and result["script"].stands_out
    assert result["language"].value == pytest.approx(0, abs=1e-3) == result["domain"].value
    by_language = np.array([first, first, second, second]) * 100
    result = information_by_level(by_language, levels)
    # script: 1 - 3/4 H(1/3) = 1 - 0.75 * 0.9183; script and language together: 1 bit
    assert result["script"].value == pytest.approx(1 - 0.75 * 0.9183, abs=1e-3)
    assert result["language"].value == pytest.approx(0.75 * 0.9183, abs=1e-3)
    assert result["domain"].value == pytest.approx(0, abs=1e-3)
    by_genre = np.array([first, second, even, even]) * 100
    result = information_by_level(by_genre, levels)
    # en's two domains differ: half of the text, H(mean of both) - 0 = 1 bit
    assert result["domain"].value == pytest.approx(0.5, abs=1e-3)
    total, _ = domain_information(by_genre)
    assert sum(part.value for part in result.values()) == pytest.approx(total.value)


def test_information_by_level_of_chance_stays_below_its_bound():
    generator = np.random.default_rng(3)
    counts = np.stack([generator.multinomial(3000, [0.25, 0.25, 0.4, 0.1]) for _ in range(6)])
    result = information_by_level(counts, {"script": "LLLLHH", "language": ["a", "a", "b", "b", "c", "c"]})
    assert list(result) == ["script", "language", "domain"]
    assert all(abs(part.value) < 2e-3 and part.bound < 2e-3 for part in result.values())


@pytest.mark.parametrize("levels", [{"script": "LL"}, {"domain": "LLL"}])
def test_levels_must_have_one_label_per_domain(levels):
    with pytest.raises(ValueError, match="must have one label per domain, and must not be called 'domain'"):
        information_by_level(np.ones((3, 4), int), levels)
