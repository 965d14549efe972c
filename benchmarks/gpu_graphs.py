"""Parts of `gpu.py`: CUDA graphs, torch.compile, NCCL, and waiting for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from gpu_exactness import Call, attached, check_at_most, check_counts, record_calls
from gpu_parts import NotRun, Row, Setting, make_row, require_gpu
from operations import STRATEGIES, attach
from torch import Tensor

import equipoise
from equipoise.counting.pool import Pool
from equipoise.nn import MoE

# after gpu_exactness, which adds the tests' helpers to the path
import grid  # isort: skip
from models import tiny_lm  # isort: skip

SIZES = dict(dim=16, experts=16, k=4)
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
WINDOWS = 3  # with CUDA graphs the first runs warm up, the next are captured, the last are replayed
COMPILED_TOLERANCE = 1e-5  # of values and gradients: a fused kernel rounds elsewhere
COMBINED = "loss-free+lbl:coefficient=0.1+lbl:scope=sequence"


def make_hidden(setting: Setting, seed: int, **options: Any) -> Tensor:
    hidden = torch.randn(2, 32, SIZES["dim"], generator=torch.Generator().manual_seed(seed))
    return hidden.to(setting.device).requires_grad_(**options)


# ---- CUDA graphs ----


def capture(call: Callable[[], Any]) -> tuple[Any, Any]:
    """The graph of a call, and its output. Warmed up before, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output


def captured_evaluation(setting: Setting) -> Row:
    require_gpu(setting)
    model, balance = attached(setting, "loss-free", "sigmoid", 2, SIZES)
    hidden = make_hidden(setting, 0, requires_grad=False)

    def evaluate() -> list[Tensor]:
        with torch.no_grad(), balance.paused():
            return [value for router in model.routers for value in router(hidden)]

    graph, outputs = capture(evaluate)
    for seed in (1, 2):
        hidden.copy_(make_hidden(setting, seed, requires_grad=False))
        biases = {name: torch.randn_like(bias) for name, bias in balance.biases.items()}
        balance.load_state_dict({"num_windows": 0, "biases": biases})
        graph.replay()
        replayed = [value.clone() for value in outputs]
        for value, expected in zip(replayed, evaluate(), strict=True):
            torch.testing.assert_close(value, expected)
    if balance.has_open_window:
        raise AssertionError("an evaluation inside paused() was counted")
    return {"replays": 2}


def refused_capture(setting: Setting, measures: bool) -> Row:
    """A forward that counts must raise while a graph is captured."""
    require_gpu(setting)
    model, balance = attached(setting, "loss-free+lbl", "softmax", 2, SIZES)
    hidden = make_hidden(setting, 0, requires_grad=False)

    def count() -> None:
        if measures:
            with balance.measuring():
                model(inputs_embeds=hidden)
        else:
            model(inputs_embeds=hidden)

    try:
        capture(count)
    except Exception as error:
        chain, message = error, ""
        while chain is not None:  # the end of a capture that failed may raise an error of its own
            message, chain = f"{message} {chain}", chain.__context__
        if "must be counted outside a CUDA graph" not in message:
            raise
        return {"refused": True}
    raise AssertionError("a forward that counts was captured: its replays would count nothing")


def graphs(setting: Setting) -> Iterator[Row]:
    yield make_row("an evaluation inside paused() is captured", partial(captured_evaluation, setting))
    # last: a capture that failed may leave the device in a state that others suffer from
    yield make_row("the capture of a training forward is refused", partial(refused_capture, setting, measures=False))
    yield make_row("the capture of a measured forward is refused", partial(refused_capture, setting, measures=True))


# ---- torch.compile ----


def train_windows(setting: Setting, options: dict[str, str] | None) -> dict[str, Any]:
    """Loads, values of the loss, gradients and biases of windows of the tiny model.

    ``options``: of ``torch.compile``; None: eager.
    """
    inner = tiny_lm().to(setting.device)
    balance = equipoise.attach(inner, grid.STRATEGY, biases=grid.BIASES)
    model = inner if options is None else torch.compile(inner, **options, fullgraph=True)
    loads, losses = [], []
    gradients = {name: torch.zeros_like(parameter) for name, parameter in inner.named_parameters()}
    for _ in range(WINDOWS):
        for micro in grid.micro_batches(0):
            torch.compiler.cudagraph_mark_step_begin()
            task = model(*(tensor.to(setting.device) for tensor in micro))
            ticket = balance.loss()
            (task + ticket).backward()
            losses += [float(task.detach()), float(ticket.detach())]
            for name, parameter in inner.named_parameters():
                if parameter.grad is not None:
                    gradients[name] += parameter.grad
            inner.zero_grad()  # what a replayed graph wrote is gone at the next replay
        balance.step()
        loads.append({name: load.tolist() for name, load in balance.load.items()})
    biases = [bias.cpu() for bias in balance.biases.values()]
    return {"loads": loads, "losses": losses, "gradients": gradients, "biases": biases}


def check_compiled(setting: Setting, options: dict[str, str]) -> Row:
    if options.get("mode", "default") != "default":
        require_gpu(setting)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected, compiled = (train_windows(setting, one) for one in (None, options))
    if compiled["loads"] != expected["loads"]:
        raise AssertionError(f"the loads must be {expected['loads']}: got {compiled['loads']}")
    losses = zip(compiled["losses"], expected["losses"], strict=True)
    value_error = max(abs(value - eager) / max(abs(eager), 1e-9) for value, eager in losses)
    outcomes = (grid.Outcome(result["gradients"], [], []) for result in (compiled, expected))
    gradient_error = grid.error(next(outcomes), next(outcomes).gradients)
    check_at_most("relative difference of a loss", value_error, COMPILED_TOLERANCE)
    check_at_most("relative difference of the gradients", gradient_error, COMPILED_TOLERANCE)
    for bias, eager in zip(compiled["biases"], expected["biases"], strict=True):
        torch.testing.assert_close(bias, eager, rtol=0, atol=1e-6)
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {"loss": value_error, "gradient": gradient_error, "graphs skipped": int(skips)}


def compile_modes(setting: Setting) -> Iterator[Row]:
    if setting.small:  # Inductor's C++ takes minutes to compile
        yield make_row("aot_eager", partial(check_compiled, setting, {"backend": "aot_eager"}))
        return
    for mode in MODES:
        yield make_row(mode, partial(check_compiled, setting, {"mode": mode}))


# ---- NCCL ----


class Doubled:
    """The sum over two ranks that counted the same."""

    def __init__(self, work: Any, vector: Tensor):
        self.work, self.vector = work, vector

    def wait(self) -> None:
        self.work.wait()
        self.vector.mul_(2)


class TwinPool(Pool):
    """As if a second rank did all that this one does: each sum over the one rank is sent, and doubled when it is back.

    A pool of one rank sends nothing, so it would show nothing of a backend.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.size, self.group = 2, dist.group.WORLD

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def all_reduce(self, vector: Tensor) -> Any:
        return Doubled(super().all_reduce(vector), vector)

    def close(self) -> None:
        self.group = None


@contextmanager
def process_group(setting: Setting) -> Iterator[None]:
    backend = "nccl" if setting.has_gpu else "gloo"
    if not getattr(dist, f"is_{backend}_available")():
        raise NotRun(f"this torch has no {backend}")
    options = {"device_id": torch.device("cuda", torch.cuda.current_device())} if setting.has_gpu else {}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_pooled(setting: Setting, strategy: str, twin: bool) -> Row:
    """A window of three micro-batches. Loads must be those of all ranks, and biases must move by them."""
    with process_group(setting):
        model, balance = attached(setting, strategy, "sigmoid", 2, SIZES)
        if twin:
            balance.detach()
            balance = attach(model, strategy, pool=TwinPool())
        recorded, calls = record_calls(model), [[], []]
        before = {name: bias.clone() for name, bias in balance.biases.items()}
        for seed in range(3):
            recorded.clear()
            hidden = make_hidden(setting, seed, requires_grad=True)
            task = model(inputs_embeds=hidden)
            for layer, (logits, expert_ids) in enumerate(recorded):
                one = Call(hidden, logits, expert_ids, None, "sigmoid")
                calls[layer] += [one] * (2 if twin else 1)
            ((task + balance.loss()) / 3).backward()
        balance.step()
        check_counts(balance, calls)
        moved = sum(not torch.equal(bias, before[name]) for name, bias in balance.biases.items())
        if "lbl" not in strategy and moved != len(before):
            raise AssertionError(f"the biases of {len(before)} layers must move: those of {moved} did")
        metrics = balance.metrics()
        if twin and not metrics["collectives"]:
            raise AssertionError("nothing was sent")
        return {"collectives": metrics["collectives"], "bytes": metrics["collective_bytes"]}


def pooled_counts(setting: Setting) -> Iterator[Row]:
    backend = "NCCL" if setting.has_gpu else "gloo"
    for strategy, twin in product(("loss-free", "lbl", "quantile"), (False, True)):
        what = "two ranks that do the same" if twin else "one rank"
        yield make_row(f"{backend}, {strategy}, {what}", partial(check_pooled, setting, strategy, twin))


# ---- waiting for the device ----


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_wait(setting: Setting, strategy: str, masked: bool) -> Row:
    """Forward, loss(), backward and step(), of the first window and of a later one."""
    require_gpu(setting)
    model, balance = attached(setting, strategy, "softmax", 2, SIZES)
    mask = torch.ones(2, 32, dtype=torch.int64, device=setting.device) if masked else None
    for window in range(3):
        hidden, phase = make_hidden(setting, window, requires_grad=True), "forward"
        torch.cuda.synchronize()
        try:
            with no_waiting():
                task = model(inputs_embeds=hidden, attention_mask=mask)
                phase = "loss()"
                loss = task + balance.loss()
                phase = "backward"
                loss.backward()
                phase = "step()"
                balance.step()
        except RuntimeError as error:
            raise RuntimeError(f"{phase} of window {window + 1}: {error}") from error
    return {"windows": 3}


def check_experts_do_not_wait(setting: Setting) -> Row:
    require_gpu(setting)
    layer = MoE(32, 32, 16, 4).to(setting.device, torch.bfloat16)
    for _ in range(3):
        hidden = torch.randn(2, 64, 32, dtype=torch.bfloat16, device=setting.device, requires_grad=True)
        torch.cuda.synchronize()
        with no_waiting():
            layer(hidden).sum().backward()
    return {"calls": 3}


def check_the_check(setting: Setting) -> Row:
    """``item()`` waits: the check must see it."""
    require_gpu(setting)
    try:
        with no_waiting():
            torch.ones(1, device=setting.device).item()
    except RuntimeError:
        return {}
    raise AssertionError("set_sync_debug_mode let item() pass, so it shows nothing")


def waits(setting: Setting) -> Iterator[Row]:
    yield make_row("the check sees item()", partial(check_the_check, setting))
    for strategy, masked in product((*STRATEGIES, COMBINED), (False, True)):
        what = f"{strategy}{', masked' if masked else ''}"
        yield make_row(what, partial(check_no_wait, setting, strategy, masked))
    yield make_row("nn.MoE, forward and backward", partial(check_experts_do_not_wait, setting))
