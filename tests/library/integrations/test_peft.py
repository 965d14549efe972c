"""Adapters on a frozen base: biases stay fixed unless ``move_frozen``; moved ones are saved beside the adapter."""

import copy
import logging

import pytest
import torch
from models import family
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import distance
from safetensors.torch import load_file
from trainer_ranks import LENGTH, Stop, Watch, own_loop, rows, train

import equipoise
from equipoise.errors import UsageError
from equipoise.integrations import EquipoiseCallback
from equipoise.integrations.trainer.checkpoints import STATE_FILE
from equipoise.saved import BIASES_FILE

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT 0.21 reads it

BIASES, LOSS = "loss-free:rate=1e-1", "lbl:coefficient=1e-1"
FAMILIES = ("qwen3_moe", "glm4_moe")
LAYERS = [
    "model.layers.0.mlp.gate",
    "model.layers.1.mlp.gate",
]  # the names in the base model, without those of adapters
IDS = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def adapted(name, base=None, **options):
    torch.manual_seed(7)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(family(name) if base is None else base, config)


def lora(name, base=None):
    return adapted(name, base, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_biases_of_a_frozen_base_stay_and_the_loss_acts(name, caplog, tmp_path):
    model, callback = lora(name), EquipoiseCallback(BIASES, LOSS)
    other = copy.deepcopy(model)
    watch = Watch(callback)
    with caplog.at_level(logging.WARNING, "equipoise"):
        trainer = train(model, rows(12), [callback, watch])
    assert "no router of the model is trained, so the biases stay fixed" in caplog.text
    assert list(callback.balance.biases) == LAYERS
    assert not any(bias.any() for bias in callback.balance.biases.values())
    gradients, _, loads = own_loop(other, rows(12), ("frozen", LOSS))
    assert all(distance(ours, theirs) < 1e-6 for ours, theirs in zip(watch.gradients, gradients, strict=True))
    assert watch.load[0].keys() == loads[0].keys() == set(LAYERS)
    without_loss, _, _ = own_loop(lora(name), rows(12), ("frozen",))
    assert distance(without_loss[0], gradients[0]) > 1e-3  # the loss reaches the adapters in front of the routers
    trainer.save_model(str(tmp_path))
    assert "e_score_correction_bias" not in " ".join(load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_that_move_frozen_moved_are_saved_with_the_adapter(name, tmp_path):
    base = family(name)
    model, callback = lora(name, copy.deepcopy(base)), EquipoiseCallback(BIASES, LOSS, move_frozen=True)
    other = copy.deepcopy(model)
    watch = Watch(callback)
    trainer = train(model, rows(12), [callback, watch], tmp_path, save_strategy="steps", save_steps=2)
    _, biases, _ = own_loop(other, rows(12), (BIASES, LOSS))
    for ours, theirs in zip(watch.biases, biases, strict=True):
        assert all(ours[layer].any() and torch.equal(ours[layer], theirs[layer]) for layer in LAYERS)
    trainer.save_model(str(tmp_path / "final"))
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    for folder in ("checkpoint-2", "final"):
        assert (tmp_path / folder / BIASES_FILE).exists()
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        with torch.no_grad():
            assert not torch.equal(loaded(input_ids=IDS).logits, expected)
            equipoise.attach(loaded, "frozen", biases=tmp_path / folder)
            assert torch.equal(loaded(input_ids=IDS).logits, expected)
    again = lora(name, copy.deepcopy(base))
    second = EquipoiseCallback(BIASES, biases=tmp_path / "final")  # without move_frozen they stay as they are
    train(again, rows(8), [second])
    assert all(torch.equal(second.balance.biases[layer], biases[-1][layer]) for layer in LAYERS)


@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_an_adapter_equals_never_having_stopped(name, tmp_path):
    base, data, options = family(name), rows(24), dict(save_strategy="steps", save_steps=1)
    watches = []
    for which, resume in (("whole", None), ("other", None), ("other", True)):
        callback = EquipoiseCallback(BIASES, LOSS, move_frozen=True)
        watches.append(Watch(callback))
        stops = [Stop(2)] if which == "other" and resume is None else []
        model = lora(name, copy.deepcopy(base))
        train(model, data, [callback, watches[-1], *stops], tmp_path / which, resume=resume, **options)
    assert (tmp_path / "other" / "checkpoint-2" / STATE_FILE).exists()
    whole, _, rest = watches
    assert len(whole.biases) == 3 and len(rest.biases) == 1
    assert all(torch.equal(rest.biases[0][layer], whole.biases[2][layer]) for layer in LAYERS)
    assert distance(rest.gradients[0], whole.gradients[2]) == 0.0


@pytest.mark.parametrize(
    "options",
    [dict(modules_to_save=["gate"]), dict(target_parameters=["mlp.gate.weight"])],
    ids=["trained in full", "an adapter"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_biases_of_trained_routers_move(name, options):
    def model():
        return adapted(name, target_modules=["q_proj"], **options)

    callback, plain, counted, moved = EquipoiseCallback(BIASES), Watch(), Watch(), Watch()
    train(model(), rows(12), [EquipoiseCallback("none"), counted])
    train(model(), rows(12), [plain])
    assert [distance(ours, theirs) for ours, theirs in zip(counted.gradients, plain.gradients, strict=True)] == [
        0.0
    ] * 2
    assert any("gate" in parameter for parameter in plain.gradients[0])
    moved.callback = callback
    train(model(), rows(12), [callback, moved])
    assert len(moved.biases[0]) == 2
    assert all(bias.any() for bias in moved.biases[0].values())
    with_loss = Watch()
    train(model(), rows(12), [EquipoiseCallback(LOSS), with_loss])
    of_routers = [name for name in plain.gradients[0] if "gate" in name and "gate_up" not in name]
    difference = [{name: step[0][name] for name in of_routers} for step in (with_loss.gradients, plain.gradients)]
    assert distance(*difference) > 1e-3


def test_multiplicative_biases_on_a_frozen_base_need_move_frozen():
    strategy = "loss-free:rule=multiplicative"
    with pytest.raises(UsageError, match="move_frozen=True"):
        train(lora("qwen3_moe"), rows(8), [EquipoiseCallback(strategy)])
    callback = EquipoiseCallback(strategy, move_frozen=True)
    train(lora("qwen3_moe"), rows(8), [callback])
    assert callback.balance.biases[LAYERS[0]].any()


def test_biases_of_a_frozen_model_without_adapters_stay():
    model, callback = family("qwen3_moe"), EquipoiseCallback(BIASES)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    train(model, rows(8), [callback])
    assert not callback.balance.biases[LAYERS[0]].any()
