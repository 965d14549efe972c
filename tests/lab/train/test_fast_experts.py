"""``use_fast_experts`` gives the same outputs and gradients as Transformers, for every kind of experts."""

from copy import deepcopy

import models
import pytest
import shrunken
import torch
from torch.testing import assert_close

from equipoise.nn import grouped
from equipoise_lab.train import fast_experts
from equipoise_lab.train.fast_experts import use_fast_experts

SWIGLU = ["deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe"]


@pytest.fixture
def calls(monkeypatch):
    """The functions that computed experts, each with its dtype."""
    seen = []

    def watch(name):
        function = getattr(fast_experts, name)

        def call(*arguments):
            seen.append((name, next(value.dtype for value in arguments if torch.is_tensor(value))))
            return function(*arguments)

        monkeypatch.setattr(fast_experts, name, call)

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


def _compare(model, calls, batch, tolerance):
    """Asserts that outputs and gradients are the same with ours, and returns the names of the functions ours called."""
    ours = deepcopy(model)
    use_fast_experts(ours)
    output, gradients = _step(ours, **batch)
    functions = {name for name, _ in calls}
    expected, expected_gradients = _step(model, **batch)
    assert_close(output, expected, rtol=tolerance, atol=tolerance / 10)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close(gradients[name], gradient, rtol=tolerance, atol=tolerance / 10, msg=name)
    return functions


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("name", SWIGLU)
def test_outputs_and_gradients_are_those_of_transformers(name, dtype, tolerance, calls):
    model = models.family(name, experts_implementation="eager").to(dtype).train()
    assert _compare(model, calls, {"input_ids": torch.randint(64, (2, 16))}, tolerance) == {"swiglu_experts"}


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("gpt_oss", {"grouped_mm_experts_forward"}),  # biases and its own gating
        ("nemotron_h", {"grouped_mm_experts_forward"}),  # not gated
        ("aria", {"swiglu_experts"}),  # transposed weights
        ("minimax_m3_vl", {"grouped_mm_experts_forward"}),  # its own gating
        ("jetmoe", set()),  # its class offers no choice
    ],
)
def test_experts_of_every_kind_compute_the_same(name, functions, calls):
    assert _compare(shrunken.build(name), calls, shrunken.batch(), 2e-4) == functions


def test_under_autocast_products_stay_in_the_parameters_dtype_and_it_can_be_undone(calls):
    model, batch = models.family("qwen3_moe").train(), {"input_ids": torch.randint(64, (2, 16))}
    use_fast_experts(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = _step(model, **batch)
    assert set(calls) == {("swiglu_experts", torch.float32)}, "as grouped_mm of Transformers"
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    calls.clear()
    model.set_experts_implementation("grouped_mm")
    _step(model, **batch)
    assert not calls


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("hidden", [16, 6], ids=["grouped", "blocks"])  # 6 floats are not a multiple of 16 bytes
def test_under_autocast_every_kind_of_product_gives_the_parameters_dtype(hidden, compiled):
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
        output = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)()
    assert output.dtype == torch.float32
    assert_close(output, expected, rtol=1e-5, atol=1e-5)
    inputs = x, gate_up, down
    # torch compiles the products of the backward under the autocast of the forward
    tolerance = 1e-2 if compiled else 1e-6
    for gradient, expected_gradient in zip(_gradients(output, *inputs), _gradients(expected, *inputs), strict=True):
        assert_close(gradient, expected_gradient, rtol=0, atol=tolerance * float(expected_gradient.abs().max()))


def _gradients(y, *inputs):
    return torch.autograd.grad(y.square().sum(), inputs)


def test_a_saved_config_does_not_name_our_experts(tmp_path):
    model = models.family("qwen3_moe")
    use_fast_experts(model)
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
