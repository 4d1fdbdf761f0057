"""One case as a person wants to see it: ``NAME.report.html`` and ``NAME.png``.

The page is one file: pictures are inside it, and nothing is fetched from elsewhere. Text on
pictures needs Pillow, which is imported when a report is made.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flare_clef.images import Image
from flare_clef.measurements import CaseMeasurement, OrganMeasurement
from flare_clef.organs import ORGAN_BY_NAME
from flare_clef.report_pictures import PANEL, WINDOW_HU, Panel, panels, scene
from flare_clef.version import __version__
from flare_clef.writing import write_bytes

if TYPE_CHECKING:
    import numpy as np

_NOTICE = "For research, not for diagnosis."
_WHITE, _PALE = (240, 242, 245), (150, 156, 166)
_SLIDE = (1920, 1080)
_EDGE, _GAP, _HEAD = 40, 20, 92
_CAPTIONS = {
    "axial": "Axial, seen from the feet",
    "coronal": "Coronal, seen from the front",
    "sagittal": "Sagittal, seen from the left",
    "front": "Surfaces from the front",
    "back": "Surfaces from the back",
}


def write_report(
    stem: Path, labels: np.ndarray, image: Image, case: CaseMeasurement, source: Path
) -> tuple[Path, Path]:
    """Writes ``stem.report.html`` and ``stem.png`` for labels (z, y, x) of ``image``."""
    drawn = [(panel, _annotated(panel)) for panel in panels(scene(image, labels))]
    page, picture = (stem.with_name(stem.name + end) for end in (".report.html", ".png"))
    write_bytes(picture, _png(_slide(drawn, case)))
    write_bytes(page, _page(drawn, image, case, source).encode("utf-8"))
    return page, picture


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=6)
    return file.getvalue()


def annotated_png(panel: Panel) -> bytes:
    """A panel with its marks, as a PNG file."""
    return _png(_annotated(panel))


def _annotated(panel: Panel) -> Any:
    """The panel with its sides, its name and a bar of 5 cm."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    picture = Pillow.fromarray(panel.rgb)
    draw = ImageDraw.Draw(picture)
    height, width = PANEL
    edge = {"fill": _WHITE, "font": _font(24), "stroke_width": 3, "stroke_fill": (0, 0, 0)}
    draw.text((14, height / 2), panel.left, anchor="lm", **edge)
    draw.text((width - 14, height / 2), panel.right, anchor="rm", **edge)
    draw.text((width / 2, 10), panel.top, anchor="ma", **edge)
    draw.text((width / 2, height - 10), panel.bottom, anchor="md", **edge)
    small = {**edge, "font": _font(17)}
    draw.text((14, 12), panel.name.capitalize(), anchor="la", **small)
    bar = 50 / panel.mm_per_pixel
    if bar < width / 2:
        right, low = width - 14, height - 14
        draw.rectangle((right - bar - 1, low - 4, right + 1, low + 1), fill=(0, 0, 0))
        draw.rectangle((right - bar, low - 3, right, low), fill=_WHITE)
        draw.text((right, low - 8), "5 cm", anchor="rd", **small)
    return picture


def _slide(drawn: list[tuple[Panel, Any]], case: CaseMeasurement) -> Any:
    """Five panels and a table on one picture of 1920 x 1080."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    slide = Pillow.new("RGB", _SLIDE, (18, 20, 24))
    draw = ImageDraw.Draw(slide)
    low, high = WINDOW_HU
    about = f"window {low:.0f} to {high:.0f} HU    flare-clef {__version__}    {_NOTICE}"
    draw.text((_SLIDE[0] - _EDGE, 48), about, fill=_PALE, font=_font(20), anchor="rm")
    room = _SLIDE[0] - 2 * _EDGE - _GAP - _font(20).getlength(about)
    name = _shortened(case.case, _font(38), room)
    draw.text((_EDGE, 46), name, fill=_WHITE, font=_font(38), anchor="lm")
    for number, (_, picture) in enumerate(drawn):
        slide.paste(picture, _corner(number))
    _table(draw, _corner(5), case)
    return slide


def _shortened(text: str, font: Any, room: float) -> str:
    """``text``, with its end left out where it is wider than ``room`` pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _corner(number: int) -> tuple[int, int]:
    height, width = PANEL
    row, column = divmod(number, 3)
    return _EDGE + column * (width + _GAP), _HEAD + row * (height + _GAP)


def _table(draw: Any, corner: tuple[int, int], case: CaseMeasurement) -> None:
    left, top = corner
    right = left + PANEL[1]
    columns = (right - 240, right - 120, right - 4)
    sure = any(one.confidence is not None for one in case.organs)
    for text, x in zip(("ml", "mean HU", "confidence" if sure else ""), columns, strict=True):
        draw.text((x, top + 14), text, fill=_PALE, font=_font(17), anchor="rm")
    step = (PANEL[0] - 34) / max(13, len(case.organs))
    for row, one in enumerate(case.organs):
        y = top + 34 + (row + 0.5) * step
        draw.line((left, y - step / 2, right, y - step / 2), fill=(44, 48, 56))
        colour = ORGAN_BY_NAME[one.organ].colour
        draw.rounded_rectangle((left + 2, y - 8, left + 20, y + 8), 4, fill=colour)
        ink = _WHITE if one.parts else _PALE
        title = ORGAN_BY_NAME[one.organ].title
        draw.text((left + 34, y), title, fill=ink, font=_font(20), anchor="lm")
        for text, x in zip((_volume(one), _mean(one), _sure(one)), columns, strict=True):
            # The picture's font draws a box for a true minus.
            text = text.replace("−", "-")
            draw.text((x, y), text, fill=ink, font=_font(20), anchor="rm")


def _volume(one: OrganMeasurement) -> str:
    if not one.parts:
        return "not found"
    return f"{one.volume_ml:,.0f}" if one.volume_ml >= 100 else f"{one.volume_ml:.1f}"


def _mean(one: OrganMeasurement) -> str:
    return "" if one.hu_mean is None else _signed(one.hu_mean)


def _signed(value: float | None) -> str:
    """A whole number with a true minus, as wide as a plus and never broken off its figure."""
    return "" if value is None else f"{value:.0f}".replace("-", "−")


def _sure(one: OrganMeasurement) -> str:
    return "" if one.confidence is None else f"{100 * one.confidence:.0f} %"


_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--pale:#616a76;--page:#f4f5f7;--card:#fff;
--line:#e2e5ea;--note:#8a5a00;--noteback:#fff6e0}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebef;--pale:#98a1ad;--page:#121418;
--card:#1a1d22;--line:#2c3138;--note:#f0c674;--noteback:#2a2413}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 20px;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
h1{font-size:28px;line-height:1.2;margin:0;overflow-wrap:anywhere}
.sub{color:var(--pale);margin:4px 0 20px;overflow-wrap:anywhere}
.panels{display:grid;gap:12px;grid-template-columns:repeat(6,1fr)}
figure{margin:0;background:#000;border-radius:10px;overflow:hidden;grid-column:span 2}
figure.half{grid-column:span 3}
img{display:block;width:100%;height:auto}
figcaption{padding:6px 12px 8px;color:#aab2bd;font-size:13px;background:#0d0f12}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;margin-top:16px;
padding:6px 18px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
thead th{border:0;color:var(--pale);font-weight:500;font-size:13px}
th:first-child{text-align:left;font-weight:500;padding-left:0}
tr.none{color:var(--pale)}
i{display:inline-block;width:13px;height:13px;border-radius:4px;margin-right:10px;
vertical-align:-1px}
.notes{background:var(--noteback);color:var(--note);padding:12px 18px}
.notes p{margin:0 0 4px;font-weight:600}
.notes ul{margin:0;padding-left:20px}
footer{color:var(--pale);font-size:13px;margin-top:18px}
@media(max-width:1160px){th,td{padding:7px 5px;font-size:14px}thead th{font-size:12px}}
@media(max-width:900px){.wide{display:none}}
@media(max-width:760px){body{padding:16px 12px}.panels{grid-template-columns:1fr}
figure,figure.half{grid-column:auto}h1{font-size:22px}
.card{padding:4px 12px}th,td{padding:7px 3px;font-size:14px;vertical-align:bottom}
thead th,th:first-child{white-space:normal}i{margin-right:7px}}
@media print{body{max-width:none;background:#fff}figure,.card{break-inside:avoid}}
"""


def _page(drawn: list[tuple[Panel, Any]], image: Image, case: CaseMeasurement, source: Path) -> str:
    figures = "".join(
        f"<figure{' class=half' if panel.name in ('front', 'back') else ''}>"
        f'<img alt="{_CAPTIONS[panel.name]}" width="{PANEL[1]}" height="{PANEL[0]}" '
        f'src="data:image/png;base64,{base64.b64encode(_png(picture)).decode()}">'
        f"<figcaption>{_CAPTIONS[panel.name]}</figcaption></figure>"
        for panel, picture in drawn
    )
    rows = "".join(_row(one) for one in case.organs)
    hints = "".join(f"<li>{escape(text)}</li>" for text in [*image.warnings, *case.all_warnings()])
    notes = f'<div class="card notes"><p>Worth a look</p><ul>{hints}</ul></div>' if hints else ""
    size = " × ".join(map(str, image.array.shape[::-1]))
    spacing = " × ".join(f"{s:.4g}" for s in image.spacing_mm)
    low, high = WINDOW_HU
    about = f"{size} voxels of {spacing}&nbsp;mm; window {_signed(low)} to {_signed(high)}&nbsp;HU"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(case.case)}: abdominal organs</title><style>{_STYLE}</style></head>
<body><h1>{escape(case.case)}</h1>
<p class="sub">{escape(source.name)}, {about}</p>
<div class="panels">{figures}</div>
{notes}
<div class="card"><table><thead><tr><th>Organ</th><th>Volume, ml</th><th>HU, mean ± SD</th>
<th class="wide">HU, 5 / 50 / 95 %</th><th class="wide">Width × depth × height, mm</th>
<th class="wide">Parts</th><th class="wide">Cut at</th><th>Confidence</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<footer><p>{_NOTICE} Made by flare-clef {__version__}. R and L are the patient's right and left,
A front, P back, H head, F feet. Contours are smoothed over one voxel, surfaces over a few
millimetres; figures are of the labels as written. Confidence is the mean sigmoid of the
network's output over the organ, 50 to 100 %; it is not a probability of being right.</p></footer>
</body></html>
"""


def _row(one: OrganMeasurement) -> str:
    organ = ORGAN_BY_NAME[one.organ]
    swatch = f'<i style="background:rgb{organ.colour}"></i>'
    head = f"<th>{swatch}{organ.title}</th>"
    if one.box_mm is None:
        return (
            f'<tr class="none">{head}<td>not found</td><td></td><td class="wide"></td>'
            '<td class="wide"></td><td class="wide"></td><td class="wide"></td><td></td></tr>'
        )
    hu = thirds = ""
    if one.hu_mean is not None:
        hu = f"{_signed(one.hu_mean)} ± {one.hu_sd:.0f}"
        thirds = " / ".join(map(_signed, (one.hu_p05, one.hu_median, one.hu_p95)))
    box = " × ".join(f"{n:.0f}" for n in one.box_mm)
    return (
        f"<tr>{head}<td>{_volume(one)}</td><td>{hu}</td>"
        f'<td class="wide">{thirds}</td><td class="wide">{box}</td>'
        f'<td class="wide">{one.parts}</td>'
        f'<td class="wide">{", ".join(one.touches_edge)}</td><td>{_sure(one)}</td></tr>'
    )
