"""Which adapter reads the routers of a known framework: by the name of their class. Imports no framework."""

from functools import cache
from importlib import import_module
from typing import Any

from equipoise.routers.adapter import RouterAdapter

# The first part of a module's name, and the module of ours that knows its routers, by the names of their classes.
_FRAMEWORKS = {
    "deepspeed": "equipoise.integrations.deepspeed",
    "torchtitan": "equipoise.integrations.torchtitan",
    "megatron": "equipoise.integrations.megatron",
    "olmo_core": "equipoise.integrations.olmo_core",
    "nemo_automodel": "equipoise.integrations.automodel",
}


@cache
def framework_adapter(cls: Any) -> RouterAdapter | None:
    """The adapter of a class of routers, or of a class that it is derived from."""
    for base in cls.__mro__:
        module = _FRAMEWORKS.get(base.__module__.partition(".")[0])
        if module is not None:
            adapters: dict[str, RouterAdapter] = import_module(module).ROUTER_ADAPTERS
            if base.__name__ in adapters:
                return adapters[base.__name__]
    return None
