"""One table: every way to run a training step gives the exact two-pass gradient and counts every token once.

{eager, checkpoint non-reentrant, reentrant, compile fullgraph, compile over checkpoint, checkpoint over compile}
x {float32, bfloat16 autocast} x {loss scale 1, 1024} x {forwards first, plain loop}
x {one process, 2 gloo ranks under DDP, 2 under FSDP2}, with Loss-Free biases and losses of all three scopes at once,
on micro-batches that are whole, padded and empty. ``grid.impossible`` names the cells that torch itself rules out.
"""

from functools import cache

import grid
import pytest
import torch
from ranks import run_on_ranks

import equipoise
from equipoise.counting.gradient import Losses
from equipoise.counting.window import Window
from equipoise.routers import tapped


@cache
def _prepared(mode, dtype):
    torch._dynamo.reset()
    return grid.prepare(grid.Cell(mode, dtype, 1, "plain", "none"))


def _parameters(*wrappers):
    """Cells that share a model or a pair of processes run on one worker."""
    for wrapper in wrappers:
        for cell in grid.cells(wrapper):
            group = wrapper if wrapper != "none" else f"{cell.mode}-{cell.dtype}"
            yield pytest.param(cell, marks=pytest.mark.xdist_group(group), id="-".join(map(str, cell)))


@pytest.mark.parametrize("cell", list(_parameters("none")))
def test_one_process(cell):
    grid.check(cell, grid.run(cell, _prepared(cell.mode, cell.dtype)), 1)


@cache
def _on_two_ranks(wrapper):
    return run_on_ranks(2, grid.run_cells, wrapper)


@pytest.mark.parametrize("cell", list(_parameters("ddp", "fsdp")))
def test_two_ranks(cell):
    for results in _on_two_ranks(cell.wrapper):
        assert not isinstance(results, str), results
        grid.check(cell, results[cell], 2)


def _eager_error(mode="eager", order="forwards_first"):
    cell = grid.Cell(mode, "float32", 1, order, "none")
    outcome = grid.run(cell, grid.prepare(cell))
    gradients, counts = grid.exact("float32", order, 1, at_scores=False)
    return grid.error(outcome, gradients), outcome.counts == counts


def test_the_table_sees_a_share_that_is_read_too_early(monkeypatch):
    def first_micro_batch_only(self):
        return self.micro_batches[0].vector

    monkeypatch.setattr(Window, "pooled_vector", first_micro_batch_only)
    assert _eager_error()[0] > 1e-2


def test_the_table_sees_a_factor_that_is_ignored(monkeypatch):
    original = Losses._serve
    monkeypatch.setattr(Losses, "_serve", lambda self, *args: (original(self, *args)[0], 1.0))
    assert _eager_error()[0] > 1e-2


def test_the_table_sees_a_bias_that_reaches_the_weights(monkeypatch):
    class Biased(tapped.BiasedTopK):
        num_choices = 1

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.topk, torch.Tensor.topk) and args[0].shape[-1] == self.bias.shape[0]:
                return torch.topk(args[0] + self.bias, *args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    cell = grid.Cell("eager", "float32", 1, "plain", "none")
    prepared = grid.prepare(cell)
    monkeypatch.setattr(tapped, "BiasedTopK", Biased)
    assert grid.error(grid.run(cell, prepared), grid.exact("float32", "plain", 1, at_scores=False)[0]) > 1e-2


@pytest.mark.parametrize("mode", ["non_reentrant", "reentrant", "checkpoint_over_compile"])
def test_the_table_sees_recomputation_that_counts(monkeypatch, mode):
    cell = grid.Cell(mode, "float32", 1, "plain", "none")
    torch._dynamo.reset()
    prepared = grid.prepare(cell)
    grid.run(cell, prepared)  # compiles now, so that the patch changes the check at run time only
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: -1)
    try:
        outcome = grid.run(cell, prepared)
    except (equipoise.EquipoiseError, ValueError):
        return  # an error shows the defect too
    assert outcome.counts != grid.exact("float32", "plain", 1, at_scores=False)[1]


@pytest.mark.parametrize("mode", ["eager", "non_reentrant", "reentrant", "compile"])
@pytest.mark.parametrize("forgotten", [0, 1, 2])
def test_a_forgotten_ticket_raises(mode, forgotten):
    torch._dynamo.reset()
    model, _, balance = grid.prepare(grid.Cell(mode, "float32", 1, "plain", "none"))
    for number, micro in enumerate(grid.micro_batches(0)):
        loss, ticket = model(*micro), balance.loss()
        if number != forgotten:
            (loss + ticket).backward()
            continue
        with pytest.raises(equipoise.EquipoiseError, match=r"balance.loss\(\) must be added"):
            loss.backward()
        return


def test_a_forgotten_ticket_raises_with_forwards_first():
    model, _, balance = grid.prepare(grid.Cell("non_reentrant", "float32", 1, "forwards_first", "none"))
    losses = []
    for number, micro in enumerate(grid.micro_batches(0)):
        loss, ticket = model(*micro), balance.loss()
        losses.append(loss if number == 1 else loss + ticket)
    with pytest.raises(equipoise.EquipoiseError, match=r"balance.loss\(\) must be added"):
        sum(losses).backward()
