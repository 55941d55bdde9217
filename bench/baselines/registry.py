"""Which contest each kind of workload belongs to."""

from __future__ import annotations

from ..engine.record import Workload
from . import encoder, op, stem, third_party
from .suite import Contest


def contest_of(workload: Workload) -> Contest:
    """What a workload is timed with, `eager` first."""
    return {
        "network": encoder.CONTEST,
        "client": third_party.CONTEST,
        "instance_norm_prelu": op.CONTEST,
        "instance_norm_add_prelu": op.CONTEST,
        "stem": stem.CONTEST,
    }[workload.kind]
