"""The tiny model under ``attach``: its micro-batches, what its routers choose, and what a window must give."""

import reference
import torch
from models import EXPERTS, VOCAB, K, tiny_lm

from equipoise import attach

LAYERS = ["blocks.0.gate", "blocks.1.gate"]
SCORE_FUNCTIONS = dict(zip(LAYERS, ("sigmoid", "softmax"), strict=True))
SCOPES = ("sequence", "micro_batch", "global_batch")
PADDING_MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])  # 10 tokens of 14


def random_ids(rows=2, length=7, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def attach_tiny(*balancers, seed=0, checkpointing=None, **options):
    model = tiny_lm(checkpointing, seed)
    return model, attach(model, *balancers, **options)


def record_calls(model):
    """By layer, the (logits, expert_ids) of every call from now on."""
    calls = {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: calls[name].append((output[0].detach(), output[2]))
        )
    return calls


def count_by_hand(calls, masks=None):
    """Assignments to each expert over all calls of one layer."""
    masks = masks or [None] * len(calls)
    loads = [reference.load(ids.tolist(), EXPERTS, mask) for (_, ids), mask in zip(calls, masks, strict=True)]
    return [sum(column) for column in zip(*loads, strict=True)]


def loss_by_hand(calls, coefficients, mask=None, sequences=None):
    """The balancing loss of the last call of every layer, by scope."""
    total = 0.0
    for name in LAYERS:
        logits, expert_ids = calls[name][-1]
        scores = reference.scores(logits.double().tolist(), SCORE_FUNCTIONS[name])
        expert_ids = expert_ids.tolist()
        counts = reference.load(expert_ids, EXPERTS, mask)
        for scope, coefficient in coefficients.items():
            if scope == "sequence":
                total += coefficient * reference.sequence_loss(scores, expert_ids, sequences, mask)
            else:
                total += coefficient * reference.load_balancing_loss(scores, counts, K, mask)
    return total


def clone_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_of_one_step(strategy, factor=1.0, **options):
    """The gradients of one micro-batch of 4 rows."""
    model, balance = attach_tiny(strategy, **options)
    ((model(random_ids(rows=4)) + balance.loss()) * factor).backward()
    balance.step()
    return clone_gradients(model)


def assert_gradients_close(gradients, expected, rtol=2e-6):
    """Compares the norm over all parameters. float32 rounds to 6e-8; the default allows a few dozen roundings."""
    assert gradients.keys() == expected.keys(), gradients.keys() ^ expected.keys()
    distance = sum(float((gradients[k].double() - expected[k].double()).square().sum()) for k in gradients) ** 0.5
    norm = sum(float(expected[k].double().square().sum()) for k in expected) ** 0.5
    assert norm > 0 and distance <= rtol * norm, f"relative distance {distance / norm if norm else None}"


def load_sums(balance):
    """By layer, the assignments of the last window."""
    return {name: int(load.sum()) for name, load in balance.load.items()}


def assert_tokens_counted(balance, tokens):
    """In the last window, every layer of the tiny model counted so many tokens."""
    sums = load_sums(balance)
    assert sums == dict.fromkeys(LAYERS, K * tokens), f"{sums}, not {K * tokens} each"
