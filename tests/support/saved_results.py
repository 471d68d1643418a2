"""Rows of a benchmark that nobody ran, as they are saved."""

from __future__ import annotations

from typing import Any

__all__ = ["HEAD", "ROWS", "row"]


def row(part: str, name: str, m: int, n: int, us: float, ggml_us: float | None, peak: float = 100.0) -> dict[str, Any]:
    """A made-up row of a weight of ``m`` rows and 1000 bytes each."""
    placement = "mapped" if part == "mapped" else "device"
    nbytes = m * 1000
    rate = nbytes / us / 1e3
    return {
        "id": f"{name}-{m}x4096-n{n}-{placement}",
        "part": part,
        "type": name,
        "m": m,
        "k": 4096,
        "n": n,
        "bytes": nbytes,
        "qmm us": us,
        "ggml us": ggml_us,
        "GB/s": rate,
        "ggml GB/s": None if ggml_us is None else nbytes / ggml_us / 1e3,
        "peak GB/s": peak,
        "% of peak": 100 * rate / peak,
        "copy engine GB/s": 60.0 if part == "mapped" else None,
        "x ggml": None if ggml_us is None else ggml_us / us,
    }


ROWS = [
    row("main", "Q4_K", 40_000, 1, 500.0, 1000.0),  # 80 GB/s
    row("main", "Q4_K", 40_000, 8, 800.0, 1600.0),
    row("main", "Q8_0", 40_000, 1, 1000.0, 500.0),  # 40 GB/s, half as fast as ggml
    row("main", "Q8_0", 40_000, 8, 2500.0, 2490.0),
    row("main", "Q2_K", 10_000, 1, 1000.0, 8000.0),  # 10 GB/s, but only 10 MB
    row("mapped", "Q4_K", 40_000, 1, 1000.0, None, 50.0),
    row("mapped", "Q4_K", 40_000, 8, 1050.0, None, 50.0),
    row("small", "Q8_0", 256, 1, 4.0, 4.4),
    row("other", "F16", 40_000, 2, 1000.0, 999.0),
]
HEAD = {
    "date": "2031-02-03T04:05:06+00:00",
    "gpu": "Made-up 1",
    "driver": "999.1",
    "qmm": "0.0",
    "ggml": "1.2.3",
    "ggml_missing": None,
    "read_peak": {"GB/s": 100.0},
}
