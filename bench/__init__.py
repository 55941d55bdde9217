"""Benchmark suites and the proofs that need no GPU: interpreted kernels, ahead-of-time compiles, counted traffic."""
