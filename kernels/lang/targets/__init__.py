"""The machines that a kernel can be compiled for: the CPU and CUDA GPUs."""
