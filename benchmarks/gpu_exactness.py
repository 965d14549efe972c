"""Parts of `gpu.py`: counts, losses, gradients and biases on a device equal those of independent float64 loops.

The loops are those of the tests (tests/helpers/reference.py). They run on the CPU, on the logits and the choices that
the device made, so nothing of the device is in them.
"""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from gpu_parts import NotRun, Row, Setting, make_row
from operations import STRATEGIES, Routers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
import grid
import reference

import equipoise
from equipoise import Balance, Balancer, LoadBalancingLoss, LossFree, Quantile, ZLoss, kernels
from equipoise.routing import ScoreFunction

SCORE_FUNCTIONS: tuple[ScoreFunction, ...] = ("softmax", "sigmoid")
CASES = ("whole", "masked", "checkpointed", "bfloat16")
DIM, EXPERTS, K, LAYERS = 8, 16, 4, 2
ROWS, LENGTH = 2, 7
MASKS = ([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], [[1] * 7, [1, 1, 1, 0, 0, 0, 0]])  # by micro-batch
LARGE = dict(dim=64, experts=128, k=8), 8192  # sizes of a router, tokens
SMALL = dict(dim=64, experts=128, k=8), 512
TOLERANCE = 1e-5  # of values and gradients, relative to the norm; float32 rounds to 6e-8
TOLERANCE_OF_BIASES = 1e-6
SMALL_MODES = ("eager", "non_reentrant")


class Call:
    """What one router did in one micro-batch, as Python numbers."""

    def __init__(self, hidden: Tensor, logits: Tensor, expert_ids: Tensor, mask: Tensor | None, score_function: str):
        self.hidden = hidden.detach().double().cpu().reshape(-1, hidden.shape[-1])
        self.logits, self.expert_ids = logits.double().tolist(), expert_ids.tolist()
        self.mask = None if mask is None else mask.flatten().tolist()
        self.sequence_ids = [token // hidden.shape[1] for token in range(len(self.logits))]
        self.scores = reference.scores(self.logits, score_function)
        self.score_function, self.experts = score_function, logits.shape[-1]
        self.counts = reference.load(self.expert_ids, self.experts, self.mask)

    def loss(self, balancer: Balancer, pooled: list[int]) -> float:
        """A balancer's loss, without its coefficient. ``pooled``: the counts of the window until now."""
        if isinstance(balancer, ZLoss):
            return reference.z_loss(self.logits, self.mask)
        if balancer.scope == "sequence":
            return reference.sequence_loss(self.scores, self.expert_ids, self.sequence_ids, self.mask)
        counts = pooled if balancer.scope == "global_batch" else self.counts
        return reference.load_balancing_loss(self.scores, counts, len(self.expert_ids[0]), self.mask)

    def gradient(self, balancer: Balancer, pooled: list[int]) -> Tensor:
        """Of this loss, by the logits."""
        if isinstance(balancer, ZLoss):
            rows = reference.z_loss_gradient(self.logits, self.mask)
        elif balancer.scope == "sequence":
            rows = reference.sequence_gradient(
                self.logits, self.expert_ids, self.sequence_ids, self.score_function, self.mask
            )
        else:
            counts = pooled if balancer.scope == "global_batch" else self.counts
            rows = reference.load_balancing_gradient(self.logits, counts, self.score_function, self.mask)
        return torch.tensor(rows, dtype=torch.float64)


def expected_bias(balancer: Balancer, start: list[float], calls: list[Call], rate: float) -> list[float]:
    """After a window of these calls of one layer."""
    counts = [sum(column) for column in zip(*(call.counts for call in calls), strict=True)]
    if isinstance(balancer, LossFree):
        rule = reference.sign_rule if calls[0].score_function == "sigmoid" else reference.proportional_rule
        return rule(start, counts, rate, balancer.center)
    if isinstance(balancer, Quantile):
        k = len(calls[0].expert_ids[0])
        scores = [row for call in calls for row in call.scores]
        mask = [flag for call in calls for flag in (call.mask or [1] * len(call.scores))]
        histogram = reference.quantile_histogram(scores, k, start, mask)
        return reference.quantile_from_histogram(histogram, k, sum(map(bool, mask)), start)
    return start


def record_calls(model: Routers) -> list[tuple[Tensor, Tensor]]:
    """A list that grows by the (logits, expert_ids) of every router call, in the order of the layers."""
    calls: list[tuple[Tensor, Tensor]] = []
    for router in model.routers:
        router.register_forward_hook(lambda module, args, output: calls.append((output[0].detach(), output[2])))
    return calls


def attached(
    setting: Setting,
    strategy: str,
    score_function: ScoreFunction,
    layers: int,
    sizes: dict[str, int],
    fused: bool = False,
) -> tuple[Routers, Balance]:
    """Routers of these sizes on the device. Biases that move begin at random numbers."""
    if fused and not (setting.has_gpu or kernels.IS_INTERPRETED):
        raise NotRun("kernels need a GPU, or Triton's interpreter (TRITON_INTERPRET=1)")
    torch.manual_seed(0)
    model = Routers(layers, score_function, **sizes)
    for router in model.routers:
        nn.init.normal_(router.weight, std=0.7)
    biases = None
    if strategy in ("loss-free", "quantile"):
        biases = {f"routers.{index}": 0.1 * torch.randn(sizes["experts"]) for index in range(layers)}
    model.to(setting.device).train()
    return model, equipoise.attach(model, strategy, biases=biases, fused=fused)


def check_strategy(setting: Setting, strategy: str, score_function: ScoreFunction, case: str, fused: bool) -> Row:
    """A window of two micro-batches: counts, the value of the loss, its gradient by weights and inputs, biases."""
    model, balance = attached(setting, strategy, score_function, LAYERS, dict(dim=DIM, experts=EXPERTS, k=K), fused)
    (balancer,) = equipoise.parse_strategy(strategy)
    start = [bias.double().tolist() for bias in balance.biases.values()]
    recorded = record_calls(model)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    windows: list[list[Call]] = [[] for _ in range(LAYERS)]  # by layer, the calls until now
    weights = [torch.zeros(EXPERTS, DIM, dtype=torch.float64) for _ in range(LAYERS)]  # expected gradients
    worst_value = worst_input = 0.0
    for rows in MASKS:
        hidden = (torch.randn(ROWS, LENGTH, DIM) + 1).to(setting.device, dtype).requires_grad_()
        mask = torch.tensor(rows, device=setting.device) if case == "masked" else None
        forward = partial(checkpoint, model, use_reentrant=False) if case == "checkpointed" else model
        recorded.clear()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=case == "bfloat16"):
            task = forward(inputs_embeds=hidden, attention_mask=mask)
        made = list(recorded)  # before a recomputation adds to it
        ticket = balance.loss()
        ((0 * task + ticket) / len(MASKS)).backward()
        value, expected_input = 0.0, torch.zeros(ROWS * LENGTH, DIM, dtype=torch.float64)
        for layer, (logits, expert_ids) in enumerate(made):
            call = Call(hidden, logits, expert_ids, mask, score_function)
            windows[layer].append(call)
            if not balancer.has_loss:
                continue
            pooled = [sum(column) for column in zip(*(c.counts for c in windows[layer]), strict=True)]
            value += balancer.coefficient * call.loss(balancer, pooled)
            gradient = balancer.coefficient / len(MASKS) * call.gradient(balancer, pooled)
            weights[layer] += gradient.T @ call.hidden
            expected_input += gradient @ model.routers[layer].weight.detach().double().cpu()
        worst_value = max(worst_value, abs(float(ticket.detach()) - value) / max(abs(value), 1e-9))
        worst_input = max(worst_input, distance(hidden.grad.reshape(-1, DIM), expected_input))
    balance.step()
    check_counts(balance, windows)
    worst_weight = max(
        distance(router.weight.grad, by_hand) for router, by_hand in zip(model.routers, weights, strict=True)
    )
    check_at_most("relative error of loss()", worst_value, TOLERANCE)
    check_at_most("relative error of the gradient by the weights", worst_weight, TOLERANCE)
    check_at_most(  # which a model in bfloat16 rounds
        "relative error of the gradient by the inputs", worst_input, 1e-2 if case == "bfloat16" else TOLERANCE
    )
    bias_error = check_biases(balance, balancer, start, windows)
    return {"loss": worst_value, "gradient": max(worst_weight, worst_input * (case != "bfloat16")), "bias": bias_error}


def check_large(setting: Setting, strategy: str, score_function: ScoreFunction, fused: bool) -> Row:
    """A router call of many tokens: counts, the value of the loss, biases."""
    sizes, tokens = SMALL if setting.small else LARGE
    model, balance = attached(setting, strategy, score_function, 1, sizes, fused)
    (balancer,) = equipoise.parse_strategy(strategy)
    start = [bias.double().tolist() for bias in balance.biases.values()]
    recorded = record_calls(model)
    hidden = (torch.randn(ROWS, tokens // ROWS, sizes["dim"]) + 0.2).to(setting.device)
    task = model(inputs_embeds=hidden)
    ((logits, expert_ids),) = recorded
    ticket = balance.loss()
    (0 * task + ticket).backward()
    balance.step()
    call = Call(hidden, logits, expert_ids, None, score_function)
    check_counts(balance, [[call]])
    figures = {"tokens": tokens, "experts": sizes["experts"]}
    if (
        isinstance(balancer, LoadBalancingLoss | ZLoss) and balancer.scope != "sequence"
    ):  # loops over sequences are slow
        value = balancer.coefficient * call.loss(balancer, call.counts)
        figures["loss"] = abs(float(ticket.detach()) - value) / value
        check_at_most("relative error of loss()", figures["loss"], TOLERANCE)
    if not isinstance(balancer, Quantile):  # a margin at the edge of a bin may be in either
        figures["bias"] = check_biases(balance, balancer, start, [[call]])
    return figures


def check_counts(balance: Balance, windows: list[list[Call]]) -> None:
    for (name, load), calls in zip(balance.load.items(), windows, strict=True):
        counts = [sum(column) for column in zip(*(call.counts for call in calls), strict=True)]
        if load.tolist() != counts:
            raise AssertionError(f"the load of {name} must be {counts}: got {load.tolist()}")


def check_biases(balance: Balance, balancer: Balancer, start: list[list[float]], windows: list[list[Call]]) -> float:
    """Returns the largest error."""
    worst = 0.0
    for bias, before, calls in zip(balance.biases.values(), start, windows, strict=True):
        expected = torch.tensor(expected_bias(balancer, before, calls, balance.rate), dtype=torch.float64)
        worst = max(worst, float((bias.double().cpu() - expected).abs().max()))
        if isinstance(balancer, LossFree | Quantile) and bias.double().tolist() == before:
            raise AssertionError("no bias moved, so nothing was shown")
    check_at_most("error of the biases", worst, TOLERANCE_OF_BIASES)
    return worst


def check_at_most(what: str, value: float, limit: float) -> None:
    if not value <= limit:  # a nan fails too
        raise AssertionError(f"{what} must be at most {limit:g}: got {value:.3g}")


def distance(gradient: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected; the norm itself if that is 0."""
    difference, size = float((gradient.double().cpu() - expected).norm()), float(expected.norm())
    return difference / size if size else difference


def strategies(setting: Setting) -> Iterator[Row]:
    cases = CASES[:2] if setting.small else CASES
    for fused, strategy, score_function in product((False, True), STRATEGIES, SCORE_FUNCTIONS):
        name, arguments = f"{strategy}, {score_function}", (setting, strategy, score_function)
        kind = ", fused" if fused else ""
        for case in cases:
            yield make_row(f"{name}, {case}{kind}", partial(check_strategy, *arguments, case, fused))
        if setting.has_gpu or not fused:  # the interpreter is slow
            yield make_row(f"{name}, large{kind}", partial(check_large, *arguments, fused))


def ways(setting: Setting) -> Iterator[Row]:
    """The table of tests/library/test_grid.py."""
    prepared, key = None, None
    for cell in grid.cells("none"):
        if setting.small and (cell.mode not in SMALL_MODES or cell.scale > 1):
            continue

        def check(cell: grid.Cell = cell) -> Row:
            nonlocal prepared, key
            if key != (cell.mode, cell.dtype):
                torch._dynamo.reset()
                key, prepared = None, None
                prepared = grid.prepare(cell, setting.device)
                key = (cell.mode, cell.dtype)
            return {"gradient": grid.check(cell, grid.run(cell, prepared), 1, setting.device)}

        yield make_row(", ".join(map(str, cell[:4])), check)
