"""torchtitan: its own update, checkpoints, evaluation, logs and refusals of a balanced Trainer."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import tyro
from frameworks import torchtitan_on_cpu as titan
from frameworks import torchtitan_runs
from frameworks.torchtitan_runs import Case, config_of, distance, free_port, on_ranks, started
from pages import ROOT, blocks
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.components.validate import Validator

import equipoise
from equipoise.integrations.torchtitan import balanced

LOSS_FREE = "loss-free:rate=0.02,rule=sign"
SEQUENCE = f"{LOSS_FREE}+lbl:scope=sequence,coefficient=1"


# ---- torchtitan's own balancing ----


def _biases(trainer):
    moe = {n: layer.moe for n, layer in trainer.model_parts[0].layers.items() if layer.moe_enabled}
    return {n: moe[n].expert_bias_E.clone() for n in moe}


def test_its_own_update_moves_nothing_beside_a_bias_of_ours(tmp_path):
    """Its hook is not registered. Where somebody registers it, it adds zero."""
    with started(config_of(Case(), tmp_path), LOSS_FREE) as trainer:
        assert not trainer.optimizers._optimizer_step_pre_hooks
        register_moe_load_balancing_hook(trainer.optimizers, trainer.model_parts, trainer.parallel_dims)
        (own_update,) = trainer.optimizers._optimizer_step_pre_hooks.values()
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
        before = _biases(trainer)
        assert all(bias.any() for bias in before.values())
        trainer.model_parts[0].layers["1"].moe.tokens_per_expert_E += torch.arange(titan.EXPERTS)
        own_update(trainer.optimizers)
        after = _biases(trainer)
        assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_loss_alone_takes_the_place_of_its_own_update(tmp_path):
    with started(config_of(Case(), tmp_path), "lbl:scope=global_batch,coefficient=1") as trainer:
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
        assert not any(bias.any() for bias in _biases(trainer).values())


def test_none_counts_and_leaves_its_own_update(tmp_path):
    with started(config_of(Case(), tmp_path), "none") as trainer:
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
        assert all(bias.any() for bias in _biases(trainer).values())
        assert trainer.balances[0].metrics()["tokens"] == 55


# ---- checkpoints, evaluation, logs ----


def _with_checkpoints(config, folder, **options):
    config.dump_folder = str(folder)
    config.checkpoint = CheckpointManager.Config(enable=True, interval=3, last_save_model_only=False, **options)
    return config


def _state(trainer):
    balance = trainer.balances[0].state_dict()
    return {
        **trainer.model_parts[0].state_dict(),
        **balance["biases"],
        **balance["load"],
        **balance["state"]["momentum"],
    }


def test_a_resumed_run_is_the_run_itself(tmp_path):
    """Weights, biases, momenta and the last load: a loss with pooling=previous goes by that."""
    strategy = "loss-free:rate=0.02,rule=momentum+lbl:scope=global_batch,coefficient=0.1,pooling=previous"

    def trained(steps):
        config = titan.trainer_config(tmp_path, kinds=("packed", "padded", "full"), steps=6, lr=1e-2, accumulation=2)
        with started(_with_checkpoints(config, tmp_path), strategy) as trainer:
            trainer.should_continue_training = lambda: trainer.step < steps
            trainer.train()
            return _state(trainer), trainer.balances[0].num_windows

    trained(3)
    resumed, windows = trained(6)
    assert windows == 6
    for folder in (tmp_path / "checkpoint").iterdir():
        folder.rename(tmp_path / f"before-{folder.name}")
    whole, _ = trained(6)
    assert any(whole[f"layers.{n}.moe.router"].any() for n in (1, 2))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_a_checkpoint_of_plain_torchtitan_is_resumed_without_a_state(tmp_path):
    """Its biases are the start. The name of the state is left out of what is loaded."""
    with started(_with_checkpoints(config_of(Case(steps=3), tmp_path), tmp_path)) as trainer:
        trainer.train()
        biases = _biases(trainer)
    config = _with_checkpoints(config_of(Case(steps=6), tmp_path), tmp_path, exclude_from_loading=["balance"])
    with started(config, LOSS_FREE) as trainer:
        trainer.checkpointer.load()
        assert trainer.step == 3 and trainer.balances[0].num_windows == 0
        for n, bias in biases.items():
            assert bias.any() and torch.equal(trainer.balances[0].biases[f"layers.{n}.moe.router"], bias)


def test_a_checkpoint_of_a_pipeline_is_resumed_without_one(tmp_path):
    stages = on_ranks(2, torchtitan_runs.save_in_a_pipeline, str(tmp_path))
    assert not any(isinstance(stage, str) for stage in stages), stages
    config = _with_checkpoints(config_of(Case(num_layers=4, steps=3), tmp_path), tmp_path)
    with started(config, "loss-free:rate=0.02,rule=momentum") as trainer:
        trainer.checkpointer.load()
        state = trainer.balances[0].state_dict()
        assert state["num_windows"] == 2
        for part in ("biases", "load"):
            saved = {name: value for stage in stages for name, value in stage[part].items()}
            assert len(saved) == 3 and all(torch.equal(state[part][name], value) for name, value in saved.items())
        momentum = {name: value for stage in stages for name, value in stage["state"]["momentum"].items()}
        assert all(value.any() and torch.equal(state["state"]["momentum"][n], value) for n, value in momentum.items())


def test_evaluation_is_not_counted(tmp_path):
    def config(folder, is_evaluated):
        new = config_of(Case(with_loss=True), folder)
        new.validator = Validator.Config(enable=is_evaluated, freq=1, steps=2, dataloader=titan.Data.Config())
        return new

    loads = []
    for is_evaluated in (False, True):
        with started(config(tmp_path, is_evaluated), LOSS_FREE) as trainer:
            trainer.train()
            loads.append((trainer.balances[0].load, trainer.balances[0].num_windows, trainer.balances[0].biases))
    (load, windows, biases), (evaluated_load, evaluated_windows, evaluated_biases) = loads
    assert windows == evaluated_windows == 3
    assert all(torch.equal(evaluated_load[name], load[name]) for name in load)
    assert all(torch.equal(evaluated_biases[name], biases[name]) for name in biases)


def test_a_chunked_loss_gives_the_same(tmp_path):
    gradients = []
    for loss in (titan.CrossEntropyLoss.Config(), ChunkedLossWrapper.Config(num_chunks=4)):
        config = config_of(Case(), tmp_path)
        config.loss = loss
        with started(config, "lbl:scope=global_batch,coefficient=1") as trainer:
            trainer.train_step(trainer.batch_generator(trainer.dataloader))
            gradients.append({name: p.grad.full_tensor() for name, p in trainer.model_parts[0].named_parameters()})
    assert distance(gradients[1], gradients[0]) < 1e-6


def test_metrics_are_logged_beside_those_of_torchtitan(tmp_path):
    config = config_of(Case(with_loss=True), tmp_path)
    config.metrics.log_freq = 1
    with started(config, LOSS_FREE) as trainer:
        logged = []
        trainer.metrics_processor.logger.log = lambda metrics, step: logged.append((step, metrics))
        trainer.train()
    assert [step for step, _ in logged] == [1, 2, 3]
    assert [metrics["balance/tokens"] for _, metrics in logged] == [55, 54, 64]
    assert all(metrics["balance/maxvio_batch"] > 0 for _, metrics in logged)


# ---- the config ----


def test_the_command_line_changes_the_strategy(tmp_path):
    config = balanced(titan.trainer_config(tmp_path), "loss-free")
    assert config.balance == "loss-free" and config.to_dict()["balance"] == "loss-free"
    changed = tyro.cli(type(config), args=["--balance", "quantile"], default=config)
    with started(changed) as trainer:
        assert trainer.balances[0].strategy == "quantile"


def test_objects_are_taken_as_they_are(tmp_path):
    class Mine(equipoise.LossFree.__mro__[1]):
        name = "mine"

        def prepare(self, layers):
            self._bias = layers.bias.clone()

        def bias(self):
            return self._bias

        def update(self, load, statistic=None, window=0):
            self._bias += 1

    with started(titan.trainer_config(tmp_path), Mine()) as trainer:
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
        assert all((bias == 1).all() for bias in _biases(trainer).values())


def test_cuda_graphs_are_switched_off_and_it_is_said(tmp_path, caplog):
    config = titan.trainer_config(tmp_path)
    config.training = replace(config.training, disable_cuda_graphs=False)
    new = balanced(config, "loss-free")
    assert new.training.disable_cuda_graphs and not config.training.disable_cuda_graphs
    assert "CUDA graph" in caplog.text


LBL = "lbl:scope=global_batch"
REFUSED = [
    (SEQUENCE, {"context_parallel_degree": 2}, {}, "whole rows"),
    (SEQUENCE, {"expert_parallel_degree": 2, "tensor_parallel_degree": 2}, {}, "whole rows"),
    (LBL, {"expert_parallel_degree": 2, "tensor_parallel_degree": 2}, {"num_mtp": 1}, "multi-token"),
    (LBL, {"context_parallel_degree": 2, "context_parallel_load_balancer": "ptrr"}, {}, "ptrr"),
    (LBL, {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"}, {}, "splits its backward"),
]


@pytest.mark.parametrize(("strategy", "parallelism", "model", "reason"), REFUSED)
def test_what_is_not_supported_is_refused(tmp_path, strategy, parallelism, model, reason):
    config = titan.trainer_config(tmp_path, model=titan.model_config(**model), **parallelism)
    with pytest.raises(equipoise.EquipoiseError, match=reason):
        balanced(config, strategy)
    balanced(config, "loss-free") if "ptrr" not in reason else None


def test_mistakes_are_refused(tmp_path):
    config = balanced(titan.trainer_config(tmp_path), "loss-free")
    with pytest.raises(equipoise.UsageError, match="once"):
        balanced(config, "loss-free")
    with pytest.raises(equipoise.UsageError, match="did you mean|Did you mean"):
        balanced(titan.trainer_config(tmp_path), "lossfree")
    with pytest.raises(TypeError, match=r"Trainer\.Config"):
        balanced(config.model_spec, "loss-free")
    config.debug.spmd_typechecking = True
    with pytest.raises(equipoise.EquipoiseError, match="spmd_typechecking"):
        config.build()


def test_a_router_that_ignores_its_scores_is_refused(tmp_path):
    config = titan.trainer_config(tmp_path)
    config.debug.moe_force_load_balance = True
    titan.prepare_process(port=free_port())
    with pytest.raises(equipoise.EquipoiseError, match="moe_force_load_balance"):
        balanced(config, "loss-free").build()
    torch.distributed.destroy_process_group()


# ---- training ----


def test_the_load_evens_out_in_fifty_steps(tmp_path):
    """By the Trainer's own loop; the baseline has no balancing at all."""
    maxvio = {}
    for strategy in ("none", "loss-free:rate=1e-2", "lbl:scope=global_batch,coefficient=3e-2"):
        config = titan.trainer_config(
            tmp_path,
            model=titan.model_config(own_rate=None),
            kinds=("zipf",),
            rows=4,
            accumulation=2,
            steps=50,
            lr=3e-3,
            loss=titan.CrossEntropyLoss.Config(),
        )
        with started(config, strategy) as trainer:
            seen = []
            trainer.optimizers.register_step_post_hook(
                lambda *_, seen=seen, b=trainer.balances[0]: seen.append(b.metrics()["maxvio_batch"])
            )
            trainer.train()
            maxvio[strategy] = (sum(seen[:5]) / 5, sum(seen[-5:]) / 5)
    none, loss_free, loss = (last for _, last in maxvio.values())
    assert none > 1 and loss_free < 0.65 * none and loss < 0.65 * none, maxvio


def test_alerts_see_every_step_whether_it_is_logged_or_not(tmp_path):
    """20 windows in a row make a stretch: with the logged steps alone it would take 20 times as long."""
    config = titan.trainer_config(tmp_path, steps=6)
    config.metrics.log_freq = 4
    with started(config, "loss-free") as trainer:
        seen, see = [], trainer._alerts.see

        def spy(load, loss, biases):
            alerts = see(load, loss, biases)
            seen.append((trainer._alerts.num_seen, loss is not None))
            return alerts

        trainer._alerts.see = spy
        trainer.train()
    assert seen == [(step, step in (1, 4)) for step in range(1, 7)]


# ---- the page and the example ----


def test_the_page_runs(tmp_path):
    namespace = {"config": titan.trainer_config(tmp_path, steps=2)}
    codes = [block.code for block in blocks(ROOT / "docs/how-to/torchtitan.md") if block.language == "py"]
    assert len(codes) == 3
    titan.prepare_process(port=free_port())
    for code in codes:
        exec(code, namespace)
    assert namespace["trainer"].balances[0].num_windows == 2
    torch.distributed.destroy_process_group()


def test_the_example_compares_with_no_balancing(tmp_path):
    command = [sys.executable, "-W", "ignore", ROOT / "examples/torchtitan_loop.py", "--smoke"]
    environment = {name: value for name, value in os.environ.items() if name not in titan.SET_BY_TORCHRUN}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    _, table = done.stdout.rsplit("\nstrategy ", 1)
    rows = [row.split() for row in table.strip().splitlines()[1:]]
    assert [row[0] for row in rows] == ["none", "lbl:scope=global_batch,coefficient=1e-2"]
    assert all(math.isfinite(float(figure)) for row in rows for figure in row[1:])
