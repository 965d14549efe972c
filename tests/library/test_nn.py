"""Router and MoE equal a loop over tokens and experts: with and without capacity, compiled, and attached."""

import math
import textwrap
from copy import deepcopy

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import equipoise
from equipoise import EquipoiseError, attach
from equipoise.nn import MoE, Router, grouped
from equipoise.nn.grouped import _block_mm
from equipoise.routers import RouterKind
from equipoise.routers.find import find_routers
from equipoise.routers.prove import prove

SLOT = "e_score_correction_bias"


def _moe(*sizes, seed=0, std=0.4, dtype=torch.float32, **options):
    """A layer whose weights are large enough for every expert and every path of the gradient to show."""
    moe = MoE(*sizes, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    moe.router.e_score_correction_bias.copy_(0.1 * torch.randn(moe.router.num_experts, generator=generator))
    return moe


def _hidden(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def _mlp(x, gate_up, down):
    width = down.shape[0]
    gate, up = x @ gate_up[:, :width], x @ gate_up[:, width:]
    return (gate / (1 + torch.exp(-gate)) * up) @ down


def _loop(moe, hidden):
    """The layer as a loop over tokens and experts; and the dropped assignments as (token, expert)."""
    router, x = moe.router, hidden.reshape(-1, hidden.shape[-1])
    logits = x @ router.weight.T
    ids, _ = reference.route(
        logits.detach().double().tolist(),
        router.k,
        router.score_function,
        router.e_score_correction_bias.double().tolist(),
        router.num_groups,
        router.top_groups,
    )
    score_functions = {
        "softmax": lambda z: z.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrt_softplus": lambda z: F.softplus(z).sqrt(),
    }
    scores = score_functions[router.score_function](logits)
    room = (
        math.inf if moe.capacity_factor is None else math.ceil(moe.capacity_factor * len(x) * router.k / len(moe.down))
    )
    taken, dropped, rows = [0] * len(moe.down), [], []
    for t in range(len(x)):
        total = sum(scores[t, e] for e in ids[t]) if router.renormalise else 1.0
        row = torch.zeros_like(x[t])
        for e in ids[t]:
            taken[e] += 1
            if taken[e] > room:
                dropped.append((t, e))
                continue
            row = row + router.scale * scores[t, e] / total * _mlp(x[t], moe.gate_up[e], moe.down[e])
        if moe.shared_hidden:
            row = row + _mlp(x[t], moe.shared_gate_up, moe.shared_down)
        rows.append(row)
    return torch.stack(rows).view(hidden.shape), dropped


def _gradients(output, moe, hidden):
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output.dtype)
    names, tensors = zip(*moe.named_parameters(), ("hidden", hidden), strict=True)
    found = torch.autograd.grad((output * probe).sum(), tensors, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for name, tensor, gradient in zip(names, tensors, found, strict=True)
    }


LAYERS = {
    "sigmoid": ((16, 8, 6, 2), {}),
    "softmax": ((16, 8, 6, 2), {"score_function": "softmax", "renormalise": False}),
    "sqrt_softplus": ((16, 8, 6, 3), {"score_function": "sqrt_softplus", "scale": 2.5}),
    "odd_sizes": ((6, 5, 7, 3), {}),
    "shared": ((16, 8, 6, 2), {"num_shared": 2}),
    "shared_hidden": ((16, 8, 6, 2), {"num_shared": 2, "shared_hidden": 4}),
    "groups": ((16, 8, 8, 3), {"num_groups": 4, "top_groups": 2}),
    "top_1": ((16, 8, 6, 1), {}),
    "all_experts": ((16, 8, 4, 4), {}),
    "one_expert": ((16, 8, 1, 1), {"score_function": "softmax"}),
    "more_experts_than_assignments": ((16, 8, 64, 1), {}),
    "capacity": ((16, 8, 6, 2), {"capacity_factor": 0.7, "num_shared": 1}),
    "capacity_odd_sizes": ((6, 5, 7, 3), {"capacity_factor": 1.0, "score_function": "softmax"}),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_layer_and_its_gradients_are_those_of_a_loop(layer, dtype, tolerance):
    sizes, options = LAYERS[layer]
    moe, hidden = _moe(*sizes, dtype=dtype, **options), _hidden(3, 7, sizes[0], dtype=dtype)
    ours, (theirs, dropped) = moe(hidden), _loop(moe, hidden)
    assert ours.shape == hidden.shape and ours.dtype == dtype
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert moe.num_dropped == len(dropped) and bool(dropped) == (moe.capacity_factor is not None)
    ours, theirs = _gradients(ours, moe, hidden), _gradients(theirs, moe, hidden)
    assert ours.keys() == {*dict(moe.named_parameters()), "hidden"}
    for name in ours:
        assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance * 10, msg=name)
        assert theirs[name].any() or layer == "one_expert", f"{name} has no gradient: the test proves nothing"


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 3, 2, 16)])
def test_tokens_may_have_any_shape(shape):
    moe, hidden = _moe(16, 8, 6, 2, num_shared=1), _hidden(*shape)
    output = moe(hidden)
    assert_close(output, _loop(moe, hidden)[0], rtol=1e-5, atol=1e-5)
    assert output._base is None, "FSDP2 warns of a module that returns a view"
    assert moe(hidden.transpose(0, -1).contiguous().transpose(0, -1)).shape == shape  # not contiguous


def test_two_tokens_worked_by_hand():
    """sigmoid(1) = 0.731059; silu(1) = 0.731059, silu(2) = 1.761594, silu(-1) = -0.268941."""
    moe = MoE(1, 1, 2, 1, num_shared=1, scale=2.0)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        moe.gate_up.copy_(torch.tensor([[[1.0, 2.0]], [[-2.0, 1.0]]]))
        moe.down.copy_(torch.tensor([[[3.0]], [[1.0]]]))
        moe.shared_gate_up.copy_(torch.tensor([[1.0, 1.0]]))
        moe.shared_down.copy_(torch.tensor([[10.0]]))
    # x = 1:  expert 0, 2 * 0.731059 * (0.731059 * 2) * 3 = 6.413361; shared 0.731059 * 1 * 10 = 7.310586
    # x = -1: expert 1, 2 * 0.731059 * (1.761594 * -1) * 1 = -2.575657; shared -0.268941 * -1 * 10 = 2.689414
    assert_close(moe(torch.tensor([[1.0], [-1.0]])), torch.tensor([[13.723947], [0.113757]]), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "load", [[5, 5, 5], [15, 0, 0], [0, 0, 15], [0, 15, 0], [1, 13, 1], [6, 0, 9], [2, 0, 0], [0, 0, 1], [0, 0, 0], [7]]
)
def test_blocks_multiply_every_row_with_its_expert(load):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(load), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(load), 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = _block_mm(x, weight, torch.tensor(load, dtype=torch.int32).cumsum(0, dtype=torch.int32))
    theirs = torch.cat([rows @ matrix for rows, matrix in zip(x.split(load), weight, strict=True)])
    assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (ours, theirs)), strict=True):
        assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_blocks_are_enough_for_every_load():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        num_rows, num_experts = torch.randint(1, 20, (2,), generator=generator).tolist()
        skew = torch.randn(num_experts, generator=generator).mul(2).softmax(-1)
        ids = torch.multinomial(skew, num_rows, replacement=True, generator=generator).sort().values
        x, weight = torch.randn(num_rows, 2, generator=generator), torch.randn(num_experts, 2, 3, generator=generator)
        ends = torch.tensor([int((ids <= e).sum()) for e in range(num_experts)], dtype=torch.int32)
        assert_close(_block_mm(x, weight, ends), torch.einsum("tn,tnm->tm", x, weight[ids]), rtol=1e-5, atol=1e-6)


@pytest.fixture
def products(monkeypatch):
    """The dtypes of the products that torch's kernel made."""
    seen, kernel = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda x, *args, **kwargs: seen.append(x.dtype) or kernel(x, *args, **kwargs))
    return seen


@pytest.mark.parametrize(
    ("sizes", "dtype", "calls"),
    [
        ((16, 8, 6, 2), torch.float32, 2),
        ((16, 8, 6, 2), torch.bfloat16, 2),
        ((16, 8, 6, 2), torch.float16, 2),
        ((16, 8, 6, 2), torch.float64, 0),
        ((6, 5, 6, 2), torch.float32, 0),
        ((12, 8, 6, 2), torch.bfloat16, 0),
    ],
)
def test_torchs_kernel_is_used_where_it_exists(products, sizes, dtype, calls):
    moe, hidden = _moe(*sizes, dtype=dtype), _hidden(5, sizes[0], dtype=dtype)
    moe(hidden).sum().backward()
    assert products == [dtype] * calls


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_no_tokens_give_no_output_and_gradients_of_zero(shape, dtype, capacity_factor):
    moe = _moe(16, 8, 6, 2, num_shared=1, capacity_factor=capacity_factor, dtype=dtype)
    hidden = _hidden(*shape, dtype=dtype)
    output = moe(hidden)
    assert output.shape == shape and moe.num_dropped == 0
    output.sum().backward()
    assert all(not parameter.grad.any() for parameter in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_expert_without_a_token_has_gradient_zero(dtype):
    moe, hidden = _moe(16, 8, 6, 2, dtype=dtype), _hidden(9, 16, dtype=dtype)
    moe.router.e_score_correction_bias[3] = -9.0
    moe(hidden).square().sum().backward()
    for parameter in (moe.gate_up, moe.down):
        assert not parameter.grad[3].any() and parameter.grad[:3].any() and parameter.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.7, "num_shared": 1}], ids=str)
def test_gradients_can_be_differentiated(options):
    moe, hidden = _moe(4, 3, 4, 2, dtype=torch.float64, **options), _hidden(5, 4, dtype=torch.float64)
    names, parameters = zip(*moe.named_parameters(), strict=True)

    def layer(x, *values):
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(layer, (hidden, *parameters))
    assert torch.autograd.gradgradcheck(layer, (hidden, *parameters))


def test_two_runs_are_equal_bit_for_bit():
    moe, hidden = _moe(16, 8, 6, 2, num_shared=1), _hidden(50, 16)
    first, second = (_gradients(moe(hidden), moe, hidden) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- capacity ----


def _routed(choices, num_experts, **options):
    """A layer whose router makes these choices: token t chooses ``choices[t]``; and its input."""
    moe = _moe(8, 8, num_experts, len(choices[0]), **options)
    moe.router.e_score_correction_bias.zero_()
    hidden = F.pad(torch.eye(len(choices)), (0, 8 - len(choices)))
    with torch.no_grad():
        moe.router.weight.fill_(-1.0)
        for t, chosen in enumerate(choices):
            for rank, e in enumerate(chosen):
                moe.router.weight[e, t] = 2.0 - rank
    assert moe.router(hidden)[2].tolist() == choices
    return moe, hidden


def test_assignments_beyond_the_capacity_are_dropped_but_counted():
    """Expert 0 has places for ceil(1.0 * 5 * 1 / 2) = 3 of the 4 tokens that choose it: token 4 gets nothing."""
    moe, hidden = _routed([[0], [0], [1], [0], [0]], 2, capacity_factor=1.0)
    plain = deepcopy(moe)
    plain.capacity_factor = None
    balance = attach(moe)
    output = moe(hidden)
    balance.step()
    assert balance.load["router"].tolist() == [4, 1], "the choice is counted, not what is left of it"
    assert moe.num_dropped == 1 and moe.num_dropped.dtype == torch.int64 and moe.num_dropped.shape == ()
    assert torch.equal(output[:4], plain(hidden)[:4]) and output[:4].any(-1).all()
    assert not output[4].any()


def test_a_dropped_assignment_leaves_the_other_experts_of_its_token_unchanged():
    """C = ceil(0.75 * 4 * 2 / 3) = 2. Expert 1 takes tokens 0 and 1, though token 3 would have it first."""
    choices = [[0, 1], [2, 1], [2, 0], [1, 2]]
    moe, hidden = _routed(choices, 3, capacity_factor=0.75, num_shared=1)
    _, weights, _ = moe.router(hidden)
    output = moe(hidden)
    assert moe.capacity(4) == 2 and moe.num_dropped == 2  # token 3 comes too late for both of its experts
    for t, chosen in enumerate(choices):
        expected = _mlp(hidden[t], moe.shared_gate_up, moe.shared_down)
        if t < 3:
            parts = [_mlp(hidden[t], moe.gate_up[e], moe.down[e]) for e in chosen]
            expected = expected + weights[t, 0] * parts[0] + weights[t, 1] * parts[1]
        assert_close(output[t], expected, rtol=1e-5, atol=1e-6)
    moe.capacity_factor, moe._capacity_ratio = 1.0, (1, 1)  # C = 3: nobody is late
    assert moe(hidden)[3].sub(output[3]).any() and moe.num_dropped == 0
    moe, hidden = _routed([[0, 1], [0, 2], [0, 3], [1, 0]], 4, capacity_factor=1.0)
    output, (_, weights, _) = moe(hidden), moe.router(hidden)
    assert moe.num_dropped == 2  # C = 2: tokens 2 and 3 keep their other expert, with the weight they had
    assert_close(output[2], weights[2, 1] * _mlp(hidden[2], moe.gate_up[3], moe.down[3]), rtol=1e-5, atol=1e-6)
    assert_close(output[3], weights[3, 0] * _mlp(hidden[3], moe.gate_up[1], moe.down[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "experts", "capacity"),
    [
        (1.0, 10, 2, 8, 3),
        (1.25, 64, 1, 8, 10),
        (1.1, 100, 1, 10, 11),
        (1 / 3, 9, 1, 1, 3),
        (2, 4, 2, 4, 4),
        (0.1, 1, 1, 8, 1),
        (1.0, 0, 1, 8, 0),
        (1e-8, 100, 1, 8, 1),
    ],
)
def test_capacity_is_a_ratio_rounded_up(factor, tokens, k, experts, capacity):
    assert MoE(4, 4, experts, k, capacity_factor=factor).capacity(tokens) == capacity


def test_capacity_for_every_token_drops_nothing():
    hidden = _hidden(20, 16)
    dropless, roomy = (_moe(16, 8, 6, 2, capacity_factor=factor) for factor in (None, 3.0))
    assert torch.equal(dropless(hidden), roomy(hidden)) and roomy.num_dropped == 0
    assert dropless.capacity(20) == roomy.capacity(20) == 20


def test_num_dropped_counts_the_last_forward():
    moe = _moe(16, 8, 6, 2, capacity_factor=0.5)
    first = [moe(_hidden(20, 16, seed=seed)) is not None and int(moe.num_dropped) for seed in (1, 2, 1, 2)]
    assert first[0] > 0 and first[:2] == first[2:] and first[0] != first[1]
    moe.eval()
    with torch.inference_mode():
        moe(_hidden(20, 16, seed=1).detach())
    assert moe.num_dropped == first[0], "evaluation drops too"
    assert "num_dropped" not in moe.state_dict()


def test_dropped_assignments_have_no_gradient():
    moe, hidden = _routed([[0], [0], [1], [0], [0]], 2, capacity_factor=1.0)
    hidden.requires_grad_()
    moe(hidden).square().sum().backward()
    assert not hidden.grad[4].any() and hidden.grad[:4].any(-1).all()
    assert not moe.router.weight.grad[:, 4].any() and moe.router.weight.grad[:, :4].any()


# ---- precision ----


def test_under_autocast_the_experts_compute_in_bfloat16_and_the_router_in_float32(products):
    moe, hidden = _moe(16, 8, 6, 2, num_shared=1), _hidden(30, 16)
    expected, routed = moe(hidden), moe.router(hidden)
    products.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output, routed_too = moe(hidden), moe.router(hidden)
        assert moe(hidden.bfloat16()).dtype == torch.bfloat16
    assert products == [torch.bfloat16] * 4
    assert all(torch.equal(a, b) for a, b in zip(routed, routed_too, strict=True))
    assert output.dtype == torch.float32 and not torch.equal(output, expected)
    assert_close(output, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))  # bfloat16 rounds to 0.4 %
    output.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in moe.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        double = _moe(16, 8, 6, 2, dtype=torch.float64)
        assert_close(double(hidden.double()), _loop(double, hidden.double())[0], rtol=1e-12, atol=1e-12)


def test_a_bfloat16_layer_routes_in_float32():
    moe, hidden = _moe(16, 8, 6, 2, num_shared=1, dtype=torch.bfloat16), _hidden(30, 16, dtype=torch.bfloat16)
    logits, weights, _ = moe.router(hidden)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, hidden.float() @ moe.router.weight.float().T)
    wide = deepcopy(moe).float()
    output, expected = moe(hidden), wide(hidden.float())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))


def test_the_outputs_of_bfloat16_experts_are_summed_in_float32():
    """Eight experts that are the same, with weights of 1/8, are one; bfloat16 would round the sums on the way."""
    one, eight = (_moe(16, 8, n, n, score_function="softmax", dtype=torch.bfloat16) for n in (1, 8))
    with torch.no_grad():
        eight.router.weight.zero_()
        eight.gate_up.copy_(one.gate_up.expand(8, -1, -1))
        eight.down.copy_(one.down.expand(8, -1, -1))
    hidden = _hidden(30, 16, dtype=torch.bfloat16)
    expected = one(hidden)
    assert torch.equal(eight(hidden), expected)
    assert not torch.equal(sum([expected / 8] * 8), expected), "the test could not fail"
    summed = torch.autograd.grad(eight(hidden), hidden, expected)[0]
    assert torch.equal(summed, torch.autograd.grad(one(hidden), hidden, expected)[0])


def test_bfloat16_experts_round_a_few_times_only():
    """The distance from the layer in float64: a rounding to bfloat16 is off by 0.17 % in the mean square, and on the
    way to an output there are about eight."""
    moe, hidden = (
        _moe(64, 32, 8, 3, score_function="softmax", dtype=torch.bfloat16),
        _hidden(500, 64, dtype=torch.bfloat16),
    )
    wide, wide_hidden = deepcopy(moe).double(), hidden.detach().double().requires_grad_()
    expected = wide(wide_hidden)
    found = moe(hidden)
    ours, theirs = _gradients(found, moe, hidden), _gradients(expected, wide, wide_hidden)
    for name, a, b in [("output", found, expected), *((name, ours[name], theirs[name]) for name in ours)]:
        assert (a.double() - b).norm() < 0.0085 * b.norm(), name


@pytest.fixture
def rows(monkeypatch):
    """How many rows of every product the experts have."""
    seen = []
    product = grouped._grouped_mm

    def watch(x, weight, ends):
        seen.append(ends.diff(prepend=ends.new_zeros(1)).tolist())
        assert seen[-1] and sum(seen[-1]) == len(x)
        return product(x, weight, ends)

    monkeypatch.setattr(grouped, "_grouped_mm", watch)
    return seen


def _sparse(dtype, tokens=70):
    """A layer of which experts 3 and 5 get nothing, and its input."""
    moe, hidden = _moe(16, 8, 6, 2, capacity_factor=1.2, dtype=dtype), _hidden(tokens, 16, dtype=dtype)
    moe.router.e_score_correction_bias[[3, 5]] = -10
    return moe, hidden


def _both(moe, hidden, monkeypatch):
    found = moe(hidden)
    monkeypatch.setattr(grouped, "_needs_padding", lambda *_: False)
    expected = moe(hidden)
    return (found, _gradients(found, moe, hidden)), (expected, _gradients(expected, moe, hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products_pad_their_rows_and_give_the_same_result(dtype, rows, monkeypatch):
    moe, hidden = _sparse(dtype)
    (found, ours), (expected, theirs) = _both(moe, hidden, monkeypatch)
    loads = rows[-1]
    assert rows[0] == [-(-load // grouped.ROW_MULTIPLE) * grouped.ROW_MULTIPLE for load in loads] != loads
    assert loads[3] == loads[5] == 0 and sum(loads) == 140
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for name, a, b in [("output", found, expected), *((name, ours[name], theirs[name]) for name in theirs)]:
        assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()), msg=name)


def test_wide_products_do_not_pad_rows(rows):
    moe, hidden = _sparse(torch.float32)
    moe(hidden)
    assert sum(rows[0]) == 140


def test_a_token_that_is_not_finite_reaches_only_its_own_experts(monkeypatch):
    moe, hidden = _sparse(torch.bfloat16)
    router = tuple(value.detach() for value in moe.router(hidden))
    chosen = router[2][0].tolist()
    monkeypatch.setattr(type(moe.router), "forward", lambda self, x: router)
    with torch.no_grad():
        hidden[0] = math.nan
    (_, ours), (_, theirs) = _both(moe, hidden, monkeypatch)
    spoilt = [expert for expert in range(6) if ours["down"][expert].isnan().any()]
    assert spoilt == [expert for expert in range(6) if theirs["down"][expert].isnan().any()] == sorted(chosen)


def test_bfloat16_layer_takes_zero_tokens():
    moe, hidden = _moe(16, 8, 6, 2, dtype=torch.bfloat16), _hidden(0, 16, dtype=torch.bfloat16)
    assert moe(hidden).shape == (0, 16)


@pytest.mark.parametrize("attached", [False, True])
def test_a_cast_leaves_the_bias_in_float32(attached):
    moe = _moe(16, 8, 6, 2)
    bias = moe.router.e_score_correction_bias.clone()
    assert not torch.equal(bias, bias.bfloat16().float())
    if attached:
        attach(moe, "frozen")
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.float):
        cast(moe)
        assert moe.router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(moe.router.e_score_correction_bias, bias)
    assert torch.equal(moe.state_dict()[f"router.{SLOT}"], bias)
    assert moe.to("meta").router.e_score_correction_bias.is_meta


# ---- the router ----


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
def test_the_router_is_route_on_float32_logits(score_function):
    router = Router(16, 8, 3, score_function=score_function, num_groups=4, top_groups=3, scale=2.5)
    nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(_hidden(8).detach())
    hidden = _hidden(2, 20, 16)
    logits, weights, ids = router(hidden)
    assert_close(logits, (hidden @ router.weight.T).flatten(0, 1))
    rows, bias = logits.double().tolist(), router.e_score_correction_bias.tolist()
    their_ids, their_weights = reference.route(rows, 3, score_function, bias, 4, 3, True, 2.5)
    assert ids.tolist() == their_ids
    assert ids.tolist() != reference.route(rows, 3, score_function, None, 4, 3, True, 2.5)[0], "the bias moves nothing"
    assert_close(weights, torch.tensor(their_weights), rtol=1e-5, atol=1e-6)
    assert router(hidden.double())[0].dtype == torch.float64


def test_top_1_weights_are_scores_so_the_router_gets_a_gradient():
    with pytest.raises(ValueError, match=r"renormalise must be False with k=1.*get no gradient.*Leave renormalise out"):
        Router(16, 6, 1, renormalise=True)
    moe, hidden = _moe(16, 8, 6, 1), _hidden(9, 16)
    assert (
        not moe.router.renormalise
        and Router(16, 6, 2).renormalise
        and not Router(16, 6, 2, renormalise=False).renormalise
    )
    moe(hidden).square().sum().backward()
    assert moe.router.weight.grad.norm() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be an integer, 1 or more: got 0"),
        ({"dim": 16.0}, r"dim must be an integer, 1 or more: got 16\.0"),
        ({"hidden": -1}, "hidden must be an integer, 1 or more: got -1"),
        ({"num_experts": True}, "num_experts must be an integer, 1 or more: got True"),
        ({"k": 0}, "k must be an integer, 1 or more: got 0"),
        ({"k": 7}, "k must lie between 1 and the 6 experts that may be chosen: got k=7"),
        ({"num_groups": 3, "top_groups": 1, "k": 3}, "between 1 and the 2 experts that may be chosen: got k=3"),
        ({"num_groups": 4}, "the experts must divide into groups.*got 6 experts, num_groups=4"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups <= num_groups.*top_groups=3"),
        ({"num_groups": 0}, "num_groups must be an integer, 1 or more"),
        ({"score_function": "relu"}, "score_function must be one of softmax, sigmoid, sqrt_softplus: got 'relu'"),
        ({"scale": 0.0}, r"scale must be a finite positive number: got 0\.0"),
        ({"scale": math.nan}, "scale must be a finite positive number: got nan"),
        ({"scale": "2"}, "scale must be a finite positive number: got '2'"),
        ({"capacity_factor": math.inf}, "capacity_factor must be a finite positive number: got inf"),
        ({"capacity_factor": -1}, "capacity_factor must be a finite positive number: got -1"),
        ({"num_shared": -1}, "num_shared must be an integer, 0 or more: got -1"),
        (
            {"shared_hidden": 8},
            "shared_hidden must come with shared experts.*Set num_shared, or leave shared_hidden out",
        ),
        ({"num_shared": 1, "shared_hidden": 0}, "shared_hidden must be an integer, 1 or more: got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(**({"dim": 16, "hidden": 8, "num_experts": 6, "k": 2} | options))


@pytest.mark.parametrize("shape", [(4, 8), (), (16, 4)])
def test_hidden_states_of_another_width_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"hidden must have the shape \(\.\.\., 16\): got \(.*\)\. Build the layer with dim="
    ):
        MoE(16, 8, 6, 2)(torch.zeros(shape))


@pytest.mark.parametrize("layer", [Router(16, 4, 2), MoE(16, 32, 4, 2)], ids=["router", "layer"])
def test_token_ids_are_refused_as_hidden_states(layer):
    with pytest.raises(ValueError, match="hidden must hold floating point numbers: got torch.int64"):
        layer(torch.zeros(2, 16, dtype=torch.int64))


# ---- as a module ----


def test_the_state_dict_has_these_names_shapes_and_initial_values():
    torch.manual_seed(0)
    moe = MoE(64, 32, 8, 2, num_shared=2)
    assert {name: tuple(value.shape) for name, value in moe.state_dict().items()} == {
        "router.weight": (8, 64),
        f"router.{SLOT}": (8,),
        "gate_up": (8, 64, 64),
        "down": (8, 32, 64),
        "shared_gate_up": (64, 128),
        "shared_down": (64, 64),
    }
    for name, parameter in moe.named_parameters():
        assert_close(parameter.std(), torch.tensor(0.02), rtol=0.1, atol=0, msg=name)  # 512 numbers or more
        assert parameter.mean().abs() < 0.003
    assert not moe.router.e_score_correction_bias.any()
    assert list(MoE(16, 8, 6, 2).state_dict()) == ["gate_up", "down", "router.weight", f"router.{SLOT}"]


def test_reset_parameters_initialises_a_layer_from_the_meta_device():
    torch.manual_seed(0)
    plain = MoE(16, 8, 6, 2, num_shared=1)
    with torch.device("meta"):
        moe = MoE(16, 8, 6, 2, num_shared=1)
    assert all(tensor.is_meta for tensor in [*moe.parameters(), *moe.buffers()])
    moe.to_empty(device="cpu")
    for tensor in [*moe.parameters(), *moe.buffers()]:
        tensor.data.fill_(7)
    torch.manual_seed(0)
    moe.reset_parameters()
    assert moe.num_dropped == 0 and moe.router.e_score_correction_bias.dtype == torch.float32
    for name, value in plain.state_dict().items():
        assert torch.equal(moe.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_shape_depends_on_the_data(dtype):
    """The meta device has no data, so reading a value, or waiting for one, raises there."""
    with torch.device("meta"):
        moe = MoE(16, 8, 6, 2, num_shared=1, capacity_factor=1.0).to(dtype)
        hidden = torch.zeros(2, 5, 16, dtype=dtype, requires_grad=True)
        output = moe(hidden)
        output.backward(torch.ones_like(output))
    assert output.shape == (2, 5, 16) and hidden.grad.shape == (2, 5, 16)
    with pytest.raises(RuntimeError), torch.device("meta"):
        torch.zeros(3).nonzero()


def test_a_copy_is_independent_and_equal():
    moe, hidden = _moe(16, 8, 6, 2, capacity_factor=0.7), _hidden(9, 16)
    balance = attach(moe, "loss-free:rate=0.1")
    copy = deepcopy(moe)
    output = moe(hidden)
    assert torch.equal(copy(hidden), output) and copy.num_dropped == moe.num_dropped
    balance.step()
    assert balance.load["router"].sum() == 18, "the copy was counted too"
    assert not torch.equal(copy.router.e_score_correction_bias, moe.router.e_score_correction_bias)
    attach(copy, "loss-free:rate=0.1")


# ---- attached, compiled, checkpointed ----


class Model(nn.Module):
    def __init__(self, checkpointing=None, **options):
        super().__init__()
        self.first, self.checkpointing = nn.Linear(16, 16), checkpointing
        self.layers = nn.ModuleList([_moe(16, 8, 6, 2, seed=i, std=0.2, num_shared=1, **options) for i in range(2)])
        for parameter in self.first.parameters():
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if self.checkpointing is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
        return x


def _step(model, attached, compiled=False):
    """Outputs and gradients, loads, and dropped assignments of one step over two micro-batches."""
    balance = attach(model, "loss-free:rate=0.1+lbl:coefficient=0.1") if attached else None
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    outputs, dropped = [], []
    for seed in (1, 2):
        output = call(_hidden(3, 7, 16, seed=seed))
        (output.square().mean() + (0 if balance is None else balance.loss())).backward()
        outputs.append(output.detach())
        dropped.append([int(layer.num_dropped) for layer in model.layers])
    loads = []
    if balance is not None:
        balance.step()
        loads = [load.tolist() for load in balance.load.values()]
    return outputs + [parameter.grad for parameter in model.parameters()], loads, dropped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "attached", "capacity_factor", "checkpointing"),
    [
        (True, False, None, None),
        (True, True, 0.7, None),
        (True, True, 0.7, "non_reentrant"),
        (True, True, 0.7, "reentrant"),
        (False, True, 0.7, "non_reentrant"),
        (False, True, 0.7, "reentrant"),
    ],
)
def test_compiled_and_checkpointed_steps_equal_the_plain_step(compiled, attached, capacity_factor, checkpointing):
    if compiled:
        torch._dynamo.reset()
    expected, their_loads, their_dropped = _step(Model(capacity_factor=capacity_factor), attached)
    model = Model(checkpointing, capacity_factor=capacity_factor)
    found, loads, dropped = _step(model, attached, compiled)
    assert loads == their_loads and dropped == their_dropped
    assert all(map(all, dropped)) == (capacity_factor is not None)
    if attached:
        assert [sum(load) for load in loads] == [2 * 21 * 2] * 2, "every assignment once"
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", [(), ("none",), ("frozen",), ("loss-free+lbl:coefficient=0",)], ids=str)
def test_an_attached_layer_is_the_same_bit_for_bit(strategy):
    hidden = _hidden(2, 9, 16)
    plain, attached = _moe(16, 8, 6, 2, num_shared=1), _moe(16, 8, 6, 2, num_shared=1)
    balance = attach(attached, *strategy)
    ours, theirs = attached(hidden), plain(hidden)
    assert torch.equal(ours, theirs)
    (ours.square().sum() + balance.loss()).backward()
    theirs.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(attached.parameters(), plain.parameters(), strict=True))
    assert list(attached.state_dict()) == list(plain.state_dict())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.RMSNorm(16), MoE(16, 8, 8, 2, num_shared=1)
        nn.init.normal_(self.moe.router.weight, std=0.3)

    def forward(self, x):
        return x + self.moe(self.norm(x))


def _violation_of_training(*strategy):
    """Mean maxvio of the first and of the last ten of 50 steps."""
    torch.manual_seed(0)
    model, answer = nn.Sequential(nn.Linear(8, 16), Block(), Block()), torch.randn(8, 16)
    balance, optimizer = attach(model, *strategy), torch.optim.AdamW(model.parameters())
    violations = []
    for _ in range(50):
        x = torch.randn(4, 64, 8) + 0.5
        ((model(x) - x @ answer).square().mean() + balance.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        violations.append(balance.metrics()["maxvio_batch"])
    return sum(violations[:10]) / 10, sum(violations[-10:]) / 10


def test_training_becomes_even():
    """Left alone it ends at 1.1; chance alone gives about 0.2 with 64 assignments to an expert."""
    assert min(_violation_of_training()) > 0.9
    balancers = equipoise.LossFree(rate=0.01), equipoise.LoadBalancingLoss(0.01, scope="global_batch")
    assert _violation_of_training(*balancers)[1] < 0.35


def test_the_example_is_short_and_runs():
    code = textwrap.dedent(equipoise.nn.__doc__.partition("loop:\n")[2])
    assert len(code.strip().splitlines()) <= 25
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    loads, biases = names["balance"].load, names["balance"].biases
    assert list(loads) == ["1.moe.router", "2.moe.router"]
    assert all(load.sum() == 4 * 32 * 2 for load in loads.values()) and all(x.any() for x in biases.values())
    assert names["balance"].metrics()["load_balancing_loss"] > 0
    assert names["loss"].item() < 6  # the logarithm of 256 is 5.5


# ---- routers that declare their kind ----


class OwnRouter(nn.Module):
    """Softmax, one top-k, no slot."""

    def __init__(self, kind):
        super().__init__()
        self.weight, self.router_kind = nn.Parameter(torch.randn(6, 16)), kind

    def forward(self, hidden):
        logits = F.linear(hidden.reshape(-1, 16), self.weight)
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids


def test_a_router_that_declares_its_kind_is_recognised():
    torch.manual_seed(0)
    model = nn.Sequential(OwnRouter(RouterKind("softmax", None)))
    balance = attach(model, "loss-free:rate=0.1,rule=sign+lbl")
    model(_hidden(9, 16))
    balance.loss()
    balance.step()
    assert balance.load["0"].sum() == 18 and balance.biases["0"].any()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            RouterKind("sigmoid", None),
            "must select as its router_kind says.*: its weights are not in proportion to the sig",
        ),
        (RouterKind("softmax", SLOT), f"its slot {SLOT} is no buffer or parameter"),
        (
            "softmax",
            r"router_kind of a OwnRouter must be an equipoise.RouterKind\(score_function, slot\): got 'softmax'",
        ),
        (RouterKind("softmx"), "must have a score_function of softmax, sigmoid, .*: got RouterKind"),
        (RouterKind("softmax", selection="logit"), "selection by scores or logits, .*'logit'"),
        (RouterKind("softmax", gives="triple"), "gives logits, .* or a RouterAdapter: .*'triple'"),
    ],
)
def test_a_declaration_is_proven(kind, message):
    torch.manual_seed(0)
    with pytest.raises(EquipoiseError, match=message):
        attach(nn.Sequential(OwnRouter(kind)), "loss-free")


def test_wrappers_are_not_taken_for_the_router_inside_them():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    moe = _moe(16, 8, 6, 2)
    moe.router = torch.compile(checkpoint_wrapper(moe.router), backend="eager")
    assert moe.router.router_kind == RouterKind("sigmoid", SLOT)  # the wrappers pass the question on
    assert [type(router) for _, router, *_ in find_routers(moe)] == [Router]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize(
    "options", [{}, {"num_groups": 4, "top_groups": 2}, {"scale": 2.5, "renormalise": False}], ids=str
)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_proof_holds_for_every_router(score_function, options, k):
    router = Router(16, 8, k, score_function=score_function, **options)
    state = {name: value.clone() for name, value in router.state_dict().items()}
    assert router.router_kind == RouterKind(score_function, SLOT)
    assert prove(router, router.router_kind) == (router.router_kind, 8, k, (2, 3), None, False, None, False)
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())
    with pytest.raises(EquipoiseError, match="not the best|not in proportion"):
        prove(router, RouterKind("softmax" if score_function != "softmax" else "sigmoid", SLOT))
