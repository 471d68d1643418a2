"""The operations that GPUs have beside :mod:`qmm.kernels.lang.primitives`, in PTX: by the file, what they work on."""
