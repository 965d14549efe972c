"""Models of which AutoEP has replaced the MoE layers, in an engine on two ranks: what one process gives in float64."""

import tempfile
from functools import cache

import pytest
import torch
from frameworks import deepspeed_autoep_ranks as autoep
from frameworks import float64
from frameworks.deepspeed_autoep_ranks import BIAS, CASES, EXPERTS, LAYERS, LOSS, RATE, make_model, micro_batches
from ranks import distance, run_on_ranks

ROUTERS = [f"model.layers.{layer}.mlp.router" for layer in range(LAYERS)]


@cache
def results():
    with tempfile.TemporaryDirectory() as folder:
        by_rank = run_on_ranks(2, autoep.everything, folder)
    for result in by_rank:
        assert not isinstance(result, str), result
    return by_rank


class Reference(float64.Reference):
    """The model of Transformers, whose routers have a bias of their own."""

    def __init__(self):
        def routers_of(model):
            return {name: model.get_submodule(name.replace("router", "gate")) for name in ROUTERS}

        super().__init__(make_model(), routers_of, EXPERTS, 2, "sigmoid")

    def steer(self, router, bias):
        router.e_score_correction_bias = bias

    def weight(self, part, rank, ranks):
        return 1 / len(rank) / len(ranks)


@cache
def expected():
    reference, data = Reference(), micro_batches(12)
    return [reference.window([data[first : first + 4][rank::2] for rank in (0, 1)], RATE, 10.0, "global_batch")
            for first in (0, 4, 8)]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"ZeRO{case[0]}-ep{case[1]}")
def test_autoep_on_two_ranks_gives_what_one_process_gives_in_float64(case):
    """Unequal ranks, accumulation, uneven padding. The error of the gradient is that of the balancing loss alone."""
    for result in results():
        with_loss, without = result[case][f"{BIAS}+{LOSS}"], result[case][BIAS]
        for ours, plain, window in zip(with_loss, without, expected(), strict=True):
            for name in ROUTERS:
                assert ours["load"][name].tolist() == window.loads[name].tolist() == plain["load"][name].tolist()
                torch.testing.assert_close(ours["biases"][name].double(), window.biases[name], rtol=0, atol=1e-6)
                gate = name.replace("router", "gate.weight")
                gap = ours["gradient"][f"{name}.gate"].double() - plain["gradient"][f"{name}.gate"].double()
                error = (gap - window.gradient[gate]).norm() / window.gradient[gate].norm()
                assert error <= 1e-6, error


def test_resuming_from_a_checkpoint_of_the_engine_equals_never_having_stopped():
    for result in results():
        whole, after = result["resumed"]
        assert distance(after["gradient"], whole["gradient"]) < 1e-6
        for name, bias in whole["biases"].items():
            assert torch.equal(after["biases"][name], bias) and bias.any()
            assert torch.equal(after["load"][name], whole["load"][name])


def test_a_training_of_fifty_steps_evens_the_load():
    for result in results():
        unbalanced, balanced = result["evened", True], result["evened", False]
        print(unbalanced, balanced)
        assert balanced < unbalanced / 2


def test_a_balance_of_the_layers_that_autoep_replaces_is_refused():
    for result in results():
        assert result["attached first"].startswith(
            "UsageError: the engine must hold the routers that were attached: model.layers.0.mlp.gate, "
            "model.layers.1.mlp.gate is not in it. AutoEP puts layers of its own in the place of a model's. Call attach"
        )
