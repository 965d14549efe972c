"""What an evaluation says of specialisation: the top-k score sum, the largest share of a domain."""

import json

import pytest
import reference
import torch

import equipoise
from equipoise.lab.config import ARCHITECTURES
from equipoise.lab.models import build_model
from equipoise.lab.scores import topk_score_sums
from equipoise.lab.train import train
from equipoise.records import Run
from equipoise.taps.families import find_routers

IDS = torch.arange(48).view(3, 16)


def _rows(folder, log="steps"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)]


def _num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def _model(tiny, arch, **options):
    model = build_model(tiny(arch=arch, layers=2, **options), 300).eval()
    generator = torch.Generator().manual_seed(1)
    for _, router, _, *_ in find_routers(model):
        torch.nn.init.normal_(router.weight, std=0.5, generator=generator)
    return model


def _forward(model):
    with torch.no_grad(), topk_score_sums(model) as sums:
        model(input_ids=IDS)
    return sums


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_topk_score_sum_is_that_of_the_reference_whatever_the_offset(tiny, arch, steered):
    model = _model(tiny, arch)
    if steered:
        names = [name for name, _, _, *_ in find_routers(model)]
        equipoise.attach(model, "frozen", offsets=dict.fromkeys(names, torch.tensor([0.9, 0.0, -0.9, 0.3])))
    seen = {}
    for name, router, kind, *_ in find_routers(model):
        router.register_forward_hook(lambda _, args, out, key=(name, kind.gate): seen.update({key: out}))
    sums = _forward(model)
    assert len(seen) == 2
    for (name, gate), (logits, _, expert_ids) in seen.items():
        expected = 0.0
        for row, chosen in zip(reference.scores(logits.tolist(), gate), expert_ids.tolist(), strict=True):
            expected += sum(row[e] for e in chosen) / sum(row)
        assert sums[name] == pytest.approx(expected, rel=1e-5)  # float32 scores
        plain = sum(sum(sorted(row)[-2:]) / sum(row) for row in reference.scores(logits.tolist(), gate))
        assert (expected < plain - 1e-3) == steered


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_topk_score_sum_is_k_of_e_for_equal_scores_and_one_for_a_sure_softmax(tiny, arch):
    model = _model(tiny, arch)
    for _, router, _, *_ in find_routers(model):
        torch.nn.init.zeros_(router.weight)
    assert list(_forward(model).values()) == pytest.approx([48 * 2 / 4] * 2)
    for _, router, _, *_ in find_routers(model):
        torch.nn.init.normal_(router.weight, std=1e4, generator=torch.Generator().manual_seed(0))
    for total, (_, _, kind, *_) in zip(_forward(model).values(), find_routers(model), strict=True):
        assert total == pytest.approx(48.0) if kind.gate == "softmax" else 24 < total <= 48


def test_topk_score_sums_add_up_over_forwards_and_leave_nothing_behind(tiny):
    model = _model(tiny, "glm4_moe")
    before = _num_hooks(model)
    once = _forward(model)
    with torch.no_grad(), topk_score_sums(model) as sums:
        for row in IDS:
            model(input_ids=row[None])
        model.eval()
    assert sums == {name: pytest.approx(total, rel=1e-5) for name, total in once.items()}
    with pytest.raises(RuntimeError, match="cut"), topk_score_sums(model):
        raise RuntimeError("cut")
    assert _num_hooks(model) == before


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_evaluations_hold_scores_and_shares_by_domain_and_layer(tiny, silent, arch):
    config = tiny(arch=arch, layers=2, steps=2, evaluate_every=1, save_model=False)
    result = train(config, silent())
    rows = _rows(config.out, "evaluations")
    assert len(rows) == 3  # after step 1 and the last on the selection text, then on the test text
    for row in rows:
        sums = [value for domain in row["domains"].values() for value in domain["topk_score_sum"]]
        assert len(sums) == 3 * 2
        assert all(0.45 < value < 1 for value in sums), "k/E is 1/2; the offset may take a little"
        assert len(set(sums)) == 6, "domains or layers are mixed up"
        assert row["topk_score_sum"] == pytest.approx(sum(sums) / 6, rel=1e-12)
        shares = [
            max(
                max(c / sum(domain["load"][layer]) for c in domain["load"][layer]) for domain in row["domains"].values()
            )
            for layer in range(2)
        ]
        assert row["max_domain_share"] == pytest.approx(sum(shares) / 2, rel=1e-12)
    last = json.loads((config.out / "result.json").read_text())
    for name in ("topk_score_sum", "max_domain_share"):
        assert result[name] == last[name] == rows[-1][name]


def test_the_score_sum_of_an_evaluation_is_a_mean_over_its_tokens(tiny, silent, tmp_path):
    """Whatever the batches: eight sequences of a domain as four batches, as three of unequal size, as one."""
    found = []
    for sequences in (2, 3, 8):
        options = {"strategy": "none", "steps": 1, "learning_rate": 1e-9, "save_model": False}  # weights stay the same
        config = tiny(out=tmp_path / str(sequences), sequences=sequences, **options)
        train(config, silent())
        found.append(_rows(config.out, "evaluations")[-1]["topk_score_sum"])
    assert found == [pytest.approx(found[0], rel=1e-5)] * 3


def test_an_evaluation_does_not_disturb_training(tiny, silent, tmp_path):
    for name, every in (("with", 2), ("without", 0)):
        train(tiny(out=tmp_path / name, steps=5, evaluate_every=every, save_model=False), silent())
    assert _rows(tmp_path / "with") == _rows(tmp_path / "without")
