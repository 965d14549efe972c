"""Imports flow one way. A module may import only what stands before it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "equipoise"

CORE = [
    "errors",
    "recipes",
    "routing",
    "load",
    "metrics",
    "alerts",
    "balancers",
    "taps",
    "pool",
    "saved",
    "exchange",
    "window",
    "recorder",
    "balance",
]
CORE += ["attachment"]
ALLOWED = {name: set(CORE[:rank]) for rank, name in enumerate(CORE)}
ALLOWED |= {
    "grouped": {"routing"},
    "nn": {"errors", "routing", "load", "taps", "grouped"},
    "testing": {"equipoise", *CORE},
    "integrations": {*CORE, "grouped"},
    "export": {*CORE},
    "audit": {*CORE, "experts", "records", "lab", "catalogue"},  # of the lab its reader of text
    "catalogue": {*CORE},
    "cores": set(),
    "records": {"errors"},
    "analysis": {"errors", "records"},
    "report": {"errors", "records", "analysis"},
    "experts": {*CORE, "analysis", "records"},
    "lab": {"equipoise", *CORE, "nn", "integrations", "experts", "records", "analysis", "report", "cores"},
    "reproduce": {"errors", "records", "analysis", "cores"},
    "cli": {"equipoise", *CORE, "audit", "catalogue", "export", "records", "report", "lab", "reproduce"},
    "__init__": {*CORE, "integrations", "nn", "testing"},  # lazily, by name
    "__main__": {"cli"},
}
TORCH_FREE = ["records", "report", "recipes", "analysis"] + (["cli"] if (ROOT / "cli.py").exists() else [])


def _places() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def _part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def equipoise_imports(source: str) -> Iterator[str]:
    """The parts of equipoise that a source imports; walks into functions: a lazy import counts too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            elif node.module == "equipoise":
                names = [alias.name for alias in node.names]
                yield from (
                    name if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists() else "equipoise" for name in names
                )
            elif node.module.startswith("equipoise."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "equipoise":
                    yield "equipoise"
                elif alias.name.startswith("equipoise."):
                    yield alias.name.split(".")[1]


def upward(part: str, source: str) -> set[str]:
    return set(equipoise_imports(source)) - ALLOWED[part] - {part}


@pytest.mark.parametrize("path", _places(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    part = _part(path)
    assert part in ALLOWED, f"equipoise.{part} has no place in the order of imports: give it one in this file"
    wrong = upward(part, path.read_text(encoding="utf-8"))
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}: allowed only {sorted(ALLOWED[part])}"


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("routing", "import equipoise.balance", {"balance"}),
        ("routing", "from equipoise.load import expert_load", {"load"}),
        ("metrics", "from equipoise import balance", {"balance"}),
        ("metrics", "from equipoise import attach", {"equipoise"}),
        ("attachment", "import equipoise", {"equipoise"}),
        ("balance", "from equipoise import metrics", set()),
        ("load", "def f():\n    from equipoise.balance import attach", {"balance"}),
        ("load", "if True:\n    import equipoise.taps.tap as t", {"taps"}),
        ("balancers", "from . import base", {"."}),
        ("balancers", "from ..routing import route", {".."}),
        ("records", "from equipoise.metrics import max_violation", {"metrics"}),
        ("report", "from equipoise.lab import data", {"lab"}),
        ("analysis", "from equipoise import report", {"report"}),
        ("balance", "from equipoise.lab import data", {"lab"}),
        ("balance", "from equipoise.routing import route\nimport torch", set()),
        ("lab", "from equipoise import attach, records", set()),
    ],
)
def test_the_check_of_imports_can_fail(part, source, wrong):
    assert upward(part, source) == wrong


@pytest.mark.parametrize("path", _places(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_blinds_the_shape_checker(path):
    assert "from __future__ import annotations" not in path.read_text(encoding="utf-8")


def _imported(statement: str, *names: str) -> str:
    code = f"import sys\n{statement}\nprint([n for n in {names!r} if n in sys.modules])"
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("part", TORCH_FREE)
def test_what_reads_runs_imports_no_torch(part):
    assert _imported(f"import equipoise.{part}", "torch", "transformers") == "[]"


def test_the_check_of_torch_can_fail():
    assert _imported("import equipoise.routing", "torch", "transformers") == "['torch']"


def test_the_core_imports_no_transformers():
    assert _imported("import equipoise.balance", "transformers", "accelerate", "datasets") == "[]"


def test_an_integration_imports_what_it_is_for_by_name_only():
    assert _imported("import equipoise.integrations", "transformers", "accelerate", "peft") == "[]"
    found = _imported("import equipoise; equipoise.integrations.EquipoiseCallback", "transformers", "peft")
    assert "transformers" in found
