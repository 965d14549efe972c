"""What is known of frameworks: which adapter reads their routers, and what a user does. Imports no framework."""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch import nn

from equipoise.routers.adapter import RouterAdapter


class Framework(NamedTuple):
    """A framework with MoE layers of its own.

    Attributes:
        module: of ours, which has its adapters by the names of the router classes, ``ROUTER_ADAPTERS``.
        package: its name on the package index.
        tested: its version that was tested.
        use: what a user imports or calls.
    """

    module: str
    package: str
    tested: str
    use: str


# By the first part of the name of a module of theirs.
FRAMEWORKS = {
    "torchtitan": Framework(
        "equipoise.integrations.torchtitan", "torchtitan", "0.3.0",
        "from equipoise.integrations.torchtitan import balanced",
    ),
    "megatron": Framework(
        "equipoise.integrations.megatron", "megatron-core", "0.19.2",
        "from equipoise.integrations.megatron import attach",
    ),
    "olmo_core": Framework(
        "equipoise.integrations.olmo_core", "ai2-olmo-core", "3.0.0",
        "from equipoise.integrations.olmo_core import EquipoiseCallback",
    ),
    "nemo_automodel": Framework(
        "equipoise.integrations.automodel", "nemo-automodel", "0.7.0",
        "from equipoise.integrations.automodel import balanced",
    ),
    "deepspeed": Framework(
        "equipoise.integrations.deepspeed", "deepspeed", "0.19.8",
        "from equipoise.integrations.deepspeed import follow_engine",
    ),
}  # fmt: skip


@cache
def framework_adapter(cls: Any) -> RouterAdapter | None:
    """The adapter of a class of routers, or of a class that it is derived from."""
    for base in cls.__mro__:
        framework = _framework(base)
        if framework is not None:
            adapters: dict[str, RouterAdapter] = import_module(framework.module).ROUTER_ADAPTERS
            if base.__name__ in adapters:
                return adapters[base.__name__]
    return None


def framework_of(model: nn.Module) -> Framework | None:
    """The framework that a module of the model comes from; None if it is of none that is known."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    return next((framework for base in classes if (framework := _framework(base)) is not None), None)


def advice(model: nn.Module) -> str:
    """For the message of a model that is refused: its framework, the version that was tested, what to use. Or ''."""
    framework = framework_of(model)
    if framework is None:
        return ""
    try:
        installed = version(framework.package)
    except PackageNotFoundError:
        installed = "of unknown version"
    page = framework.module.rpartition(".")[2]
    return (
        f" The model is of {framework.package} {installed}; {framework.tested} was tested. Use {framework.use}: "
        f"docs/how-to/{page}.md says what is refused there."
    )


def _framework(cls: Any) -> Framework | None:
    return FRAMEWORKS.get(cls.__module__.partition(".")[0])
