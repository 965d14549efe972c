"""Tables of runs and audits against the content of their files."""

import json
import math

import numpy as np
import pyarrow.compute as pc
import pytest

from equipoise.errors import EquipoiseError
from equipoise_lab import analysis
from equipoise_lab.analysis.reader import Experts
from equipoise_lab.analysis.summary import COLUMNS
from equipoise_lab.analysis.tables import Records, read_records
from equipoise_lab.records import Run, write_json

LOAD = {"prose": [[4, 0], [1, 3]], "code": [[2, 2], [0, 4]]}


def make_run(path, strategy="lbl", seed=0, *, steps=5, finish=True):
    config = {"strategy": strategy, "seed": seed, "steps": steps, "num_experts": 2, "layers": ["a", "b"]}
    run = Run.create(path, config | {"domains": list(LOAD), "experts_per_token": 2})
    for step in range(1, steps + 1):
        run.append(
            "steps",
            {"step": step, "loss": 1 / step, "maxvio_batch": 0, "alerts": ["x"], **({"bias_max": 0.5} if seed else {})},
        )
        run.append("loads", {"step": step, "load": [[step, 1], [0, 2]]})
    if finish:
        names = [column.key for column in COLUMNS]
        run.append("evaluations", {"step": steps, "domains": {d: {"load": load} for d, load in LOAD.items()}})
        figures = dict.fromkeys(names, 1.5)
        run.finish(figures | {"seed": seed, "domains": {d: {"nats": 2.0, "bits_per_byte": None} for d in LOAD}})
    return run


def test_runs_have_a_row_each_with_figures_and_config(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1, finish=False)
    rows = read_records(tmp_path).runs().to_pylist()
    assert [(r["run"], r["strategy"], r["seed"], r["finished"], r["val_nats"]) for r in rows] == [
        ("a", "lbl", 0, True, 1.5),
        ("b", "lbl", 1, False, None),
    ]
    assert json.loads(rows[0]["config"])["num_experts"] == 2


def test_steps_have_every_number_and_null_where_a_run_has_none(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1)
    table = read_records(tmp_path).steps()
    assert table.column_names == ["run", "strategy", "seed", "step", "loss", "maxvio_batch", "bias_max"]
    assert table.num_rows == 10 and table["bias_max"].null_count == 5
    assert table["loss"].to_pylist()[:2] == [1.0, 0.5]


def test_experts_hold_counts_frequency_and_relative_load(tmp_path):
    make_run(tmp_path / "a")
    table = read_records(tmp_path).experts()
    rows = table.filter(pc.and_(pc.equal(table["layer"], "b"), pc.equal(table["domain"], "prose"))).to_pylist()
    # 1 and 3 assignments of 2 tokens with k = 2
    assert [(r["expert"], r["load"], r["tokens"], r["frequency"], r["relative_load"]) for r in rows] == [
        (0, 1, 2, 0.5, 0.5),
        (1, 3, 2, 1.5, 1.5),
    ]
    assert sum(table["load"].to_pylist()) == sum(sum(map(sum, load)) for load in LOAD.values())


def test_a_frequency_divides_by_tokens_even_if_k_differs_between_layers(monkeypatch):
    load = [np.array([[75, 25]]), np.array([[100, 100]])]  # 100 tokens, k = 1 and 2
    model = Experts("m", "m", None, None, ["a", "b"], ["prose"], 1, load, [], [])
    monkeypatch.setattr(Records, "models", [model])
    rows = Records((), {}, ()).experts().to_pylist()
    assert [(row["tokens"], row["frequency"]) for row in rows] == [(100, 0.75), (100, 0.25), (100, 1.0), (100, 1.0)]


def test_domains_have_their_loss(tmp_path):
    make_run(tmp_path / "a")
    assert read_records(tmp_path).domains().to_pylist()[1] == {
        "run": "a", "strategy": "lbl", "seed": 0, "domain": "code", "nats": 2.0, "bits_per_byte": None,
    }  # fmt: skip


def test_loads_are_of_single_steps_or_sums_of_neighbouring_steps(tmp_path):
    make_run(tmp_path / "a")
    records = read_records(tmp_path)
    assert records.loads().num_rows == 5 * 2 * 2
    rows = records.loads(2).to_pylist()
    assert [(r["step"], r["steps"], r["load"]) for r in rows if r["layer"] == "a" and r["expert"] == 0] == [
        (3, 3, 1 + 2 + 3),
        (5, 2, 4 + 5),
    ]
    assert sum(r["load"] for r in rows) == sum(records.loads()["load"].to_pylist())


def audit(load=LOAD):
    measured = {"value": 0.0, "bound": 0.0, "share": 0.0}
    figures = dict.fromkeys(
        ("maxvio", "maxvio_floor", "dead_experts", "starved_experts", "effective_experts", "topk_score_sum"), 0
    )
    figures |= {"router_entropy": 0, "domain_information_bits": measured, "domain_distance": measured}
    layers = [
        {"layer": name, "experts": 2, "k": 2, "load_by_domain": [load[d][i] for d in load], **figures,
         "typical_tokens": [[{"text": " a", "share": 0.5, "count": 3}], []]}
        for i, name in enumerate("ab")
    ]  # fmt: skip
    tokens, mean = dict.fromkeys(load, 2), {"maxvio": 0.0, "domain_information_bits": 0.0}
    return {"format": 1, "model": "m", "domains": list(load), "tokens": tokens, "mean": mean, "layers": layers}


def test_an_audit_gives_experts_and_typical_tokens(tmp_path):
    write_json(tmp_path / "audit.json", audit())
    records = read_records(tmp_path)
    assert records.experts().num_rows == 8 and records.runs().num_rows == records.steps().num_rows == 0
    assert records.typical_tokens().to_pylist()[0] == {
        "run": tmp_path.name, "strategy": "m", "seed": None, "layer": "a", "expert": 0, "rank": 1, "text": " a",
        "share": 0.5, "count": 3,
    }  # fmt: skip


def test_the_audit_of_a_run_is_part_of_the_run(tmp_path):
    run = make_run(tmp_path / "a")
    write_json(run.path / "audit.json", audit())
    records = read_records(tmp_path)
    assert records.experts().num_rows == 8 and records.typical_tokens().num_rows == 2
    assert records.typical_tokens()["seed"].to_pylist() == [0, 0] and not records.audits


def test_a_damaged_audit_is_named_and_the_rest_is_read(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "audit.json").write_text("{")
    records = read_records(tmp_path)
    assert [run.name for run in records.recorded_runs] == ["a"]
    assert [(p.name, p.kind) for p in records.problems] == [("b", "damaged")]


def test_a_folder_without_runs_and_audits_raises(tmp_path):
    with pytest.raises(EquipoiseError, match="must contain runs"):
        read_records(tmp_path)
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(EquipoiseError, match="a run or an audit that can be read: .* must be JSON"):
        read_records(tmp_path)
    with pytest.raises(EquipoiseError, match="does not exist"):
        read_records(tmp_path / "nowhere")


def test_tables_and_figures_are_reached_by_name():
    assert analysis.read_records is read_records and analysis.figures.curve
    assert {"read_records", "figures", "tables"} <= set(dir(analysis))
    with pytest.raises(AttributeError, match="nothing"):
        analysis.nothing  # noqa: B018


def test_the_repr_of_records_and_of_their_parts_is_one_short_line(tmp_path):
    for seed in range(20):
        make_run(tmp_path / f"run{seed:02}", seed=seed, steps=50, finish=seed > 0)
    records = read_records(tmp_path)
    assert repr(records).startswith("Records of 20 runs and 0 audits (runs=['run00', 'run01', ")
    assert repr(records).endswith("...], problems=['run00'])") and len(repr(records)) < 150
    unfinished, finished = records.recorded_runs[:2]
    assert repr(unfinished) == "RecordedRun('run00': strategy 'lbl', seed 0, 50 steps, not finished)"
    assert repr(finished) == "RecordedRun('run01': strategy 'lbl', seed 1, 50 steps, finished)"
    assert repr(finished.experts) == "Experts('run01': 2 layers, 2 domains, step 50)"


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [(3.0, None, "3"), (0.0, 0.0, "0 ± 0"), (2.5, 0.7071, "2.5 ± 0.7"), (math.nan, None, "not finite")],
)
def test_dead_experts_are_whole_numbers_unless_they_are_a_mean(mean, sd, text):
    (column,) = [column for column in COLUMNS if column.key == "dead_experts"]
    assert column.text({"dead_experts": mean, "dead_experts_sd": sd}) == text
    (column,) = [column for column in COLUMNS if column.key == "maxvio_global"]
    assert column.text({"maxvio_global": 1.0, "maxvio_global_sd": None}) == "1.000"
