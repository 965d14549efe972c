"""What Megatron's own ``RouterReplay`` recorded is replayed on its models, and what we record fits it."""

import pytest
import torch
from frameworks import megatron_models as models
from frameworks.megatron_models import EXPERTS, LAYERS, LENGTH, K, gpt, micro_batches
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

import equipoise

one_rank = models.one_rank
pytestmark = pytest.mark.usefixtures("one_rank")
(BATCH,) = micro_batches((8, 3))
ROWS = len(BATCH.ids)
OPTIONS = {
    "a bias": {},
    "softmax": {"moe_router_score_function": "softmax"},
    "recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
}


def _attached(options):
    model = gpt(**options).train()
    models.fill(model)
    return model, equipoise.attach(model, "frozen+lbl:scope=micro_batch,coefficient=0.5")


def _record(seed=0):
    """[batch, sequence, layers, k]; of one expert group for each token."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randint(EXPERTS // 2, (ROWS, LENGTH, LAYERS, 1), generator=generator) + torch.arange(K)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_record_is_replayed_on_tokens_that_stand_sequence_first(options):
    model, balance = _attached(options)
    record, keep = _record(), ~BATCH.is_padding
    with balance.replay(record, mask=keep.long()), balance.recording() as recording:
        (model(**models.arguments(BATCH)).float().mean() + balance.loss()).backward()
    balance.step()
    for number, layer in enumerate(balance.layers):
        expected = torch.bincount(record[:, :, number][keep].flatten(), minlength=EXPERTS)
        assert torch.equal(balance.load[layer.name], expected)
        assert layer.router.weight.grad.any()
    assert torch.equal(recording.by_token(rows=ROWS)[keep].sort(-1).values, record[keep])


def test_what_megatron_recorded_is_replayed_bit_by_bit():
    """A model whose own replay is on is refused by attach, so another one records."""
    RouterReplay.clear_global_router_replay_instances()
    recorder = gpt(moe_enable_routing_replay=True).train()
    models.fill(recorder)
    try:
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        with torch.no_grad():  # with gradients its own update fails on a padding mask
            expected = recorder(**models.arguments(BATCH))
        recorded = RouterReplay.get_recorded_data()
    finally:
        RouterReplay.clear_global_router_replay_action()
        RouterReplay.clear_global_router_replay_instances()
    model, balance = _attached({})
    with balance.recording() as recording:
        assert torch.equal(model(**models.arguments(BATCH)), expected)
    for ours, theirs in zip(recording.by_layer(), recorded, strict=True):
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    for layer in balance.layers:
        layer.router.expert_bias.copy_(torch.randn(EXPERTS))  # by itself it would choose otherwise
    with balance.replay(recorded):
        assert torch.equal(model(**models.arguments(BATCH)), expected)
    assert not torch.equal(model(**models.arguments(BATCH)), expected)
