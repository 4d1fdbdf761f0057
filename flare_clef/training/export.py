"""From a run to the safetensors file that inference reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import SafetensorError

from flare_clef.calibration import Calibration
from flare_clef.errors import UserError, one_line
from flare_clef.integer_convolution import fits_int8
from flare_clef.network import SegmentationNetwork
from flare_clef.training.cases import Case, read_labels
from flare_clef.training.doubt import UNDECIDED
from flare_clef.training.provenance import (
    PRETRAINING_CASES,
    START_TRAINED_ON,
    TRAINED_ON,
    trained_on,
)
from flare_clef.training.validation import DiceTable, means
from flare_clef.weights import save_weights

_ALLOWED_DIFFERENCE = 0.01
"""In Dice: what weights in half precision may move."""


def export(
    path: Path,
    network: SegmentationNetwork,
    description: dict[str, Any],
    table: DiceTable,
    *,
    kept_aside: Sequence[Case],
    precision: str,
    steps: int,
    hours: float,
    calibration: Calibration | None = None,
    operating_points: dict[str, float] | None = None,
    mean_with: Sequence[dict[str, Any]] = (),
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes ``network`` with the record of how it was made and what it reached.

    ``description`` is the run's (:func:`flare_clef.training.provenance.describe`), ``table``
    the trainer's validation, ``mean_with`` the records of the other weights of which ``network``
    is the mean; ``say`` is told what 8-bit inference loses on the first case kept aside. Raises
    UserError, and writes nothing, where ``predict`` with the file does not repeat that table on
    it.
    """
    recipe = without_places(description["recipe"])
    seen: dict[str, str] = {}
    before: dict[str, str] = {}
    for other in mean_with:
        seen.update(other.get(TRAINED_ON, {}))
        before.update(other.get(START_TRAINED_ON, {}))
    seen.update(trained_on(description))
    before.update(description.get(START_TRAINED_ON, {}))
    record: dict[str, Any] = {
        **description["versions"],
        "machine": description["machine"]["processor"],
        "steps": steps,
        "hours": round(hours, 2),
        "recipe": recipe,
        "source": description["source"],
        TRAINED_ON: seen,
        **({START_TRAINED_ON: before} if before else {}),
        **_earlier(description),
        **_parts(mean_with),
        "validation_dice": table,
        "validation_means": {name: round(v, 4) for name, v in means(table).items()},
        "operating_points": operating_points or {},
        "notes": recipe["export"]["notes"],
    }
    candidate = path.with_name(f".candidate.{os.getpid()}.{path.name}")
    try:
        save_weights(
            candidate,
            network,
            grid=recipe["finetune"]["stages"][-1]["grid"],
            record=record,
            licence=recipe["export"]["licence"],
            calibration=calibration,
        )
        if judged := [case for case in kept_aside if case.name in table]:
            check_prediction(candidate, judged[0], table, precision)
            if calibration is not None and fits_int8(network.architecture):
                say(_in_8_bits(candidate, judged[0], table))
        os.replace(candidate, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be written ({reason})") from None
    finally:
        candidate.unlink(missing_ok=True)


def _earlier(description: dict[str, Any]) -> dict[str, Any]:
    """What else made the weights: the run's own pre-training, and recipes since changed."""
    recipe, found = description["recipe"], dict[str, Any]()
    if recipe["pretrain"] and not recipe["finetune"]["start"]:
        cases = description.get(PRETRAINING_CASES, {})
        found["pretrained_on"] = {name: case["source"] for name, case in cases.items()}
    if former := description.get("earlier"):
        found["earlier_recipes"] = [without_places(one["recipe"]) for one in former]
    return found


def _parts(mean_with: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the others were made that the weights are the mean with."""
    kept = ("steps", "hours", "recipe")
    parts = [{key: other[key] for key in kept if key in other} for other in mean_with]
    return {"mean_with": parts} if parts else {}


def without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """``recipe`` with the last part of every path alone: weights travel, folders need not."""
    data = {
        key: [Path(folder).name for folder in value] if key in ("folders", "unlabelled") else value
        for key, value in recipe["data"].items()
    }
    finetune = {**recipe["finetune"], "start": Path(recipe["finetune"]["start"]).name}
    propagate = recipe["propagate"] and {
        **recipe["propagate"],
        "atlases": Path(recipe["propagate"]["atlases"]).name,
    }
    names = [Path(name).name for name in recipe["export"].get("mean_with", ())]
    return {
        **recipe,
        "data": data,
        "finetune": finetune,
        "propagate": propagate,
        "export": {**recipe["export"], "mean_with": names},
    }


def _dice_of(weights: Path, case: Case, precision: str) -> dict[str, float]:
    """Dice of what ``predict`` gives for ``case``."""
    import SimpleITK as sitk

    from flare_clef.metrics import dice_per_organ
    from flare_clef.segmenter import Segmenter

    predicted = Segmenter(weights, device="cpu", precision=precision).predict(case.image)
    labels, truth = sitk.GetArrayFromImage(predicted), read_labels(case).array
    labels[truth == UNDECIDED] = 0
    return dice_per_organ(labels, truth, case.judged)


def _in_8_bits(weights: Path, case: Case, table: DiceTable) -> str:
    found, expected = _dice_of(weights, case, "int8"), table[case.name]
    lost = {organ: found.get(organ, 0.0) - value for organ, value in expected.items()}
    worst = min(lost, key=lost.__getitem__)
    return (
        f"8-bit inference on {case.name}: mean DSC {fmean(lost.values()):+.4f}, "
        f"{worst} {lost[worst]:+.4f}"
    )


def check_prediction(weights: Path, case: Case, table: DiceTable, precision: str) -> None:
    """Compares what ``predict`` gives for ``case`` with the trainer's row of ``table``."""
    found = _dice_of(weights, case, precision)
    expected = table[case.name]
    for organ in sorted(found.keys() | expected.keys()):
        one, two = found.get(organ, 0.0), expected.get(organ, 0.0)
        if not abs(one - two) <= _ALLOWED_DIFFERENCE:
            raise UserError(
                f"{case.name}: predict gives a Dice of {one:.4f} for the {organ}, the trainer's "
                f"validation {two:.4f}; weights that predict otherwise are not exported"
            )
