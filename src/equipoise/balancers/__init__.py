"""The balancing mechanisms: one interface (``base``), one file per mechanism, and strategy strings (``strategy``)."""

from equipoise.balancers.base import Balancer, LayerStack
from equipoise.balancers.load_balancing import LoadBalancingLoss, load_balancing_loss, sequence_load_balancing_loss
from equipoise.balancers.loss_free import Frozen, LossFree
from equipoise.balancers.quantile import Quantile
from equipoise.balancers.strategy import format_strategy, parse_strategy
from equipoise.balancers.z_loss import ZLoss, z_loss

__all__ = [
    "Balancer",
    "Frozen",
    "LayerStack",
    "LoadBalancingLoss",
    "LossFree",
    "Quantile",
    "ZLoss",
    "format_strategy",
    "load_balancing_loss",
    "parse_strategy",
    "sequence_load_balancing_loss",
    "z_loss",
]
