"""Every family of the installed Transformers: a tiny model of it keeps every invariant of a tap, or it is refused.

``tested.json`` in the package lists the router classes that pass these tests; the slow test here keeps it up to date.
"""

import json
import logging
from pathlib import Path

import pytest
import shrunken
import torch
from shrunken import PARTS
from torch import nn
from torch.testing import assert_close

from equipoise import EquipoiseError, attach
from equipoise.routers.find import find_routers, hash_routers, unknown_routers
from equipoise.testing import ROUTER_INVARIANTS, check_routers
from equipoise_lab.models.families import TESTED, families, load_tested_routers

ROUTERS: dict[str, list[str]] = json.loads(TESTED.read_text())["routers"]
WHOLE = sorted(name for name, routers in ROUTERS.items() if set(routers) - set(PARTS))
REFUSED = {  # router classes that cannot be balanced, and the beginning of the reason that the listing gives
    "DbrxRouter": "its forward does not return (logits, weights, expert_ids) but one tensor",
    "DeepseekV4HashRouter": "it chooses by the id of the token (a hash router), which no bias moves",
    "JetMoeTopKGating": "its forward does not return (logits, weights, expert_ids) but 5 outputs",
    "NllbMoeTop2Router": "its forward does not return (logits, weights, expert_ids) but 3 outputs",  # masks, and no ids
    "PhimoeTopKRouter": "it gives another result each time that it runs in training",  # sampled
    "SwitchTransformersTop1Router": "its forward does not return (logits, weights, expert_ids) but 3 outputs",  # a mask
    "ZayaRouter": "its weights are in proportion to none",  # one choice is no expert
    None: "its router is not a module of its own",
}
WITHOUT_FACTOR = "factor moves the choice only"  # does not apply to a choice by logits
WITHOUT_PADDING = "padding is not counted"  # does not apply to a single block, which gets no mask
NOT_CHECKED = {"inkling2": {"cast keeps float32 biases"}}  # the model itself does not run in bfloat16


def _sees_text(name: str, router: nn.Module) -> bool:
    return "vision_moe" not in name  # of Ernie: it sees only tokens of images


def _check(model: nn.Module, not_checked: set[str]) -> None:
    torch.manual_seed(0)
    checked = check_routers(model, shrunken.batch(), where=_sees_text)
    assert set(ROUTER_INVARIANTS) - set(checked) == not_checked


@pytest.mark.filterwarnings("ignore")  # of Transformers, while it builds models
@pytest.mark.parametrize("model_type", WHOLE)
def test_a_tiny_model_of_every_family_keeps_every_invariant(model_type):
    model = shrunken.build(model_type)
    layers = find_routers(model)
    assert {type(layer.router).__name__ for layer in layers} == set(ROUTERS[model_type]) - set(PARTS)
    assert {(layer.num_experts, layer.k) for layer in layers} <= {(8, 2), (8, 1), (8, 8), (264, 2)}
    by_logits = {layer.kind.selection for layer in layers} == {"logits"}
    _check(model, ({WITHOUT_FACTOR} if by_logits else set()) | NOT_CHECKED.get(model_type, set()))


@pytest.mark.parametrize("router", PARTS)
def test_a_single_block_of_a_family_keeps_every_invariant(router):
    model = shrunken.build_part(router)
    assert [type(layer.router).__name__ for layer in find_routers(model)] == [router] * 2
    _check(model, {WITHOUT_PADDING})


@pytest.mark.slow
def test_the_listing_names_every_tested_router_and_says_why_others_are_not_supported():
    progress: list[tuple[int, int, str]] = []
    rows = families(lambda *step: progress.append(step))
    assert [done for done, _, _ in progress] == list(range(progress[0][1]))
    supported: dict[str, list[str]] = {}
    for row in rows:
        if row.supported:
            supported.setdefault(row.model_type, []).append(row.router)
    assert supported == ROUTERS, "tested.json must list what is supported, and the tests above must pass for it"
    assert all(row.tested == row.supported for row in rows)
    assert sum(map(len, supported.values())) >= 60
    refused = {row.router: row.reason for row in rows if not row.supported}
    assert refused.keys() == REFUSED.keys()
    for router, reason in REFUSED.items():
        assert refused[router].startswith(reason), router
    assert all(
        (row.reason is None) == row.supported and (row.score_function is not None) == row.supported for row in rows
    )
    by_router = {row.router: row for row in rows}
    for gate in ("ForgetGate", "DFineGate", "Deimv2Gate", "ResidualGate", "DensityRouter"):
        assert not any(name and name.endswith(gate) for name in by_router), "this gate selects no experts"
    slot_places = {
        "DeepseekV3TopkRouter": "router",
        "Ernie4_5_MoeTopKRouter": "part",
        "AfmoeTokenChoiceRouter": "block",
    }
    for router, place in {**slot_places, "MixtralTopKRouter": None}.items():
        assert by_router[router].slot_held_by == place
        assert (by_router[router].slot is None) == (place is None)
    assert by_router["DeepseekV3TopkRouter"].group_limits and not by_router["MixtralTopKRouter"].group_limits
    assert {row.model_type for row in rows if row.hash_layers} == {"deepseek_v4"}
    kinds = {(row.score_function, row.selection, row.gives) for row in rows if row.supported}
    assert {score_function for score_function, _, _ in kinds} == {"softmax", "sigmoid", "sqrt_softplus"}
    assert {gives for _, _, gives in kinds} == {"logits", "probabilities", "dense"}


def test_the_readme_gives_the_numbers():
    text = " ".join((Path(__file__).parents[3] / "README.md").read_text().split())
    assert (
        f"{sum(map(len, ROUTERS.values()))} router classes of {len(ROUTERS)} model families are tested in this way"
        in text
    )


def test_nothing_counts_as_tested_on_another_version_of_transformers(monkeypatch):
    import transformers

    assert load_tested_routers() == ROUTERS
    monkeypatch.setattr(transformers, "__version__", "99.0.0")
    assert load_tested_routers() == {}


def test_hash_layers_are_not_balanced_and_named_in_one_warning(caplog):
    kinds, attention = ["hash_moe", "hash_moe", "moe"], ["compressed_sparse_attention"] * 3
    model = shrunken.build("deepseek_v4", num_hidden_layers=3, mlp_layer_types=kinds, layer_types=attention)
    first, second, third = (f"model.layers.{i}.mlp.gate" for i in range(3))
    with caplog.at_level(logging.WARNING, logger="equipoise"):
        balance = attach(model, "loss-free:rate=0.1,rule=sign")
    (record,) = caplog.records
    assert f"{first}, {second} are hash layers" in record.message and third not in record.message
    assert hash_routers(model) == [first, second] and unknown_routers(model) == []
    model(**shrunken.batch())
    balance.step()
    assert list(balance.load) == [third] and balance.load[third].sum() == 2 * 16
    assert balance.biases[third].any()


def test_expert_groups_that_are_switched_off_are_no_obstacle():
    model = shrunken.build("deepseek_v2", topk_method="greedy", n_group=4, topk_group=2)
    attach(model, "loss-free").detach()


def _grouped():
    return shrunken.build("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2)


def test_expert_groups_chosen_before_the_bias_is_added_cannot_be_steered():
    with pytest.raises(EquipoiseError, match="cannot be steered: there are groups, which are chosen before.*lbl"):
        attach(_grouped(), "loss-free")
    (layer,) = find_routers(_grouped())
    assert layer.obstacle == "there are groups, which are chosen before the bias is added"


def test_expert_groups_chosen_before_the_bias_are_counted_and_balanced_by_a_loss():
    model = _grouped()
    balance = attach(model, "lbl:coefficient=0.1")
    (layer,) = balance.layers
    seen = []
    layer.router.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(**shrunken.batch())
    value = balance.loss()
    (0 * output.logits.sum() + value).backward()
    balance.step()
    logits, _, expert_ids = seen[0]
    load = torch.bincount(expert_ids.flatten(), minlength=8)
    assert torch.equal(balance.load[layer.name], load) and load.sum() == 2 * 16
    share, mean_score = load.double() / load.sum(), logits.double().softmax(-1).mean(0)
    assert_close(value.double(), 0.1 * 8 * (share * mean_score).sum(), rtol=1e-5, atol=0)
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize("first", [2, 3])
def test_a_proof_is_not_reused_for_a_router_with_another_k(first):
    for k in (first, 5 - first):
        model = shrunken.build("gemma4", top_k_experts=k)
        assert [layer.k for layer in find_routers(model)] == [k]
        balance = attach(model, "loss-free")
        model(**shrunken.batch())
        balance.step()
        assert all(load.sum() == k * 16 for load in balance.load.values())


def test_a_multiplicative_bias_on_logits_is_refused():
    with pytest.raises(EquipoiseError, match="a factor reverses the order of experts"):
        attach(shrunken.build("gpt_oss"), "loss-free:rule=multiplicative")


@pytest.mark.parametrize("model_type", ["llama4", "gemma4", "gpt_oss"])
def test_a_bias_that_changes_no_choice_changes_no_gradient(model_type):
    plain, steered = shrunken.build(model_type), shrunken.build(model_type)
    (layer,) = find_routers(steered)
    constant = torch.full((layer.num_experts,), 3.0)  # equal for all experts
    attach(steered, "frozen", biases={layer.name: constant})
    for model in (plain, steered):
        torch.manual_seed(0)
        model(**shrunken.batch()).logits.square().mean().backward()
    for (name, parameter), expected in zip(steered.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            assert_close(parameter.grad, expected.grad, rtol=0, atol=0, msg=name)
