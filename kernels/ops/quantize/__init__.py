"""The quantization of activations, and the conversion of results."""
