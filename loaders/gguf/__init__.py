"""The header of a GGUF file: what tensors there are, and where their bytes lie."""
