"""A GPU made of numpy: runs the PTX that Triton compiles, through the project's own launchers, on CPU tensors.

    with executing(90) as machine:
        y, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)
    machine.launches  # name, grid and counts of each launch

It executes the compiled code: layouts, predicates, shuffles, shared memory. A `Fault` is raised where that code does
what the interpreter cannot see:
    a global access outside the storages of the launch's arguments; a misaligned vector;
    two warps that touch one word of shared memory without a barrier between them, one of them to write it (both may
    store the same value in the same instruction, as Triton does where warps hold the same elements);
    shared memory read before its asynchronous copy has arrived, or before anything was written there;
    two programs that touch one word of global memory, one of them to write it;
    a barrier that only some threads of a program reach.
Tensors from torch.empty are filled with a poison that `unwritten` counts.

Limits: the lanes of a warp run in lockstep; fma is rounded from float64; what ptxas contracts is not contracted;
approximate operations are exact. So it proves the program, not the last bit.
"""

from .faults import Fault, UnknownInstruction
from .machine import Launch, Machine, executing, unwritten

__all__ = ["Fault", "Launch", "Machine", "UnknownInstruction", "executing", "unwritten"]
