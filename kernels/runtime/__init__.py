"""From a kernel's description to machine code, to the cache on disk, and to launches."""
