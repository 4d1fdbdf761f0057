"""Slabs and folding give the plain module's result; limits are kept or refused."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, lively_network
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from flare_clef import precision
from flare_clef.errors import UserError
from flare_clef.inference import FoldedNetwork, activated
from flare_clef.integer_convolution import FULL, REDUCED
from flare_clef.network import Architecture, channels_last, convolve
from flare_clef.precision import choose_device, choose_precision

CPU = torch.device("cpu")
DEEPER_TOP = Architecture(
    widths=(4, 8, 16), encoder_convs=(3, 2, 2), decoder_convs=(3, 2), head_channels=4
)


@pytest.mark.parametrize("architecture", [TINY, DEEPER_TOP])
@pytest.mark.parametrize("slices", [2, 6, 8, 16, 64])
@pytest.mark.parametrize("grid", [(32, 32, 32), (36, 12, 20)])
def test_slabs_equal_the_plain_module(architecture, slices, grid, monkeypatch):
    network = lively_network(architecture)
    monkeypatch.setattr(FoldedNetwork, "slab_slices", (slices,))
    volume = torch.rand(grid) * 2 - 1
    with torch.no_grad():
        plain = network(volume[None, None])[0]
    found = FoldedNetwork(network, CPU, "fp32")(volume)
    assert found.shape == plain.shape
    assert (found - plain).abs().max() < 1e-4 * (plain.max() - plain.min())


def test_the_full_architecture():
    network = lively_network(Architecture())
    volume = torch.rand(64, 64, 64) * 2 - 1
    with torch.no_grad():
        plain = network(volume[None, None])[0]
    spread = plain.max() - plain.min()
    assert (FoldedNetwork(network, CPU, "fp32")(volume) - plain).abs().max() < 1e-4 * spread


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "side"), [(1, 3), (16, 3), (16, 1)])
def test_fused_activation_equals_convolution_and_relu(kind, inputs, side):
    generator = torch.Generator().manual_seed(inputs + side)
    x = torch.randn(1, inputs, 3, 20, 24, generator=generator).to(kind)
    x = channels_last(x) if inputs == 1 else x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(16, inputs, side, side, side, generator=generator).to(kind)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    bias = torch.randn(16, generator=generator).to(kind)
    with torch.inference_mode():
        found = activated(x, weight, bias)
        plain = convolve(x, weight, bias)
        assert torch.equal(found, functional.relu(plain))
    # Without bf16 in the processor torch's plain convolution orders its output otherwise.
    assert found.stride() == plain.stride()
    if kind == torch.float32:
        assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_with_one_thread_no_convolution_is_left_to_the_plain_form():
    # torch takes it for 1x1x1 kernels where one thread computes: 7 % of a pass.
    network = FoldedNetwork(lively_network(TINY), CPU, "fp32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            network(torch.zeros(16, 16, 16))
    finally:
        torch.set_num_threads(threads)
    kinds = {event.key for event in seen.key_averages()}
    assert "aten::mkldnn_convolution" in kinds
    assert "aten::slow_conv3d_forward" not in kinds


def test_bf16_is_near_fp32():
    # Small: without the instructions bf16 is emulated, some hundred times slower.
    network = lively_network(DEEPER_TOP)
    volume = torch.rand(32, 32, 32) * 2 - 1
    with torch.no_grad():
        plain = network(volume[None, None])[0]
    spread = plain.max() - plain.min()
    half = FoldedNetwork(network, CPU, "bf16")(volume)
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain).abs().mean() < 0.02 * spread


def test_a_limit_makes_slabs_thinner_and_changes_nothing():
    folded = FoldedNetwork(lively_network(), CPU, "fp32")
    volume = torch.rand(64, 64, 64) * 2 - 1
    free = folded.plan((64, 64, 64), None)
    tight = folded.plan((64, 64, 64), free.peak_bytes - 1)
    assert tight.slab_slices < free.slab_slices and tight.peak_bytes < free.peak_bytes
    limited = folded(volume, memory_limit_bytes=free.peak_bytes - 1)
    assert torch.allclose(limited, folded(volume), atol=1e-5)


def test_an_impossible_limit_names_the_least_figure():
    folded = FoldedNetwork(lively_network(Architecture()), CPU, "fp32")
    with pytest.raises(UserError, match=r"needs at least \d+ MiB at 192 x 192 x 192, 100 MiB"):
        folded.plan((192, 192, 192), 100 * 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("slices", [32, 2])
def test_the_peak_stays_under_the_plan(slices):
    measured, planned = subprocess.run(
        [sys.executable, "-c", PEAK, str(slices)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert 0.4 * int(planned) < int(measured) <= int(planned)


PEAK = """
import ctypes
import sys
import torch
from flare_clef import inference
from flare_clef.limits import keep_memory
from flare_clef.network import SegmentationNetwork

def kib(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

network = inference.FoldedNetwork(SegmentationNetwork().eval(), torch.device("cpu"), "fp32")
type(network).slab_slices = (int(sys.argv[1]),)
volume = torch.zeros(128, 128, 128)
# What making the network left free in the heap would hide what computing takes.
ctypes.CDLL(None).malloc_trim(0)
keep_memory()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = kib("VmRSS")
logits = network(volume)
print(kib("VmHWM") - before, network.plan(volume.shape, None).peak_bytes // 1024)
"""


def test_threads_share_one_network():
    folded = FoldedNetwork(lively_network(), CPU, "fp32")
    volumes = [torch.rand(16, 16, 16) for _ in range(8)]
    alone = [folded(volume) for volume in volumes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(folded, volumes))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_devices():
    assert choose_device("cpu") == (CPU, "asked for")
    for wrong in ("gpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(UserError, match="expected auto, cpu, cuda or cuda:N"):
            choose_device(wrong)
    if not torch.cuda.is_available():
        assert choose_device("auto") == (CPU, "no GPU found")
        with pytest.raises(UserError, match="use --device cpu or auto"):
            choose_device("cuda:3")


def test_a_gpu_of_no_use(monkeypatch):
    """One that is full, taken or unknown to this torch: named, and the CPU taken if we choose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some Card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        why = "GPU found, Some Card, but of no use: CUDA out of memory."
        assert choose_device("auto") == (CPU, why)
        with pytest.raises(UserError, match="^--device cuda:0: CUDA out of memory.; use --device"):
            choose_device("cuda:0")
    monkeypatch.setattr(precision, "gpu_trouble", lambda device: "")
    assert choose_device("auto") == (torch.device("cuda", 0), "GPU found: Some Card")
    assert choose_device("cuda") == (torch.device("cuda", 0), "asked for: Some Card")


def test_the_trial_of_a_device():
    """On the CPU, which has all it needs."""
    assert precision.gpu_trouble(CPU) == ""


def test_precisions(monkeypatch):
    chosen, why = choose_precision("auto", CPU, 1)
    assert chosen in ("fp32", "bf16") and "fp32 " in why and "bf16 " in why
    times = {side: {"fp32": 0.003, "bf16": 0.007} for side in (8, 16, 32)}
    sides = []

    def trial(side, *, int8=False, bf16=True):
        sides.append(side)
        return {name: s for name, s in times[side].items() if name != "int8" or int8}

    monkeypatch.setattr("flare_clef.precision._trial_seconds", trial)
    assert choose_precision("auto", CPU, 1)[0] == "fp32"
    times[32]["bf16"] = 0.001
    assert choose_precision("auto", CPU, 1)[0] == "bf16"
    assert sides == [8, 16, 32, 8, 16, 32]
    # Where bf16 is emulated the large trial would take seconds: a small one decides.
    times[8]["bf16"] = 0.027
    assert choose_precision("auto", CPU, 1)[0] == "fp32"
    assert sides[6:] == [8]
    assert choose_precision("fp32", CPU, 1) == ("fp32", "asked for")
    # int8 competes where the weights are calibrated and all 8 bits count.
    for seconds in times.values():
        seconds["int8"] = 0.0001
    for bits, calibrated, wanted in ((FULL, True, "int8"), (REDUCED, True, "fp32"),
                                     (None, True, "fp32"), (FULL, False, "fp32")):  # fmt: skip
        monkeypatch.setattr("flare_clef.precision.highest_activation", lambda bits=bits: bits)
        assert choose_precision("auto", CPU, 1, calibrated=calibrated)[0] == wanted
    with pytest.raises(UserError, match="no 8-bit convolutions"):
        monkeypatch.setattr("flare_clef.precision.highest_activation", lambda: None)
        choose_precision("int8", CPU, 1)
    monkeypatch.setattr("flare_clef.precision.highest_activation", lambda: REDUCED)
    assert "7-bit" in choose_precision("int8", CPU, 1)[1]
    with pytest.raises(UserError, match="for CPUs only"):
        choose_precision("int8", torch.device("cuda"), 1)
    with pytest.raises(UserError, match="for GPUs only"):
        choose_precision("fp16", CPU, 1)
    with pytest.raises(UserError, match="expected auto, fp32, bf16, fp16 or int8"):
        choose_precision("int4", CPU, 1)
