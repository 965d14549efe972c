"""The summary of an audit, for counts made by hand."""

import json

import numpy as np
import pytest
import torch

from equipoise_lab.experts.result import AuditData, describe_imbalance, rank_load, summarise
from equipoise_lab.experts.watch import LayerCounts, RouterCounts


def _counts(load, together=None, by_token=None):
    load = torch.tensor(load)
    domains, experts = load.shape
    layer = LayerCounts(
        name="layer",
        num_experts=experts,
        k=1,
        load=load,
        score_sum=load.sum(-1) * 0.5,
        entropy=load.sum(-1) * 0.25,
        together=torch.diag(load.sum(0)) if together is None else torch.tensor(together),
        by_token=torch.zeros(2, experts, dtype=torch.int64) if by_token is None else torch.tensor(by_token),
    )
    names = tuple(f"d{n}" for n in range(domains))
    return RouterCounts(names, torch.tensor([7, 9]), [layer], load.sum(-1), torch.tensor([20, 20]))


def _summary(load, **options):
    data = AuditData(_counts(load, **options), nats={"d0": 3.0}, notes=("a note",))
    return summarise(data, lambda token_id: f"<{token_id}>")


def test_the_numbers_of_a_layer_by_hand():
    summary = _summary([[30, 10, 0, 0], [10, 30, 20, 0]], by_token=[[18, 2, 0, 0], [1, 9, 10, 0]])
    (layer,) = summary["layers"]
    assert layer["load"] == [40, 40, 20, 0] and layer["maxvio"] == pytest.approx(0.6)
    assert layer["maxvio_by_domain"] == pytest.approx([2.0, 1.0])
    assert (layer["dead_experts"], layer["starved_experts"]) == (1, 0)
    share = np.array([0.4, 0.4, 0.2])
    assert layer["effective_experts"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert layer["rank_load"] == {"2": pytest.approx(1.6), "4": pytest.approx(1.6)}
    assert layer["topk_score_sum"] == 0.5 and layer["router_entropy"] == 0.25
    assert [[token["text"] for token in expert] for expert in layer["typical_tokens"]] == [
        ["<7>"],
        ["<9>"],
        ["<9>"],
        [],
    ]
    assert summary["words"] == ["layer: 1 of 4 experts got no token"] and summary["complete"] is True
    assert summary["tokens"] == {"d0": 40, "d1": 60}
    json.dumps(summary, allow_nan=False)


def test_a_domain_without_a_token_is_left_out():
    summary = _summary([[30, 10], [0, 0], [5, 35]])
    assert summary["domains"] == ["d0", "d2"] and summary["layers"][0]["load_by_domain"] == [[30, 10], [5, 35]]
    assert summary["left_out"] == ["d1"]


def test_a_domain_of_few_tokens_is_marked_and_noted():
    summary = _summary([[1000, 1000], [999, 1000], [4000, 1000]])
    assert summary["few_tokens"] == ["d1"] and summary["left_out"] == []
    uncertain = "fewer than 2000 tokens of d1: the figures of such a domain are uncertain"
    assert summary["notes"] == ["a note", uncertain]
    assert _summary([[2000, 0]])["few_tokens"] == [] and _summary([[2000, 0]])["notes"] == ["a note"]


def test_a_router_that_splits_by_domain_carries_all_information_about_the_domain():
    summary = _summary((np.eye(4, dtype=int) * 500).tolist())
    assert summary["mean"]["domain_information_bits"] == pytest.approx(2.0, abs=0.01)
    assert summary["layers"][0]["domain_information_bits"]["share"] == pytest.approx(1.0, abs=0.005)
    assert summary["mean"]["domain_distance"] == 1.0 and summary["words"] == []


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ([[100, 100, 100, 100]], None),
        (
            [[400, 1, 1, 1]],
            "layer: collapsed: as uneven as 1.1 evenly used experts, 3 of 4 experts got less than",
        ),
        ([[100, 100, 100, 5]], "layer: 1 of 4 experts got less than a tenth of the mean load"),
    ],
)
def test_imbalance_is_described_in_words(load, words):
    description = describe_imbalance(_summary(load)["layers"][0])
    assert description is None if words is None else description.startswith(words)


def test_there_is_no_rank_load_if_ranks_do_not_divide_the_experts():
    assert rank_load(np.array([1, 2, 3]), 2) is None
    assert rank_load(np.array([4, 0, 0, 0]), 4) == 4.0
