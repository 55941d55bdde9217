"""What is timed: PyTorch's ways of running a workload, and fastenc's. `registry` names them for each kind."""
