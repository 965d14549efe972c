"""Several models or several ``Balance`` objects, copies, and layers of different kinds."""

import gc
from copy import deepcopy

import models
import pytest
import reference
import torch
from models import K, tiny_lm
from torch import nn
from torch.testing import assert_close
from windows import (
    LAYERS,
    assert_gradients_close,
    assert_tokens_counted,
    attach_tiny,
    clone_gradients,
    gradients_of_one_step,
    random_ids,
)

import equipoise
from equipoise import EquipoiseError, attach


def test_a_balance_without_references_still_counts_and_lets_the_model_be_freed():
    model, balance = attach_tiny("loss-free:rate=0.1,rule=sign")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balance.follow(optimizer)
    del balance
    gc.collect()
    model(random_ids()).backward()
    optimizer.step()
    assert model.blocks[0].gate.e_score_correction_bias.any()
    import weakref

    reference = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert reference() is None, "equipoise keeps the model alive"


def test_two_balances_on_two_models_do_not_mix():
    first, balance = attach_tiny("loss-free:rate=0.1+lbl:coefficient=0.5")
    second, other = attach_tiny("loss-free:rate=0.1+lbl:coefficient=0.1", seed=1)
    a, b = first(random_ids()), second(random_ids(rows=3))
    assert balance.num_tokens == 14 and other.num_tokens == 21
    (a + b + balance.loss() + other.loss()).backward()
    balance.step()
    other.step()
    assert_tokens_counted(balance, 14)
    assert_tokens_counted(other, 21)
    assert_gradients_close(clone_gradients(first), dict(_gradients_alone("0.5", 0, 2).items()))
    assert_gradients_close(clone_gradients(second), dict(_gradients_alone("0.1", 1, 3).items()))


def _gradients_alone(coefficient, seed, rows):
    model, balance = attach_tiny(f"loss-free:rate=0.1+lbl:coefficient={coefficient}", seed=seed)
    (model(random_ids(rows=rows)) + balance.loss()).backward()
    return clone_gradients(model)


def test_two_balances_on_disjoint_layers_of_a_model():
    model = tiny_lm()
    first = attach(model, "loss-free:rate=0.1+lbl:coefficient=0.5", where=lambda name, router: name == LAYERS[0])
    second = attach(model, "lbl:coefficient=0.5", where=lambda name, router: name == LAYERS[1])
    assert list(first.load) == LAYERS[:1] and list(second.load) == LAYERS[1:]
    (model(random_ids()) + first.loss() + second.loss()).backward()
    whole, balance = attach_tiny("lbl:coefficient=0.5")
    (whole(random_ids()) + balance.loss()).backward()
    assert_gradients_close(clone_gradients(model), clone_gradients(whole))
    first.step()
    second.step()
    first.detach()
    model(random_ids())
    second.loss()
    second.step()
    assert int(second.load[LAYERS[1]].sum()) == K * 14


def test_an_ema_copy_does_not_count():
    model, balance = attach_tiny("loss-free:rate=0.1+lbl")
    average = torch.optim.swa_utils.AveragedModel(model)
    loss = model(random_ids()) + balance.loss()
    average.train()
    average(random_ids(rows=5)).backward()
    loss.backward()
    average.update_parameters(model)
    balance.step()
    assert_tokens_counted(balance, 14)
    deepcopy(deepcopy(model))(random_ids())
    with pytest.raises(EquipoiseError, match="none was"):
        balance.step()


def test_a_compiled_wrapper_is_unwrapped_and_counts():
    torch._dynamo.reset()
    model = tiny_lm()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    balance = attach(compiled, "loss-free:rate=0.1+lbl:coefficient=0.5")
    assert list(balance.load) == LAYERS
    (compiled(random_ids(rows=4), attention_mask=torch.ones(4, 7)) + balance.loss()).backward()
    balance.step()
    assert_tokens_counted(balance, 28)
    assert_gradients_close(clone_gradients(model), gradients_of_one_step("loss-free:rate=0.1+lbl:coefficient=0.5"))


def test_a_default_device_does_not_affect_the_counts():
    expected = gradients_of_one_step("loss-free:rate=0.1+lbl:coefficient=0.5")
    model, balance = attach_tiny("loss-free:rate=0.1+lbl:coefficient=0.5")
    ids = random_ids(rows=4)
    with torch.device("meta"):
        (model(ids) + balance.loss()).backward()
        balance.step()
        metrics = balance.metrics()
    assert metrics["tokens"] == 28
    assert_gradients_close(clone_gradients(model), expected)


class SharedBlock(nn.Module):
    """One block used twice: each forward calls its router twice."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_lm()
        self.inner.blocks[1] = self.inner.blocks[0]

    def forward(self, input_ids):
        return self.inner(input_ids)


def test_a_router_shared_by_two_layers_is_one_layer_with_all_its_tokens():
    for strategy in ("loss-free:rate=0.1", "loss-free:rate=0.1+lbl:coefficient=0.5"):
        model = SharedBlock()
        balance = attach(model, strategy)
        assert list(balance.load) == ["inner.blocks.0.gate"]
        (model(random_ids()) + balance.loss()).backward()
        balance.step()
        assert int(balance.load["inner.blocks.0.gate"].sum()) == K * 28


class UnevenLayers(nn.Module):
    """Layers with different numbers of experts, and a dense layer."""

    def __init__(self):
        super().__init__()
        self.moe = nn.ModuleList([models.family(n, layers=1, experts=e) for n, e in (("qwen3_moe", 8), ("olmoe", 4))])
        self.dense = nn.Linear(2, 2)

    def forward(self, input_ids):
        return sum(m(input_ids, labels=input_ids).loss for m in self.moe)


def test_layers_with_different_numbers_of_experts():
    model = UnevenLayers()
    balance = attach(model, "loss-free:rate=0.1+lbl:coefficient=0.5")
    ids = random_ids() % 29 + 3
    (model(ids) + balance.loss()).backward()
    balance.step()
    assert [len(load) for load in balance.load.values()] == [8, 4]
    assert all(load.sum() == 2 * 14 for load in balance.load.values())
    floors = [equipoise.metrics.sampling_floor(14, 2, e) for e in (8, 4)]
    assert balance.metrics()["maxvio_floor"] == pytest.approx(sum(floors) / 2)
    for name, load in balance.load.items():
        expected = reference.proportional_rule([0.0] * len(load), load.tolist(), 0.1, True)
        assert_close(balance.biases[name], torch.tensor(expected), rtol=0, atol=1e-6)
    state = balance.state_dict()
    balance.load_state_dict(state)
