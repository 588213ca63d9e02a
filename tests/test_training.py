"""What Training does around the update of a script, and what the update of a script does.

The main test runs each script's own main() beside a plain loop in float64 that has nothing of Training.
"""

import importlib
import json
import math
import os
import re
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from plain import plain_rollout
from tiny import SIZES, log_of, state_in, write_quiet_data
from torch.distributions import Normal

import common

LIMITS = (
    "--weight_norm=0.9 --ema=0.3 --x_noise=0.3 --x_noise_updates=4 --lr=0.01 --lr_updates=10 --monitor_every=2 "
    "--monitor_windows=2 --seed=1 --k=3"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine training excerpts, of which a batch takes four; so quiet that half an LSB is much."""
    path = tmp_path_factory.mktemp("quiet") / "quiet.h5"
    write_quiet_data(path, train=(530, 310, 870, 90, 450), valid=(350, 280), test=(310, 470))
    return path


# ---- the losses, written out: (loss in nats per frame, state after the window) ----


def vrnn(model, x, state, noise, k, uniform):
    rollout = plain_rollout(model, x, state, noise, k)
    return per_frame(-(rollout.nll_TBK + rollout.kl_TBK).sum(0), x), rollout.state


def vae(model, x, state, noise, k, uniform):
    rollout = plain_rollout(model, x, state, noise, k)
    return per_frame(rollout.log_w_TBK.sum(0).mean(1), x), rollout.state


def vae_as_published(model, x, state, noise, k, uniform):
    loss, state = vae(model, x, state, noise, 1, uniform)
    return loss / k, state


def iwae(model, x, state, noise, k, uniform):
    rollout = plain_rollout(model, x, state, noise, k)
    return per_frame(log_mean(rollout.log_w_TBK.sum(0)), x), rollout.state


def iwae_as_published(model, x, state, noise, k, uniform):
    rollout = plain_rollout(model, x, state, noise, k)
    s_BK = -rollout.log_w_TBK.mean(0)
    return (s_BK.exp() / s_BK.exp().sum(1, keepdim=True) * s_BK).sum(), rollout.state


def dreg(model, x, state, noise, k, uniform):
    """IWAE with the gradient sum_k v_k d log p at fixed z + sum_k v_k^2 (d log w / d z) (d z / d parameters)."""
    rollout = plain_rollout(model, x, state, noise, k)
    z, v_BK = rollout.q_mean + rollout.q_sigma * noise, rollout.log_w_TBK.sum(0).softmax(1).detach()
    fixed = z.detach().requires_grad_()
    log_p_BK, log_q_BK = at_fixed_z(model, x, state, fixed, k)
    (d_z,) = torch.autograd.grad((log_p_BK - log_q_BK).sum(), fixed, retain_graph=True)
    through_z_BK = (d_z * z).sum((0, 2)).view_as(v_BK)
    gradient_only = per_frame((v_BK * log_p_BK + v_BK**2 * through_z_BK).sum(1), x)
    loss = per_frame(log_mean(rollout.log_w_TBK.sum(0)), x)
    return loss.detach() + gradient_only - gradient_only.detach(), rollout.state


def at_fixed_z(model, x, state, z, k):
    """log p(x, z) and log q(z | x), (B, K) each: the noise is whatever gives z."""
    log_p, log_q = 0.0, 0.0
    for x_t, z_t in zip(x.split(1), z.split(1)):
        q = plain_rollout(model, x_t, state, torch.zeros_like(z_t), k)
        rollout = plain_rollout(model, x_t, state, (z_t - q.q_mean) / q.q_sigma, k)
        log_q_t = Normal(q.q_mean, q.q_sigma).log_prob(z_t).sum(-1).view(-1, k)
        log_p, log_q, state = log_p + rollout.log_w_TBK[0] + log_q_t, log_q + log_q_t, rollout.state
    return log_p, log_q


def resampled(model, x, state, noise, k, uniform):
    """Each sequence by itself; its particles are resampled where few of them count, and at the last frame."""
    bounds, states, early = [], [], 0
    for b in range(x.shape[1]):
        rows = slice(b * k, b * k + k)
        own, log_w, bound = [part[rows] for part in state], 0.0, 0.0
        for t in range(len(x)):
            rollout = plain_rollout(model, x[t : t + 1, b : b + 1], own, noise[t : t + 1, rows], k)
            own, log_w = rollout.state, log_w + rollout.log_w_TBK[0, 0]
            w = log_w.detach().softmax(0)
            if 1 / (w**2).sum() < k / 2 or t == len(x) - 1:
                points = [(j + uniform[t, b].item()) / k for j in range(k)]
                ancestors = [
                    sum(passed < point for passed in w.cumsum(0).tolist()) for point in points
                ]
                own, log_w, bound = (
                    [part[ancestors] for part in own],
                    0.0,
                    bound + log_w.exp().mean().log(),
                )
                early += t < len(x) - 1
        bounds.append(bound)
        states.append(own)
    assert early, "nothing was resampled before the last frame"
    return per_frame(torch.stack(bounds), x), [torch.cat(parts) for parts in zip(*states)]


def log_mean(log_w_BK):
    return log_w_BK.exp().mean(1).log()


def per_frame(bound_B, x):
    """The loss of a bound in nats per sequence."""
    return -bound_B.mean() / len(x)


# ---- the loop ----


def excerpts_of_epoch(data, h, epoch):
    """The excerpts of an epoch, (reset_freq, T, X) each, in the order of training."""
    samples = h.reset_freq * h.seq_frames * h.x_dim
    with h5py.File(data) as file:
        audio, offsets = file["train/audio"][:], file["train/offsets"][:]
    random, lengths = np.random.default_rng((h.seed, epoch)), np.diff(offsets)
    order = random.permutation((lengths // samples).sum())
    shift = random.integers(0, lengths % samples, endpoint=True)
    starts = [
        offset + first + i * samples
        for offset, length, first in zip(offsets, lengths, shift)
        for i in range(length // samples)
    ]
    return [
        audio[start : start + samples].reshape(h.reset_freq, h.seq_frames, h.x_dim)
        for start in np.array(starts)[order]
    ]


def windows_of_training(data, h):
    """(T, B, X) each: the windows of a batch of excerpts, then those of the next, of which an epoch has two."""
    excerpts = [
        excerpt
        for epoch in (0, 1)
        for excerpt in excerpts_of_epoch(data, h, epoch)[: 2 * h.batch_size]
    ]
    batches = [
        np.stack(excerpts[first : first + h.batch_size], axis=2)
        for first in range(0, 12, h.batch_size)
    ]
    return [torch.from_numpy(window).double() for batch in batches for window in batch]


def mean_and_std(data):
    with h5py.File(data) as file:
        return file.attrs["mean"], file.attrs["std"]


def numbers_in(flags):
    """What flags such as --lr=0.01 say."""
    pairs = [
        flag.removeprefix("--").split("=") for flag in flags if re.fullmatch(r"--\w+=[0-9.]+", flag)
    ]
    return SimpleNamespace(**{name: json.loads(value) for name, value in pairs})


def plain_run(h, windows, mean_and_std, loss_of):
    """Training in the most obvious way, in float64."""
    torch.manual_seed(h.seed)
    model = common.VRNN(*(getattr(h, size, 0) for size in common.SIZES))
    model.mirror()
    parameters = list(model.double().parameters())
    first, second, averaged = ([p.detach() * scale for p in parameters] for scale in (0, 0, 1))
    run = SimpleNamespace(
        model=model,
        parameters=parameters,
        first=first,
        second=second,
        averaged=averaged,
        losses=[],
        norms=[],
        is_clipped=[],
        too_long=[],
    )
    generator = torch.Generator().manual_seed(h.seed)

    def draw(distribution, *shape):
        return distribution(shape, generator=generator).double()

    replays = h.k if loss_of is vae_as_published else 1
    rows = h.batch_size * (1 if loss_of is vae_as_published else h.k)
    for w, pcm in enumerate(windows):
        run.before = model.zero_state(rows) if w % h.reset_freq == 0 else run.after
        for n in range(w * replays, (w + 1) * replays):
            x = noisy(h, pcm, mean_and_std, n, draw)
            noise = draw(torch.randn, h.seq_frames, rows, h.z_dim)
            uniform = draw(torch.rand, h.seq_frames, h.batch_size) if loss_of is resampled else None
            loss, state = loss_of(model, x, run.before, noise, h.k, uniform)
            run.after = [part.detach() for part in state]
            run.losses.append(loss.item())
            plain_step(
                h,
                run,
                torch.autograd.grad(loss, parameters),
                n,
                h.batch_size if loss_of in (vae_as_published, iwae_as_published) else 1,
            )
    return run


def noisy(h, pcm, mean_and_std, n, draw):
    """x of update n: dequantised, normalised, and noise that fades to a hundredth and ends."""
    mean, std = mean_and_std
    x = (pcm + draw(torch.rand, *pcm.shape) - 0.5 - mean) / std
    sigma = h.x_noise * 0.01 ** (n / h.x_noise_updates) if n < h.x_noise_updates else 0
    return x + sigma * draw(torch.randn, *pcm.shape)


@torch.no_grad()
def plain_step(h, run, gradients, n, divide_by):
    """Clipping, Adam, weight norm (column by column of W, a row of ours) and the average, in update n."""
    gradients = [g / divide_by for g in gradients]
    norm = math.sqrt(sum((g**2).sum() for g in gradients))
    scale = min(1, h.grad_clip / divide_by / norm)
    lr = h.lr * max(0.01, 1 - n / h.lr_updates)
    for p, g, first, second in zip(run.parameters, gradients, run.first, run.second):
        first.copy_(0.9 * first + 0.1 * scale * g)
        second.copy_(0.999 * second + 0.001 * (scale * g) ** 2)
        p -= lr * first / (1 - 0.9 ** (n + 1)) / ((second / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8)
    too_long = [
        column
        for name, p in run.model.named_parameters()
        for column in p
        if name.endswith("weight") and name != "lstm_h.weight" and column.norm() > h.weight_norm
    ]
    for column in too_long:
        column *= h.weight_norm / column.norm()
    decay = min(h.ema, (1 + n) / (10 + n))
    for average, p in zip(run.averaged, run.parameters):
        average.copy_(decay * average + (1 - decay) * p)
    run.norms.append(norm * divide_by)
    run.is_clipped.append(scale < 1)
    run.too_long.append(len(too_long))


def trained_by_script(script, flags, monkeypatch):
    """The Training of script.main() after its last update, and the lines of its log."""
    ended = []
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(common.Training, "finish", lambda training: ended.append(training))
    importlib.import_module(script).main()
    lines = [json.loads(line) for line in ended[0].folder.log.read_text().splitlines()[1:]]
    return ended[0], lines


def assert_near(ours, plain, tolerance=1e-4):
    """Tensor by tensor, but for rounding in float32."""
    for one, other in zip(ours, plain, strict=True):
        assert (one.detach() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize(
    "script, flags, loss_of",
    (
        pytest.param("vrnn_gauss", ["--grad_clip=2.6", "--k=1"], vrnn, id="VRNN"),
        pytest.param("vrnn_gauss_alt_nll", ["--grad_clip=2.6"], vae, id="VAE"),
        pytest.param(
            "vrnn_gauss_alt_nll",
            ["--grad_clip=0.86", "--as_published"],
            vae_as_published,
            id="published-VAE",
        ),
        pytest.param("vrnn_gauss_iwae", ["--grad_clip=2.6"], iwae, id="IWAE"),
        pytest.param(
            "vrnn_gauss_iwae",
            ["--grad_clip=10.3", "--as_published"],
            iwae_as_published,
            id="published-IWAE",
        ),
        pytest.param(
            "vrnn_gauss_iwae", ["--grad_clip=25", "--dreg", "--ar_order=3"], dreg, id="DReG"
        ),
        pytest.param(
            "vrnn_gauss_iwae",
            ["--grad_clip=25", "--resample", "--ar_order=3"],
            resampled,
            id="resampled",
        ),
        pytest.param(
            "vrnn_gauss", ["--grad_clip=25", "--k=1", "--z_dim=0", "--ar_order=3"], vrnn, id="LSTM"
        ),
    ),
)
def test_the_updates_of_a_script_are_those_of_a_plain_loop(
    data, tmp_path, monkeypatch, script, flags, loss_of
):
    """Over six windows: three batches of excerpts, of which the third is of the second epoch."""
    flags = [*SIZES, *LIMITS, *flags]
    updates = 18 if loss_of is vae_as_published else 6
    training, lines = trained_by_script(
        script,
        [*flags, f"--data={data}", f"--out_dir={tmp_path / 'run'}", f"--max_updates={updates}"],
        monkeypatch,
    )
    h = numbers_in(flags)
    plain = plain_run(h, windows_of_training(data, h), mean_and_std(data), loss_of)
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
    assert all(part.norm() > 0.1 for part in plain.before), "no state was carried"
    assert set(plain.is_clipped) == {True, False} and min(plain.too_long) > 40, (
        "a limit was not reached"
    )
    assert len(excerpts_of_epoch(data, h, 0)) == 9, "the third batch should be of another epoch"


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
        training, _ = trained_by_script(
            "vrnn_gauss_iwae",
            [
                *SIZES,
                *LIMITS,
                *flags.split(),
                "--monitor_every=3",
                f"--data={data}",
                f"--out_dir={out}",
                f"--max_updates={updates}",
                *more,
            ],
            monkeypatch,
        )
        os.close(training.folder.descriptor)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, 7)
    train(parts, 3)
    with (parts / "log.jsonl").open("a") as log:
        log.write(
            '{"update": 6}\n{"update": 7, "sequ'
        )  # what was logged before the machine stopped
    train(parts, 7, "--resume")
    assert log_of(whole) == log_of(parts)
    ours, theirs = (state_in(out / "last.pt") for out in (parts, whole))
    for name, value in theirs.items():
        if not name.endswith(("seconds", "out_dir")):
            assert (
                torch.equal(value, ours[name]) if torch.is_tensor(value) else value == ours[name]
            ), name


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
    log_w_TBK = torch.tensor(
        [[[0.5, 0.3, 0.2]], [[1.0, 1.0, 1.0]]], dtype=torch.float64
    ).log()  # effective size 2.6
    x_TBX, noise, uniform_TB = torch.zeros(2, 1, 1), torch.zeros(2, 3, 1), torch.full((2, 1), 0.1)
    kept, resampled = (
        common.particle_filter(
            FixedWeights(log_w_TBK), x_TBX, None, noise, uniform_TB, 3, resample_last
        )
        for resample_last in (False, True)
    )
    assert kept.state[0].flatten().tolist() == [0, 1, 2]
    assert resampled.state[0].flatten().tolist() == [
        0,
        0,
        1,
    ]  # half, 0.8 and 1 are passed by 0.03, 0.37 and 0.70
    assert torch.equal(kept.log_likelihood_TB, resampled.log_likelihood_TB)
