"""Every family of the installed Transformers: a tiny model of each keeps every invariant of a tap, or it is refused.

``tested.json`` in the package says which router classes were tested; these tests keep it equal to what passes.
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
from equipoise.testing import TAP_INVARIANTS, check_tap
from equipoise_lab.models import installed
from equipoise_lab.models.families import TESTED, families

ROUTERS: dict[str, list[str]] = json.loads(TESTED.read_text())["routers"]
WHOLE = sorted(name for name, routers in ROUTERS.items() if set(routers) - set(PARTS))
REFUSED = {  # what is no router of top-k with a bias, and what the listing says of it
    "DbrxRouter": "forward does not return (logits, weights, expert_ids)",
    "DeepseekV4HashRouter": "it chooses by the id of the token (a hash router), which no bias moves",
    "JetMoeTopKGating": "forward does not return (logits, weights, expert_ids)",
    "NllbMoeTop2Router": "it chooses without torch.topk",  # argmax twice, the second of logits with noise
    "PhimoeTopKRouter": "it chooses without torch.topk",  # sampled in training
    "SwitchTransformersTop1Router": "it chooses without torch.topk",  # argmax, and a capacity
    "ZayaRouter": "the chosen experts are not the best by these scores and the bias",  # one choice is no expert
    None: "its router is no module of its own",
}
WITHOUT_FACTOR = "factor moves the choice only"  # of a choice by logits
PASSED_OVER = {"inkling2": {"cast keeps float32 biases"}}  # the model itself does not run in bfloat16
WITHOUT_PADDING = "padding is not counted"  # of a block, which is given no mask


def _every_kind_of_token(name: str, router: nn.Module) -> bool:
    return "vision_moe" not in name  # in Ernie's blocks: it sees tokens of images alone


def _check(model: nn.Module, passed_over: set[str]) -> None:
    torch.manual_seed(0)
    checked = check_tap(model, shrunken.batch(), where=_every_kind_of_token)
    assert set(TAP_INVARIANTS) - set(checked) == passed_over


@pytest.mark.filterwarnings("ignore")  # of models under construction
@pytest.mark.parametrize("model_type", WHOLE)
def test_a_tiny_model_of_the_family_keeps_every_invariant(model_type):
    model = shrunken.build(model_type)
    found = find_routers(model)
    assert {type(router.module).__name__ for router in found} == set(ROUTERS[model_type]) - set(PARTS)
    assert {(router.num_experts - 8, router.k) for router in found} <= {(0, 2), (0, 1), (0, 8), (256, 2)}
    by_logits = {router.kind.selection for router in found} == {"logits"}
    _check(model, ({WITHOUT_FACTOR} if by_logits else set()) | PASSED_OVER.get(model_type, set()))


@pytest.mark.parametrize("router", PARTS)
def test_a_block_of_the_family_keeps_every_invariant(router):
    model = shrunken.build_part(router)
    assert [type(found.module).__name__ for found in find_routers(model)] == [router] * 2
    _check(model, {WITHOUT_PADDING})


@pytest.mark.slow
def test_the_listing_names_what_was_tested_and_why_the_others_are_not_supported():
    told: list[tuple[int, int, str]] = []
    rows = families(lambda *progress: told.append(progress))
    assert [done for done, _, _ in told] == list(range(told[0][1]))
    supported: dict[str, list[str]] = {}
    for row in rows:
        if row.supported:
            supported.setdefault(row.model_type, []).append(row.router)
    assert supported == ROUTERS, "tested.json must name what is supported, and the tests above must pass for it"
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
    for score_function in ("ForgetGate", "DFineGate", "Deimv2Gate", "ResidualGate", "DensityRouter"):
        assert not any(name and name.endswith(score_function) for name in by_router), "a gate of something else"
    places = {"DeepseekV3TopkRouter": "router", "Ernie4_5_MoeTopKRouter": "part", "AfmoeTokenChoiceRouter": "block"}
    for router, place in {**places, "MixtralTopKRouter": None}.items():
        assert by_router[router].slot_held_by == place
        assert (by_router[router].slot is None) == (place is None)
    assert by_router["DeepseekV3TopkRouter"].group_limits and not by_router["MixtralTopKRouter"].group_limits
    assert {row.model_type for row in rows if row.hash_layers} == {"deepseek_v4"}
    kinds = {(row.score_function, row.selection, row.gives) for row in rows if row.supported}
    assert {score_function for score_function, _, _ in kinds} == {"softmax", "sigmoid", "sqrt_softplus"}
    assert {gives for _, _, gives in kinds} == {"logits", "probabilities", "dense"}


def test_the_readme_has_the_numbers():
    text = " ".join((Path(__file__).parents[3] / "README.md").read_text().split())
    assert f"{sum(map(len, ROUTERS.values()))} router classes of {len(ROUTERS)} model families are tested so" in text


def test_what_was_tested_on_another_transformers_is_not_called_tested(monkeypatch):
    import transformers

    assert installed.tested_routers() == ROUTERS
    monkeypatch.setattr(transformers, "__version__", "99.0.0")
    assert installed.tested_routers() == {}


HASHED, SPARSE = ["hash_moe", "hash_moe", "moe"], ["compressed_sparse_attention"] * 3


def test_hash_layers_are_left_out_and_named_once(caplog):
    model = shrunken.build("deepseek_v4", num_hidden_layers=3, mlp_layer_types=HASHED, layer_types=SPARSE)
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


def test_groups_that_do_not_act_are_no_hindrance():
    model = shrunken.build("deepseek_v2", topk_method="greedy", n_group=4, topk_group=2)
    attach(model, "loss-free").detach()


def test_groups_before_an_bias_are_refused():
    model = shrunken.build("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2)
    with pytest.raises(EquipoiseError, match="there are groups, which are chosen before the bias is added"):
        attach(model)


@pytest.mark.parametrize("first", [2, 3])
def test_a_proof_is_not_taken_over_by_a_router_whose_config_says_another_k(first):
    for k in (first, 5 - first):
        model = shrunken.build("gemma4", top_k_experts=k)
        assert [router.k for router in find_routers(model)] == [k]
        balance = attach(model, "loss-free")
        model(**shrunken.batch())
        balance.step()
        assert all(load.sum() == k * 16 for load in balance.load.values())


def test_a_factor_of_logits_is_refused():
    with pytest.raises(EquipoiseError, match="which a factor turns upside down where they are below zero"):
        attach(shrunken.build("gpt_oss"), "loss-free:rule=multiplicative")


@pytest.mark.parametrize("model_type", ["llama4", "gemma4", "gpt_oss"])
def test_a_frozen_bias_of_any_kind_leaves_the_gradient_of_the_same_choice(model_type):
    """The gate's gradient, steered, is that of a plain router whose choice is the same."""
    plain, steered = shrunken.build(model_type), shrunken.build(model_type)
    (router,) = find_routers(steered)
    constant = torch.full((router.num_experts,), 3.0)  # moves nothing
    attach(steered, "frozen", biases={router.name: constant})
    for model in (plain, steered):
        torch.manual_seed(0)
        model(**shrunken.batch()).logits.square().mean().backward()
    for (name, ours), theirs in zip(steered.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert_close(ours.grad, theirs.grad, rtol=0, atol=0, msg=name)
