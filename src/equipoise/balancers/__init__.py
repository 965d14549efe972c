"""Mechanisms: what is done about an uneven load. One interface (``base``), one file a mechanism, and their strings."""

from equipoise.balancers.base import Balancer, LayerStack
from equipoise.balancers.load_balancing import LoadBalancingLoss, load_balancing_loss, sequence_load_balancing_loss
from equipoise.balancers.loss_free import Frozen, LossFree
from equipoise.balancers.quantile import Quantile, quantile_bias
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
    "quantile_bias",
    "sequence_load_balancing_loss",
    "z_loss",
]
