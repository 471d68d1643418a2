"""Where the bytes are: the index of a GGUF file, its mapping, and the registration of that mapping with CUDA.

Importing this imports NumPy and nothing else of weight: gguf is imported at the first file, cuda-python at the first
registration. It never imports kernels.
"""

from __future__ import annotations

from qmm.loaders.access.registered import HostRegistration
from qmm.loaders.gguf.index import GGUFIndex, TensorInfo
from qmm.loaders.gguf.metadata import Metadata
from qmm.loaders.mapping import FileMapping

__all__ = ["FileMapping", "GGUFIndex", "HostRegistration", "Metadata", "TensorInfo"]
