"""NVML in the background: against a stand-in for pynvml, and without a driver."""

import logging
import sys
import time
import types

import pytest
import torch

from accel.engine import gpu_sampling
from accel.engine.gpu_sampling import GpuSampler

CUDA = torch.device("cuda", 0)


class _Nvml(types.ModuleType):
    """The part of pynvml that is used, for a card without a decoder."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, missing=False):
        super().__init__("pynvml")
        self.missing, self.reads, self.open = missing, -1, 0

    def nvmlInit(self):
        if self.missing:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle):
        self.reads += 1
        return types.SimpleNamespace(gpu=50, memory=20)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1545, 2: 7000}[kind]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 250_000  # milliwatts

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 70

    def nvmlDeviceGetDecoderUtilization(self, handle):
        raise self.NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    def install(**options):
        module = _Nvml(**options)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return install


def test_samples_are_taken_in_the_background_and_averaged(nvml, monkeypatch):
    module = nvml()
    monkeypatch.setattr(gpu_sampling, "JOURNAL_S", 0.02)
    with GpuSampler(CUDA, period_s=0.002) as sampler:
        deadline = time.monotonic() + 5
        while (means := sampler.take()) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert module.open == 1
    assert means == {
        "gpu_busy_percent": 50,
        "gpu_memory_busy_percent": 20,
        "gpu_memory_used_gib": 3,
        "gpu_sm_clock_mhz": 1545,
        "gpu_memory_clock_mhz": 7000,
        "gpu_power_w": 250,
        "gpu_temperature_c": 70,
    }  # what the card does not report is left out
    assert sampler.summary() == means
    assert module.open == 0
    reads = module.reads
    time.sleep(0.02)
    assert module.reads == reads  # nothing runs on


def test_without_a_driver_there_is_one_line(nvml, caplog):
    nvml(missing=True)
    with caplog.at_level(logging.INFO), GpuSampler(CUDA) as sampler:
        assert sampler.take() is None
    assert sampler.summary() == {}
    assert [record.message for record in caplog.records] == [
        "GPU load is not sampled: NVML Shared Library Not Found."
    ]


def test_without_the_package_there_is_one_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.INFO), GpuSampler(CUDA):
        pass
    assert [record.message for record in caplog.records] == [
        "GPU load is not sampled: nvidia-ml-py is not installed."
    ]


def test_a_cpu_run_says_and_does_nothing(nvml, caplog):
    module = nvml()
    with caplog.at_level(logging.INFO), GpuSampler(torch.device("cpu")) as sampler:
        assert sampler.take() is None
    assert not caplog.records and module.open == 0
