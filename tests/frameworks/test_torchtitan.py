"""torchtitan: its own Trainer, balanced, against plain loops and float64 autograd over the whole model."""

import logging
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
import torchtitan_on_cpu as titan
import torchtitan_runs
import tyro
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.components.validate import Validator
from torchtitan_reference import counts_by_hand
from torchtitan_runs import (
    Case,
    by_router,
    config_of,
    distance,
    expected,
    free_port,
    merged,
    on_ranks,
    run_here,
    started,
)

import equipoise
from equipoise.integrations.torchtitan import balanced

SEQUENCE = "loss-free:rate=0.02,rule=sign+lbl:scope=sequence,coefficient=1"
LOSS_FREE = "loss-free:rate=0.02,rule=sign"


def _on(num_ranks=2, **options):
    """Options of the config: those of parallelism, and of ``Case``."""
    fields = {name: options.pop(name) for name in list(options) if name in Case._fields}
    options.setdefault("spmd_backend", "partial_dtensor")
    return Case(num_ranks=num_ranks, parallelism=tuple(options.items()), **fields)


def _assert_as_expected(case, ran, ahead=lambda layer: 0, reference=None):
    reference = case if reference is None else reference
    steps, biases = expected(reference, ran.initial, ahead)
    for given, step, bias in zip(ran.steps, steps, biases, strict=True):
        load = by_router(given["load"])
        assert load.keys() == step.load.keys()
        for name, counts in load.items():
            assert torch.equal(counts, step.load[name]), name
            torch.testing.assert_close(by_router(given["biases"])[name].double(), bias[name], rtol=0, atol=1e-8)
        if "lbl" in case.strategy:
            gradients = {name: given["gradients"].get(name, torch.zeros_like(g)) for name, g in step.gradients.items()}
            assert distance(gradients, step.gradients, "router") < 1e-6
            assert distance(gradients, step.gradients) < 1e-6
    assert any(bias.any() for bias in biases[-1].values()) or "loss-free" not in case.strategy


# ---- one process ----

ONE_PROCESS = {
    "packed, padded, accumulated": Case(),
    "beside the model's loss": Case(with_loss=True),
    "loss over sequences": Case(strategy=SEQUENCE),
    "multi-token prediction": Case(num_mtp=2),
    "qwen3": Case(family="qwen3"),
    "sigmoid scores": Case(score="sigmoid"),
    "full checkpointing": Case(checkpointing="full"),
    "selective checkpointing": Case(checkpointing="selective"),
    "compiled": Case(compiled=True),
    "compiled, selective checkpointing": Case(compiled=True, checkpointing="selective", num_layers=2),
}


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_counts_biases_and_gradients(name):
    case = ONE_PROCESS[name]
    _assert_as_expected(case, run_here(case))


def test_a_case_of_this_file_holds_what_it_should():
    """Each step has prompts, padding, documents and micro-batches of unequal size, and biases change the choice."""
    rows = [titan.rows_of(seed, 2, kind) for seed, kind in ((1000, "packed"), (2000, "padded"), (3000, "full"))]
    counted = [sum(map(sum, counts_by_hand(labels, inputs["positions"]))) for inputs, labels in rows]
    labelled = [int((labels != -100).sum()) for _, labels in rows]
    assert counted == [32, 21, 32] and labelled == [28, 17, 32]
    with_bias, without = (expected(Case(strategy=s), run_here(Case(steps=1)).initial)[0] for s in (LOSS_FREE, "none"))
    assert any(not torch.equal(with_bias[2].load[name], load) for name, load in without[2].load.items())


def test_the_reference_sees_a_wrong_weight():
    """A loss weighed by micro-batches instead of tokens is more than one per cent away."""
    case = Case(steps=1)
    ran = run_here(case)
    ((step,), _), ((other,), _) = (expected(c, ran.initial) for c in (case, case._replace(kinds=("full", "padded"))))
    assert distance(other.gradients, step.gradients, "router") > 1e-2


def test_the_routers_counts_are_those_of_their_choices_in_bfloat16(tmp_path):
    """With torchtitan's own experts and mixed precision, as people train: the choices are those that a hook sees."""
    case = Case(own_experts=True)
    config = config_of(case, tmp_path)
    config.training = replace(config.training, mixed_precision_param="bfloat16")
    with started(config, LOSS_FREE) as trainer, torchtitan_runs._replaced(case):
        router, choices = trainer.model_parts[0].layers["1"].moe.router, []
        router.register_forward_hook(lambda _, __, output: choices.append(output[1]))
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
        load = [0] * titan.EXPERTS
        for n, ids in enumerate(choices, 1):
            inputs, labels = titan.rows_of(1000 * n, 2, case.kinds[n % 3])
            for row, counted in zip(ids.tolist(), counts_by_hand(labels, inputs["positions"]), strict=True):
                for experts, counts in zip(row, counted, strict=True):
                    for expert in experts if counts else ():
                        load[expert] += 1
        assert len(choices) == 2 and trainer.balances[0].load["layers.1.moe.router"].tolist() == load


# ---- several ranks ----

PIPELINE = {"rows": 4, "accumulation": 1, "num_layers": 4, "pipeline_parallel_degree": 2}
TWO_RANKS = {
    "FSDP2, full checkpointing": _on(data_parallel=2, checkpointing="full", with_loss=True),
    "DDP": _on(data_parallel=2, data_parallel_replicate_degree=2, data_parallel_shard_degree=1),
    "FSDP2, multi-token prediction": _on(data_parallel=2, num_mtp=1),
    "tensor with sequence parallelism": _on(tensor_parallel_degree=2),
    "tensor parallelism": _on(tensor_parallel_degree=2, enable_sequence_parallel=False, strategy=SEQUENCE),
    "tensor parallelism, full_dtensor": _on(tensor_parallel_degree=2, spmd_backend="full_dtensor"),
    "expert parallelism": _on(data_parallel=2, expert_parallel_degree=2),
    "expert and tensor parallelism": _on(
        expert_parallel_degree=2, tensor_parallel_degree=2, checkpointing="selective", with_loss=True
    ),
    "context parallelism": _on(context_parallel_degree=2, has_context=False, with_loss=True),
    "pipeline, GPipe": _on(**PIPELINE, pipeline_parallel_schedule="GPipe", with_loss=True),
    "pipeline, 1F1B": _on(**PIPELINE),
    "pipeline, Interleaved1F1B": _on(
        **PIPELINE | {"num_layers": 6}, pipeline_parallel_schedule="Interleaved1F1B", strategy=SEQUENCE
    ),
    "pipeline, zero bubble": _on(
        **PIPELINE | {"num_layers": 6},
        pipeline_parallel_schedule="InterleavedZeroBubble",
        strategy=LOSS_FREE,
        with_loss=True,
    ),
}
FOUR_RANKS = {
    "pipeline and data parallelism": _on(
        4, **PIPELINE | {"rows": 2}, data_parallel=2, pipeline_parallel_schedule="GPipe"
    ),
    "data, expert and tensor parallelism": _on(4, data_parallel=2, expert_parallel_degree=4, tensor_parallel_degree=2),
    "context, expert and tensor parallelism": _on(
        4, context_parallel_degree=2, expert_parallel_degree=2, tensor_parallel_degree=2, has_context=False
    ),
}
SLOW = {
    "tensor parallelism, compiled": _on(tensor_parallel_degree=2, compiled=True, num_layers=2, own_experts=True),
    "expert and tensor parallelism, compiled": _on(
        expert_parallel_degree=2, tensor_parallel_degree=2, compiled=True, num_layers=2, own_experts=True
    ),
    "FSDP2, compiled, selective checkpointing": _on(data_parallel=2, compiled=True, checkpointing="selective"),
}


@cache
def _on_ranks(num_ranks, slow=False):
    cases = SLOW if slow else TWO_RANKS if num_ranks == 2 else FOUR_RANKS
    by_rank = on_ranks(num_ranks, torchtitan_runs.run_all, list(cases.values()), [free_port() for _ in cases])
    for ran in by_rank:
        assert not isinstance(ran, str), ran
    return {name: [ran[n] for ran in by_rank] for n, name in enumerate(cases)}


@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_ranks_count_move_and_differentiate_as_one_process(name):
    case = (TWO_RANKS | FOUR_RANKS)[name]
    _assert_ranks_as_one_process(case, _on_ranks(case.num_ranks)[name])


@pytest.mark.skipif("EQUIPOISE_SLOW" not in os.environ, reason="two minutes: set EQUIPOISE_SLOW=1")
@pytest.mark.parametrize("name", SLOW)
def test_compiled_ranks_count_move_and_differentiate_as_one_process(name):
    _assert_ranks_as_one_process(SLOW[name], _on_ranks(2, slow=True)[name])


def _assert_ranks_as_one_process(case, ranks):
    options = dict(case.parallelism)
    if "pipeline_parallel_degree" not in options:
        for ran in ranks:
            for ours, first in zip(ran.steps, ranks[0].steps, strict=True):
                assert all(torch.equal(load, first["load"][name]) for name, load in ours["load"].items())
                assert all(torch.equal(bias, first["biases"][name]) for name, bias in ours["biases"].items())
        _assert_as_expected(case, ranks[0])
        return
    reference = case._replace(accumulation=case.rows, rows=1)  # each row is a micro-batch of the pipeline
    schedule = options.get("pipeline_parallel_schedule", "1F1B")
    first_stage = by_router(ranks[0].steps[0]["load"])

    def ahead(layer):  # forwards that a stage has run beyond the micro-batch whose backward it runs
        return 99 if schedule == "GPipe" else int(layer in first_stage)

    _assert_as_expected(case, merged(ranks), ahead, reference)


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
        assert trainer.balances[0].metrics()["tokens"] == 53


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

    def config(steps):
        return _with_checkpoints(config_of(Case(steps=6, with_loss=True), tmp_path), tmp_path)

    def trained(steps):
        new = titan.trainer_config(tmp_path, kinds=("packed", "padded", "full"), steps=6, lr=1e-2, accumulation=2)
        with started(_with_checkpoints(new, tmp_path), strategy) as trainer:
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
    assert [metrics["balance/tokens"] for _, metrics in logged] == [53, 53, 64]
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
    for strategy in ("none", "loss-free:rate=3e-2", "lbl:scope=global_batch,coefficient=3e-2"):
        config = titan.trainer_config(
            tmp_path,
            model=titan.model_config(score="sigmoid" if "free" in strategy else "softmax", own_rate=None),
            steps=50,
            lr=3e-3,
            accumulation=4,
            loss=titan.CrossEntropyLoss.Config(),
        )
        with started(config, strategy) as trainer:
            seen = []
            trainer.optimizers.register_step_post_hook(
                lambda *_, seen=seen, b=trainer.balances[0]: seen.append(b.metrics()["maxvio_batch"])
            )
            trainer.train()
            maxvio[strategy] = (sum(seen[:5]) / 5, sum(seen[-5:]) / 5)
    logging.getLogger("equipoise").info(f"MaxVio by strategy, first and last five steps: {maxvio}")
    print(maxvio)
    none, loss_free, loss = (last for _, last in maxvio.values())
    assert loss_free < 0.7 * none and loss < 0.7 * none
