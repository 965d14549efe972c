"""The right answers of the suite: by hand, and by differences of the loss."""

import math
from dataclasses import replace

import pytest
import torch

from equipoise_lab.conformance import Batch, Layer, reference
from equipoise_lab.conformance.scenarios.scenario import rows_of, window


def _batch(*tokens: list[float]) -> Batch:
    return Batch(torch.tensor(tokens).reshape(1, 1, len(tokens), -1))


def test_loss_by_hand():
    # Scores of the tokens: 3/4, 1/4 and 1/4, 3/4. Both choose one expert each: f = 1/2, 1/2; P = 1/2, 1/2.
    layer, high = Layer(experts=2, k=1, loss="micro_batch"), math.log(3)
    assert reference.loss(_batch([high, 0], [0, high]), layer) == pytest.approx(1)
    # Both tokens choose the first: f = 1, 0; P = 3/4, 1/4. The loss is 2 * 3/4.
    assert reference.loss(_batch([high, 0], [high, 0]), layer) == pytest.approx(1.5)


def test_gradient_by_hand():
    # One token, f = (1, 0), s = (3/4, 1/4): d(2 s_1)/dz = 2 s_1 (1 - s_1), -2 s_1 s_2 = 3/8, -3/8; times the token.
    layer, high = Layer(experts=2, k=1, loss="micro_batch"), math.log(3)
    (gradient,) = reference.loss_gradients([[_batch([high, 0])]], layer, weighs="tokens")
    assert torch.allclose(gradient, torch.tensor([[3 / 8 * high, 0], [-3 / 8 * high, 0]], dtype=torch.float64))


def test_counts_and_update_by_hand():
    layer = Layer(experts=3, k=1)
    batch = replace(_batch([1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]), mask=torch.tensor([[True, True, True, False]]))
    assert reference.counts([[batch]], layer) == [[2, 1, 0]]
    assert reference.moved([0.5, 0.5, 0.5], [2, 1, 0], 0.25) == [0.25, 0.5, 0.75]


def test_groups_by_hand():
    # Sums of the two best of each group: 0.9 + 0.1 and 0.6 + 0.6. The second wins, without the best expert.
    layer = Layer(experts=4, k=2, score_function="sigmoid", groups=(2, 1))
    logits = [math.log(p / (1 - p)) for p in (0.9, 0.1, 0.6, 0.6)]
    assert sorted(reference.chosen(logits, layer, [0, 0, 0, 0])) == [2, 3]
    assert sorted(reference.chosen(logits, layer, [0.3, 0, 0, 0])) == [0, 1]


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_the_gradient_is_the_slope_of_the_loss(function, scope):
    """f is a constant: the choice stays the same under a small step."""
    layer = Layer(experts=4, k=2, score_function=function, loss=scope)
    batch = rows_of(5, 3, of=5, seed=1, experts=4)
    (gradient,) = reference.loss_gradients([[batch]], layer, weighs="tokens")
    step = 1e-5
    for expert, column in ((0, 1), (2, 3), (3, 0)):
        values = []
        for sign in (1, -1):
            gate = torch.eye(4, dtype=torch.float64)
            gate[expert, column] += sign * step
            values.append(reference.loss(replace(batch, logits=batch.logits.double() @ gate.T), layer))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[expert, column]), rel=1e-5)


def test_a_global_batch_on_two_ranks_is_one_of_all_rows():
    layer = Layer(loss="global_batch")
    ranks = [[rows_of(6, of=6, seed=2)], [rows_of(6, of=6, seed=3)]]
    whole = Batch(torch.cat([rank[0].logits for rank in ranks], 1))
    for weighs in ("tokens", "micro_batches"):
        (pooled,) = reference.loss_gradients(ranks, layer, weighs=weighs)
        (one,) = reference.loss_gradients([[whole]], replace(layer, loss="micro_batch"), weighs=weighs)
        assert torch.allclose(pooled, one, rtol=1e-12)


def test_weights_of_uneven_micro_batches_are_two_conventions():
    layer, batches = Layer(loss="micro_batch"), window([6, 2], of=6)
    by_tokens, equal = (reference.loss_gradients([batches], layer, weighs=w)[0] for w in ("tokens", "micro_batches"))
    alone = [reference.loss_gradients([[batch]], layer, weighs="tokens")[0] for batch in batches]
    assert torch.allclose(by_tokens, (6 * alone[0] + 2 * alone[1]) / 8, rtol=1e-12)
    assert torch.allclose(equal, (alone[0] + alone[1]) / 2, rtol=1e-12)
