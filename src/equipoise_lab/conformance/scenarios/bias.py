"""When the expert bias moves, and what becomes of it when a model is cast and resumed."""

from dataclasses import replace

import torch

from equipoise_lab.conformance import reference
from equipoise_lab.conformance.driver import Batch, Driver, Layer
from equipoise_lab.conformance.measure import Measurement, compare_biases, compare_counts, compare_value, worst
from equipoise_lab.conformance.scenarios.counting import BIASED
from equipoise_lab.conformance.scenarios.scenario import RATE, rows_of, scenario


def _evenly(tokens: int) -> Batch:
    """A micro-batch whose load is the same for all experts, under any equal bias."""
    logits = torch.zeros(1, 1, tokens, 8)
    for token in range(tokens):
        logits[0, 0, token, token % 8], logits[0, 0, token, (token + 1) % 8] = 2.0, 1.0
    return Batch(logits)


@scenario(76, why="sign(0) is 0: an expert at the mean load stays. A comparison with >= would move it.")
def bias_at_even_load(framework: type[Driver], rank: int) -> Measurement:
    """Does the bias stay, if the load is even?"""
    driver = framework(BIASED)
    driver.train_step([_evenly(16)])
    return compare_biases(driver.biases(), [[0.0] * 8], RATE)


@scenario(81, why="A step that the loop skips changes no weight. A bias that moves all the same is one step ahead.")
def bias_in_a_skipped_step(framework: type[Driver], rank: int) -> Measurement:
    """Does the bias stay, if the training loop skips the optimizer step?"""
    driver = framework(BIASED)
    driver.train_step([rows_of(8, 8, of=8, seed=90)], is_applied=False)
    return compare_biases(driver.biases(), [[0.0] * 8], RATE)


@scenario(81, why="The skipped step is over, and its batch is dropped. The next step has its own load.")
def bias_after_a_skipped_step(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias in the step after a skipped one?"""
    driver = framework(BIASED)
    skipped = rows_of(16, 16, of=16, seed=91)
    driver.train_step([replace(skipped, logits=skipped.logits.flip(-1))], is_applied=False)
    before = [bias.clone() for bias in driver.biases()]
    batch = rows_of(8, 8, of=8, seed=92)
    result = driver.train_step([batch])
    counts = reference.counts([[batch]], BIASED)
    moves = [after - start for after, start in zip(driver.biases(), before, strict=True)]
    parts = [compare_biases(moves, [reference.moved([0.0] * 8, count, RATE) for count in counts], RATE)]
    if result.counts is not None:
        parts.append(compare_counts(result.counts, counts))
    return worst(parts)


@scenario(81, why="A step with infinite gradients is not applied. The tokens behind it may be what broke the model.")
def bias_beside_infinite_gradients(framework: type[Driver], rank: int) -> Measurement:
    """Does the bias stay, if a gradient of the model is infinite?"""
    driver = framework(BIASED)
    driver.train_step([rows_of(8, 8, of=8, seed=93)], has_finite_gradients=False)
    return compare_biases(driver.biases(), [[0.0] * 8], RATE)


@scenario(68, 73, why="Biases of published models lie at 6.8 to 7.1, where bfloat16 has steps of 0.03. "
          "Their differences decide the choice, so they stay float32.")  # fmt: skip
def bias_after_a_cast(framework: type[Driver], rank: int) -> Measurement:
    """Is a bias of 6.9123 still that after the model is cast to bfloat16 and has run?"""
    driver = framework(replace(BIASED, bias=(6.9123,) + (6.9,) * 7, bias_rate=0.0))
    driver.cast(torch.bfloat16)
    driver.choose(rows_of(8, of=8, seed=94))
    return compare_value(float(driver.biases()[0][0]), 6.9123, 1e-6)


@scenario(68, why="A step of 0.001 is below the resolution of bfloat16 at 0.5, which is 0.004. In float32 they add up.")
def bias_moves_in_bfloat16(framework: type[Driver], rank: int) -> Measurement:
    """Where are biases of 0.5 after 100 updates of 0.001 in a bfloat16 model?"""
    driver = framework(replace(BIASED, bias=(0.5,) * 8))
    driver.cast(torch.bfloat16)
    towards = torch.tensor([3.0] * 2 + [-3.0] * 6)
    batch = Batch(0.01 * torch.arange(8.0).flip(0).expand(1, 1, 8, 8) + towards)
    for _ in range(100):
        driver.train_step([batch])
    return compare_biases(driver.biases(), [[0.4] * 2 + [0.6] * 6], 1.0, tolerance=1e-3)


@scenario(75, why="What training goes on with is what it stopped with. A rounded copy of the bias is another one.")
def bias_after_resuming(framework: type[Driver], rank: int) -> Measurement:
    """Is the bias of a bfloat16 model after saving and loading the one that was saved?"""
    driver = framework(replace(BIASED, bias=tuple(0.5 + 0.0013 * e for e in range(8))))
    driver.cast(torch.bfloat16)
    driver.train_step([rows_of(8, 8, of=8, seed=95)])
    before, state = [bias.clone() for bias in driver.biases()], driver.save()
    resumed = framework(BIASED)
    resumed.cast(torch.bfloat16)
    resumed.load(state)
    resumed.train_step([_evenly(16)])  # moves nothing
    return compare_biases(resumed.biases(), [bias.double().tolist() for bias in before], RATE)


@scenario(83, why="Qwen3 MoE was trained with a loss and has no bias. Whoever goes on with it has not asked for one.")
def bias_of_a_model_without_one(framework: type[Driver], rank: int) -> Measurement:
    """At which rate does the default configuration for Qwen3 MoE move a bias?"""
    return compare_value(framework(Layer()).default_bias_rate(), 0.0, 0.0)
