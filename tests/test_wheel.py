"""The wheel without extras: the library works with torch and jaxtyping alone, and says how to install the lab."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import equipoise

ROOT = Path(__file__).parents[1]

ATTACHES = """
import sys
import torch
import equipoise
from equipoise.nn import MoE

model = torch.nn.Sequential(torch.nn.Linear(4, 8), MoE(8, hidden=4, num_experts=4, k=2))
balance = equipoise.attach(model, "loss-free+lbl")
(model(torch.randn(6, 4)).square().mean() + balance.loss()).backward()
balance.step()
assert int(balance.load["1.router"].sum()) == 12
print(sorted({name.split(".")[0] for name in sys.modules} & {"numpy", "transformers", "equipoise_lab"}))
"""


def _requirements(lines: list[str]) -> list[Requirement]:
    """Those of an installation without extras."""
    return [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]


def _declared(metadata: str) -> list[Requirement]:
    return _requirements(re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE))


def _with_dependencies(requirements: list[Requirement]) -> set[str]:
    """The names of all distributions that a plain installation brings."""
    names: set[str] = set()
    while requirements:
        requirement = requirements.pop()
        name = requirement.name.lower().replace("_", "-")
        if name not in names:
            names.add(name)
            try:
                requirements += _requirements(distribution(name).requires or [])
            except PackageNotFoundError:  # of another platform
                continue
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the source distribution, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """An environment with the wheel and its dependencies, which are linked from this one: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("environment")
    (wheel,) = built.glob("equipoise-*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env"), "platbase": str(folder / "env")}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = archive.read(name).decode()
    for name in _with_dependencies(_declared(metadata)):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files if ".." not in file.parts}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    return folder / "env" / "bin" / "python"


def _run(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"PATH": "/usr/bin:/bin"})


def test_a_package_index_would_take_both_distributions(built):
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    assert all(file.name.startswith(f"equipoise-{equipoise.__version__}") for file in files)
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_wheel_holds_two_typed_packages_and_no_tests(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"equipoise", "equipoise_lab"}
    assert "equipoise/py.typed" in names and "equipoise_lab/py.typed" in names
    results = [name for name in names if name.startswith("equipoise_lab/reproduce/results/")]
    stored = {
        path.relative_to(ROOT / "benchmarks" / "results" / "claims").as_posix()
        for path in (ROOT / "benchmarks" / "results" / "claims").rglob("*.json")
    }
    assert {name.removeprefix("equipoise_lab/reproduce/results/") for name in results} == stored, "reproduce reads them"
    assert "equipoise_lab/reproduce/editions/first/page.toml" in names
    assert not [name for name in names if "test_" in name or "__pycache__" in name]


def test_the_library_attaches_to_a_model_from_another_folder(environment, tmp_path):
    done = _run(environment, "-W", "ignore", "-c", ATTACHES, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_without_the_lab_the_command_says_in_one_line_how_to_install_it(environment, tmp_path):
    done = _run(environment, "-m", "equipoise", "train", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"equipoise: error: .*pip install -e '.\[lab\]'\n", done.stderr), done.stderr


def test_the_environment_has_nothing_of_the_lab(environment, tmp_path):
    for name in ("numpy", "transformers", "tyro"):
        assert _run(environment, "-c", f"import {name}", folder=tmp_path).returncode == 1, name


def test_the_wheel_declares_torch_and_jaxtyping_only(environment):
    (metadata,) = (environment.parents[1] / "lib").rglob("equipoise-*.dist-info/METADATA")
    assert {requirement.name for requirement in _declared(metadata.read_text())} == {"torch", "jaxtyping"}
