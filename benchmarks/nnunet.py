"""One case side by side with nnU-Net v2: wall time and peak memory, in one run, on the CPU.

    python benchmarks/nnunet.py SCAN --python NNUNET_VENV/bin/python

nnU-Net (``pip install nnunetv2`` in an environment of its own) runs a 3D full-resolution
plan at 3 mm (patch 96 x 160 x 160, six stages of 32 to 320 channels, 14 classes) with random
weights, step size 0.5 and no mirroring. Ours runs ``flare-clef predict``. Each is one process,
measured from before it starts until its label map is written. Random weights cost what trained
ones do; only time and memory are compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

STAGES = 6


def plans() -> dict:
    """What ``nnUNetv2_plan_experiment`` would write for such a data set, as far as it is read."""
    order0 = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    order3 = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    resampling = "resample_data_or_seg_to_shape"
    return {
        "dataset_name": "Dataset001_Organs",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [3.0, 3.0, 3.0],
        "original_median_shape_after_transp": [120, 140, 140],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "mean": 100.0,
                "std": 60.0,
                "percentile_00_5": -50.0,
                "percentile_99_5": 300.0,
                "max": 1000.0,
                "min": -1000.0,
                "median": 100.0,
            }
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [96, 160, 160],
                "median_image_size_in_voxels": [120, 140, 140],
                "spacing": [3.0, 3.0, 3.0],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": resampling,
                "resampling_fn_seg": resampling,
                "resampling_fn_data_kwargs": order3,
                "resampling_fn_seg_kwargs": order0,
                "resampling_fn_probabilities": resampling,
                "resampling_fn_probabilities_kwargs": {**order3, "order": 1},
                "batch_dice": False,
                "architecture": {
                    "network_class_name": (
                        "dynamic_network_architectures.architectures.unet.PlainConvUNet"
                    ),
                    "arch_kwargs": {
                        "n_stages": STAGES,
                        "features_per_stage": [32, 64, 128, 256, 320, 320],
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": [[3, 3, 3]] * STAGES,
                        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1),
                        "n_conv_per_stage": [2] * STAGES,
                        "n_conv_per_stage_decoder": [2] * (STAGES - 1),
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    }


def run_nnunet(scan: str, output: str) -> None:
    """In nnU-Net's own environment: read, preprocess, predict, export."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, tempfile.gettempdir())
    import torch
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    manager = PlansManager(plans())
    configuration = manager.get_configuration("3d_fullres")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        14,
        deep_supervision=False,
    ).eval()
    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_mirroring=False,
        device=torch.device("cpu"),
        perform_everything_on_device=False,
        allow_tqdm=False,
    )
    labels = {"background": 0, **{f"organ_{i}": i for i in range(1, 14)}}
    predictor.manual_initialization(
        network,
        manager,
        configuration,
        [network.state_dict()],
        {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"},
        "nnUNetTrainer",
        None,
    )
    image, properties = SimpleITKIO().read_images([scan])
    predictor.predict_single_npy_array(image, properties, None, output, False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scan", type=Path)
    parser.add_argument("--python", help="the Python of an environment with nnunetv2")
    arguments = parser.parse_args()
    if arguments.python is None:
        run_nnunet(str(arguments.scan), os.environ["NNUNET_OUTPUT"])
        return

    from measuring import predict, run

    with tempfile.TemporaryDirectory() as folder:
        os.environ["NNUNET_OUTPUT"] = str(Path(folder) / "theirs")
        ours = predict(arguments.scan, Path(folder) / "ours.nii.gz")
        theirs = run([arguments.python, __file__, str(arguments.scan)])
        again = predict(arguments.scan, Path(folder) / "ours.nii.gz")
        if theirs.code or ours.code or not (Path(folder) / "theirs.nii.gz").exists():
            sys.exit(f"failed:\n{theirs.log[-2000:]}\n{ours.log[-500:]}")
    seconds = (ours.seconds + again.seconds) / 2
    print(f"nnU-Net v2, 3 mm  {theirs.seconds:7.1f} s  {theirs.peak_mib:6.0f} MiB")
    print(f"flare-clef        {seconds:7.1f} s  {ours.peak_mib:6.0f} MiB")
    faster, memory = theirs.seconds / seconds, ours.peak_mib / theirs.peak_mib
    print(f"{faster:.1f} x faster, {memory:.2f} x the memory")


if __name__ == "__main__":
    main()
