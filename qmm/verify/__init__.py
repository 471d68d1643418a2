"""``qmm verify``: a file's tensors compared with independent arithmetic, and between memory that faults."""
