"""Computes the experts of Transformers' models as ``equipoise.nn.MoE`` computes its own."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from equipoise.nn.grouped import sort_by_expert, swiglu_experts

__all__ = ["use_fast_experts"]

NAME = "equipoise"  # of our implementation, in Transformers' table


def use_fast_experts(model: PreTrainedModel) -> None:
    """Lets the SwiGLU experts of ``model`` compute by grouped products. Gradients are gathered instead of scattered.

    The function is the same as with each implementation of Transformers; the additions come in another order. Other
    experts (a bias, another activation, interleaved weights, expert parallelism) compute by ``grouped_mm`` of
    Transformers. So do all experts that are not on a CPU. A model stays as it is if its class offers no choice.

    Products are in the parameters' dtype, also under autocast, as with ``grouped_mm`` of Transformers.
    ``model.set_experts_implementation("grouped_mm")`` undoes it.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(NAME)


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if hidden_states.device.type != "cpu" or not _is_swiglu(experts):  # not measured on a GPU
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    x = hidden_states.to(gate_up.dtype)
    assignments = sort_by_expert(top_k_index, experts.num_experts)
    return swiglu_experts(x, top_k_weights, assignments, gate_up, down).to(hidden_states.dtype)


def _is_swiglu(experts: Any) -> bool:
    has_extras = experts.has_bias or experts.has_post_expert_norm or experts._is_expert_parallel
    has_own_gating = type(experts)._apply_gate.__module__ != ALL_EXPERTS_FUNCTIONS.__module__
    is_gated = experts.has_gate and experts.is_concatenated and not has_extras and not has_own_gating
    return is_gated and isinstance(experts.act_fn, SiLUActivation | nn.SiLU)
