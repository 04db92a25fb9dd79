"""Find the machines for a deadline or a budget. Runs in the driver.

In: kinds of machines, a way to plan each fleet, hours or USD. Out: the best plan and the runner-up; UserError when none
meets it.
"""

from collections.abc import Callable, Iterable

from raytrain_brats.errors import UserError
from raytrain_brats.planning.closed_form import Plan
from raytrain_brats.planning.demand import Fleet
from raytrain_brats.planning.prices import Machine

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DATA_NODES = (0, 1, 2, 4, 8, 16, 32, 64)


def fleets(kinds: Iterable[Machine], data: Machine, head: Machine, spot: bool, most_gpus: int) -> list[Fleet]:
    """All that are looked at; none with a node whose GPUs would all idle."""
    return [
        Fleet(kind, nodes, data, data_nodes, head, spot)
        for kind in kinds
        for nodes in NODES
        if (nodes - 1) * kind.gpus < most_gpus
        for data_nodes in DATA_NODES
    ]


def best(
    candidates: Iterable[Fleet], plan_of: Callable[[Fleet], Plan], hours: float | None, usd: float | None
) -> tuple[Plan, Plan | None]:
    """By a deadline the cheapest, by a budget the fastest; and the next one of other training nodes. Spot counts by the
    highest price seen. Raises UserError when none meets it, with how near one comes."""
    plans = [p for p in map(plan_of, candidates) if p.usd is not None]
    if not plans:
        raise UserError(
            "none of these machines has a price of this kind in the price file; leave --spot away, or --gpus"
        )
    cheapest = sorted(plans, key=lambda p: (p.usd, p.seconds))
    fastest = sorted(plans, key=lambda p: (p.seconds, p.usd))
    if hours is not None:
        met = [p for p in cheapest if p.seconds <= 3600 * hours]
        nearest = f"the fastest takes {fastest[0].seconds / 3600:,.1f} hours: {_told(fastest[0])}"
    else:
        met = [p for p in fastest if (p.usd or 0.0) <= (usd or 0.0)]
        nearest = f"the cheapest is {_told(cheapest[0])}"
    if not met:
        wanted = f"--deadline {hours:g}" if hours is not None else f"--budget {usd:g}"
        raise UserError(f"no plan meets {wanted}; {nearest}")
    first = met[0]
    others = [p for p in met if (p.fleet.train.kind, p.fleet.nodes) != (first.fleet.train.kind, first.fleet.nodes)]
    return first, others[0] if others else None


def _told(plan: Plan) -> str:
    return f"{plan.fleet}, {plan.usd:,.0f} USD, limited by {plan.bottleneck}"
