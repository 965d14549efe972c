"""How many operations does balancing add, and how many bytes does it keep until the backward? Counted, not timed.

    python benchmarks/operations.py    # writes benchmarks/results/operations.json

Models of routers run a training step on fake tensors of an accelerator that exists in Python only, attached and plain.
On a GPU each operation is a kernel launch, and so is each kernel of ``fused=True``. The difference between the two, and
between models of few and of many layers, gives what one router call adds and what each micro-batch adds once. Views and
empty tensors are no operations.

A call's bytes are those of the tensors that live between forward and backward, attached less plain. They are given by
token and layer. What does not grow with the tokens is left out.

The last line on stdout is the result as JSON.
"""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakSet

import torch
from paired import run_facts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from equipoise import kernels
from equipoise.balance import Balance
from equipoise.balancers import parse_strategy
from equipoise.counting.pool import Pool
from equipoise.nn import Router
from equipoise.routers import MoELayer
from equipoise.routers.kind import Slot
from equipoise.routing import ScoreFunction
from equipoise_lab.records import write_json

STORED = Path(__file__).parent / "results" / "operations.json"
DEVICE = "fakegpu:0"
DIM, EXPERTS, K, ROWS = 64, 128, 8, 2
FEW, MANY = 2, 6  # layers
TOKENS, LAYERS = 512, 64  # layers of the model whose micro-batches and steps are counted
STRATEGIES = ("loss-free", "lbl", "lbl:scope=micro_batch", "lbl:scope=sequence", "quantile", "z")
MASKS = {  # the dtypes of a padding mask, None for no mask; integers may also number packed sequences
    strategy: (None, "int64", "bool") if strategy == "lbl:scope=sequence" else (None, "int64")
    for strategy in STRATEGIES
}
LIMITS = {  # of the operations of a call, by strategy and whether there is a mask: forward, backward
    ("loss-free", False): (3, 0),
    ("loss-free", True): (4, 0),
    ("lbl", False): (5, 7),
    ("lbl", True): (6, 8),
    ("lbl:scope=sequence", False): (7, 9),
    ("lbl:scope=sequence", True): (8, 10),
    ("quantile", False): (9, 0),
}
FUSED_LIMITS = {"loss-free": (2, 0), "lbl": (2, 2), "lbl:scope=sequence": (3, 3), "quantile": (3, 0)}
STEP_LIMIT = 30  # of loss-free, 64 layers
BYTES_LIMIT = 40  # by token and layer, with a loss
SLOT = "e_score_correction_bias"
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "prim::")


class Counted(NamedTuple):
    """What was seen in one part of a step."""

    operations: Counter[str]
    kept: int  # bytes of the tensors that were made in it and are alive at its end

    @property
    def number(self) -> int:
        return self.operations.total()

    def minus(self, other: "Counted") -> "Counted":
        operations = Counter(self.operations)
        operations.subtract(other.operations)
        return Counted(operations, self.kept - other.kept)


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

    def launch(self, kernel: Any, *_: Any, **__: Any) -> None:
        """In place of a launch of one of our kernels."""
        self.operations[kernel.__name__] += 1

    def counted(self) -> Counted:
        return Counted(self.operations, sum(storage.nbytes() for storage in self.storages))


@contextmanager
def _counting() -> Iterator[list[Counted]]:
    """Gives a list with what was counted inside, once it has ended."""
    result: list[Counted] = []
    with _Count() as count, mock.patch.object(kernels, "_launch", count.launch):
        yield result
    result.append(count.counted())


class Routers(nn.Module):
    """Routers that see the same tokens. Its output depends on all of their weights."""

    def __init__(self, layers: int, score_function: ScoreFunction, dim: int = DIM, experts: int = EXPERTS, k: int = K):
        super().__init__()
        self.routers = nn.ModuleList(Router(dim, experts, k, score_function=score_function) for _ in range(layers))

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.stack([router(inputs_embeds)[1].sum() for router in self.routers]).sum()


def attach(model: Routers, strategy: str, fused: bool = False, pool: Pool | None = None) -> Balance:
    """As ``equipoise.attach``, without the proof, which needs numbers."""
    layers = [
        MoELayer(str(index), router, router.router_kind, router.num_experts, router.k, Slot(router, SLOT))
        for index, router in enumerate(model.routers)
    ]
    start = {layer.name: torch.zeros(layer.num_experts, device=layer.device) for layer in layers}
    return Balance(model, layers, parse_strategy(strategy), Pool(None) if pool is None else pool, start, fused)


@cache
def run_step(
    strategy: str | None,
    layers: int,
    tokens: int,
    mask_dtype: str | None,
    score_function: ScoreFunction,
    fused: bool = False,
) -> dict[str, Counted]:
    """The second step of a model: what is made once was made in the first. ``None``: it is not attached."""
    with FakeTensorMode(), torch.device(DEVICE):
        model = Routers(layers, score_function)
        balance = None if strategy is None else attach(model, strategy, fused)
        hidden = torch.zeros(ROWS, tokens // ROWS, DIM)
        mask = torch.ones(ROWS, tokens // ROWS, dtype=getattr(torch, mask_dtype)) if mask_dtype else None
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


def measure(strategy: str, mask_dtype: str | None, score_function: ScoreFunction, fused: bool) -> dict[str, Any]:
    """What a router call adds in forward and backward, what a micro-batch and a step add, and bytes by token."""

    def added(layers: int, tokens: int = TOKENS) -> dict[str, Counted]:
        plain = run_step(None, layers, tokens, mask_dtype, score_function)
        attached = run_step(strategy, layers, tokens, mask_dtype, score_function, fused)
        return {name: attached[name].minus(plain[name]) for name in attached}

    few, many, longer = added(FEW), added(MANY), added(MANY, 2 * TOKENS)
    difference = {name: many[name].minus(few[name]) for name in many}
    by_call = {name: part.number / (MANY - FEW) for name, part in difference.items()}
    once = sum(few[name].number - FEW * by_call[name] for name in ("forward", "loss", "backward"))
    limits = FUSED_LIMITS.get(strategy) if fused else LIMITS.get((strategy, mask_dtype is not None))
    forward_limit, backward_limit = limits or (None, None)
    return {
        "strategy": strategy,
        "mask": mask_dtype,
        "fused": fused,
        "score_function": score_function,
        "forward": by_call["forward"],
        "forward_limit": forward_limit,
        "backward": by_call["backward"],
        "backward_limit": backward_limit,
        "micro_batch": once + LAYERS * by_call["loss"],
        "step": few["step"].number + (LAYERS - FEW) * by_call["step"],
        "bytes": (longer["forward"].kept - many["forward"].kept) / TOKENS / MANY,
    }


@contextmanager
def eager_on_fake_tensors() -> Iterator[None]:
    """A fake tensor is no plain one, and needs a dispatch mode, which otherwise means that a forward is traced."""
    with (
        mock.patch("equipoise.routers.tapped.is_traced", return_value=False),
        mock.patch("equipoise.routers.forward.is_traced", return_value=False),
        mock.patch("equipoise.counting.biases.Tensor", FakeTensor),
        mock.patch.object(kernels, "can_take", lambda values: values.device.type == DEVICE.split(":")[0]),
    ):
        yield


def measure_all() -> dict[str, Any]:
    rows = [
        measure(strategy, mask_dtype, score_function, fused)
        for fused in (False, True)
        for score_function in ("softmax", "sigmoid")
        for strategy in STRATEGIES
        for mask_dtype in MASKS[strategy]
    ]
    facts = run_facts("python benchmarks/operations.py", "torch")
    sizes = {"layers": LAYERS, "experts": EXPERTS, "k": K, "rows": ROWS}
    return {**facts, **sizes, "step_limit": STEP_LIMIT, "bytes_limit": BYTES_LIMIT, "calls": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=STORED, help="where the result is written")
    options = parser.parse_args()
    _setup_privateuseone_for_python_backend("fakegpu")
    with eager_on_fake_tensors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        result = measure_all()
    write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
