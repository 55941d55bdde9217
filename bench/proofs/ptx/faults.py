"""What the machine raises."""


class Fault(RuntimeError):
    """The compiled code did something that a GPU would not forgive."""


class UnknownInstruction(NotImplementedError):
    """An instruction, or a form of one, that the machine does not execute."""
