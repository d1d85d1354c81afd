"""Checks of keywords, whose errors name the keyword, the value and what is allowed."""

import math
from numbers import Integral, Real


def check_choice(keyword: str, value: object, allowed: object) -> None:
    """
    :raises ValueError: if ``value`` is not one of ``allowed``, naming the keyword, the value and the choices
    """
    choices = list(allowed)  # type: ignore[call-overload]
    # 1 == True and 0 == False: compare the types too
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{keyword}={value!r} is not allowed; choose one of {', '.join(map(repr, choices))}")


def check_number(
    keyword: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    integer: bool = False,
    low_included: bool = True,
    infinite: bool = False,
    none: bool = False,
) -> None:
    """
    :raises ValueError: if ``value`` is not a number of the kind and range asked for, naming the keyword and both
    """
    if none and value is None:
        return
    ok = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    ok = ok and (math.isfinite(value) or (infinite and value == math.inf))  # type: ignore[arg-type]
    if not (ok and (low <= value if low_included else low < value) and value <= high):  # type: ignore[operator]
        kind = "an integer" if integer else "a number"
        bounds = [] if low == -math.inf else [f"{'>=' if low_included else '>'} {low}"]
        bounds += [] if high == math.inf else [f"<= {high}"]
        allowed = " ".join([kind, " and ".join(bounds)]).strip() + (" or None" if none else "")
        raise ValueError(f"{keyword}={value!r} is not allowed; it must be {allowed}")
