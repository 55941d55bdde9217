"""The baselines that are timed: PyTorch's ways of running a workload, and fastenc's. `registry` finds the suite."""
