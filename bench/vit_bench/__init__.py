"""Evidence, compile matrix and benchmarks of vit_kernels and vit_engine."""
