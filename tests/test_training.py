"""The training loop on a toy regression: what it computes, and that an interruption changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.testing import assert_close

from d2dmoe.config import TrainingConfig, UserError
from d2dmoe.training import pick_device, train

CONFIG = TrainingConfig(steps=12, learning_rate=1e-2, warmup_fraction=0.25, log_every=4, save_every=5, seed=3)


def toy(seed: int = 0, dropout: float = 0.0, norm: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(11) if norm else nn.LayerNorm(11)
    return nn.Sequential(nn.Linear(5, 11), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(11, 3))


def batch_at(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a fixed nonlinear function; the same for the same number."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1000 + number))
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x.sum(1)], dim=1)


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


class Stop:
    """`batch_at` that fails when a batch of optimiser step `step` is asked for."""

    def __init__(self, step: int, accumulation: int, kill: bool = False):
        self.step, self.accumulation, self.kill = step, accumulation, kill

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number // self.accumulation == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return batch_at(number)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Bit-equal parameters and buffers."""
    for (name, value), wanted in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), f"{name}: {(value - wanted).abs().max()}"


def interrupt(config: TrainingConfig, state: Path, model: nn.Module, step: int = 7, **options) -> None:
    """A run that is stopped when it asks for the batches of step `step` (steps count from 0)."""
    with pytest.raises(KeyboardInterrupt):
        train(model, Stop(step, config.accumulation), loss_of, config, state_dir=state, **options)


def test_it_learns():
    model = toy()
    config = replace(CONFIG, steps=300, log_every=50, save_every=0)
    log = train(model, batch_at, loss_of, config)
    assert [row["step"] for row in log] == [50, 100, 150, 200, 250, 300]
    assert log[-1]["loss"] < 0.4 * log[0]["loss"]
    unseen = batch_at(10**6)
    assert loss_of(model, unseen) < 0.4 * loss_of(toy(), unseen)
    assert not model.training


def test_one_step_is_adamw():
    """First step of AdamW, written out: clipped gradient g, update lr * g / (|g| + eps)."""
    config = replace(CONFIG, steps=1, warmup_fraction=0, schedule="constant", weight_decay=0.5, clip=0.1)
    model, before = toy(), toy()
    loss_of(before, batch_at(0)).backward()
    norm = torch.cat([p.grad.flatten() for p in before.parameters()]).norm()
    assert norm > 0.1
    train(model, batch_at, loss_of, config)
    for (name, value), old in zip(model.named_parameters(), before.parameters(), strict=True):
        g = old.grad * 0.1 / norm
        decay = 0.5 if old.ndim > 1 else 0
        expected = old * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8)
        assert_close(value.detach(), expected.detach(), msg=lambda m, n=name: f"{n}: {m}")


def test_rates_are_shares_of_the_learning_rate_by_name():
    config = replace(CONFIG, steps=1, warmup_fraction=0, schedule="constant", clip=0)
    plain, slower = toy(), toy()
    train(plain, batch_at, loss_of, config)
    log = train(slower, batch_at, loss_of, config, rates=lambda name: 0.1 if name.startswith("0.") else 1.0)
    assert log[0]["learning_rate"] == 1e-2
    for (name, value), other, start in zip(
        slower.named_parameters(), plain.parameters(), toy().parameters(), strict=True
    ):
        share = 0.1 if name.startswith("0.") else 1.0
        assert_close(value - start, share * (other - start), rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_log_holds_window_means_and_the_rate_in_force():
    seen: list[float] = []

    def loss(model, batch):
        value = loss_of(model, batch)
        seen.append(value.item())
        return {"loss": value, "double": 2 * value}

    config = replace(CONFIG, steps=10, accumulation=2, schedule="linear", warmup_fraction=0.2)
    log = train(toy(), batch_at, loss, config)
    assert [row["step"] for row in log] == [4, 8, 10]
    windows = [seen[0:8], seen[8:16], seen[16:20]]
    assert_close([row["loss"] for row in log], [sum(w) / len(w) for w in windows])
    assert_close([row["double"] for row in log], [2 * sum(w) / len(w) for w in windows])
    assert_close([row["learning_rate"] for row in log], [1e-2 * (10 - s) / 8 for s in (3, 7, 9)])


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1e-2), ("linear", 1e-2 / 9), ("cosine", 3.01537e-4)])
def test_schedules(schedule, last):
    """12 steps of which 3 warm up, so step 11 stands at 8/9 of the decay; cosine is `(1 + cos(8 pi / 9)) / 2`."""
    log = train(toy(), batch_at, loss_of, replace(CONFIG, schedule=schedule, log_every=1))
    rates = [row["learning_rate"] for row in log]
    assert_close(rates[:4], [0.0, 1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[-1] == pytest.approx(last, rel=1e-4)


def test_batches_are_asked_for_in_order():
    numbers = []

    def record(number):
        numbers.append(number)
        return batch_at(number)

    train(toy(), record, loss_of, replace(CONFIG, steps=4, accumulation=3))
    assert numbers == list(range(12))


def test_it_is_a_plain_adamw_loop():
    config = replace(CONFIG, schedule="linear", adam_betas=(0.6, 0.8), weight_decay=0.1, clip=0)
    model, plain = toy(), toy()
    train(model, batch_at, loss_of, config)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.6, 0.8))
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(step / 3, (12 - step) / 9)
        optimizer.zero_grad()
        loss_of(plain, batch_at(step)).backward()
        optimizer.step()
    for (name, value), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(value, wanted, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation_is_a_larger_batch():
    """The loss is so small that the epsilon of Adam counts: the scale of the gradients matters."""

    def pair(number):
        return tuple(torch.cat(parts) for parts in zip(batch_at(2 * number), batch_at(2 * number + 1), strict=True))

    def double(batch):
        return tuple(t.double() for t in batch)

    def small(model, batch):
        return 1e-7 * loss_of(model, batch)

    halves, whole = toy().double(), toy().double()
    train(halves, lambda i: double(batch_at(i)), small, replace(CONFIG, accumulation=2))
    train(whole, lambda i: double(pair(i)), small, CONFIG)
    for (name, value), wanted in zip(halves.named_parameters(), whole.parameters(), strict=True):
        assert_close(value, wanted, msg=lambda m, n=name: f"{n}: {m}")


def test_same_seed_same_weights_other_seed_other_dropout():
    first, second, third = toy(dropout=0.3), toy(dropout=0.3), toy(dropout=0.3)
    train(first, batch_at, loss_of, CONFIG)
    torch.randn(7)  # the state of the generator before the run must not matter
    train(second, batch_at, loss_of, CONFIG)
    train(third, batch_at, loss_of, replace(CONFIG, seed=4))
    assert_same(first, second)
    assert not torch.equal(first[0].weight, third[0].weight)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["nodropout", "dropout"])
def test_interrupted_and_resumed_is_bit_equal(tmp_path, accumulation, dropout, schedule):
    config = replace(CONFIG, accumulation=accumulation, schedule=schedule)
    whole = toy(dropout=dropout)
    log = train(whole, batch_at, loss_of, config, state_dir=tmp_path / "whole")

    state = tmp_path / "state"
    interrupt(config, state, toy(dropout=dropout))
    assert state.is_dir()
    asked = []

    def record(number):
        asked.append(number)
        return batch_at(number)

    resumed = toy(seed=9, dropout=dropout)  # its own weights must not matter
    torch.randn(5)
    resumed_log = train(resumed, record, loss_of, config, state_dir=state, resume=True)
    assert asked == list(range(5 * accumulation, 12 * accumulation))  # from the saved step, not from the start
    assert_same(resumed, whole)
    assert resumed_log == log
    assert list(tmp_path.iterdir()) == []


def test_interrupted_twice(tmp_path):
    config = replace(CONFIG, save_every=3)
    whole = toy(dropout=0.2)
    train(whole, batch_at, loss_of, config)
    state = tmp_path / "state"
    interrupt(config, state, toy(dropout=0.2), step=4)
    interrupt(config, state, toy(dropout=0.2), step=10, resume=True)
    resumed = toy(dropout=0.2)
    train(resumed, batch_at, loss_of, config, state_dir=state, resume=True)
    assert_same(resumed, whole)


def test_buffers_are_resumed_too(tmp_path):
    whole, resumed = toy(norm=True), toy(norm=True)
    train(whole, batch_at, loss_of, CONFIG)
    interrupt(CONFIG, tmp_path / "state", toy(norm=True))
    train(resumed, batch_at, loss_of, CONFIG, state_dir=tmp_path / "state", resume=True)
    assert_same(resumed, whole)


def killed(state: str, threads: int) -> None:
    """Run in a process of its own by the next test: training that dies at step 7. Sums depend on the threads."""
    torch.set_num_threads(threads)
    train(toy(dropout=0.25), Stop(7, 2, kill=True), loss_of, replace(CONFIG, accumulation=2), state_dir=Path(state))


def test_killed_process_and_resumed_is_bit_equal(tmp_path):
    state = tmp_path / "state"
    code = f"from test_training import killed; killed({str(state)!r}, {torch.get_num_threads()})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state.is_dir()

    config = replace(CONFIG, accumulation=2)
    whole, resumed = toy(dropout=0.25), toy(seed=9, dropout=0.25)
    log = train(whole, batch_at, loss_of, config)
    assert train(resumed, batch_at, loss_of, config, state_dir=state, resume=True) == log
    assert_same(resumed, whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rename", range(3))
def test_a_crash_while_saving_leaves_the_last_state(tmp_path, monkeypatch, rename):
    """Steps 5 and 10 are saved with three renames in all; whichever the process dies at, a state is there to resume."""
    whole, resumed = toy(), toy()
    train(whole, batch_at, loss_of, CONFIG)
    real, calls = os.replace, []

    def crash(source, target):
        calls.append(source)
        if len(calls) == rename + 1:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        train(toy(), batch_at, loss_of, CONFIG, state_dir=tmp_path / "state")
    monkeypatch.undo()
    asked = []

    def record(number):
        asked.append(number)
        return batch_at(number)

    train(resumed, record, loss_of, CONFIG, state_dir=tmp_path / "state", resume=True)
    assert asked[0] == (0 if rename == 0 else 5)
    assert_same(resumed, whole)
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_run_forgets_the_state_of_an_older_one(tmp_path):
    state = tmp_path / "state"
    interrupt(CONFIG, state, toy(seed=1))
    interrupt(CONFIG, state, toy(seed=2), step=3)  # a new run, stopped before it saved anything
    whole, resumed = toy(seed=2), toy(seed=2)
    train(whole, batch_at, loss_of, CONFIG)
    train(resumed, batch_at, loss_of, CONFIG, state_dir=state, resume=True)
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 2e-2), ("steps", 13), ("adam_betas", (0.9, 0.99)), ("schedule", "linear")]
)
def test_resume_with_another_config_is_refused(tmp_path, key, value):
    interrupt(CONFIG, tmp_path / "state", toy())
    model = toy()
    with pytest.raises(UserError, match=rf"\b{key}\b"):
        train(model, batch_at, loss_of, replace(CONFIG, **{key: value}), state_dir=tmp_path / "state", resume=True)
    assert_same(model, toy())
    assert (tmp_path / "state").is_dir()  # still there for the right config


def test_resume_without_a_state_starts_at_the_beginning(tmp_path):
    whole, other = toy(), toy()
    train(whole, batch_at, loss_of, CONFIG)
    train(other, batch_at, loss_of, CONFIG, state_dir=tmp_path / "none", resume=True)
    assert_same(other, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [2, 9, 11])
def test_loss_that_is_not_finite_is_an_error(bad, step):
    def loss(model, batch):
        loss.calls += 1
        return loss_of(model, batch) * (bad if loss.calls == step + 1 else 1)

    loss.calls = 0
    with pytest.raises(UserError, match=r"toy.* (nan|inf) .*step"):
        train(toy(), batch_at, loss, CONFIG, name="toy")


class Decayed(nn.Module):
    """Parameters of several ranks whose gradients are zero, so that weight decay alone moves them."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.stack = nn.Parameter(torch.randn(2, 4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(()))
        self.up_bias = nn.Parameter(torch.randn(2, 4))  # a bias in expert layout is still a bias

    def forward(self) -> torch.Tensor:
        return 0 * sum(p.sum() for p in self.parameters())


def test_vectors_are_not_decayed():
    model, before = Decayed(), Decayed()
    before.load_state_dict(model.state_dict())
    config = replace(CONFIG, steps=3, schedule="constant", warmup_fraction=0, weight_decay=10.0)
    train(model, lambda i: None, lambda m, b: m(), config)
    for name, value in model.named_parameters():
        old = before.get_parameter(name)
        kept = 1.0 if name in ("bias", "scale", "up_bias") else 0.9**3
        assert_close(value, old * kept, msg=lambda m, n=name: f"{n}: {m}")


def test_frozen_parameters_stay():
    model, before = toy(), toy()
    model[0].requires_grad_(False)
    train(model, batch_at, loss_of, replace(CONFIG, weight_decay=1.0))
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)
    with pytest.raises(ValueError, match="requires a gradient"):
        train(toy().requires_grad_(False), batch_at, loss_of, CONFIG)


def test_evaluation_joins_the_log_and_does_not_disturb(tmp_path):
    modes, figures = [], []

    def evaluate(model):
        modes.append(model.training)
        with torch.no_grad():
            figures.append(loss_of(model, batch_at(10**6)).item())
        return {"held_out": figures[-1]}

    with_evaluation, without = toy(dropout=0.2), toy(dropout=0.2)
    log = train(with_evaluation, batch_at, loss_of, CONFIG, evaluate=evaluate, state_dir=tmp_path / "state")
    train(without, batch_at, loss_of, CONFIG)
    assert_same(with_evaluation, without)
    assert modes == [False] * 3
    assert {row["step"]: row["held_out"] for row in log if "held_out" in row} == dict(
        zip((5, 10, 12), figures, strict=True)
    )
    assert [row["step"] for row in log if "loss" in row] == [4, 8, 12]
    assert {"step", "loss", "learning_rate", "held_out"} <= log[-1].keys()  # "its figures join the log row"


def test_evaluation_survives_a_resume(tmp_path):
    def evaluate(model):
        with torch.no_grad():
            return {"held_out": loss_of(model, batch_at(10**6)).item(), "noise": torch.rand(()).item()}

    whole, resumed = toy(dropout=0.2), toy(dropout=0.2)
    log = train(whole, batch_at, loss_of, CONFIG, evaluate=evaluate, state_dir=tmp_path / "whole")
    interrupt(CONFIG, tmp_path / "state", toy(dropout=0.2), evaluate=evaluate)
    again = train(resumed, batch_at, loss_of, CONFIG, evaluate=evaluate, state_dir=tmp_path / "state", resume=True)
    assert again == log
    assert_same(resumed, whole)


def test_bf16_and_fp32_runs_in_one_process():
    dtypes = []

    def loss(model, batch):
        output = model(batch[0])
        dtypes.append(output.dtype)
        return nn.functional.mse_loss(output.float(), batch[1])

    single, mixed, again = toy(), toy(), toy()
    config = replace(CONFIG, steps=40, warmup_fraction=0)
    train(single, batch_at, loss, config)
    assert set(dtypes) == {torch.float32}
    train(mixed, batch_at, loss, replace(config, bf16=True))
    train(again, batch_at, loss, config)
    assert_same(again, single)  # fp32 is fp32 again
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert not torch.equal(mixed[0].weight, single[0].weight)
    assert_close(mixed[4].weight, single[4].weight, rtol=0, atol=0.05)
    x = batch_at(0)[0]
    first = nn.functional.linear(x, mixed[0].weight, mixed[0].bias)
    assert_close(mixed(x), mixed[1:](first), rtol=0, atol=0)  # the trained model itself is not left in autocast


def test_accelerate_is_left_as_it_was_found(monkeypatch):
    """Its state holds for the whole process: whoever asks for other settings afterwards must get them."""
    for state in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    with pytest.raises(ZeroDivisionError):
        train(toy(), lambda number: 1 / 0, loss_of, CONFIG)
    train(toy(), batch_at, loss_of, CONFIG)
    assert AcceleratorState._shared_state == GradientState._shared_state == PartialState._shared_state == {}
    with torch.random.fork_rng():
        assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    train(toy(), batch_at, loss_of, CONFIG)
    assert AcceleratorState().mixed_precision == "bf16"


def test_what_is_placed_is_not_moved(monkeypatch):
    """As on a machine with a GPU, which accelerate would choose."""
    for state in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    model, twin = toy(), toy()
    train(model, batch_at, loss_of, CONFIG, placed=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    monkeypatch.setattr(PartialState, "default_device", torch.device("cpu"))
    train(twin, batch_at, loss_of, CONFIG)
    assert_same(model, twin)


def test_devices_are_picked_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"--device cuda: PyTorch sees 0 CUDA devices here; use auto or cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="sees 2 CUDA devices"):
        pick_device("cuda:2")
