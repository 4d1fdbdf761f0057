"""The report: what is shown where, and that the page needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flare_clef.images import image_from_array
from flare_clef.measurements import measure
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.report_pictures import PANEL, Panel, panels, scene

pytest.importorskip("PIL", reason="Pillow is not installed (extra: report)")

from flare_clef.report import write_report  # noqa: E402

SHAPE = (30, 40, 50)
SPACING = (2.0, 2.5, 4.0)
LIVER, SPLEEN, AORTA = (ORGAN_BY_NAME[n] for n in ("liver", "spleen", "aorta"))


def body() -> tuple[np.ndarray, np.ndarray]:
    """Canonical: liver on the patient's right (low x), spleen on the left, aorta at the back."""
    hu, labels = np.full(SHAPE, -1000, np.int16), np.zeros(SHAPE, np.uint8)
    hu[:, 4:36, 4:46] = 40
    labels[10:24, 8:26, 6:24] = LIVER.index
    labels[14:22, 14:26, 38:45] = SPLEEN.index
    labels[4:28, 28:33, 24:29] = AORTA.index
    return hu, labels


@pytest.fixture(scope="module")
def upright() -> list[Panel]:
    hu, labels = body()
    return panels(scene(image_from_array(hu, SPACING), labels))


def near(rgb: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a panel is of the hue of a colour, lit or not."""
    wanted = np.array(colour) / np.linalg.norm(colour)
    values = rgb.astype(float)
    size = np.linalg.norm(values, axis=2)
    return (size > 40) & ((values @ wanted) > 0.99 * size)


def middle(mask: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(mask)
    return float(y.mean()), float(x.mean())


def test_sides_are_shown_as_they_are_marked(upright: list[Panel]):
    drawn = {p.name: p for p in upright}
    assert list(drawn) == ["axial", "coronal", "sagittal", "front", "back"]
    assert all(p.rgb.shape == (*PANEL, 3) and p.rgb.dtype == np.uint8 for p in drawn.values())
    for name in ("axial", "coronal", "front"):
        panel = drawn[name]
        liver, spleen = (near(panel.rgb, o.colour) for o in (LIVER, SPLEEN))
        assert (panel.left, panel.right) == ("R", "L")
        assert middle(liver)[1] < middle(spleen)[1], name
    back = drawn["back"]
    assert (back.left, back.right) == ("L", "R")
    assert middle(near(back.rgb, LIVER.colour))[1] > middle(near(back.rgb, SPLEEN.colour))[1]
    # The aorta lies behind: low in the axial plane, and before the liver from the back.
    assert middle(near(drawn["axial"].rgb, AORTA.colour))[0] > PANEL[0] / 2
    assert near(back.rgb, AORTA.colour).sum() > near(drawn["front"].rgb, AORTA.colour).sum()


def test_head_is_up_and_mm_are_square():
    hu, labels = body()
    labels[labels == SPLEEN.index] = 0
    labels[26:28, 14:26, 38:45] = SPLEEN.index  # above the liver now
    drawn = {p.name: p for p in panels(scene(image_from_array(hu, SPACING), labels))}
    for name in ("front", "back"):
        panel = drawn[name]
        assert (panel.top, panel.bottom) == ("H", "F")
        spleen, liver = near(panel.rgb, SPLEEN.colour), near(panel.rgb, LIVER.colour)
        assert middle(spleen)[0] < middle(liver)[0]
    rows = np.flatnonzero(near(drawn["back"].rgb, AORTA.colour).any(axis=1))
    assert np.ptp(rows) * drawn["back"].mm_per_pixel == pytest.approx(24 * SPACING[2], abs=8)
    columns = np.flatnonzero(near(drawn["front"].rgb, SPLEEN.colour).any(axis=0))
    assert np.ptp(columns) * drawn["front"].mm_per_pixel == pytest.approx(7 * SPACING[0], abs=4)


@pytest.mark.parametrize(
    ("axes", "flips"),
    [((2, 1, 0), (-1, 1, -1)), ((1, 2, 0), (1, -1, 1)), ((0, 2, 1), (-1, -1, -1))],
)
def test_every_orientation_gives_the_same_pictures(upright: list[Panel], axes, flips):
    hu, labels = (np.transpose(a, axes)[tuple(slice(None, None, f) for f in flips)] for a in body())
    spacing = np.array(SPACING)[::-1][list(axes)][::-1]
    direction = np.zeros((3, 3))
    for stored, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        direction[2 - axis, 2 - stored] = flip
    image = image_from_array(hu, tuple(spacing), (0, 0, 0), tuple(direction.ravel()))
    for one, other in zip(panels(scene(image, labels)), upright, strict=True):
        assert np.array_equal(one.rgb, other.rgb), one.name


@pytest.mark.parametrize("value", [-1000, 40, np.nan])
def test_nothing_found(value, tmp_path: Path):
    hu = np.full((3, 5, 6), value, np.float32)
    image, labels = image_from_array(hu, SPACING), np.zeros((3, 5, 6), np.uint8)
    page, _ = write_report(
        tmp_path / "a", labels, image, measure("a", labels, image), Path("a.nii.gz")
    )
    assert page.read_text(encoding="utf-8").count("not found") >= 13


def test_the_slides_font_has_every_character_drawn(tmp_path: Path, monkeypatch):
    from PIL import ImageDraw, ImageFont

    drawn: set[str] = set()
    plain = ImageDraw.ImageDraw.text

    def text(self, xy, text, *arguments, **options):
        drawn.update(text)
        return plain(self, xy, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    hu, labels = body()
    hu[labels == LIVER.index] = -31  # a negative mean
    image = image_from_array(hu, SPACING)
    case = measure("a", labels, image)
    write_report(tmp_path / "a", labels, image, case, Path("a.nii.gz"))
    font = ImageFont.load_default(20)
    missing = bytes(font.getmask("\uffff"))
    assert "-" in drawn and [c for c in drawn if bytes(font.getmask(c)) == missing] == []


def test_long_names_end_before_the_notice(tmp_path: Path, monkeypatch):
    from PIL import ImageDraw

    boxes: dict[str, tuple[float, ...]] = {}
    plain = ImageDraw.ImageDraw.text

    def text(self, xy, text, *arguments, **options):
        boxes[text] = self.textbbox(xy, text, font=options["font"], anchor=options.get("anchor"))
        return plain(self, xy, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    hu, labels = body()
    image = image_from_array(hu, SPACING)
    for name in ("short", "case_" + 20 * "0123456789_"):
        boxes.clear()
        write_report(tmp_path / "a", labels, image, measure(name, labels, image), Path("a.nii.gz"))
        (notice,) = (box for shown, box in boxes.items() if "not for diagnosis" in shown)
        ((title, box),) = ((t, b) for t, b in boxes.items() if t[:4] == name[:4])
        assert title == name or (title[-1] == "…" and name.startswith(title[:-1]))
        assert box[2] < notice[0]
        assert (title == name) == (name == "short")
    assert notice[0] - box[2] < 60  # no more left out than must be


def test_an_organ_of_one_tiny_voxel_is_found(tmp_path: Path):
    hu, labels = np.full((5, 5, 5), 40, np.int16), np.zeros((5, 5, 5), np.uint8)
    labels[2, 2, 2] = LIVER.index
    image = image_from_array(hu, (0.5, 0.5, 0.5))
    case = measure("a", labels, image, organs={LIVER.index})
    page, _ = write_report(tmp_path / "a", labels, image, case, Path("a.nii.gz"))
    text = page.read_text(encoding="utf-8")
    assert "not found" not in text and "<td>0.0</td><td>40 ± 0</td>" in text


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path):
    hu, labels = body()
    image = image_from_array(hu, SPACING)
    case = measure("<script>x", labels, image, confidence={LIVER.index: 0.91})
    page, picture = write_report(tmp_path / "a.b", labels, image, case, Path("in/<i>.nii.gz"))
    assert (page.name, picture.name) == ("a.b.report.html", "a.b.png")
    text = page.read_text(encoding="utf-8")

    tags, addresses = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            addresses.extend(v for k, v in attributes if k in ("src", "href", "srcset"))

    Parser().feed(text)
    assert tags.count("img") == 5 and tags.count("tr") == 14
    assert not {"script", "link", "iframe"} & set(tags)
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"https?:|url\(", text)
    assert "&lt;script&gt;x" in text and "&lt;i&gt;.nii.gz" in text
    # 14 x 18 x 18 voxels of 0.02 ml
    assert "<td>90.7</td>" in text and "<td>91 %</td>" in text
    assert "left kidney missing" in text
    from PIL import Image

    assert Image.open(picture).size == (1920, 1080)
