"""All that leans on a private name of torch, on its stack frames, or on a global option of it. Nothing elsewhere does.

Seen in torch 2.10.0, 2.13.0 and 2.14.1; where a version differs, the function says so. ``tests/library/
test_torch_internals.py`` shows of each name that it exists and does what is needed. If one is gone, ``attach`` raises;
names of modules that are loaded later are looked up where they are used.
"""

import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.errors import EquipoiseError, UsageError

SEEN_IN = "2.10 to 2.14"

PRIVATE_NAMES = {  # below torch, and what cannot be done without
    "_disable_dynamo": "keep a function out of compiled graphs",
    "_foreach_copy_": "write all biases at once",
    "_C._autograd._top_saved_tensors_default_hooks": "tell that a checkpoint or an offload keeps something else",
    "_C._current_autograd_node": "find the scores in their backward",
    "_C._current_graph_task_id": "tell a recomputation from a forward",
    "_C._len_torch_dispatch_stack": "tell a forward that is traced",
    "_C._dispatch_tls_local_exclude_set": "differentiate below autograd",
    "_C._ForceDispatchKeyGuard": "differentiate below autograd",
    "_C._functorch.is_functorch_wrapped_tensor": "tell a tensor without numbers",
    "_C._functorch.peek_interpreter_stack": "tell a forward that is transformed",
    "ops.aten._softmax_backward_data": "differentiate softmax scores",
    "ops.aten._unsafe_view": "return what is no view",
    "optim.Optimizer.profile_hook_step": "tell a step of the training loop from one inside a step",
}
PRIVATE_NAMES_OF_RANKS = {  # where torch is built with torch.distributed
    "distributed.ProcessGroup._device_types": "take over the timeout of a process group",
    "distributed.ProcessGroup._get_backend": "take over the timeout of a process group",
    "distributed.ProcessGroup.bound_device_id": "make a process group without the ranks outside",
    "distributed.distributed_c10d._new_group_with_tag": "give a process group a name that all its ranks know",
    "distributed.distributed_c10d._process_group_name": "give a process group a name that all its ranks know",
    "nn.parallel.DistributedDataParallel._active_ddp_module": "tell unequal numbers of inputs (join)",
}


def check_private_names() -> None:
    """Raises ``EquipoiseError`` if a private name is gone without which something would be counted wrong, or hang."""
    for name, purpose in (PRIVATE_NAMES | (PRIVATE_NAMES_OF_RANKS if dist.is_available() else {})).items():
        try:
            operator.attrgetter(name)(torch)
        except AttributeError:
            raise _is_gone(f"torch.{name}", purpose) from None


def _is_gone(name: str, purpose: str) -> EquipoiseError:
    return EquipoiseError(
        f"torch must have {name}, to {purpose}: torch {torch.__version__} has not. It is a private name, seen in torch "
        f"{SEEN_IN}. Install one of these, or an equipoise that knows this torch."
    )


# ---- what kind of forward this is ----


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
        code = frame.f_code
        is_candidate = code.co_name == "forward" and code.co_argcount > 0 and code.co_varnames[0] != "self"
        if is_candidate and isinstance(frame.f_locals.get(code.co_varnames[0]), torch.autograd.function.FunctionCtx):
            return True
        frame = frame.f_back
    return False


PICKED = (-1,)
_MAX_NODES = 6
# Names of autograd's nodes. These pick tokens:
_PICKING = ("IndexBackward", "IndexSelect", "Gather", "MaskedSelect", "Take")
# These leave each token where it is:
_BY_TOKEN = ("ToCopy", "NativeDropout", "NativeLayerNorm", "FusedRmsNorm", "Mul", "Div", "Alias", "View", "UnsafeView")


def leading_dimensions(hidden: Any) -> tuple[int, ...]:
    """The dimensions before the last, of hidden states ``[batch, sequence, dim]`` or of what was flattened from them.

    () if they cannot be known, as of a copy without gradients; ``PICKED`` for tokens that were picked.
    """
    if not isinstance(hidden, Tensor):
        return ()
    shapes: list[Any] = [hidden.shape]
    node = hidden.grad_fn
    for _ in range(_MAX_NODES):  # what was done to the tokens since they were flattened
        name = "" if node is None else node.name()
        if name.startswith(_PICKING):
            return PICKED
        shapes.append(getattr(node, "_saved_self_sym_sizes", ()))
        if node is None or not name.startswith(_BY_TOKEN):
            break
        node = next((n for n, _ in node.next_functions if n is not None and "AccumulateGrad" not in n.name()), None)
    if hidden._base is not None:
        shapes.append(hidden._base.shape)
    for shape in shapes:
        if len(shape) == 3 and shape[-1] == hidden.shape[-1] and shape[0] * shape[1] * shape[2] == hidden.numel():
            return tuple(shape[:2])
    return ()


# ---- the scores that autograd keeps ----

_SCORES = {"softmax": "SoftmaxBackward0", "sigmoid": "SigmoidBackward0"}
_MAX_NODES_TO_SCORES = 8  # from the weights: a scale, a division by their sum, a gather, casts and views


def node_of_scores(weights: Tensor, logits: Tensor, score_function: str) -> Any:
    """The node of autograd that made of these logits the scores of which these weights are; None if it is not seen.

    A checkpoint or an offload puts something else in place of what autograd keeps. To look at it would spend it.
    """
    name = _SCORES.get(score_function)
    if name is None or logits.grad_fn is None:
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    made_logits, node = _before_casts(logits.grad_fn), weights.grad_fn
    for _ in range(_MAX_NODES_TO_SCORES):
        if node is None:
            return None
        if node.name() == name and _before_casts(node.next_functions[0][0]) is made_logits:
            return node if _is_of_logits(node, logits) else None
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return None


def _before_casts(node: Any) -> Any:
    while node is not None and node.name().startswith(("ToCopy", "View", "UnsafeView", "ReshapeAlias")):
        node = node.next_functions[0][0]
    return node


def _is_of_logits(node: Any, logits: Tensor) -> bool:
    """Whether a node kept scores over the last dimension in the shape of the logits, in float32 and as wide as they."""
    scores = node._saved_result
    is_last = getattr(node, "_saved_dim", -1) in (scores.dim() - 1, 2**64 - 1, -1)
    has_shape = scores.numel() == logits.numel() and scores.shape[-1] == logits.shape[-1]
    return is_last and has_shape and scores.dtype == torch.promote_types(logits.dtype, torch.float32)


def saved_scores(node: Any, like: Tensor) -> Tensor:
    """What a node of ``node_of_scores`` keeps, in the shape of ``like``."""
    return node._saved_result.reshape(like.shape)


def running_node() -> Any:
    """The node whose backward is about to run."""
    return torch._C._current_autograd_node()


def frame_above(number: int) -> FrameType:
    """The frame so many calls above the function that asks."""
    return sys._getframe(number + 1)


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


@contextmanager
def autograd_on() -> Iterator[None]:
    """Turns autograd on, also below it: inside an operator that a dispatch mode (FlopCounterMode) has called."""
    excluded, key = torch._C._dispatch_tls_local_exclude_set(), torch._C.DispatchKey
    if not excluded.has(key.AutogradFunctionality):
        with torch.enable_grad():
            yield
        return
    for below in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor, key.ADInplaceOrView):
        excluded = excluded.remove(below)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def has_no_numbers(tensor: Tensor) -> bool:
    """Whether functorch stands in for this tensor, so that its numbers cannot be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


_PIPELINING = "torch.distributed.pipelining.stage"
_SHAPE_INFERENCE = ("_forward_metadata_inference", "_shape_inference")  # from 2.12; before


def is_shape_inference() -> bool:
    """Whether ``torch.distributed.pipelining`` runs this forward to find out shapes.

    So it does before the first step of a stage made without ``input_args``, in training mode and on uninitialised
    memory; only the caller tells such a forward from a real one.
    """
    module = sys.modules.get(_PIPELINING)
    if module is None:
        return False
    if not any(hasattr(module.PipelineStage, name) for name in _SHAPE_INFERENCE):
        raise _is_gone(f"{_PIPELINING}.PipelineStage.{_SHAPE_INFERENCE[0]}", "tell a forward that only asks for shapes")
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _SHAPE_INFERENCE:
            return frame.f_globals.get("__name__") == _PIPELINING
        frame = frame.f_back
    return False


def is_joined_ddp_running() -> bool:
    """Whether this forward runs in a DistributedDataParallel whose ranks may leave one by one.

    ``DDP.join()`` and ``Join([...])`` switch this on, and it stays on after their block. A join that raises on all
    ranks as soon as one leaves (``throw_on_early_termination``) is none: no rank is left alone.
    """
    if not dist.is_available():
        return False
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is None:
        return False
    if not hasattr(ddp, "_join_config"):
        raise _is_gone("DistributedDataParallel._join_config", "tell unequal numbers of inputs (join)")
    return ddp._join_config.enable and not ddp._join_config.throw_on_early_termination


# ---- steps of an optimizer ----


def after_each_step(optimizer: torch.optim.Optimizer, call: Callable[[bool | Tensor], Any], owner: Any) -> Any:
    """Calls ``call(applied)`` after every step of the training loop; ``remove()`` on what it returns ends that.

    Raises ``TypeError`` for what is not an optimizer of torch, and ``UsageError`` if ``owner`` follows it already.
    """
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    wrapped = getattr(optimizer, "optimizer", None)
    is_wrapper = isinstance(wrapped, torch.optim.Optimizer) and wrapped is not optimizer  # of Accelerate, of Lightning
    if is_wrapper or not isinstance(hooks, Mapping):
        if type(optimizer).__module__.startswith("torch.optim"):
            raise _is_gone("Optimizer._optimizer_step_post_hooks", "tell an optimizer that is followed already")
        if any(base.__module__.startswith("deepspeed.") for base in type(optimizer).__mro__):
            raise TypeError(  # the one inside makes a step for each group of parameters, and none if it overflows
                f"optimizer must be one of torch: got {type(optimizer).__name__} of DeepSpeed. Follow its engine: "
                "equipoise.integrations.deepspeed.follow_engine(balance, engine)."
            )
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


_CHECKPOINT = "torch.distributed.checkpoint.state_dict"


def _is_outermost_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook after a step was called by the training loop's ``optimizer.step()``.

    torch calls the hooks after a ``super().step()`` inside a step too, and after the step that makes an optimizer's
    state before a checkpoint is loaded.
    """
    checkpoint = sys.modules.get(_CHECKPOINT)
    if checkpoint is not None and not hasattr(checkpoint, "_init_optim_state"):
        raise _is_gone(f"{_CHECKPOINT}._init_optim_state", "tell a step that only makes an optimizer's state")
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        # The wrapper around step(), or what Dynamo makes of the rest of it where a step is compiled.
        is_step = frame.f_code.co_qualname.startswith("Optimizer.profile_hook_step.<locals>.")
        depth += is_step and frame.f_locals.get("self") is optimizer
        if frame.f_code.co_name == "_init_optim_state":
            return False
        frame = frame.f_back
    if depth == 0:  # somebody called this hook, and no step is seen: never to step would be silent
        raise _is_gone("a frame of Optimizer.profile_hook_step with self", "tell whose step has ended")
    return depth == 1


# ---- process groups ----


def new_group_named(name: str, ranks: Sequence[int], like: dist.ProcessGroup) -> Any:
    """A process group of this name that only ``ranks`` make, with the backends and the timeout of ``like``.

    torch has no argument for the name. It hashes the ranks with what this rank did before: how many process groups it
    has (to 2.13), or made (from 2.14). Ranks that differ in it wait for each other under different names, forever.
    """
    c10d, world = dist.distributed_c10d, dist.group.WORLD
    if "_process_group_name" not in c10d._new_group_with_tag.__code__.co_names:
        raise _is_gone("new_group asking _process_group_name", PRIVATE_NAMES_OF_RANKS[_NAMING])
    config = dist.get_backend_config(like)
    backend = None if config == dist.get_backend_config(world) else config
    # With a device bound, NCCL splits the communicator of the world, and the ranks outside would have to take part.
    bound, torch_names = world.bound_device_id, c10d._process_group_name
    try:
        c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
        if bound is not None:
            world.bound_device_id = None
        group = dist.new_group(ranks, timeout=_timeout(like), backend=backend, use_local_synchronization=True)
    finally:
        c10d._process_group_name = torch_names
        if bound is not None:
            world.bound_device_id = bound
    if group.group_name != name:
        raise _is_gone("new_group that names as _process_group_name does", PRIVATE_NAMES_OF_RANKS[_NAMING])
    return group


_NAMING = "distributed.distributed_c10d._process_group_name"


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The timeout of the collectives of ``group``; None, torch's default, if none of its backends says it."""
    backends = [group._get_backend(device) for device in group._device_types]
    options = [backend.options for backend in backends if hasattr(backend, "options")]
    return max((option._timeout for option in options if hasattr(option, "_timeout")), default=None)


# ---- compiled graphs ----

_OPTION = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # from torch 2.10
_num_owners, _users_value = 0, False


def allow_compile_over_checkpoint(owner: Any) -> Callable[[], Any]:
    """Lets a compiled graph hold our top-k mode inside an activation checkpoint.

    Dynamo takes the mode for a side effect of the checkpointed function and refuses, unless the recomputation may skip
    side effects. Skipping is right here: a router's forward leaves the mode that it entered. The option is one for the
    whole process. It gets its value back when the last ``owner`` calls what this returns, or is gone.
    """
    global _num_owners, _users_value
    import torch._dynamo

    if not hasattr(torch._dynamo.config, _OPTION):
        raise _is_gone(f"torch._dynamo.config.{_OPTION}", "compile a router without a slot inside a checkpoint")
    if _num_owners == 0:
        _users_value = getattr(torch._dynamo.config, _OPTION)
    _num_owners += 1
    setattr(torch._dynamo.config, _OPTION, True)
    end = weakref.finalize(owner, _one_owner_less)
    end.atexit = False
    return end


def _one_owner_less() -> None:
    global _num_owners
    _num_owners -= 1
    if _num_owners == 0 and getattr(torch._dynamo.config, _OPTION):  # else the user has switched it off since
        setattr(torch._dynamo.config, _OPTION, _users_value)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``torch.compiler.disable``, which would load Dynamo at once."""
    return torch._disable_dynamo(function)


def runs_while_traced(function: Any) -> Any:
    """Lets Dynamo call ``function`` while it makes a graph, which gets nothing of it.

    What ``torch.compiler.assume_constant_result`` does, which would load Dynamo at once.
    """
    function._dynamo_marked_constant = True
    return function


# ---- wrappers around a model ----

# What torch.compile, checkpoint wrappers and FSDP1 call the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def without_compile(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile`` made of it, or the model itself."""
    return model._orig_mod if hasattr(model, "_orig_mod") else model  # type: ignore[return-value]


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a module in it, was given to ``torch.compile``."""
    return hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules())


# ---- operations without a public name ----


def copy_each(targets: list[Tensor], sources: tuple[Tensor, ...]) -> None:
    """Copies each source into its target, in one operation."""
    torch._foreach_copy_(targets, sources)


def softmax_backward(gradient: Tensor, softmax: Tensor) -> Tensor:
    """The gradient at the logits of a softmax over the last dimension."""
    return torch.ops.aten._softmax_backward_data(gradient, softmax, -1, softmax.dtype)


def view_without_base(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A view that autograd does not take for one."""
    return torch.ops.aten._unsafe_view(tensor, shape)
