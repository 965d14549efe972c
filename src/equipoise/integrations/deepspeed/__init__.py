"""Balancing under DeepSpeed: windows that close with the engine's steps, and DeepSpeed's own routers.

    balance = equipoise.attach(model, "loss-free:rate=1e-3")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    follow_engine(balance, engine)

This package does not import DeepSpeed. Seen with DeepSpeed 0.19.8.
"""

from equipoise.integrations.deepspeed.engine import FollowedEngine, follow_engine
from equipoise.integrations.deepspeed.routers import ROUTER_ADAPTERS

__all__ = ["ROUTER_ADAPTERS", "FollowedEngine", "follow_engine"]
