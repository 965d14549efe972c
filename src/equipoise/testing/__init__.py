"""A conformance suite for your own balancers and models. It needs torch only and works with any test runner.

    import pytest
    from equipoise.testing import BALANCER_INVARIANTS, check_balancer

    @pytest.mark.parametrize("invariant", BALANCER_INVARIANTS)
    def test_my_balancer(invariant):
        check_balancer(lambda: MyBalancer(rate=1e-2), only=invariant)

``check_balancer`` checks one mechanism, ``check_routers`` the routers of one model under ``equipoise.attach``. If an
invariant does not hold they raise ``ConformanceError`` with its name, what must hold, what came, and the input.
"""

from equipoise.testing._common import ConformanceError
from equipoise.testing.balancers import BALANCER_INVARIANTS, check_balancer
from equipoise.testing.routers import ROUTER_INVARIANTS, check_routers

__all__ = ["BALANCER_INVARIANTS", "ConformanceError", "ROUTER_INVARIANTS", "check_balancer", "check_routers"]
