"""Routers that adapters train: the names and biases are those of the plain model, before and after merging."""

import copy

import pytest
import torch
from models import family
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import equipoise
from equipoise import EquipoiseError

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of PEFT, on layers that it did not adapt

IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(5))
K, STRATEGY = 2, "loss-free:rate=0.1"
GATES = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
ADAPTED = {
    "bare parameter": dict(target_parameters=["mlp.gate.weight"]),
    "two parameters": dict(target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"]),
    "in full": dict(modules_to_save=["gate"]),
    "block in full": dict(modules_to_save=["mlp"]),
}


def _config(**options):
    return LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj"], **options)


def _adapted(name, how, adapter="mine"):
    torch.manual_seed(7)
    model = get_peft_model(family(name), _config(**ADAPTED[how]), adapter_name=adapter).train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "q_proj" not in name]
    assert trained, "no router is adapted"
    return model


def _train(model, balance, steps=2):
    for _ in range(steps):
        (model(input_ids=IDS, labels=IDS).loss + balance.loss()).backward()
        balance.step()
        assert [int(load.sum()) for load in balance.load.values()] == [K * IDS.numel()] * len(balance.load)
    return balance.biases


def _logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("how", ADAPTED)
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_biases_of_adapted_routers_fit_the_merged_model_and_its_folder(name, how, adapter, tmp_path):
    model = _adapted(name, how, adapter)
    balance = equipoise.attach(model, STRATEGY)
    assert [layer.name for layer in balance.layers] == GATES
    biases, state, expected = _train(model, balance), balance.state_dict(), _logits(model)
    assert list(biases) == GATES and all(bias.any() for bias in biases.values())
    balance.detach()
    merged = model.merge_and_unload()
    second = equipoise.attach(merged, STRATEGY, biases=biases)
    assert torch.allclose(_logits(merged), expected, atol=1e-5)
    second.load_state_dict(state)
    assert all(torch.equal(second.biases[gate], biases[gate]) for gate in GATES)
    merged.save_pretrained(tmp_path)
    second.save_biases(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    third = equipoise.attach(loaded, "frozen")  # without biases=: they are found beside the weights, or in the slots
    assert all(torch.equal(third.biases[gate], biases[gate]) for gate in GATES)
    assert torch.allclose(_logits(loaded), expected, atol=1e-5)
    again = _adapted(name, how, adapter)  # and back
    fourth = equipoise.attach(again, STRATEGY, biases=second.state_dict()["biases"])
    fourth.load_state_dict(second.state_dict())
    assert all(torch.equal(fourth.biases[gate], biases[gate]) for gate in GATES)
    _train(again, fourth)


@pytest.mark.parametrize("how", ["bare parameter", "in full"])
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_biases_beside_an_adapter_fit_it_when_it_is_loaded(name, how, tmp_path):
    model = _adapted(name, how)
    balance = equipoise.attach(model, STRATEGY)
    biases, expected = _train(model, balance), _logits(model)
    model.save_pretrained(tmp_path)
    assert balance.save_biases(tmp_path / "mine")
    loaded = PeftModel.from_pretrained(family(name), tmp_path / "mine")
    again = equipoise.attach(loaded, "frozen", biases=tmp_path / "mine")
    assert all(torch.equal(again.biases[gate], biases[gate]) for gate in GATES)
    assert torch.allclose(_logits(loaded), expected, atol=1e-5)


@pytest.mark.parametrize("family_and_options", [("afmoe", "router.gate"), ("afmoe", None)])
def test_a_slot_in_the_block_is_found_around_an_adapter(family_and_options):
    """AFMoE: the linear layer is in the router, and the slot in the block."""
    name, linear = family_and_options
    options = dict(modules_to_save=["router"]) if linear is None else {}
    config = _config(**options)
    config.target_modules |= {linear} - {None}
    model = get_peft_model(family(name), config).train()
    balance = equipoise.attach(model, STRATEGY)
    assert [layer.slot.name for layer in balance.layers] == ["expert_bias"]
    assert list(balance.biases) == ["model.layers.1.mlp.router"]
    biases = _train(model, balance)
    block = model.get_base_model().model.layers[1].mlp
    assert torch.equal(block.expert_bias, biases["model.layers.1.mlp.router"]) and block.expert_bias.any()
    assert equipoise.attach(model.merge_and_unload(), "frozen", biases=balance.detach()).layers[0].slot


def test_of_two_adapters_the_active_one_is_counted():
    model = _adapted("qwen3_moe", "in full")
    model.add_adapter("second", _config(**ADAPTED["in full"]))
    for active, other in (("second", "mine"), ("mine", "second")):
        model.set_adapter(active)
        balance = equipoise.attach(model, STRATEGY)
        assert list(balance.biases) == GATES
        _train(model, balance)
        model.set_adapter(other)  # a copy that is not attached
        model(input_ids=IDS)
        with pytest.raises(EquipoiseError, match="none was.*adapters of PEFT"):
            balance.step()
        balance.detach()


def test_two_adapters_of_a_parameter_share_the_router():
    model = _adapted("glm4_moe", "bare parameter")
    model.add_adapter("second", _config(**ADAPTED["bare parameter"]))
    balance = equipoise.attach(model, STRATEGY)
    for adapter in ("second", "mine"):
        model.set_adapter(adapter)
        _train(model, balance)
    assert list(balance.biases) == GATES


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_adapters_that_come_after_attach(name):
    """A router inside an adapter is called as before; a copy that takes its place is said at the next step."""
    model, plain = family(name).train(), family(name).train()
    balance = equipoise.attach(model, STRATEGY)
    adapted = get_peft_model(model, _config(**ADAPTED["bare parameter"]))
    biases = _train(adapted, balance)
    assert list(biases) == GATES and all(bias.any() for bias in biases.values())
    balance.detach()
    assert list(equipoise.attach(adapted, STRATEGY, biases=biases).biases) == GATES
    balance = equipoise.attach(plain, STRATEGY)
    adapted = get_peft_model(plain, _config(**ADAPTED["in full"]))
    adapted(input_ids=IDS)
    with pytest.raises(EquipoiseError, match="none was.*adapters of PEFT"):
        balance.step()
    balance.detach()
    _train(adapted, equipoise.attach(adapted, STRATEGY))


def test_a_model_in_a_larger_one_keeps_its_names():
    class Vision(nn.Module):
        def __init__(self, language):
            super().__init__()
            self.language = language

        def forward(self, **inputs):
            return self.language(**inputs)

    expected = [f"language.{gate}" for gate in GATES]
    for how in ADAPTED:
        model = Vision(_adapted("glm4_moe", how))
        balance = equipoise.attach(model, STRATEGY)
        assert list(_train(model, balance)) == expected
        chosen = []
        equipoise.attach(copy.deepcopy(model), STRATEGY, where=lambda name, _, chosen=chosen: not chosen.append(name))
        assert chosen == expected
