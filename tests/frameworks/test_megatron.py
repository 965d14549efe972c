"""Megatron-Core 0.19.2 on CPUs: conformance/drivers/megatron_on_cpu.py says what of Megatron is patched for that."""

import pytest
import torch
from frameworks import megatron_models as models
from frameworks import megatron_ranks
from frameworks.megatron_models import (
    COEFFICIENT,
    EXPERTS,
    LAYERS,
    UNEVEN,
    Reference,
    data_parallel,
    distance,
    forward_backward,
    gpt,
    gradients,
    micro_batches,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter

from equipoise import EquipoiseError
from equipoise.integrations.megatron import attach

SCOPES = ("global_batch", "micro_batch", "sequence")
RATE = megatron_ranks.RATE
NO_BIAS = {f"decoder.layers.{n}.mlp.router": torch.zeros(EXPERTS) for n in range(2 * LAYERS)}


one_rank = models.one_rank


@pytest.fixture(autouse=True)
def no_scale(one_rank):
    models.forget_scale()


def one_step(strategy, batches=None, *, weight=0.0, form="sum", routers_only=False, model=None, **options):
    """The gradients and the Balance of one step of Megatron's schedule."""
    model = data_parallel(gpt(**options) if model is None else model)
    # With ``frozen`` Megatron's own counting is off, which fails under a padding mask.
    balance = attach(model, *["frozen"] * ("loss-free" not in strategy), strategy)
    forward_backward(model, micro_batches(*UNEVEN) if batches is None else batches, weight, form)
    found = gradients(model, routers_only)
    balance.step()
    return found, balance


def expected_of(scope, batches=None, routers_only=False, factor=1.0, **options):
    """The same by float64 autograd: in a plain loop a backward knows the micro-batches up to its own."""
    batches = micro_batches(*UNEVEN) if batches is None else batches
    reference = Reference(**options)
    reference.forward(batches)
    loss = sum(reference.loss(n, scope, range(n + 1)) for n in range(len(batches))) / len(batches)
    return reference.gradients(factor * loss, routers_only), reference


def assert_counts(balance, reference):
    expected = reference.loads()
    assert {n: load.tolist() for n, load in balance.load.items()} == {n: load.tolist() for n, load in expected.items()}


# ---- counts and gradients of one process ----


@pytest.mark.parametrize("form", ["sum", "mean"])  # of what the loss function returns to the schedule
@pytest.mark.parametrize("scope", SCOPES)
def test_accumulation_with_uneven_padding(scope, form):
    found, balance = one_step(f"lbl:scope={scope},coefficient={COEFFICIENT}+loss-free", form=form)
    expected, reference = expected_of(scope)
    assert distance(found, expected) < 1e-6
    assert_counts(balance, reference)
    assert balance.metrics()["tokens"] == 31


OPTIONS = {
    "softmax": {"moe_router_score_function": "softmax"},
    "softmax before the choice": {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
    "scaled weights": {"moe_router_topk_scaling_factor": 2.5},
    "shared experts": {"moe_shared_expert_intermediate_size": 16},
    "full recomputation": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full recomputation of two layers": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "full recomputation of a block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
    **{
        f"recomputation of {module}": {"recompute_granularity": "selective", "recompute_modules": [module]}
        for module in ("moe", "core_attn", "layernorm")
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_router_and_recomputation(options):
    strategy = "+".join(f"lbl:scope={scope},coefficient={COEFFICIENT}" for scope in SCOPES)
    found, balance = one_step(strategy, **options)
    parts = [expected_of(scope, **{k: v for k, v in options.items() if "recompute" not in k}) for scope in SCOPES]
    expected = {name: sum(gradient[name] for gradient, _ in parts) for name in parts[0][0]}
    assert distance(found, expected) < 1e-6
    assert_counts(balance, parts[0][1])


def test_tokens_stand_sequence_first():
    """Three rows, each with padding of its own: token n of the router belongs to row n % 3."""
    batches = micro_batches((8, 1, 5), (2, 7, 8))
    found, balance = one_step(f"lbl:scope=sequence,coefficient={COEFFICIENT}", batches)
    expected, reference = expected_of("sequence", batches)
    assert distance(found, expected) < 1e-6
    assert_counts(balance, reference)


def test_a_mask_that_separates_documents_shows_sequences(monkeypatch):
    """Megatron's masks of attention are True where a token may not attend."""
    batches, arguments = micro_batches((8, 8)), models.arguments

    def with_documents(batch):
        document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]])
        is_other = document[:, None, :, None] != document[:, None, None, :]
        given = arguments(batch)
        return given | {"attention_mask": given["attention_mask"] | is_other, "padding_mask": None}

    monkeypatch.setattr(models, "arguments", with_documents)
    found, _ = one_step(f"lbl:scope=sequence,coefficient={COEFFICIENT}", batches)
    reference = Reference()
    reference.forward(batches)
    (routed,) = reference.routed
    numbers = torch.tensor([0] * 3 + [1] * 5 + [2] * 6 + [3] * 2)
    reference.routed = [{name: one._replace(sequence=numbers) for name, one in routed.items()}]
    assert distance(found, reference.gradients(reference.loss(0, "sequence"), routers_only=False)) < 1e-6


def test_both_losses_together_are_one_loss():
    """The balancing loss has the weight that a mean over tokens has in the loss of the model."""
    batches = micro_batches(*UNEVEN)
    found, _ = one_step(f"lbl:coefficient={COEFFICIENT}", batches, weight=1.0)
    reference = Reference()
    outputs = reference.forward(batches)
    means = [(o * ~b.is_padding).sum() / (~b.is_padding).sum() for o, b in zip(outputs, batches, strict=True)]
    loss = sum(mean + reference.loss(n, "global_batch", range(n + 1)) for n, mean in enumerate(means)) / 3
    assert distance(found, reference.gradients(loss, routers_only=False)) < 1e-6


def test_per_token_the_loss_is_a_mean_over_all_tokens():
    batches = micro_batches(*UNEVEN)
    found, _ = one_step(f"lbl:coefficient={COEFFICIENT}", batches, weight=1.0, calculate_per_token_loss=True)
    reference = Reference()
    outputs = reference.forward(batches)
    loss = sum((o * ~b.is_padding).sum() / 31 for o, b in zip(outputs, batches, strict=True))
    loss = loss + sum(reference.num_tokens(n) / 31 * reference.loss(n, "global_batch", range(n + 1)) for n in range(3))
    assert distance(found, reference.gradients(loss, routers_only=False)) < 1e-6


@pytest.mark.parametrize("name", ["grad_scale_func", "moe_grad_scale_func"])
def test_the_scale_of_a_grad_scaler_reaches_the_loss(name):
    scale = (lambda loss: loss * 64.0) if name == "grad_scale_func" else (lambda: torch.tensor(64.0))
    model = gpt(**{name: scale})
    found, _ = one_step(f"lbl:coefficient={COEFFICIENT}", model=model)
    assert distance(found, expected_of("global_batch", factor=64.0)[0]) < 1e-6


@pytest.mark.parametrize("per_token", [False, True])
def test_a_z_loss_has_the_same_weight(per_token):
    found, _ = one_step("z:coefficient=0.1", calculate_per_token_loss=per_token)
    reference = Reference()
    reference.forward(micro_batches(*UNEVEN))
    loss = torch.zeros((), dtype=torch.float64)
    for n, routed in enumerate(reference.routed):
        weight = reference.num_tokens(n) / 31 if per_token else 1 / 3
        loss = loss + weight * sum(r.logits[~r.is_padding].logsumexp(-1).square().mean() for r in routed.values())
    assert distance(found, reference.gradients(0.1 * loss, routers_only=False)) < 1e-6


def test_a_choice_within_groups_is_counted(monkeypatch):
    chosen, model = [], gpt(moe_router_num_groups=4, moe_router_group_topk=2)
    routing = TopKRouter.routing

    def record(self, logits, padding_mask=None):
        weights, is_chosen = routing(self, logits, padding_mask)
        if torch.is_grad_enabled() and self.layer_number == 1:
            chosen.append(is_chosen[~padding_mask.reshape(-1)].sum(0))
        return weights, is_chosen

    wrapped = data_parallel(model)
    balance = attach(wrapped, "loss-free")
    monkeypatch.setattr(TopKRouter, "routing", record)
    forward_backward(wrapped, micro_batches(*UNEVEN))
    balance.step()
    assert balance.load["decoder.layers.0.mlp.router"].tolist() == sum(chosen).tolist()
    assert int(sum(chosen).sum()) == 31 * models.K


def test_biases_follow_the_sign_rule_over_several_updates():
    model = data_parallel(gpt())
    balance = attach(model, f"loss-free:rate={RATE}")
    biases = {name: NO_BIAS[name] for name in balance.biases}
    for step in range(5):
        batches = micro_batches(*UNEVEN, seed=step)
        forward_backward(model, batches)
        balance.step()
        reference = Reference(biases)
        reference.forward(batches)
        assert_counts(balance, reference)
        biases = models.moved(biases, reference.loads(), RATE)
        for layer in balance.layers:
            assert (balance.biases[layer.name].double() - biases[layer.name]).abs().max() < 1e-8
            assert torch.equal(layer.router.expert_bias, balance.biases[layer.name])


# ---- other models ----


def test_a_hybrid_model_is_counted():
    model = models.hybrid()
    found, balance = one_step(f"lbl:scope=sequence,coefficient={COEFFICIENT}", model=model)
    assert list(balance.load) == ["decoder.layers.1.mlp.router", "decoder.layers.3.mlp.router"]
    expected, reference = expected_of("sequence", model=models.hybrid)
    assert distance(found, expected) < 1e-6
    assert_counts(balance, reference)


def test_layers_of_multi_token_prediction_count_tokens_that_have_a_next_one():
    """Megatron shifts their mask and fills its end with zeros, so the end of a padded row would count."""
    batches, options = micro_batches((8, 3, 6)), {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.0}
    found, balance = one_step(f"lbl:scope=sequence,coefficient={COEFFICIENT}", batches, **options)
    expected, reference = expected_of("sequence", batches, **options)
    assert distance(found, expected) < 1e-6
    assert_counts(balance, reference)
    counts = {name: int(load.sum()) // models.K for name, load in balance.load.items()}
    mtp = "mtp.layers.{}.mtp_model_layer.mlp.router"
    main = {f"decoder.layers.{n}.mlp.router": 17 for n in range(LAYERS)}
    assert counts == {**main, mtp.format(0): 8 + 2 + 5, mtp.format(1): 8 + 1 + 4}
    with pytest.raises(EquipoiseError, match="mtp_use_repeated_layer"):
        one_step("loss-free", mtp_num_layers=2, mtp_use_repeated_layer=True)


def test_a_cast_leaves_biases_in_float32():
    for attach_first in (True, False):
        inner = gpt(bf16=True, params_dtype=torch.bfloat16)
        balance = attach(inner, f"loss-free:rate={RATE / 3}") if attach_first else None
        model = data_parallel(Float16Module(inner.config, inner))
        balance = balance or attach(model, f"loss-free:rate={RATE / 3}")
        forward_backward(model, micro_batches(*UNEVEN))
        balance.step()
        model.bfloat16()
        for layer in balance.layers:
            assert layer.router.weight.dtype == torch.bfloat16
            assert layer.router.expert_bias.dtype == torch.float32
            assert torch.equal(layer.router.expert_bias, balance.biases[layer.name])
            assert not torch.equal(layer.router.expert_bias, layer.router.expert_bias.bfloat16().float())


# ---- Megatron's own balancing ----


def test_its_own_update_moves_nothing_until_detach(caplog, monkeypatch):
    model, arguments = data_parallel(gpt()), models.arguments
    balance = attach(model, f"loss-free:rate={RATE}")
    assert "moe_router_bias_update_rate=0.001) is off until detach()" in caplog.text
    forward_backward(model, micro_batches(*UNEVEN))  # calls finalize_model_grads, which updates the bias
    assert not any(bias.any() for bias in balance.biases.values())
    balance.step()
    assert not megatron_ranks.own_update_moves(model)
    assert all(not layer.router.local_tokens_per_expert.any() for layer in balance.layers)
    balance.detach()
    model.config.finalize_model_grads_func = None  # so that the counts are left for the next line
    monkeypatch.setattr(models, "arguments", lambda batch: arguments(batch) | {"padding_mask": None})
    forward_backward(model, micro_batches((8, 8)))
    assert megatron_ranks.own_update_moves(model)


@pytest.mark.parametrize("name", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_its_own_loss_is_refused_beside_one_and_named_beside_a_bias(name, caplog):
    options = {"moe_router_load_balancing_type": name, "moe_aux_loss_coeff": 0.25}
    with pytest.raises(EquipoiseError, match=f"adds its own.*{name} with moe_aux_loss_coeff=0.25"):
        attach(gpt(**options), "lbl")
    attach(gpt(**options), "loss-free")
    assert f"a balancing loss of its own ({name} with moe_aux_loss_coeff=0.25)" in caplog.text
    several = {"moe_router_load_balancing_type": ["aux_loss", name], "moe_aux_loss_coeff": [0.0, 0.5]}
    if name != "aux_loss":
        with pytest.raises(EquipoiseError, match=f"{name} with moe_aux_loss_coeff=0.5"):
            attach(gpt(**several), "lbl")


def test_its_z_loss_is_refused_beside_ours_and_goes_on_beside_others():
    with pytest.raises(EquipoiseError, match="moe_z_loss_coeff=0.1"):
        attach(gpt(moe_z_loss_coeff=0.1), "z")
    found, _ = one_step(f"lbl:coefficient={COEFFICIENT}", moe_z_loss_coeff=0.1)
    expected, reference = expected_of("global_batch")
    squares = [r.logits[~r.is_padding].logsumexp(-1).square().mean() for m in reference.routed for r in m.values()]
    of_z = reference.gradients(0.1 * sum(squares) / len(reference.routed), routers_only=False)
    assert distance(found, {name: expected[name] + of_z[name] for name in expected}) < 1e-6


REFUSED = {
    "moe_expert_capacity_factor": 1.0,
    "moe_expert_rank_capacity_factor": 1.5,
    "moe_router_force_load_balancing": True,
    "moe_router_force_biased": 0.5,
    "moe_input_jitter_eps": 0.1,
    "moe_enable_routing_replay": True,
    "moe_router_fusion": True,
    "overlap_moe_expert_parallel_comm": True,
    "hybrid_context_parallel": True,
    "gtp_weight_remat_size": 2,
    "cuda_graph_impl": "full_iteration",
    "moe_router_load_balancing_type": "quantile_balancing",
}


@pytest.mark.parametrize(("option", "value"), REFUSED.items(), ids=REFUSED)
def test_an_option_that_cannot_be_counted_is_refused_by_name(option, value):
    model = gpt()
    setattr(model.config, option, value)
    with pytest.raises(EquipoiseError, match=option):
        attach(model, "loss-free")


def test_sinkhorn_is_refused_and_graphs_without_a_router_are_not():
    model = gpt()
    model.config.cuda_graph_impl, model.config.cuda_graph_modules = "transformer_engine", ["attn"]
    attach(model, "loss-free").detach()
    model.config.cuda_graph_modules = ["attn", "moe_router"]
    with pytest.raises(EquipoiseError, match="cuda_graph_impl"):
        attach(model, "loss-free")
    with pytest.raises(EquipoiseError, match="sinkhorn"):
        attach(gpt(moe_router_load_balancing_type="sinkhorn"), "loss-free")
