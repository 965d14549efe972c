"""The load-balancing loss in one process and one micro-batch."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from equipoise_lab.conformance import reference
from equipoise_lab.conformance.driver import Batch, Driver, Layer
from equipoise_lab.conformance.measure import Measurement, compare_gradients, compare_value, shown, worst
from equipoise_lab.conformance.scenarios.scenario import logits, rows_of, scenario

PLAIN = Layer(loss="micro_batch")
VALUE, GRADIENT = "a balancing loss whose value is shown", "a gradient of a balancing loss"


def even_logits(level: float = 0.0, slope: float = 1.0) -> Tensor:
    """16 tokens, in 2 rows, that fill 8 experts evenly: token t prefers the experts t and t + 1, modulo 8."""
    tokens = torch.full((16, 8), level)
    for token in range(16):
        tokens[token, token % 8] += 2 * slope
        tokens[token, (token + 1) % 8] += slope
    return tokens.reshape(1, 2, 8, 8)


def _value(framework: type[Driver], layer: Layer, batch: Batch, right: float | None = None) -> Measurement:
    result = framework(layer).train_step([batch])
    return compare_value(
        shown(result.loss, VALUE), reference.loss(batch, framework.as_defined(layer)) if right is None else right
    )


def _gradient(framework: type[Driver], layer: Layer, batch: Batch) -> Measurement:
    result = framework(layer).train_step([batch])
    return compare_gradients(shown(result.gradients, GRADIENT), [[batch]], framework.as_defined(layer))


@scenario(13, 16, why="All experts have f = 1/8 and P = 1/8, so E sum f P is 1. Each framework's unit is divided out.")
def loss_at_balance(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss if the load is even?"""
    return _value(framework, PLAIN, Batch(even_logits()), 1.0)


@scenario(13, 20, why="Two experts have f = 1/2 each, so the loss is 4 (P_1 + P_2). P comes from the scores alone.")
def loss_at_collapse(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss if all tokens go to the same two experts?"""
    towards = torch.tensor([3.0, 2.0] + [0.0] * 6)
    return _value(framework, PLAIN, Batch(0.1 * logits(2, 8, 1) + towards))


@scenario(8, 19, 20, why="f counts both choices of a token, and P is the mean of all scores. f is a constant.")
def loss_gradient(framework: type[Driver], rank: int) -> Measurement:
    """What gradient does the loss give the gate, softmax, two experts a token?"""
    return _gradient(framework, PLAIN, rows_of(8, 8, of=8, seed=2))


@scenario(8, 19, why="With one expert a token, f is the share of tokens. The formula is the same.")
def loss_gradient_top_1(framework: type[Driver], rank: int) -> Measurement:
    """What gradient does the loss give the gate with one expert a token?"""
    return _gradient(framework, replace(PLAIN, k=1), rows_of(8, 8, of=8, seed=3))


@scenario(8, 19, 24, why="Sigmoid scores are divided by their sum before P is taken. DeepSeek-V3, Eq. 17 to 20.")
def loss_gradient_sigmoid(framework: type[Driver], rank: int) -> Measurement:
    """What gradient does the loss give the gate under a sigmoid?"""
    return _gradient(framework, replace(PLAIN, score_function="sigmoid"), rows_of(8, 8, of=8, seed=4))


@scenario(
    24, why="P is a share, whatever the weights of the experts are divided by. At even load it is 1/8, the loss 1."
)
def loss_sigmoid_without_normalised_weights(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss at even load under a sigmoid, if weights of chosen experts are not normalised?"""
    layer = replace(PLAIN, score_function="sigmoid", normalises_weights=False)
    return _value(framework, layer, Batch(even_logits()), 1.0)


@scenario(
    24, why="Scores of 1e-22 are in the range of float32, and P is their share. So the loss at even load stays 1."
)
def loss_sigmoid_far_from_zero(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss at even load, if all sigmoid logits lie near -50?"""
    return _value(framework, replace(PLAIN, score_function="sigmoid"), Batch(even_logits(-50.0)), 1.0)


@scenario(14, why="Each layer has its own f and P, and layers are summed. Each uses half of the experts: about 2. "
          "Pooled over layers before the product, two opposite halves look even.")  # fmt: skip
def loss_of_two_layers(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss of two layers that collapse onto opposite experts?"""
    layer = replace(PLAIN, number=2)
    towards = torch.tensor([[6.0] * 4 + [-6.0] * 4, [-6.0] * 4 + [6.0] * 4]).reshape(2, 1, 1, 8)
    return _value(framework, layer, Batch(logits(2, 8, 5, number=2) + towards))


@scenario(42, why="Padding is not text: neither f nor P counts it. The gradient is that of the tokens alone.")
def loss_with_padding(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has a micro-batch whose second row is half padding?"""
    return _gradient(framework, PLAIN, rows_of(8, 4, of=8, seed=6))


@scenario(42, why="Padding is not text: neither f nor P counts it. N is the number of tokens that are text.")
def loss_with_padding_top_1(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss of a micro-batch that is half padding, with one expert a token?"""
    return _value(framework, replace(PLAIN, k=1), rows_of(4, 4, of=8, seed=7))


@scenario(49, why="There is no token, so there is nothing to balance. A nan would destroy the weights of the model.")
def loss_of_padding_only(framework: type[Driver], rank: int) -> Measurement:
    """Is the loss of a micro-batch that is all padding 0, and its gradient too?"""
    result = framework(PLAIN).train_step([rows_of(0, 0, of=8, seed=8)])
    value = compare_value(shown(result.loss, VALUE), 0.0)
    largest = max((float(g.abs().max()) for g in result.gradients or []), default=0.0)
    return worst([value, Measurement("0", f"gradient {largest:.4g}", largest, 0.0)])


@scenario(17, why="All tokens are routed, those of the prompt too, and the loss is their mean: about 1. Dividing a sum "
          "over all tokens by the labels makes it twice as strong.")  # fmt: skip
def loss_with_a_prompt(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss if half the tokens are a prompt, which is routed but has no labels?"""
    batch = rows_of(8, 8, of=8, seed=9)
    labels = torch.arange(8).expand(2, 8) >= 4
    return _value(framework, PLAIN, replace(batch, labels=labels))


@scenario(5, why="f and P are taken within each sequence, and the loss is their mean. Demons in the Detail, Eq. 2.")
def loss_within_sequences(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss within sequences, for two sequences?"""
    return _gradient(framework, replace(PLAIN, loss="sequence"), rows_of(8, 8, of=8, seed=10))


@scenario(43, why="A row holds two sequences, each with its own f and P. Taken by rows it is another loss.")
def loss_within_packed_sequences(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss within sequences, if a row packs two of them?"""
    batch = rows_of(8, 8, of=8, seed=11)
    return _gradient(
        framework, replace(PLAIN, loss="sequence"), replace(batch, sequence_ids=torch.arange(8).expand(2, 8) // 4)
    )


@scenario(21, why="f counts the experts that the router really chose, inside the open groups.")
def loss_with_groups(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss, if a token may choose from 1 of 2 groups of experts only?"""
    layer = replace(PLAIN, score_function="sigmoid", groups=(2, 1))
    return _gradient(framework, layer, rows_of(8, 8, of=8, seed=12))


@scenario(21, why="f counts the experts that the router really chose, with its bias. P comes from scores without it.")
def loss_beside_a_bias(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss, if a bias has changed the choice?"""
    bias = tuple(torch.linspace(-0.3, 0.3, 8).tolist())
    layer = replace(PLAIN, score_function="sigmoid", bias=bias, bias_rate=1e-3)
    return _value(framework, layer, rows_of(8, 8, of=8, seed=13))


@scenario(22, why="f is what the router wanted. Counted after dropping, no expert is ever seen above its capacity.")
def loss_with_a_capacity(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss, if experts drop tokens above a capacity of 1?"""
    return _gradient(framework, replace(PLAIN, capacity=1.0), rows_of(8, 8, of=8, seed=14))


@scenario(23, why="f is what the router wanted. Counted after padding, every sequence looks even and the loss is 1.")
def loss_with_padded_capacity(framework: type[Driver], rank: int) -> Measurement:
    """What is the loss within sequences, if experts are filled up to their capacity?"""
    layer = replace(PLAIN, loss="sequence", capacity=1.0, pads_to_capacity=True)
    return _value(framework, layer, rows_of(8, 8, of=8, seed=15))


@scenario(26, why="The scores are even, so the gradient is small and finite. How ties are broken does not matter.")
def loss_of_an_untrained_gate(framework: type[Driver], rank: int) -> Measurement:
    """Is the loss of logits that are all equal 1, and its gradient finite?"""
    result = framework(PLAIN).train_step([Batch(torch.full((1, 2, 8, 8), 0.5))])
    is_finite = all(bool(g.isfinite().all()) for g in shown(result.gradients, GRADIENT))
    finite = Measurement("finite", "finite" if is_finite else "nan", 0.0 if is_finite else math.inf, 0.0)
    return worst([compare_value(shown(result.loss, VALUE), 1.0), finite])


@scenario(31, why="Whoever sets a coefficient wants the loss. If it needs a second switch, its absence must be said.")
def loss_by_its_coefficient_alone(framework: type[Driver], rank: int) -> Measurement:
    """Is the loss there, if its coefficient is set in the configuration and nothing else is?"""
    batch = rows_of(8, 8, of=8, seed=16)
    result = framework(replace(PLAIN, sets_coefficient_only=True)).train_step([batch])
    if result.loss is None:
        return Measurement("a loss", "none, and no message", math.inf, 0.0)
    return compare_value(result.loss, reference.loss(batch, framework.as_defined(PLAIN)))


@scenario(
    66, why="The evaluation loss is compared between runs, and gives the perplexity. A balancing loss is not text."
)
def loss_in_evaluation(framework: type[Driver], rank: int) -> Measurement:
    """How much balancing loss is in the evaluation loss?"""
    batch = replace(rows_of(8, 8, of=8, seed=17), mode="evaluate")
    return compare_value(framework(PLAIN).evaluation_loss(batch), 0.0)
