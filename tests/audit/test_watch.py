"""What is counted while a model runs, against loops over what its routers said."""

import itertools
import math

import models
import pytest
import torch

import equipoise
from equipoise import EquipoiseError
from equipoise.audit.watch import watching
from equipoise.taps.families import find_routers

DOMAINS = ("law", "verse")


def _ids(seed, rows=2, length=9):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def _recorded(model):
    """(logits, expert_ids) of every router call, in order."""
    seen = []
    for router in find_routers(model):

        def hook(module, args, output, kind=router.kind, k=router.k):
            logits, _, expert_ids = kind.read(output, k)
            seen.append((logits, expert_ids))

        router.module.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe"])
def test_every_sum_equals_a_loop_over_tokens(family):
    model = models.family(family).eval()
    seen = _recorded(model)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    vocabulary = [5, 17, 40, 63]
    batches = [(0, _ids(1), None), (1, _ids(2), mask), (0, _ids(3), None)]
    with torch.no_grad(), watching(model, DOMAINS, vocabulary) as watched:
        for watched.domain, ids, attention in batches:
            model(input_ids=ids, attention_mask=attention)
    assert watched.num_tokens.tolist() == [36, 14]
    gate = find_routers(model)[0].kind.gate
    for number, layer in enumerate(watched.layers):
        load = torch.zeros(2, 8, dtype=torch.int64)
        together = torch.zeros(8, 8, dtype=torch.int64)
        by_token = torch.zeros(4, 8, dtype=torch.int64)
        occurrences, score_sum, entropy = [0] * 4, [0.0, 0.0], [0.0, 0.0]
        mean_score = torch.zeros(2, 8, dtype=torch.float64)
        for (domain, ids, attention), (logits, chosen) in zip(batches, seen[number::2], strict=True):
            scores = equipoise.score(logits, gate).double()
            counts = [1] * 18 if attention is None else attention.reshape(-1).tolist()
            for token, (token_id, counted) in enumerate(zip(ids.reshape(-1).tolist(), counts, strict=True)):
                if not counted:
                    continue
                p = (scores[token] / scores[token].sum()).tolist()
                mean_score[domain] += torch.tensor(p, dtype=torch.float64)
                experts = chosen[token].tolist()
                score_sum[domain] += sum(p[e] for e in experts)
                entropy[domain] -= sum(x * math.log(x) for x in p) / math.log(8)
                for e in experts:
                    load[domain, e] += 1
                for a, b in itertools.product(experts, experts):
                    together[a, b] += 1
                if token_id in vocabulary:
                    occurrences[vocabulary.index(token_id)] += 1
                    for e in experts:
                        by_token[vocabulary.index(token_id), e] += 1
        assert torch.equal(layer.load, load) and torch.equal(layer.together, together)
        assert torch.equal(layer.by_token, by_token) and watched.occurrences.tolist() == occurrences
        assert layer.score_sum.tolist() == pytest.approx(score_sum) and layer.entropy.tolist() == pytest.approx(entropy)
        torch.testing.assert_close(layer.mean_score, mean_score, rtol=1e-9, atol=1e-12)
        assert (layer.k, layer.num_experts) == (2, 8)


def test_memory_is_the_same_for_any_amount_of_text():
    model = models.family("glm4_moe").eval()
    sizes = []
    for rows in (1, 40):
        with torch.no_grad(), watching(model, DOMAINS, range(64)) as watched:
            for seed in range(rows):
                model(input_ids=_ids(seed))
        sizes.append(sum(v.numel() for layer in watched.layers for v in vars(layer).values() if torch.is_tensor(v)))
    assert sizes[0] == sizes[1]


def test_a_model_is_left_as_it_was_also_after_an_error():
    model = models.family("glm4_moe").eval()
    before = model(input_ids=_ids(1)).logits
    with pytest.raises(RuntimeError, match="stop"), watching(model, DOMAINS):
        raise RuntimeError("stop")
    assert not model._forward_pre_hooks
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(model(input_ids=_ids(1)).logits, before)


def test_an_attached_model_is_watched_with_its_offsets():
    model = models.family("glm4_moe").eval()
    with torch.no_grad(), watching(model, DOMAINS) as plain:
        model(input_ids=_ids(1))
    names = [router.name for router in find_routers(model)]
    favourite = torch.tensor([9.0] + [0.0] * 7)
    equipoise.attach(model, "frozen", offsets=dict.fromkeys(names, favourite))
    with torch.no_grad(), watching(model, DOMAINS) as steered:
        model(input_ids=_ids(1))
    assert steered.layers[0].load[0, 0] == 18 > plain.layers[0].load[0, 0]


def test_what_cannot_be_is_refused():
    with pytest.raises(EquipoiseError, match="must hold a router"), watching(torch.nn.Linear(2, 2), DOMAINS):
        pass
    model = models.family("glm4_moe")
    with pytest.raises(ValueError, match="token ids once"), watching(model, DOMAINS, [1, 1]):
        pass
    with pytest.raises(EquipoiseError, match="must be given input_ids"), watching(model, DOMAINS):
        model(inputs_embeds=torch.zeros(1, 3, 32))
