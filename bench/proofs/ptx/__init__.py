"""A GPU in numpy: runs the PTX that Triton compiles, on CPU tensors, through the project's own launchers.

    with executing(90) as machine:
        y, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)
    machine.launches  # name, grid and counts of each launch

It executes the compiled code with its layouts, predicates, shuffles and shared memory. It raises a `Fault` for errors
that Triton's interpreter cannot see:
    a global access outside the storages of the launch's arguments, or a misaligned vector;
    two warps that access one word of shared memory without a barrier in between, if one of them writes (storing the
    same value in the same instruction is allowed, as Triton does it where warps hold the same elements);
    a read of shared memory before its asynchronous copy has arrived, or before it was written;
    two programs that access one word of global memory, if one of them writes;
    a barrier that only some threads of a program reach.
Tensors from torch.empty are filled with a poison, which `unwritten` counts.

Limits: the lanes of a warp run in lockstep, fma is rounded from float64, contractions by ptxas do not happen, and
approximate operations are exact. So this checks the program, but not the last bit of its results.
"""

from .faults import Fault, UnknownInstruction
from .machine import Launch, Machine, executing, unwritten

__all__ = ["Fault", "Launch", "Machine", "UnknownInstruction", "executing", "unwritten"]
