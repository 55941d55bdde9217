"""The suite of each kind of workload."""

from __future__ import annotations

from ..engine.record import Workload
from . import encoder, op, stem, third_party
from .suite import Suite


def suite_of(workload: Workload) -> Suite:
    """The suite that times `workload`. Its first baseline is "eager"."""
    return {
        "network": encoder.SUITE,
        "client": third_party.SUITE,
        "instance_norm_prelu": op.SUITE,
        "instance_norm_add_prelu": op.SUITE,
        "stem": stem.SUITE,
    }[workload.kind]
