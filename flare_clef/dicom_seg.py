"""Labels of a DICOM series as one DICOM Segmentation object, with coded organ names.

Made by ``highdicom``, which is imported here only: ``pip install "flare-clef[dicom]"``.
Segment numbers count the organs written, in the order of ``ORGANS``; with all 13 they are the
label values.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flare_clef.dicom import series_files
from flare_clef.errors import UserError, one_line
from flare_clef.organs import ORGANS, Organ
from flare_clef.version import __version__

if TYPE_CHECKING:
    from pydicom import Dataset

SNOMED_CT: dict[str, tuple[str, str]] = {
    "liver": ("10200004", "Liver"),
    "kidney": ("64033007", "Kidney"),
    "spleen": ("78961009", "Spleen"),
    "pancreas": ("15776009", "Pancreas"),
    "aorta": ("15825003", "Aorta"),
    "inferior_vena_cava": ("64131007", "Inferior vena cava"),
    "adrenal_gland": ("23451007", "Adrenal gland"),
    "gallbladder": ("28231008", "Gallbladder"),
    "esophagus": ("32849002", "Esophagus"),
    "stomach": ("69695003", "Stomach"),
    "duodenum": ("38848004", "Duodenum"),
}
"""Code and meaning of each structure; a side is a modifier of its own."""

_CATEGORY = ("91723000", "Anatomical Structure")
_SIDES = {"right": ("24028007", "Right"), "left": ("7771000", "Left")}


def segmentation_file(
    labels: np.ndarray, folder: Path, organs: Collection[int] | None = None
) -> bytes:
    """A DICOM file of ``labels`` (z, y, x) for the one series in ``folder``. Raises UserError."""
    import highdicom
    from pydicom import dcmread

    if not folder.is_dir():
        raise UserError(f"{folder}: --format dicom-seg needs a folder of one DICOM series")
    slices = [dcmread(name, stop_before_pixels=True) for name in series_files(folder)]
    if len(slices) != len(labels):
        raise UserError(
            f"{folder}: {len(slices)} DICOM files for {len(labels)} slices; multi-frame objects "
            "cannot be referred to, use --format nifti"
        )
    written = [o for o in ORGANS if organs is None or o.index in organs]
    renumbered = np.zeros(256, np.uint8)
    for number, organ in enumerate(written, 1):
        renumbered[organ.index] = number
    with warnings.catch_warnings():
        # About odd values in the source's own header, which are not ours to mend.
        warnings.simplefilter("ignore")
        for one in slices:
            # highdicom takes no character set of several values, nor an empty one.
            one.decode()
            one.SpecificCharacterSet = "ISO_IR 192"
        try:
            made = highdicom.seg.Segmentation(
                source_images=slices,
                pixel_array=renumbered[labels],
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[_description(n, o) for n, o in enumerate(written, 1)],
                series_instance_uid=highdicom.UID(),
                series_number=_series_number(slices[0]),
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="flare-clef",
                manufacturer_model_name="flare-clef",
                software_versions=__version__,
                device_serial_number="0",
                series_description="Abdominal organs (flare-clef)",
                omit_empty_frames=True,
            )
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(
                f"{folder}: no DICOM Segmentation can refer to this series ({one_line(error)})"
            ) from None
    file = io.BytesIO()
    made.save_as(file)
    return file.getvalue()


def _series_number(source: Dataset) -> int:
    """Sorts behind the series that it belongs to."""
    return 1000 + int(getattr(source, "SeriesNumber", None) or 0) % 1_000_000


def _description(number: int, organ: Organ) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    side, _, structure = organ.name.partition("_")
    if side not in _SIDES:
        side, structure = "", organ.name
    value, meaning = SNOMED_CT[structure]
    made = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=organ.title,
        segmented_property_category=Code(_CATEGORY[0], "SCT", _CATEGORY[1]),
        segmented_property_type=Code(value, "SCT", meaning),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="flare-clef",
            version=__version__,
            family=codes.DCM.ArtificialIntelligence,
        ),
        tracking_uid=highdicom.UID(),
        tracking_id=organ.name,
        display_color=highdicom.color.CIELabColor.from_rgb(*organ.colour),
    )
    if side:
        modifier = highdicom.sr.CodedConcept(_SIDES[side][0], "SCT", _SIDES[side][1])
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            modifier
        ]
    return made
