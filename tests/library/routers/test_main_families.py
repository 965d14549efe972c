"""The five main families in what a training run does with them: attached at bias zero, the same as not attached.

``test_families.py`` has plain forwards and backwards, ``tests/distributed/test_main_families.py`` two ranks.
"""

import models
import pytest
import torch
from models import FAMILIES

from equipoise import attach

STRATEGY = "loss-free+lbl:coefficient=0"
families = pytest.mark.parametrize("name", sorted(FAMILIES))


def _both(name, **options):
    """The same model twice, the second attached; with what is added to the loss."""
    plain, attached = (models.family(name, **options) for _ in range(2))
    return (plain, lambda: 0.0), (attached, attach(attached, STRATEGY).loss)


def _batch():
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def _same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@families
@pytest.mark.parametrize("cached", [True, False])
def test_generation_gives_the_same_text_and_logits(name, cached):
    found = []
    for model, _ in _both(name, experts_implementation="eager"):
        batch = {key: value for key, value in _batch().items() if key != "labels"}
        output = model.eval().generate(
            **batch,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert output.sequences.shape == (2, 15)
        found.append([output.sequences, *output.logits])
    _same(*found)


@families
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_router_logits_gives_the_same_gradients(name, reentrant):
    """The model's own loss on its router logits is in it: it reads what the tap passes on."""
    found = []
    for model, loss in _both(name, experts_implementation="eager"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        output = model(**_batch(), output_router_logits=True)
        (output.loss + loss()).backward()
        gradients = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
        found.append([output.loss.detach(), output.logits, *(getattr(output, "router_logits", None) or ()), *gradients])
    _same(*found)


@pytest.mark.slow
@families
def test_a_compiled_model_gives_the_same_outputs_and_gradients(name):
    found = []
    for model, loss in _both(name, layers=1):
        torch._dynamo.reset()
        output = torch.compile(model, backend="aot_eager", fullgraph=True)(**_batch())
        (output.loss + loss()).backward()
        gradients = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
        found.append([output.loss.detach(), output.logits, *gradients])
    torch._dynamo.reset()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # a compiler may add in another order
