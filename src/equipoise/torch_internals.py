"""Questions about torch that it has no public answer to. Everything that leans on a private name of torch is here.

Seen in torch 2.13.0.
"""

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import UsageError


def is_backward_running() -> bool:
    """Whether autograd runs a backward on this thread: a forward inside it is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def are_gradients_wanted() -> bool:
    """Whether gradients are on, or off only because an ``autograd.Function`` runs its forward.

    Reentrant checkpointing does the latter, around a layer or around a whole model.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_argcount:
            first = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(first, torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back
    return False


def leading_dimensions(hidden: Any) -> tuple[int, ...]:
    """The dimensions before the last, of hidden states ``[batch, sequence, dim]`` or of what was flattened from them.

    () if they cannot be known: of a copy without gradients, or of tokens that were picked.
    """
    if not isinstance(hidden, Tensor):
        return ()
    shapes: list[Any] = [hidden.shape, getattr(hidden.grad_fn, "_saved_self_sym_sizes", ())]
    if hidden._base is not None:
        shapes.append(hidden._base.shape)
    for shape in shapes:
        if len(shape) == 3 and shape[-1] == hidden.shape[-1] and shape[0] * shape[1] * shape[2] == hidden.numel():
            return tuple(shape[:2])
    return ()


def is_frame_running(frame: FrameType, thread: int) -> bool:
    """Whether a thread, known by its ``threading.get_ident()``, still runs this frame."""
    running = sys._current_frames().get(thread)
    while running is not None and running is not frame:
        running = running.f_back
    return running is not None


def is_traced() -> bool:
    """Whether a forward is compiled, traced, transformed by functorch, or run under a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_shape_inference() -> bool:
    """Whether ``torch.distributed.pipelining`` runs this forward to find out shapes.

    So it does before the first step of a stage made without ``input_args``, in training mode and on uninitialised
    memory; only the caller tells such a forward from a real one.
    """
    if "torch.distributed.pipelining" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("_forward_metadata_inference", "_shape_inference"):
            return frame.f_globals.get("__name__") == "torch.distributed.pipelining.stage"
        frame = frame.f_back
    return False


def after_each_step(optimizer: torch.optim.Optimizer, call: Callable[[bool | Tensor], Any], owner: Any) -> Any:
    """Calls ``call(applied)`` after every step of the training loop; ``remove()`` on what it returns ends that.

    Raises ``TypeError`` for what is not an optimizer of torch, and ``UsageError`` if ``owner`` follows it already.
    """
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if not isinstance(hooks, Mapping):
        raise TypeError(
            f"optimizer must be one of torch, whose steps have hooks: got {type(optimizer).__name__}. Pass the one "
            "that it wraps, as optimizer.optimizer, or call step() yourself."
        )
    if any(getattr(hook, "_equipoise", None) is owner for hook in hooks.values()):
        raise UsageError(
            "follow() must be called once for an optimizer: this one is followed already, and a second step() would "
            "find an empty window. Remove the second follow(), or remove() the first."
        )

    @torch._disable_dynamo  # the step may be compiled
    def after_step(*_: Any) -> None:
        if _is_outermost_step(optimizer):
            call(step_was_applied(optimizer))

    after_step._equipoise = owner  # type: ignore[attr-defined]
    return optimizer.register_step_post_hook(after_step)


def step_was_applied(optimizer: torch.optim.Optimizer) -> bool | Tensor:
    """Whether the step that just ended moved the weights. Ask in a hook after the step."""
    found_inf = getattr(optimizer, "found_inf", None)  # by GradScaler, of a fused optimizer: its kernel skips the step
    return found_inf == 0 if isinstance(found_inf, Tensor) else True


def _is_outermost_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook after a step was called by the training loop's ``optimizer.step()``.

    torch calls the hooks after a ``super().step()`` inside a step too, and after the step that makes an optimizer's
    state before a checkpoint is loaded.
    """
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        # The wrapper around step(), or what Dynamo makes of the rest of it where a step is compiled.
        is_step = frame.f_code.co_qualname.startswith("Optimizer.profile_hook_step.<locals>.")
        depth += is_step and frame.f_locals.get("self") is optimizer
        if frame.f_code.co_name == "_init_optim_state":
            return False
        frame = frame.f_back
    return depth == 1


def allow_compile_over_checkpoint() -> None:
    """Lets a compiled graph hold our top-k mode inside an activation checkpoint.

    Dynamo takes the mode for a side effect of the checkpointed function and refuses, unless the recomputation may skip
    side effects. Skipping is right here: a router's forward leaves the mode that it entered.
    """
    import torch._dynamo

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def drop_compiled_graphs(model: nn.Module) -> bool:
    """Drops the graphs of a model that was called before: they would run on without our taps. False: there was none."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not is_compiled(model) or not dynamo.utils.counters["frames"]["total"]:
        return False
    dynamo.reset()
    return True


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a module in it, was given to ``torch.compile``."""
    return hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules())


def runs_while_traced(function: Any) -> Any:
    """Lets Dynamo call ``function`` while it makes a graph, which gets nothing of it.

    What ``torch.compiler.assume_constant_result`` does, which would load Dynamo at once.
    """
    function._dynamo_marked_constant = True
    return function
