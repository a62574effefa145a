"""Our kernels inside models of other libraries."""
