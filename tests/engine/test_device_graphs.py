"""What `DeviceGraphs` makes of torch.cuda's answers, given by a stand-in."""

import contextlib
import functools
import threading
import types
import warnings

import pytest
import torch
from torch.torch_version import TorchVersion

from accel.engine.graphs import DeviceGraphs, Replay
from accel.errors import AccelError
from pipelines.loader import Batch


class FakeCuda:
    """What `DeviceGraphs` asks of torch.cuda, on a machine without a GPU; notes the pools."""

    def __init__(self, patch):
        self.opened, self.captured, self.restored = 0, [], []
        self.broken_end = None
        self.mode = 0
        generators = [types.SimpleNamespace(clone_state=lambda: "spare") for _ in range(3)]
        for index, generator in enumerate(generators):
            generator.graphsafe_set_state = functools.partial(self._restore, index)
        graph = types.SimpleNamespace(replay=lambda: None)
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "current_device": lambda: 2,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self._set_mode,
            "default_generators": generators,
            "CUDAGraph": lambda: graph,
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda _: contextlib.nullcontext(),
            "graph_pool_handle": self._open,
            "graph": self._graph,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)

    def _open(self):
        self.opened += 1
        return 0, self.opened

    def _set_mode(self, mode):
        self.mode = mode
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, 1)

    def item(self):
        """As torch warns."""
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered …)", UserWarning, 2)

    def _restore(self, index, state):
        self.restored.append((index, state))

    @contextlib.contextmanager
    def _graph(self, graph, *, pool, stream, capture_error_mode):
        self.captured.append(pool)
        try:
            yield
        finally:
            if self.broken_end:
                raise RuntimeError(self.broken_end)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_device_without_an_index_is_the_current_one(cuda):
    graphs = DeviceGraphs(torch.device("cuda"))

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        graphs.capture(fails, graphs.new_pool())
    assert cuda.restored == [(2, "spare")]
    assert DeviceGraphs(torch.device("cuda", 1))._device == torch.device("cuda", 1)


def test_watching_finds_the_waits_of_its_own_thread(cuda):
    graphs = DeviceGraphs(torch.device("cuda", 0))
    with pytest.warns(DeprecationWarning) as others, graphs.watch() as found:
        loader = threading.Thread(target=cuda.item)
        loader.start()
        loader.join()
        assert found == []
        cuda.item()
        warnings.warn("old", DeprecationWarning, 1)
    assert len(found) == 1 and found[0].startswith("test_device_graphs.py:")
    assert found[0].endswith(" waits for the device") and cuda.mode == 0
    assert [str(w.message) for w in others] == ["old"]
    with graphs.watch() as found:
        pass
    assert found == []


@pytest.mark.parametrize("version", ["2.12.1", "2.13.0"])
def test_a_capture_without_an_end_is_fatal_to_old_torch(cuda, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    graphs = DeviceGraphs(torch.device("cuda", 0))

    def fails():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):  # its end was fine
        graphs.capture(fails, graphs.new_pool())
    cuda.broken_end = "capture invalidated"
    expected = RuntimeError if version == "2.13.0" else AccelError
    for work, reason in ((fails, "not permitted"), (lambda: None, "capture invalidated")):
        shown = "capture invalidated" if version == "2.13.0" else rf"\({reason}\), and torch 2.12.1"
        with pytest.raises(expected, match=shown):
            graphs.capture(work, graphs.new_pool())
    assert cuda.restored == [(0, "spare")] * 3


def test_every_launch_captures_into_memory_of_its_own(cuda):
    """A pool that its graphs have left must not be captured into again (vLLM #28426, #53682)."""
    graphs = DeviceGraphs(torch.device("cuda", 0))
    batch = Batch(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8), torch.zeros(1), torch.zeros(1))
    for launched in (1, 2):
        replay = Replay(
            lambda *_: None, graphs, parameters=[], warm_up=1, undo=lambda: None, fall_back=False
        )
        for first in (True, False, True, False):
            replay(batch, first, not first)
        assert cuda.captured[-2:] == [(0, launched)] * 2
    assert len(cuda.captured) == 4
