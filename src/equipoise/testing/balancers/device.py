"""No hook may make the host wait for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise.routing import ScoreFunction
from equipoise.testing._common import case, fail, require
from equipoise.testing.balancers._windows import EXPERTS, LAYERS, Factory, prepare_balancer, route_call
from equipoise.testing.balancers.loss import TOKENS


class _NoTransfer(TorchDispatchMode):
    """Refuses operations on tensors of host and device together, except with a scalar of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
        is_asynchronous = (kwargs or {}).get("non_blocking", False)
        if len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1 and not is_asynchronous:
            fail(f"{func}, which copies between host and device and waits for it")
        if func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_) and args[2].numel() > 1:
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            require(not masks, f"{func} by a mask, whose size the host must know")
        return output


class _NoUpload(TorchFunctionMode):
    """Refuses to make a tensor of the device from Python numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and output.device.type == "meta":
            fail(f"{func.__name__} of Python numbers on the device, which waits for the copy")
        return output


def never_synchronises(factory: Factory, score_function: ScoreFunction) -> None:
    """Statistics, loss, its backward and update must never make the host wait for the device: nothing may depend on the
    values of a tensor (item, nonzero, bincount, a mask as an index) or copy between the two. The check uses tensors
    without values (device meta)."""
    for dtype, mask in ((torch.float32, None), (torch.bfloat16, torch.ones(TOKENS, device="meta"))):
        balancer = prepare_balancer(factory, score_function, torch.zeros(LAYERS, EXPERTS, device="meta"))
        logits = torch.zeros(LAYERS, TOKENS, EXPERTS, dtype=dtype, device="meta").requires_grad_()
        load = torch.ones(LAYERS, EXPERTS, dtype=torch.int64, device="meta")
        inputs = dict(layers=LAYERS, tokens=TOKENS, dtype=dtype, masked=mask is not None)
        call = route_call(balancer, logits, score_function, mask=mask)
        with case(**inputs), _NoUpload(), _NoTransfer():
            with case(hook="statistic"):
                of_call = [balancer.statistic(routing, row) for row, routing in enumerate(call)]
            with case(hook="micro_batch_statistic"):
                of_micro_batch = balancer.micro_batch_statistic(load)
            if balancer.has_loss:
                with case(hook="loss and its backward"):
                    value = balancer.loss(call[0], None if balancer.scope in ("sequence", "token") else load[0])
                    assert value is not None
                    value.backward()
            statistic = [
                value for value in (of_call if of_micro_batch is None else of_micro_batch) if value is not None
            ]
            with case(hook="update"), torch.no_grad():
                balancer.update(load, statistic or None, 0)
