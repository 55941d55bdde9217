"""Evidence about the kernels that needs no GPU."""
