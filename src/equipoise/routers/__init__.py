"""Somebody's routers: find them, prove how they choose, observe and steer them.

``tap`` is where one router is observed and steered; ``find`` looks for the routers of a model; ``prove`` finds out by
experiment how a router chooses; ``forward`` keeps what the model's forward was called with (padding, rows).
"""

from equipoise.routers.tap import RouterKind

__all__ = ["RouterKind"]
