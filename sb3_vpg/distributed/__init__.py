"""Data-parallel training: several processes, on one machine or on several, train one model."""

from sb3_vpg.common.collectives import ProcessGroup, current_processes
from sb3_vpg.common.progress_bar import AllRanksProgressBar

__all__ = ["AllRanksProgressBar", "ProcessGroup", "current_processes"]
