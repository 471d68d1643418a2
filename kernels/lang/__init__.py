"""What kernels are written in: operations, their meaning in Python, and their lowering on each target."""
