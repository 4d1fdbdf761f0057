"""Reads scans; every check of what a user brings is here.

Arrays are (z, y, x); spacing, origin and direction are SimpleITK's: (x, y, z), LPS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from flare_clef import metaimage, nifti, nrrd
from flare_clef.dicom import read_series, series_place, thickness_mm
from flare_clef.errors import UserError
from flare_clef.itk_turn import ITK_TURN
from flare_clef.paths import check_name
from flare_clef.scan_files import SUFFIXES, strip_suffix

sitk.ProcessObject.SetGlobalWarningDisplay(False)

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Image:
    """A scan: voxels in HU and where they lie."""

    array: np.ndarray
    """(z, y, x) as stored; an integer type, or float32 where values are scaled."""
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]
    """Nine numbers, row by row; columns are the stored x, y and z axes in LPS space."""
    source: Path | None = None
    warnings: tuple[str, ...] = ()
    nifti_header: bytes | None = None
    """The input's own header, so that its label map repeats the geometry bit for bit."""
    nrrd_geometry: tuple[bytes, ...] = ()
    """The lines of an NRRD input's header that do the same for NRRD."""


class _Held:
    """An image's voxels without a copy, which they keep alive: SimpleITK's own view does not."""

    def __init__(self, image: sitk.Image) -> None:
        self.image = image
        self.__array_interface__ = sitk.GetArrayViewFromImage(image).__array_interface__


def read_image(path: Path) -> Image:
    """A scan from a file or a folder with one DICOM series. Raises UserError, one line."""
    check_name(path)
    try:
        if path.is_dir():
            return _read_dicom(path)
        if not path.exists():
            kind = "a link to nothing" if path.is_symlink() else "no such file"
            raise UserError(f"{path}: {kind}; check the path")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: empty (0 bytes); copy or export it again")
        suffix = strip_suffix(path.name)[1].lower()
        if not suffix:
            raise UserError(f"{path}: not a known kind of image; expected {' '.join(SUFFIXES)}")
        if suffix.startswith(".nii"):
            return _read_nifti(path)
        if suffix in (".mha", ".mhd"):
            metaimage.check_header(path)
        image = _checked(*_unpack(_read_with_itk(path), path), source=path)
        if suffix in (".nrrd", ".nhdr"):
            image = replace(image, nrrd_geometry=nrrd.geometry_lines(path))
        return image
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_place(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Size in voxels and origin in mm, both (x, y, z), from headers alone. Raises UserError."""
    try:
        if path.is_dir():
            return series_place(path)
        if strip_suffix(path.name)[1].lower().startswith(".nii"):
            header = nifti.read_header(path)
            with ITK_TURN:
                return header.dim[1:4], _nifti_geometry(path, header)[1]
        reader = _itk_reader(path)
        reader.ReadImageInformation()
        return reader.GetSize()[:3], reader.GetOrigin()[:3]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: its header cannot be read ({itk_reason(error)})") from None


def _read_dicom(folder: Path) -> Image:
    series, files, tilt_degrees = read_series(folder)
    told = (
        f"gantry tilt of {tilt_degrees:.1f} degrees, kept: a sheared volume" if tilt_degrees else ""
    )
    if len(files) == 1 and series.GetSize()[2] == 1:
        depth_mm = max(thickness_mm(files[0]), 0.0) or 1.0
        series.SetSpacing((*series.GetSpacing()[:2], depth_mm, *series.GetSpacing()[3:]))
        told = f"a single slice, taken for {depth_mm:g} mm thick: volumes depend on that"
    elif len(files) == 1:
        # Of slices in files of their own this is checked.
        told = f"one file of {series.GetSize()[2]} frames: gaps or a tilt between them go unnoticed"
        if series.GetSpacing()[:3] == (1.0, 1.0, 1.0):
            # What GDCM gives where the frames are not stored in order of position.
            told += ", and its voxels read as 1 x 1 x 1 mm, which is probably wrong"
    image = _checked(*_unpack(series, folder), source=folder)
    return replace(image, warnings=(told, *image.warnings)) if told else image


def _read_nifti(path: Path) -> Image:
    header = nifti.read_header(path)
    nifti.check_header(path, header)
    nifti.check_length(path, header)
    array = nifti.read_voxels(path, header)
    with ITK_TURN:
        spacing, origin, direction = _nifti_geometry(path, header)
    if nifti.has_other_sizes(header):
        # ITK takes the axes of the sform and their lengths of pixdim, which nobody else does.
        spacing, origin, direction = nifti.sform_geometry(header)
    warning = nifti.disagreement(header, np.reshape(direction, (3, 3)) * spacing)
    image = _checked(array, spacing, origin, direction, source=path)
    return replace(
        image,
        nifti_header=header.raw,
        warnings=((warning,) if warning else ()) + image.warnings,
    )


def _nifti_geometry(path: Path, header: nifti.NiftiHeader) -> tuple[Any, Any, Any]:
    """As SimpleITK reports it; for what ITK refuses (shear), from the sform itself."""
    with _itk_readable(path) as readable:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(readable))
        reader.SetImageIO("NiftiImageIO")
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            if header.codes[1] > 0:
                return nifti.sform_geometry(header)
            raise UserError(f"{path}: its orientation cannot be used; export it again") from None
    dimensions = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (dimensions, dimensions))[:3, :3]
    return reader.GetSpacing()[:3], reader.GetOrigin()[:3], tuple(direction.ravel())


@contextlib.contextmanager
def _itk_readable(path: Path) -> Iterator[Path]:
    """ITK trusts the suffix: a file whose suffix lies about compression is linked anew."""
    suffix = ".nii.gz" if nifti.is_gzip(path) else ".nii"
    if path.name.lower().endswith(suffix):
        yield path
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"scan{suffix}"
        link.symlink_to(path.resolve())
        yield link


def _itk_reader(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if path.suffix.lower() in (".mha", ".mhd") and not path.suffix.islower():
        # ITK finds the reader of other formats by their content, of this one by small letters.
        reader.SetImageIO("MetaImageIO")
    return reader


def _read_with_itk(path: Path) -> sitk.Image:
    try:
        return _itk_reader(path).Execute()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read as an image ({itk_reason(error)})") from None


def itk_reason(error: Exception) -> str:
    """The last line of what ITK says, without its file and line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("): ")[-1] if lines else type(error).__name__


def _unpack(image: sitk.Image, source: Path | None = None) -> tuple[Any, ...]:
    """Array, spacing, origin, direction of a SimpleITK image; one volume of a 4-D one."""
    name = source or "the image"
    if (
        "label" in image.GetPixelIDTypeAsString()
    ):  # of which ITK ends the process when asked for more
        raise UserError(f"{name}: {image.GetPixelIDTypeAsString()}; a CT has one number a voxel")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(
            f"{name}: {image.GetNumberOfComponentsPerPixel()} numbers a voxel; a CT has one"
        )
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3:
        size = " x ".join(map(str, image.GetSize()))
        raise UserError(
            f"{name}: {image.GetDimension()}-D ({size}); a single volume with three axes is needed"
        )
    if "complex" in image.GetPixelIDTypeAsString():
        raise UserError(f"{name}: complex numbers; a CT has one number a voxel")
    array = np.asarray(_Held(image))
    return array, image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def image_from_sitk(image: sitk.Image) -> Image:
    """The same checks for an image that is in memory already."""
    if not isinstance(image, sitk.Image):
        raise UserError(
            f"a scan of type {type(image).__name__}; expected a path, a SimpleITK image or a "
            "numpy array with spacing_mm"
        )
    return _checked(*_unpack(image))


def image_from_array(
    array: np.ndarray,
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] = IDENTITY,
) -> Image:
    """The same checks for an array (z, y, x) in HU."""
    if not isinstance(array, np.ndarray):
        raise UserError(f"a scan of type {type(array).__name__}; expected a numpy array (z, y, x)")
    if array.ndim != 3:
        raise UserError(f"an array of shape {array.shape}; expected (z, y, x)")
    return _checked(array, spacing_mm, origin_mm, direction)


def _checked(
    array: np.ndarray,
    spacing: Any,
    origin: Any,
    direction: Any,
    *,
    source: Path | None = None,
) -> Image:
    name = source or "the image"
    spacing = _numbers(name, "spacing", spacing)
    origin = _numbers(name, "origin", origin)
    direction = _numbers(name, "direction", direction)
    if array.dtype.kind not in "iuf" or 0 in array.shape:
        raise UserError(f"{name}: {array.shape} voxels of type {array.dtype}; expected numbers")
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise UserError(f"{name}: voxel spacing {spacing} mm; all three must be above 0")
    if not all(np.isfinite(origin)) or len(origin) != 3:
        raise UserError(f"{name}: origin {origin} mm; three finite numbers are needed")
    cosines = np.reshape(direction, (3, 3)) if len(direction) == 9 else np.zeros((3, 3))
    if not np.isfinite(cosines).all() or abs(np.linalg.det(cosines)) < 1e-3:
        raise UserError(f"{name}: its three axes do not span a volume (direction {direction})")
    if array.dtype == np.float64 or array.dtype == np.float16:
        with np.errstate(over="ignore"):  # told as infinite values
            array = array.astype(np.float32)
    warnings = _value_warnings(array)
    return Image(array, spacing, origin, direction, source, warnings)  # type: ignore[arg-type]


def _numbers(name: Path | str, what: str, values: Any) -> tuple[float, ...]:
    try:
        return tuple(np.asarray(values, dtype=float).ravel().tolist())
    except (TypeError, ValueError):
        raise UserError(f"{name}: {what} {values!r}; numbers are needed") from None


def _value_warnings(array: np.ndarray) -> tuple[str, ...]:
    """What the values say about whether this is a CT in HU."""
    low, high = array.min(), array.max()
    warnings = []
    if array.dtype.kind == "f" and not (np.isfinite(low) and np.isfinite(high)):
        finite = np.isfinite(array)
        bad = array.size - int(finite.sum())
        warnings.append(f"{bad} voxel(s) are NaN or infinite; they count as air")
        if bad == array.size:
            return tuple(warnings)
        low, high = array[finite].min(), array[finite].max()
    low, high = float(low), float(high)
    if low == high:
        warnings.append(f"all voxels have the same value ({low:g})")
    if high <= -500:
        warnings.append(f"no voxel above -500 HU (highest {high:g}); the label map will be empty")
    elif low >= 0 and high <= 255 and high > low:
        warnings.append(f"values {low:g} to {high:g} look like a picture or an MR scan, not HU")
    elif low >= 0 and high > 255:
        warnings.append(
            f"no value below 0 (values {low:g} to {high:g}): not HU; an MR scan, or a CT whose "
            "offset of 1024 was not taken off?"
        )
    return tuple(warnings)


def describe(image: Image) -> dict[str, Any]:
    """Geometry and values of a scan, for ``flare-clef info SCAN``."""
    from flare_clef.preparation import canonical_axes

    axes, flips = canonical_axes(image.direction)
    letters = [""] * 3
    for canonical, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        letters[2 - axis] = ("SI", "PA", "LR")[canonical][int(flip)]
    size = image.array.shape[::-1]
    sample = image.array[:: max(1, len(image.array) // 40), ::4, ::4].astype(np.float32)
    sample = sample[np.isfinite(sample)]
    finite = image.array if image.array.dtype.kind != "f" else image.array[np.isfinite(image.array)]
    return {
        "size_voxels_x_y_z": list(size),
        "spacing_mm": [round(s, 4) for s in image.spacing_mm],
        "extent_mm": [round(n * s, 1) for n, s in zip(size, image.spacing_mm, strict=True)],
        # Each letter names the direction towards which the stored x, y or z axis increases.
        "orientation": "".join(letters),
        "voxel_type": str(image.array.dtype),
        "lowest_value": float(finite.min()) if finite.size else None,
        "highest_value": float(finite.max()) if finite.size else None,
        "percentiles_1_50_99": [
            round(float(q), 1) for q in (np.percentile(sample, [1, 50, 99]) if sample.size else ())
        ],
        "warnings": list(image.warnings) or "none",
    }
