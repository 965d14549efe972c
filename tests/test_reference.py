"""The reference lists every public name, docstrings say what their signatures need, generated parts are up to date."""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import commands_page
import generated
import griffe
import power_page
import pytest
import recipes_page
import strategies_page
import testing_page

import equipoise

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = Path(equipoise.__file__).parents[1]
EXTENSION = DOCS / "tools" / "griffe_types.py"
MODULES = ("", ".alerts", ".balancers", ".integrations", ".metrics", ".nn", ".recipes", ".routers", ".testing")
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
WIDTH = 86  # characters of a line of code that a page shows without scrolling, at 1300 pixels


def _paths():
    """The public names with their modules. A name of ``equipoise`` itself comes first."""
    for module in MODULES:
        for name in importlib.import_module(f"equipoise{module}").__all__:
            yield f"equipoise{module}.{name}"


@functools.cache
def _resolve(path):
    """The object at a path as mkdocstrings reads it: a module goes before an attribute of the same name."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[length:], found)
    raise ImportError(path)


def _directives():
    return [path for page in sorted((DOCS / "reference").glob("*.md")) for path in DIRECTIVE.findall(page.read_text())]


def _public(path):
    """The object of a public name, as a user imports it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


PATHS = list({id(_public(path)): path for path in reversed(list(_paths()))}.values())[::-1]  # each object once
CLASSES = [path for path in PATHS if inspect.isclass(_public(path))]
FUNCTIONS = [path for path in PATHS if inspect.isfunction(inspect.unwrap(_public(path)))]


def _members(path):
    """(name, function) of the public methods and properties that a class adds. A hook is documented by its class."""
    cls = _public(path)
    for name, value in vars(cls).items():
        value = value.fget if isinstance(value, property) else value
        value = inspect.unwrap(value) if callable(value) else value
        is_hook = name != "forward" and any(hasattr(base, name) for base in cls.__mro__[1:-1])
        if not name.startswith("_") and inspect.isfunction(value) and not is_hook:
            yield name, value


CALLABLES = [(path, _public(path)) for path in FUNCTIONS]
CALLABLES += [(f"{path}.{name}", function) for path in CLASSES for name, function in _members(path)]
every_callable = pytest.mark.parametrize(("path", "function"), CALLABLES, ids=[path for path, _ in CALLABLES])


# ---- every name is on a page ----


def test_every_public_name_is_on_a_page_of_the_reference():
    shown = {id(_resolve(path)) for path in _directives()}
    assert not [path for path in PATHS if id(_public(path)) not in shown]


def test_a_directive_names_one_object_and_no_module():
    """A module that has the name of its function would be rendered in its place."""
    directives = _directives()
    assert len(directives) > 40 and not [path for path in directives if inspect.ismodule(_resolve(path))]
    assert len({id(_resolve(path)) for path in directives}) == len(directives)


def test_every_page_of_the_reference_begins_with_its_title_and_says_what_it_is():
    for page in sorted((DOCS / "reference").glob("*.md")):
        title, blank, first = page.read_text().splitlines()[:3]
        assert title.startswith("# ") and not blank and re.match(r"[A-Z`]", first), page.name


# ---- docstrings ----


def _names(function):
    parameters = inspect.signature(function).parameters
    return [name for name in parameters if name not in ("self", "cls")]


def _missing(names, docstring):
    return [name for name in names if not re.search(rf"\b{name}\b", docstring)]


@every_callable
def test_a_function_has_a_docstring_that_names_its_parameters(path, function):
    assert function.__doc__ and function.__doc__[0] != " ", path
    assert not _missing(_names(function), function.__doc__), path


@pytest.mark.parametrize("path", CLASSES)
def test_a_class_has_a_docstring_that_names_what_it_is_made_of(path):
    cls = _public(path)
    assert cls.__doc__ and cls.__doc__[0] != " "
    is_tuple = issubclass(cls, tuple)
    is_made_by_users = "__init__" in vars(cls) and cls is not equipoise.Balance  # attach makes that one
    names = cls._fields if is_tuple else _names(cls) if is_made_by_users else ()
    assert not _missing(names, cls.__doc__), path


@every_callable
def test_a_function_that_raises_an_error_of_ours_names_it(path, function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    raised &= {"EquipoiseError", "UsageError", "ConformanceError"}
    assert not _missing(raised, function.__doc__ or ""), path


# ---- how they are rendered ----


@pytest.fixture(scope="module")
def package():
    extensions = griffe.load_extensions(str(EXTENSION))
    return griffe.load(
        "equipoise", search_paths=[SOURCE], extensions=extensions, docstring_parser="google", allow_inspection=False
    )


def _documented(package):
    """The objects that the reference shows, with their members."""
    for path in _directives():
        shown = package[path.removeprefix("equipoise.")]
        shown = shown.final_target if shown.is_alias else shown
        yield shown
        if shown.is_class:
            yield from (member for name, member in shown.members.items() if not name.startswith("_"))


@pytest.mark.slow
def test_docstrings_are_read_as_they_are_meant(package):
    num_examples = 0
    for shown in _documented(package):
        for section in shown.docstring.parsed if shown.docstring else ():
            if section.kind is griffe.DocstringSectionKind.parameters:
                names = {parameter.name.lstrip("*") for parameter in shown.parameters}
                assert {parameter.name for parameter in section.value} <= names, shown.path
            if section.kind is griffe.DocstringSectionKind.examples:
                num_examples += 1
                code = [line for _, text in section.value for line in text.splitlines()]
                assert max(map(len, code)) <= WIDTH, f"{shown.path}: {max(code, key=len)}"
            if section.kind is griffe.DocstringSectionKind.text:
                assert ">>>" not in section.value, f"{shown.path}: an example must stand under Examples:"
                code = re.findall(r"^    .*", section.value, re.MULTILINE)
                assert max(map(len, code), default=0) <= 4 + WIDTH, f"{shown.path}: {max(code, key=len)}"
            assert section.kind is not griffe.DocstringSectionKind.admonition, f"{shown.path}: {section.title}"
    assert num_examples >= 10


@pytest.mark.slow
def test_signatures_show_no_private_names_and_no_blanks(package):
    num_shapes = 0
    for shown in _documented(package):
        annotations = [shown.annotation] if shown.is_attribute else []
        if shown.is_function:
            annotations = [shown.returns, *(parameter.annotation for parameter in shown.parameters)]
        for text in map(str, filter(None, annotations)):
            assert not re.search(r"\b_\w|[\"'] |\b(Load|Factory|Where|BiasesOrPath|Scope|Rule)\b", text), (
                shown.path,
                text,
            )
            num_shapes += '[Tensor, "' in text
    assert num_shapes > 20


@pytest.mark.slow
def test_annotations_are_written_out(package):
    rule = package["balancers.loss_free.LossFree"].parameters["rule"].annotation
    assert str(rule).startswith("Literal['sign', 'proportional', ") and str(rule).endswith("] | None")
    assert str(package["balance.Balance.detach"].returns) == 'dict[str, Float[Tensor, "experts"]]'
    kind = package["routers.kind.RouterKind"]
    assert [parameter.name for parameter in kind.parameters] == ["self", *equipoise.RouterKind._fields]
    assert str(kind.parameters["slot"].annotation) == "str | None" and kind.parameters["slot"].default == "None"


# ---- generated parts ----

TOOLS = (commands_page, power_page, recipes_page, strategies_page, testing_page)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_the_generated_parts_are_up_to_date(tool):
    generated.main(tool.PAGE, tool.markdown(), ["--check"])


def test_a_page_that_is_out_of_date_is_noticed_and_mended(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- part -->\nold\n<!-- end of part -->\n\nEnd.\n")
    with pytest.raises(SystemExit, match=r"page.md is out of date. Run: python docs/tools/"):
        generated.main(page, {"part": "new"}, ["--check"])
    assert "old" in page.read_text()
    generated.main(page, {"part": "new"}, [])
    assert page.read_text() == "# Page\n\n<!-- part -->\n\nnew\n\n<!-- end of part -->\n\nEnd.\n"
    generated.main(page, {"part": "new"}, ["--check"])


def test_the_page_of_strategies_has_what_the_parser_knows():
    text = strategies_page.PAGE.read_text()
    for balancer in (*strategies_page.BALANCERS.values(), *strategies_page.LAB_BALANCERS):
        assert f"| `{balancer.name}` |" in text
        for option in inspect.signature(balancer).parameters:
            assert f"| `{option}` |" in text
    assert strategies_page._allowed(equipoise.Quantile, "bins") == "0, or a power of two from 128 to 1,048,576"
    assert strategies_page._allowed(equipoise.Quantile, "fraction") == "above 0 to 1"


def test_the_page_of_commands_has_the_options_of_the_help():
    text = commands_page.PAGE.read_text()
    assert re.findall(r"^## equipoise (.*)$", text, re.MULTILINE) == [
        "compare", "train", "report", "recipes", "reproduce", "audit", "export-check", "families",
        "conformance",
    ]  # fmt: skip
    assert "| `--steps` INT | Optimizer steps.<br>Default: `80`. |" in text
    assert "| `--out` PATH | Output folder. It must be new or empty, except with `--resume`.<br>Required. |" in text
    assert "<br>One of `auto`, `softmax`, `sigmoid`. Default: `auto`. |" in text
    assert "| `--json` | Print JSON. |" in text
    assert text.count("expert-choice\\[:chunk=TOKENS\\]") == 2  # brackets would be a link
