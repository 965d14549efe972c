"""litgpt's blocks route by themselves: a gate that is a linear layer, a top-k in the block's forward."""

import pytest
import torch

litgpt = pytest.importorskip("litgpt")

from equipoise import EquipoiseError, attach  # noqa: E402

EXPERTS, K, LAYERS = 8, 2, 2


def _model(**options):
    config = litgpt.Config(
        name="tiny", block_size=16, vocab_size=64, padded_vocab_size=64, n_layer=LAYERS, n_head=2, n_embd=16,
        n_expert=EXPERTS, n_expert_per_token=K, mlp_class_name="LLaMAMoE", intermediate_size=8, moe_intermediate_size=8,
        bias=False, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = litgpt.GPT(config)
    for block in model.transformer.h:
        torch.nn.init.normal_(block.mlp.gate.weight, std=0.25)
    return model


def _logits(model, ids, dtype=torch.float64):
    """By layer, in float64: the logits of the gates, for a whole forward of the model."""
    seen = []
    twin = _model()
    twin.load_state_dict(model.state_dict())
    twin.to(dtype)
    for block in twin.transformer.h:
        block.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    twin(ids)
    return twin, seen


def test_counts_and_gradients_of_the_whole_model_are_exact():
    model = _model()
    balance = attach(model, "lbl:coefficient=0.5")
    assert [layer.name for layer in balance.layers] == [f"transformer.h.{n}.mlp" for n in range(LAYERS)]
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(1))
    (0 * model(ids).sum() + balance.loss()).backward()
    balance.step()
    twin, logits = _logits(model, ids)
    loss = torch.zeros((), dtype=torch.float64)
    for number, of_layer in enumerate(logits):
        chosen = of_layer.topk(K).indices
        load = torch.tensor([int((chosen == expert).sum()) for expert in range(EXPERTS)])
        assert torch.equal(balance.load[f"transformer.h.{number}.mlp"], load)
        loss = loss + 0.5 * EXPERTS * (load / load.sum() * of_layer.softmax(-1).mean(0)).sum()
    loss.backward()
    for ours, theirs in zip(model.transformer.h, twin.transformer.h, strict=True):
        error = (ours.mlp.gate.weight.grad.double() - theirs.mlp.gate.weight.grad).norm()
        assert error <= 1e-6 * theirs.mlp.gate.weight.grad.norm()


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.05,rule=sign", "lbl:scope=global_batch,coefficient=0.1"])
def test_maxvio_falls_in_training(strategy):
    def train(strategy):
        model = _model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        balance = attach(model, strategy)
        generator = torch.Generator().manual_seed(2)
        values = []
        for _ in range(50):
            for _ in range(2):
                ids = (64 * torch.rand(4, 16, generator=generator) ** 4).long()  # few tokens are frequent
                logits = model(ids)
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                (loss / 2 + balance.loss() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            balance.step()
            values.append(balance.metrics()["maxvio_batch"])
        return values

    balanced, plain = train(strategy), train("none")
    assert balanced[0] == pytest.approx(plain[0])
    assert sum(balanced[-10:]) < 0.6 * sum(plain[-10:])


def test_its_router_with_groups_is_refused_by_name():
    """It gives no logits, and against a negative bias it chooses outside of its groups."""
    options = {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2, "n_shared_expert": 1}
    with pytest.raises(EquipoiseError, match="GroupedTopkRouter"):
        attach(_model(**options), "loss-free")


def test_a_scaled_sum_is_accepted():
    assert attach(_model(routed_scaling_factor=2.5)).layers[0].kind.score_function == "softmax"
