"""Recipes, cases, schedule, augmentation, and a whole small training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import TINY, body_hu, lively_network, write_scan

from flare_clef.errors import UserError
from flare_clef.training.augmentation import AugmentationSettings, augment, draw_affine
from flare_clef.training.batches import draw_order
from flare_clef.training.cases import find_cases, prepare_case
from flare_clef.training.checkpoints import BEFORE, DAMAGED, LAST, load_checkpoint, save_checkpoint
from flare_clef.training.finetuning import Finetuning, freeze_statistics
from flare_clef.training.finetuning_plan import FinetuningPlan, Stage
from flare_clef.training.recipe import load_recipe
from flare_clef.weights import load_weights

ROOT = Path(__file__).parents[2]


def make_folder(folder: Path, count: int = 3) -> Path:
    """Bodies whose lump is liver, with ``cases.json``."""
    entries = {}
    for seed in range(count):
        hu = body_hu(seed=seed)
        long = {"spacing": (1.5, 1.5, 12.0)}  # no air is added below 220 mm
        write_scan(folder / "images" / f"c{seed}_0000.nii.gz", hu, **long)
        write_scan(folder / "labels" / f"c{seed}.nii.gz", (hu > 120).astype(np.uint8), **long)
        entries[f"c{seed}"] = {"organs": ["liver"], "source": "made by a test"}
    (folder / "cases.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("data"))
    store = folder / "store"
    return [prepare_case(case, store, 32) for case in find_cases(folder)]


def test_prepared_labels_lie_on_the_lump(prepared):
    image, labels = prepared[0].image, prepared[0].labels
    assert image.dtype == np.float16 and labels.dtype == np.uint8
    assert image[labels == 1].mean() > 0.4 > 0 > image[labels == 0].mean()
    assert prepared[0].case.labelled.tolist() == [True] + [False] * 12


def test_bad_pairs_are_named(tmp_path: Path):
    folder = make_folder(tmp_path, 1)
    write_scan(folder / "labels" / "c0.nii.gz", np.zeros((5, 6, 7), np.uint8))
    (case,) = find_cases(folder)
    with pytest.raises(UserError, match=r"c0.nii.gz: \(5, 6, 7\) voxels"):
        prepare_case(case, tmp_path / "store", 32)
    write_scan(folder / "labels" / "c0.nii.gz", np.full((20, 40, 44), 14, np.uint8))
    with pytest.raises(UserError, match="holds the label 14"):
        prepare_case(case, tmp_path / "store", 32)
    with pytest.raises(UserError, match="no such folder"):
        find_cases(tmp_path / "elsewhere" / "data")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = 1", "unknown key 'seed'"),
        ("[finetune]\nseed = 'x'\nstages = []", "seed = 'x': must be a whole number"),
        ("[finetune]\nstages = []", "no stage"),
        ("[finetune]\nstages = [{grid = 50, steps = 1, learning_rate = [1, 1]}]", "multiple of 32"),
        ("[finetune]\nstages = [{grid = 64, steps = 0, learning_rate = [1, 1]}]", "1 or more"),
        ("[finetune]\nstages = [{grid = 64, steps = 1, learning_rate = 1}]", "must be a list"),
        ("[finetune]\nstages = [{grid = 64}]", "steps = 0, epochs = 0: 1 or more of one"),
        ("[finetune]\npatience_epochs = 2\n"
         "stages = [{grid = 32, steps = 1}, {grid = 64, steps = 1}]",
         "would end the run at a grid that is not the last; give all stages one grid"),
        ("[pretrain]\nmargin = 2.0\n[finetune]\nstages = [{grid = 64, steps = 1}]",
         "pretrain.margin = 2.0: must be -1 to 1"),
        ("[data]\nfolds = 5\nfold = 5\n[finetune]\nstages = [{grid = 64, steps = 1}]",
         "data.fold = 5: must be below data.folds"),
        ("[finetune]\nloss = 'l2'\nstages = [{grid = 64, steps = 1, learning_rate = [1, 1]}]",
         "must be 'softmax' or 'sigmoid'"),
        ("[finetune]\noptimizer = 'sgd'\nstages = [{grid = 64, steps = 1}]",
         "finetune.optimizer = 'sgd': must be 'adam' or 'muon'"),
        ("[finetune]\nstages = [{grid = 128, block = 80, steps = 1}]",
         "stages[0].block = 80: must be 0, or a multiple of 32 from 64 to its grid"),
        ("[finetune]\nstages = [{grid = 96, block = 128, steps = 1}]", "block = 128: must be 0"),
        ("[export.offsets]\nliver = nan\n[finetune]\nstages = [{grid = 64, steps = 1}]",
         "export.offsets = [nan]: must be -20 to 20 each"),
        ("[export.offsets]\ncolon = 1.0\n[finetune]\nstages = [{grid = 64, steps = 1}]",
         "export.offsets: 'colon' is no organ"),
        ("[export]\noperating_points = true\noffsets = {liver = 1}\n"
         "[finetune]\nstages = [{grid = 64, steps = 1}]", "leave one out"),
        ("[finetune]\nce_share = -1.0\nstages = [{grid = 64, steps = 1}]",
         "finetune.ce_share = -1.0: must be 0 or more"),
        ("[finetune]\nce_balance = 1.5\nstages = [{grid = 64, steps = 1}]",
         "finetune.ce_balance = 1.5: must be 0 to 1"),
        ("[finetune]\nce_share = 0\ndice_share = 0\nstages = [{grid = 64, steps = 1}]",
         "ce_share = 0.0 and dice_share = 0.0: one must be above 0"),
        ("[finetune]\nseed = 99999999999999999999\nstages = [{grid = 64, steps = 1}]",
         "finetune.seed = 99999999999999999999: must be 0 to 1000000000"),
        ("[finetune]\nstages = [{grid = 64, steps = 1, augmentation = {noise_hu = -5}}]",
         "stages[0].augmentation.noise_hu = -5.0: must be 0 or more"),
        ("[finetune]\nstages = [{grid = 64, steps = 1, augmentation = {blur_probability = 7}}]",
         "stages[0].augmentation.blur_probability = 7.0: must be 0 to 1"),
        ("[finetune]\nstages = [{grid = 64, steps = 1, augmentation = {view_cut = 3}}]",
         "stages[0].augmentation.view_cut = 3.0: must be 0 or more and below 1"),
        ("[network]\nhead_channels = 0\n[finetune]\nstages = [{grid = 64, steps = 1}]",
         "network.head_channels = 0: must be 1 or more"),
        ("[network]\nclasses = 4\n[finetune]\nstages = [{grid = 64, steps = 1}]",
         "network.classes = 4: must be 13"),
        ("[data]\nfolds = 5\nvalidation = ['a']\n[finetune]\nstages = [{grid = 64, steps = 1}]",
         "data.validation: with folds = 5 a fold is kept aside; leave one out"),
        ("[finetune]\nstages = [{grid = 64, steps = 1, freeze_after = 0}]",
         "finetune.stages[0].freeze_after = 0.0: keeps the statistics of the weights in"),
        ("[network]\nwidths = [4]", "encoder_convs needs one number per level"),
        ("not toml", "not TOML"),
    ],
)  # fmt: skip
def test_bad_recipes_get_one_line(tmp_path: Path, text: str, words: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "r.toml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_recipe_loads_and_takes_overrides():
    recipe = load_recipe(ROOT / "recipes" / "flare_clef.toml", ["finetune.seed=7"])
    assert recipe.finetune.seed == 7
    assert [stage.grid for stage in recipe.finetune.stages] == [96, 128, 192]
    assert recipe.finetune.frozen_at(recipe.finetune.steps - 1)
    assert len(recipe.data.validation) == 4


def test_the_recipe_for_ones_own_scans_starts_from_the_shipped_weights():
    path = ROOT / "recipes" / "finetune.toml"
    recipe = load_recipe(path)
    start = load_weights((path.parent / recipe.finetune.start).resolve())
    assert start.path == ROOT / "weights" / "flare_clef.safetensors"
    assert start.architecture == recipe.network
    assert recipe.finetune.frozen_at(0) and recipe.data.folders == ()
    assert "research only" in recipe.export.licence
    assert recipe.export.offsets == start.record["operating_points"]


def test_learning_rate_by_hand():
    plan = FinetuningPlan(
        stages=(Stage(32, 5, (1e-2, 1e-3)), Stage(32, 2, (5e-4, 1e-4))), warmup_steps=2
    )
    rates = [plan.learning_rate(step) for step in range(7)]
    # Half a cosine from first to last, halved in the first step of two that warm up.
    assert rates[0] == pytest.approx(0.5e-2)
    assert rates[2] == pytest.approx((1e-2 + 1e-3) / 2)
    assert rates[4:] == pytest.approx([1e-3, 5e-4, 1e-4])


def test_every_case_in_turn_and_repeats(prepared):
    plan = FinetuningPlan(stages=(Stage(32, 100, (1, 1)),), repeats={"c1": 0.5})
    order = draw_order(plan, prepared)
    assert order == draw_order(plan, prepared)
    assert [order.count(k) for k in range(3)] == [40, 20, 40]


def test_seldom_cases_are_spread_over_all_rounds():
    """Not all of them in the same rounds, with none in between."""
    names = [f"often{i}" for i in range(10)] + [f"seldom{i}" for i in range(30)]
    cases = [SimpleNamespace(case=SimpleNamespace(name=name)) for name in names]
    plan = FinetuningPlan(stages=(Stage(32, 600, (1, 1)),), repeats={"seldom*": 1 / 3})
    seldom = [index >= 10 for index in draw_order(plan, cases)]
    counts = [sum(seldom[start : start + 20]) for start in range(0, 600, 20)]
    assert sum(counts) == pytest.approx(300, abs=10)
    assert min(counts) >= 4 and max(counts) <= 16


def test_repeats_by_pattern(prepared):
    """A case's own name goes before patterns, an earlier pattern before a later one."""
    repeats = {"c*": 0.25, "c1": 0.5, "*2": 0.1}
    plan = FinetuningPlan(stages=(Stage(32, 100, (1, 1)),), repeats=repeats)
    assert [plan.repeats_of(name) for name in ("c1", "c2", "d2", "d1")] == [0.5, 0.25, 0.1, 1]
    assert [draw_order(plan, prepared).count(k) for k in range(3)] == [25, 50, 25]


def test_augmentation_moves_image_and_labels_alike():
    """A bright ball and its label stay on each other, whatever the deformation."""
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, 48)] * 3, indexing="ij")
    ball = (z - 0.2) ** 2 + (y + 0.1) ** 2 + (x - 0.3) ** 2 < 0.1
    image, labels = torch.where(ball, 0.8, -0.2), ball.to(torch.uint8)
    quiet = AugmentationSettings(
        gain=0, offset_hu=0, gamma=0, noise_hu=0, blur_probability=0, clip_probability=0
    )
    for seed in range(10):
        moved, marks = augment(
            image, labels, (32, 40, 48), quiet, torch.Generator().manual_seed(seed)
        )
        bright, marked = moved > 0.3, marks == 1
        assert marked.sum() > 200
        assert 2 * (bright & marked).sum() / (bright.sum() + marked.sum()) > 0.93


def test_augmentation_is_decided_by_its_seed_and_never_mirrors():
    image, labels = torch.rand(16, 16, 16) * 2 - 1, torch.zeros(16, 16, 16, dtype=torch.uint8)
    settings = AugmentationSettings()
    one, two, other = (
        augment(image, labels, (16, 16, 16), settings, torch.Generator().manual_seed(s))[0]
        for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.min() >= -1 and one.max() <= 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        affine = draw_affine(settings, generator)[:, :3]
        assert (affine.diagonal() > 0.3).all() and torch.linalg.det(affine) > 0


def test_air_stays_air():
    image = torch.full((16, 16, 16), -1.0)
    image[8:] = 0.1
    settings = AugmentationSettings(
        scale=0, axis_scale=0, rotation_degrees=0, shift=0, view_probability=0, elastic=0
    )
    labels = torch.zeros(16, 16, 16, dtype=torch.uint8)
    for seed in range(20):
        out, _ = augment(image, labels, (16,) * 3, settings, torch.Generator().manual_seed(seed))
        assert (out[:7] == -1).all()


def test_frozen_statistics_are_the_mean_over_the_volumes():
    network = lively_network(TINY)
    volumes = [torch.rand(1, 1, 16, 16, 16) * 2 - 1 for _ in range(3)]
    spoilt = torch.full((1, 1, 16, 16, 16), math.nan)
    freeze_statistics(network, [volumes[0], spoilt, *volumes[1:]], "fp32")
    first = network.backbone.encoder[0][0]
    with torch.no_grad():
        means = [first.conv(volume).mean((0, 2, 3, 4)) for volume in volumes]
    assert torch.allclose(first.norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert not first.norm.training


def test_volumes_for_the_statistics_are_made_in_full_precision():
    """In bf16 the network computes; where a volume's voxels lie would be wrong by voxels."""
    rounded = []

    def volumes():
        for _ in range(3):
            rounded.append(torch.is_autocast_enabled("cpu"))
            yield torch.rand(1, 1, 16, 16, 16)

    freeze_statistics(lively_network(TINY), volumes(), "bf16")
    assert rounded == [False] * 3


@pytest.mark.parametrize(("freeze_after", "kept"), [(0.0, True), (0.5, False)])
def test_frozen_from_the_first_step_the_starts_statistics_stay(
    prepared, tmp_path: Path, freeze_after, kept
):
    """Those of a block's volumes would not fit weights that were trained on whole bodies."""
    plan = FinetuningPlan((Stage(32, 2, (1e-3, 1e-3), freeze_after, block=16),), start="w")
    start = lively_network(TINY)
    trained = Finetuning(plan, prepared, tmp_path / "run", architecture=TINY, start=start).run()
    before, after = start.state_dict(), trained.state_dict()
    names = [name for name in before if "running_" in name]
    assert names
    assert all(torch.equal(before[name], after[name]) for name in names) == kept


def test_damaged_checkpoint_falls_back(tmp_path: Path, capsys):
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step})
    assert load_checkpoint(tmp_path)["step"] == 2
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:50])
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "cannot be read" in capsys.readouterr().err
    # The next one does not take the place of the only good one.
    save_checkpoint(tmp_path, {"step": 3})
    (tmp_path / LAST).write_bytes(b"")
    assert load_checkpoint(tmp_path)["step"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {BEFORE, DAMAGED}


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step, "x": torch.zeros(1000)})
    content = bytearray((tmp_path / LAST).read_bytes())
    content[content.index(bytes(2000)) + 1000] ^= 1
    (tmp_path / LAST).write_bytes(content)
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "checksum of" in capsys.readouterr().err


def _plan(steps: int) -> FinetuningPlan:
    return FinetuningPlan(
        stages=(Stage(32, steps, (1e-2, 1e-3), freeze_after=0.5),), warmup_steps=3
    )


def test_a_run_that_was_broken_off_ends_with_the_same_parameters(prepared, tmp_path: Path):
    torch.use_deterministic_algorithms(False)
    whole = Finetuning(_plan(8), prepared, tmp_path / "whole", architecture=TINY).run()

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 4:
            raise Stop

    broken = Finetuning(
        _plan(8), prepared, tmp_path / "broken", architecture=TINY, on_step=stop,
        checkpoint_seconds=0,
    )  # fmt: skip
    with pytest.raises(Stop):
        broken.run()
    resumed = Finetuning(_plan(8), prepared, tmp_path / "broken", architecture=TINY)
    assert 0 < resumed.step < 8
    again = resumed.run()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_train_finetune_learns_and_predict_uses_it(tmp_path: Path):
    """From scans to a weights file by the command, and with it a scan it has not seen."""
    from typer.testing import CliRunner

    from flare_clef import Segmenter
    from flare_clef.cli import app
    from flare_clef.metrics import dice

    make_folder(tmp_path / "data", 4)
    (tmp_path / "r.toml").write_text(
        """
        validate_every_steps = 1000
        [data]
        folders = ["data"]
        validation = ["c3"]
        grid = 32
        [network]
        widths = [4, 8, 16]
        encoder_convs = [1, 2, 2]
        decoder_convs = [1, 2]
        head_channels = 4
        [[finetune.stages]]
        grid = 32
        steps = 150
        learning_rate = [2e-2, 1e-3]
        freeze_after = 0.7
        augmentation = false
        """
    )
    done = CliRunner().invoke(
        app,
        ["train", "finetune", str(tmp_path / "r.toml"), "--output", str(tmp_path / "run"),
         "--precision", "fp32", "--threads", "1"],
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exc_info)
    segmenter = Segmenter(tmp_path / "run" / "weights.safetensors", precision="fp32")
    assert segmenter.weights.record["trained_on"].keys() == {"c0", "c1", "c2"}
    found = segmenter.predict(tmp_path / "data" / "images" / "c3_0000.nii.gz")
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "data" / "labels" / "c3.nii.gz")))
    score = dice(sitk.GetArrayFromImage(found), truth, 1)
    assert score > 0.9
    assert segmenter.weights.record["validation_dice"]["c3"]["liver"] == pytest.approx(
        score, abs=1e-3
    )
