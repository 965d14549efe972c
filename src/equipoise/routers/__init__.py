"""The routers of a model: found, proven, observed and steered.

kind          how a router selects (``RouterKind``), and where its bias is kept (``Slot``)
find          the routers of a model
prove         how a router selects, found out by experiment on a stand-in
fingerprint   whether two routers are alike, so that one proof serves both
tap           where one router is observed and steered
forward       what the model's forward was called with: padding, rows
"""

from equipoise.routers.kind import MoELayer, RouterKind, Slot

__all__ = ["MoELayer", "RouterKind", "Slot"]
