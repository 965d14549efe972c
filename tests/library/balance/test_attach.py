"""The arguments of ``attach``: balancers, ``biases``, ``where``."""

import models
import pytest
import torch
from models import EXPERTS, tiny_lm
from torch import nn
from windows import LAYERS, assert_gradients_close, assert_tokens_counted, attach_tiny, clone_gradients, random_ids

import equipoise
from equipoise import EquipoiseError, LossFree, attach

BIASES = {name: torch.linspace(-0.3, 0.3, EXPERTS) * (i + 1) for i, name in enumerate(LAYERS)}


@pytest.mark.parametrize("strategy", ["frozen", "loss-free:rate=0.1"])
def test_attach_starts_from_given_biases(strategy, tmp_path):
    from safetensors.torch import save_file

    save_file(BIASES, tmp_path / "equipoise_biases.safetensors")
    for biases in (BIASES, tmp_path, tmp_path / "equipoise_biases.safetensors", str(tmp_path)):
        model, balance = attach_tiny(strategy, biases=biases)
        for name in LAYERS:
            assert torch.equal(balance.biases[name], BIASES[name])
        assert torch.equal(model.blocks[0].gate.e_score_correction_bias, BIASES[LAYERS[0]])
        model(random_ids())
        balance.step()
        moved = [not torch.equal(balance.biases[name], BIASES[name]) for name in LAYERS]
        assert moved == [strategy != "frozen"] * 2
        assert torch.equal(BIASES[LAYERS[0]], torch.linspace(-0.3, 0.3, EXPERTS)), "the caller's tensor was moved"


@pytest.mark.parametrize("strategy", ["none", "lbl"])
def test_biases_without_a_balancer_that_holds_them_are_refused(strategy):
    with pytest.raises((EquipoiseError, ValueError), match="frozen"):
        attach_tiny(strategy, biases=BIASES)


@pytest.mark.parametrize(
    "biases",
    [
        {},
        {LAYERS[0]: torch.zeros(EXPERTS)},
        {name: torch.zeros(EXPERTS + 1) for name in LAYERS},
        {**BIASES, "blocks.2.gate": torch.zeros(EXPERTS)},
    ],
    ids=["none", "few", "long", "many"],
)
def test_biases_of_another_model_are_refused(biases):
    with pytest.raises(EquipoiseError, match="biases must name the layers of this model"):
        attach_tiny("frozen", biases=biases)
    with pytest.raises(EquipoiseError, match="biases must be a mapping or a saved file: .* does not exist"):
        attach_tiny("frozen", biases="/nowhere/at/all")


@pytest.mark.parametrize(
    ("balancers", "error", "message"),
    [
        (["los-free"], equipoise.UsageError, "got 'los-free'"),
        (["frozen+loss-free"], ValueError, "one balancer may move the bias: got frozen and loss-free"),
        ([LossFree(), LossFree()], ValueError, "one balancer may move the bias"),
        ([LossFree], TypeError, "object such as LossFree"),
        ([3], TypeError, "got int"),
    ],
    ids=["name", "strategy", "objects", "class", "number"],
)
def test_attach_refuses_bad_balancers(balancers, error, message):
    model = tiny_lm()
    with pytest.raises(error, match=message):
        attach(model, *balancers)
    assert not model._forward_hooks
    attach(model)


def test_an_invalid_strategy_is_a_usage_error():
    with pytest.raises(equipoise.UsageError, match="one balancer may move the bias"):
        attach(tiny_lm(), "frozen+loss-free")


def test_where_chooses_layers():
    model, balance = attach_tiny("loss-free:rate=0.1", where=lambda name, router: name.startswith("blocks.1"))
    assert list(balance.biases) == LAYERS[1:]
    model(random_ids())
    balance.step()
    assert not model.blocks[0].gate.e_score_correction_bias.any()
    with pytest.raises(EquipoiseError, match="where must choose at least one router"):
        attach(tiny_lm(), where=lambda name, router: False)


def test_balancers_are_copied_and_may_be_reused():
    balancer = LossFree(rate=0.1)
    model, balance = attach_tiny(balancer)
    _, other = attach_tiny(balancer)
    model(random_ids())
    balance.step()
    assert not other.biases[LAYERS[0]].any() and balance.biases[LAYERS[0]].any()
    assert vars(balancer) == vars(LossFree(rate=0.1))


def test_without_balancers_attach_only_counts():
    model, balance = attach_tiny()
    plain = tiny_lm()
    for _ in range(2):
        model(random_ids()).backward()
        plain(random_ids()).backward()
        balance.step()
    assert_gradients_close(clone_gradients(model), clone_gradients(plain), 0)
    assert_tokens_counted(balance, 14)
    assert all(not bias.any() for bias in balance.biases.values())


def test_notes_and_repr_describe_what_is_attached():
    _, balance = attach_tiny("loss-free:rule=sign+lbl")
    assert any("100 steps" in note for note in balance.notes(100))
    assert repr(balance) == "Balance('loss-free:rule=sign+lbl', 2 layers of 6 experts)"


def test_a_model_with_two_score_functions_has_the_notes_for_both():
    """The sign rule has a note for sigmoid layers. It must appear even if a softmax layer comes first."""
    model = tiny_lm()
    model.blocks = nn.ModuleList([model.blocks[1], model.blocks[0]])
    assert attach(model, "loss-free").notes(100)


def test_a_state_with_biases_is_refused_without_a_balancer_that_holds_them():
    balance = equipoise.attach(tiny_lm(), "frozen", biases=BIASES)
    other = equipoise.attach(tiny_lm(), "lbl")
    with pytest.raises(EquipoiseError, match="biases must have a balancer that keeps them"):
        other.load_state_dict(balance.state_dict())
    other.load_state_dict(equipoise.attach(tiny_lm(), "loss-free").state_dict())  # biases of zero: nothing is lost


def test_attach_requires_a_module():
    with pytest.raises(TypeError, match="must be a torch.nn.Module: got str"):
        equipoise.attach("qwen", "lbl")


def test_where_must_be_a_function():
    with pytest.raises(TypeError, match="where must be a function of .name, router.: got str"):
        equipoise.attach(tiny_lm(), "lbl", where="blocks.0")


def test_a_model_with_its_own_balancing_loss_is_warned_about(caplog):
    model = models.family("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    equipoise.attach(model, "lbl")
    assert "adds a load-balancing loss of its own" in caplog.text


def test_an_attach_that_fails_closes_its_process_group(monkeypatch):
    closed = []
    monkeypatch.setattr("equipoise.attachment.Pool.close", lambda pool: closed.append(pool))
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        attach("no model", "loss-free")
    assert len(closed) == 1
    attach(tiny_lm(), "loss-free")
    assert len(closed) == 1
