"""Sequences of products on a GPU: each prefetches weights for the next, and products with the same activations quantize
them once."""

from __future__ import annotations

import functools
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
        launch = functools.partial(_launch, device, stream=stream, workspace=workspace, early=use.event is None)
        try:
            for step, following in itertools.zip_longest(steps, steps[1:]):
                shared = share_activations and quantized is not None and _same_activations(quantized, step)
                skip = step.product.quantize_launches if shared else 0
                launch(step, following, skip=skip)
                if step.product.quantized is not None and not skip:
                    quantized = step
                elif step.product.quantized is None and step.product.workspace_nbytes:
                    quantized = None  # its partial results may lie where the quantized activations were
                if quantized and _writes_activations(step, quantized):
                    quantized = None
        finally:
            device.streams.end(use)


def _launch(
    device: Device, step: Step, following: Step | None, *, stream: int, workspace: int, early: bool, skip: int
) -> None:
    """Queue one product, which prefetches weights of the next one to L2, if there are any."""
    number = step.product.prefetches
    if following is None or number is None or following.product.prefetch_region == NOTHING:
        device.launch(*step, stream, workspace, early, skip)
        return
    region = following.product.prefetch_region
    cell = step.prepared.launches[number].cell
    rows = cell("next_rows")  # without rows nothing is prefetched, so an interrupt leaves nothing half set
    try:
        cell("next_weights").value = following.weights
        cell("next_row_nbytes").value = region.row_nbytes
        cell("next_nbytes").value = region.nbytes
        rows.value = region.rows
        device.launch(*step, stream, workspace, early, skip)
    finally:
        rows.value = 0
        for name in ("next_weights", "next_row_nbytes", "next_nbytes"):
            cell(name).value = 0


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
