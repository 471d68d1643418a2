"""What the bytes of a tensor mean, and how they are multiplied: formats, and schedules for the CPU and for CUDA."""
