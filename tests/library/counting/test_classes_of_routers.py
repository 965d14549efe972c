"""What others do with the class of a router: parametrisations, fully_shard, a class of their own, before and after."""

import copy
import io

import pytest
import torch
from block_net import BATCHES, STRATEGY, assert_same_outcome, block_net, exact_window, run_window, sums
from models import K
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from equipoise import EquipoiseError, attach


@pytest.fixture(autouse=True, scope="module")
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class _Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def _class_of_ones_own(router):
    base = type(router)

    def forward(self, hidden, *args):
        return base.forward(self, hidden * 2, *args)

    router.__class__ = type(f"Scaled{base.__name__}", (base,), {"forward": forward})


PUT_ON = {
    "weight_norm": weight_norm,
    "parametrize": lambda router: parametrize.register_parametrization(router, "weight", _Doubled()),
    "fully_shard": lambda router: fully_shard(router, mesh=init_device_mesh("cpu", (1,))),
    "a class of one's own": _class_of_ones_own,
}
OURS = {"_equipoise", "_equipoise_held", "_equipoise_bias"}


def _net(put_on):
    net = block_net()
    for block in net.blocks:
        put_on(block.gate)
    return net


def _leftovers(net):
    return [name for m in net.modules() for name in (*vars(m), *m._buffers) if name in OURS]


def _choice(net, batch=BATCHES[1]):
    """What the routers return for one batch, in evaluation."""
    outputs = []
    net.eval()
    handles = [block.gate.register_forward_hook(lambda m, a, output: outputs.append(output)) for block in net.blocks]
    with torch.no_grad():
        net(*batch)
    for handle in handles:
        handle.remove()
    net.train()
    return [tensor for output in outputs for tensor in output]


def _window(net, balance):
    net.zero_grad()
    for batch in BATCHES:
        (net(*batch) + balance.loss()).backward()
    balance.step()
    return sums(balance.load)


ALL = [K * (14 + 8 + 12)] * 2


@pytest.mark.parametrize("put_on", PUT_ON)
def test_detach_leaves_what_was_put_on_after_attach(put_on):
    net, plain = block_net(), _net(PUT_ON[put_on])
    balance = attach(net, STRATEGY)
    for block in net.blocks:
        PUT_ON[put_on](block.gate)
    assert _window(net, balance) == ALL and all(bias.any() for bias in balance.biases.values())
    classes = [type(block.gate) for block in net.blocks]
    balance.detach()
    assert [type(block.gate) for block in net.blocks] == classes and _leftovers(net) == []
    net.blocks[0].gate.e_score_correction_bias.zero_()  # the model's own slot keeps the bias
    plain.load_state_dict(net.state_dict())
    for model in (net, plain):
        model.zero_grad()
        model(*BATCHES[1]).backward()
    pairs = zip(net.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(*map(_whole, (p.grad, q.grad))) for p, q in pairs if p.grad is not None)
    assert len(_choice(net)) == 6 and all(map(torch.equal, _choice(net), _choice(plain)))


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("put_on", PUT_ON)
def test_a_router_under_a_class_of_others_is_attached_again_and_counts_once(put_on):
    net = block_net()
    balance = attach(net, STRATEGY)
    for block in net.blocks:
        PUT_ON[put_on](block.gate)
    length = [len(type(block.gate).__mro__) for block in net.blocks]
    for _ in range(3):
        biases = balance.detach()
        balance = attach(net, STRATEGY, biases=biases)
        assert _window(net, balance) == ALL
    assert [len(type(block.gate).__mro__) for block in net.blocks] == length


@pytest.mark.parametrize("put_on", ["weight_norm", "parametrize"])
def test_the_outcome_is_exact_with_a_parametrised_router(put_on):
    expected = exact_window(_net(PUT_ON[put_on]), BATCHES)
    for attach_first in (True, False):
        net = block_net() if attach_first else _net(PUT_ON[put_on])
        balance = attach(net, STRATEGY)
        if attach_first:
            for block in net.blocks:
                PUT_ON[put_on](block.gate)
        assert_same_outcome(run_window(net, balance, BATCHES), expected)


def test_a_parametrisation_put_on_after_attach_is_removed_before_or_after_detach():
    for is_detached in (False, True):
        net = block_net()
        plain = [type(block.gate) for block in net.blocks]
        balance = attach(net, STRATEGY)
        for block in net.blocks:
            weight_norm(block.gate)
        if is_detached:
            balance.detach()
        for block in net.blocks:
            parametrize.remove_parametrizations(block.gate, "weight")
        if is_detached:
            balance = attach(net, STRATEGY)
        assert _window(net, balance) == ALL
        balance.detach()
        assert [type(block.gate) for block in net.blocks] == plain and _leftovers(net) == []


def test_a_parametrisation_put_on_before_attach_stays_until_detach():
    net = _net(weight_norm)
    balance = attach(net, STRATEGY)
    with pytest.raises(AttributeError):
        parametrize.remove_parametrizations(net.blocks[0].gate, "weight")
    assert _window(net, balance) == ALL
    balance.detach()
    for block in net.blocks:
        parametrize.remove_parametrizations(block.gate, "weight")
    assert _window(net, attach(net, STRATEGY)) == ALL


@pytest.mark.parametrize("index", [0, 1])
def test_a_class_that_is_set_back_is_an_error_at_the_next_step(index):
    net = block_net()
    router = net.blocks[index].gate
    plain = type(router)
    balance = attach(net, STRATEGY)
    assert _window(net, balance) == ALL
    net(*BATCHES[0])  # counted, before the class is set back in the middle of a window
    balance.loss()
    router.__class__ = plain
    net(*BATCHES[1])
    balance.loss()
    before = balance.biases
    with pytest.raises(EquipoiseError, match=rf"the class of blocks\.{index}\.gate was set back"):
        balance.step()
    assert all(torch.equal(before[name], bias) for name, bias in balance.biases.items())
    balance.detach()
    assert type(router) is plain and _leftovers(net) == []
    assert _window(net, attach(net, STRATEGY)) == ALL


def test_a_router_under_fully_shard_keeps_its_class_in_any_order():
    mesh = init_device_mesh("cpu", (1,))
    for shard_first in (True, False):
        net = block_net()
        if not shard_first:
            balance = attach(net, STRATEGY)
        for module in (*(block.gate for block in net.blocks), net):
            fully_shard(module, mesh=mesh)
        if shard_first:
            balance = attach(net, STRATEGY)
        assert _window(net, balance) == ALL
        balance.detach()
        assert all(isinstance(block.gate, FSDPModule) for block in net.blocks) and _leftovers(net) == []
        assert _window(net, attach(net, STRATEGY)) == ALL


@pytest.mark.parametrize("put_on", ["weight_norm", "parametrize", "a class of one's own"])
def test_a_deep_copy_keeps_the_class_of_others_and_is_not_counted(put_on):
    net = block_net()
    balance = attach(net, STRATEGY)
    for block in net.blocks:
        PUT_ON[put_on](block.gate)
    _window(net, balance)
    twin = copy.deepcopy(net)
    assert all(map(torch.equal, _choice(twin), _choice(net)))
    assert all(type(a.gate) is type(b.gate) for a, b in zip(twin.blocks, net.blocks, strict=True))
    assert _window(net, balance) == ALL
    assert _window(twin, attach(twin, STRATEGY)) == ALL


def test_a_pickle_of_a_parametrised_router_is_refused_as_torch_does():
    net = block_net()
    attach(net, STRATEGY)
    for block in net.blocks:
        weight_norm(block.gate)
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            torch.save(block.gate, io.BytesIO())


class _WithHandle(nn.Module):
    """Base of a router that leaves something out of its pickles."""

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "handle"}


def test_a_pickle_is_made_as_the_class_of_the_router_says():
    net = block_net()
    gate = net.blocks[1].gate
    gate.__class__ = type(type(gate).__name__, (type(gate), _WithHandle), {"__getstate__": _WithHandle.__getstate__})
    gate.handle = (number for number in ())  # cannot be pickled
    attach(net, STRATEGY)
    twin = copy.deepcopy(net)
    assert not hasattr(twin.blocks[1].gate, "handle") and hasattr(gate, "handle")
    assert all(map(torch.equal, _choice(twin), _choice(net)))


class _TwoGates(nn.Module):
    """A block that holds the slots of two routers, and passes each its own."""

    def __init__(self, dim=8):
        super().__init__()
        self.text, self.image = _TextRouter(dim), _ImageRouter(dim)
        self.register_buffer("text_bias", torch.zeros(4))
        self.register_buffer("image_bias", torch.zeros(4))

    def forward(self, x):
        outputs = self.text(x, self.text_bias), self.image(x, self.image_bias)
        return sum(weights.sum() for _, weights, _ in outputs)


def _route(weight, x, bias):
    logits = nn.functional.linear(x.float(), weight.float())
    scores = logits.sigmoid()
    ids = (scores + bias).topk(2, -1).indices
    return logits, scores.gather(-1, ids), ids


class _TextRouter(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dim))

    def forward(self, x, text_bias):
        return _route(self.weight, x, text_bias)


class _ImageRouter(_TextRouter):
    def forward(self, x, image_bias):
        return _route(self.weight, x, image_bias)


def test_a_module_that_holds_the_slots_of_two_routers_follows_both():
    torch.manual_seed(0)
    net = _TwoGates().train()
    balances = [attach(net, "loss-free:rate=0.1", where=lambda name, _, own=own: name == own) for own in net._modules]
    for number in range(2):
        net(torch.randn(7, 8))
        for balance in balances:
            balance.loss()
            balance.step()
        biases = [next(iter(balance.biases.values())) for balance in balances]
        assert all(bias.any() for bias in biases)
        net.to(torch.bfloat16 if number == 0 else torch.float64)
        assert [net.text_bias.dtype, net.image_bias.dtype] == [torch.float32] * 2
        assert torch.equal(net.text_bias, biases[0]) and torch.equal(net.image_bias, biases[1])
        net.to(torch.float32)
    net.load_state_dict({**net.state_dict(), "text_bias": torch.arange(4.0), "image_bias": -torch.arange(4.0)})
    assert torch.equal(next(iter(balances[0].biases.values())), torch.arange(4.0))
    assert torch.equal(next(iter(balances[1].biases.values())), -torch.arange(4.0))
    balances[0].detach()
    assert type(net) is not _TwoGates  # the other still holds
    net.to(torch.bfloat16)
    assert (net.text_bias.dtype, net.image_bias.dtype) == (torch.bfloat16, torch.float32)
    balances[1].detach()
    assert type(net) is _TwoGates and _leftovers(net) == []


def test_a_holder_under_a_class_of_others_is_detached_and_attached_again():
    torch.manual_seed(0)
    net = _TwoGates().train()
    balance = attach(net, "loss-free:rate=0.1")
    _class_of_holder = type("Mine", (type(net),), {})
    net.__class__ = _class_of_holder
    for _ in range(2):
        net(torch.randn(7, 8))
        balance.loss()
        balance.step()
        assert sums(balance.load) == [14, 14]
        net.to(torch.bfloat16)
        assert net.text_bias.dtype == torch.float32
        net.to(torch.float32)
        balance.detach()
        assert type(net) is _class_of_holder and _leftovers(net) == []
        net.to(torch.bfloat16)
        assert net.text_bias.dtype == torch.bfloat16
        net.to(torch.float32)
        balance = attach(net, "loss-free:rate=0.1")
