"""Which ranks hold different tokens: every parallelism gives what one process gives, and bad groups are refused."""

import re
from functools import cache

import groups_ranks
import pipeline_ranks
import pytest
import torch
from models import K
from ranks import distance, run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")
MICRO_BATCHES = {"hybrid_shards": 8, "split_sequences": 4, "tensor_parallel": 4, "expert_parallel": 8}


@cache
def _on_four_ranks():
    return run_on_ranks(4, groups_ranks.everything)


def _found(name):
    for found in _on_four_ranks():
        assert not isinstance(found, str), found
    return [found[name] for found in _on_four_ranks()]


@pytest.mark.parametrize("name", MICRO_BATCHES)
def test_every_rank_ends_with_the_counts_biases_and_gradient_of_one_process(name):
    model = groups_ranks.with_dense_layers() if name == "tensor_parallel" else None
    expected = groups_ranks.alone(range(MICRO_BATCHES[name]), model)
    assert expected["tokens"] == MICRO_BATCHES[name] * 2 * groups_ranks.LENGTH
    for found in _found(name):
        assert found["load"] == expected["load"] and found["tokens"] == expected["tokens"]
        for layer, bias in found["biases"].items():
            assert torch.equal(bias, expected["biases"][layer])
        assert distance(found["gradients"], expected["gradients"]) < 1e-6


def test_ranks_of_a_shuffled_mesh_agree_on_one_group():
    names = _found("shuffled")
    assert len(set(names)) == 1 and names[0].startswith("equipoise-")


def test_pooling_ranks_with_the_same_tokens_counts_them_twice():
    """Why ``group`` leaves tensor parallel ranks out."""
    once, twice = _found("tensor_parallel"), _found("tensor_parallel, counted twice")
    for single, double in zip(once, twice, strict=True):
        assert double["tokens"] == 2 * single["tokens"]


def test_stages_of_two_pipelines_pool_with_their_replicas_only():
    by_hand = pipeline_ranks.by_hand(groups_ranks.PIPELINE, pipelines=2)
    for rank, found in enumerate(_found("pipelines")):
        expected = by_hand[rank // 2]
        assert len(found["load"]) == rank // 2  # the first stage has no router
        for layer, load in found["load"].items():
            tokens = 2 * pipeline_ranks.MICRO_BATCHES * pipeline_ranks.ROWS * pipeline_ranks.LENGTH
            assert int(load.sum()) == K * tokens and torch.equal(load, expected["load"][layer])
            assert torch.equal(found["biases"][layer], expected["biases"][layer])
        assert distance(found["gradients"], expected["gradients"]) < 1e-6


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("strategies", "must attach the same strategy .* rank 0 of the group has loss-free .*rank 3 has .*rate=0.002"),
        ("unknown strategy", "on rank 3 of the group, UsageError: .*loss-fee"),
        ("models", r"to the same layers: rank 0 .*blocks.0.gate \[6\], blocks.1.gate \[6\], rank 3 has .* block.gate"),
        ("no model", "on rank 3 of the group, TypeError: model must be a torch.nn.Module: got str"),
        (
            "a stage without routers",
            "to the same layers: rank 0 of the group has .*blocks.0.gate.*, rank 3 has none on none",
        ),
        ("where", "on rank 3 of the group, EquipoiseError: where must choose at least one router"),
        ("biases", r"^EquipoiseError: biases must name the layers of this model: got x \[\(6,\)\]"),
        ("no such dimension", "^KeyError: .*cp.*dp.*tp"),
        ("no group", "^TypeError: group must be a process group or a DeviceMesh.*got str"),
    ],
)
def test_a_mistake_raises_the_same_error_on_every_rank(case, words):
    errors = [found[case] for found in _found("refused")]
    assert len(set(errors)) == 1, errors
    assert re.search(words, errors[0]), errors[0]


def test_a_group_of_others_is_refused_where_it_does_not_belong():
    said = [found["group of others"] for found in _found("refused")]
    assert all(text.startswith("went on") for text in said[:2])
    assert all("must be a member of the group" in text for text in said[2:])


def test_a_stage_without_routers_goes_on_among_its_like():
    assert {found["stages without routers"] for found in _found("refused")} == {
        "went on with Balance('none', 0 layers)"
    }
