"""Balancing in OLMo-core: its routers, and a callback for its ``Trainer``.

    from equipoise.integrations.olmo_core import EquipoiseCallback

    trainer_config = trainer_config.with_callback("equipoise", EquipoiseCallback("loss-free:rate=1e-3"))

The callback needs OLMo-core; what reads its routers does not import it.
"""

from typing import TYPE_CHECKING, Any

from equipoise.integrations.framework_import import explained
from equipoise.integrations.olmo_core.routers import ROUTER_ADAPTERS

__all__ = ["ROUTER_ADAPTERS", "EquipoiseCallback"]

if TYPE_CHECKING:
    from equipoise.integrations.olmo_core.callback import EquipoiseCallback


def __getattr__(name: str) -> Any:
    if name != "EquipoiseCallback":
        raise AttributeError(f"module 'equipoise.integrations.olmo_core' has no attribute {name!r}")
    with explained(name, "olmo_core", "ai2-olmo-core", "3.0"):
        from equipoise.integrations.olmo_core import callback
    return callback.EquipoiseCallback
