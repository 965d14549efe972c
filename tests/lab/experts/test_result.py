"""What an audit says, on counts whose numbers are known."""

import json

import numpy as np
import pytest
import torch

from equipoise_lab.experts.result import Audited, rank_load, summarise, verdict
from equipoise_lab.experts.watch import LayerCounts, Watched


def _watched(load, together=None, by_token=None):
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
    return Watched(names, torch.tensor([7, 9]), [layer], load.sum(-1), torch.tensor([20, 20]))


def _said(load, **more):
    return summarise(Audited(_watched(load, **more), {"d0": 3.0}, ("a note",)), lambda token_id: f"<{token_id}>")


def test_the_numbers_of_a_layer_by_hand():
    found = _said([[30, 10, 0, 0], [10, 30, 20, 0]], by_token=[[18, 2, 0, 0], [1, 9, 10, 0]])
    (layer,) = found["layers"]
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
    assert found["words"] == ["layer: 1 of 4 experts got no token"] and found["complete"] is True
    assert found["tokens"] == {"d0": 40, "d1": 60}
    json.dumps(found, allow_nan=False)


def test_a_domain_without_a_token_is_left_out():
    found = _said([[30, 10], [0, 0], [5, 35]])
    assert found["domains"] == ["d0", "d2"] and found["layers"][0]["load_by_domain"] == [[30, 10], [5, 35]]
    assert found["left_out"] == ["d1"]


def test_a_domain_of_few_tokens_is_marked_and_said():
    found = _said([[1000, 1000], [999, 1000], [4000, 1000]])
    assert found["few_tokens"] == ["d1"] and found["left_out"] == []
    uncertain = "fewer than 2000 tokens of d1: what is said of such a domain is uncertain"
    assert found["notes"] == ["a note", uncertain]
    assert _said([[2000, 0]])["few_tokens"] == [] and _said([[2000, 0]])["notes"] == ["a note"]


def test_a_router_that_splits_exactly_by_domain_tells_the_whole_entropy_of_domains():
    found = _said((np.eye(4, dtype=int) * 500).tolist())
    assert found["mean"]["domain_information_bits"] == pytest.approx(2.0, abs=0.01)
    assert found["layers"][0]["domain_information_bits"]["share"] == pytest.approx(1.0, abs=0.005)
    assert found["mean"]["domain_distance"] == 1.0 and found["words"] == []


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ([[100, 100, 100, 100]], None),
        (
            [[400, 1, 1, 1]],
            "layer: collapsed: as uneven as 1.1 experts that are used alike, 3 of 4 experts got less than",
        ),
        ([[100, 100, 100, 5]], "layer: 1 of 4 experts got less than a tenth of the mean load"),
    ],
)
def test_what_is_wrong_is_said_in_words(load, words):
    found = verdict(_said(load)["layers"][0])
    assert found is None if words is None else found.startswith(words)


def test_ranks_that_do_not_divide_the_experts_have_no_load():
    assert rank_load(np.array([1, 2, 3]), 2) is None
    assert rank_load(np.array([4, 0, 0, 0]), 4) == 4.0
