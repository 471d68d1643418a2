"""The operations on weights and activations: their kernels, and how each is planned."""
