import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from equipoise import Quantile
from equipoise.balancers import LayerStack
from equipoise.balancers.quantile import _Bins, _from_histogram, _gain, _margins, edges
from equipoise.load import expert_load
from equipoise.metrics import max_violation, sampling_floor
from equipoise.routing import SCORE_FUNCTIONS, Routing, route


def _prepared(bias, k=2, score_function="sigmoid", **options):
    balancer = Quantile(**options)
    balancer.prepare(LayerStack(score_function, k, bias))
    return balancer


def _logits(tokens, experts, seed=0, skew=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, dtype=dtype, generator=generator) + skew * torch.linspace(1, -1, experts).to(
        dtype
    )


def _step(balancer, logits, k=2, score_function="sigmoid", mask=None, parts=1):
    """One window of one layer, cut into ``parts`` calls."""
    bias, experts = balancer.bias()[0], logits.shape[-1]
    load, statistic = torch.zeros(experts, dtype=torch.int64), []
    masks = [None] * parts if mask is None else mask.chunk(parts)
    for part, part_mask in zip(logits.chunk(parts), masks, strict=True):
        routing = route(part, k, score_function=score_function, bias=bias, mask=part_mask)
        load += expert_load(routing.expert_ids, experts, part_mask)
        statistic.append(balancer.statistic(routing, 0))
    pooled = torch.cat(statistic) if balancer.gathers else sum(statistic)
    balancer.update(load[None], [pooled])
    return load


def test_the_exact_bias_by_hand():
    # ten times each of four tokens; half-way .55 .65 .4 .5; lacking, expert 0: -.35 -.15 -.3 -.1, expert 1: up.
    # 40 and 0 of 20: v = 10, S = 800, by chance 20 (1 + 3 sqrt 2) = 104.9, so 1 - .131 = .869 of the way: the 40 - 17.4
    # = 22.6th and the 17.4th smallest, from 0, -.15 and .15. The median, the lower of two, is -.15
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.5], [0.7, 0.1], [0.6, 0.4]], dtype=torch.float64).repeat(10, 1)
    balancer = _prepared(torch.zeros(1, 2, dtype=torch.float64), k=1, bins=0)
    _step(balancer, scores.logit(), k=1)
    assert_close(balancer.bias()[0], torch.tensor([0.0, 0.3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("counts", "k"), [([40, 10, 25, 25], 1), ([55, 15, 15, 15], 1), ([30, 20, 25, 25], 1), ([25] * 4, 2), ([0] * 4, 1)]
)
def test_the_gain_equals_the_reference(counts, k):
    expected = reference.quantile_gain(counts, k, sum(counts) / k)
    assert_close(_gain(torch.tensor([counts]), k)[0].tolist(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("experts", "k", "tokens"), [(8, 1, 512), (64, 8, 1024), (256, 8, 1024)])
def test_an_even_router_hardly_ever_moves_a_bias(experts, k, tokens):
    generator, windows = torch.Generator().manual_seed(0), 100
    ids = (torch.rand(tokens, experts, generator=generator).topk(k).indices for _ in range(windows))
    moved = sum(bool(_gain(expert_load(chosen, experts)[None], k).any()) for chosen in ids)
    assert moved <= 5  # 3 of its own standard deviations: below 1 % of windows, 1.2 % with 8 experts


def test_a_single_dead_expert_of_many_moves_at_once():
    """In the sum over 256 experts it is lost in chance; its own count is not."""
    load = torch.full((1, 256), 32)
    load[0, 7] = 0
    gain = _gain(load, 1)[0]
    assert gain[7] > 0.4 and not gain[:7].any() and not gain[8:].any()


@pytest.mark.parametrize("bins", [0, 128])
@pytest.mark.parametrize(("experts", "spread", "tokens"), [(256, 10.0, 2048), (64, 20.0, 4096)])
def test_a_peaked_router_that_is_even_stays_even(bins, experts, spread, tokens):
    """The scores from the ninth on are below 1e-5 or 1e-12: a move that is small beside others decides many tokens."""
    generator = torch.Generator().manual_seed(0)
    balancer, history = _prepared(torch.zeros(1, experts), k=8, score_function="softmax", bins=bins), []
    for _ in range(12):
        logits = spread * torch.randn(tokens, experts, generator=generator)
        history.append(float(max_violation(_step(balancer, logits, k=8, score_function="softmax"))))
    assert max(history) < 1.5 * sampling_floor(tokens, 8, experts), history


@pytest.mark.parametrize("bins", [0, 128])
def test_a_skewed_peaked_router_becomes_even_and_stays_so(bins):
    """With the threshold at the (k + 1)-th score, experts with too few tokens wait and those with too many sink
    together: even after five windows, worse and worse after ten."""
    generator = torch.Generator().manual_seed(1)
    preference = 1.5 * torch.randn(64, generator=generator)
    balancer, history = _prepared(torch.zeros(1, 64), k=1, score_function="softmax", bins=bins), []
    for _ in range(20):
        logits = 3 * torch.randn(4096, 64, generator=generator) + preference
        history.append(float(max_violation(_step(balancer, logits, k=1, score_function="softmax"))))
    assert history[0] > 5, "the input is not skewed: the test proves nothing"
    assert sum(history[-5:]) / 5 < 2 * sampling_floor(4096, 1, 64), history


def test_an_expert_with_a_large_bias_takes_no_resolution_from_the_others():
    """The first needs -1. Less the mean, the others would be at 1/16, where float32 has steps of 4e-9; the tokens that
    they compete for have scores down to 1e-12."""
    generator = torch.Generator().manual_seed(0)
    balancer, history = _prepared(torch.zeros(1, 16), k=4, score_function="softmax"), []
    for _ in range(14):
        logits = 10 * torch.randn(2048, 16, generator=generator)
        logits[:, 0] += 20
        history.append(float(max_violation(_step(balancer, logits, k=4, score_function="softmax"))))
    assert balancer.bias()[0, 0] < -0.9 and balancer.bias().median() == 0
    assert sum(history[-4:]) / 4 < 0.3, history


@pytest.mark.parametrize("bins", [0, 128])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("skew", [0.5, 1.5])
def test_a_router_with_expert_groups_becomes_even(bins, score_function, skew):
    """An expert that is among the k best of all is not chosen if its group is closed: what counts is the load. By the
    number of tokens whose threshold it passes, the bias stops where MaxVio is up to 0.66."""
    generator, experts, k = torch.Generator().manual_seed(0), 64, 6
    preference = skew * torch.randn(experts, generator=generator)
    balancer, history = _prepared(torch.zeros(1, experts), k, score_function, bins=bins), []
    for _ in range(20):
        logits, bias = torch.randn(4096, experts, generator=generator) + preference, balancer.bias()[0]
        options = dict(score_function=score_function, bias=bias, num_groups=8, top_groups=4)
        routing = route(logits, k, **options)
        load = expert_load(routing.expert_ids, experts)
        balancer.update(load[None], [balancer.statistic(routing, 0)])
        history.append(float(max_violation(load)))
    assert history[0] > 3, "the input is not skewed: the test proves nothing"
    assert sum(history[-5:]) / 5 < 1.5 * sampling_floor(4096, k, experts), history


@pytest.mark.parametrize("num_groups", [1, 4])
def test_margins_are_those_of_the_k_best_of_all(num_groups):
    """On a CPU they are read from the choice; where expert groups limit it, and on accelerators, by a top-k."""
    routing = route(
        _logits(200, 8, seed=2), 3, score_function="sigmoid", num_groups=num_groups, top_groups=1 + num_groups // 2
    )
    bias = 0.1 * _logits(1, 8, seed=3)[0]
    expected = reference.margins(routing.scores.tolist(), 3, bias.tolist())
    chosen = (routing.scores + bias).topk(3).indices if num_groups == 1 else routing.expert_ids
    assert_close(
        _margins(routing.scores, chosen, bias), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_margins_next_to_zero_do_not_move_a_bias():
    """Below 2^-61 the grid cannot tell margins apart, and a step across the bin would pass all of them."""
    histogram = torch.zeros(1, 128, 4, dtype=torch.int64)
    for expert, index in enumerate((63, 64, 62, 65)):
        histogram[0, index, expert] = 100
    to_the_middle = torch.tensor([[-0.5, 0.5, -0.5, 0.5]]).double()  # tokens that it lacks, by token
    margin = _from_histogram(histogram, to_the_middle, edges(128))[0][0]
    assert margin[:2].tolist() == [0.0, 0.0]
    assert 2.0**-60 <= margin[3] <= 2.0**-59 and -(2.0**-59) <= margin[2] <= -(2.0**-60)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_exact_equals_the_reference(score_function, masked, dtype, atol):
    logits, start = _logits(50, 6, skew=3.0), 0.1 * _logits(1, 6, seed=1)
    mask = (torch.arange(50) % 4 > 0).double() if masked else None
    flags = None if mask is None else mask.tolist()
    for ema in (0.0, 0.7):
        expected = reference.quantile_rule(
            reference.scores(logits.tolist(), score_function), 2, start[0].tolist(), flags, ema
        )
        balancer = _prepared(start.to(dtype), score_function=score_function, bins=0, ema=ema)
        _step(balancer, logits.to(dtype), score_function=score_function, mask=mask, parts=2)
        assert_close(balancer.bias()[0], torch.tensor(expected, dtype=dtype), rtol=0, atol=atol)
        assert not torch.equal(balancer.bias()[0], start[0].to(dtype)), "nothing moved: the test proves nothing"


@pytest.mark.parametrize("bins", [128, 256, 1024])
def test_edges_equal_the_reference(bins):
    assert_close(edges(bins), torch.tensor(reference.histogram_edges(bins), dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("bins", [128, 256])
def test_every_margin_falls_into_its_bin(bins):
    edge, index_of = edges(bins), _Bins.on(torch.device("cpu"), bins).of
    inside = (edge[1:] + edge[:-1]) / 2
    assert torch.equal(index_of(inside), torch.arange(bins))
    assert torch.equal(index_of(edge[:-1]), torch.arange(bins))  # a lower edge belongs to it
    on_accelerators = _Bins.on(torch.device("cpu"), bins).inner
    numbers = torch.randn(10000, generator=torch.Generator().manual_seed(0)).mul_(3).exp2()
    many = torch.cat([numbers, -numbers, edge.float(), torch.tensor([math.nan, math.inf, -math.inf, -0.0, -1e-40])])
    assert torch.equal(index_of(many), torch.bucketize(many, on_accelerators, right=True))
    far = torch.tensor([-math.inf, -1e9, -0.0, 0.0, 1e-30, 1e9, math.inf])
    assert index_of(far).tolist() == [0, 0, bins // 2, bins // 2, bins // 2, bins - 1, bins - 1]


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("bins", [128, 256])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_histogram_and_its_bias_equal_the_reference(score_function, bins, dtype, atol):
    logits, start = _logits(60, 5, seed=3, skew=3.0), 0.1 * _logits(1, 5, seed=4)
    mask = (torch.arange(60) % 5 > 0).double()
    scores = reference.scores(logits.tolist(), score_function)
    counts = reference.quantile_histogram(scores, 2, start[0].tolist(), mask.tolist(), bins)
    balancer = _prepared(start.to(dtype), score_function=score_function, bins=bins, ema=0.3)
    routing = route(logits.to(dtype), 2, score_function=score_function, bias=start[0].to(dtype), mask=mask)
    histogram = balancer.statistic(routing, 0)
    if dtype == torch.float64:
        assert histogram.T.tolist() == counts
    expected = reference.quantile_from_histogram(histogram.T.tolist(), 2, 48, start[0].tolist(), ema=0.3)
    _step(balancer, logits.to(dtype), score_function=score_function, mask=mask, parts=3)
    assert_close(balancer.bias()[0], torch.tensor(expected, dtype=dtype), rtol=0, atol=atol)
    assert not torch.equal(balancer.bias()[0], start[0].to(dtype)), "nothing moved: the test proves nothing"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), score_function=st.sampled_from(SCORE_FUNCTIONS), k=st.integers(1, 5))
def test_the_histogram_is_within_its_bins_of_the_exact_bias(seed, score_function, k):
    logits, start = 2 * _logits(200, 6, seed), 0.1 * _logits(1, 6, seed + 1)
    found = []
    for bins in (0, 256):
        balancer = _prepared(start.clone(), k, score_function, bins=bins)
        _step(balancer, logits, k, score_function)
        found.append(balancer.bias()[0])
    # bins are half an octave wide at most; the mean adds as much again
    widest = 0.5 * float((found[0] - start[0]).abs().max()) + 2**-12
    assert_close(found[1], found[0], rtol=0, atol=2 * widest)


@pytest.mark.parametrize("bins", [0, 128])
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_a_skewed_router_is_even_within_a_few_windows(bins, score_function):
    balancer, history = _prepared(torch.zeros(1, 16), score_function=score_function, bins=bins), []
    for window in range(8):
        load = _step(
            balancer, _logits(4096, 16, seed=window, skew=3.0, dtype=torch.float32), score_function=score_function
        )
        history.append(float(max_violation(load)))
    assert history[0] > 2, "the input is not skewed: the test proves nothing"
    assert max(history[5:]) < 0.25, history  # floor 0.07


@pytest.mark.parametrize("bins", [0, 128, 256])
@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
def test_a_peaked_softmax_router_becomes_even_too(bins, spread):
    """Most of its scores are below 1e-6, and their order decides where a token goes that the best experts refuse."""
    balancer = _prepared(torch.zeros(1, 64), score_function="softmax", bins=bins)
    logits, history = spread * _logits(4096, 64, seed=0, dtype=torch.float32), []
    for _ in range(30):
        history.append(float(max_violation(_step(balancer, logits, score_function="softmax"))))
    assert sum(history[-5:]) / 5 < 0.25, history


@pytest.mark.parametrize("bins", [0, 128])
def test_the_bias_does_not_depend_on_how_tokens_are_dealt(bins):
    logits, mask = _logits(64, 4, seed=7), (torch.arange(64) % 3 > 0).double()
    found = []
    for order, parts in ((torch.arange(64), 1), (torch.arange(64).flip(0), 4)):
        balancer = _prepared(torch.zeros(1, 4, dtype=torch.float64), bins=bins, fraction=0.5)
        _step(balancer, logits[order], mask=mask[order], parts=parts)
        found.append(balancer.bias())
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("bins", [0, 128])
def test_a_fraction_is_a_random_subset_of_about_its_size_and_no_prefix(bins):
    logits = _logits(4000, 8, seed=9, dtype=torch.float32)
    balancer = _prepared(torch.zeros(1, 8), bins=bins, fraction=0.25)
    routing = route(logits, 2, score_function="sigmoid")
    if bins == 0:
        drawn = balancer.statistic(routing, 0)[:, 0].isfinite()
    else:
        drawn = torch.tensor(
            [int(balancer.statistic(Routing(*(x[i : i + 1] for x in routing[:4])), 0)[:, 0].sum()) for i in range(400)]
        ).bool()
    size = len(drawn)
    sigma = math.sqrt(0.25 * 0.75 / (size / 2))
    for half in (drawn[: size // 2], drawn[size // 2 :]):
        assert abs(float(half.double().mean()) - 0.25) < 4 * sigma
    # independent of what is chosen: the drawn tokens' loads are like all tokens'
    pairs = (drawn[1:] & drawn[:-1]).double().mean()
    assert abs(float(pairs) - 0.0625) < 0.05


@pytest.mark.parametrize("bins", [0, 128])
def test_without_tokens_or_with_k_of_all_experts_nothing_moves(bins):
    start = torch.tensor([[0.3, -0.1, 0.1]])
    balancer = _prepared(start, k=1, bins=bins)
    _step(balancer, _logits(5, 3), k=1, mask=torch.zeros(5))
    assert torch.equal(balancer.bias(), start)
    _step(balancer, _logits(0, 3), k=1)
    assert torch.equal(balancer.bias(), start)
    for experts in (1, 3):
        balancer = _prepared(start[:, :experts].clone(), k=experts, bins=bins)
        assert balancer.statistic(route(_logits(5, experts), experts, score_function="sigmoid"), 0) is None
        balancer.update(torch.full((1, experts), 5))
        assert torch.equal(balancer.bias(), start[:, :experts])


@pytest.mark.parametrize("bins", [0, 128])
def test_ties_and_dead_experts_give_finite_biases(bins):
    balancer = _prepared(torch.zeros(1, 4), bins=bins)
    for _ in range(3):
        _step(balancer, torch.zeros(8, 4))
        assert balancer.bias().isfinite().all()
    _step(balancer, torch.tensor([[80.0, 80.0, -80.0, -80.0]]).expand(8, 4))
    assert balancer.bias().isfinite().all()
    assert balancer.bias()[0, 2] > balancer.bias()[0, 0]


def test_counts_beyond_float32_are_exact():
    histogram = torch.zeros(1, 128, 2, dtype=torch.int64)
    histogram[0, 3], histogram[0, 20] = 2**40 + 1, 2**40 - 1  # half of all lies one beyond the edge of bin 3
    found, number = _from_histogram(histogram, torch.full((1, 2), -0.5).double(), edges(128))
    assert number.tolist() == [[2**41] * 2]
    lower, upper = edges(128)[3:5].tolist()
    assert_close(found[0, 0].item(), lower + (upper - lower) * 2**40 / (2**40 + 1), rtol=1e-15, atol=0)


def test_bad_input_is_refused():
    balancer = _prepared(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="must have the statistic of its calls"):
        balancer.update(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="one int64 count per expert"):
        balancer.update(torch.ones(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("bins", [0, 128])
def test_logits_that_are_not_finite_leave_no_trace_in_the_bias(bins):
    balancer = _prepared(torch.zeros(1, 4), bins=bins)
    logits = _logits(64, 4, dtype=torch.float32)
    broken = logits.clone()
    broken[:40, 2] = math.nan
    _step(balancer, broken)
    assert bins or balancer.bias().isfinite().all()
    for _ in range(3):
        _step(balancer, logits)
    assert balancer.bias().isfinite().all()
