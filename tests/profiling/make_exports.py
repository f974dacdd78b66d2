"""Writes the small SQLite exports of nsys that the tests of the report read.

    python tests/profiling/make_exports.py        # rewrites tests/profiling/exports/*.sqlite

No GPU was involved: each file has the tables and columns that NVIDIA's "SQLite Export Schema
Reference" documents, filled with four steps of 10 ms whose shares are known by construction.
"""

import sqlite3
from pathlib import Path

FOLDER = Path(__file__).parent / "exports"
STEPS = 4
US = 1000  # nanoseconds
MAIN, AUTOGRAD = 0x1000001, 0x1000002  # globalTid of the training and the backward thread

SCHEMA = """
PRAGMA page_size = 1024;
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (
    start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER,
    textId INTEGER, domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL,
    uint32Value INTEGER, int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT,
    binaryData TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (
    start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER,
    correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER, cacheConfig INTEGER,
    registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, gridY INTEGER NOT NULL,
    gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL,
    blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL,
    dynamicSharedMemory INTEGER NOT NULL, localMemoryPerThread INTEGER NOT NULL,
    localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, sharedMemoryExecuted INTEGER,
    graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL,
    deprecatedSrcId INTEGER, srcKind INTEGER, dstKind INTEGER, srcDeviceId INTEGER,
    srcContextId INTEGER, dstDeviceId INTEGER, dstContextId INTEGER, migrationCause INTEGER,
    graphNodeId INTEGER, virtualAddress INTEGER, copyCount INTEGER);
CREATE TABLE ENUM_CUDA_MEMCPY_OPER (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE TARGET_INFO_GPU (
    vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT, isDiscrete INTEGER,
    l2CacheSize INTEGER, totalMemory INTEGER, memoryBandwidth INTEGER, clockRate INTEGER,
    smCount INTEGER, computeMajor INTEGER, computeMinor INTEGER);
INSERT INTO ENUM_CUDA_MEMCPY_OPER VALUES (1, 'CUDA_MEMCPY_KIND_HTOD', 'Host-to-Device');
"""
CONVOLUTION = "sm75_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc"
NORM = "void at::native::batch_norm_collect_statistics_channels_last_kernel<float>"
TAPS = "void accel::temporal_taps_forward_kernel<__half, 8>"
UPDATE = "void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor<float>>"


class Export:
    """One file in the making; times are microseconds from the start of a step."""

    def __init__(self, name: str, gpu: str, major: int) -> None:
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"{name}.sqlite"
        path.unlink(missing_ok=True)
        self._db = sqlite3.connect(path)
        self._db.executescript(SCHEMA)
        self._strings: dict[str, int] = {}
        self._correlation = 0
        self.base = 1_000_000_000
        row = (0, 0, gpu, "0000:01:00.0", 1, 6 << 20, 11 << 30, 616 * 10**9, 1545, 68, major, 5)
        self._insert("TARGET_INFO_GPU", row)
        for domain, text in ((0, "default"), (7, "accel")):
            self._nvtx(75, self.base, None, text, MAIN, domain)
        # Another library's range of the same name, which must not count.
        self._nvtx(59, self.base, self.base + 10**9, "step", MAIN, 0)

    def string(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = len(self._strings) + 1
            self._insert("StringIds", (self._strings[text], text))
        return self._strings[text]

    def range(self, name: str, start: float, end: float, thread: int = MAIN) -> None:
        self._nvtx(59, self._at(start), self._at(end), name, thread, 7)

    def kernel(self, name: str, launched: float, start: float, end: float, thread=MAIN) -> None:
        number = self._call("cudaLaunchKernel_v7000", launched, launched + 4, thread)
        text = self.string(name)
        row = (self._at(start), self._at(end), 0, 1, None, 7, number, None, text, text, text)
        row += (None, None, 64, 68, 1, 1, 256, 1, 1, 0, 0, 0, 0, 0, 0, None, None)
        self._insert("CUPTI_ACTIVITY_KIND_KERNEL", row)

    def upload(self, launched: float, start: float, end: float, size: int) -> None:
        number = self._call("cudaMemcpyAsync_v3020", launched, launched + 5, MAIN)
        row = (self._at(start), self._at(end), 0, 1, None, 7, number, None, size, 1)
        self._insert("CUPTI_ACTIVITY_KIND_MEMCPY", row + (None,) * 11)

    def wait(self, start: float, end: float) -> None:
        self._call("cudaStreamSynchronize_v3020", start, end, MAIN)

    def close(self) -> None:
        self._db.commit()
        self._db.execute("VACUUM")
        self._db.close()

    def _call(self, name: str, start: float, end: float, thread: int) -> int:
        self._correlation += 1
        row = (self._at(start), self._at(end), 0, thread, self._correlation, self.string(name))
        self._insert("CUPTI_ACTIVITY_KIND_RUNTIME", (*row, 0, None))
        return self._correlation

    def _nvtx(self, kind, start, end, text, thread, domain) -> None:
        registered = self.string(text) if kind == 59 else None
        row = (start, end, kind, None, None, None, None if registered else text, thread, None)
        row += (registered, domain) + (None,) * 9
        self._insert("NVTX_EVENTS", row)

    def _insert(self, table: str, row: tuple) -> None:
        self._db.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(row))})", row)

    def _at(self, microseconds: float) -> int:
        return self.base + round(microseconds * US)


def host_ranges(export: Export, *, waits: float) -> None:
    """The ranges of a step of 10 ms whose first `waits` microseconds fetch the clips."""
    end = 9900.0
    forward = waits + 200
    middle = forward + (end - 400 - forward) / 3
    export.range("step", 0, 10000)
    export.range("data wait", 0, waits)
    export.range("upload", waits - 50, waits - 10)
    export.range("ingest", waits, waits + 150)
    export.range("forward", forward, middle)
    export.range("layer1", forward + 10, middle - 10)
    export.range("TAM", forward + 50, forward + 150)
    export.range("backward", middle, end - 400)
    export.range("optimizer", end - 400, end)


def input_bound() -> None:
    """34 % of each step the GPU has nothing to do because clips are missing."""
    export = Export("input_bound", "NVIDIA GeForce RTX 2080 Ti", 7)
    for _ in range(STEPS):
        host_ranges(export, waits=4000)
        export.kernel(UPDATE, -150, 0, 600)  # of the step before: the GPU is behind the host
        export.upload(3955, 4000, 4100, 4_816_896)
        export.kernel(CONVOLUTION, 4210, 4100, 6400)
        export.kernel(TAPS, 4260, 6400, 6600)
        export.kernel(CONVOLUTION.replace("fprop", "dgrad"), 7000, 6600, 10000, AUTOGRAD)
        export.base += 10_000 * US
    export.close()


def compute_bound() -> None:
    """The GPU works 96 % of each step; the host waits for it at the end."""
    export = Export("compute_bound", "NVIDIA H200", 9)
    for _ in range(STEPS):
        host_ranges(export, waits=300)
        export.upload(255, 200, 300, 19_267_584)
        export.kernel(CONVOLUTION, 520, 300, 5000)
        export.kernel(NORM, 530, 5000, 6000)
        export.kernel(CONVOLUTION.replace("fprop", "wgrad"), 4000, 6000, 9600, AUTOGRAD)
        export.kernel(UPDATE, 9600, 9600, 9800)
        export.wait(9900, 10000)
        export.base += 10_000 * US
    export.close()


def launch_bound() -> None:
    """Forty short kernels per step, each launched after the one before has ended."""
    export = Export("launch_bound", "NVIDIA GeForce RTX 2080 Ti", 7)
    for _ in range(STEPS):
        host_ranges(export, waits=100)
        for index in range(40):
            start = 500 + 225 * index
            name = (CONVOLUTION, NORM, TAPS, UPDATE)[index % 4]
            export.kernel(name, start - 20, start, start + 100, AUTOGRAD if index > 20 else MAIN)
        export.base += 10_000 * US
    export.close()


if __name__ == "__main__":
    for make in (input_bound, compute_bound, launch_bound):
        make()
