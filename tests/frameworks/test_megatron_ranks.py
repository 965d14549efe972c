"""Megatron-Core on two gloo ranks, against one float64 model that has the micro-batches of all."""

from typing import Any

import pytest
import ranks
import torch
from frameworks import megatron_models as models
from frameworks import megatron_ranks
from frameworks.megatron_models import EXPERTS, LAYERS, Reference, distance
from frameworks.megatron_ranks import RATE, STEPS, batches_of

ranks.PRELOADED.append("frameworks.megatron_ranks")
pytestmark = pytest.mark.usefixtures("one_rank")
one_rank = models.one_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def by_rank(folder):
    """What each rank returned, by the name of the run."""
    return _by_name(ranks.run_on_ranks(2, megatron_ranks.two, folder))


@pytest.fixture(scope="module")
def by_rank_of_four():
    return _by_name(ranks.run_on_ranks(4, megatron_ranks.four))


def _by_name(results: list[Any]) -> Any:
    for result in results:
        assert not isinstance(result, str), result

    def of(name: str) -> list[Any]:
        for result in results:
            assert not (isinstance(result[name], str) and "Traceback" in result[name]), result[name]
        return [result[name] for result in results]

    return of


# By name: the scope, the number of data parallel ranks, options of the model.
DATA, PER_TOKEN = 2, {"calculate_per_token_loss": True}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "data global_batch": ("global_batch", DATA, {}),
    "data micro_batch": ("micro_batch", DATA, {}),
    "data sequence": ("sequence", DATA, {}),
    "data per token": ("global_batch", DATA, PER_TOKEN),
    "expert": ("global_batch", DATA, {}),
    "tensor": ("global_batch", 1, {}),
    "tensor per token": ("global_batch", 1, PER_TOKEN),
    "context": ("global_batch", 1, {"has_attention": False}),
    "context per token": ("global_batch", 1, {"has_attention": False, **PER_TOKEN}),
    "pipeline": ("global_batch", 1, {}),
    "pipeline sequence": ("sequence", 1, {}),
    "interleaved": ("micro_batch", 1, {"num_layers": 2 * LAYERS}),
}
CASES_OF_FOUR: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tensor and data": ("global_batch", DATA, {}),
    "pipeline and expert": ("global_batch", DATA, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_model_gives(name, by_rank):
    check(name, by_rank(name), *CASES[name])


@pytest.mark.parametrize("name", CASES_OF_FOUR)
def test_four_ranks_give_what_one_model_gives(name, by_rank_of_four):
    check(name, by_rank_of_four(name), *CASES_OF_FOUR[name])


def check(name: str, of_ranks: list[Any], scope: str, places: int, options: dict[str, Any]) -> None:
    num = len(megatron_ranks.LENGTHS[0])
    biases = {f"decoder.layers.{n}.mlp.router": torch.zeros(EXPERTS) for n in range(options.get("num_layers", LAYERS))}
    for step in range(STEPS):
        reference = Reference(biases, **options)
        batches = [batches_of(place, step)[m] for m in range(num) for place in range(places)]
        reference.forward(batches)
        whole = reference.gradients(_loss(reference, name, scope, places, "per token" in name, of_ranks))
        after = models.moved(biases, reference.loads(), RATE)
        for rank in of_ranks:
            found, load, moved, metrics = rank["steps"][step]
            expected = {key: value for key, value in whole.items() if key.removesuffix(".weight") in load}
            assert distance(found, expected) < 1e-6
            assert list(load) == list(moved) == rank["names"]
            for layer, counts in load.items():
                assert counts.tolist() == reference.loads()[layer].tolist()
                assert (moved[layer].double() - after[layer]).abs().max() < 1e-8
            assert metrics["tokens"] == sum(reference.num_tokens(n) for n in range(len(batches)))
        biases = after
    named = {layer for rank in of_ranks for layer in rank["names"]}
    assert named == set(biases)


def _loss(reference: Reference, name: str, scope: str, places: int, per_token: bool, of_ranks: Any) -> torch.Tensor:
    """In a plain loop a backward knows the micro-batches up to its own, of all data parallel ranks.

    In 1F1B the first of two stages runs two forwards before its first backward.
    """
    num = len(reference.routed)
    total, loss = sum(reference.num_tokens(n) for n in range(num)), torch.zeros((), dtype=torch.float64)
    for n in range(num):
        knows: Any = range(places * (n // places + 1))
        if name.startswith("pipeline"):
            first = set(of_ranks[0]["names"])
            knows = {layer: range(num) if layer in first else knows for rank in of_ranks for layer in rank["names"]}
        weight = reference.num_tokens(n) / total if per_token else 1 / num
        loss = loss + weight * reference.loss(n, scope, knows)
    return loss


def test_a_stage_of_dense_layers_has_nothing_to_balance(by_rank):
    first, second = by_rank("dense first stage")
    assert first["names"] == [] and second["names"] == ["decoder.layers.1.mlp.router"]
    assert all(metrics == {} for *_, metrics in first["steps"])
    for gradient, load, biases, metrics in second["steps"]:
        assert metrics["tokens"] == 24
        assert all(value.any() for found in (gradient, load, biases) for value in found.values())


def test_a_loss_of_each_sequence_is_refused_where_ranks_have_parts(by_rank):
    for message in by_rank("tensor sequence"):
        assert "2 tensor and context parallel ranks hold a part of each" in message


def test_a_step_that_one_rank_cannot_apply_moves_nothing_anywhere(by_rank):
    first, second = by_rank("distributed optimizer")
    for step, (one, other) in enumerate(zip(first["steps"], second["steps"], strict=True)):
        is_applied, load, biases, weights = one
        assert is_applied is (step != 2) and other[0] is is_applied
        before = {n: torch.zeros(EXPERTS) for n in load} if step == 0 else first["steps"][step - 1][2]
        expected = models.moved(before, load, RATE) if is_applied else before
        for name, bias in biases.items():
            assert torch.equal(bias, other[2][name]) and torch.equal(load[name], other[1][name])
            assert (bias.double() - expected[name]).abs().max() < 1e-8
        assert all(torch.equal(weight, other[3][name]) for name, weight in weights.items())
    assert not first["own update"] and not second["own update"]


def test_the_stages_of_a_pipeline_share_a_checkpoint(by_rank):
    states = [saved for saved, _ in by_rank("saved stages")]
    assert [list(state["biases"]) for state in states] == [[f"decoder.layers.{n}.mlp.router"] for n in range(2)]
    for saved, loaded in by_rank("saved stages"):
        assert saved["num_windows"] == loaded["num_windows"] == 1
        for part in ("biases", "load"):
            for name, value in saved[part].items():
                assert torch.equal(loaded[part][name], value) and value.any()
        assert saved["state"] and all(
            torch.equal(loaded["state"][key][name], value)
            for key, values in saved["state"].items()
            for name, value in values.items()
        )
