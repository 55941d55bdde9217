"""The parts of `python -m fastenc bench audit`: its cases, what is found about them, and the rows of its table."""
