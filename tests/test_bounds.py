import copy
import math

import numpy as np
import pytest
import torch
from linear_gaussian import A, C, LinearGaussian, R, S, kalman_log_likelihood, sample
from tiny import smooth_noise
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import common
import prepare_blizzard
import vrnn_gauss
import vrnn_gauss_alt_nll
import vrnn_gauss_iwae


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_rollout(k, frames=6, batch=4):
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7).double()
    return model(torch.randn(frames, batch, 5, dtype=torch.float64), k=k)


def test_kalman_likelihood_equals_the_dense_gaussian():
    x_TBX = sample(6, 3, generator())
    covariance = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            covariance[i, j] = (
                C * C * sum(S * S * A ** (i - n) * A ** (j - n) for n in range(min(i, j) + 1))
            )
    covariance += R * R * torch.eye(6, dtype=torch.float64)
    dense = MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(
        x_TBX[:, :, 0].T
    )
    torch.testing.assert_close(kalman_log_likelihood(x_TBX), dense)


def test_iwae_with_the_exact_posterior_equals_the_kalman_likelihood():
    x_TBX = sample(40, 16, generator())
    bounds = common.estimate_bounds(LinearGaussian("exact"), x_TBX, (1, 5), generator(1))
    for name in ("elbo", "elbo_5", "iwae_1", "iwae_5"):
        tolerance = (
            dict(atol=1e-9, rtol=1e-9) if name != "elbo" else dict(atol=3.0, rtol=0.1)
        )  # KL of a sampled path
        torch.testing.assert_close(bounds[name], kalman_log_likelihood(x_TBX), **tolerance)


@pytest.mark.parametrize("proposal", ("filtering", "prior"))
def test_iwae_with_another_proposal_approaches_the_kalman_likelihood_from_below(proposal):
    x_TBX = sample(5, 200, generator())
    bounds = common.estimate_bounds(
        LinearGaussian(proposal), x_TBX, (1, 10, 100, 5000), generator(1)
    )
    gap = [(kalman_log_likelihood(x_TBX) - bounds[f"iwae_{k}"]).mean() for k in (1, 10, 100, 5000)]
    assert gap[0] > gap[1] > gap[2] > gap[3] > -0.01
    assert gap[0] > 0.2
    assert abs(gap[3]) < gap[0] / 100


def test_importance_weights_are_unbiased_in_the_likelihood():
    x_TBX = sample(4, 50, generator())
    bounds = common.estimate_bounds(
        LinearGaussian("prior"), x_TBX, (20_000,), generator(1), max_rows=100_000
    )
    ratio = (bounds["iwae_20000"] - kalman_log_likelihood(x_TBX)).exp()
    assert abs(ratio.mean() - 1) < 0.02


@pytest.mark.parametrize("proposal, largest_gap", (("filtering", 0.08), ("prior", 1.2)))
def test_the_particle_filter_is_far_tighter_than_iwae_over_many_frames(proposal, largest_gap):
    x_TBX = sample(40, 64, generator())
    exact, model = kalman_log_likelihood(x_TBX), LinearGaussian(proposal)
    smc = exact - common.estimate_smc(model, x_TBX, 100, generator(1))[0][-1]
    iwae = exact - common.estimate_bounds(model, x_TBX, (100,), generator(1))["iwae_100"]
    assert 0 < smc.mean() < largest_gap
    assert smc.mean() < iwae.mean() / 4


def test_the_particle_filter_is_unbiased_in_the_likelihood_of_every_prefix():
    x_TBX = sample(1, 1, generator()).new_zeros(20, 4000, 1) + sample(20, 1, generator())
    estimate_TB, ess_TB = common.estimate_smc(
        LinearGaussian("prior"), x_TBX, 10, generator(1), max_rows=40_000
    )
    assert (ess_TB >= 1).all() and (ess_TB <= 10).all() and (ess_TB < 5).any()
    for frames in (1, 5, 20):
        exact = kalman_log_likelihood(x_TBX[:frames])
        ratio = (estimate_TB[frames - 1] - exact).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / 4000**0.5


def test_the_particle_filter_approaches_the_kalman_likelihood_of_a_long_recording():
    x_TBX = sample(1000, 16, generator())
    exact, model = kalman_log_likelihood(x_TBX), LinearGaussian("filtering")
    gaps = [
        (exact - common.estimate_smc(model, x_TBX, k, generator(1), max_rows=16_000)[0][-1]).mean()
        for k in (10, 100, 1000)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[0] > 5 and abs(gaps[2]) < 0.5


def gradients(loss, model):
    return torch.cat(
        [
            part.flatten()
            for part in torch.autograd.grad(
                loss, list(model.parameters()), allow_unused=True, materialize_grads=True
            )
        ]
    )


def plain_particle_filter(model, x_TBX, state, noise, uniform_TB, k):
    """One sequence and one particle at a time, by lists; ancestors are chosen by numbers, without a gradient."""
    result = []
    for b in range(x_TBX.shape[1]):
        states = [tuple(part[b * k + j : b * k + j + 1] for part in state) for j in range(k)]
        log_w, total = [0.0] * k, 0.0
        for t in range(len(x_TBX)):
            for j in range(k):
                rollout = model(
                    x_TBX[t : t + 1, b : b + 1],
                    states[j],
                    noise[t : t + 1, b * k + j : b * k + j + 1],
                    1,
                )
                states[j], log_w[j] = rollout.state, log_w[j] + rollout.log_w_TBK.squeeze()
            numbers = [value.item() for value in log_w]
            w = [math.exp(value - max(numbers)) for value in numbers]
            if sum(w) ** 2 / sum(value**2 for value in w) < k / 2:
                total = total + torch.stack(log_w).exp().mean().log()
                ancestors, passed, i = [], w[0] / sum(w), 0
                for j in range(k):
                    while passed < (j + uniform_TB[t, b].item()) / k:
                        i += 1
                        passed += w[i] / sum(w)
                    ancestors.append(i)
                states, log_w = [states[i] for i in ancestors], [0.0] * k
        result.append(
            total + torch.stack([torch.as_tensor(value) for value in log_w]).exp().mean().log()
        )
    return torch.stack(result)


@pytest.mark.parametrize("k, order", ((3, 0), (3, 4), (5, 4)))
def test_the_particle_filter_equals_a_plain_one_and_so_does_the_gradient_along_its_ancestors(
    k, order
):
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7, order).double()
    model.mirror()  # z then counts, and the weights of the particles differ
    torch.nn.init.normal_(model.decoder[-1].weight)
    x_TBX, uniform_TB = (
        3 * torch.randn(12, 4, 5, dtype=torch.float64),
        torch.rand(12, 4, dtype=torch.float64),
    )
    noise, (h, c) = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((12, 4 * k, 3), (2, 4 * k, 8))
    )
    recent = torch.randn(4, order, dtype=torch.float64).repeat_interleave(k, dim=0)
    state = (h, c, recent) if order else (h, c)

    plain_B = plain_particle_filter(model, x_TBX, state, noise, uniform_TB, k)
    for with_gradient in (
        True,
        False,
    ):  # by calls with single frames, as of any model, and by the model's own steps
        with torch.set_grad_enabled(with_gradient):
            filtering = common.particle_filter(model, x_TBX, state, noise, uniform_TB, k)
        torch.testing.assert_close(filtering.log_likelihood_TB[-1], plain_B)
        assert filtering.log_likelihood_TB.requires_grad == with_gradient
    carried = common.particle_filter(model, x_TBX, state, noise, uniform_TB, k, resample_last=True)
    assert carried.resampled_TB[:-1].double().mean() > 1 / 3 and carried.resampled_TB[-1].all()
    assert torch.equal(carried.resampled_TB[:-1], filtering.ess_TB[:-1] < k / 2)
    rollout = model(x_TBX, state, noise, k, carried.ancestors)
    loss = vrnn_gauss_iwae.objective_resampled(rollout, carried.resampled_TB)
    torch.testing.assert_close(loss, -plain_B.mean() / 12)
    torch.testing.assert_close(gradients(loss, model), gradients(-plain_B.mean() / 12, model))
    torch.testing.assert_close(rollout.state, carried.state)


def test_without_resampling_the_particle_filter_is_iwae_with_its_gradient():
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7).double()
    x_TBX, noise = (
        torch.randn(9, 4, 5, dtype=torch.float64),
        torch.randn(9, 4 * 2, 3, dtype=torch.float64),
    )
    uniform_TB = torch.rand(9, 4, dtype=torch.float64)
    filtering = common.particle_filter(model, x_TBX, None, noise, uniform_TB, 2, resample_last=True)
    assert not filtering.resampled_TB[:-1].any()
    rollout = model(x_TBX, None, noise, 2, filtering.ancestors)
    resampled = vrnn_gauss_iwae.objective_resampled(rollout, filtering.resampled_TB)
    weighted = vrnn_gauss_iwae.objective(
        model(x_TBX, None, noise, 2)
    )  # of two particles the size is never under 1
    torch.testing.assert_close(resampled, weighted)
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, list(model.parameters())) for loss in (resampled, weighted))
    ):
        torch.testing.assert_close(ours, theirs)


class WithoutNoise(common.VRNN):
    def forward(self, x_TBX, state=None, noise=None, k=1):
        return super().forward(x_TBX, state, 0 * noise, k)


class Louder(common.VRNN):
    def decode(self, phi_z, h_before):
        mean, sigma, *others = super().decode(phi_z, h_before)
        return mean, 3 * sigma, *others


@pytest.mark.parametrize("kind", (WithoutNoise, Louder))
def test_the_filter_runs_what_a_subclass_of_the_vrnn_has_in_place_of_its_call(kind):
    torch.manual_seed(0)
    model, x_TBX = kind(20, 4, 12, 8, 8, 8, 8, 8), torch.randn(6, 3, 20)
    call_alone = lambda *given: model(*given)  # noqa: E731
    call_alone.z_dim = model.z_dim
    for ours, plain in zip(
        *(common.estimate_smc(one, x_TBX, 5, generator()) for one in (model, call_alone))
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("network", ("posterior", "phi_z", "prior", "decoder"))
def test_a_network_with_a_layer_that_the_recurrence_would_pass_over_is_refused(network):
    model = common.VRNN(20, 4, 12, 8, 8, 8, 8, 8)
    getattr(model, network)[1] = torch.nn.Tanh()
    with pytest.raises(common.UserError, match="a VRNN with a Tanh needs a forward of its own"):
        model(torch.randn(6, 3, 20))


def test_the_children_of_a_particle_share_what_sees_its_h_alone():
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7)
    state, weigh, go_on = model.stepper(torch.randn(2, 4, 5), None, 3)
    _, particles = weigh(0, state, torch.randn(12, 3))
    ancestors = torch.tensor([0, 0, 0, 3, 4, 5, 8, 8, 8, 10, 9, 9])
    parents, parent_of, h, c = go_on(particles, ancestors)
    assert parents.tolist() == [0, 3, 4, 5, 8, 9, 10] and len(h) == len(c) == 7
    assert torch.equal(parents[parent_of], ancestors)


@pytest.mark.parametrize("order", (0, 4))
def test_the_filter_steps_in_bfloat16_as_the_rollout_does(order):
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7, order)
    model.mirror()
    model.bf16 = True
    x_TBX, noise = torch.randn(9, 4, 5), torch.randn(9, 4 * 2, 3)
    with torch.no_grad():
        filtering = common.particle_filter(model, x_TBX, None, noise, torch.rand(9, 4), 2)
        bound = common.importance_weighted(model(x_TBX, None, noise, 2).log_w_TBK.sum(0))
    torch.testing.assert_close(filtering.log_likelihood_TB[-1], bound, rtol=1e-2, atol=0.3)


def test_whole_recordings_count_every_frame_once(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "in.npz", **{f"rec_{i}": smooth_noise(random, 300 + 170 * i) for i in range(30)}
    )
    prepare_blizzard.convert_files([tmp_path / "in.npz"], tmp_path / "it.h5", valid=0.2, test=0.4)
    corpus = common.open_corpus(tmp_path / "it.h5")
    monkeypatch.setattr(
        common,
        "estimate_smc",
        lambda model, x_TBX, k, generator: (
            -(x_TBX.double() ** 2).sum(2).cumsum(0),
            torch.full(x_TBX.shape[:2], 2.0),
        ),
    )
    found = common.evaluate_recordings(
        common.VRNN(20, 3, 8, 7, 7, 7, 7, 7), corpus, corpus.test, k=500, at_most=100
    )
    found, flac = found["smc_500"], found["flac"]

    nats, frames, bits = [], [], 0
    for start, end in zip(corpus.test.offsets, corpus.test.offsets[1:]):
        frames.append((end - start) // 20)
        pcm = corpus.test.read(np.array([start]), frames[-1] * 20)[0]
        nats.append(-(((pcm - corpus.mean) / corpus.std) ** 2).sum())
        bits += common.flac_size(pcm)[0]
    assert len(set(frames)) > 5
    assert (found["recordings"], found["frames"], found["ess"]) == (len(frames), sum(frames), 2.0)
    assert found["nats_per_frame"] == pytest.approx(sum(nats) / sum(frames), rel=1e-3)
    assert (flac["recordings"], flac["frames"]) == (found["recordings"], found["frames"])
    assert flac["bits_per_sample"] == pytest.approx(bits / sum(frames) / 20)


def z_of(rollout, noise):
    return (rollout.q_mean + rollout.q_sigma * noise).detach()


def doubly_reparameterised_loss(model, x_TBX, noise, rollout, k):
    """From a zero state, as vrnn_gauss_iwae.main computes it."""
    state = model.zero_state(x_TBX.shape[1] * k)
    at_fixed_z = vrnn_gauss_iwae.at_fixed_z(
        model, x_TBX, rollout.phi_x, z_of(rollout, noise), state, k
    )
    return vrnn_gauss_iwae.objective_dreg(rollout, *at_fixed_z)


def test_densities_at_fixed_z_are_those_of_the_rollout():
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7).double()
    state = torch.randn(2, 4 * 3, 8, dtype=torch.float64).unbind()
    x_TBX, noise = (
        torch.randn(6, 4, 5, dtype=torch.float64),
        torch.randn(6, 4 * 3, 3, dtype=torch.float64),
    )
    rollout = model(x_TBX, state, noise, 3)
    z = z_of(rollout, noise)
    log_p_TBK, log_q_TBK = vrnn_gauss_iwae.at_fixed_z(model, x_TBX, rollout.phi_x, z, state, 3)
    torch.testing.assert_close(log_p_TBK - log_q_TBK, rollout.log_w_TBK)
    log_q = common.gaussian_log_density(z, rollout.q_mean, rollout.q_sigma)
    torch.testing.assert_close(log_q_TBK, log_q.view(6, 4, 3))


def test_the_doubly_reparameterised_gradient_equals_its_definition():
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7).double()
    x_TBX, noise = (
        torch.randn(6, 4, 5, dtype=torch.float64),
        torch.randn(6, 4 * 3, 3, dtype=torch.float64),
    )
    loss = doubly_reparameterised_loss(model, x_TBX, noise, model(x_TBX, None, noise, 3), 3)
    torch.testing.assert_close(loss, vrnn_gauss_iwae.objective(model(x_TBX, None, noise, 3)))
    doubly = gradients(loss, model)

    rollout = model(x_TBX, None, noise, 3)
    z = rollout.q_mean + rollout.q_sigma * noise
    weights = rollout.log_w_TBK.detach().sum(0).softmax(1)
    given = z.detach().requires_grad_()
    frozen = copy.deepcopy(model).requires_grad_(False)

    def log_p_and_q(network):
        return vrnn_gauss_iwae.at_fixed_z(
            network, x_TBX, network.phi_x(x_TBX), given, network.zero_state(12), 3
        )

    log_p, log_q = log_p_and_q(frozen)
    (d_z,) = torch.autograd.grad((log_p - log_q).sum(), given)
    of_posterior = gradients((z * d_z * weights.flatten().unsqueeze(1) ** 2).sum(), model)
    of_model = gradients((weights * log_p_and_q(model)[0].sum(0)).sum(), model)
    torch.testing.assert_close(doubly, -(of_posterior + of_model) / 4 / 6)


def test_the_doubly_reparameterised_gradient_has_the_mean_of_the_ordinary_one_and_less_variance():
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7).double()
    x_TBX = torch.randn(4, 1, 5, dtype=torch.float64).expand(4, 500, 5)
    doubly, ordinary = [], []
    for _ in range(40):
        ordinary.append(gradients(vrnn_gauss_iwae.objective(model(x_TBX, k=4)), model))
        noise = torch.randn(4, 500 * 4, 3, dtype=torch.float64)
        loss = doubly_reparameterised_loss(model, x_TBX, noise, model(x_TBX, None, noise, 4), 4)
        doubly.append(gradients(loss, model))
    ordinary, doubly = torch.stack(ordinary), torch.stack(doubly)
    error = ((ordinary.var(0) + doubly.var(0)) / 40).sqrt()
    assert (ordinary.mean(0) - doubly.mean(0)).norm() < 1.5 * error.norm()
    assert ordinary.mean(0).norm() > 10 * error.norm()
    of_posterior = torch.cat(
        [
            torch.full((p.numel(),), name.startswith("posterior"))
            for name, p in model.named_parameters()
        ]
    )
    assert doubly.var(0)[of_posterior].sum() < 0.9 * ordinary.var(0)[of_posterior].sum()


def test_iwae_never_falls_as_k_grows_in_any_sequence():
    torch.manual_seed(0)
    model = common.VRNN(5, 3, 8, 7, 7, 7, 7, 7)
    bounds = common.estimate_bounds(model, torch.randn(12, 6, 5), (1, 2, 10, 50, 100), generator())
    steps = [bounds["elbo_100"]] + [bounds[f"iwae_{k}"] for k in (1, 2, 10, 50, 100)]
    assert torch.allclose(steps[0], steps[1])
    for lower, higher in zip(steps[1:], steps[2:]):
        assert (higher >= lower - 1e-9).all()
    assert (steps[-1] > steps[0]).all()


def test_bounds_in_chunks_equal_bounds_at_once():
    x_TBX = sample(10, 4, generator())
    noise = torch.randn(10, 4, 12, 1, generator=generator(3), dtype=torch.float64)

    class SameNoise(LinearGaussian):
        """Particle j of a sequence gets noise j, in whatever chunks the particles come."""

        seen = 0

        def __call__(self, x_TBX, state, noise_of_the_chunk, k):
            first, self.seen = self.seen, self.seen + k
            return super().__call__(x_TBX, state, noise[:, :, first : first + k].flatten(1, 2), k)

    at_once = common.estimate_bounds(SameNoise("prior"), x_TBX, (3, 12), generator(), max_rows=1000)
    in_chunks = common.estimate_bounds(
        SameNoise("prior"), x_TBX, (3, 12), generator(), max_rows=4 * 5
    )
    for name in at_once:
        torch.testing.assert_close(at_once[name], in_chunks[name])


def test_iwae_of_one_particle_is_the_sampled_vrnn_bound():
    rollout = random_rollout(k=1)
    sampled_bound = -rollout.log_w_TBK.mean()
    torch.testing.assert_close(vrnn_gauss_iwae.objective(rollout), sampled_bound)
    torch.testing.assert_close(vrnn_gauss_alt_nll.objective(rollout), sampled_bound)


def test_sampled_bound_averages_to_the_analytic_one():
    rollout = random_rollout(k=20_000, frames=1)
    analytic, sampled = vrnn_gauss.objective(rollout), vrnn_gauss_alt_nll.objective(rollout)
    assert abs(analytic - sampled) < 0.02
    assert analytic != sampled


def test_objectives_equal_their_formulas_written_out():
    rollout = random_rollout(k=3)
    frames, batch, k = rollout.log_w_TBK.shape
    vae, iwae = 0.0, 0.0
    for b in range(batch):
        log_w = [sum(rollout.log_w_TBK[t, b, j].item() for t in range(frames)) for j in range(k)]
        vae -= sum(log_w) / k / frames / batch
        iwae -= math.log(sum(math.exp(s) for s in log_w) / k) / frames / batch
    assert vrnn_gauss_alt_nll.objective(rollout).item() == pytest.approx(vae, rel=1e-12)
    assert vrnn_gauss_iwae.objective(rollout).item() == pytest.approx(iwae, rel=1e-12)
    vrnn = sum((rollout.nll_TBK + rollout.kl_TBK).flatten().tolist()) / (frames * batch * k)
    assert vrnn_gauss.objective(rollout).item() == pytest.approx(vrnn, rel=1e-12)


def test_iwae_gradient_weighs_particles_by_their_normalised_weights():
    log_w_TBK = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    rollout = common.Rollout(*[None] * 2, log_w_TBK, *[None] * 8)
    vrnn_gauss_iwae.objective(rollout).backward()
    weights = log_w_TBK.detach().sum(0).softmax(1) / (3 * 4)
    torch.testing.assert_close(log_w_TBK.grad, -weights.expand(4, 3, 5))


def test_published_weights_on_a_case_small_enough_to_read():
    """One sequence, two frames, two particles, the second three times as good in each frame: weights 1 and 9."""
    log_w_TBK = math.log(3) * torch.tensor(
        [[[0.0, 1.0]], [[0.0, 1.0]]], dtype=torch.float64, requires_grad=True
    )
    rollout = common.Rollout(*[None] * 2, log_w_TBK, *[None] * 8)

    def weights(*corrections):
        """Of the two particles in the gradient."""
        (gradient,) = torch.autograd.grad(
            vrnn_gauss_iwae.objective_as_published(rollout, corrections), log_w_TBK
        )
        return pytest.approx((-gradient.sum(0).flatten()).tolist())

    assert vrnn_gauss_iwae.objective_as_published(rollout).item() == pytest.approx(-math.log(3) / 4)
    assert weights("gradient") == [3 / 4, 1 / 4]  # the worse particle counts three times as much
    assert weights("gradient", "sign") == [
        1 / 4,
        3 / 4,
    ]  # the mean over time flattens 1 : 9 to 1 : 3
    assert weights("gradient", "sign", "time") == [1 / 10, 9 / 10]
    assert weights("gradient", "time") == [9 / 10, 1 / 10]
    (correct,) = torch.autograd.grad(vrnn_gauss_iwae.objective(rollout), log_w_TBK)
    assert weights("gradient", "sign", "time", "batch") == (-correct.sum(0).flatten()).tolist()
    s, w = torch.tensor([0.0, -math.log(3)]).tolist(), [3 / 4, 1 / 4]
    through_weights = [w[i] * (1 + s[i] - (w[0] * s[0] + w[1] * s[1])) for i in range(2)]
    assert weights() == through_weights  # 0.96 to 0.04: the gradient through w adds to it


def test_analytic_kl_and_densities_equal_torch_distributions():
    q_mean, p_mean, x = torch.randn(3, 10, 6, dtype=torch.float64).unbind(0)
    q_sigma, p_sigma = torch.rand(2, 10, 6, dtype=torch.float64).add(0.01).unbind(0)
    torch.testing.assert_close(
        common.gaussian_kl(q_mean, q_sigma, p_mean, p_sigma),
        kl_divergence(Normal(q_mean, q_sigma), Normal(p_mean, p_sigma)).sum(-1),
    )
    torch.testing.assert_close(
        common.gaussian_log_density(x, q_mean, q_sigma), Normal(q_mean, q_sigma).log_prob(x).sum(-1)
    )


def test_bits_per_sample_of_a_gaussian_equal_its_entropy_plus_quantisation():
    std = 1000.0
    log_likelihood = (
        200 * -0.5 * (1 + math.log(2 * math.pi))
    )  # of a unit Gaussian under itself, per frame
    assert common.bits_per_sample(log_likelihood, 200, std) == pytest.approx(
        0.5 * math.log2(2 * math.pi * math.e * std**2)
    )
