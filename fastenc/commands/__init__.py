"""The commands of `python -m fastenc`: doctor, demo and accelerate. No library module imports this folder."""
