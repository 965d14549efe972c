"""Recognises what a router's forward returns, by shapes and dtypes, and says how to adapt other outputs."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.tapped import plain_class

TOKENS = 64  # on which a router is tried
CONTRACT = (
    "A router has the gate and the top-k in one module. Its forward takes tokens [..., dim] and returns (logits [..., "
    "experts], weights [..., k], expert_ids [..., k]). The block around multiplies the outputs of the experts by these "
    "weights. equipoise.nn.Router is one"
)
LEAVE_OUT = "Leave it out with attach(where=...), or choose experts with equipoise.nn.Router"


class Refused(EquipoiseError):
    """A router selects in no way that equipoise knows. The message is the reason, ``remedy`` what to do about it.

    ``progress`` orders reasons: a kind that is refused later in its proof fits better.
    """

    def __init__(self, reason: str, remedy: str = LEAVE_OUT, progress: int = 0):
        super().__init__(reason)
        self.remedy, self.progress = remedy, progress


def is_dense(output: Any) -> bool:
    """Whether it may be (scores, logits), both with a number for each token and expert."""
    if not isinstance(output, tuple) or len(output) != 2 or not all(isinstance(value, Tensor) for value in output):
        return False
    return output[0].dim() >= 2 and output[0].shape == output[1].shape and all(v.is_floating_point() for v in output)


def output_names(output: Any) -> list[str]:
    """What the outputs of a router are, by shapes and dtypes: logits, weights, expert_ids, or ``_`` for others."""
    values = list(output) if isinstance(output, tuple | list) else [output]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() >= 2]
    ids = next((value for value in tensors if value.dtype in (torch.int64, torch.int32)), None)
    like_ids = [v for v in tensors if ids is not None and v.is_floating_point() and v.shape == ids.shape]
    names = ["_"] * len(values)
    if len(like_ids) == 2:  # all experts are chosen: only the order tells logits from weights
        in_order = len(values) > 2 and values[0] is like_ids[0] and values[1] is like_ids[1] and values[2] is ids
        return ["logits", "weights", "expert_ids", *names[3:]] if in_order else names
    for number, value in enumerate(values):
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if value is ids:
            names[number] = "expert_ids"
        elif like_ids and value is like_ids[0]:
            names[number] = "weights"
        elif value.is_floating_point() and "logits" not in names and len(value.flatten(0, -2)) == TOKENS:
            names[number] = "logits"
    return names


def check_output(output: Any, router: nn.Module) -> None:
    """Raises ``Refused`` for what is neither (logits, weights, expert_ids, ...) nor (scores, logits)."""
    names = output_names(output)
    if isinstance(output, tuple) and (names[:3] == ["logits", "weights", "expert_ids"] or is_dense(output)):
        if names[2:3] == ["expert_ids"] and output[2].dtype != torch.int64:
            raise Refused(
                f"the ids of its experts must be int64, and are {output[2].dtype}", "Convert them, ids.long()"
            )
        return
    must = "its forward does not return (logits, weights, expert_ids)"
    if isinstance(output, Tensor):
        raise Refused(f"{must} but one tensor of shape {tuple(output.shape)} for {TOKENS} tokens", CONTRACT)
    if not isinstance(output, tuple | list):
        raise Refused(f"{must} but a {type(output).__name__}", CONTRACT)
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in output]
    if "expert_ids" not in names or "weights" not in names or _is_mask(output[names.index("expert_ids")]):
        raise Refused(f"{must} but {len(shapes)} outputs: {', '.join(map(str, shapes))}", CONTRACT)
    is_list = isinstance(output, list)
    raise Refused(f"{must} but ({', '.join(names)}){' in a list' * is_list}", _remedy(router, names, is_list))


def _is_mask(ids: Tensor) -> bool:
    """Whether these integers cannot be expert ids, since a token has one twice."""
    return bool((ids.sort(-1).values.diff(dim=-1) == 0).any())


def _remedy(router: nn.Module, names: list[str], is_list: bool) -> str:
    """How a router with these outputs is attached: by an adapter, or a subclass that gives out its logits."""
    cls, hidden = plain_class(router).__name__, forward_arguments(router)[0]
    gate = None if "logits" in names else _gate_of(router)
    if "logits" in names or gate is not None:
        place = names.index("weights")
        return (
            "Say how to read them:\n"
            f"    class {cls}Adapter(equipoise.RouterAdapter):\n"
            + (f'        logits_returned_by = "{gate}"\n' if gate is not None else "")
            + "        def read(self, output, logits, k):\n"
            f"            {', '.join(names)} = output\n"
            "            return logits, weights, expert_ids\n"
            "        def write(self, output, weights, expert_ids):\n"
            f"            output = list(output)\n"
            f"            output[{place}] = weights.view(output[{place}].shape)\n"
            f"            return {'output' if is_list else 'tuple(output)'}\n"
            f"    {cls}.router_adapter = {cls}Adapter()\n"
            "Then attach"
        )
    parameters = [name for name, _ in router.named_parameters()]
    if len(parameters) == 1 and "." not in parameters[0]:
        return (
            "Return them in that order, and take them so in the block that calls it:\n"
            f"    class Adapted{cls}({cls}):\n"
            f"        def forward(self, {hidden}):\n"
            f"            {', '.join(names)} = super().forward({hidden})\n"
            f"            logits = F.linear({hidden}.flatten(0, -2).float(), self.{parameters[0]}.float())\n"
            "            return logits, weights, expert_ids\n"
            "Then attach"
        )
    must = "Return (logits, weights, expert_ids) from its forward: logits are what its gate computes, before the "
    return must + "scores. Take them so in the block that calls it"


def _gate_of(router: nn.Module) -> str | None:
    """The name of the only layer in the router, if it is linear: it computes the logits."""
    layers = [(path, module) for path, module in router.named_modules() if module._parameters]
    is_gate = len(layers) == 1 and isinstance(layers[0][1], nn.Linear) and layers[0][0] in router._modules
    return layers[0][0] if is_gate else None


def num_tokens_of(output: Any) -> int | None:
    """Rows of the first output, once batch and sequence are flattened."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first.numel() // first.shape[-1] if isinstance(first, Tensor) and first.dim() >= 2 else None


def forward_arguments(module: nn.Module, required: bool = False) -> list[str]:
    """Names of the arguments of a module's forward."""
    _, *parameters = inspect.signature(plain_class(module).forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if not required or p.default is p.empty]
