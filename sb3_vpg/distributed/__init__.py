"""Data-parallel training: several processes, on one or several machines, train one model."""

from sb3_vpg.common.collectives import ProcessGroup, current_processes
from sb3_vpg.common.progress_bar import AllRanksProgressBar

__all__ = ["AllRanksProgressBar", "ProcessGroup", "current_processes"]
