"""What gradient statistics are compared by."""

from dataclasses import fields

import torch as th

from sb3_vpg.diagnostics import statistics_of

NAMES = [field.name for field in fields(statistics_of(th.eye(2)))]


def values(statistics):
    return {name: getattr(statistics, name).value for name in NAMES}
