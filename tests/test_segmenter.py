"""The Python interface, end to end with a tiny network."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import TINY_GRID, body_hu, lively_network, write_scan
from test_preparation import stored_as, stored_every_way

from flare_clef import ORGANS, Segmenter
from flare_clef.errors import UsageError, UserError
from flare_clef.images import IDENTITY, image_from_array
from flare_clef.integer_convolution import fits_int8
from flare_clef.network import Architecture
from flare_clef.quantised import calibration_from_norms
from flare_clef.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def segmenter(tiny_weights):
    return Segmenter(tiny_weights, precision="fp32")


def test_path_image_and_array_agree(segmenter, tmp_path):
    path = write_scan(tmp_path / "a.nii.gz", direction=(0.0, 1, 0, -1, 0, 0, 0, 0, 1.0))
    image = sitk.ReadImage(str(path))
    from_path = segmenter.predict(path)
    from_image = segmenter.predict(image)
    from_array = segmenter.predict(
        sitk.GetArrayFromImage(image),
        spacing_mm=image.GetSpacing(),
        origin_mm=image.GetOrigin(),
        direction=image.GetDirection(),
    )
    assert isinstance(from_array, np.ndarray) and from_array.dtype == np.uint8
    assert len(np.unique(from_array)) > 3
    for found in (from_path, from_image):
        assert np.array_equal(sitk.GetArrayFromImage(found), from_array)
        assert found.GetDirection() == image.GetDirection()
        assert found.GetSpacing() == image.GetSpacing()
        assert found.GetOrigin() == image.GetOrigin()


def test_48_orientations_give_the_same_labels(segmenter):
    hu = body_hu()
    expected = segmenter.predict(hu, spacing_mm=(1.5, 1.5, 3.0))
    for stored, sizes, direction, axes, flips in stored_every_way(hu, (1.5, 1.5, 3.0)):
        found = segmenter.predict(stored, spacing_mm=sizes, direction=direction)
        assert np.array_equal(found, stored_as(expected, axes, flips))


def test_threads_give_what_one_thread_gives(segmenter):
    scans = [body_hu(seed=seed) for seed in range(4)]
    alone = [segmenter.predict(scan, spacing_mm=(1, 1, 1)) for scan in scans]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda s: segmenter.predict(s, spacing_mm=(1, 1, 1)), scans))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_of_several_threads_one_computes_and_plans_with_what_is_free_then(tiny_weights):
    segmenter = Segmenter(tiny_weights, precision="fp32")
    network, inside, most, limits = segmenter._network, [0], [0], []

    class Watched:
        least_bytes = network.least_bytes

        def __call__(self, volume, memory_limit_bytes):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            limits.append((inside[0], memory_limit_bytes))
            time.sleep(0.02)
            logits = network(volume, memory_limit_bytes=memory_limit_bytes)
            inside[0] -= 1
            return logits

    segmenter._network = Watched()
    # What is free while the network computes: next to nothing.
    segmenter._limit_for = lambda *_: 0 if inside[0] else 2**30
    with ThreadPoolExecutor(4) as pool:
        scans = [body_hu(seed=seed) for seed in range(4)]
        list(pool.map(lambda s: segmenter.predict(s, spacing_mm=(1, 1, 1)), scans))
    assert most == [1]
    assert limits == [(1, 2**30)] * 4


def test_organs(segmenter):
    hu = body_hu()
    everything = segmenter.predict(hu, spacing_mm=(1, 1, 1))
    names = [o.name for o in ORGANS if o.index in np.unique(everything)[1:3]]
    kept = [o.index for o in ORGANS if o.name in names]
    some = segmenter.predict(hu, spacing_mm=(1, 1, 1), organs=names)
    assert np.array_equal(some, np.where(np.isin(everything, kept), everything, 0))
    with pytest.raises(UserError, match="organs: heart; known are liver"):
        segmenter.predict(hu, spacing_mm=(1, 1, 1), organs=["heart"])


def test_arguments_of_other_types(segmenter, tiny_weights):
    names = iter(["liver", "spleen"])
    found = segmenter.predict(body_hu(), spacing_mm=np.array([1.5, 1.5, 3.0]), organs=names)
    assert set(np.unique(found)) <= {0, 1, 3} and found.any()
    for organs in ("liver,spleen", [1], []):
        with pytest.raises(UsageError, match="known are liver"):
            segmenter.predict(body_hu(), spacing_mm=(1, 1, 1), organs=organs)
    with pytest.raises(UserError, match="a scan of type list"):
        segmenter.predict([[1]])
    with pytest.raises(UsageError, match="threads=-1"):
        Segmenter(tiny_weights, threads=-1)
    assert Segmenter(tiny_weights, device=torch.device("cpu")).device.type == "cpu"


def test_odd_scans_end_without_a_crash(segmenter):
    for hu in (
        np.full((3, 4, 5), -1000, np.int16),
        np.full((3, 4, 5), 40, np.int16),
        np.zeros((1, 1, 1), np.uint8),
        np.zeros((3, 2, 1), np.float64),
        np.full((2, 3, 4), np.nan),
    ):
        assert segmenter.predict(hu, spacing_mm=(1, 1, 1)).shape == hu.shape
    assert not segmenter.predict(np.full((3, 4, 5), -1000), spacing_mm=(1, 1, 1)).any()


def test_an_array_needs_its_spacing(segmenter):
    with pytest.raises(UserError, match="needs spacing_mm"):
        segmenter.predict(body_hu())


def test_room_is_left_for_the_next_scan_where_there_is_some(tiny_weights):
    image = image_from_array(body_hu(), (1.5, 1.5, 3.0))
    segmenter = Segmenter(tiny_weights, precision="fp32", memory_limit_bytes=2**30)
    alone = segmenter._limit_for(image, 0)
    least = segmenter._network.least_bytes((32, 32, 32))
    assert segmenter._limit_for(image, 1000) == alone - 1000
    assert segmenter._limit_for(image, 2**30) == least < alone
    assert segmenter._network.plan((32, 32, 32), least).slab_slices == 2
    # Too little for the network itself: it is told so, with what there is.
    segmenter.memory_limit_bytes = 2**30 - alone + least - 1
    assert segmenter._limit_for(image, 2**30) == least - 1


def test_a_memory_limit_that_cannot_be_kept_is_refused(tiny_weights):
    small = Segmenter(tiny_weights, precision="fp32", memory_limit_bytes=2**20)
    with pytest.raises(UserError, match="raise --memory-limit"):
        small.predict(body_hu(), spacing_mm=(1, 1, 1))


def test_calibrated_layers_that_8_bits_do_not_fit_leave_auto_the_others(tmp_path, monkeypatch):
    network = lively_network()
    assert not fits_int8(network.architecture) and fits_int8(Architecture())
    asked = []

    def choose(wanted, device, threads, *, calibrated):
        asked.append(calibrated)
        return "fp32", "a test"

    monkeypatch.setattr("flare_clef.segmenter.choose_precision", choose)
    path = tmp_path / "w.safetensors"
    save_weights(path, network, grid=TINY_GRID, calibration=calibration_from_norms(network))
    assert load_weights(path).calibration is not None
    Segmenter(path)
    assert asked == [False]


def test_a_geometry_beside_a_file_or_a_label_map_is_refused(segmenter, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz", body_hu())
    for given in ({"spacing_mm": (9, 9, 9)}, {"origin_mm": (0, 0, 1)}, {"direction": IDENTITY}):
        for image in (scan, sitk.ReadImage(str(scan))):
            with pytest.raises(UserError, match="go with an array; a file or a SimpleITK image"):
                segmenter.predict(image, **given)
    labels = sitk.LabelImageToLabelMap(sitk.GetImageFromArray(np.ones((5, 5, 5), np.uint8)))
    with pytest.raises(UserError, match="label of 8-bit unsigned integer; a CT has one number"):
        segmenter.predict(labels)
