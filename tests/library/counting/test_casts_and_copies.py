"""Models that are cast, moved, averaged, copied, wrapped or attached again."""

import io
from copy import copy, deepcopy

import models
import pytest
import torch
from block_net import (
    ALL_MASKED,
    BATCHES,
    PADDED_RIGHT,
    RATE,
    RULES,
    STRATEGY,
    TOKENS,
    assert_same_outcome,
    block_net,
    exact_default_window,
    exact_window,
    routers_of,
    run_window,
    sums,
)
from models import EXPERTS, K
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from windows import assert_gradients_close, clone_gradients

from equipoise import EquipoiseError, attach


def _bias_slots(net):
    return [
        router._buffers.get("_equipoise_bias", router._buffers.get("e_score_correction_bias"))
        for router, _ in routers_of(net).values()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_biases_stay_float32_after_a_cast_between_windows(dtype):
    net = block_net()
    balance = attach(net, STRATEGY)
    biases = {name: [0.0] * EXPERTS for name in balance.biases}
    for number, cast in enumerate((None, dtype, None, torch.float32, None)):
        if cast is not None:
            net.to(cast)
            assert all(torch.equal(slot, o) for slot, o in zip(_bias_slots(net), balance.biases.values(), strict=True))
        net.zero_grad()
        for batch in BATCHES[: 1 + number % 3]:
            ((net(*batch) + balance.loss()) / 3).backward()
        balance.step()
        assert sums(balance.load) == [K * (14, 22, 34)[number % 3]] * 2
        for name, (router, score_function) in routers_of(net).items():
            assert router.weight.grad.any() and router.weight.grad.dtype == router.weight.dtype
            biases[name] = RULES[score_function](biases[name], balance.load[name].tolist(), RATE, True)
            assert balance.biases[name].dtype == torch.float32
            assert_close(balance.biases[name], torch.tensor(biases[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("when", ["between windows", "between micro-batches"])
def test_a_model_that_is_emptied_and_reloaded_continues_unchanged(when):
    """Weights are moved away and back, as for a rollout: to_empty, then the saved state dict."""
    results = []
    for moved in (False, True):
        net = block_net()
        balance = attach(net, f"{STRATEGY}+lbl:pooling=previous,coefficient=0.1")
        for number, batch in enumerate((*BATCHES, *BATCHES)):
            if moved and number == (3 if when == "between windows" else 4):
                state = {name: value.clone() for name, value in net.state_dict().items()}
                grads = {name: p.grad for name, p in net.named_parameters()}
                net.to(device="meta")
                net.to_empty(device="cpu")
                for parameter in net.parameters():
                    nn.init.constant_(parameter, float("nan"))
                net.load_state_dict(state)
                for name, parameter in net.named_parameters():
                    parameter.grad = grads[name]
            ((net(*batch) + balance.loss()) / 3).backward()
            if number == 2:
                balance.step()
        balance.step()
        assert sums(balance.load) == [K * TOKENS] * 2
        results.append((clone_gradients(net), balance.load, balance.biases))
    for values, reloaded_values in zip(*results, strict=True):
        assert values.keys() == reloaded_values.keys() and all(
            torch.equal(values[name], reloaded_values[name]) for name in values
        )


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_weight_average_is_not_counted(use_buffers):
    net = block_net()
    balance = attach(net, STRATEGY)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=use_buffers)
    means = [torch.zeros(EXPERTS)] * 2
    for window in range(3):
        net.zero_grad()
        for batch in BATCHES:
            loss = (net(*batch) + balance.loss()) / 3
            average.eval()
            with torch.no_grad():
                average(*batch)
            average.train()
            average(*batch).backward()  # a copy has no losses, so it needs no ticket
            loss.backward()
        balance.step()
        assert sums(balance.load) == [K * TOKENS] * 2
        average.update_parameters(net)
        biases = list(balance.biases.values())
        # the first update copies; later ones average 0.75 old and 0.25 new
        means = [o if window == 0 else 0.75 * m + 0.25 * o for m, o in zip(means, biases, strict=True)]
        for slot, mean, bias in zip(_bias_slots(average.module), means, biases, strict=True):
            assert_close(slot, mean if use_buffers else bias, rtol=0, atol=1e-7)
        for slot, bias in zip(_bias_slots(net), biases, strict=True):
            assert torch.equal(slot, bias) and bias.any()


def test_a_detached_model_is_attached_again_in_the_middle_of_a_window():
    net = block_net()
    expected = exact_window(net, BATCHES[1:])
    balance = attach(net, STRATEGY)
    (net(*BATCHES[2]) + balance.loss()).backward()
    balance.step()
    before = balance.biases
    net.zero_grad()
    pending = net(*BATCHES[0]) + balance.loss()
    second = attach(net, STRATEGY, biases=balance.detach())
    for name, bias in before.items():
        assert torch.equal(second.biases[name], bias) and bias.any()
    plain = deepcopy(net)
    plain(*BATCHES[0]).backward()
    pending.backward()  # the first balance is detached: it adds no gradient and counts no token
    assert_gradients_close(clone_gradients(net), clone_gradients(plain), 0)
    with pytest.raises(EquipoiseError, match="was detached"):
        balance.step()
    assert_same_outcome(run_window(net, second, BATCHES[1:]), expected)
    assert sums(second.load) == [K * (8 + 12)] * 2


def _round_trip(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [deepcopy, _round_trip], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_compiled_model_is_not_counted_and_can_be_attached(copy_of):
    torch._dynamo.reset()
    net = block_net()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    balance = attach(compiled, STRATEGY)
    first = run_window(net, balance, ALL_MASKED, forward=compiled)
    assert_same_outcome(first, exact_default_window("plain"))
    (compiled(*ALL_MASKED[0]) + balance.loss()).backward()
    copy = copy_of(compiled)
    copy(*BATCHES[1]).backward()
    copy.eval()
    copy(*BATCHES[1])
    copy.train()
    copy_balance = attach(copy, STRATEGY)
    assert list(copy_balance.load) == list(balance.load)
    copy.zero_grad()
    (copy(*BATCHES[2]) + copy_balance.loss()).backward()
    copy_balance.step()
    balance.step()
    assert sums(copy_balance.load) == [K * 12] * 2 and sums(balance.load) == [K * 14] * 2
    assert_same_outcome(run_window(net, balance, ALL_MASKED, forward=compiled), first)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp_of_compile": lambda m: nn.parallel.DistributedDataParallel(torch.compile(m, backend="eager")),
    "sequential": nn.Sequential,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("first", ["model", "wrapper"])
def test_a_wrapped_model_is_not_attached_twice(one_rank, wrapper, first):
    net = block_net()
    wrapped = WRAPPERS[wrapper](net)
    one, other = (net, wrapped) if first == "model" else (wrapped, net)
    balance = attach(one, STRATEGY)
    with pytest.raises(EquipoiseError, match=r"blocks\.0\.gate is attached already"):
        attach(other, "loss-free")
    (net(*BATCHES[0]) + balance.loss()).backward()
    balance.step()
    assert sums(balance.load) == [K * 14] * 2


def test_a_model_and_its_submodule_cannot_both_be_attached():
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    for first in ("part", "whole"):
        model = models.family("qwen3_moe", experts_implementation="eager")
        one, other = (model.model, model) if first == "part" else (model, model.model)
        balance = attach(one, STRATEGY)
        hooks = len(model._forward_hooks) + len(model.model._forward_hooks)
        for wrong in (other, model.model.layers[1], nn.ModuleList([model])):
            with pytest.raises(EquipoiseError, match="is attached already"):
                attach(wrong, "loss-free")
        assert len(model._forward_hooks) + len(model.model._forward_hooks) == hooks, "the refused attach left hooks"
        # the whole model passes its mask on to the inner model
        (model(input_ids=ids, attention_mask=PADDED_RIGHT, labels=ids).loss + balance.loss()).backward()
        balance.step()
        assert [int(load.sum()) for load in balance.load.values()] == [2 * 8] * 2


def test_a_weight_average_may_be_attached_itself():
    net = block_net()
    balance = attach(net, STRATEGY)
    average = AveragedModel(net)
    average_balance = attach(average, "loss-free:rate=0.1")
    average(*BATCHES[1])
    net(*BATCHES[0])
    average_balance.step()
    balance.loss()
    balance.step()
    assert sums(average_balance.load) == [K * 8] * 2 and sums(balance.load) == [K * 14] * 2
    with pytest.raises(EquipoiseError, match="is attached already"):
        attach(average)


def _by_dict(router):
    """Another instance of the same class with the same attributes, as some libraries make them by hand."""
    twin = type(router).__new__(type(router))
    twin.__dict__.update(vars(router))
    return twin


@pytest.mark.parametrize("copy_of", [copy, _by_dict])
def test_a_shallow_copy_of_a_router_is_steered_alike_and_not_counted(copy_of):
    net = block_net()
    balance = attach(net, "loss-free:rate=0.1+lbl")
    twins = {name: copy_of(router) for name, (router, _) in routers_of(net).items()}
    for batch in BATCHES[:2]:
        for name, (router, _) in routers_of(net).items():
            hidden = torch.randn(5, router.weight.shape[1])
            (weights := twins[name](hidden)[1]).sum().backward()  # without a ticket: a counted call would raise
            with balance.paused():
                assert all(map(torch.equal, twins[name](hidden), router(hidden)))
            assert weights.shape == (5, K)
        net.zero_grad()
        (net(*batch) + balance.loss()).backward()
        balance.step()
    assert sums(balance.load) == [K * 8] * 2 and all(bias.any() for bias in balance.biases.values())
    net.blocks[1].gate = twins["blocks.1.gate"]
    with pytest.raises(EquipoiseError, match="is attached already.*shallow copy"):
        attach(net, STRATEGY)
    balance.detach()
    assert all(map(torch.equal, twins["blocks.0.gate"](hidden), net.blocks[0].gate(hidden)))
    again = attach(net, STRATEGY)
    (net(*BATCHES[0]) + again.loss()).backward()
    again.step()
    assert sums(again.load) == [K * 14] * 2


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_two_routers_that_share_a_slot_are_counted_but_not_steered(kind):
    net = block_net((kind, kind))
    net.blocks[1].gate = copy(net.blocks[0].gate)
    with pytest.raises(EquipoiseError, match=r"blocks\.1\.gate and blocks\.0\.gate share"):
        attach(net, STRATEGY)
    balance = attach(net, "lbl")
    (net(*BATCHES[1]) + balance.loss()).backward()
    balance.step()
    assert sums(balance.load) == [K * 8] * 2
    net.blocks[1].gate = deepcopy(net.blocks[0].gate)
    balance.detach()
    assert attach(net, STRATEGY).layers


def test_a_shallow_copy_of_a_model_or_block_holds_the_same_routers():
    net = block_net()
    balance = attach(net, "loss-free+lbl")
    for twin in (copy(net), net):
        (twin(*BATCHES[1]) + balance.loss()).backward()  # the mask is the same too
    part = copy(net.blocks[0])
    part(torch.randn(1, 5, net.embed.weight.shape[1]))
    with pytest.raises(EquipoiseError, match="is attached already"):
        attach(copy(net))
    balance.loss()
    balance.step()
    assert sums(balance.load) == [K * (8 + 8 + 5), K * (8 + 8)]
    balance.detach()
    assert attach(copy(net)).layers


def test_a_call_with_other_tensors_is_a_call_of_the_router():
    net = block_net()
    balance = attach(net, STRATEGY)
    tensors = {name: parameter * 1.5 for name, parameter in net.named_parameters()}
    (torch.func.functional_call(net, tensors, tuple(BATCHES[1])) + balance.loss()).backward()
    balance.step()
    assert sums(balance.load) == [K * 8] * 2


def test_a_compiled_graph_of_a_shallow_copy_never_serves_the_router():
    """A graph that leaves the tap out must not fit the router that it was copied from, nor another one."""
    torch._dynamo.reset()
    net = block_net(("softmax", "softmax"))
    balance = attach(net, "loss-free")
    choose = torch.compile(lambda router, hidden: router(hidden)[1], backend="eager", fullgraph=True)
    first, second = (block.gate for block in net.blocks)
    one, other = copy(first), copy(second)
    hidden = torch.randn(5, first.weight.shape[1])
    for router in (one, first, other, second, first, one, second, other):
        choose(router, hidden)
    balance.step()
    assert sums(balance.load) == [K * 10] * 2
    balance.detach()
    choose(first, hidden)
    balance = attach(net, "loss-free")
    choose(first, hidden)
    choose(second, hidden)
    balance.step()
    assert sums(balance.load) == [K * 5] * 2
