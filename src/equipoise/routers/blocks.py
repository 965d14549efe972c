"""Blocks that route by themselves: a gate that is a linear layer, a top-k in the block's own forward, no router module.

Such a block is observed and steered at its gate's logits and its one top-k over the experts. Its forward returns hidden
states, so ``block_trial`` reads the weights of the experts from these.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from equipoise.routers.adapter import RouterAdapter
from equipoise.routers.shapes import whole_shape

MOVE = (
    "Move the gate and the top-k out of the block's forward, into one module:\n"
    '    self.router = equipoise.nn.Router(dim, num_experts, k, score_function="softmax")\n'
    "    ...\n"
    "    logits, weights, expert_ids = self.router(x)  # x [tokens, dim]; weights and expert_ids [tokens, k]\n"
    "    y = torch.zeros_like(x)\n"
    "    for number, expert in enumerate(self.experts):\n"
    "        token, choice = (expert_ids == number).nonzero(as_tuple=True)\n"
    "        y = y.index_add(0, token, weights[token, choice, None] * expert(x[token]))\n"
    "Then attach"
)
_GATE_NAME = re.compile("gate|router|switch|wg$", re.IGNORECASE)
_NOT_GATE = re.compile("noise|shared", re.IGNORECASE)


class BlockAdapter(RouterAdapter):
    """How a block that routes by itself is read: the values and ids of its one top-k, and the output of its gate.

    Attributes:
        gate: the name of the linear layer in the block that gives its logits.
        experts: the name of the list of its experts.
    """

    def __init__(self, gate: str, experts: str):
        self.gate, self.experts = gate, experts
        self.logits_returned_by = gate

    @property
    def is_named_as_gate(self) -> bool:
        return _GATE_NAME.search(self.gate) is not None

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        values, expert_ids = output
        assert logits is not None
        return logits, values, expert_ids

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return weights.view(output[0].shape), output[1]

    def width(self, router: Any) -> int | None:
        return int(whole_shape(router.get_submodule(self.gate).weight)[1])

    def __repr__(self) -> str:
        return f"BlockAdapter(gate={self.gate!r}, experts={self.experts!r})"


def block_adapter(module: nn.Module) -> BlockAdapter | None:
    """The adapter of a module that looks like a block that routes by itself; None for any other.

    It holds a list of experts, and beside it a linear layer with one output for each of them.
    """
    # A subclass of ModuleList may have a forward, which the block calls in place of the experts.
    lists = [(name, child) for name, child in module._modules.items() if type(child) is nn.ModuleList]
    for experts, children in lists:
        gates = [] if len(children) < 2 else list(_gates(module, len(children)))
        if len(gates) > 1:  # names decide
            gates = [name for name in gates if _GATE_NAME.search(name) and not _NOT_GATE.search(name)]
        if len(gates) == 1:
            return BlockAdapter(gates[0], experts)
    return None


def _gates(module: nn.Module, num_experts: int) -> Iterator[str]:
    for name, child in module._modules.items():
        is_linear = isinstance(child, nn.Linear) or (child is not None and "Linear" in type(child).__name__)
        weight = None if child is None else child._parameters.get("weight")
        shape = () if weight is None else whole_shape(weight)
        if is_linear and len(shape) == 2 and shape[0] == num_experts:
            yield name
