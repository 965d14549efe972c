"""Balancing in torchtitan: its routers, and a ``Trainer`` that balances.

    from equipoise.integrations.torchtitan import balanced

    config = balanced(config, "loss-free:rate=1e-3")  # in a function of the config registry

``balanced`` needs torchtitan; what reads its routers does not import it.
"""

from equipoise.integrations.torchtitan.config import balanced
from equipoise.integrations.torchtitan.routers import ROUTER_ADAPTERS

__all__ = ["ROUTER_ADAPTERS", "balanced"]
