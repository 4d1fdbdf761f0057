"""The way of the data, from scan to labels: read this file to know the tool.

Image --prepare--> volume 192^3 + Placement --network--> 13 logit maps --restore--> labels

A scan of more than 600 mm goes this way twice: whole, and the slices about its abdomen alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, overload

import numpy as np
import torch

from flare_clef.errors import UsageError, UserError
from flare_clef.images import IDENTITY, Image, image_from_array, image_from_sitk, read_image
from flare_clef.inference import FoldedNetwork
from flare_clef.integer_convolution import CHANNELS, REDUCED, fits_int8, highest_activation
from flare_clef.limits import (
    available_memory_bytes,
    keep_memory,
    kept_memory_bytes,
    usable_cores,
)
from flare_clef.organs import organ_indices
from flare_clef.precision import INT8, choose_device, choose_precision
from flare_clef.preparation import Placement, canonical_voxel_mm, prepare
from flare_clef.restoration import mean_confidence, restore, winners_of
from flare_clef.second_look import drop_outside, slices_to_look_at
from flare_clef.stage_clock import Clock
from flare_clef.stray_parts import drop_stray_parts
from flare_clef.weights import load_weights
from flare_clef.writing import labels_to_sitk

if TYPE_CHECKING:
    import SimpleITK as sitk

# Beside what the network holds on a GPU: CUDA's own (not measured by us yet) and the weights.
_GPU_OWN_BYTES = 600 * 2**20
_GPU_LIMIT_BYTES = 2048 * 2**20

# What preparation and restoration hold beside scan, labels and network, measured with room.
_WORKING_BYTES = 300 * 2**20


@dataclass(frozen=True)
class Segmentation:
    """Labels of one scan, and what was noticed on the way."""

    labels: np.ndarray
    """uint8, the scan's own (z, y, x); 0 background, 1 to 13 as in ``ORGANS``."""
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage: ``prepare``, ``network``, ``restore``."""
    confidence: dict[int, float] | None = None
    """Per label value, as :func:`~flare_clef.restoration.mean_confidence` gives it, on request."""
    logits: torch.Tensor | None = field(default=None, repr=False)
    """(13, z, y, x) on ``placement.grid``, on request; −10 where an organ lost a stray part."""
    placement: Placement | None = None
    """Where the grid lies in the scan; None where no body was found. That of the second look where
    there were two (:mod:`flare_clef.second_look`), as logits and confidence are."""


class Segmenter:
    """Holds the network once; segments any number of scans, from any number of threads.

    Of several threads one at a time computes with the network: it takes all cores and the memory
    that is free.

    ``weights``: a safetensors file, by default the shipped one. ``device``: ``auto``, ``cpu``,
    ``cuda`` or ``cuda:N``. ``precision``: ``auto``, ``fp32``, ``bf16``, ``int8`` (CPU) or
    ``fp16`` (GPU).
    ``threads``: CPU threads, by default the cores that this process may use.
    ``memory_limit_bytes``: on the CPU the RAM above the loaded program, on a GPU device
    memory; by default what is free (CPU) or the challenge's 2048 MB (GPU, estimated).
    ``keep_strays``: small parts apart from an organ's main part stay, as the network has them
    (:mod:`flare_clef.stray_parts`).
    Raises :class:`~flare_clef.errors.UserError` where one of them cannot be had.
    """

    def __init__(
        self,
        weights: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        memory_limit_bytes: int | None = None,
        keep_strays: bool = False,
    ) -> None:
        keep_memory()
        if threads is not None and threads < 1:
            raise UsageError(f"threads={threads}: at least 1")
        self.threads = threads or usable_cores()
        torch.set_num_threads(self.threads)
        self.memory_limit_bytes = memory_limit_bytes
        self.keep_strays = keep_strays
        self.weights = load_weights(Path(weights) if weights is not None else None)
        self.device, self.device_reason = choose_device(device)
        self.precision, self.precision_reason = choose_precision(
            precision,
            self.device,
            self.threads,
            calibrated=self.weights.calibration is not None
            and fits_int8(self.weights.architecture),
        )
        self.grid = self.weights.grid
        self._network = self._made_ready()
        self._turn = Lock()

    def _made_ready(self) -> FoldedNetwork:
        network = self.weights.network()
        if self.device.type == "cuda" and self.precision == "fp32":
            # torch would let cuDNN round the factors to 10 bits (TF32): that is not fp32.
            torch.backends.cudnn.allow_tf32 = False
        if self.precision != INT8:
            return FoldedNetwork(network, self.device, self.precision)
        from flare_clef.quantised import QuantisedNetwork, calibration_from_norms

        architecture = self.weights.architecture
        if not fits_int8(architecture):
            raise UserError(
                f"--precision int8: {self.weights.path} has layers of {architecture.widths} and "
                f"{architecture.head_channels} channels, multiples of {CHANNELS} are needed; "
                "use auto"
            )
        calibration = self.weights.calibration or calibration_from_norms(network)
        return QuantisedNetwork(network, calibration, highest_activation() or REDUCED)

    @overload
    def predict(
        self, image: str | PathLike[str] | sitk.Image, *, organs: Sequence[str] | None = None
    ) -> sitk.Image: ...

    @overload
    def predict(
        self,
        image: np.ndarray,
        *,
        spacing_mm: Sequence[float],
        origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
        direction: Sequence[float] = IDENTITY,
        organs: Sequence[str] | None = None,
    ) -> np.ndarray: ...

    def predict(  # type: ignore[no-untyped-def]
        self,
        image,
        *,
        spacing_mm=None,
        origin_mm=None,
        direction=None,
        organs=None,
    ):
        """Labels of a CT scan in HU, uint8, on the scan's own grid.

        ``image`` is a path (file or folder of one DICOM series), a SimpleITK image, or a numpy
        array (z, y, x) with ``spacing_mm``, ``origin_mm`` (x, y, z) and ``direction`` (nine
        numbers, row by row, LPS; as SimpleITK gives them). A path or a SimpleITK image gives a
        SimpleITK image of the same geometry, an array an array. ``organs`` keeps only those
        named. Raises UserError for what cannot be used.
        """
        if isinstance(image, np.ndarray):
            if spacing_mm is None:
                raise UserError("predict: an array needs spacing_mm=(x, y, z) beside it")
            origin_mm = (0.0, 0.0, 0.0) if origin_mm is None else origin_mm
            direction = IDENTITY if direction is None else direction
            scan = image_from_array(image, spacing_mm, origin_mm, direction)
            return self.segment(scan, organs=organs).labels
        if any(given is not None for given in (spacing_mm, origin_mm, direction)):
            raise UserError(
                "predict: spacing_mm, origin_mm and direction go with an array; a file or a "
                "SimpleITK image has its own"
            )
        scan = (
            read_image(Path(image))
            if isinstance(image, (str, PathLike))
            else image_from_sitk(image)
        )
        return labels_to_sitk(self.segment(scan, organs=organs).labels, scan)

    def segment(
        self,
        image: Image,
        *,
        organs: Sequence[str] | None = None,
        on_stage: Callable[[str], None] | None = None,
        with_confidence: bool = False,
        with_logits: bool = False,
        beside_bytes: int = 0,
    ) -> Segmentation:
        """The stages one after the other; ``on_stage`` hears the name of each as it begins.

        ``with_logits`` keeps the 13 maps in the result: 13 x 192^3 numbers of the network's
        precision, 368 MB in fp32. ``beside_bytes``: RAM that others (who read the next scan) will
        take meanwhile; the network leaves it to them where it can do without.
        """
        wanted = organ_indices(organs)
        clock = Clock(on_stage)
        limit = partial(self._limit_for, image, beside_bytes)
        limit()  # a scan for which there is no room is refused before work begins

        def network(volume: torch.Tensor) -> torch.Tensor:
            with self._turn:  # what is free counts once no other scan's maps are being made
                return self._network(volume, memory_limit_bytes=limit())

        found = label_scan(
            network, image, self.grid, wanted, keep_strays=self.keep_strays, clock=clock
        )
        clock.end()
        if found is None:
            return Segmentation(
                np.zeros(image.array.shape, np.uint8), image.warnings, clock.seconds
            )

        warnings = image.warnings
        if not found.labels.any():
            warnings += ("no organ was found; the label map is empty",)
        return Segmentation(
            found.labels,
            warnings,
            clock.seconds,
            mean_confidence(found.logits) if with_confidence else None,
            found.logits if with_logits else None,
            found.placement,
        )

    def _limit_for(self, image: Image, beside_bytes: int) -> int:
        """Bytes that the network may use; of RAM, ``beside_bytes`` less where that is enough."""
        if self.device.type != "cpu":
            return max(0, (self.memory_limit_bytes or _GPU_LIMIT_BYTES) - _GPU_OWN_BYTES)
        left = self._left_for(image)
        least = self._network.least_bytes((self.grid, self.grid, self.grid))
        return max(left - beside_bytes, min(left, least))

    def _left_for(self, image: Image) -> int:
        """Bytes of RAM after scan and labels have had theirs. Raises UserError for none."""
        labels = image.array.size
        if self.memory_limit_bytes is None:
            # Without the second, a scan of the same size as the last would find no room.
            free = available_memory_bytes() + kept_memory_bytes()
            return max(0, free - labels - _WORKING_BYTES)
        left = self.memory_limit_bytes - image.array.nbytes - labels - _WORKING_BYTES
        if left < 0:
            needed = (self.memory_limit_bytes - left) / 2**20
            raise UserError(
                f"{image.source or 'the scan'}: {image.array.shape} voxels (z, y, x) need at least "
                f"{needed:.0f} MiB beside the network; the memory limit is "
                f"{self.memory_limit_bytes / 2**20:.0f} MiB: raise --memory-limit"
            )
        return left


@dataclass(frozen=True)
class Look:
    """What a network finds in a scan, or in some of its slices."""

    labels: np.ndarray
    """uint8, (z, y, x) as stored, of the scan's shape."""
    logits: torch.Tensor
    """(13, z, y, x) on ``placement.grid``, canonical axes, the network's precision."""
    winners: torch.Tensor
    """The label at each node of the grid, (z, y, x), uint8."""
    placement: Placement
    """Where the grid lies in the scan."""


def label_scan(
    network: Callable[[torch.Tensor], torch.Tensor],
    image: Image,
    grid: int,
    organs: Collection[int] | None = None,
    *,
    keep_strays: bool = False,
    clock: Clock | None = None,
) -> Look | None:
    """All stages; of a long scan the abdomen a second time. None where no body is found.

    ``network``: volume (z, y, x) to logits (13, z, y, x), with ``grid`` nodes along each axis;
    ``organs``: only these label values are given. After a second look logits, winners and placement
    are its own, the labels those of the whole scan.
    """
    clock = clock or Clock()
    look = partial(_look, network, organs, keep_strays, clock)
    clock.begin("prepare")
    prepared = prepare(image.array, image.direction, grid, spacing_mm=image.spacing_mm)
    if prepared is None:
        return None
    found = look(*prepared)

    part = slices_to_look_at(found.winners, found.placement, image.spacing_mm)
    if part is None:
        return found
    clock.begin("prepare")
    labels, placement = found.labels, found.placement
    slices = placement.canonical_view(image.array)[part]
    z_mm, y_mm, x_mm = canonical_voxel_mm(image.spacing_mm, placement.axes)
    prepared = prepare(slices, IDENTITY, grid, spacing_mm=(x_mm, y_mm, z_mm))
    if prepared is None:
        return found
    del found  # its maps, before there are others
    abdomen = look(*prepared)
    drop_outside(placement.canonical_view(labels), part)
    placement.canonical_view(labels)[part] = abdomen.labels
    return replace(abdomen, labels=labels, placement=placement.of_slices(part, abdomen.placement))


def _look(
    network: Callable[[torch.Tensor], torch.Tensor],
    organs: Collection[int] | None,
    keep_strays: bool,
    clock: Clock,
    volume: torch.Tensor,
    placement: Placement,
) -> Look:
    """Network and restoration of one prepared ``volume``."""
    clock.begin("network")
    logits = network(volume)

    clock.begin("restore")
    winners = winners_of(logits.permute(1, 2, 3, 0)) if keep_strays else drop_stray_parts(logits)
    return Look(restore(logits, placement, organs, winners), logits, winners, placement)
