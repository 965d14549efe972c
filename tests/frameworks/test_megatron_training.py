"""Training with Megatron-Core: its loop, skipped steps, evaluation, checkpoints, the page and the example."""

import logging
import os
import runpy
import subprocess
import sys

import pytest
import torch
from frameworks import megatron_models as models
from frameworks.megatron_models import (
    COEFFICIENT,
    UNEVEN,
    Reference,
    arguments,
    data_parallel,
    distance,
    forward_backward,
    gpt,
    gradients,
    micro_batches,
    optimizer_of,
)
from helpers.pages import ROOT, blocks
from megatron.core import dist_checkpointing
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from equipoise import EquipoiseError
from equipoise.integrations.megatron import attach, sharded_state_dict

one_rank = models.one_rank
PAGE = ROOT / "docs" / "how-to" / "megatron.md"
EXAMPLE = ROOT / "examples" / "megatron_loop.py"


@pytest.fixture(autouse=True)
def no_scale(one_rank):
    models.forget_scale()


def train(strategy, steps, batches_of, **options):
    """MaxVio of each step of Megatron's loop, with its distributed optimizer."""
    model = data_parallel(gpt(**options), use_distributed_optimizer=True)
    optimizer = optimizer_of(model, use_distributed_optimizer=True)
    balance = attach(model, strategy)
    max_violations = []
    for step in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(model, batches_of(step))
        is_applied, *_ = optimizer.step()
        balance.step(applied=is_applied)
        max_violations.append(balance.metrics()["maxvio_batch"])
    return sum(max_violations[-10:]) / 10


def test_maxvio_falls_in_a_run_of_fifty_steps(caplog):
    caplog.set_level(logging.ERROR)

    def batches_of(step):
        return micro_batches(*[(32,) * 8] * 2, seed=step % 5, length=32)

    none = train("none", 50, batches_of, max_length=32, moe_router_enable_expert_bias=False)
    with_bias = train("loss-free:rate=2e-2", 50, batches_of, max_length=32)
    with_loss = train("frozen+lbl:coefficient=1e-1", 50, batches_of, max_length=32)
    print(f"MaxVio of the last ten steps: {none:.2f} unbalanced, {with_bias:.2f} loss-free, {with_loss:.2f} lbl")
    assert with_bias < none / 3 and with_loss < none / 2


# ---- steps that are not applied, evaluation ----


def test_a_step_that_a_scaler_skips_moves_no_bias():
    model = data_parallel(gpt())
    balance = attach(model, f"loss-free:rate=1e-2+lbl:coefficient={COEFFICIENT}")
    optimizer = optimizer_of(model, fp16=True, initial_loss_scale=64.0, min_loss_scale=1.0)
    assert isinstance(optimizer.chained_optimizers[0].grad_scaler, DynamicGradScaler)
    biases = [balance.biases]
    for weight in (1.0, float("inf"), float("nan"), 1.0):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(model, micro_batches(*UNEVEN), weight=weight)
        is_applied, *_ = optimizer.step()
        balance.step(applied=is_applied)
        biases.append(balance.biases)
        have_moved = any(not torch.equal(biases[-1][name], biases[-2][name]) for name in biases[-1])
        assert is_applied is have_moved is (weight == 1.0)
    assert balance.num_windows == 4


@pytest.mark.parametrize("without_gradients", [True, False])
def test_an_evaluation_is_not_counted(without_gradients):
    model = data_parallel(gpt())
    balance = attach(model, "loss-free+lbl")
    for _ in range(2):
        model.eval()
        with torch.set_grad_enabled(not without_gradients):
            forward_backward(model, micro_batches(*UNEVEN, UNEVEN[0]), forward_only=True)
        assert not balance.has_open_window
        model.train()
        model.zero_grad_buffer()
        forward_backward(model, micro_batches(*UNEVEN), weight=0.0)
        balance.step()
        assert balance.metrics()["tokens"] == 31
    model.eval()
    with torch.no_grad(), balance.measuring() as load:
        forward_backward(model, micro_batches(*UNEVEN), forward_only=True)
    assert all(int(counts.sum()) == 31 * models.K for counts in load.values())


# ---- loops without Megatron's schedules ----


def test_a_loop_of_its_own_adds_the_loss_or_sets_the_scale():
    batches = micro_batches(*UNEVEN)
    reference = Reference()
    reference.forward(batches)
    loss = sum(reference.loss(n, "global_batch", range(n + 1)) for n in range(3)) / 3
    expected = reference.gradients(loss)
    strategy = f"frozen+lbl:coefficient={COEFFICIENT}"
    for adds_loss in (True, False):
        model = gpt()
        balance = attach(model, strategy)
        for batch in batches:
            output = 0.0 * model(**arguments(batch)).sum()
            if adds_loss:
                output = output + balance.loss()
            else:
                MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1 / 3]))
            (output / 3).backward()
        assert distance(gradients(model), expected) < 1e-6
        models.forget_scale()
    model = gpt()
    attach(model, strategy)
    with pytest.raises(EquipoiseError, match="add balance.loss"):
        (0.0 * model(**arguments(batches[0])).sum()).backward()


def test_one_chunk_in_a_list_is_the_model():
    model = data_parallel(gpt())
    balance = attach([model], f"frozen+lbl:coefficient={COEFFICIENT}")
    assert list(balance.biases) == [f"decoder.layers.{n}.mlp.router" for n in range(models.LAYERS)]


def test_attaching_before_the_groups_are_made_is_refused():
    model = gpt()
    models.stop()
    try:
        with pytest.raises(EquipoiseError, match=r"must run after .*initialize_model_parallel\(\)"):
            attach(model, "loss-free")
    finally:
        models.start()


def test_a_model_without_experts_is_refused():
    with pytest.raises(EquipoiseError, match="must hold a router"):
        attach(torch.nn.Linear(2, 2), "loss-free")


# ---- checkpoints ----


def run(model, balance, steps):
    for step in steps:
        model.zero_grad_buffer()
        forward_backward(model, micro_batches(*UNEVEN, seed=step))
        balance.step()


@pytest.mark.parametrize("how", ["torch.save", "dist_checkpointing"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(how, tmp_path):
    strategy = "loss-free:rate=1e-2,rule=momentum,schedule=linear,zero_from=8"
    whole = gpt()
    balance = attach(whole, strategy)
    wrapped = data_parallel(whole)
    run(wrapped, balance, range(2))
    if how == "torch.save":
        torch.save({"model": whole.state_dict(), "equipoise": balance.state_dict()}, tmp_path / "state.pt")
    else:
        state = {"model": whole.sharded_state_dict(), "equipoise": sharded_state_dict(balance)}
        dist_checkpointing.save(state, tmp_path)
    run(wrapped, balance, range(2, 4))

    resumed = gpt()
    again = attach(resumed, strategy)
    if how == "torch.save":
        state = torch.load(tmp_path / "state.pt")
    else:
        state = {"model": resumed.sharded_state_dict(), "equipoise": sharded_state_dict(again)}
        state = dist_checkpointing.load(state, tmp_path)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["equipoise"])
    run(data_parallel(resumed), again, range(2, 4))
    assert again.num_windows == balance.num_windows == 4
    for layer in balance.layers:
        assert torch.equal(again.biases[layer.name], balance.biases[layer.name])
        assert torch.equal(again.load[layer.name], balance.load[layer.name])


def test_the_model_alone_brings_its_biases_back():
    whole = gpt()
    balance = attach(whole, "loss-free:rate=1e-2")
    run(data_parallel(whole), balance, range(2))
    for attaches_first in (True, False):
        resumed = gpt()
        again = attach(resumed, "loss-free:rate=1e-2") if attaches_first else None
        resumed.load_state_dict(whole.state_dict())
        again = again or attach(resumed, "loss-free:rate=1e-2")
        assert all(torch.equal(again.biases[name], bias) and bias.any() for name, bias in balance.biases.items())


# ---- the page and the example ----


def test_the_blocks_of_the_page_run(tmp_path):
    wrapped = data_parallel(gpt())
    batches = [*micro_batches(*UNEVEN)] * 2

    def forward_step(data, model):
        batch = next(data)
        return model(**arguments(batch)), lambda output: ((output * ~batch.is_padding).sum(), {})

    names = {
        "model": wrapped,
        "optimizer": optimizer_of(wrapped),
        "forward_backward": get_forward_backward_func(),
        "forward_step": forward_step,
        "data_iterator": iter(batches),
        "num_steps": 2,
        "num_microbatches": 3,
        "seq_length": models.LENGTH,
        "micro_batch_size": 2,
        "micro_batches": batches[:3],
        "mean_loss": lambda model, batch: model(**arguments(batch)).mean(),
        "folder": str(tmp_path),
    }
    programs = [block for block in blocks(PAGE) if block.language == "py"]
    assert len(programs) == 3
    for block in programs:
        exec(compile("\n" * (block.line - 1) + block.code, str(PAGE), "exec"), names)
    assert names["balance"].num_windows == 3
    assert names["balance"].metrics()["tokens"] == 31


RUN = """
import runpy, sys

from equipoise_lab.conformance.drivers import megatron_on_cpu

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_example_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(option in shown for option in ("--steps", "--strategy", "--smoke", "Takes\n"))


def test_the_example_runs():
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "MASTER_PORT": str(29600 + os.getpid() % 300)}
    command = [sys.executable, "-c", RUN, str(EXAMPLE), "--smoke"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout.rsplit("\nstrategy ", 1)[1].splitlines()[1:]
    assert [row.split()[0] for row in table] == ["none", "loss-free:rate=0.25"]
