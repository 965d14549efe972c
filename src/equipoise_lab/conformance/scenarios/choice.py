"""Which experts are chosen: expert groups, and routing that is replayed."""

from dataclasses import replace

import torch

from equipoise_lab.conformance import reference
from equipoise_lab.conformance.driver import Driver, Layer
from equipoise_lab.conformance.measure import Measurement, compare_counts, shown
from equipoise_lab.conformance.scenarios.counting import BIASED, counted
from equipoise_lab.conformance.scenarios.scenario import rows_of, scenario

# One group of two, and two experts: here the paper of DeepSeek-V3 (a group counts by its best k / open groups) and its
# code (by its two best) agree.
GROUPS = Layer(score_function="sigmoid", groups=(2, 1), bias_rate=1e-3)
COUNTS = "counts of a step"


def _choice(framework: type[Driver], layer: Layer, seed: int) -> Measurement:
    batch = rows_of(8, 8, of=8, seed=seed)
    experts = framework(layer).choose(batch).tolist()
    flat = batch.logits[0].reshape(-1, layer.experts).double().tolist()
    right = [reference.chosen(token, layer, layer.bias or [0.0] * layer.experts) for token in flat]
    wrong = sum(sorted(a) != sorted(b) for a, b in zip(experts, right, strict=True))
    return Measurement("all tokens", f"{len(right) - wrong} of {len(right)} tokens", float(wrong), 0.0)


@scenario(
    91, why="Groups are ranked by their two best biased scores, and closed ones are out. DeepSeek-V3, section 2.1.2."
)
def groups(framework: type[Driver], rank: int) -> Measurement:
    """Does every token get the right experts from 1 of 2 groups?"""
    return _choice(framework, GROUPS, 100)


@scenario(91, why="A bias that is the same for all changes no choice. Filled up with 0.0 in place of minus infinity, "
          "closed groups win as soon as open scores are negative.")  # fmt: skip
def groups_under_negative_biases(framework: type[Driver], rank: int) -> Measurement:
    """Does every token get the right experts from 1 of 2 groups, if all biases are -2?"""
    return _choice(framework, replace(GROUPS, bias=(-2.0,) * 8), 101)


@scenario(21, 91, why="What is counted is what was chosen, inside the open groups.")
def groups_and_the_bias(framework: type[Driver], rank: int) -> Measurement:
    """Which counts move the bias, if a token may choose from 1 of 2 groups?"""
    return counted(framework, [[rows_of(8, 8, of=8, seed=102)]], layer=GROUPS)


@scenario(86, why="Replayed routing is what the forward uses, so it is what is counted.")
def replay(framework: type[Driver], rank: int) -> Measurement:
    """Which counts has a forward whose routing is replayed?"""
    return _replay(framework, (8, 8))


@scenario(
    48, 86, why="A rollout is filled up with expert 0 where its row ends. Padding is not text: it counts nowhere."
)
def replay_with_padding(framework: type[Driver], rank: int) -> Measurement:
    """Which counts has a replayed forward that is half padding, recorded as expert 0?"""
    return _replay(framework, (4, 4))


def _replay(framework: type[Driver], lengths: tuple[int, int]) -> Measurement:
    batch = rows_of(*lengths, of=8, seed=103)
    generator = torch.Generator().manual_seed(104)
    ids = torch.rand(1, 2, 8, 8, generator=generator).argsort(-1)[..., :2]
    if batch.mask is not None:
        ids[:, ~batch.mask] = 0
    batch = replace(batch, replayed=ids)
    result = framework(BIASED).train_step([batch])
    return compare_counts(shown(result.counts, COUNTS), reference.counts([[batch]], BIASED))
