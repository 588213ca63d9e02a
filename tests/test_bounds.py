"""Bounds against exact likelihoods and plain code: IWAE, the particle filter, DReG, objectives."""

import copy
import math

import numpy as np
import pytest
import torch
import variants
from linear_gaussian import (
    A,
    C,
    LinearGaussian,
    R,
    S,
    WithMemory,
    kalman_log_likelihood,
    sample,
)
from tiny import smooth_noise
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

import common
import prepare_blizzard
import vrnn_gauss
import vrnn_gauss_alt_nll
import vrnn_gauss_iwae


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def new_model(kind=common.VRNN, order=0):
    torch.manual_seed(0)
    return kind(5, 3, 8, 7, 7, 7, 7, 7, order).double()


def random_rollout(k, frames=6, batch=4):
    return new_model()(randn(frames, batch, 5), k=k)


def flat_gradient(loss, model):
    parameters = list(model.parameters())
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


# ---- against the Kalman filter ----


def covariance_of_x(frames):
    """Of x_1..x_frames of the linear-Gaussian model."""
    covariance = R * R * torch.eye(frames, dtype=torch.float64)
    for i in range(frames):
        for j in range(frames):
            for n in range(min(i, j) + 1):
                covariance[i, j] += C * C * S * S * A ** (i - n) * A ** (j - n)
    return covariance


def test_kalman_likelihood_equals_the_dense_gaussian():
    x_TBX = sample(6, 3, generator())
    dense = MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance_of_x(6))
    assert_close(kalman_log_likelihood(x_TBX), dense.log_prob(x_TBX[:, :, 0].T))


def test_iwae_with_the_exact_posterior_equals_the_kalman_likelihood():
    x_TBX = sample(40, 16, generator())
    exact = kalman_log_likelihood(x_TBX)
    bounds = common.estimate_bounds(LinearGaussian("exact"), x_TBX, (1, 5), generator(1))
    for name in ("elbo_5", "iwae_1", "iwae_5"):
        assert_close(bounds[name], exact, atol=1e-9, rtol=1e-9)
    # its KL is that along a sampled path
    assert_close(bounds["elbo"], exact, atol=3.0, rtol=0.1)


@pytest.mark.parametrize("proposal", ("filtering", "prior"))
def test_iwae_with_another_proposal_approaches_the_kalman_likelihood_from_below(proposal):
    x_TBX = sample(5, 200, generator())
    ks = (1, 10, 100, 5000)
    bounds = common.estimate_bounds(LinearGaussian(proposal), x_TBX, ks, generator(1))
    exact = kalman_log_likelihood(x_TBX)
    gaps = [(exact - bounds[f"iwae_{k}"]).mean() for k in ks]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > -0.01
    assert gaps[0] > 0.2
    assert abs(gaps[3]) < gaps[0] / 100


def test_importance_weights_are_unbiased_in_the_likelihood():
    x_TBX = sample(4, 50, generator())
    model = LinearGaussian("prior")
    bounds = common.estimate_bounds(model, x_TBX, (20_000,), generator(1), max_rows=100_000)
    ratio = (bounds["iwae_20000"] - kalman_log_likelihood(x_TBX)).exp()
    assert abs(ratio.mean() - 1) < 0.02


@pytest.mark.parametrize("proposal, largest_gap", (("filtering", 0.08), ("prior", 1.2)))
def test_the_particle_filter_is_far_tighter_than_iwae_over_many_frames(proposal, largest_gap):
    x_TBX = sample(40, 64, generator())
    exact = kalman_log_likelihood(x_TBX)
    model = LinearGaussian(proposal)
    estimate_TB, _ = common.estimate_smc(model, x_TBX, 100, generator(1))
    bounds = common.estimate_bounds(model, x_TBX, (100,), generator(1))
    smc_gap = (exact - estimate_TB[-1]).mean()
    iwae_gap = (exact - bounds["iwae_100"]).mean()
    assert 0 < smc_gap < largest_gap
    assert smc_gap < iwae_gap / 4


def test_the_particle_filter_is_unbiased_in_the_likelihood_of_every_prefix():
    x_TBX = sample(20, 1, generator()).expand(-1, 4000, -1)
    model = LinearGaussian("prior")
    estimate_TB, ess_TB = common.estimate_smc(model, x_TBX, 10, generator(1), max_rows=40_000)
    assert (ess_TB >= 1).all()
    assert (ess_TB <= 10).all()
    assert (ess_TB < 5).any()
    for frames in (1, 5, 20):
        exact = kalman_log_likelihood(x_TBX[:frames])
        ratio = (estimate_TB[frames - 1] - exact).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / 4000**0.5


def test_the_particle_filter_approaches_the_kalman_likelihood_of_a_long_recording():
    x_TBX = sample(1000, 16, generator())
    exact = kalman_log_likelihood(x_TBX)
    model = LinearGaussian("filtering")
    gaps = []
    for k in (10, 100, 1000):
        estimate_TB, _ = common.estimate_smc(model, x_TBX, k, generator(1), max_rows=16_000)
        gaps.append((exact - estimate_TB[-1]).mean())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[0] > 5
    assert abs(gaps[2]) < 0.5


# ---- the particle filter ----


def test_all_parts_of_a_state_go_with_a_particle_that_is_resampled():
    x_TBX = sample(20, 8, generator())
    estimate_TB, ess_TB = common.estimate_smc(LinearGaussian("prior"), x_TBX, 10, generator(1))
    in_two_parts = common.estimate_smc(WithMemory("prior"), x_TBX, 10, generator(1))
    assert (ess_TB < 5).any(0).all(), "a sequence was not resampled"
    assert_close(in_two_parts, (estimate_TB, ess_TB))


def test_every_sequence_and_frame_is_resampled_with_an_offset_of_its_own(monkeypatch):
    offsets = []
    particle_filter = common.particle_filter

    def remember(model, x_TBX, state, noise, uniform_TB, k):
        offsets.append(uniform_TB)
        return particle_filter(model, x_TBX, state, noise, uniform_TB, k)

    monkeypatch.setattr(common, "particle_filter", remember)
    x_TBX = sample(7, 5, generator())
    common.estimate_smc(LinearGaussian("prior"), x_TBX, 4, generator(1), max_rows=12)
    assert [offset.shape for offset in offsets] == [(7, 3), (7, 2)]
    all_offsets = torch.cat(offsets, dim=1)
    assert len(all_offsets.unique()) == 7 * 5
    assert 0 <= all_offsets.min() < 0.2
    assert 0.8 < all_offsets.max() < 1


def plain_particle_filter(model, x_TBX, state, noise, uniform_TB, k):
    """log of the estimated p(x) of each sequence, one after the other."""
    found = []
    for b in range(x_TBX.shape[1]):
        rows = slice(b * k, b * k + k)
        own = [part[rows] for part in state]
        found.append(
            plain_filter_of_one(model, x_TBX[:, [b]], own, noise[:, rows], uniform_TB[:, b])
        )
    return torch.stack(found)


def plain_filter_of_one(model, x_T1X, state, noise, uniform_T):
    """One particle at a time, by lists; ancestors are chosen by numbers, without a gradient."""
    k = noise.shape[1]
    states = [tuple(part[[j]] for part in state) for j in range(k)]
    log_w = [0.0] * k
    total = 0.0
    for t, x in enumerate(x_T1X.split(1)):
        for j in range(k):
            rollout = model(x, states[j], noise[t, j].view(1, 1, -1), 1)
            states[j] = rollout.state
            log_w[j] = log_w[j] + rollout.log_w_TBK.squeeze()
        numbers = [value.item() for value in log_w]
        w = [math.exp(value - max(numbers)) for value in numbers]
        if sum(w) ** 2 / sum(value**2 for value in w) < k / 2:
            total = total + torch.stack(log_w).exp().mean().log()
            states = [states[i] for i in plain_systematic(w, uniform_T[t].item())]
            log_w = [torch.zeros((), dtype=torch.float64)] * k
    return total + torch.stack(log_w).exp().mean().log()


def plain_systematic(w, offset):
    """Numbers of the particles that go on."""
    ancestors = []
    i = 0
    passed = w[0] / sum(w)
    for j in range(len(w)):
        while passed < (j + offset) / len(w):
            i += 1
            passed += w[i] / sum(w)
        ancestors.append(i)
    return ancestors


@pytest.mark.parametrize(
    "kind, k, order",
    [
        (common.VRNN, 3, 0),
        (common.VRNN, 3, 4),
        (common.VRNN, 5, 4),
        (variants.WithoutNoise, 3, 0),
        (variants.Forgetful, 3, 4),
        (variants.TanhPosterior, 3, 0),
        (variants.WidePosterior, 3, 4),
        (variants.LoudDecoder, 3, 4),
        (variants.LeakyLSTM, 3, 4),
    ],
)
def test_the_particle_filter_equals_a_plain_one_and_so_does_the_gradient_along_its_ancestors(
    kind, k, order, monkeypatch
):
    model = new_model(kind, order)
    if kind is common.VRNN:
        # z then counts, and the weights of the particles differ
        monkeypatch.setattr(common.AdaptiveLikelihood, "active", model.z_dim)
        model.mirror()
    torch.nn.init.normal_(model.decoder[-1].weight)
    x_TBX = 3 * randn(12, 4, 5)
    uniform_TB = torch.rand(12, 4, dtype=torch.float64)
    noise = randn(12, 4 * k, 3)
    state = [randn(4 * k, 8), randn(4 * k, 8)]
    if order:
        state.append(randn(4, 512 + order).repeat_interleave(k, dim=0))
    given = (model, x_TBX, tuple(state), noise, uniform_TB, k)

    plain_B = plain_particle_filter(*given)
    filtering = common.particle_filter(*given)
    assert_close(filtering.log_likelihood_TB[-1], plain_B)
    with torch.no_grad():
        without_gradient = common.particle_filter(*given)
    assert_close(without_gradient.log_likelihood_TB[-1], plain_B)
    carried = common.particle_filter(*given, resample_last=True)
    assert carried.resampled_TB[:-1].any()
    assert carried.resampled_TB[-1].all()
    assert torch.equal(carried.resampled_TB[:-1], filtering.ess_TB[:-1] < k / 2)
    if kind is common.VRNN:
        assert carried.resampled_TB[:-1].double().mean() > 1 / 3

    rollout = model(x_TBX, tuple(state), noise, k, carried.ancestors)
    loss = vrnn_gauss_iwae.objective_resampled(rollout, carried.resampled_TB)
    assert_close(loss, -plain_B.mean() / 12)
    plain_gradient = flat_gradient(-plain_B.mean() / 12, model)
    assert_close(flat_gradient(loss, model), plain_gradient)
    assert_close(flat_gradient(-filtering.log_likelihood_TB[-1].mean() / 12, model), plain_gradient)
    assert_close(rollout.state, carried.state)


def test_without_resampling_the_particle_filter_is_iwae_with_its_gradient():
    """Of two particles the effective sample size is never under 1."""
    model = new_model()
    x_TBX = randn(9, 4, 5)
    noise = randn(9, 4 * 2, 3)
    uniform_TB = torch.rand(9, 4, dtype=torch.float64)
    filtering = common.particle_filter(model, x_TBX, None, noise, uniform_TB, 2, resample_last=True)
    assert not filtering.resampled_TB[:-1].any()
    rollout = model(x_TBX, None, noise, 2, filtering.ancestors)
    resampled = vrnn_gauss_iwae.objective_resampled(rollout, filtering.resampled_TB)
    weighted = vrnn_gauss_iwae.objective(model(x_TBX, None, noise, 2))
    assert_close(resampled, weighted)
    assert_close(flat_gradient(resampled, model), flat_gradient(weighted, model))


@pytest.mark.parametrize("order", (0, 4))
def test_the_filter_steps_in_bfloat16_as_the_rollout_does(order):
    model = new_model(order=order).float()
    model.mirror()
    model.bf16 = True
    x_TBX = torch.randn(9, 4, 5)
    noise = torch.randn(9, 4 * 2, 3)
    with torch.no_grad():
        filtering = common.particle_filter(model, x_TBX, None, noise, torch.rand(9, 4), 2)
        bound = common.importance_weighted(model(x_TBX, None, noise, 2).log_w_TBK.sum(0))
    assert_close(filtering.log_likelihood_TB[-1], bound, rtol=1e-2, atol=0.3)


# ---- whole recordings ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Of thirty recordings, no two of which are as long."""
    folder = tmp_path_factory.mktemp("lengths")
    random = np.random.default_rng(0)
    recordings = {f"rec_{i}": smooth_noise(random, 300 + 170 * i) for i in range(30)}
    np.savez(folder / "in.npz", **recordings)
    prepare_blizzard.convert_files([folder / "in.npz"], folder / "it.h5", valid=0.2, test=0.4)
    return common.open_corpus(folder / "it.h5")


def minus_squares(model, x_TBX, k, generator):
    """In place of estimate_smc."""
    return -(x_TBX.double() ** 2).sum(2).cumsum(0), torch.full(x_TBX.shape[:2], 2.0)


@pytest.mark.parametrize("at_most", (100, 4))
def test_whole_recordings_count_every_frame_once(corpus, at_most, monkeypatch):
    monkeypatch.setattr(common, "estimate_smc", minus_squares)
    model = common.VRNN(20, 3, 8, 7, 7, 7, 7, 7)
    whole = common.evaluate_recordings(model, corpus, corpus.test, k=500, at_most=at_most)

    offsets = corpus.test.offsets
    count = len(offsets) - 1
    chosen = range(count)
    if at_most < count:
        chosen = [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]
    nats, frames, bits, samples = [], [], 0, 0
    for i in chosen:
        recording = corpus.test.audio[offsets[i] : offsets[i + 1]]
        frames.append(len(recording) // 20)
        pcm = recording[: frames[-1] * 20]
        nats.append(-(((pcm - corpus.mean) / corpus.std) ** 2).sum())
        # what prepare_blizzard.py codes: whole frames of 200
        coded = recording[: len(recording) // 200 * 200]
        bits += prepare_blizzard.flac_bits(coded)
        samples += len(coded)
    assert len(set(frames)) == len(chosen) >= 4
    ratio = sum(nats) / sum(frames)
    found = whole["smc_500"]
    assert found["recordings"] == len(chosen)
    assert found["frames"] == sum(frames)
    assert found["nats_per_frame"] == pytest.approx(ratio, rel=1e-3)
    deviations = [nats_i - ratio * frames_i for nats_i, frames_i in zip(nats, frames)]
    squares = sum(deviation**2 for deviation in deviations)
    stderr = math.sqrt(squares / (len(chosen) - 1) / len(chosen)) / np.mean(frames)
    assert found["stderr"] == pytest.approx(stderr, rel=0.02)
    assert whole["flac"]["bits_per_sample"] == pytest.approx(bits / samples)


def test_whole_recordings_are_those_that_have_yardsticks(corpus, monkeypatch):
    monkeypatch.setattr(common, "estimate_smc", minus_squares)
    model = common.VRNN(20, 3, 8, 7, 7, 7, 7, 7)
    measured = len(corpus.recording_samples)
    monkeypatch.delitem(corpus.recording_samples, 0)
    whole = common.evaluate_recordings(model, corpus, corpus.test, k=500, at_most=100)
    assert whole.keys() == {"smc_500", "flac"}
    assert whole["smc_500"]["recordings"] == measured - 1


def test_all_whole_recordings_are_evaluated_where_none_has_yardsticks(corpus, monkeypatch):
    monkeypatch.setattr(common, "estimate_smc", minus_squares)
    monkeypatch.setattr(corpus, "recording_samples", {})
    monkeypatch.setattr(corpus, "recording_bits", {})
    model = common.VRNN(20, 3, 8, 7, 7, 7, 7, 7)
    whole = common.evaluate_recordings(model, corpus, corpus.test, k=500, at_most=100)
    assert whole.keys() == {"smc_500"}
    lengths = np.diff(corpus.test.offsets)
    assert whole["smc_500"]["recordings"] == (lengths >= 20).sum()


# ---- the doubly reparameterised gradient ----


def z_of(rollout, noise):
    return (rollout.q_mean + rollout.q_sigma * noise).detach()


def doubly_reparameterised_loss(model, x_TBX, noise, k):
    """From a zero state, as vrnn_gauss_iwae.main computes it."""
    rollout = model(x_TBX, None, noise, k)
    z = z_of(rollout, noise)
    state = model.zero_state(x_TBX.shape[1] * k)
    densities = vrnn_gauss_iwae.at_fixed_z(model, x_TBX, rollout.phi_x, z, state, k)
    return vrnn_gauss_iwae.objective_dreg(rollout, *densities)


def test_densities_at_fixed_z_are_those_of_the_rollout():
    model = new_model()
    state = randn(2, 4 * 3, 8).unbind()
    x_TBX = randn(6, 4, 5)
    noise = randn(6, 4 * 3, 3)
    rollout = model(x_TBX, state, noise, 3)
    z = z_of(rollout, noise)
    log_p_TBK, log_q_TBK = vrnn_gauss_iwae.at_fixed_z(model, x_TBX, rollout.phi_x, z, state, 3)
    assert_close(log_p_TBK - log_q_TBK, rollout.log_w_TBK)
    log_q = common.gaussian_log_density(z, rollout.q_mean, rollout.q_sigma)
    assert_close(log_q_TBK, log_q.view(6, 4, 3))


def test_the_doubly_reparameterised_gradient_equals_its_definition():
    model = new_model()
    x_TBX = randn(6, 4, 5)
    noise = randn(6, 4 * 3, 3)
    rollout = model(x_TBX, None, noise, 3)
    loss = doubly_reparameterised_loss(model, x_TBX, noise, 3)
    assert_close(loss, vrnn_gauss_iwae.objective(rollout))

    z = rollout.q_mean + rollout.q_sigma * noise
    given = z.detach().requires_grad_()
    weights_BK = rollout.log_w_TBK.detach().sum(0).softmax(1)

    def log_p_and_q(network):
        phi_x = network.phi_x(x_TBX)
        state = network.zero_state(12)
        return vrnn_gauss_iwae.at_fixed_z(network, x_TBX, phi_x, given, state, 3)

    frozen = copy.deepcopy(model).requires_grad_(False)
    log_p, log_q = log_p_and_q(frozen)
    (d_z,) = torch.autograd.grad((log_p - log_q).sum(), given)
    squares = weights_BK.flatten().unsqueeze(1) ** 2
    of_posterior = flat_gradient((z * d_z * squares).sum(), model)
    log_p, _ = log_p_and_q(model)
    of_model = flat_gradient((weights_BK * log_p.sum(0)).sum(), model)
    assert_close(flat_gradient(loss, model), -(of_posterior + of_model) / 4 / 6)


def test_the_doubly_reparameterised_gradient_has_the_mean_of_the_ordinary_one_and_less_variance():
    model = new_model()
    x_TBX = randn(4, 1, 5).expand(4, 500, 5)
    doubly, ordinary = [], []
    for _ in range(40):
        ordinary.append(flat_gradient(vrnn_gauss_iwae.objective(model(x_TBX, k=4)), model))
        noise = randn(4, 500 * 4, 3)
        loss = doubly_reparameterised_loss(model, x_TBX, noise, 4)
        doubly.append(flat_gradient(loss, model))
    ordinary = torch.stack(ordinary)
    doubly = torch.stack(doubly)
    error = ((ordinary.var(0) + doubly.var(0)) / 40).sqrt()
    assert (ordinary.mean(0) - doubly.mean(0)).norm() < 1.5 * error.norm()
    assert ordinary.mean(0).norm() > 10 * error.norm()
    of_posterior = []
    for name, p in model.named_parameters():
        of_posterior += [name.startswith("posterior")] * p.numel()
    doubly_variance = doubly.var(0)[of_posterior].sum()
    ordinary_variance = ordinary.var(0)[of_posterior].sum()
    assert doubly_variance < 0.9 * ordinary_variance


# ---- bounds of one another ----


def test_iwae_never_falls_as_k_grows_in_any_sequence():
    model = new_model().float()
    ks = (1, 2, 10, 50, 100)
    bounds = common.estimate_bounds(model, torch.randn(12, 6, 5), ks, generator())
    iwae = [bounds[f"iwae_{k}"] for k in ks]
    assert torch.allclose(bounds["elbo_100"], iwae[0])
    for lower, higher in zip(iwae, iwae[1:]):
        assert (higher >= lower - 1e-9).all()
    assert (iwae[-1] > bounds["elbo_100"]).all()


class SameNoise(LinearGaussian):
    """Particle j of a sequence gets noise j, in whatever chunks the particles come."""

    def __init__(self, noise):
        super().__init__("prior")
        self.noise = noise  # (T, B, particles, 1)
        self.seen = 0

    def __call__(self, x_TBX, state, noise_of_the_chunk, k):
        noise = self.noise[:, :, self.seen : self.seen + k].flatten(1, 2)
        self.seen += k
        return super().__call__(x_TBX, state, noise, k)


def test_bounds_in_chunks_equal_bounds_at_once():
    x_TBX = sample(10, 4, generator())
    noise = torch.randn(10, 4, 12, 1, generator=generator(3), dtype=torch.float64)
    at_once = common.estimate_bounds(SameNoise(noise), x_TBX, (3, 12), generator(), max_rows=1000)
    in_chunks = common.estimate_bounds(SameNoise(noise), x_TBX, (3, 12), generator(), max_rows=20)
    for name in at_once:
        assert_close(at_once[name], in_chunks[name])


# ---- objectives ----


def test_iwae_of_one_particle_is_the_sampled_vrnn_bound():
    rollout = random_rollout(k=1)
    sampled_bound = -rollout.log_w_TBK.mean()
    assert_close(vrnn_gauss_iwae.objective(rollout), sampled_bound)
    assert_close(vrnn_gauss_alt_nll.objective(rollout), sampled_bound)


def test_sampled_bound_averages_to_the_analytic_one():
    rollout = random_rollout(k=20_000, frames=1)
    analytic = vrnn_gauss.objective(rollout)
    sampled = vrnn_gauss_alt_nll.objective(rollout)
    assert abs(analytic - sampled) < 0.02
    assert analytic != sampled


def test_objectives_equal_their_formulas_written_out():
    rollout = random_rollout(k=3)
    frames, batch, k = rollout.log_w_TBK.shape
    vae = 0.0
    iwae = 0.0
    for log_w_TK in rollout.log_w_TBK.unbind(1):
        log_w = [sum(values) for values in log_w_TK.T.tolist()]
        vae -= sum(log_w) / k / frames / batch
        iwae -= math.log(sum(math.exp(s) for s in log_w) / k) / frames / batch
    assert vrnn_gauss_alt_nll.objective(rollout).item() == pytest.approx(vae, rel=1e-12)
    assert vrnn_gauss_iwae.objective(rollout).item() == pytest.approx(iwae, rel=1e-12)
    vrnn = sum((rollout.nll_TBK + rollout.kl_TBK).flatten().tolist()) / (frames * batch * k)
    assert vrnn_gauss.objective(rollout).item() == pytest.approx(vrnn, rel=1e-12)


def test_iwae_gradient_weighs_particles_by_their_normalised_weights():
    log_w_TBK = randn(4, 3, 5).requires_grad_()
    rollout = common.Rollout(None, None, log_w_TBK, *[None] * 8)
    vrnn_gauss_iwae.objective(rollout).backward()
    weights_BK = log_w_TBK.detach().sum(0).softmax(1) / (3 * 4)
    assert_close(log_w_TBK.grad, -weights_BK.expand(4, 3, 5))


# ---- densities and units ----


def test_analytic_kl_and_densities_equal_torch_distributions():
    q_mean, p_mean = randn(2, 10, 6)
    x = randn(10, 6)
    q_sigma, p_sigma = torch.rand(2, 10, 6, dtype=torch.float64) + 0.01
    q = Normal(q_mean, q_sigma)
    p = Normal(p_mean, p_sigma)
    kl = common.gaussian_kl(q_mean, q_sigma, p_mean, p_sigma)
    assert_close(kl, kl_divergence(q, p).sum(-1))
    log_density = common.gaussian_log_density(x, q_mean, q_sigma)
    assert_close(log_density, q.log_prob(x).sum(-1))


def test_bits_per_sample_of_a_gaussian_equal_its_entropy_plus_quantisation():
    std = 1000.0
    # of a frame of a unit Gaussian under itself
    log_likelihood = 200 * -0.5 * (1 + math.log(2 * math.pi))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2)
    assert common.bits_per_sample(log_likelihood, 200, std) == pytest.approx(entropy)
