"""A router that returns something of its own is read and written by an adapter, and proven as any other."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from equipoise import EquipoiseError, RouterAdapter, RouterKind, attach
from equipoise.routers.adapter import OwnBalancing
from equipoise.routers.logits import LOGITS

DIM, EXPERTS, K = 16, 8, 2


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class WeightsFirst(RouterAdapter):
    """(weights, ids, scores), as torchtitan's; the logits come from the gate, a module."""

    framework = "sample 1.0"
    logits_returned_by = "gate"

    def read(self, output, logits, k):
        return logits, output[0], output[1]

    def write(self, output, weights, expert_ids):
        return weights.view(output[0].shape), *output[1:]


class OfMethod(WeightsFirst):
    """The logits are what a method returns, as OLMo-core's and Megatron's."""

    logits_returned_by = "compute_logits"


class OfArgument(WeightsFirst):
    """The logits are what a method is called with, as Automodel's; the call has a mask."""

    logits_returned_by = None
    logits_passed_to = "choose"

    def arguments(self, num_tokens):
        return {"token_mask": torch.ones(num_tokens, dtype=torch.bool)}

    def mask(self, arguments):
        return arguments.get("token_mask")


class MapAndWeights(RouterAdapter):
    """Both [tokens, experts], as Megatron's; tokens stand [sequence, batch]."""

    is_sequence_first = True
    logits_returned_by = "compute_logits"

    def read(self, output, logits, k):
        weights, is_chosen = output
        expert_ids = is_chosen.int().topk(int(is_chosen.sum(-1).max()) if k is None else k).indices
        return logits.reshape(-1, EXPERTS), weights.gather(-1, expert_ids), expert_ids

    def write(self, output, weights, expert_ids):
        return torch.zeros_like(output[0]).scatter(-1, expert_ids, weights), output[1]

    def mask(self, arguments):
        is_padding = arguments.get("padding_mask")
        return None if is_padding is None else ~is_padding.T


class Router(nn.Module):
    def __init__(self, k=K):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.gate.weight.data = _normal(EXPERTS, DIM)
        self.k = k

    def compute_logits(self, x):
        return self.gate(x)

    def choose(self, logits):
        scores = logits.sigmoid()
        expert_ids = scores.topk(self.k, -1).indices
        return scores.gather(-1, expert_ids), expert_ids, scores

    def forward(self, x):
        return self.choose(self.compute_logits(x))


class ModuleRouter(Router):
    router_adapter = WeightsFirst()


class MethodRouter(Router):
    router_adapter = OfMethod()


class ArgumentRouter(Router):
    router_adapter = OfArgument()

    def forward(self, x, token_mask):
        return self.choose(self.compute_logits(x))


class SlottedRouter(Router):
    router_adapter = WeightsFirst()

    def __init__(self, k=K):
        super().__init__(k)
        self.register_buffer("moving", torch.zeros(EXPERTS))

    def choose(self, logits):
        scores = logits.sigmoid()
        expert_ids = (scores + self.moving).topk(self.k, -1).indices
        return scores.gather(-1, expert_ids), expert_ids, scores


class MapRouter(Router):
    router_adapter = MapAndWeights()

    def forward(self, x, padding_mask=None):
        logits = self.compute_logits(x).reshape(-1, EXPERTS)
        scores, expert_ids = logits.softmax(-1).topk(self.k, -1)
        dense = torch.zeros_like(logits)
        return dense.scatter(-1, expert_ids, scores), dense.bool().scatter(-1, expert_ids, True)


class Block(nn.Module):
    """Returns the weights, from which any gradient to the router comes. Takes hidden states [batch, sequence, dim]."""

    def __init__(self, router, checkpointed=False):
        super().__init__()
        self.router, self.checkpointed = router, checkpointed

    def forward(self, hidden, mask=None):
        if self.checkpointed:
            return checkpoint(self.inner, hidden, mask, use_reentrant=False)
        return self.inner(hidden, mask)

    def inner(self, hidden, mask):
        if isinstance(self.router, ArgumentRouter):
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
            return self.router(hidden.reshape(-1, DIM), mask.reshape(-1))[0]
        if isinstance(self.router, MapRouter):
            return self.router(hidden.transpose(0, 1), None if mask is None else ~mask.T)[0]
        return self.router(hidden)[0]


ROUTERS = [ModuleRouter, MethodRouter, ArgumentRouter, SlottedRouter, MapRouter]


def _expected(router, hidden, bias=0.0, mask=None, by_sequence=False, coefficient=0.5):
    """Load, and gradient of the balancing loss at the gate: float64, token by token."""
    weight = router.gate.weight.detach().double().requires_grad_()
    rows, length = hidden.shape[:2]
    is_softmax = isinstance(router, MapRouter)
    load, loss = torch.zeros(EXPERTS, dtype=torch.int64), torch.zeros((), dtype=torch.float64)
    groups = [[(row, n) for n in range(length)] for row in range(rows)]
    groups = groups if by_sequence else [sum(groups, [])]
    counted = [[p for p in group if mask is None or mask[p]] for group in groups]
    total = sum(map(len, counted))
    for group in counted:
        counts, mean = torch.zeros(EXPERTS).double(), torch.zeros(EXPERTS).double()
        for place in group:
            logits = hidden[place].double() @ weight.T
            scores = logits.softmax(-1) if is_softmax else logits.sigmoid()
            for expert in (scores + bias).topk(K).indices.tolist():
                counts[expert] += 1
            mean = mean + scores / scores.sum() / len(group)
        load += counts.long()
        part = len(group) / total if by_sequence else 1
        loss = loss + part * coefficient * EXPERTS * (counts / counts.sum() * mean).sum()
    loss.backward()
    return load, weight.grad


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("router", ROUTERS)
def test_counts_bias_and_gradient_are_exact(router, checkpointed):
    model = nn.Sequential(Block(router(), checkpointed))
    bias = 0.5 * _normal(EXPERTS, seed=3)
    balance = attach(model, "frozen+lbl:coefficient=0.5", biases={"0.router": bias})
    hidden = _normal(3, 5, DIM, seed=1)
    (0 * model(hidden).sum() + balance.loss()).backward()
    balance.step()
    load, gradient = _expected(model[0].router, hidden, bias)
    assert torch.equal(balance.load["0.router"], load)
    assert_close(model[0].router.gate.weight.grad.double(), gradient, rtol=1e-4, atol=1e-6)
    assert LOGITS not in model[0].router.__dict__ or model[0].router.__dict__[LOGITS] is None


@pytest.mark.parametrize("router", ROUTERS)
def test_loss_free_moves_the_bias_by_the_load(router):
    model = nn.Sequential(Block(router()))
    balance = attach(model, "loss-free:rate=0.125,rule=sign,center=false")
    expected = torch.zeros(EXPERTS)
    for seed in range(3):
        hidden = _normal(3, 5, DIM, seed=seed)
        model(hidden)
        balance.step()
        load, _ = _expected(model[0].router, hidden, expected)
        assert torch.equal(balance.load["0.router"], load)
        for expert in range(EXPERTS):
            expected[expert] += 0.125 * (1 if load[expert] < 30 / EXPERTS else -1)
        assert torch.equal(balance.biases["0.router"], expected)


@pytest.mark.parametrize("router", [ArgumentRouter, MapRouter])
@pytest.mark.parametrize("by_sequence", [False, True], ids=["micro_batch", "sequence"])
def test_the_mask_of_the_call_says_which_tokens_count(router, by_sequence):
    model = nn.Sequential(Block(router()))
    balance = attach(model, f"lbl:scope={'sequence' if by_sequence else 'micro_batch'},coefficient=0.5")
    hidden = _normal(3, 5, DIM, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    (0 * model[0](hidden, mask).sum() + balance.loss()).backward()
    balance.step()
    load, gradient = _expected(model[0].router, hidden, 0.0, mask, by_sequence)
    assert int(balance.num_tokens) == 11
    assert torch.equal(balance.load["0.router"], load)
    if not (by_sequence and router is ArgumentRouter):  # it is called with flat tokens: no row is seen
        assert_close(model[0].router.gate.weight.grad.double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 6), (6, 1)], ids=str)
def test_a_sequence_first_router_has_its_sequences_in_columns(shape):
    model = nn.Sequential(Block(MapRouter()))
    balance = attach(model, "lbl:scope=sequence,coefficient=0.5")
    hidden = _normal(*shape, DIM, seed=1)
    (0 * model(hidden).sum() + balance.loss()).backward()
    _, gradient = _expected(model[0].router, hidden, by_sequence=True)
    assert_close(model[0].router.gate.weight.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_a_mask_that_is_given_outranks_that_of_the_call():
    model = nn.Sequential(Block(ArgumentRouter()))
    balance = attach(model)
    balance.token_mask(torch.tensor([[1, 1, 0, 0, 0]] * 3))
    model[0](_normal(3, 5, DIM), torch.ones(3, 5).bool())
    balance.step()
    assert int(balance.num_tokens) == 6


@pytest.mark.parametrize("router", ROUTERS)
def test_without_a_bias_nothing_changes(router):
    plain = nn.Sequential(Block(router()))
    attached = copy.deepcopy(plain)
    attach(attached, "loss-free")
    hidden = _normal(3, 5, DIM)
    outputs = plain(hidden), attached(hidden)
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    assert torch.equal(plain[0].router.gate.weight.grad, attached[0].router.gate.weight.grad)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_output_keeps_its_form(router):
    plain, attached = router(), router()
    attach(nn.Sequential(attached), "lbl")
    arguments = (torch.ones(15).bool(),) if router is ArgumentRouter else ()
    hidden = _normal(15, DIM) if router is ArgumentRouter else _normal(3, 5, DIM)
    for before, after in zip(plain(hidden, *arguments), attached(hidden, *arguments), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("router", [ModuleRouter, MethodRouter, ArgumentRouter])
def test_a_compiled_router_shows_its_logits(router):
    torch.compiler.reset()
    model = nn.Sequential(Block(router()))
    balance = attach(model, "frozen+lbl:coefficient=0.5", biases={"0.router": 0.5 * _normal(EXPERTS, seed=3)})
    model[0].compile(fullgraph=True, backend="aot_eager")
    for seed in range(2):
        hidden = _normal(3, 5, DIM, seed=seed)
        model.zero_grad()
        (0 * model(hidden).sum() + balance.loss()).backward()
        balance.step()
        load, gradient = _expected(model[0].router, hidden, balance.biases["0.router"])
        assert torch.equal(balance.load["0.router"], load)
        assert_close(model[0].router.gate.weight.grad.double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_copies_are_steered_and_not_counted(router):
    model = nn.Sequential(Block(router()))
    balance = attach(model, "frozen", biases={"0.router": 0.5 * _normal(EXPERTS, seed=3)})
    hidden = _normal(3, 5, DIM)
    expected = model(hidden)
    balance.step()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(hidden), expected)
        attach(twin)  # a copy can be attached
    with pytest.raises(EquipoiseError, match="none was"):
        balance.step()


@pytest.mark.parametrize("router", ROUTERS)
def test_detach_leaves_nothing(router):
    model = nn.Sequential(Block(router()))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    balance = attach(model, "loss-free+lbl")
    model(_normal(3, 5, DIM))
    balance.detach()
    assert type(model[0].router) is router
    assert not model[0].router.gate._forward_hooks
    assert {name: set(vars(module)) - {LOGITS} for name, module in model.named_modules()} == before


# ---- what an adapter may get wrong ----


class WrongOrder(WeightsFirst):
    def read(self, output, logits, k):
        return output[0], logits, output[1]


class Raises(WeightsFirst):
    def read(self, output, logits, k):
        raise KeyError("scores")


class NoTensors(WeightsFirst):
    def read(self, output, logits, k):
        return None, None, None


class OtherScores(WeightsFirst):
    """Takes the scores for the logits."""

    logits_returned_by = None

    def read(self, output, logits, k):
        return output[2], output[0], output[1]


class Refuses(WeightsFirst):
    def refusal(self, router):
        return "it adds noise: its jitter is set"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (WrongOrder(), r"WrongOrder\(\) reads .*See equipoise.RouterAdapter"),
        (Raises(), r"cannot be read by Raises\(\): KeyError.*See equipoise.RouterAdapter"),
        (NoTensors(), r"NoTensors\(\) must read three tensors"),
        (OtherScores(), "its weights are in proportion to none of softmax, sigmoid, sqrt_softplus of its logits"),
        (Refuses(), "it adds noise: its jitter is set. Switch that off"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, RouterAdapter) else "",
)
def test_a_wrong_adapter_is_refused(adapter, message):
    router = Router()
    router.router_adapter = adapter
    with pytest.raises(EquipoiseError, match=message):
        attach(nn.Sequential(router))


def test_an_adapter_must_be_an_instance():
    router = Router()
    router.router_adapter = WeightsFirst
    with pytest.raises(EquipoiseError, match="must be an instance of a subclass of equipoise.RouterAdapter"):
        attach(nn.Sequential(router))


def test_a_kind_may_name_its_adapter():
    router = Router()
    router.router_kind = RouterKind("sigmoid", gives=WeightsFirst())
    balance = attach(nn.Sequential(router), "loss-free")
    assert balance.layers[0].kind == RouterKind("sigmoid", gives=WeightsFirst())
    router = Router()
    router.router_kind = RouterKind("softmax", gives=WeightsFirst())
    with pytest.raises(EquipoiseError, match="not in proportion to the softmax"):
        attach(nn.Sequential(router))


def test_adapters_of_two_ranks_are_equal():
    assert pickle.loads(pickle.dumps(WeightsFirst())) == WeightsFirst()
    assert WeightsFirst() != OfMethod()
    assert len({WeightsFirst(), WeightsFirst()}) == 1


# ---- what the framework does to balance ----


class WithOwnBalancing(WeightsFirst):
    def own_balancing(self, router, parent):
        rate = parent.rate

        def stop():
            parent.rate = 0.0
            return lambda: setattr(parent, "rate", rate)

        loss = f"coefficient={parent.coefficient}" if parent.coefficient else None
        z_loss = f"z_coefficient={parent.z_coefficient}" if parent.z_coefficient else None
        return OwnBalancing(f"rate={rate}" if rate else None, stop if rate else None, loss, z_loss)


class OwnBlock(Block):
    def __init__(self, rate, coefficient, z_coefficient=0.0):
        super().__init__(SlottedRouter())
        self.router.router_adapter = WithOwnBalancing()
        self.rate, self.coefficient, self.z_coefficient = rate, coefficient, z_coefficient


@pytest.mark.parametrize("strategy", ["loss-free", "frozen", "quantile+z"])
def test_the_frameworks_own_update_is_off_until_detach(strategy, caplog):
    model = nn.Sequential(OwnBlock(1e-3, 0.0))
    with caplog.at_level(logging.WARNING):
        balance = attach(model, strategy)
    assert model[0].rate == 0.0
    assert [record.message for record in caplog.records] == [
        "attach: the bias update of sample 1.0 (rate=0.001) is off until detach(): the attached strategy owns the bias."
    ]
    balance.detach()
    assert model[0].rate == 1e-3


@pytest.mark.parametrize("strategies", [(), ("lbl",), ("z",)])
def test_without_a_bias_of_ours_the_frameworks_own_update_goes_on(strategies, caplog):
    model = nn.Sequential(OwnBlock(1e-3, 0.0))
    attach(model, *strategies)
    assert model[0].rate == 1e-3
    assert not caplog.records


def test_two_balancing_losses_are_refused():
    model = nn.Sequential(OwnBlock(0.0, 0.01))
    with pytest.raises(EquipoiseError, match=r"sample 1.0 adds its own to 0.router \(coefficient=0.01\)"):
        attach(model, "loss-free+lbl")


def test_two_z_losses_are_refused_and_one_beside_a_balancing_loss_is_not(caplog):
    model = nn.Sequential(OwnBlock(0.0, 0.0, 0.001))
    with pytest.raises(EquipoiseError, match=r"one z-loss .* adds its own to 0.router \(z_coefficient=0.001\)"):
        attach(model, "lbl+z")
    attach(model, "lbl")
    assert not caplog.records


def test_a_balancing_loss_beside_a_bias_is_said(caplog):
    attach(nn.Sequential(OwnBlock(0.0, 0.01)), "loss-free")
    (record,) = caplog.records
    assert "sample 1.0 adds a balancing loss of its own (coefficient=0.01), beside loss-free" in record.message
    caplog.clear()
    attach(nn.Sequential(OwnBlock(0.0, 0.01)))
    assert not caplog.records
