"""Sequences of products on a GPU: each prefetches weights for the next, and products with the same activations quantize
them once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from qmm.device import Device, Prepared
from qmm.kernels.ops.matvec.plan import NOTHING, Product

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

    Raises:
        ClosedError, DeviceError: as :meth:`qmm.device.Device.queue`.
    """
    device.put("products", _queue, device, steps, stream, share_activations, owner)


def _queue(device: Device, steps: Sequence[Step], stream: int, share_activations: bool, owner: object) -> None:
    quantized: Step | None = None
    nbytes = max([step.product.workspace_nbytes for step in steps], default=0)
    with device.undisturbed(len(steps)):
        use = device.streams.begin(stream, owner)
        workspace = device.streams.workspace(use, nbytes) if nbytes else 0
        try:
            for step, following in itertools.zip_longest(steps, steps[1:]):
                shared = share_activations and quantized is not None and _same_activations(quantized, step)
                skip = step.product.quantize_launches if shared else 0
                prepared, weights, x, y = step
                prefetching = following is not None
                try:
                    prefetching = prefetching and _set_prefetch(step, following)
                    device.launch(prepared, weights, x, y, stream, workspace, use.event is None, skip)
                finally:
                    if prefetching:
                        _clear_prefetch(step)
                if step.product.quantized is not None and not skip:
                    quantized = step
                elif step.product.quantized is None and step.product.workspace_nbytes:
                    quantized = None  # its partial results may lie where the quantized activations were
                if quantized and _writes_activations(step, quantized):
                    quantized = None
        finally:
            if use.event is not None:
                device.streams.end(use)


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


def _set_prefetch(step: Step, following: Step) -> bool:
    """Let a product's launches prefetch weights of the next one to L2; whether there are any."""
    number, region = step.product.prefetches, following.product.prefetch_region
    if number is None or region == NOTHING:
        return False
    launch = step.prepared.launches[number]
    launch.cell("next_weights").value = following.weights
    launch.cell("next_row_nbytes").value = region.row_nbytes
    launch.cell("next_nbytes").value = region.nbytes
    launch.cell(
        "next_rows"
    ).value = region.rows  # last: without rows nothing is prefetched, whenever an interrupt comes
    return True


def _clear_prefetch(step: Step) -> None:
    """Let them prefetch nothing again."""
    number = step.product.prefetches
    if number is not None:
        for name in ("next_rows", "next_nbytes", "next_row_nbytes", "next_weights"):  # the rows first
            step.prepared.launches[number].cell(name).value = 0
