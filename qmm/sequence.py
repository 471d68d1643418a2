"""Sequences of products on a GPU: each prefetches weights for the next, and products with the same activations quantize
them once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from qmm.device import Device, Prepared
from qmm.kernels.ops.matvec.plan import NOTHING, Product, Region

__all__ = ["Step", "queue_sequence"]


class Step(NamedTuple):
    """One product of a sequence: prepared, with the addresses of its weight, activations and results."""

    prepared: Prepared
    weights: int
    x: int
    y: int

    @property
    def product(self) -> Product:
        """What was planned."""
        assert isinstance(self.prepared.work, Product)
        return self.prepared.work


def queue_sequence(
    device: Device, steps: Sequence[Step], stream: int, share_activations: bool = True, owner: object = None
) -> None:
    """Put products on a stream, one after the other.

    While a product ends, the beginning of the next one's weights is prefetched to L2. A product with the same
    activations as the one before, quantized the same way, does not quantize them again.

    Args:
        device: where.
        steps: the products; they share one workspace.
        stream: a stream's handle.
        share_activations: if False, each product quantizes its activations.
        owner: of the stream, see :meth:`qmm.device.Device.queue`.
    """
    quantized: Step | None = None
    nbytes = max((step.product.workspace_nbytes for step in steps), default=0)
    with device.lock, device.undisturbed(len(steps)):
        workspace = device.workspace(stream, nbytes)
        for step, following in itertools.zip_longest(steps, steps[1:]):
            shared = share_activations and quantized is not None and _same_activations(quantized, step)
            skip = step.product.quantize_launches if shared else 0
            _set_next_prefetch(step, following)
            try:
                device.queue(step.prepared, step.weights, step.x, step.y, stream, workspace, skip, owner)
            finally:
                _set_next_prefetch(step, None)
            if step.product.quantized is not None and not skip:
                quantized = step
            if quantized and _writes_activations(step, quantized):
                quantized = None


def _same_activations(first: Step, second: Step) -> bool:
    """Whether the second product would quantize the same activations to the same place as the first."""
    return (
        first.x == second.x
        and first.product.quantized is not None
        and first.product.quantized == second.product.quantized
        and first.product.x == second.product.x
    )


def _writes_activations(step: Step, quantized: Step) -> bool:
    """Whether a product's results overlap, or may overlap, another's activations."""
    (x_low, x_high), (y_low, y_high) = quantized.product.x.reach, step.product.y.reach
    return quantized.x + x_low < step.y + y_high and step.y + y_low < quantized.x + x_high


def _set_next_prefetch(step: Step, following: Step | None) -> None:
    """Set the weights of another product that a product's launches prefetch to L2, or none."""
    number = step.product.prefetches
    if number is None:
        return
    region: Region = following.product.prefetch_region if following else NOTHING
    launch = step.prepared.launches[number]
    launch.cell("next_weights").value = following.weights if following and region != NOTHING else 0
    launch.cell("next_row_nbytes").value = region.row_nbytes
    launch.cell("next_rows").value = region.rows
    launch.cell("next_nbytes").value = region.nbytes
