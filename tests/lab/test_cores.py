"""The number of usable cores: CPU affinity and container quota."""

import os

import pytest

from equipoise_lab.cores import num_cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        (None, 6),
        ("max 100000", 6),
        ("250000 100000", 2),  # the time of 2.5 cores: a third thread would wait for the others
        ("50000 100000", 1),
        ("1600000 100000", 6),
        ("", 6),
    ],
)
def test_num_cores_respects_affinity_and_container_quota(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota + "\n")
    assert num_cores(file) == cores
