"""The routers of a model: found, proven, observed and steered.

kind          how a router selects (``RouterKind``), and where its bias is kept (``Slot``)
adapter       how a router of a framework is called and read (``RouterAdapter``)
frameworks    which adapter reads the routers of a known framework
logits        the logits of a router that does not return them
find          the routers of a model
names         the modules of a model by the names that they have without wrappers
outputs       what a router's forward returns, and refusals of what it should not
stand_in      a router with random tensors in place of its weights
trial         runs of a stand-in with several biases
prove         how a router selects, found out by such runs
fingerprint   whether two routers are alike, so that one proof serves both
tap           where one router is observed and steered
arguments     reads the arguments of a model's forward: rows, padding, where sequences begin
tapped        puts taps on routers, and takes them off
steering      adds a bias to the top-k inside a forward, or replays a record
blocks        blocks that route by themselves, and their trial (``block_trial``)
gradient_paths  how the gradient of a loss reaches a router
shapes        shapes of weights that ZeRO-3 has partitioned
forward       the forwards under way: what each was called with, whether gradients are on
"""

from equipoise.routers.adapter import RouterAdapter
from equipoise.routers.kind import MoELayer, RouterKind, Slot

__all__ = ["MoELayer", "RouterAdapter", "RouterKind", "Slot"]
