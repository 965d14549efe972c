"""The hot path on fake tensors of an accelerator: anything that would make the host wait for the device raises.

A fake tensor has a shape, a dtype and a device, but no data: ``.item()``, ``.tolist()``, ``bool()``, ``nonzero``,
boolean indexing and ``bincount`` raise. A torch built without CUDA cannot index or differentiate fake CUDA tensors: it
aborts without a device guard. There the accelerator is one that exists in Python only; the same code runs.

This file runs as a program, because such an accelerator stays in the process. It prints the error of each case as JSON.
"""

import json
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise import metrics, routing
from equipoise.alerts import PATIENCE, Alerts
from equipoise.balance import Balance
from equipoise.balancers import Balancer, parse_strategy
from equipoise.counting.biases import slot_value
from equipoise.counting.pool import Pool
from equipoise.routers import MoELayer
from equipoise.routers.kind import ADDED_SLOT, RouterKind, Slot
from equipoise.routers.steering import BiasedTopK
from equipoise.routers.tap import UNCOUNTED, RouterCall
from equipoise.routers.tapped import tap_of
from equipoise.routing import route

EXPERTS, K, DIM = 8, 2, 4
DEVICE = "cuda:0" if torch.backends.cuda.is_built() else "fakegpu:0"
LOSSES = "lbl:coefficient=0.1+lbl:scope=micro_batch+lbl:scope=sequence+lbl:pooling=previous+z"
STRATEGIES = [
    *(f"loss-free:rule={rule}" for rule in ("sign", "proportional", "rms", "momentum", "multiplicative")),
    "loss-free:rule=sign,scope=micro_batch",
    "loss-free:schedule=linear,zero_from=5",
    "quantile",
    "quantile:fraction=0.5,ema=0.5",
    "quantile:bins=0",
    "frozen",
]
NARROW = [s for s in STRATEGIES if s != "quantile:bins=0"] + [f"loss-free+{LOSSES}"]
POOLED = ["loss-free", "lbl:coefficient=0.1", "quantile", "lbl:coefficient=0.1+quantile"]
WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda load: load.sum().item(),
    "tolist": lambda load: load.tolist(),
    "boolean indexing": lambda load: load[load > 0],
    "nonzero": lambda load: load.nonzero(),
    "bool": lambda load: bool(load.any()),
    "bincount": lambda load: torch.bincount(load.flatten()),
    "another device": lambda load: load + torch.zeros(load.shape),
}


class _Router(nn.Module):
    def __init__(self, experts=EXPERTS):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, DIM, device=DEVICE))
        self.register_buffer("bias_slot", torch.zeros(experts, device=DEVICE))

    def forward(self, hidden):
        raise AssertionError("call the observer by hand: the op does not run on fake tensors")


class _Done:
    def wait(self):
        pass


class _TwoRanks(Pool):
    """As if there were another rank that counted nothing."""

    def __init__(self):
        super().__init__(None)
        self.size = 2

    def gather(self, value):
        return [value, value]

    def all_reduce(self, vector):
        return _Done()


class _Event:
    def record(self):
        pass

    def query(self):
        return False

    def synchronize(self):
        raise AssertionError("waited for the device")


def _balance(balancers, pool=None):
    model = nn.ModuleList([_Router(), _Router(EXPERTS + 2)])
    score_functions = ("sigmoid", "softmax")
    layers = [
        MoELayer(
            str(i),
            router,
            RouterKind(score_function, "bias_slot"),
            router.weight.shape[0],
            K,
            Slot(router, "bias_slot"),
        )
        for i, (router, score_function) in enumerate(zip(model, score_functions, strict=True))
    ]
    start = {layer.name: torch.zeros(layer.num_experts, device=DEVICE) for layer in layers}
    return Balance(model, layers, balancers, pool or Pool(None), start)


def _windows(balance, *, masked, applied=True, dtype=torch.float32):
    """Two windows of two micro-batches: what the two opaque ops and the public calls do, in the same order."""
    recorder = balance._recorder
    for _ in range(2):
        for _ in range(2):
            mask = torch.ones(2, 5, dtype=torch.int64, device=DEVICE) if masked else None
            sequence_ids = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE) if masked else None
            calls = []
            for index, layer in enumerate(balance.layers):
                logits = torch.zeros(10, layer.num_experts, device=DEVICE, dtype=dtype)
                routing = route(logits, K, score_function=layer.kind.score_function, bias=balance._biases.of(index))
                arguments = (logits, routing.expert_ids, routing.weights, mask, sequence_ids, 2)
                token = recorder.observe(RouterCall(index, *arguments))
                assert token != UNCOUNTED and isinstance(token, int)
                assert recorder.observe(RouterCall(index, *arguments, is_training=False)) == UNCOUNTED  # evaluation
                calls.append((index, token, logits, routing))
            ticket = balance.loss()
            assert isinstance(ticket, FakeTensor) and ticket.device == torch.device(DEVICE)
            if ticket.requires_grad:
                (ticket / 2).backward()
                for index, token, logits, routing in reversed(calls):
                    gradient = recorder.gradient(RouterCall(index, logits, routing.expert_ids, routing.weights), token)
                    assert gradient.shape == logits.shape and gradient.device == torch.device(DEVICE)
        with balance.measuring() as load:
            recorder.observe(RouterCall(0, *arguments_of(calls[0]), is_training=False))
        assert set(load) == {"0", "1"}
        balance.step(applied)


def arguments_of(call):
    _, _, logits, routing = call
    return logits, routing.expert_ids, routing.weights, None, None, 2


class _Waits(Balancer):
    def __init__(self, wait):
        self.wait = wait

    def prepare(self, layers):
        self._bias = layers.bias.clone()

    def bias(self):
        return self._bias

    def update(self, load, statistic=None, window=0):
        self.wait(load)


def _run(case: Callable[[], None]) -> str:
    """The traceback of an error, or an empty string."""
    try:
        with FakeTensorMode():
            case()
    except Exception:
        return traceback.format_exc()
    return ""


def _trains(strategy: str, masked: bool) -> None:
    balance = _balance(parse_strategy(f"{strategy}+{LOSSES}"))
    _windows(balance, masked=masked, dtype=torch.bfloat16)
    assert all(isinstance(bias, FakeTensor) for bias in balance.biases.values())


def _takes_a_verdict(strategy: str) -> None:
    applied = torch.ones((), dtype=torch.bool, device=DEVICE)
    _windows(_balance(parse_strategy(strategy)), masked=False, applied=applied)


def _pools(strategy: str, verdict: bool) -> None:
    """Two ranks: the flags that they exchange with their counts travel to the host, and nothing waits for them."""
    balance = _balance(parse_strategy(strategy), _TwoRanks())
    exchange, device = balance._window.exchange, torch.get_device_module(torch.device(DEVICE))
    device.Event, flags, order = _Event, [], []
    begin, look, step = exchange.pool.all_reduce, exchange._check_flags, balance.step

    def read():
        order.extend(["read"] if exchange._unread else [])
        flags.extend(exchange._unread)
        exchange._unread.clear()

    exchange.read = read
    exchange.pool.all_reduce = lambda vector: (order.append("begin"), begin(vector))[1]
    exchange._check_flags = lambda *args, **kwargs: (order.append("look"), look(*args, **kwargs))[1]
    balance.step = lambda *args: (order.append("step"), step(*args))[1]
    applied = torch.ones((), dtype=torch.bool, device=DEVICE) if verdict else True
    _windows(balance, masked=False, applied=applied)
    exchange.read()
    assert flags and all(numbers.device.type == "cpu" for numbers, *_ in flags)
    last_step = order[len(order) - order[::-1].index("step") :]
    assert "look" in last_step and "read" not in last_step[last_step.index("look") : -1], last_step


def _replays() -> None:
    """A record on the device, of which only shapes are looked at, and routing that is recorded there."""
    balance = _balance(parse_strategy(f"loss-free+{LOSSES}"))
    mask = torch.ones(2, 5, dtype=torch.int64, device=DEVICE)
    record = [torch.zeros(2, 5, K, dtype=torch.int32, device=DEVICE) for _ in balance.layers]
    with balance.replay(record, mask=mask), balance.recording() as recording:
        for index, layer in enumerate(balance.layers):
            recorded = tap_of(layer.router).ids_to_replay.flatten(0, 1)
            scores = torch.zeros(10, layer.num_experts, device=DEVICE, requires_grad=True)
            for has_groups in (False, True):
                with BiasedTopK(None, num_experts=layer.num_experts, recorded=recorded, has_groups=has_groups) as top_k:
                    scores[:, ::2].topk(1)  # of its groups
                    weights, expert_ids = scores.topk(K)
                assert top_k.num_replayed == 1 and top_k.num_group_choices == has_groups
            balance._recorder.observe(RouterCall(index, scores, expert_ids, weights, mask, None, 2, 5))
        balance.loss()
    balance.step()
    assert recording.by_token().shape == (2, 5, 2, K)


def _alerts() -> None:
    """All windows of a period but the last, after which the alerts are evaluated."""
    alerts, names = Alerts(), ("0", "1")
    load = {name: torch.ones(EXPERTS, dtype=torch.int64, device=DEVICE) for name in names}
    for _ in range(PATIENCE - 1):
        loss = torch.zeros((), device=DEVICE)
        assert alerts.see(load, loss, {name: counts.float() for name, counts in load.items()}) == []


class _NoFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.device.type != "cpu":
                raise TypeError("no float64 on this device")
        return output


def _narrow(strategy: str, is_told: bool) -> None:
    """A training and the metrics on a device without float64; ``is_told``: the library knows that it has none."""
    before = routing.DEVICES_WITHOUT_FLOAT64
    routing.DEVICES_WITHOUT_FLOAT64 = before | ({torch.device(DEVICE).type} if is_told else set())
    try:
        with _NoFloat64():
            balance = _balance(parse_strategy(strategy))
            _windows(balance, masked=True)
            for metric in (metrics.max_violation, metrics.load_entropy, metrics.dead_experts):
                assert metric(balance.load).dtype == torch.float32
    finally:
        routing.DEVICES_WITHOUT_FLOAT64 = before


def _captures(counts: bool, measures: bool = False) -> None:
    """A forward while a graph of the device's kernels is captured, of a call that counts or does not."""
    module = torch.get_device_module(torch.device(DEVICE))
    balance = _balance(parse_strategy("lbl"))
    names = ("is_current_stream_capturing", "is_initialized")
    before = {name: getattr(module, name, lambda: False) for name in names}
    vars(module).update(dict.fromkeys(names, lambda: True))
    logits = torch.zeros(10, EXPERTS, device=DEVICE)
    choice = route(logits, K)
    call = RouterCall(0, logits, choice.expert_ids, choice.weights, None, None, 2, is_training=counts)
    try:
        with balance.measuring() if measures else nullcontext():
            assert balance._recorder.observe(call) == UNCOUNTED
    finally:
        vars(module).update(before)


def _offloaded() -> None:
    """Weights that FSDP2 keeps on the host: what steers and counts must be where the router computes."""
    from torch.distributed.tensor import DeviceMesh, DTensor, Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    kind = torch.device(DEVICE).type
    with unset_fake_temporarily():
        mesh = DeviceMesh(kind, torch.arange(1, device="cpu"), _init_backend=False, _rank=0)
    on_host = torch.zeros(EXPERTS, DIM, device="cpu")
    spec = DTensorSpec(mesh, (Replicate(),), TensorMeta(on_host.shape, on_host.stride(), on_host.dtype))
    router = _Router()
    router.weight = nn.Parameter(DTensor(on_host, spec, requires_grad=True))
    assert router.weight.device.type == "cpu"
    layer = MoELayer("0", router, RouterKind("softmax", None), EXPERTS, K, None)
    assert layer.device == slot_value(layer).device == torch.device(DEVICE)
    start = {"0": slot_value(layer)}
    balance = Balance(nn.ModuleList([router]), [layer], parse_strategy("quantile"), Pool(None), start)
    assert router._buffers[ADDED_SLOT].device == torch.device(DEVICE)
    assert balance._recorder.device == balance.biases["0"].device == torch.device(DEVICE)
    assert all(load.device == torch.device(DEVICE) for load in balance.load.values())
    assert all(value.device == torch.device(DEVICE) for value in balance._biases.empty_statistics().summed)


def main() -> None:
    if not torch.backends.cuda.is_built():
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("fakegpu")
    errors = {}
    for strategy in STRATEGIES:
        for masked in (False, True):
            errors[f"{strategy}, {'masked' if masked else 'whole'}"] = _run(lambda s=strategy, m=masked: _trains(s, m))
        errors[f"{strategy}, verdict"] = _run(lambda s=strategy: _takes_a_verdict(s))
    for strategy in POOLED:
        for verdict in (False, True):
            errors[f"{strategy}, two ranks, {verdict}"] = _run(lambda s=strategy, v=verdict: _pools(s, v))
    for strategy in NARROW:
        errors[f"{strategy}, no float64"] = _run(lambda s=strategy: _narrow(s, is_told=True))
    errors["float64"] = _run(lambda: _narrow("quantile", is_told=False))
    errors["evaluation captured"] = _run(lambda: _captures(counts=False))
    errors["training captured"] = _run(lambda: _captures(counts=True))
    errors["measuring captured"] = _run(lambda: _captures(counts=False, measures=True))
    errors["offloaded"] = _run(_offloaded)
    errors["alerts"] = _run(_alerts)
    errors["replayed"] = _run(_replays)
    for name, wait in WAITING.items():
        errors[name] = _run(lambda w=wait: _windows(_balance([_Waits(w)]), masked=False))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
