"""What Training does around the update of a script, and what the update of a script does.

The main test runs each script's own main() beside a plain loop in float64 that has nothing of
Training.
"""

import dataclasses
import fcntl
import importlib
import json
import math
import re
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import variants
from plain import plain_rollout
from tiny import (
    SIZES,
    is_same,
    lines_of,
    log_of,
    make_updates,
    state_in,
    tiny_training,
    update_with,
    write_quiet_data,
)
from torch.distributions import Normal

import common
import vrnn_gauss
import vrnn_gauss_iwae

LIMITS = (
    "--weight_norm=0.9 --ema=0.3 --x_noise=0.3 --x_noise_updates=4 --lr=0.01 --lr_updates=10 "
    "--monitor_every=2 --monitor_windows=2 --seed=1 --k=3"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine training excerpts, of which a batch takes four; so quiet that half an LSB is much."""
    path = tmp_path_factory.mktemp("quiet") / "quiet.h5"
    write_quiet_data(path, train=(530, 310, 870, 90, 450), valid=(350, 280), test=(310, 470))
    return path


# ---- the losses, written out: (loss in nats per frame, state after the window) ----


def log_mean(log_w_BK):
    return log_w_BK.exp().mean(1).log()


def per_frame(bound_B, x):
    """The loss of a bound in nats per sequence."""
    return -bound_B.mean() / len(x)


def vrnn(model, x, state, noise, k, uniform):
    rollout = plain_rollout(model, x, state, noise, k)
    return per_frame(-(rollout.nll_TBK + rollout.kl_TBK).sum(0), x), rollout.state


def vae(model, x, state, noise, k, uniform):
    rollout = plain_rollout(model, x, state, noise, k)
    return per_frame(rollout.log_w_TBK.sum(0).mean(1), x), rollout.state


def iwae(model, x, state, noise, k, uniform):
    rollout = plain_rollout(model, x, state, noise, k)
    return per_frame(log_mean(rollout.log_w_TBK.sum(0)), x), rollout.state


def dreg(model, x, state, noise, k, uniform):
    """IWAE with another gradient.

    sum_k v_k d log p at fixed z + sum_k v_k^2 (d log w / d z) (d z / d parameters)
    """
    rollout = plain_rollout(model, x, state, noise, k)
    z = rollout.q_mean + rollout.q_sigma * noise
    v_BK = rollout.log_w_TBK.sum(0).softmax(1).detach()
    fixed = z.detach().requires_grad_()
    log_p_BK, log_q_BK = at_fixed_z(model, x, state, fixed, k)
    (d_z,) = torch.autograd.grad((log_p_BK - log_q_BK).sum(), fixed, retain_graph=True)
    through_z_BK = (d_z * z).sum((0, 2)).view_as(v_BK)
    gradient_only = per_frame((v_BK * log_p_BK + v_BK**2 * through_z_BK).sum(1), x)
    loss = per_frame(log_mean(rollout.log_w_TBK.sum(0)), x)
    return loss.detach() + gradient_only - gradient_only.detach(), rollout.state


def at_fixed_z(model, x, state, z, k):
    """log p(x, z) and log q(z | x), (B, K) each: the noise is whatever gives z."""
    log_p = 0.0
    log_q = 0.0
    for x_t, z_t in zip(x.split(1), z.split(1)):
        q = plain_rollout(model, x_t, state, torch.zeros_like(z_t), k)
        rollout = plain_rollout(model, x_t, state, (z_t - q.q_mean) / q.q_sigma, k)
        log_q_t = Normal(q.q_mean, q.q_sigma).log_prob(z_t).sum(-1).view(-1, k)
        log_p = log_p + rollout.log_w_TBK[0] + log_q_t
        log_q = log_q + log_q_t
        state = rollout.state
    return log_p, log_q


def resampled(model, x, state, noise, k, uniform):
    """Each sequence by itself."""
    bounds, states = [], []
    early = 0
    for b in range(x.shape[1]):
        rows = slice(b * k, b * k + k)
        own = [part[rows] for part in state]
        bound, own, count = resampled_one(model, x[:, [b]], own, noise[:, rows], uniform[:, b])
        bounds.append(bound)
        states.append(own)
        early += count
    assert early, "nothing was resampled before the last frame"
    return per_frame(torch.stack(bounds), x), [torch.cat(parts) for parts in zip(*states)]


def resampled_one(model, x, state, noise, uniform):
    """Particles are resampled where few of them count, and at the last frame.

    Returns the bound of a sequence, the state, and how often it was resampled before.
    """
    k = noise.shape[1]
    log_w = 0.0
    bound = 0.0
    early = 0
    for t in range(len(x)):
        rollout = plain_rollout(model, x[[t]], state, noise[[t]], k)
        state = rollout.state
        log_w = log_w + rollout.log_w_TBK[0, 0]
        w = log_w.detach().softmax(0)
        is_last = t == len(x) - 1
        if 1 / (w**2).sum() < k / 2 or is_last:
            passed = w.cumsum(0)
            points = [(j + uniform[t].item()) / k for j in range(k)]
            ancestors = [(passed < point).sum().item() for point in points]
            state = [part[ancestors] for part in state]
            bound = bound + log_w.exp().mean().log()
            log_w = 0.0
            early += not is_last
    return bound, state, early


# ---- the loop ----


def excerpts_of_epoch(data, h, epoch):
    """The excerpts of an epoch, (reset_freq, T, X) each, in the order of training."""
    samples = h.reset_freq * h.seq_frames * h.x_dim
    with h5py.File(data, locking=False) as file:
        audio = file["train/audio"][:]
        offsets = file["train/offsets"][:]
    random = np.random.default_rng((h.seed, epoch))
    lengths = np.diff(offsets)
    order = random.permutation((lengths // samples).sum())
    shift = random.integers(0, lengths % samples, endpoint=True)
    excerpts = []
    for offset, length, first in zip(offsets, lengths, shift):
        for i in range(length // samples):
            start = offset + first + i * samples
            excerpt = audio[start : start + samples]
            excerpts.append(excerpt.reshape(h.reset_freq, h.seq_frames, h.x_dim))
    return [excerpts[i] for i in order]


def windows_of_training(data, h):
    """(T, B, X) each: those of a batch of excerpts, then of the next, of which an epoch has two."""
    excerpts = []
    for epoch in (0, 1):
        excerpts += excerpts_of_epoch(data, h, epoch)[: 2 * h.batch_size]
    windows = []
    for first in range(0, 12, h.batch_size):
        batch = np.stack(excerpts[first : first + h.batch_size], axis=2)
        windows += torch.from_numpy(batch).double().unbind()
    return windows


def mean_and_std(data):
    with h5py.File(data, locking=False) as file:
        return file.attrs["mean"], file.attrs["std"]


def numbers_in(flags):
    """What flags such as --lr=0.01 say."""
    numbers = {}
    for flag in flags:
        if re.fullmatch(r"--\w+=[0-9.]+", flag):
            name, value = flag.removeprefix("--").split("=")
            numbers[name] = json.loads(value)
    return SimpleNamespace(**numbers)


class PlainRun:
    """Training in the most obvious way, in float64."""

    def __init__(self, h, data, loss_of):
        self.h = h
        self.mean, self.std = mean_and_std(data)
        self.loss_of = loss_of
        torch.manual_seed(h.seed)
        self.model = common.VRNN(
            **{size: getattr(h, size) for size in common.SIZES if hasattr(h, size)}
        )
        self.model.mirror()
        self.parameters = list(self.model.double().parameters())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.losses = []
        self.norms = []
        self.is_clipped = []
        self.too_long = []  # units whose weights were, in each update
        self.generator = torch.Generator().manual_seed(h.seed)
        for n, pcm in enumerate(windows_of_training(data, h)):
            self.update(n, pcm)

    def draw(self, distribution, *shape):
        return distribution(shape, generator=self.generator).double()

    def update(self, n, pcm):
        h = self.h
        rows = h.batch_size * h.k
        self.before = self.after if n % h.reset_freq else self.model.zero_state(rows)
        x = self.noisy(n, pcm)
        noise = self.draw(torch.randn, h.seq_frames, rows, h.z_dim)
        uniform = None
        if self.loss_of is resampled:
            uniform = self.draw(torch.rand, h.seq_frames, h.batch_size)
        loss, state = self.loss_of(self.model, x, self.before, noise, h.k, uniform)
        self.after = [part.detach() for part in state]
        self.losses.append(loss.item())
        self.step(n, torch.autograd.grad(loss, self.parameters))

    def noisy(self, n, pcm):
        """x of update n: dequantised, normalised, and noise that fades to a hundredth and ends."""
        h = self.h
        x = (pcm + self.draw(torch.rand, *pcm.shape) - 0.5 - self.mean) / self.std
        sigma = 0.0
        if n < h.x_noise_updates:
            sigma = h.x_noise * 0.01 ** (n / h.x_noise_updates)
        return x + sigma * self.draw(torch.randn, *pcm.shape)

    @torch.no_grad()
    def step(self, n, gradients):
        """Clipping, Adam, the limit on weights and the average, in update n."""
        h = self.h
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        scale = min(1, h.grad_clip / norm)
        lr = h.lr * max(0.01, 1 - n / h.lr_updates)
        for p, g, first, second in zip(self.parameters, gradients, self.first, self.second):
            first.copy_(0.9 * first + 0.1 * scale * g)
            second.copy_(0.999 * second + 0.001 * (scale * g) ** 2)
            mean = first / (1 - 0.9 ** (n + 1))
            deviation = (second / (1 - 0.999 ** (n + 1))).sqrt()
            p -= lr * mean / (deviation + 1e-8)
        too_long = 0
        for unit in self.weights_of_units():
            if unit.norm() > h.weight_norm:
                unit *= h.weight_norm / unit.norm()
                too_long += 1
        decay = min(h.ema, (1 + n) / (10 + n))
        for average, p in zip(self.averaged, self.parameters):
            average.copy_(decay * average + (1 - decay) * p)
        self.norms.append(norm)
        self.is_clipped.append(scale < 1)
        self.too_long.append(too_long)

    def weights_of_units(self):
        """Of W, where W x is a column of the published W: those of a unit are a row of ours."""
        for name, p in self.model.named_parameters():
            if name.endswith("weight") and name != "lstm_h.weight":
                yield from p


def trained_by_script(script, flags, monkeypatch):
    """The Training of script.main() after its last update, and the lines of its log."""
    ended = []
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(common.Training, "finish", lambda training: ended.append(training))
    importlib.import_module(script).main()
    (training,) = ended
    return training, lines_of(training.folder / common.LOG)[1:]


def assert_near(ours, plain, tolerance=1e-4):
    """Tensor by tensor, but for rounding in float32."""
    for one, other in zip(ours, plain, strict=True):
        assert (one.detach() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize(
    "loss_of, script, flags",
    (
        pytest.param(vrnn, "vrnn_gauss", "--grad_clip=2.6 --k=1", id="VRNN"),
        pytest.param(vae, "vrnn_gauss_alt_nll", "--grad_clip=2.6", id="VAE"),
        pytest.param(iwae, "vrnn_gauss_iwae", "--grad_clip=2.6", id="IWAE"),
        pytest.param(dreg, "vrnn_gauss_iwae", "--grad_clip=7 --dreg --ar_order=3", id="DReG"),
        pytest.param(
            resampled, "vrnn_gauss_iwae", "--grad_clip=7 --resample --ar_order=3", id="resampled"
        ),
        pytest.param(vrnn, "vrnn_gauss", "--grad_clip=7 --k=1 --z_dim=0 --ar_order=3", id="LSTM"),
    ),
)
def test_the_updates_of_a_script_are_those_of_a_plain_loop(
    data, tmp_path, monkeypatch, script, flags, loss_of
):
    """Over six windows: three batches of excerpts, of which the third is of the second epoch."""
    # z then counts from the first update on, and particles are resampled.
    monkeypatch.setattr(common.AdaptiveLikelihood, "active", common.FrameLikelihood.active)
    flags = [*SIZES, *LIMITS, *flags.split()]
    of_run = [f"--data={data}", f"--out_dir={tmp_path / 'run'}", "--max_updates=6"]
    training, lines = trained_by_script(script, [*flags, *of_run], monkeypatch)
    h = numbers_in(flags)
    plain = PlainRun(h, data, loss_of)
    moments = training.optimiser.state.values()
    assert_near(training.model.parameters(), plain.parameters)
    assert_near(training.averaged.parameters(), plain.averaged)
    assert_near([moment["exp_avg"] for moment in moments], plain.first)
    assert_near([moment["exp_avg_sq"] for moment in moments], plain.second)
    assert_near(training.state, plain.before)
    assert_near(training.next_state, plain.after)
    losses = np.reshape(plain.losses, (-1, 2)).mean(1)  # over the updates between log lines
    assert [line["train_loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(plain.norms[1::2], rel=1e-4)
    assert [line["clipped"] for line in lines] == np.cumsum(plain.is_clipped)[1::2].tolist()
    for part in plain.before:
        assert part.norm() > 0.1, "no state was carried"
    assert set(plain.is_clipped) == {True, False}
    assert min(plain.too_long) > 40
    assert len(excerpts_of_epoch(data, h, 0)) == 9, "the third batch should be of another epoch"


# ---- to stop and to go on ----


@pytest.fixture
def in_one_process(monkeypatch):
    """Of several runs in one folder each would else hold it against the next."""
    monkeypatch.setattr(fcntl, "flock", lambda *given: None)


@pytest.mark.usefixtures("in_one_process")
@pytest.mark.parametrize(
    "flags",
    (
        "--ar_order=0",
        "--ar_order=3 --dreg",
        "--ar_order=3 --resample",
        "--ar_order=3 --bf16",
        "--ar_order=3 --z_dim=0 --k=1",
    ),
)
def test_a_run_that_is_stopped_within_an_excerpt_and_resumed_is_the_one_that_was_not(
    data, tmp_path, monkeypatch, flags
):
    def train(out, updates, *more):
        given = [*SIZES, *LIMITS, *flags.split(), "--monitor_every=3"]
        of_run = [f"--data={data}", f"--out_dir={out}", f"--max_updates={updates}"]
        trained_by_script("vrnn_gauss_iwae", [*given, *of_run, *more], monkeypatch)

    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    train(whole, 7)
    train(parts, 3)
    with (parts / "log.jsonl").open("a") as log:
        # what was logged before the machine stopped
        log.write('{"update": 6}\n{"update": 7, "sequ')
    train(parts, 7, "--resume")
    assert log_of(whole) == log_of(parts)
    resumed = state_in(parts / "last.pt")
    for name, value in state_in(whole / "last.pt").items():
        if not name.endswith(("seconds", "out_dir")):
            assert is_same(value, resumed[name]), name


def raise_a_bug(*given):
    raise RuntimeError("a bug of ours")


@pytest.mark.usefixtures("in_one_process")
@pytest.mark.parametrize("place", ("refuse_changes", "my_part"))
def test_a_bug_of_ours_in_restore_keeps_its_traceback(data, tmp_path, monkeypatch, place):
    """It is no UserError, and no word of it says that the checkpoint is of no use."""
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run")
    make_updates(training, update_with(training, vrnn_gauss.objective), 1)
    restore = common.Training.restore

    def restore_with_a_bug(training, checkpoint):
        monkeypatch.setattr(common, place, raise_a_bug)
        restore(training, checkpoint)

    monkeypatch.setattr(common.Training, "restore", restore_with_a_bug)

    def resume():
        tiny_training(vrnn_gauss, data, tmp_path / "run", "--resume", "--max_updates=5")

    with pytest.raises(RuntimeError, match="^a bug of ours$") as error:
        common.run_as_script(resume)
    assert error.traceback[-1].name == "raise_a_bug"
    assert "restore" in [entry.name for entry in error.traceback]


# ---- models of one's own ----


def flat_parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", (variants.TanhPosterior, variants.WidePosterior))
def test_a_subclass_is_trained_and_evaluated_by_its_own_methods(data, tmp_path, monkeypatch, kind):
    sizes = (20, 4, 12, 8, 8, 8, 8, 8)
    torch.manual_seed(0)
    start = kind(*sizes)
    model = kind(*sizes)
    model.load_state_dict(start.state_dict())
    monkeypatch.setattr(common, "fast_recurrence", raise_a_bug)
    monkeypatch.setattr(common, "write_samples", lambda *given: None)
    out = tmp_path / "run"
    flags = ("--no-mirrored_init", "--weight_norm=0", "--eval_recordings=0", "--k=3", "--lr=0.01")
    h, training = tiny_training(vrnn_gauss_iwae, data, out, *flags, model=model)
    make_updates(training, update_with(training, vrnn_gauss_iwae.objective), 4)
    assert (flat_parameters(start) - flat_parameters(model)).abs().max() > 0.005
    training.finish()

    evaluated = tmp_path / "evaluated"
    of_best = dataclasses.replace(h, evaluate=str(out / "best.pt"), out_dir=str(evaluated))
    common.evaluate_checkpoint(of_best, kind(*sizes))
    found = json.loads((evaluated / "eval.json").read_text())
    of_run = json.loads((out / "eval.json").read_text())
    assert found == of_run | dict(checkpoint=str(out / "best.pt"))
    with pytest.raises(common.UserError, match="holds another model than this VRNN"):
        common.evaluate_checkpoint(dataclasses.replace(of_best, out_dir=str(tmp_path / "other")))


# ---- the last frame of a window whose states are carried on ----


class FixedWeights:
    """One latent number; log_w given for each frame and particle; the state counts the rows."""

    z_dim = 1

    def __init__(self, log_w_TBK):
        self.frames = iter(log_w_TBK)

    def __call__(self, x_TBX, state, noise, k):
        log_w_TBK = next(self.frames)[None]
        rows = torch.arange(log_w_TBK.numel(), dtype=torch.float64).unsqueeze(1)
        return common.Rollout(None, None, log_w_TBK, *[None] * 6, state=(rows,), phi_x=None)


def test_a_filter_whose_states_are_carried_on_resamples_at_its_last_frame_and_at_no_other():
    w_TBK = torch.tensor([[[0.5, 0.3, 0.2]], [[1.0, 1.0, 1.0]]], dtype=torch.float64)
    x_TBX = torch.zeros(2, 1, 1)
    noise = torch.zeros(2, 3, 1)
    uniform_TB = torch.full((2, 1), 0.1)

    def filtering(resample_last):
        model = FixedWeights(w_TBK.log())  # their effective sample size is 2.6
        return common.particle_filter(model, x_TBX, None, noise, uniform_TB, 3, resample_last)

    kept = filtering(resample_last=False)
    resampled = filtering(resample_last=True)
    assert kept.state[0].flatten().tolist() == [0, 1, 2]
    # 0.5, 0.8 and 1 have passed 0.03, 0.37 and 0.70
    assert resampled.state[0].flatten().tolist() == [0, 0, 1]
    assert torch.equal(kept.log_likelihood_TB, resampled.log_likelihood_TB)


def test_a_script_that_does_not_know_evaluate_trains_nothing_by_it():
    with pytest.raises(common.UserError, match="--evaluate trains nothing.*evaluate_checkpoint"):
        common.Training(SimpleNamespace(evaluate="best.pt"), particles=1)
