"""Schedules: when the server waits for whom, each an event simulation in virtual time."""

from .buffered import FedBuff as FedBuff
from .deadline import Deadline as Deadline
from .decoupled import Decoupled as Decoupled
from .schedule import Schedule as Schedule
from .streaming import Streaming as Streaming
from .synchronous import Synchronous as Synchronous

SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule for schedule in (Synchronous, Deadline, FedBuff, Streaming, Decoupled)
}

__all__ = [
    "SCHEDULES",
    "Deadline",
    "Decoupled",
    "FedBuff",
    "Schedule",
    "Streaming",
    "Synchronous",
]
