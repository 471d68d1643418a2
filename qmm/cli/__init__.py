"""The command line: ``qmm info``, ``smoke``, ``run``, ``verify`` and ``demo``."""
