"""A conformance suite for your own balancers and models, with any test runner; needs torch only.

    import pytest
    from equipoise.testing import BALANCER_INVARIANTS, check_balancer

    @pytest.mark.parametrize("invariant", BALANCER_INVARIANTS)
    def test_my_balancer(invariant):
        check_balancer(lambda: MyBalancer(rate=1e-2), only=invariant)

``check_balancer`` tries one mechanism, ``check_tap`` the routers of one model under ``equipoise.attach``. An invariant
that breaks raises ``ConformanceError``: its name, what must hold, what came, with which input.
"""

from equipoise.testing._common import ConformanceError
from equipoise.testing.balancers import BALANCER_INVARIANTS, check_balancer
from equipoise.testing.taps import TAP_INVARIANTS, check_tap

__all__ = ["BALANCER_INVARIANTS", "ConformanceError", "TAP_INVARIANTS", "check_balancer", "check_tap"]
