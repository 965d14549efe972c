"""The loss over several micro-batches and ranks."""

from dataclasses import replace

from equipoise_lab.conformance.driver import Batch, Driver, Layer
from equipoise_lab.conformance.measure import Measurement, compare_gradients, shown
from equipoise_lab.conformance.scenarios.loss import GRADIENT
from equipoise_lab.conformance.scenarios.scenario import rows_of, scenario, window

MICRO, GLOBAL = Layer(loss="micro_batch"), Layer(loss="global_batch")


def _gradient(framework: type[Driver], layer: Layer, ranks: list[list[Batch]], rank: int) -> Measurement:
    result = framework(layer).train_step(ranks[rank])
    return compare_gradients(shown(result.gradients, GRADIENT), ranks, framework.as_defined(layer))


@scenario(9, 11, why="A step of three micro-batches is the mean of three losses. So it is as strong as one of them.")
def micro_batches_even(framework: type[Driver], rank: int) -> Measurement:
    """What gradient have three micro-batches of 4 tokens, each with a loss of its own?"""
    return _gradient(framework, MICRO, [window([4, 4, 4], of=4, seed=20)], rank)


@scenario(9, 11, 12, why="Micro-batches weigh by their tokens, or each the same: trainers differ, both are accepted.")
def micro_batches_uneven(framework: type[Driver], rank: int) -> Measurement:
    """What gradient have micro-batches of 6, 2 and 4 tokens and padding, each with a loss of its own?"""
    return _gradient(framework, MICRO, [window([6, 2, 4], of=6, seed=23)], rank)


@scenario(9, why="f pools the counts of the micro-batches so far, by one buffer. Demons in the Detail, section 3.2.")
def global_batch_even(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss over the global batch, in three micro-batches of 4 tokens?"""
    return _gradient(framework, GLOBAL, [window([4, 4, 4], of=4, seed=26)], rank)


@scenario(2, why="A share is a sum of counts divided by the sum of their tokens. Divided by the tokens of the last "
          "micro-batch alone, its scale is wrong wherever sizes differ.")  # fmt: skip
def global_batch_uneven(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss over the global batch, in micro-batches of 6, 2 and 4 tokens and padding?"""
    return _gradient(framework, GLOBAL, [window([6, 2, 4], of=6, seed=29)], rank)


@scenario(2, why="An optimizer step is a global batch of its own. Counts of the step before are over.")
def global_batch_ends_with_the_step(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the second optimizer step under the loss over the global batch?"""
    driver = framework(GLOBAL)
    driver.train_step(window([4, 4], of=4, seed=32))
    second = window([4, 4], of=4, seed=35)
    return compare_gradients(shown(driver.train_step(second).gradients, GRADIENT), [second], GLOBAL)


@scenario(1, 10, ranks=2, why="Two ranks give the gradient of one process with all tokens. No factor depends on ranks.")
def micro_batch_two_ranks(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss within micro-batches on two ranks of 24 tokens?"""
    return _gradient(framework, MICRO, [[rows_of(12, 12, of=12, seed=38 + r)] for r in range(2)], rank)


@scenario(1, ranks=2, why="Two ranks give the gradient of one process with all tokens. No factor depends on ranks.")
def global_batch_two_ranks(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss over the global batch on two ranks of 24 tokens?"""
    return _gradient(framework, GLOBAL, [[rows_of(12, 12, of=12, seed=40 + r)] for r in range(2)], rank)


@scenario(
    1, 2, ranks=2, why="f is the sum of counts over the sum of tokens of both ranks. A mean of shares is another."
)
def global_batch_unequal_ranks(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss over the global batch on ranks of 8 and 40 tokens, without padding?"""
    return _gradient(framework, GLOBAL, [[rows_of(8, of=8, seed=42)], [rows_of(40, of=40, seed=43)]], rank)


@scenario(59, 63, why="A recomputed forward is the same micro-batch. Its loss and gradient are there once.")
def loss_recomputed_by_the_framework(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss under the framework's own recomputation?"""
    batch = rows_of(8, 8, of=8, seed=44)
    result = framework(MICRO).train_step([batch], recompute="own")
    return compare_gradients(shown(result.gradients, GRADIENT), [[batch]], framework.as_defined(MICRO))


@scenario(59, 63, why="A recomputed forward is the same micro-batch. Its loss and gradient are there once.")
def loss_recomputed_by_torch(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss under torch.utils.checkpoint, use_reentrant=False?"""
    batch = rows_of(8, 8, of=8, seed=45)
    result = framework(MICRO).train_step([batch], recompute="non_reentrant")
    return compare_gradients(shown(result.gradients, GRADIENT), [[batch]], framework.as_defined(MICRO))


@scenario(62, why="A recomputed forward adds nothing to the pooled counts of the global batch. f of the second "
          "micro-batch counts both once.")  # fmt: skip
def global_batch_recomputed(framework: type[Driver], rank: int) -> Measurement:
    """What gradient has the loss over the global batch in two micro-batches that are recomputed?"""
    batches = [replace(batch) for batch in window([8, 8], of=8, seed=46)]
    result = framework(GLOBAL).train_step(batches, recompute="own")
    return compare_gradients(shown(result.gradients, GRADIENT), [batches], GLOBAL)
