"""What the GPU reports of itself during a run: NVML, sampled in the background."""

import logging
import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

PERIOD_S = 0.5  # between samples
JOURNAL_S = 10.0  # between journal lines


class GpuSampler:
    """Utilization, memory, clocks, power, temperature and NVDEC load of one GPU.

    Use as a context manager. Without a driver, the package nvidia-ml-py or a GPU it says so in one
    line and samples nothing; quantities that a card does not report are left out.

    Args:
        device: of the run; on a CPU nothing happens at all.
        period_s: between samples, seconds.
    """

    def __init__(self, device: torch.device, *, period_s: float = PERIOD_S) -> None:
        self._device = device
        self._period_s = period_s
        self._read: dict[str, Callable[[], float]] = {}
        self._shutdown: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._samples: list[dict[str, float]] = []
        self._taken = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "GpuSampler":
        if self._device.type == "cuda" and self._open():
            self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._shutdown is not None:
            self._shutdown()
            self._shutdown = None

    def take(self) -> dict[str, float] | None:
        """Means since the last call that gave any; None before `JOURNAL_S` of samples exist."""
        with self._lock:
            fresh = self._samples[self._taken :]
            if len(fresh) * self._period_s < JOURNAL_S:
                return None
            self._taken = len(self._samples)
        return _means(fresh)

    def summary(self) -> dict[str, float]:
        """Means of all samples; empty without any."""
        with self._lock:
            return _means(self._samples)

    def _open(self) -> bool:
        try:
            import pynvml  # of nvidia-ml-py
        except ImportError:
            logger.info("GPU load is not sampled: nvidia-ml-py is not installed.")
            return False
        try:
            pynvml.nvmlInit()
            self._shutdown = pynvml.nvmlShutdown
            uuid = torch.cuda.get_device_properties(self._device).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            logger.info("GPU load is not sampled: %s.", error)
            return False
        for name, read in _quantities(pynvml, handle).items():
            try:
                read()
            except pynvml.NVMLError:  # this card does not report it
                continue
            self._read[name] = read
        return True

    def _run(self) -> None:
        import pynvml

        while not self._stop.wait(self._period_s):
            try:
                sample = {name: float(read()) for name, read in self._read.items()}
            except pynvml.NVMLError as error:
                logger.info("GPU load is no longer sampled: %s.", error)
                return
            with self._lock:
                self._samples.append(sample)


def _quantities(nvml: Any, handle: Any) -> dict[str, Callable[[], float]]:
    return {
        "gpu_busy_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "gpu_memory_busy_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).memory,
        "gpu_memory_used_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
        "gpu_sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "gpu_memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "gpu_temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
            handle, nvml.NVML_TEMPERATURE_GPU
        ),
        "nvdec_busy_percent": lambda: nvml.nvmlDeviceGetDecoderUtilization(handle)[0],
    }


def _means(samples: list[dict[str, float]]) -> dict[str, float]:
    names = samples[0] if samples else {}
    return {name: round(statistics.fmean(s[name] for s in samples), 3) for name in names}
