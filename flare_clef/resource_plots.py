"""The picture of a resource profile: its curves over time, with the stages marked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flare_clef.errors import UserError
from flare_clef.paths import printable, replacing
from flare_clef.resource_summary import GPU_TOLERANCE_MB

_MB_PER_GB = 1024
_INK, _TREE, _MACHINE, _GPU, _LIMIT = "#333333", "#1f5fa8", "#b9c4d0", "#3c8d40", "#b03a2e"
_CASE_COLOURS = ("#7fa8d9", "#e0a458", "#8fbf88", "#c58fbf", "#d98880", "#8fc1c4")


def draw_profile(profile: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Write the picture (PNG) of ``profile``, as ``ResourceProfiler.result`` or its JSON file.

    Panels from above: RAM, CPU, GPU if one was measured, and a lane per stage, coloured by
    case. Raises ``UserError`` where matplotlib is missing or ``path`` cannot be
    written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            'no picture: matplotlib is missing, pip install "flare-clef[measure]"'
        ) from None
    curves, stages = profile["curves"], profile["stages"]
    has_gpu = profile["maxima"]["gpu_memory_mb"] is not None
    names = list(dict.fromkeys(stage["stage"] for stage in stages))
    heights = [2.2, 2.0] + [2.0] * has_gpu + ([0.35 + 0.22 * len(names)] if names else [])
    figure = Figure(figsize=(9, 1.0 + sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    rest = iter(panels)
    _draw_ram(next(rest), profile, curves)
    _draw_cpu(next(rest), profile, curves)
    if has_gpu:
        _draw_gpu(next(rest), profile, curves)
    if names:
        _draw_stages(next(rest), stages, names)
        for panel in panels[:-1]:
            for stage in stages:
                panel.axvline(stage["start_s"], color=_INK, alpha=0.15, linewidth=0.6, zorder=0)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=_INK, labelsize=8)
        panel.margins(x=0)
    panels[-1].set_xlim(0, max(profile["wall_s"], 1e-3))
    panels[-1].set_xlabel("time, s", fontsize=9)
    if title:
        shown = _shortened(printable(title))
        figure.suptitle(shown, fontsize=10, x=0.01, ha="left", color=_INK, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _draw_ram(panel: Any, profile: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
    ram_gb = [mb / _MB_PER_GB for mb in curves["ram_mb"]]
    panel.fill_between(curves["time_s"], ram_gb, color=_TREE, alpha=0.2, linewidth=0)
    panel.plot(curves["time_s"], ram_gb, color=_TREE, linewidth=1.2)
    panel.set_ylim(bottom=0)
    panel.set_ylabel(f"RAM ({profile['memory_kind']}), GB", fontsize=9)
    _caption(panel, profile, "ram_mb", "MB")


def _draw_cpu(panel: Any, profile: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
    machine = _gaps(curves["machine_cpu_percent"])
    panel.fill_between(
        curves["time_s"], machine, color=_MACHINE, alpha=0.5, linewidth=0, label="whole machine"
    )
    panel.plot(
        curves["time_s"], curves["cpu_percent"], color=_TREE, linewidth=1.2, label="measured"
    )
    panel.set_ylim(0, 105)
    panel.set_ylabel(f"CPU, % of {profile['cores']} cores", fontsize=9)
    panel.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    _caption(panel, profile, "cpu_percent", "%")


def _draw_gpu(panel: Any, profile: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
    memory_gb = [mb / _MB_PER_GB for mb in _gaps(curves["gpu_memory_mb"])]
    panel.plot(curves["time_s"], memory_gb, color=_GPU, linewidth=1.2)
    panel.axhline(GPU_TOLERANCE_MB / _MB_PER_GB, color=_LIMIT, linewidth=0.8, linestyle="--")
    panel.text(
        0.995,
        1.02,
        f"dashed: {GPU_TOLERANCE_MB} MB, below which the challenge counts memory as equal",
        transform=panel.transAxes,
        ha="right",
        fontsize=7,
        color=_LIMIT,
    )
    panel.set_ylim(bottom=0)
    panel.set_ylabel("GPU memory, GB", fontsize=9, color=_GPU)
    _caption(panel, profile, "gpu_memory_mb", "MB")
    if profile["maxima"]["gpu_percent"] is not None:
        right = panel.twinx()
        right.plot(curves["time_s"], _gaps(curves["gpu_percent"]), color=_INK, alpha=0.5, lw=0.8)
        right.set_ylim(0, 105)
        right.set_ylabel("GPU use, %", fontsize=9)
        right.spines["top"].set_visible(False)
        right.tick_params(colors=_INK, labelsize=8)


def _draw_stages(panel: Any, stages: Any, names: list[str]) -> None:
    cases = list(dict.fromkeys(stage["case"] for stage in stages))
    for case_number, case in enumerate(cases):
        colour = _CASE_COLOURS[case_number % len(_CASE_COLOURS)]
        members = [stage for stage in stages if stage["case"] == case]
        panel.barh(
            [names.index(stage["stage"]) for stage in members],
            [stage["seconds"] for stage in members],
            left=[stage["start_s"] for stage in members],
            height=0.7,
            color=colour,
            label=_shortened(case, 24),
        )
    panel.set_yticks(range(len(names)), names, parse_math=False)
    panel.set_ylim(len(names) - 0.4, -0.6)
    if len(cases) <= len(_CASE_COLOURS):
        legend = panel.legend(
            fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(cases)
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _caption(panel: Any, profile: Mapping[str, Any], column: str, unit: str) -> None:
    area = profile["areas"][f"{column}_s"]
    if area is not None:
        text = f"maximum {profile['maxima'][column]:,.0f} {unit}, area {area:,.0f} {unit}·s"
        panel.text(0.0, 1.02, text, transform=panel.transAxes, fontsize=8, color=_INK)


def _gaps(values: list[float | None]) -> list[float]:
    """None as nan, where matplotlib leaves a gap."""
    return [float("nan") if value is None else value for value in values]


def _shortened(text: str, length: int = 100) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
