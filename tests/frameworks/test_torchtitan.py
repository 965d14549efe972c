"""torchtitan: its own Trainer, balanced, against plain loops and float64 autograd over the whole model."""

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from frameworks import torchtitan_on_cpu as titan
from frameworks import torchtitan_runs
from frameworks.torchtitan_reference import counts_by_hand
from frameworks.torchtitan_runs import (
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

SEQUENCE = "loss-free:rate=0.02,rule=sign+lbl:scope=sequence,coefficient=1"
LOSS_FREE = "loss-free:rate=0.02,rule=sign"


def _on(num_ranks=2, steps=2, **options):
    """Options of the config: those of parallelism, and of ``Case``."""
    fields = {name: options.pop(name) for name in list(options) if name in Case._fields}
    options.setdefault("spmd_backend", "partial_dtensor")
    return Case(num_ranks=num_ranks, steps=steps, parallelism=tuple(options.items()), **fields)


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
    "compiled": Case(compiled=True, num_layers=2, steps=2),
    "compiled, selective checkpointing": Case(compiled=True, checkpointing="selective", num_layers=2, steps=2),
}


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_counts_biases_and_gradients(name):
    case = ONE_PROCESS[name]
    _assert_as_expected(case, run_here(case))


def test_a_case_of_this_file_holds_what_it_should():
    """Prompts, padding, documents and micro-batches of unequal size; and biases change the choice."""
    rows = [titan.rows_of(1000 * n, 2, kind) for n, kind in enumerate(("packed", "padded", "full"), 1)]
    counted = [sum(map(sum, counts_by_hand(labels, inputs["positions"]))) for inputs, labels in rows]
    labelled = [int((labels != -100).sum()) for _, labels in rows]
    assert counted == [32, 21, 32] and labelled == [28, 17, 32]
    initial = run_here(Case(steps=1)).initial
    (*_, with_bias), (*_, without) = (expected(Case(strategy=s), initial)[0] for s in (LOSS_FREE, "none"))
    assert any(not torch.equal(with_bias.load[name], load) for name, load in without.load.items())


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
SLOW = FOUR_RANKS | {
    "tensor parallelism, compiled": _on(tensor_parallel_degree=2, compiled=True, num_layers=2, own_experts=True),
    "expert and tensor parallelism, compiled": _on(
        expert_parallel_degree=2, tensor_parallel_degree=2, compiled=True, num_layers=2, own_experts=True
    ),
    "FSDP2, compiled, selective checkpointing": _on(data_parallel=2, compiled=True, checkpointing="selective"),
}


@cache
def _on_ranks(names, cases):
    """All of them in the same processes, one after the other: to start these takes longer than to train."""
    by_rank = on_ranks(cases[0].num_ranks, torchtitan_runs.run_all, cases, [free_port() for _ in cases])
    for ran in by_rank:
        assert not isinstance(ran, str), ran
    return {name: [ran[n] for ran in by_rank] for n, name in enumerate(names)}


@pytest.mark.parametrize("name", TWO_RANKS)
def test_ranks_count_move_and_differentiate_as_one_process(name):
    ranks = _on_ranks(tuple(TWO_RANKS), tuple(TWO_RANKS.values()))[name]
    _assert_ranks_as_one_process(TWO_RANKS[name], ranks)


@pytest.mark.skipif("EQUIPOISE_SLOW" not in os.environ, reason="three minutes: set EQUIPOISE_SLOW=1")
@pytest.mark.parametrize("name", SLOW)
def test_more_ranks_and_compiled_ones_do_so_too(name):
    _assert_ranks_as_one_process(SLOW[name], _on_ranks((name,), (SLOW[name],))[name])


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
