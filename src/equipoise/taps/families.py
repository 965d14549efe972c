"""Which routers we know, by class name, and the proof that we know them right.

The table says how a family's router selects. A module that is in no family may say it itself: an attribute or property
``router_kind`` that holds a ``RouterKind``, beside a parameter ``weight`` [experts, dim] and a forward that returns
(logits, weights, expert_ids) of the flattened tokens. ``prove`` believes neither: it runs the router's own forward on a
stand-in with random weights and refuses a router that behaves otherwise.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routing import score
from equipoise.taps.tap import OffsetTopK, RouterKind

__all__ = ["FAMILIES", "find_routers", "prove", "unknown_routers"]

BIASED = RouterKind("sigmoid", "e_score_correction_bias")
SOFTMAX = RouterKind("softmax", None)

# Transformers' model_type -> (router class, how it selects); forward returns (logits, weights, expert_ids)
FAMILIES: dict[str, tuple[str, RouterKind]] = {
    "deepseek_v3": ("DeepseekV3TopkRouter", BIASED),
    "glm4_moe": ("Glm4MoeTopkRouter", BIASED),
    "mixtral": ("MixtralTopKRouter", SOFTMAX),
    "olmoe": ("OlmoeTopKRouter", SOFTMAX),
    "qwen3_moe": ("Qwen3MoeTopKRouter", SOFTMAX),
}
_KINDS = dict(FAMILIES.values())
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")


def plain_name(name: str) -> str:
    """A module's name without what torch.compile, DDP and checkpoint wrappers put into it.

    >>> plain_name("module._orig_mod.layers.1.gate")
    'layers.1.gate'
    """
    name += "."  # a wrapper may stand at the end too
    for wrapper in _WRAPPERS[:-1]:
        name = name.replace(wrapper, "")
    name = name.removesuffix(".")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _kind_of(module: nn.Module) -> RouterKind | None:
    # static: wrappers of torch.compile and checkpointing would answer with what the module inside declares
    if inspect.getattr_static(module, "router_kind", None) is not None:
        declared: Any = module.router_kind
        if isinstance(declared, RouterKind):
            return declared
    for cls in type(module).__mro__:
        if cls.__name__ in _KINDS:
            return _KINDS[cls.__name__]
    return None


def find_routers(model: nn.Module, allow_empty: bool = False) -> list[tuple[str, nn.Module, RouterKind]]:
    """The routers of ``model`` in model order. None at all is an error that names what was seen instead; with
    ``allow_empty`` only where something was seen."""
    found = [
        (plain_name(name), module, kind)
        for name, module in model.named_modules()
        if (kind := _kind_of(module)) is not None
    ]
    if found:
        return found
    seen = sorted({type(m).__name__ for m in model.modules() if _looks_like_moe(type(m).__name__)})
    if allow_empty and not any(_is_moe(type(m).__name__) for m in model.modules() if m is not model):
        return []
    raise EquipoiseError(
        f"the model must hold a router that equipoise knows ({', '.join(sorted(_KINDS))}): "
        f"{type(model).__name__} holds none"
        + (f", but {', '.join(seen)}, which it does not know" if seen else " and no other mixture-of-experts layer")
        + ". Attach to one of these families: "
        + ", ".join(FAMILIES)
        + "; in a model of your own use equipoise.nn.Router, or give your router an attribute router_kind, an "
        "equipoise.RouterKind(gate, slot); a pipeline stage of dense layers takes allow_empty=True."
    )


def unknown_routers(model: nn.Module) -> list[str]:
    """Names of modules that are called a router or a gate, have a weight of two dimensions, and are of no family."""
    known = [module for _, module, _ in find_routers(model, allow_empty=True)]
    inside = {part for module in known for part in module.modules()}
    return [
        f"{plain_name(name)} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module not in inside
        and type(module).__name__.lower().endswith(("router", "gate"))
        and getattr(module._parameters.get("weight"), "ndim", 0) == 2
    ]


def _looks_like_moe(name: str) -> bool:
    return any(word in name.lower() for word in ("router", "moe", "expert", "gating"))


def _is_moe(name: str) -> bool:
    """Of dense layers too many families have "Moe" in their name, as Glm4MoeRMSNorm."""
    return name.lower().endswith(("router", "gate", "gating", "moe", "experts", "moeblock", "moelayer"))


def num_experts_of(router: nn.Module) -> int:
    return int(router.weight.shape[0])


class _CountingTopK(OffsetTopK):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, Tensor.topk) and args and args[0].shape[-1] == self.offset.shape[0]:
            self.calls += 1
        return super().__torch_function__(func, types, args, kwargs)


def _stand_in(router: nn.Module, generator: torch.Generator) -> nn.Module:
    """The router with weights of our own, so that sharded, meta and GPU weights need not be touched."""
    copy = router.__class__.__new__(router.__class__)
    copy.__dict__ = dict(router.__dict__)
    copy._parameters = {
        name: parameter
        if parameter is None
        else nn.Parameter(torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu"))
        for name, parameter in router._parameters.items()
    }
    copy._buffers = {
        name: buffer if buffer is None else torch.zeros(buffer.shape, device="cpu", dtype=torch.float32)
        for name, buffer in router._buffers.items()
    }
    return copy


def prove(name: str, router: nn.Module, kind: RouterKind, multiplies: bool = False) -> int:
    """Proves on random inputs that the router selects as ``kind`` says; returns k. Touches nothing of the model's.

    Proven: the outputs are (logits, weights, expert_ids); the weights are the gate's scores of the chosen experts up to
    one factor a token; an offset moves the choice and leaves the scores alone; without a slot, exactly one top-k is
    taken over the experts. With ``multiplies`` the offset is a factor 1 + offset, for which no family has a slot.
    """

    def refuse(what: str) -> EquipoiseError:
        return EquipoiseError(
            f"a {type(router).__name__} must select by {kind.gate} scores"
            + (f" plus its {kind.slot}" if kind.slot else " with one top-k over its experts")
            + (" and without groups" if multiplies else "")
            + f": in {name} {what}. This version of the family is not supported; attach with where=... to leave it out."
        )

    generator = torch.Generator().manual_seed(0)
    stand_in = _stand_in(router, generator)
    num_experts, dim = stand_in._parameters["weight"].shape
    hidden = torch.randn(64, dim, generator=generator, dtype=torch.float32, device="cpu") / dim**0.5
    favourite = torch.zeros(num_experts, device="cpu", dtype=torch.float32)
    favourite[num_experts // 2] = 1e30 if multiplies else 100.0  # a softmax score may be very small
    moderate = (
        0.3 * score(torch.randn(1, num_experts, generator=generator, dtype=torch.float32, device="cpu"), kind.gate)[0]
    )
    grouped = any(getattr(stand_in, name, 1) > 1 for name in ("num_group", "num_groups"))

    def run(offset: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if kind.slot is not None:
                if kind.slot not in stand_in._buffers:
                    raise refuse(f"there is no buffer {kind.slot}")
                stand_in._buffers[kind.slot] = torch.zeros_like(offset) if multiplies else offset
                if not multiplies:
                    return stand_in.forward(hidden), 1
            with _CountingTopK(offset, multiplies) as mode:
                return stand_in.forward(hidden), 1 if kind.slot else mode.calls

    if multiplies and grouped:
        raise refuse("there are groups")
    first: tuple[Tensor, Tensor, Tensor] | None = None
    for offset in (torch.zeros_like(favourite), moderate, favourite):
        output, calls = run(offset)
        if calls != 1:
            raise refuse(f"{calls} calls of top-k were seen")
        if not (isinstance(output, tuple) and len(output) == 3 and output[1].shape == output[2].shape):
            raise refuse("forward does not return (logits, weights, expert_ids)")
        logits, weights, expert_ids = output
        if logits.shape != (64, num_experts) or expert_ids.dtype != torch.int64:
            raise refuse(f"the logits have shape {tuple(logits.shape)} and the expert ids {expert_ids.dtype}")
        first = first or output
        same = (expert_ids == first[2]).all(-1)
        if not torch.allclose(weights[same], first[1][same], rtol=1e-4):
            raise refuse("the offset changes the weights of the same choice")
        scores = score(logits, kind.gate)
        choice = scores * (1 + offset) if multiplies else scores + offset
        best = choice.topk(expert_ids.shape[-1]).indices
        if not grouped and (expert_ids.sort().values != best.sort().values).any():
            raise refuse("the chosen experts are not the best by these scores and the offset")
        factor = weights / score(logits, kind.gate).gather(-1, expert_ids)
        if not torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-4):
            raise refuse("the weights are not in proportion to these scores")
    if not (expert_ids == num_experts // 2).any(-1).all():
        raise refuse("a large offset does not move the choice")
    return int(expert_ids.shape[-1])
