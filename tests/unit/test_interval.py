"""The best time between two checkpoints, against the cost that it is to make least."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distckpt.cluster import checkpoint_interval


def wasted(interval: float, save_seconds: float, mtbf: float) -> float:
    """Seconds of wall time per second of training, with failures at random (Daly's complete model, equation 13)."""
    return mtbf * math.expm1((interval + save_seconds) / mtbf) / interval


@pytest.mark.parametrize("save_seconds", [0.01, 1.0, 60.0, 600.0, 3600.0])
@pytest.mark.parametrize("mtbf", [3600.0, 86400.0, 30 * 86400.0])
def test_no_other_interval_wastes_noticeably_less(save_seconds: float, mtbf: float) -> None:
    best = wasted(checkpoint_interval(save_seconds, mtbf), save_seconds, mtbf)
    others = [wasted(0.001 * 1.01**n, save_seconds, mtbf) for n in range(2200) if 0.001 * 1.01**n < 20 * mtbf]
    assert best <= min(others) * 1.005


def test_it_is_youngs_where_saves_are_cheap() -> None:
    assert checkpoint_interval(1.0, 1e8) == pytest.approx(math.sqrt(2e8), rel=1e-3)
    assert checkpoint_interval(60.0, 86400.0) == pytest.approx(3180.0, rel=0.01)


def test_saves_longer_than_the_time_between_failures() -> None:
    assert checkpoint_interval(500.0, 100.0) == 100.0


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, "60", None, True])
@pytest.mark.parametrize("name", ["save_seconds", "mtbf"])
def test_bad_values(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number of seconds > 0"):
        checkpoint_interval(**({"save_seconds": 1.0, "mtbf": 1.0} | {name: bad}))
