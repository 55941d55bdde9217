"""The parts of `python -m fastenc bench audit`: cases, findings, and the rows and text of its table."""
