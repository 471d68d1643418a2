"""What the benchmarks share: contenders, timing, saved results, and the report on them."""
