"""The block formats that qmm multiplies by. A new one is one file beside these and one line in the list below."""

from __future__ import annotations

from qmm.kernels.formats import bf16, f16, f32, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from qmm.kernels.formats.format import Format, FormatConstants

__all__ = ["FORMATS", "Format", "c"]

c = FormatConstants.placeholder()
"""The placeholder from which kernels of any format read their compile-time constants."""

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        f32,
        f16,
        bf16,
        q8_0,
        q4_0,
        q4_1,
        q5_0,
        q5_1,
        q2_k,
        q3_k,
        q4_k,
        q5_k,
        q6_k,
    )
}
"""Every format by ggml's name for it; tests and benchmarks walk this table."""
