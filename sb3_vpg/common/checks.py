"""Checks of keyword values. Their errors name the keyword, the value and what is allowed."""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np

#: Modules of sb3-contrib's policies, and the class of this package that trains them
ALGORITHMS_OF_POLICIES = {
    "sb3_contrib.common.maskable.policies": "MaskableVPG",
    "sb3_contrib.common.recurrent.policies": "RecurrentVPG",
}


def check_choice(keyword: str, value: object, allowed: object) -> None:
    """
    Check that a value is one of a few choices.

    :param keyword: name of the keyword, for the error
    :param value: the value to check
    :param allowed: iterable of the allowed values
    :raises ValueError: if ``value`` is not one of ``allowed``
    """
    choices = list(allowed)  # type: ignore[call-overload]
    value = value.item() if isinstance(value, np.generic) else value
    # 1 == True and 0 == False: compare the types too
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{keyword}={value!r} is not allowed; choose one of {', '.join(map(repr, choices))}")


def check_known(keyword: str, value: object, known: Iterable[str], hint: str = "") -> None:
    """
    Check that a name is one of many.

    :param keyword: name of the keyword, for the error
    :param value: the name to check
    :param known: the known names
    :param hint: end of the error
    :raises ValueError: if ``value`` is not one of ``known``; the message has the nearest names
    """
    names = sorted(known)
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
        listed = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(map(repr, names[:30]))}"
        raise ValueError(f"{keyword}={value!r} is not known; {listed}{hint}")


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
    Check that a value is a number within a range.

    :param keyword: name of the keyword, for the error
    :param value: the value to check
    :param low: lower bound
    :param high: upper bound, included
    :param integer: whether the number must be an integer
    :param low_included: whether the lower bound itself is allowed
    :param infinite: whether positive infinity is allowed
    :param none: whether None is allowed
    :raises ValueError: if ``value`` is anything else
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


def check_policy_class(model: Any) -> None:
    """
    Check that the algorithm is the one for its policy.

    :param model: VPG or a subclass, before its policy is made
    :raises ValueError: if it is a policy of sb3-contrib for which there is a subclass of VPG
    """
    for base in getattr(model.policy_class, "__mro__", ()):
        needed = ALGORITHMS_OF_POLICIES.get(base.__module__)
        if needed is not None and needed not in {cls.__name__ for cls in type(model).__mro__}:
            name = model.policy_class.__name__
            raise ValueError(f"policy={name} is not allowed with {type(model).__name__}; allowed: {needed}")


def non_finite_update_error(name: str, value: float, update: int, timestep: int, policy_step_taken: bool) -> ValueError:
    """
    :param name: name of a loss or of the norm of a gradient
    :param value: its value
    :param update: number of the update, from 1
    :param timestep: number of timesteps so far
    :param policy_step_taken: whether the policy's step of this update was taken before
    :return: the error to raise
    """
    state = (
        "This gradient step was not taken, but the policy's step and earlier critic steps of this update were. The critic may "
        "have diverged: it is safer to continue from an earlier checkpoint."
        if policy_step_taken
        else "This gradient step was not taken: weights and optimizer are unchanged, and the model can be saved."
    )
    return ValueError(
        f"Non-finite {name.replace('_', ' ')} ({value}) in update {update} (timestep {timestep}). {state} "
        "The usual cause is very large rewards or observations: scale them, for example with VecNormalize, or lower the "
        "learning rate."
    )
