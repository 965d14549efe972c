"""The table of ways to run a training step, and the exact two-pass gradient that each must give.

The reference shares no code with the library. A first pass counts all micro-batches of all ranks. The gradients of the
losses then come from the float64 loops of ``reference.py``. A plain copy of the model carries them from the logits to
the parameters.
"""

import itertools
from functools import cache
from typing import NamedTuple

import reference
import torch
import torch.nn.functional as F
from models import EXPERTS, VOCAB, K, TinyLM, tiny_lm
from torch import Tensor, nn

import equipoise

COEFFICIENTS = {"global_batch": 0.5, "sequence": 0.3, "micro_batch": 0.2}
STRATEGY = "loss-free:rate=1e-2+" + "+".join(f"lbl:scope={s},coefficient={c}" for s, c in COEFFICIENTS.items())
BIASES = {
    "blocks.0.gate": torch.tensor([0.3, -0.2, 0.0, 0.1, -0.3, 0.1]),
    "blocks.1.gate": torch.tensor([-0.1, 0.2, 0.05, -0.05, 0.0, -0.1]),
}
MODES = ("eager", "non_reentrant", "reentrant", "compile", "compile_over_checkpoint", "checkpoint_over_compile")
NUM_MICRO_BATCHES = 3
CPU = torch.device("cpu")
# of the norm over all parameters; float32 rounds to 6e-8, and in bfloat16 both round at the same place
TOLERANCE = 5e-7
# atomic additions come in any order, which may change how a few numbers are rounded
TOLERANCE_ON_ACCELERATORS = {"float32": 5e-6, "bfloat16": 2e-3}


class Cell(NamedTuple):
    mode: str
    dtype: str  # float32, bfloat16 (autocast)
    scale: int
    order: str  # forwards_first, plain
    wrapper: str  # none, ddp, fsdp


def cells(wrapper: str) -> list[Cell]:
    product = itertools.product(MODES, ("float32", "bfloat16"), (1, 1024), ("forwards_first", "plain"), (wrapper,))
    return [cell for cell in map(Cell._make, product) if not impossible(cell)]


def keeps_scores(mode: str) -> bool:
    """Whether autograd has the scores, in the forward or in its recomputation: gradients are added there, in float32.
    Otherwise they are added at the logits, and in bfloat16 both have been rounded."""
    return mode in ("eager", "reentrant")


def impossible(cell: Cell) -> str | None:
    """Why torch rules a cell out, with or without balancing; None if it does not."""
    if cell.wrapper != "none" and cell.mode == "reentrant" and cell.order == "forwards_first":
        # with torch 2.13, without equipoise: DDP raises "marked ready twice", FSDP2 leaves gradients unreduced
        return (
            "a reentrant checkpoint runs one backward inside another, and the wrapper reduces gradients once for each"
        )
    return None


class Micro(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor


def micro_batches(rank: int) -> list[Micro]:
    """Three micro-batches of 2 x 7 tokens: one whole, one padded, and one whole or (on rank 1) padding only."""
    generator = torch.Generator().manual_seed(10 + rank)
    ids = [torch.randint(0, VOCAB, (2, 7), generator=generator) for _ in range(NUM_MICRO_BATCHES)]
    masks = [torch.ones(2, 7, dtype=torch.long) for _ in ids]
    masks[1][0, :3] = 0
    masks[1][1, 5 + rank :] = 0
    if rank == 1:
        masks[2][:] = 0
    return [Micro(*pair) for pair in zip(ids, masks, strict=True)]


def plain_forward(
    router: nn.Module, hidden: Tensor, bias: Tensor, score_function: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A router of the tiny model, written again after the code of its family. Last, what its scores are made of."""
    if score_function == "sigmoid":
        logits = wide = F.linear(hidden.float(), router.weight.float())
        scores = logits.sigmoid()
    else:
        logits = F.linear(hidden, router.weight)
        wide = logits.float()
        scores = wide.softmax(-1)
    ids = (scores + bias.to(scores.device)).topk(K, -1, sorted=score_function != "sigmoid").indices
    weights = scores.gather(-1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if score_function == "sigmoid" else 0))
    return logits, weights.to(logits.dtype), ids, wide


@cache
def exact(
    dtype: str, order: str, num_ranks: int, at_scores: bool, device: torch.device = CPU
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Parameter gradients, averaged over ranks, and counts by layer."""
    model = tiny_lm().to(device)
    outputs: list[tuple[Tensor, Tensor]] = []
    for block, score_function, bias in zip(model.blocks, ("sigmoid", "softmax"), BIASES.values(), strict=True):

        def forward(hidden, router=block.gate, bias=bias, score_function=score_function):
            logits, weights, ids, wide = plain_forward(router, hidden, bias, score_function)
            outputs.append((wide if at_scores else logits, ids))
            return logits, weights, ids

        block.gate.forward = forward
    passes = []  # (number of the micro-batch, task loss, mask, [(logits, ids) of each layer])
    for rank in range(num_ranks):
        for number, micro in enumerate(micro_batches(rank)):
            outputs.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(*(tensor.to(device) for tensor in micro))
            passes.append((number, loss, micro.attention_mask.flatten().tolist(), list(outputs)))
    counts = [
        [reference.load(layers[layer][1].tolist(), EXPERTS, mask) for _, _, mask, layers in passes] for layer in (0, 1)
    ]
    roots, gradients = [], []
    for index, (number, loss, mask, layers) in enumerate(passes):
        roots.append(loss)
        gradients.append(torch.tensor(1.0 / NUM_MICRO_BATCHES / num_ranks, device=device))
        for layer, (logits, ids) in enumerate(layers):
            score_function = ("sigmoid", "softmax")[layer]
            rows = logits.double().tolist()
            known = [
                c
                for c, (other, *_) in zip(counts[layer], passes, strict=True)
                if order == "forwards_first" or other <= number
            ]
            pooled = [sum(column) for column in zip(*known, strict=True)]
            sequence_ids = [0] * 7 + [1] * 7
            parts = {
                "global_batch": reference.load_balancing_gradient(rows, pooled, score_function, mask),
                "micro_batch": reference.load_balancing_gradient(rows, counts[layer][index], score_function, mask),
                "sequence": reference.sequence_gradient(rows, ids.tolist(), sequence_ids, score_function, mask),
            }
            total = sum(COEFFICIENTS[scope] * torch.tensor(part, dtype=torch.float64) for scope, part in parts.items())
            roots.append(logits)
            gradients.append((total / NUM_MICRO_BATCHES / num_ranks).to(device, logits.dtype))
    torch.autograd.backward(roots, gradients)
    parameter_gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return parameter_gradients, [[sum(column) for column in zip(*layer, strict=True)] for layer in counts]


class Outcome(NamedTuple):
    gradients: dict[str, Tensor]
    counts: list[list[int]]
    biases: list[Tensor]


def prepare(cell: Cell, device: torch.device = CPU) -> tuple[nn.Module, TinyLM, equipoise.Balance]:
    """The attached model of a cell, wrapped and compiled. Cells with the same mode, dtype and wrapper may share it."""
    checkpointing = {
        "non_reentrant": "non_reentrant",
        "reentrant": "reentrant",
        "compile_over_checkpoint": "non_reentrant",
        "checkpoint_over_compile": "non_reentrant",
    }.get(cell.mode)
    inner = tiny_lm(checkpointing).to(device)
    model: nn.Module = inner
    if cell.mode == "checkpoint_over_compile":
        for block in inner.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    if cell.wrapper == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in inner.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(inner, mesh=mesh, reshard_after_forward=False)
    balance = equipoise.attach(model, STRATEGY, biases=BIASES)
    if cell.wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if cell.mode in ("compile", "compile_over_checkpoint"):
        if cell.wrapper == "fsdp":  # FSDP's hooks break a graph of the whole model, so its blocks are compiled
            for block in inner.blocks:
                block.compile(backend="aot_eager", fullgraph=cell.mode == "compile")
        elif cell.wrapper == "ddp":
            inner.compile(backend="aot_eager", fullgraph=True)
        else:
            model = torch.compile(model, backend="aot_eager", fullgraph=True)
    return model, inner, balance


def run(cell: Cell, prepared: tuple[nn.Module, TinyLM, equipoise.Balance], rank: int = 0) -> Outcome:
    """One window of the cell, from ``BIASES``."""
    model, inner, balance = prepared
    inner.zero_grad()
    balance.load_state_dict({"num_windows": 0, "biases": BIASES})
    losses, device = [], inner.embed.weight.device
    for micro in micro_batches(rank):
        with torch.autocast(device.type, torch.bfloat16, enabled=cell.dtype == "bfloat16"):
            loss = model(*(tensor.to(device) for tensor in micro))
        loss = (loss + balance.loss()) / NUM_MICRO_BATCHES * cell.scale
        if cell.order == "plain":
            loss.backward()
        else:
            losses.append(loss)
    if losses:
        torch.stack(losses).sum().backward()
    balance.step()
    gradients = {}
    for name, parameter in inner.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            gradients[name] = grad.clone() / cell.scale
    return Outcome(
        gradients, [load.tolist() for load in balance.load.values()], [o.clone() for o in balance.biases.values()]
    )


def error(outcome: Outcome, expected: dict[str, Tensor]) -> float:
    """The relative distance of all gradients together, by norm."""
    assert outcome.gradients.keys() == expected.keys(), (outcome.gradients.keys(), expected.keys())
    pairs = [(outcome.gradients[name].double(), expected[name].double()) for name in expected]
    distance = sum(float((gradient - expected_gradient).square().sum()) for gradient, expected_gradient in pairs)
    size = sum(float(expected_gradient.square().sum()) for _, expected_gradient in pairs)
    return (distance / size) ** 0.5


def expected_biases(counts: list[list[int]]) -> list[Tensor]:
    """By the sign rule for the sigmoid layer, the proportional rule for the softmax layer; rate 1e-2, centred."""
    biases = []
    for name, layer, rule in zip(BIASES, counts, (reference.sign_rule, reference.proportional_rule), strict=True):
        biases.append(torch.tensor(rule(BIASES[name].tolist(), layer, 1e-2, True)))
    return biases


def check(cell: Cell, outcome: Outcome, num_ranks: int, device: torch.device = CPU) -> float:
    """Raises ``AssertionError`` if a cell does not give the exact counts, gradients and biases.

    Returns the error of its gradients.
    """
    gradients, counts = exact(cell.dtype, cell.order, num_ranks, keeps_scores(cell.mode), device)
    assert outcome.counts == counts, "a token was counted twice, not at all, or on the wrong rank"
    distance = error(outcome, gradients)
    tolerance = TOLERANCE if device.type == "cpu" else TOLERANCE_ON_ACCELERATORS[cell.dtype]
    assert distance < tolerance, f"relative distance of the gradients {distance:.2g}, at most {tolerance}"
    for bias, expected in zip(outcome.biases, expected_biases(counts), strict=True):
        torch.testing.assert_close(bias.cpu(), expected, rtol=0, atol=1e-6)  # float32 sums of six terms
    return distance


def run_cells(rank: int, wrapper: str) -> dict[Cell, Outcome]:
    """Runs all cells of a wrapper on this rank."""
    results: dict[Cell, Outcome] = {}
    prepared, key = None, None
    for cell in cells(wrapper):
        if key != (cell.mode, cell.dtype):
            torch._dynamo.reset()
            key, prepared = (cell.mode, cell.dtype), prepare(cell)
        results[cell] = run(cell, prepared, rank)
    return results
