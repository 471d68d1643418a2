"""The product of a weight with up to eight columns, on the GPU."""
