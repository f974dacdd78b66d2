"""The run folder: who owns it, what is in it, where it ran."""

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import torch

from accel.engine.checkpoint import write_atomically
from accel.engine.distributed import Compression
from accel.errors import ConfigError, is_full

logger = logging.getLogger(__name__)
DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how a run executes."""

    seed: int = 0
    """Seed of everything random, 0..2**32-1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda when torch sees a GPU."""
    threads: int = 0
    """CPU threads of torch; 0 = torch's default. Other thread counts may change the last bits."""
    timeout_s: float = 600.0
    """Several processes: seconds that one waits for the others before the job ends, > 0."""
    compress_gradients: Compression = "none"
    """Several processes: exchange gradients as "fp16" or "bf16" (half the volume) or "none"."""
    fit_memory: str = ""
    """"card", or a limit such as "11GB": a new run on a GPU begins with finding the largest
    train.micro_batch whose steps fit with a tenth to spare; "" = train.micro_batch as it is."""
    deterministic: bool = False
    """Deterministic algorithms only: equal bits on one device type, world size and versions."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed: must be in 0..{2**32 - 1}, got {self.seed}.")
        if self.timeout_s <= 0:
            raise ValueError(f"run.timeout_s: must be > 0, got {self.timeout_s}.")
        if not re.fullmatch(r"|card|\d+(\.\d+)?(GB|GiB)", self.fit_memory):
            raise ValueError(
                f"run.fit_memory: expected card or a limit such as 11GB, got {self.fit_memory!r}."
            )
        if self.threads < 0:
            raise ValueError(
                f"run.threads: must be >= 0 (0 = torch's default), got {self.threads}."
            )


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device of this process.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device: cuda was asked for, but torch sees no GPU; check the driver and that "
            f"torch ({torch.__version__}) is a CUDA build, or use --run.device auto."
        )
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


class _LogFile(logging.FileHandler):
    """A log file whose lines a full disk may swallow: said once, the run goes on."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            logger.error("%s cannot be written (%s).", self.baseFilename, error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it tries to write the rest
            super().close()


class RunFolder:
    """`recipe.yaml, environment.json, metrics.jsonl, log.txt, summary.json, checkpoints/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None
        self._handler: logging.Handler | None = None

    @property
    def journal(self) -> Path:
        """One JSON line per optimizer step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints and their index."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """Result of a finished run."""
        return self.path / "summary.json"

    @property
    def curves(self) -> Path:
        """Picture of loss, rate and accuracy."""
        return self.path / "curves.png"

    @property
    def quarantine(self) -> Path:
        """The videos of both splits that could not be used, and why."""
        return self.path / "quarantine.csv"

    @property
    def log(self) -> Path:
        """The messages of all processes that worked here."""
        return self.path / "log.txt"

    def acquire(self) -> None:
        """Create the folder, lock it for this process, and log into it.

        The kernel frees the lock of a process that died.

        Raises:
            ConfigError: another live process works here, or the folder cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a full disk refuses is not tried again by close().
            lock = open(self.path / ".lock", "a+b", buffering=0)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().decode().strip() or "another process"
            lock.close()
            raise ConfigError(
                f"--out {self.path}: in use by {owner}; wait for it or choose another folder."
            ) from None
        except OSError as error:
            lock.close()
            raise ConfigError(
                f"--out {self.path}: cannot be locked ({error.strerror}); choose a folder on a "
                "local disk."
            ) from error
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())
            self._handler = _LogFile(self.log, encoding="utf-8")
        except OSError as error:
            lock.close()
            raise self._unusable(error) from error
        self._lock = lock
        self._handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
        logging.getLogger().addHandler(self._handler)

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"--out {self.path}: cannot be used as a run folder: {error.strerror}; "
            f"{'make room' if is_full(error) else 'make it writable'}, or choose another folder."
        )

    def release(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def stored_environment(self) -> dict[str, Any]:
        """`environment.json` of the process before this one; {} where none can be read."""
        try:
            stored = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def write_json(self, name: str, values: Any) -> None:
        """Write one JSON file of the folder, atomically."""
        write_atomically(self.path / name, (json.dumps(values, indent=1) + "\n").encode())

    def write_text(self, name: str, text: str) -> None:
        """Write one text file of the folder, atomically."""
        write_atomically(self.path / name, text.encode())


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and revision of this run, for results that others can repeat."""
    packages = ("torch", "numpy", "av", *DALI_PACKAGES)
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    import kernels._library

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cuda": torch.version.cuda,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "kernels": kernels._library.REASON or "compiled extension",
        "revision": _git_revision(),
        "command": sys.argv,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git_revision() -> str | None:
    """Revision of the checkout this package runs from (+ = changed); None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
