"""How many operations does balancing add, and how many bytes does it keep until the backward? Counted, not timed.

    python benchmarks/operations.py    # writes benchmarks/results/operations.json

Models of routers run a training step on fake tensors of an accelerator that exists in Python only, attached and plain.
On a GPU each operation is a kernel launch. The difference between the two, and between models of few and of many
layers, gives what one router call adds and what each micro-batch adds once. Views and empty tensors are no operations.

A call's bytes are those of the tensors that live between forward and backward, attached less plain. They are given by
token. Tensors whose size does not grow with the tokens are left out: the difference of two numbers of tokens.

The last line on stdout is the result as JSON.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise.balance import Balance
from equipoise.balancers import parse_strategy
from equipoise.counting.pool import Pool
from equipoise.nn import Router
from equipoise.routers import MoELayer
from equipoise.routers.kind import Slot

STORED = Path(__file__).parent / "results" / "operations.json"
DEVICE = "fakegpu:0"
DIM, EXPERTS, K, ROWS = 64, 128, 8, 2
FEW, MANY = 2, 6  # layers
STRATEGIES = ("frozen", "loss-free", "lbl", "lbl:scope=micro_batch", "lbl:scope=sequence", "quantile", "z")
SLOT = "e_score_correction_bias"
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "prim::")


class Counted(NamedTuple):
    """What was seen in one part of a step."""

    operations: Counter[str]
    kept: int  # bytes of the tensors that were made in it and are alive at its end

    @property
    def number(self) -> int:
        return self.operations.total()


class _Count(TorchDispatchMode):
    """Counts operations on the device; knows which storages were made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.storages: WeakSet[Any] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, output)) if isinstance(value, Tensor)]
        is_launch = not func.is_view and not func.name().startswith(_NO_LAUNCH)
        if is_launch and any(tensor.device.type != "cpu" for tensor in tensors):
            self.operations[func.name().removeprefix("aten::")] += 1
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.storages.add(tensor.untyped_storage())
        return output

    def counted(self) -> Counted:
        return Counted(self.operations, sum(storage.nbytes() for storage in self.storages))


@contextmanager
def _counting() -> Iterator[list[Counted]]:
    """Gives a list with what was counted inside, once it has ended."""
    result: list[Counted] = []
    with _Count() as count:
        yield result
    result.append(count.counted())


class Routers(nn.Module):
    """Routers that see the same tokens. Its output depends on all of their weights."""

    def __init__(self, layers: int, **options: Any):
        super().__init__()
        self.routers = nn.ModuleList(Router(DIM, EXPERTS, K, **options) for _ in range(layers))

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.stack([router(inputs_embeds)[1].sum() for router in self.routers]).sum()


def attach(model: Routers, strategy: str) -> Balance:
    """As ``equipoise.attach``, without the proof, which needs numbers."""
    layers = [
        MoELayer(str(index), router, router.router_kind, EXPERTS, K, Slot(router, SLOT))
        for index, router in enumerate(model.routers)
    ]
    start = {layer.name: torch.zeros(EXPERTS, device=DEVICE) for layer in layers}
    return Balance(model, layers, parse_strategy(strategy), Pool(None), start)


def run_step(strategy: str | None, layers: int, tokens: int, masked: bool, **options: Any) -> dict[str, Counted]:
    """The second step of a model: what is made once was made in the first. ``None``: it is not attached."""
    with FakeTensorMode(), torch.device(DEVICE):
        model = Routers(layers, **options)
        balance = None if strategy is None else attach(model, strategy)
        hidden = torch.zeros(ROWS, tokens // ROWS, DIM)
        mask = torch.ones(ROWS, tokens // ROWS, dtype=torch.int64) if masked else None
        for _ in range(2):
            parts = {}
            with _counting() as forward:
                loss = model(inputs_embeds=hidden, attention_mask=mask)
            with _counting() as value:
                if balance is not None:
                    loss = loss + balance.loss()
            with _counting() as backward:
                loss.backward()
            with _counting() as step:
                if balance is not None:
                    balance.step()
            model.zero_grad()
            for name, part in (("forward", forward), ("loss", value), ("backward", backward), ("step", step)):
                parts[name] = part[0]
    return parts


def measure(strategy: str, masked: bool, **options: Any) -> dict[str, Any]:
    """What a router call adds in forward and backward, what a micro-batch and a step add once, and bytes by token."""

    def added(layers: int, tokens: int = 512) -> dict[str, Counted]:
        plain = run_step(None, layers, tokens, masked, **options)
        attached = run_step(strategy, layers, tokens, masked, **options)
        result = {}
        for name, part in attached.items():
            operations = Counter(part.operations)
            operations.subtract(plain[name].operations)
            result[name] = Counted(operations, part.kept - plain[name].kept)
        return result

    few, many, longer = added(FEW), added(MANY), added(MANY, tokens=1024)
    by_call = {name: (many[name].number - few[name].number) / (MANY - FEW) for name in many}
    once = {name: few[name].number - FEW * by_call[name] for name in few}
    names: Counter[str] = Counter(many["forward"].operations)
    names.subtract(few["forward"].operations)
    back: Counter[str] = Counter(many["backward"].operations)
    back.subtract(few["backward"].operations)
    return {
        "strategy": strategy,
        "masked": masked,
        **options,
        "forward": by_call["forward"],
        "backward": by_call["backward"],
        "once": once["forward"] + once["loss"] + once["backward"] + (MANY if False else 0),
        "loss_by_layer": by_call["loss"],
        "step_by_layer": by_call["step"],
        "step_once": once["step"],
        "kept_by_token": (longer["forward"].kept - many["forward"].kept) / 512 / MANY,
        "forward_operations": {name: number / (MANY - FEW) for name, number in names.items() if number},
        "backward_operations": {name: number / (MANY - FEW) for name, number in back.items() if number},
    }


@contextmanager
def eager_on_fake_tensors() -> Iterator[None]:
    """A fake tensor is no plain one, and needs a dispatch mode, which otherwise means that a forward is traced."""
    with (
        mock.patch("equipoise.routers.tap.is_traced", return_value=False),
        mock.patch("equipoise.routers.forward.is_traced", return_value=False),
        mock.patch("equipoise.counting.biases.Tensor", FakeTensor),
    ):
        yield


def main() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("fakegpu")
    rows = []
    with eager_on_fake_tensors():
        for score_function in ("softmax", "sigmoid"):
            for strategy in STRATEGIES:
                for masked in (False, True):
                    row = measure(strategy, masked, score_function=score_function)
                    rows.append(row)
                    print({k: v for k, v in row.items()})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
