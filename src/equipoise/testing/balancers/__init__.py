"""The invariants of a balancer, tried on random routers of every score function."""

from collections.abc import Callable, Sequence

from equipoise.balancers import Balancer
from equipoise.errors import check_choice
from equipoise.routing import SCORE_FUNCTIONS, ScoreFunction
from equipoise.testing._common import run_invariants
from equipoise.testing.balancers import device, loss, specification, state, statistic, update
from equipoise.testing.balancers._windows import EXPERTS, Factory, K

__all__ = ["BALANCER_INVARIANTS", "check_balancer"]

_INVARIANTS: dict[str, Callable[[Factory, ScoreFunction], None]] = {
    "specification": specification.stays_a_specification,
    "copies": specification.can_be_copied,
    "strategy string": specification.has_a_strategy_string,
    "bias is the state": state.bias_is_the_state,
    "float64 stays": state.stays_float64,
    "resumes from its state": state.resumes,
    "statistic": statistic.has_a_fixed_form,
    "inputs unchanged": statistic.leaves_inputs_unchanged,
    "finite": update.stays_finite,
    "huge counts": update.handles_huge_counts,
    "no tokens move nothing": update.ignores_empty_windows,
    "even load moves nothing": update.keeps_an_even_load,
    "layers do not mix": update.separates_layers,
    "experts permute": update.permutes_with_experts,
    "deterministic": update.is_deterministic,
    "any division of the tokens": update.is_independent_of_the_division,
    "masked tokens do not matter": update.ignores_masked_tokens,
    "moves against the load": update.moves_against_the_load,
    "loss finite": loss.is_finite,
    "loss gradient by the logits only": loss.has_gradient_by_logits_only,
    "loss derivative": loss.has_the_right_derivative,
    "loss of masked tokens": loss.ignores_masked_tokens,
    "loss is a mean over tokens": loss.is_a_mean_over_tokens,
    "loss permutes": loss.is_independent_of_expert_order,
    "loss dtype": loss.has_the_right_dtype,
    "loss without its coefficient": loss.leaves_the_coefficient_out,
    "loss slopes": loss.has_slopes_that_agree,
    "no host synchronisation": device.never_synchronises,
}
BALANCER_INVARIANTS: tuple[str, ...] = tuple(_INVARIANTS)
"""The names of all invariants of a balancer, for ``check_balancer(..., only=name)``."""


def check_balancer(
    factory: Factory, *, only: str | None = None, score_functions: Sequence[ScoreFunction] = SCORE_FUNCTIONS
) -> tuple[str, ...]:
    """Checks every invariant of one balancer, or ``only`` one.

    Args:
        factory: makes the balancer, unprepared; it is called several times. Its rate should be large enough to even
            the load out within 200 windows, and small enough not to make it swing.
        only: one of ``BALANCER_INVARIANTS``.
        score_functions: those that the balancer is for; all by default.

    Returns:
        The names of the invariants that apply to it.

    Raises:
        ConformanceError: at the first that does not hold.
        TypeError: ``factory`` makes no balancer.
        ValueError: ``only`` is not an invariant, or ``score_functions`` are none.

    Examples:
        >>> from equipoise import ZLoss
        >>> check_balancer(ZLoss, only="loss derivative")
        ('loss derivative',)
    """
    if not callable(factory):
        raise TypeError(
            f"factory must be a function that makes a balancer, as `lambda: {type(factory).__name__}()`: got an object."
        )
    if isinstance(score_functions, str) or not score_functions:
        raise ValueError(
            f"score_functions must be a list of one or more of {', '.join(SCORE_FUNCTIONS)}: got {score_functions!r}. "
            "Write ['sigmoid'], or leave it out."
        )
    for score_function in score_functions:
        check_choice("score_functions", score_function, SCORE_FUNCTIONS)
    balancer = factory()
    if not isinstance(balancer, Balancer):
        raise TypeError(f"factory must make a Balancer: got {type(balancer).__name__}.")
    return run_invariants(
        _INVARIANTS,
        only,
        [
            ({"score_function": score_function, "experts": EXPERTS, "k": K}, (factory, score_function))
            for score_function in score_functions
        ],
    )
