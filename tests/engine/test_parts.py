"""Optimizer, precision, metrics, journal, stop signals, run folder: each alone."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from accel.engine.journal import Journal, Progress, read_journal, rewind_journal
from accel.engine.metrics import ClassificationMeter
from accel.engine.optim import OptimConfig, Optimizer
from accel.engine.precision import Precision, PrecisionConfig
from accel.engine.recorder import MAX_SKIPPED_IN_A_ROW, StepRecorder, rates
from accel.engine.run import RunFolder, environment, resolve_device
from accel.engine.seeding import derive_seed
from accel.engine.step import training_loss
from accel.engine.stop import StopSignals
from accel.engine.timing import Ranges, Stopwatch
from accel.errors import ConfigError, DivergedError
from accel.models import build_model
from accel.models.heads import AuxiliaryLogits

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _precision(mode="fp32", **options):
    return Precision(PrecisionConfig(mode=mode), CPU, mean=MEAN, std=STD, **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("tanet", num_classes=3, num_segments=2, depth=18, width=8, stages=2)


def _fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.contiguous(
            memory_format=torch.channels_last if gradient.ndim == 4 else torch.contiguous_format
        )


def test_fused_sgd_equals_the_written_out_rule_for_channels_last_weights(model):
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, groups="tanet_original")
    optimizer = Optimizer(model, config)
    expected = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in expected.items()}
    for step in range(3):
        optimizer.set_lr(0.5)
        _fill_gradients(model, step)
        for group in optimizer.groups:
            for name, parameter in group.params.items():
                decay = config.weight_decay * group.decay_mult
                gradient = parameter.grad.double() + decay * expected[name]
                velocity[name] = 0.9 * velocity[name] + gradient
                expected[name] = expected[name] - 0.05 * group.lr_mult * velocity[name]
        optimizer.sgd.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_flagged_step_changes_neither_weights_nor_momentum(model):
    optimizer = Optimizer(model, OptimConfig())
    before = [p.detach().clone() for p in model.parameters()]
    _fill_gradients(model, 0)
    optimizer.sgd.found_inf = torch.ones(())
    optimizer.sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(not buffer.any() for buffer in optimizer.state_dict().values())


def test_momentum_round_trip_keeps_layout_and_names(model):
    optimizer = Optimizer(model, OptimConfig())
    _fill_gradients(model, 0)
    optimizer.sgd.step()
    stored = {name: buffer.clone().contiguous() for name, buffer in optimizer.state_dict().items()}
    other = Optimizer(model, OptimConfig())
    other.load_state_dict(stored)
    for name, buffer in other.state_dict().items():
        assert torch.equal(buffer, stored[name])
        assert buffer.stride() == dict(model.named_parameters())[name].stride()


def test_network_input_is_the_published_normalization_in_channels_last():
    clips = torch.randint(0, 256, (2, 3, 5, 7, 3), dtype=torch.uint8)
    frames = _precision().network_input(clips)
    expected = (clips.flatten(0, 1).permute(0, 3, 1, 2).double() / 255 - torch.tensor(
        MEAN, dtype=torch.float64
    ).view(3, 1, 1)) / torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)  # fmt: skip
    assert frames.shape == (6, 3, 5, 7)
    assert frames.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(frames.double(), expected, rtol=0, atol=1e-6)
    half = _precision("bf16").network_input(clips)
    assert half.dtype == torch.bfloat16
    assert half.is_contiguous(memory_format=torch.channels_last)


def test_network_input_stacks_the_frames_of_a_segment_in_the_channels():
    clips = torch.randint(0, 256, (2, 3 * 5, 4, 6, 3), dtype=torch.uint8)
    single = _precision().network_input(clips).unflatten(0, (6, 5))  # [N*T, L, 3, H, W]
    frames = _precision(frames_per_segment=5).network_input(clips)
    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(frames, single.flatten(1, 2))


def test_color_maps_come_before_the_normalization():
    clips = torch.randint(0, 256, (2, 3 * 5, 4, 6, 3), dtype=torch.uint8)
    identity = torch.eye(3, 4).expand(30, 3, 4).contiguous()
    plain = _precision(frames_per_segment=5).network_input(clips)
    frames = _precision(frames_per_segment=5).network_input(clips, identity)
    assert frames.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(frames, plain, rtol=0, atol=1e-5)
    maps = torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(0))
    maps[:, :, 3] *= 50
    colors = torch.einsum("fhwc,fdc->fhwd", clips.flatten(0, 1).double(), maps[..., :3].double())
    colors += maps[:, None, None, :, 3].double()
    expected = (colors / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    frames = _precision(frames_per_segment=5).network_input(clips, maps)
    stacked = expected.view(6, 5, 4, 6, 3).permute(0, 1, 4, 2, 3).flatten(1, 2)
    torch.testing.assert_close(frames.double(), stacked, rtol=1e-5, atol=1e-4)
    assert _precision("bf16").network_input(clips, maps).dtype == torch.bfloat16


@pytest.mark.needs_cuda
def test_color_maps_on_a_gpu_are_those_of_the_cpu():
    clips = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    maps = torch.randn(8, 3, 4)
    results = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        precision = Precision(PrecisionConfig(), device, mean=MEAN, std=STD)
        results.append(precision.network_input(clips.to(device), maps.to(device)).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)


def test_tf32_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="tf32"):
        _precision("tf32")


def test_training_loss_adds_the_auxiliary_head_with_its_weight():
    generator = torch.Generator().manual_seed(0)
    logits, auxiliary = torch.randn(2, 3, 4, generator=generator)
    labels = torch.tensor([3, 0, 1])

    def entropy(x):
        return -x.log_softmax(dim=1)[torch.arange(3), labels].mean()

    torch.testing.assert_close(training_loss(logits, labels), entropy(logits))
    loss = training_loss(AuxiliaryLogits(logits.bfloat16(), auxiliary, 0.5), labels)
    assert loss.dtype == torch.float32
    expected = entropy(logits.bfloat16().float()) + 0.5 * entropy(auxiliary)
    torch.testing.assert_close(loss, expected)


def test_metrics_are_exact_for_any_split_into_batches():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((101, 12)))
    labels = torch.from_numpy(rng.integers(0, 11, 101))  # class 11 is predicted, never true
    whole = ClassificationMeter(12, CPU)
    whole.update(logits, labels)
    parts = ClassificationMeter(12, CPU)
    for part in torch.arange(101).split(7):
        parts.update(logits[part], labels[part])
    predicted = logits.argmax(1)
    scores = whole.compute()
    assert scores.top1 == parts.compute().top1 == float((predicted == labels).double().mean())
    ranks = (logits > logits[torch.arange(101), labels][:, None]).sum(1)
    assert scores.top5 == float((ranks < 5).double().mean())
    assert scores.num_clips == 101
    recalls = [
        float((predicted[labels == k] == k).double().mean()) if (labels == k).any() else 0.0
        for k in range(12)
        if (labels == k).any() or (predicted == k).any()
    ]
    assert scores.mean_class == pytest.approx(np.mean(recalls), rel=1e-12)
    assert scores.loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-12
    )


def test_journal_lines_and_rewinding(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    for iteration in range(4):
        journal.step(iteration=iteration, loss=float(iteration))
    journal.evaluation(iteration=2, val_top1=0.5)
    journal.evaluation(iteration=4, val_top1=0.75)
    journal.close()
    with path.open("a") as file:
        file.write('{"iteration": 4, "lo')  # a crash in the middle of a line
    assert len(read_journal(path)) == 6
    rewind_journal(path, iteration=3, evaluated=2)
    rows = read_journal(path)
    assert [row["iteration"] for row in rows if "event" not in row] == [0, 1, 2]
    assert [row["iteration"] for row in rows if row.get("event") == "eval"] == [2]
    assert path.read_text().endswith("\n")


def test_lines_refused_by_a_full_disk_are_written_later(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.step(iteration=0)
    file = journal._file

    class Full:
        name = "metrics.jsonl"

        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            file.write(data[:3])  # cut short, as a full disk does
            raise OSError(28, "No space left on device")

    journal._file = Full()
    journal.step(iteration=1)
    journal.step(iteration=2)
    journal._file = file
    journal.step(iteration=3)
    journal.close()
    assert [row["iteration"] for row in read_journal(path)] == [0, 1, 2, 3]


class _Terminal:
    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def fileno(self):
        raise OSError

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("tty", [True, False])
def test_progress_line_shows_rate_wait_and_eta(tty):
    stream = _Terminal(tty)
    progress = Progress(100, 10.0, stream)
    progress.show(done=10, epoch=0, loss=1.0, clips_per_s=50.0, data_wait=0.25, step_s=2.0)
    progress.show(done=11, epoch=0, loss=1.0, clips_per_s=50.0, data_wait=0.25, step_s=2.0)
    progress.clear()
    assert "step 10/100" in stream.text
    assert "50.0 clips/s  data wait 25 %  ETA 3:00" in stream.text
    assert "step 11/100" not in stream.text  # within the interval
    assert ("\r" in stream.text) == tty


def _recorder(mode="fp32"):
    scaler = _precision(mode).scaler
    return StepRecorder(None, Progress(9, 1.0, _Terminal(False)), scaler, clips_per_step=4)


def _facts(iteration):
    return {"iteration": iteration, "epoch": 0, "lr": 0.1}


@pytest.mark.parametrize("metrics", [[float("nan"), 1, 0, 0], [1, float("inf"), 1, 0]])
def test_a_non_finite_step_ends_the_run(metrics):
    recorder = _recorder()
    recorder.add(_facts(3), torch.tensor(metrics), step_s=1, wait_s=0)
    with pytest.raises(DivergedError, match="iteration 3"):
        recorder.flush()


def test_steps_without_a_finite_gradient_may_be_left_out():
    scaler = _precision("fp32").scaler
    progress = Progress(9, 1.0, _Terminal(False))
    options = {"clips_per_step": 4, "skip_nonfinite": 2, "groups": ["first", "second"]}
    recorder = StepRecorder(None, progress, scaler, **options)
    bad, good = [float("nan"), float("inf"), 1, 0, 3, float("inf")], [1, 1, 0, 0, 1, 1]
    for iteration, metrics in enumerate([bad, bad, good, bad, bad]):
        recorder.add(_facts(iteration), torch.tensor(metrics), step_s=1, wait_s=0)
    recorder.flush()
    recorder.add(_facts(5), torch.tensor(bad), step_s=1, wait_s=0)
    with pytest.raises(
        DivergedError, match=r"3 skipped steps in a row\. The step was not applied"
    ) as e:
        recorder.flush()
    assert e.value.facts["gradient_norms_of_groups"] == {"first": "3.0", "second": "inf"}
    applied = StepRecorder(None, progress, scaler, **options)
    applied.add(_facts(0), torch.tensor([float("inf"), 1, 0, 0]), step_s=1, wait_s=0)
    with pytest.raises(DivergedError, match="The step was applied"):
        applied.flush()


def test_fp16_may_skip_but_not_for_ever():
    recorder = _recorder("fp16")
    for iteration in range(MAX_SKIPPED_IN_A_ROW - 1):
        recorder.add(_facts(iteration), torch.tensor([1, float("inf"), 1, 0]), step_s=1, wait_s=0)
    recorder.flush()
    recorder.add(_facts(99), torch.tensor([1, float("inf"), 1, 0]), step_s=1, wait_s=0.5)
    with pytest.raises(DivergedError, match="skipped steps in a row"):
        recorder.flush()


def test_rates_are_of_the_whole_journal():
    steps = [{"clips_per_s": rate, "data_wait": wait} for rate, wait in [(4, 0.5), (8, 0), (2, 0)]]
    assert rates(steps) == {"clips_per_s": 4, "data_wait": 0.125 / (0.25 + 0.125 + 0.5)}
    assert rates([]) == {"clips_per_s": 0.0, "data_wait": 0.0}


def test_stop_signals_set_a_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_folder_has_one_owner(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.acquire()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as a run folder"):
        RunFolder(tmp_path / "file").acquire()


def test_environment_is_plain_data():
    facts = environment(resolve_device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"].startswith("2.")


def test_seeds_differ_by_purpose_and_counter():
    seeds = {derive_seed(0, p, i) for p in ("model", "forward") for i in range(50)}
    assert len(seeds) == 100
    assert derive_seed(0, "forward", 3) == derive_seed(0, "forward", 3)


def test_ranges_cost_nothing_when_off_and_work_when_on():
    off = Ranges("off")
    assert off("a") is off("b")
    module = torch.nn.Identity()
    off.mark([("part", module)])
    assert not module._forward_hooks and not module._forward_pre_hooks
    with Ranges("nvtx")("a"):
        pass
    watch = Stopwatch()
    with watch.running():
        pass
    assert watch.total_s > 0
