"""How often to save: what a checkpoint costs against what a failure would."""

from __future__ import annotations

import math


def checkpoint_interval(save_seconds: float, mtbf: float) -> float:
    """The seconds of training between two checkpoints that waste least on saves and on work done again. Local.

    Saves too rare lose much at a failure, saves too often cost more than they rescue. To first order the best interval
    is sqrt(2 * save_seconds * mtbf): J. W. Young, "A first order approximation to the optimum checkpoint interval",
    Communications of the ACM 17(9), 1974. This is the higher-order estimate of J. T. Daly, "A higher order estimate of
    the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22(3), 2006, equation 37,
    which also holds where a save takes a good part of the time between failures.

    Args:
        save_seconds: Seconds that training stands still for a save.
        mtbf: Mean seconds between two failures of the whole job: that of one node divided by the number of nodes.

    Raises:
        ValueError: One of them is not a finite number above 0.
    """
    for name, value in (("save_seconds", save_seconds), ("mtbf", mtbf)):
        require_seconds(name, value)
    if save_seconds >= 2 * mtbf:
        return float(mtbf)
    ratio = save_seconds / (2 * mtbf)
    young = math.sqrt(2 * save_seconds * mtbf)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def require_seconds(name: str, value: object) -> float:
    """Check a duration.

    Raises:
        ValueError: It is not a finite number above 0.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]  # a number
        raise ValueError(f"{name}: expected a number of seconds > 0. Got {value!r}.")
    return float(value)  # type: ignore[arg-type]  # a number
