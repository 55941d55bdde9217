"""Evidence about the kernels without a GPU: interpretation, compilation, traffic and its ceilings."""
