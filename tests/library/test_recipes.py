"""Recipes: every value has a source and every string parses. Coefficients: the gradients are equal, by autograd."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from generated import update
from recipes_page import PAGE, PAGES

from equipoise.balancers import parse_strategy
from equipoise.errors import UsageError
from equipoise.recipes import (
    FRAMEWORKS,
    RECIPES,
    WITHHELD,
    convert_coefficient,
    recipe,
    split_strategy,
)

LAYERS, SEQUENCES, LENGTH, EXPERTS, K, RANKS = 3, 4, 8, 8, 2, 4
TOKENS = SEQUENCES * LENGTH
SETTING = dict(num_layers=LAYERS, k=K, num_experts=EXPERTS, data_parallel=RANKS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_to_what_it_says(name):
    balancers = parse_strategy(RECIPES[name].strategy)
    parts = split_strategy(RECIPES[name].strategy)
    assert [balancer.name for balancer in balancers] == [part.partition(":")[0] for part in parts]
    for balancer, part in zip(balancers, parts, strict=True):
        for option in part.partition(":")[2].split(","):
            key, _, text = option.partition("=")
            value = getattr(balancer, key)
            assert str(value).lower() == text if isinstance(value, bool | str) else value == float(text)


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_of_a_recipe_has_a_public_source(name):
    one = RECIPES[name]
    assert one.name == name
    assert one.score_function in ("softmax", "sigmoid", "sqrt_softplus")
    assert one.summary.endswith(".")
    assert {key for key, _, _ in one.values()} == set(one.sources), "a source for each option, and for no other"
    for key, value, source in one.values():
        assert value, key
        assert re.search(r"arXiv:\d{4}\.\d{5}|github\.com/", source), f"{key}: {source}"


def test_values_are_the_score_function_and_every_option_in_order():
    assert [(key, value) for key, value, _ in recipe("deepseek-v3").values()] == [
        ("score_function", "sigmoid"),
        ("loss-free:rate", "1e-3"),
        ("loss-free:rule", "sign"),
        ("loss-free:center", "false"),
        ("lbl:coefficient", "1e-4"),
        ("lbl:scope", "sequence"),
    ]


def test_olmoe_is_its_config_in_our_units():
    lbl, z = parse_strategy(recipe("olmoe").strategy)
    assert lbl.coefficient == convert_coefficient(0.01, "megablocks", num_layers=16) == 0.01 / 16
    assert z.coefficient == 0.001 / (16 * 8)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek_v3", ["must be one of the 15", "got 'deepseek_v3'", "Did you mean deepseek-v3"]),
        ("DeepSeek-V4", ["Did you mean deepseek-v4"]),
        ("nothing like it", ["`equipoise recipes` lists: got 'nothing like it'."]),
        ("qwen3", ["must have a source for every value", "not its weight"]),
    ],
)
def test_an_unknown_recipe_suggests_close_names(name, words):
    with pytest.raises(UsageError) as error:
        recipe(name)
    for word in words:
        assert word in str(error.value)


def test_withheld_names_are_not_recipes():
    assert not set(WITHHELD) & set(RECIPES)


def test_recipes_import_nothing_but_errors():
    code = (
        "import sys, equipoise.recipes\nprint(sorted(n for n in sys.modules if n.startswith(('equipoise.', 'torch'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    recipes = ["equipoise.recipes", "equipoise.recipes.convert", "equipoise.recipes.published"]
    assert done.stdout.strip() == str(["equipoise.errors", *recipes])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert update(text, PAGES[page]()) == text, "run: python docs/tools/recipes_page.py"


def test_a_page_without_its_markers_is_an_error():
    with pytest.raises(UsageError, match="must hold <!-- recipes --> and <!-- end of recipes --> once each"):
        update("# Recipes", PAGES[PAGE]())


# Coefficients. Each framework's loss as its source code describes it, on logits (layers, tokens, experts) and choices
# (layers, tokens, k). Gradients are at the logits.


def _probabilities(logits):
    return logits.softmax(-1)


def _counts(ids):
    return torch.nn.functional.one_hot(ids, EXPERTS).sum((-3, -2)).double()


def ours(c, logits, ids):
    f = _counts(ids) / (K * logits.shape[-2])
    return c * (EXPERTS * f * _probabilities(logits).mean(-2)).sum()


def ours_by_sequence(c, logits, ids):
    split = (LAYERS, SEQUENCES, LENGTH)
    return ours(c, logits.reshape(*split, EXPERTS), ids.reshape(*split, K)) / SEQUENCES


def megatron(c, logits, ids):
    """sum(probs.sum(0) * tokens_per_expert) * E * coeff / (topk * T^2), attached in every layer."""
    layers = zip(_probabilities(logits), _counts(ids), strict=True)
    return sum((p.sum(0) * n).sum() * EXPERTS * c / (K * TOKENS * TOKENS) for p, n in layers)


def megatron_global(c, logits, ids):
    """The same on each rank, with counts and T of all ranks; data parallelism averages the gradients of the ranks."""
    counts = _counts(ids)
    ranks = [
        sum((p.sum(0) * n).sum() * EXPERTS * c / (K * TOKENS * TOKENS) for p, n in zip(mine, counts, strict=True))
        for mine in _probabilities(logits).chunk(RANKS, dim=1)
    ]
    return sum(ranks) / RANKS


def transformers(c, logits, ids):
    """E * sum(tokens_per_expert * router_prob_per_expert), both means over the concatenated layers."""
    all_logits = logits.flatten(0, 1)
    tokens_per_expert = _counts(ids).sum(0) / all_logits.shape[0]
    return c * EXPERTS * (tokens_per_expert * _probabilities(all_logits).mean(0)).sum()


def olmo_core(c, logits, ids):
    """num_experts / top_k * dot(batch_size_per_expert, scores.mean(0)) / (B * S), with the weight over n_layers."""
    layers = zip(_probabilities(logits), _counts(ids), strict=True)
    return sum(c / LAYERS * EXPERTS / K * torch.dot(n, p.mean(0)) / TOKENS for p, n in layers)


def megablocks(c, logits, ids):
    """E * weight / (layers * tokens * top_k) * dot(tokens_per_expert, mean scores), over all layers in one vector."""
    scale = EXPERTS * c / (LAYERS * TOKENS * K)
    return scale * torch.dot(_counts(ids).flatten(), _probabilities(logits).mean(1).flatten())


def deepspeed(c, logits, ids):
    """l_aux = mean(me * ce) * E^2 / k in every MoE layer; the caller sums and weighs."""
    me, ce = _probabilities(logits).mean(1), _counts(ids) / TOKENS
    return c * sum((m * e).mean() * EXPERTS * EXPERTS / K for m, e in zip(me, ce, strict=True))


def maxtext(c, logits, ids):
    """mean(density * density_prob) * E^2 * weight, densities by sequence; the mean over layers is added to the loss."""
    split = (LAYERS, SEQUENCES, LENGTH)
    density = _counts(ids.reshape(*split, K)) / LENGTH
    density_prob = _probabilities(logits).reshape(*split, EXPERTS).mean(-2)
    return torch.stack([(a * b).mean() * EXPERTS**2 * c for a, b in zip(density, density_prob, strict=True)]).mean()


def xtuner(c, logits, ids):
    """E / (tokens * k) * (tokens_per_expert * mean weights).sum(-1), summed over layers, times alpha."""
    scale = EXPERTS / (TOKENS * K)
    return c * (scale * (_counts(ids) * _probabilities(logits).sum(1) / TOKENS).sum(-1)).sum()


def paper_raw(c, logits, ids):
    """alpha * sum_i f_i P_i, f_i = E / (K T) * count, P_i the mean of the sigmoid scores."""
    f, p = EXPERTS / (K * TOKENS) * _counts(ids), logits.sigmoid().mean(1)
    return c * (f * p).sum()


THEIRS = {
    "equipoise": ours,
    "megatron": megatron,
    "megatron-global": megatron_global,
    "transformers": transformers,
    "olmo-core": olmo_core,
    "megablocks": megablocks,
    "deepspeed": deepspeed,
    "maxtext": maxtext,
    "xtuner": xtuner,
    "paper-raw": paper_raw,
}
POOLED_LAYERS = ("transformers",)  # its layers share their counts
INEXACT = ("paper-raw",)  # no factor is exact


def _logits():
    return torch.randn(LAYERS, TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def _gradient(loss, c, logits, ids):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(c, logits, ids), logits)[0]


def test_every_framework_is_checked():
    assert set(THEIRS) == set(FRAMEWORKS)


@pytest.mark.parametrize("name", [name for name in THEIRS if name not in INEXACT])
def test_a_converted_coefficient_has_the_same_gradient(name):
    logits = _logits()
    ids = logits.topk(K, dim=-1).indices
    if name in POOLED_LAYERS:
        ids = ids[:1].expand(LAYERS, -1, -1)
    here = ours_by_sequence if name == "maxtext" else ours
    converted = convert_coefficient(0.3, name, **SETTING)
    there = _gradient(THEIRS[name], 0.3, logits, ids)
    torch.testing.assert_close(_gradient(here, converted, logits, ids), there, rtol=1e-12, atol=0)
    assert there.abs().max() > 1e-4


def test_no_coefficient_reproduces_transformers_if_layers_differ():
    logits = _logits()
    ids = logits.topk(K, dim=-1).indices
    there = _gradient(transformers, 1.0, logits, ids)
    here = _gradient(ours, 1.0, logits, ids)
    best = (there * here).sum() / here.square().sum()  # least squares
    assert (there - best * here).norm() > 0.1 * there.norm()


def test_two_collapsed_layers_look_balanced_to_transformers():
    """Layer 0 uses the first half of the experts, layer 1 the second: pooled, all are used equally."""
    half = EXPERTS // 2
    logits = torch.zeros(2, TOKENS, EXPERTS, dtype=torch.float64)
    logits[0, :, :half], logits[1, :, half:] = 20, 20
    ids = torch.stack([torch.arange(TOKENS * K) % half, torch.arange(TOKENS * K) % half + half]).reshape(2, TOKENS, K)
    assert transformers(1.0, logits, ids).item() == pytest.approx(K)  # its value at balance
    assert ours(1.0, logits, ids).item() == pytest.approx(2 * 2)  # two layers, each twice its value at balance


def test_raw_scores_of_one_half_differ_by_a_factor_of_half_the_experts_and_a_common_shift():
    """At the start all sigmoid scores are 1/2. The gradients then differ by a shift that all experts share, because
    the raw loss also lowers all scores together. That changes no choice."""
    logits = torch.zeros(LAYERS, TOKENS, EXPERTS, dtype=torch.float64)
    ids = _logits().topk(K, dim=-1).indices

    def normalised(c, logits, ids):
        scores = logits.sigmoid()
        p = (scores / scores.sum(-1, keepdim=True)).mean(-2)
        return c * (EXPERTS * _counts(ids) / (K * TOKENS) * p).sum()

    raw = _gradient(paper_raw, 1e-3, logits, ids)
    here = _gradient(normalised, convert_coefficient(1e-3, "paper-raw", num_experts=EXPERTS), logits, ids)
    torch.testing.assert_close(here, raw - raw.mean(-1, keepdim=True), rtol=1e-12, atol=1e-18)
    assert raw.mean() > 0
    assert here.abs().max() > 1e-6


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_value_at_balance_matches_the_table(name):
    logits = torch.zeros(LAYERS, TOKENS, EXPERTS, dtype=torch.float64)
    ids = (torch.arange(LAYERS * TOKENS * K) % EXPERTS).reshape(LAYERS, TOKENS, K)
    says = {"1": 1, "k": K, "1 / D": 1 / RANKS, "mean of sum_j s_j": EXPERTS / 2}[FRAMEWORKS[name].balanced]
    layers = LAYERS if FRAMEWORKS[name].layers in ("sum", "sum, by the caller") else 1
    assert THEIRS[name](1.0, logits, ids).item() == pytest.approx(says * layers, rel=1e-12)


@pytest.mark.slow
def test_our_loss_of_transformers_equals_its_own_function():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")

    def theirs(c, logits, ids):
        return c * modeling.load_balancing_loss_func(tuple(logits), EXPERTS, K)

    logits = _logits().float()
    ids = logits.topk(K, dim=-1).indices
    torch.testing.assert_close(_gradient(theirs, 1.0, logits, ids), _gradient(transformers, 1.0, logits, ids).float())
    same = logits[:1].expand(LAYERS, -1, -1)
    ids = same.topk(K, dim=-1).indices
    converted = convert_coefficient(1.0, "transformers", **SETTING)
    torch.testing.assert_close(_gradient(ours, converted, same, ids).float(), _gradient(theirs, 1.0, same, ids))


@pytest.mark.parametrize(
    ("source", "target", "options", "expected"),
    [
        ("megatron", "equipoise", {}, 1e-3),
        ("transformers", "equipoise", dict(num_layers=48, k=8), 1e-3 / 6),
        ("equipoise", "transformers", dict(num_layers=48, k=8), 6e-3),
        ("maxtext", "equipoise", dict(num_layers=24, k=6), 2.5e-4),
        ("olmo-core", "equipoise", dict(num_layers=16), 6.25e-5),
        ("olmo-core", "megablocks", dict(num_layers=16), 1e-3),
        ("megatron-global", "equipoise", dict(data_parallel=8), 1.25e-4),
        ("megatron", "megatron-global", dict(data_parallel=8), 8e-3),
        ("paper-raw", "equipoise", dict(num_experts=64), 3.2e-2),
        ("transformers", "megatron", dict(num_layers=16, k=8), 5e-4),
    ],
)
def test_coefficients_worked_by_hand(source, target, options, expected):
    assert convert_coefficient(1e-3, source, target, **options) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FRAMEWORKS, FRAMEWORKS)))
def test_converting_there_and_back_changes_nothing(source, target):
    there = convert_coefficient(7e-3, source, target, **SETTING)
    assert convert_coefficient(there, target, source, **SETTING) == pytest.approx(7e-3, rel=1e-15)
    assert convert_coefficient(0.0, source, target, **SETTING) == 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1e-3, "megatrom"), {}, "must be one of equipoise, megatron, .* got 'megatrom'. Did you mean megatron"),
        ((1e-3, "megatron", "hf"), {}, "must be one of .* got 'hf'. If its loss is 1 at perfect balance"),
        ((1e-3, "transformers"), {}, r"num_layers and k must be given .*\(factor k / L\): got none. Write num_layers="),
        ((1e-3, "transformers"), dict(k=2), "^num_layers must be given"),
        ((1e-3, "megatron-global"), {}, "data_parallel must be given"),
        ((1e-3, "paper-raw"), {}, "num_experts must be given"),
        ((float("nan"), "megatron"), {}, "coefficient must be a finite number: got nan"),
        ((float("inf"), "megatron"), {}, "coefficient must be a finite number: got inf"),
        (("1e-3", "megatron"), {}, "coefficient must be a finite number: got '1e-3'"),
        ((True, "megatron"), {}, "coefficient must be a finite number: got True"),
        ((-1e-3, "megatron"), {}, "coefficient must be at least 0: got -0.001"),
        ((1e-3, "olmo-core"), dict(num_layers=0), "num_layers must be a whole number from 1: got 0"),
        ((1e-3, "olmo-core"), dict(num_layers=2.0), "num_layers must be a whole number from 1: got 2.0"),
        ((1e-3, "transformers"), dict(num_layers=2, k=9, num_experts=8), "k must be at most num_experts: got 9 of 8"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments, options, message):
    with pytest.raises(UsageError, match=message):
        convert_coefficient(*arguments, **options)
