"""Finds the smallest budget that reaches a target, and measures sweeps of budgets."""

import math
from collections.abc import Callable

from cora_plugin.adapters.errors import BudgetError
from cora_plugin.config import Budget
from cora_plugin.objective import Distance
from cora_plugin.plan import Plan, Planner
from cora_plugin.progress import bar

Measure = Callable[[Budget, Plan], Distance]
"""Tries a plan on the held-out images, and records the result for its budget."""

RANGE = 2**10
"""Ratio of the largest to the smallest budget that bisection considers."""

PRECISION = 1.03
"""Bisection stops when its bounds are within this ratio."""


def choose(
    planner: Planner,
    budget: Budget,
    sweep: tuple[float, ...],
    before: Distance,
    measure: Measure,
) -> Plan:
    """The plan of a budget, or of the smallest that reaches a target.

    Args:
        planner: Makes a plan of a budget.
        budget: The budget or target.
        sweep: Further amounts to measure, in the planner's unit.
        before: The model's distance without adapters.
        measure: Tries a plan.

    Raises:
        BudgetError: The budget buys no adapter or more than there is, or the target
            is out of reach.
    """
    for amount in bar(sweep, "budgets tried", "budget", brief=True):
        tried = Budget(amount, planner.unit)
        measure(tried, planner.within(tried))
    if not budget.is_target:
        return planner.within(budget)
    if reached(budget, before):
        return planner.nothing()
    return _smallest(planner, budget, measure)


def reached(target: Budget, distance: Distance) -> bool:
    """Whether a model that is this far from the float one reaches a target."""
    if target.unit == "agreement":
        return distance.agreement is not None and distance.agreement >= target.amount
    if target.unit == "dB":
        return distance.decibels is not None and distance.decibels >= target.amount
    return distance.value <= target.amount


def _smallest(planner: Planner, target: Budget, measure: Measure) -> Plan:
    """The plan of the smallest budget, in equivalent bits, that reaches a target."""
    whole = planner.whole
    best = planner.within(whole)
    distance = measure(whole, best)
    if not reached(target, distance):
        raise BudgetError(
            f"budget: {target} is out of reach: every residual whole, "
            f"+{whole.amount:.3g} bits a weight, ends at {distance}; ask for less, or "
            "quantize activations more finely"
        )
    low, high = whole.amount / RANGE, whole.amount
    halvings = math.ceil(math.log2(math.log(RANGE) / math.log(PRECISION)))
    for _ in bar(range(halvings), "budgets tried", "budget", brief=True):
        middle = math.sqrt(low * high)
        tried = Budget(middle, planner.unit)
        try:
            plan = planner.within(tried)
        except BudgetError:  # It buys no adapter.
            low = middle
            continue
        if reached(target, measure(tried, plan)):
            best, high = plan, middle
        else:
            low = middle
    return best
