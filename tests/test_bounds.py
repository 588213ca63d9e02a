import math

import pytest
import torch
from linear_gaussian import A, C, LinearGaussian, R, S, kalman_log_likelihood, sample
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import common
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
            covariance[i, j] = C * C * sum(S * S * A ** (i - n) * A ** (j - n) for n in range(min(i, j) + 1))
    covariance += R * R * torch.eye(6, dtype=torch.float64)
    dense = MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(x_TBX[:, :, 0].T)
    torch.testing.assert_close(kalman_log_likelihood(x_TBX), dense)


def test_iwae_with_the_exact_posterior_equals_the_kalman_likelihood():
    x_TBX = sample(40, 16, generator())
    bounds = common.estimate_bounds(LinearGaussian("exact"), x_TBX, (1, 5), generator(1))
    for name in ("elbo", "elbo_5", "iwae_1", "iwae_5"):
        tolerance = dict(atol=1e-9, rtol=1e-9) if name != "elbo" else dict(atol=3.0, rtol=0.1)  # KL of a sampled path
        torch.testing.assert_close(bounds[name], kalman_log_likelihood(x_TBX), **tolerance)


@pytest.mark.parametrize("proposal", ("filtering", "prior"))
def test_iwae_with_another_proposal_approaches_the_kalman_likelihood_from_below(proposal):
    x_TBX = sample(5, 200, generator())
    bounds = common.estimate_bounds(LinearGaussian(proposal), x_TBX, (1, 10, 100, 5000), generator(1))
    gap = [(kalman_log_likelihood(x_TBX) - bounds[f"iwae_{k}"]).mean() for k in (1, 10, 100, 5000)]
    assert gap[0] > gap[1] > gap[2] > gap[3] > -0.01
    assert gap[0] > 0.2
    assert abs(gap[3]) < gap[0] / 100


def test_importance_weights_are_unbiased_in_the_likelihood():
    x_TBX = sample(4, 50, generator())
    bounds = common.estimate_bounds(LinearGaussian("prior"), x_TBX, (20_000,), generator(1), max_rows=100_000)
    ratio = (bounds["iwae_20000"] - kalman_log_likelihood(x_TBX)).exp()
    assert abs(ratio.mean() - 1) < 0.02


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

        def __call__(self, x_TBX, state=None, k=1, **noise_of_the_chunk):
            first, self.seen = self.seen, self.seen + k
            return super().__call__(x_TBX, state, noise[:, :, first:first + k].flatten(1, 2), k)

    at_once = common.estimate_bounds(SameNoise("prior"), x_TBX, (3, 12), generator(), max_rows=1000)
    in_chunks = common.estimate_bounds(SameNoise("prior"), x_TBX, (3, 12), generator(), max_rows=4 * 5)
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
    rollout = common.Rollout(*[None] * 2, log_w_TBK, *[None] * 7)
    vrnn_gauss_iwae.objective(rollout).backward()
    weights = log_w_TBK.detach().sum(0).softmax(1) / (3 * 4)
    torch.testing.assert_close(log_w_TBK.grad, -weights.expand(4, 3, 5))


def test_analytic_kl_and_densities_equal_torch_distributions():
    q_mean, p_mean, x = torch.randn(3, 10, 6, dtype=torch.float64).unbind(0)
    q_sigma, p_sigma = torch.rand(2, 10, 6, dtype=torch.float64).add(0.01).unbind(0)
    torch.testing.assert_close(common.gaussian_kl(q_mean, q_sigma, p_mean, p_sigma),
                               kl_divergence(Normal(q_mean, q_sigma), Normal(p_mean, p_sigma)).sum(-1))
    torch.testing.assert_close(common.gaussian_log_density(x, q_mean, q_sigma),
                               Normal(q_mean, q_sigma).log_prob(x).sum(-1))


def test_bits_per_sample_of_a_gaussian_equal_its_entropy_plus_quantisation():
    std = 1000.0
    log_likelihood = 200 * -0.5 * (1 + math.log(2 * math.pi))  # of a unit Gaussian under itself, per frame
    assert common.bits_per_sample(log_likelihood, 200, std) == pytest.approx(
        0.5 * math.log2(2 * math.pi * math.e * std ** 2))
