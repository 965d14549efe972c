"""Transformers' experts, computed our way: the same outputs and gradients, for every kind, and back again."""

from copy import deepcopy

import models
import pytest
import shrunken
import torch
from torch.testing import assert_close

from equipoise.integrations import experts
from equipoise.integrations.experts import use_quick_experts
from equipoise.nn import grouped

SWIGLU = ["deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe"]


@pytest.fixture
def calls(monkeypatch):
    """Who computed, and in which dtype."""
    seen = []

    def watch(name):
        function = getattr(experts, name)

        def call(*arguments):
            seen.append((name, next(value.dtype for value in arguments if torch.is_tensor(value))))
            return function(*arguments)

        monkeypatch.setattr(experts, name, call)

    watch("swiglu_experts")
    watch("grouped_mm_experts_forward")
    return seen


def _step(model, **batch):
    model.zero_grad()
    output = model(**batch)
    output = output.logits if hasattr(output, "logits") else output
    output.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("experts" in name for name in gradients)
    return output, gradients


def _same(model, calls, batch, tolerance):
    ours = deepcopy(model)
    use_quick_experts(ours)
    (found, gradients), used = _step(ours, **batch), {name for name, _ in calls}
    (expected, theirs) = _step(model, **batch)
    assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(gradients[name], gradient, rtol=tolerance, atol=tolerance / 10, msg=name)
    return used


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("name", SWIGLU)
def test_outputs_and_gradients_are_those_of_transformers(name, dtype, tolerance, calls):
    model = models.family(name, experts_implementation="eager").to(dtype).train()
    assert _same(model, calls, {"input_ids": torch.randint(64, (2, 16))}, tolerance) == {"swiglu_experts"}


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("gpt_oss", {"grouped_mm_experts_forward"}),  # biases and a gate of its own
        ("nemotron_h", {"grouped_mm_experts_forward"}),  # no gate
        ("aria", {"swiglu_experts"}),  # weights transposed
        ("minimax_m3_vl", {"grouped_mm_experts_forward"}),  # a gate of its own
        ("jetmoe", set()),  # knows no implementations
    ],
)
def test_experts_of_every_kind_compute_what_they_did(name, used, calls):
    assert _same(shrunken.build(name), calls, shrunken.batch(), 2e-4) == used


def test_under_autocast_products_stay_in_the_parameters_dtype_and_it_can_be_taken_back(calls):
    model, batch = models.family("qwen3_moe").train(), {"input_ids": torch.randint(64, (2, 16))}
    use_quick_experts(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = _step(model, **batch)
    assert set(calls) == {("swiglu_experts", torch.float32)}, "as grouped_mm of Transformers"
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    calls.clear()
    model.set_experts_implementation("grouped_mm")
    _step(model, **batch)
    assert not calls


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("hidden", [16, 6], ids=["grouped", "blocks"])  # 6 floats are no whole 16 bytes
def test_under_autocast_every_way_of_the_product_gives_the_parameters_dtype(hidden, compiled):
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((24, 16), (4, 16, 2 * hidden), (4, hidden, 16))
    )
    weights = torch.rand(24, 2, generator=generator)
    expert_ids = torch.rand(24, 4, generator=generator).topk(2).indices

    def call():
        return grouped.swiglu_experts(x, weights, grouped.sort_by_expert(expert_ids, 4), gate_up, down)

    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        found = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)()
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    off = 1e-2 if compiled else 1e-6  # torch compiles the products of the backward under the autocast of the forward
    for y, z in zip(_gradients(found, x, gate_up, down), _gradients(expected, x, gate_up, down), strict=True):
        assert_close(y, z, rtol=0, atol=off * float(z.abs().max()))


def _gradients(y, *inputs):
    return torch.autograd.grad(y.square().sum(), inputs)


def test_a_saved_model_does_not_ask_for_it(tmp_path):
    model = models.family("qwen3_moe")
    use_quick_experts(model)
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
