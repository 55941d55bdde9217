"""Evidence about the kernels without a GPU: interpretation, execution of PTX, compilation, traffic, ceilings."""
