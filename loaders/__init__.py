"""Where the bytes are: the index of a GGUF file, its mapping, and the registration of that mapping with CUDA.

Importing this package imports NumPy, and nothing else that takes time: the gguf package is imported when the first file
is read, cuda-python when the first mapping is registered. README.md beside this file is the tour.
"""

from __future__ import annotations

from qmm.loaders.access.registered import HostRegistration
from qmm.loaders.gguf.index import GGUFIndex, TensorInfo
from qmm.loaders.gguf.metadata import Metadata
from qmm.loaders.mapping import FileMapping

__all__ = ["FileMapping", "GGUFIndex", "HostRegistration", "Metadata", "TensorInfo"]
