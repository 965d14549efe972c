"""The library knows nothing of the lab, imports flow one way, and the library needs torch and jaxtyping only."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# Each place may import those before it in its list, and itself.
LIBRARY = [
    "errors",
    "_text",
    "torch_internals",
    "model_loss",
    "recipes",
    "kernels",
    "routing",
    "load",
    "metrics",
    "_remedies",
    "alerts",
    "balancers",
    "routers",
    "saved",
    "counting",
    "balance",
    "attachment",
]
LAB = ["cores", "paths", "records", "analysis", "report", "experts", "models", "train", "audit", "reproduce"]
LAB += ["conformance", "cli"]

ALLOWED = {f"equipoise.{name}": {f"equipoise.{other}" for other in LIBRARY[:rank]} for rank, name in enumerate(LIBRARY)}
CORE = {f"equipoise.{name}" for name in LIBRARY}
PUBLIC = {"equipoise", "equipoise.integrations", "equipoise.nn", "equipoise.testing", *CORE}
ALLOWED |= {
    "equipoise.nn": {f"equipoise.{name}" for name in ("errors", "torch_internals", "routing", "load", "routers")},
    "equipoise.testing": {"equipoise", *CORE},
    "equipoise.integrations": {*CORE, "equipoise.nn"},
    "equipoise": PUBLIC,  # __init__: imported when first used
    "equipoise.__main__": {"equipoise_lab.cli"},
    "equipoise_lab": set(),
}
ALLOWED |= {
    f"equipoise_lab.{name}": {*PUBLIC, *(f"equipoise_lab.{other}" for other in LAB[:rank])}
    for rank, name in enumerate(LAB)
}
READS_RUNS = {"equipoise.errors", "equipoise_lab.records", "equipoise_lab.analysis", "equipoise_lab.cores"}
READS_RUNS |= {"equipoise_lab.paths", "equipoise.recipes"}
for reader in ("records", "analysis", "report", "reproduce"):  # they import no torch
    ALLOWED[f"equipoise_lab.{reader}"] &= READS_RUNS

TORCH_FREE = [
    "equipoise",
    "equipoise.errors",
    "equipoise.recipes",
    *(f"equipoise_lab.{name}" for name in ("records", "report", "analysis", "reproduce", "cli")),
]


def _sources() -> list[Path]:
    return sorted(path for path in SRC.rglob("*.py"))


def _place(path: Path) -> str:
    """``equipoise.load`` of a module, ``equipoise.routers`` of all modules of a subpackage."""
    parts = path.relative_to(SRC).with_suffix("").parts[:2]
    return ".".join(part for part in parts if part != "__init__")


def _place_of_module(name: str) -> str:
    return ".".join(name.split(".")[:2])


def imported_places(source: str) -> Iterator[str]:
    """The places that a source imports; walks into functions: a lazy import counts too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level
        elif isinstance(node, ast.ImportFrom) and node.module in ("equipoise", "equipoise_lab"):
            for alias in node.names:
                inside = SRC / node.module / alias.name
                is_module = inside.is_dir() or inside.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("equipoise", "equipoise_lab"):
            yield _place_of_module(node.module or "")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("equipoise", "equipoise_lab"):
                    yield _place_of_module(alias.name)


def wrong_imports(place: str, source: str) -> set[str]:
    return set(imported_places(source)) - ALLOWED[place] - {place}


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_flow_one_way(path):
    place = _place(path)
    assert place in ALLOWED, f"{place} has no place in the order of imports: give it one in this file"
    wrong = wrong_imports(place, path.read_text(encoding="utf-8"))
    assert not wrong, f"{path.relative_to(SRC)} imports {sorted(wrong)}: allowed only {sorted(ALLOWED[place])}"


def test_the_library_imports_nothing_of_the_lab():
    of_library = {place: allowed for place, allowed in ALLOWED.items() if not place.startswith("equipoise_lab")}
    may_import_lab = [place for place, allowed in of_library.items() if "equipoise_lab" in " ".join(allowed)]
    assert may_import_lab == ["equipoise.__main__"]


@pytest.mark.parametrize(
    ("place", "source", "wrong"),
    [
        ("equipoise.routing", "import equipoise.balance", {"equipoise.balance"}),
        ("equipoise.routing", "from equipoise.load import expert_load", {"equipoise.load"}),
        ("equipoise.metrics", "from equipoise import balance", {"equipoise.balance"}),
        ("equipoise.metrics", "from equipoise import attach", {"equipoise"}),
        ("equipoise.attachment", "import equipoise", {"equipoise"}),
        ("equipoise.balance", "from equipoise import metrics", set()),
        ("equipoise.load", "def f():\n    from equipoise.balance import Balance", {"equipoise.balance"}),
        ("equipoise.load", "if True:\n    import equipoise.routers.tap as t", {"equipoise.routers"}),
        ("equipoise.balancers", "from . import base", {"."}),
        ("equipoise.balancers", "from ..routing import route", {".."}),
        ("equipoise.balance", "from equipoise_lab.train import data", {"equipoise_lab.train"}),
        ("equipoise.balance", "from equipoise_lab import records", {"equipoise_lab.records"}),
        ("equipoise.balance", "from equipoise.routing import route\nimport torch", set()),
        ("equipoise_lab.records", "from equipoise.metrics import max_violation", {"equipoise.metrics"}),
        ("equipoise_lab.report", "from equipoise_lab.train import data", {"equipoise_lab.train"}),
        ("equipoise_lab.analysis", "from equipoise_lab import report", {"equipoise_lab.report"}),
        ("equipoise_lab.train", "from equipoise import attach\nfrom equipoise_lab import records", set()),
    ],
)
def test_the_check_of_imports_can_fail(place, source, wrong):
    assert wrong_imports(place, source) == wrong


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(SRC)))
def test_no_module_blinds_the_shape_checker(path):
    assert "from __future__ import annotations" not in path.read_text(encoding="utf-8")


def private_attributes(source: str) -> set[str]:
    """The names with one leading underscore that a source gives to attributes and methods of its own objects."""
    tree = ast.parse(source)
    methods = {
        node.name
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.FunctionDef)
    }
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return {name for name in methods | attributes if name.startswith("_") and not name.startswith("__")}


def foreign_private_uses(source: str, private: set[str]) -> list[str]:
    """Where a source reads or writes a private attribute of another object."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in private
        and ast.unparse(node.value) not in ("self", "cls", "super()")
    ]


PRIVATE = set().union(*(private_attributes(path.read_text(encoding="utf-8")) for path in _sources()))
OF_OTHERS = {"_apply", "_load_from_state_dict"}  # methods of torch.nn.Module that subclasses of ours override


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(SRC)))
def test_nobody_touches_a_private_attribute_of_another_object(path):
    assert foreign_private_uses(path.read_text(encoding="utf-8"), PRIVATE - OF_OTHERS) == []


def test_the_check_of_private_attributes_can_fail():
    assert "_window" in PRIVATE
    assert foreign_private_uses("callback.balance._window.close()", {"_window"}) == ["line 1: callback.balance._window"]
    assert foreign_private_uses("self._window.close(); torch._C.x", {"_window"}) == []


def _third_party(path: Path) -> set[str]:
    """The packages that a module imports at its top level, besides our own and Python's."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"equipoise", "equipoise_lab"}


def test_the_library_imports_nothing_but_torch_and_jaxtyping():
    """Integrations import the framework that they are for; nothing imports them but their user. Kernels import Triton,
    and are imported by functions that were asked for them."""
    kernels = SRC / "equipoise" / "kernels.py"
    of_library = [path for path in (SRC / "equipoise").rglob("*.py") if "integrations" not in path.parts]
    assert set().union(*(_third_party(path) for path in of_library if path != kernels)) == {"torch", "jaxtyping"}
    assert _third_party(kernels) == {"torch", "jaxtyping", "triton"}
    for path in of_library:
        at_import = "\n".join(ast.unparse(node) for node in ast.parse(path.read_text(encoding="utf-8")).body
                              if isinstance(node, ast.Import | ast.ImportFrom))  # fmt: skip
        assert "equipoise.kernels" not in set(imported_places(at_import)), path


def _imported(statement: str, *names: str) -> str:
    code = f"import sys\n{statement}\nprint([n for n in {names!r} if n in sys.modules])"
    environment = {"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("place", TORCH_FREE)
def test_what_answers_at_once_imports_no_torch(place):
    assert _imported(f"import {place}", "torch", "transformers") == "[]"


def test_the_check_of_torch_can_fail():
    assert _imported("import equipoise.routing", "torch", "transformers") == "['torch']"


def test_the_core_imports_no_transformers():
    assert _imported("import equipoise.balance", "transformers", "accelerate", "datasets") == "[]"


def test_an_integration_imports_what_it_is_for_by_name_only():
    assert _imported("import equipoise.integrations", "transformers", "accelerate", "peft") == "[]"
    found = _imported("import equipoise; equipoise.integrations.EquipoiseCallback", "transformers", "peft")
    assert "transformers" in found


def test_the_modules_of_tests_benchmarks_and_tools_have_names_of_their_own():
    """They are imported by name from several folders. Of two with one name a process may get either."""
    root = SRC.parent
    tools = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folders = tools["pytest"]["ini_options"]["pythonpath"]
    names = Counter(path.name for folder in folders for path in (root / folder).glob("*.py"))
    assert [name for name, times in names.items() if times > 1 and name != "__init__.py"] == []
