"""The exceptions of the machine."""


class Fault(RuntimeError):
    """The compiled code did something that is an error on a GPU."""


class UnknownInstruction(RuntimeError):
    """An instruction, or a form of one, that the machine refuses to execute because it does not know it."""
