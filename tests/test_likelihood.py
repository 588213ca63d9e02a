"""The frame likelihood that adapts to the samples before it, and the LSTM without z. Mostly in float64."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from plain import innovations, plain_rollout
from tiny import SIZES, main_of, write_tiny_data
from torch.distributions import StudentT
from torch.nn import functional as F

import common
import vrnn_gauss
import vrnn_gauss_alt_nll
import vrnn_gauss_iwae

FIELDS = (
    "nll_TBK",
    "kl_TBK",
    "log_w_TBK",
    "q_mean",
    "q_sigma",
    "prior_mean",
    "prior_sigma",
    "x_mean",
    "x_sigma",
)
X, BATCH, FRAMES = 5, 3, 6
HEARD = common.AdaptiveLikelihood.heard


@pytest.fixture(
    params=[(3, 1, 1), (3, 3, 1), (3, 3, 4), (3, 12, 1), (3, 12, 4), (0, 0, 1), (0, 12, 1)],
    ids=lambda sizes: "z_dim={}, P={}, K={}".format(*sizes),
)
def case(request):
    """(model, x_TBX, state of particles that have seen the same x, noise, k)"""
    z_dim, order, k = request.param
    torch.manual_seed(0)
    model = common.VRNN(X, z_dim, 8, 7, 6, 9, 10, 4, order, 3).double()
    # As training leaves it: components differ.
    torch.nn.init.normal_(model.decoder[-1].weight, std=0.5)
    h, c = torch.randn(2, BATCH * k, 8, dtype=torch.float64).tanh()
    recent = [past_speech(BATCH, order).repeat_interleave(k, dim=0)] if order else []
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return model, draw(FRAMES, BATCH, X), (h, c, *recent), draw(FRAMES, BATCH * k, z_dim), k


def test_rollout_and_gradients_equal_the_plain_ones(case):
    model, x_TBX, state, noise, k = case
    rollouts = model(x_TBX, state, noise, k), plain_rollout(model, x_TBX, state, noise, k)
    for field in (*FIELDS, "phi_x"):
        torch.testing.assert_close(getattr(rollouts[0], field), getattr(rollouts[1], field))
    torch.testing.assert_close(rollouts[0].state, rollouts[1].state)
    losses = [vrnn_gauss_iwae.objective(rollout) + rollout.kl_TBK.mean() for rollout in rollouts]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for fast, plain in zip(*gradients):
        assert fast.any()
        torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("frames_at_once", (1, 2))
def test_windows_in_sequence_equal_one_long_one(case, frames_at_once):
    model, x_TBX, state, noise, k = case
    whole, parts = model(x_TBX, state, noise, k), []
    for x, eps in zip(x_TBX.split(frames_at_once), noise.split(frames_at_once)):
        parts.append(model(x, state, eps, k))
        state = parts[-1].state
    for field in FIELDS:
        torch.testing.assert_close(
            torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)
        )
    torch.testing.assert_close(state, whole.state)


def test_densities_at_fixed_z_are_those_of_the_rollout(case):
    model, x_TBX, state, noise, k = case
    assert_same_at_fixed_z(model, x_TBX, state, noise, k)


def assert_same_at_fixed_z(model, x_TBX, state, noise, k):
    rollout = model(x_TBX, state, noise, k)
    z = rollout.q_mean + rollout.q_sigma * noise
    log_p_TBK, log_q_TBK = vrnn_gauss_iwae.at_fixed_z(model, x_TBX, rollout.phi_x, z, state, k)
    torch.testing.assert_close(log_p_TBK - log_q_TBK, rollout.log_w_TBK)


def test_particles_that_are_resampled_still_remember_the_samples_of_their_sequence(case):
    model, x_TBX, state, noise, k = case
    uniform_TB = torch.rand(
        FRAMES, BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    filtering = common.particle_filter(
        model, x_TBX, state, noise, uniform_TB, k, resample_last=True
    )
    assert k == 1 or (filtering.ess_TB < k / 2).any()
    torch.testing.assert_close(filtering.state[2:], model(x_TBX, state, noise, k).state[2:])


def test_generation_is_the_prior_and_decoder_that_training_scores(case):
    model, *_ = case
    x_TBX = model.generate(7, 4, torch.Generator().manual_seed(2))
    draws, state = torch.Generator().manual_seed(2), model.zero_state(4)
    draw = lambda width: torch.randn(4, width, generator=draws, dtype=torch.float64)  # noqa: E731
    for x in x_TBX:
        prior_noise = draw(model.z_dim)
        seen = model(x[None], state, torch.zeros(1, 4, model.z_dim, dtype=torch.float64))
        z = seen.prior_mean + seen.prior_sigma * prior_noise
        scored = model(x[None], state, (z - seen.q_mean) / seen.q_sigma)
        p_x = model.p_x(model.phi_z(z[0]) if model.z_dim else None, state[0])
        for ours, its in zip(p_x, (scored.x_mean, scored.x_sigma)):
            torch.testing.assert_close(ours, its[0])
        expected, _ = model.likelihood.sample(p_x, state[2:], draws)
        torch.testing.assert_close(x, expected)
        state = scored.state


def adaptive(x_dim, order, components=3):
    """A likelihood, and its parameters for one particle, (1, .) each: components that differ, levels that count."""
    likelihood = common.AdaptiveLikelihood(x_dim, order, components)
    return likelihood, likelihood.parameters(0.4 * torch.randn(1, likelihood.units).double())


def past_speech(batch, order):
    """Memories (batch, .): noise through a resonance, as loud as speech may be."""
    noise = 0.3 * torch.randn(batch, HEARD + order).double()
    samples = [noise[:, 0], noise[:, 1]]
    for n in range(2, noise.shape[1]):
        samples.append(1.6 * samples[-1] - 0.8 * samples[-2] + noise[:, n])
    return torch.stack(samples, dim=1) / 2


def density_of(likelihood, parameters, x, memory):
    """p(x | .), (rows,), of frames x (rows, X) after the same memory (1, .)."""
    parameters = [part.expand(1, len(x), *part.shape[1:]) for part in parameters]
    log_px, _ = likelihood.log_density(x[None], parameters, (memory.expand(len(x), -1),), 1)
    return log_px[0, :, 0].exp()


def grid(count, finest):
    """Points from -1e4 to 1e4, densest at 0, and what each stands for in an integral."""
    t = torch.linspace(-1, 1, count, dtype=torch.float64) * math.asinh(1e4 / finest)
    return finest * t.sinh(), finest * t.cosh() * (t[1] - t[0])


@pytest.mark.parametrize("order", (1, 2, 12))
@pytest.mark.parametrize("memory", ("zeros", "speech"))
def test_the_density_of_a_sample_integrates_to_one(order, memory):
    torch.manual_seed(order)
    likelihood, parameters = adaptive(1, order)
    recent = past_speech(1, order) if memory == "speech" else torch.zeros(1, HEARD + order).double()
    x, weight = grid(4000, 1e-4)
    density = density_of(likelihood, parameters, x[:, None], recent)
    assert (density * weight).sum() == pytest.approx(1, abs=1e-8)


@pytest.fixture(scope="module")
def plane():
    """(likelihood, parameters, memory) of frames of two samples, points of a grid and the probability of each."""
    torch.manual_seed(1)
    likelihood, parameters = adaptive(2, 3)
    memory = past_speech(1, 3)
    x, weight = grid(240, 0.2)
    points = torch.cartesian_prod(x, x)
    mass = torch.cartesian_prod(weight, weight).prod(1)
    mass *= density_of(likelihood, parameters, points, memory)
    return (likelihood, parameters, memory), points, mass


def test_the_density_of_two_samples_integrates_to_one_though_the_first_scales_the_second(plane):
    (likelihood, parameters, _), _, mass = plane
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    *_, exponents, _ = likelihood.corrected(parameters[2], torch.zeros(1), 0)
    assert exponents.min() > 0.01


def test_samples_fall_where_the_density_says(plane):
    (likelihood, parameters, memory), points, mass = plane
    draws = 20_000
    x, _ = likelihood.sample(
        [part.expand(draws, *part.shape[1:]) for part in parameters],
        (memory.expand(draws, -1),),
        torch.Generator().manual_seed(0),
    )
    # Cells of a turned grid as well, which a density with its axes apart would not fill alike.
    for turn in (torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]])):
        ours, theirs = x @ turn.double(), points @ turn.double()
        for q_0, q_1 in itertools.product((0.1, 0.3, 0.5, 0.7, 0.9), repeat=2):
            edge = torch.stack((ours[:, 0].quantile(q_0), ours[:, 1].quantile(q_1)))
            expected = mass[(theirs <= edge).all(1)].sum().item()
            found = (ours <= edge).all(1).double().mean().item()
            # The edge of a cell of the grid lies within 0.02 in probability.
            assert abs(found - expected) < 5 * (0.25 / draws) ** 0.5 + 0.02


@pytest.mark.parametrize("x_dim", (4, 100))
def test_a_frame_is_drawn_sample_by_sample_from_the_density_that_scores_it(x_dim):
    """What is left of the samples, by the plain loop, is the noise that they were made of."""
    torch.manual_seed(0)
    rows, order, components = 6, 4, 3
    likelihood = common.AdaptiveLikelihood(x_dim, order, components)
    units = torch.cat([0.3 * torch.randn(1, likelihood.units) for _ in range(rows)]).double()
    parameters = likelihood.parameters(units)
    recent = past_speech(rows, order)
    x, (after,) = likelihood.sample(parameters, (recent,), torch.Generator().manual_seed(1))
    assert after.equal(torch.cat((recent, x), dim=1)[:, x_dim:])

    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(2, rows, x_dim, generator=generator, dtype=torch.float64)
    probabilities = parameters[2][..., 0].softmax(1)
    blocks = range(0, x_dim, likelihood.block)
    chosen = [probabilities.multinomial(1, generator=generator) for _ in blocks]
    assert len(torch.cat(chosen).unique()) > 1
    for row in range(rows):
        z, _ = innovations(x[row], recent[row], *(part[row] for part in parameters))
        for first, j in zip(blocks, chosen):
            part = slice(first, first + likelihood.block)
            nu = 2 + F.softplus(parameters[2][row, j[row, 0], 3])
            noise = common.student(*uniform[:, row, part], nu)
            torch.testing.assert_close(z[part, j[row, 0]], noise)


@pytest.mark.parametrize("nu", (2.5, 4.0, 30.0))
def test_innovations_are_distributed_as_students(nu):
    """Mean modulus and mean log density of what is drawn, against integrals of the density."""
    torch.manual_seed(0)
    drawn = common.student(*torch.rand(2, 400_000, dtype=torch.float64), torch.tensor(nu))
    density = StudentT(torch.tensor(nu, dtype=torch.float64))
    t, weight = grid(4000, 1e-3)
    probability = weight * density.log_prob(t).exp()
    assert drawn.abs().mean() == pytest.approx((probability * t.abs()).sum().item(), rel=0.01)
    entropy = (probability * density.log_prob(t)).sum().item()
    assert density.log_prob(drawn).mean() == pytest.approx(entropy, abs=0.01)
    assert (drawn > 0).double().mean() == pytest.approx(0.5, abs=0.005)


def test_levels_weigh_less_than_one_together_whatever_the_decoder_says():
    """Else what is drawn would grow louder and louder: a level would feed itself."""
    torch.manual_seed(0)
    likelihood = common.AdaptiveLikelihood(10, 4, 3)
    of_components = 20 * torch.randn(100, 3, 8 + 4)
    _, without, e, _ = likelihood.corrected(of_components, torch.zeros(4), 0)
    _, gain, _, _ = likelihood.corrected(of_components, torch.zeros(4), 1)
    torch.testing.assert_close((gain - without).squeeze(-1) + e.sum(-1), torch.full((100, 3), 0.9))
    assert (gain >= without).all() and (e >= 0).all()


@pytest.mark.parametrize("n", (0, 1, 40, 49, 50, 77))
def test_no_scale_and_no_filter_hears_its_own_sample_or_a_later_one(n):
    torch.manual_seed(0)
    order, count = 4, 100
    samples = torch.cat((past_speech(1, order), torch.randn(1, count).double()), dim=1)
    changed = samples.clone()
    changed[:, HEARD + order + n] += 3
    likelihood = common.AdaptiveLikelihood(50, order, 1)
    before, after = (
        likelihood.base_filter(part[:, : HEARD + order + n]) for part in (samples, changed)
    )
    assert all(one.equal(other) for one, other in zip(before, after))
    likelihood.block = count
    base = common.step_up(before[0])
    levels = [likelihood.log_levels(part[:, :-1], base) for part in (samples, changed)]
    moved = (levels[0] != levels[1]).squeeze(0)
    assert not moved[: n + 1].any()
    for w, its in zip((4, 16, 64), moved.unbind(1)):
        assert its[n + 1 : n + 1 + w].all()
        assert not its[n + 1 + w + order :].any()


@pytest.mark.parametrize("frame", (1, 3))
def test_a_sample_changes_no_density_of_an_earlier_frame_and_all_of_later_ones(case, frame):
    model, x_TBX, state, noise, k = case
    before = model(x_TBX, state, noise, k).nll_TBK
    x_TBX[frame, :, -1] += 1
    after = model(x_TBX, state, noise, k).nll_TBK
    assert torch.equal(before[:frame], after[:frame])
    assert not torch.isclose(before[frame:], after[frame:]).any()


def test_a_frame_of_two_blocks_is_two_frames_of_one_with_the_same_components():
    """Each block has a base filter and a choice of component of its own."""
    torch.manual_seed(0)
    likelihood, parameters = adaptive(100, 3)
    memory = past_speech(1, 3)
    x = torch.randn(1, 100).double()
    one_frame = density_of(likelihood, parameters, x, memory).log()
    m, s, of_components = parameters
    likelihood = common.AdaptiveLikelihood(50, 3, 3)
    assert likelihood.block == 50
    halves = [(m[:, part], s[:, part], of_components) for part in (slice(0, 50), slice(50, 100))]
    first = density_of(likelihood, halves[0], x[:, :50], memory).log()
    memory = torch.cat((memory, x), dim=1)[:, 50:-50]
    second = density_of(likelihood, halves[1], x[:, 50:], memory).log()
    torch.testing.assert_close(first + second, one_frame)


@pytest.mark.parametrize("x_dim, block", ((200, 50), (50, 50), (20, 20), (320, 320), (1, 1)))
def test_blocks_have_50_samples_where_a_frame_is_made_of_such(x_dim, block):
    assert common.AdaptiveLikelihood(x_dim, 4, 2).block == block


@pytest.mark.parametrize("order", (1, 2, 16))
def test_a_base_filter_predicts_what_a_stable_filter_made(order):
    """Poles inside the unit circle; on a resonance the error is the noise that drove it."""
    torch.manual_seed(0)
    samples = past_speech(20, order)
    k0, log_v0 = common.AdaptiveLikelihood(50, order, 1).base_filter(samples)
    a = common.step_up(k0)
    companion = torch.diag(torch.ones(order - 1).double(), -1).repeat(len(a), 1, 1)
    companion[:, 0] = -a.flip(1)
    assert torch.linalg.eigvals(companion).abs().max() < 1
    if order > 1:
        assert log_v0.exp().mean() == pytest.approx(0.15, rel=0.15)
        torch.testing.assert_close(
            a[:, -2:].mean(0), torch.tensor([0.8, -1.6]).double(), atol=0.15, rtol=0
        )


@pytest.mark.parametrize("order", (1, 2, 7))
def test_the_gradient_of_a_filter_is_that_of_levinsons_recursion(order):
    torch.manual_seed(0)
    reflections = torch.randn(2, 3, order).double().tanh().requires_grad_()
    assert torch.autograd.gradcheck(common.step_up, reflections)
    assert common.step_up(reflections)[..., 0].equal(reflections[..., -1])


def test_silence_and_the_loudest_signal_have_finite_densities_and_gradients():
    torch.manual_seed(0)
    model = common.VRNN(X, 0, 8, 8, 8, 8, 8, 8, ar_order=12)
    model.mirror()
    tone = torch.sin(torch.arange(60 * X) / 3)
    for loudness, x in itertools.product(
        (0, 1e-4, 1, 30), (tone, tone.sign(), torch.randn(60 * X))
    ):
        rollout = model(loudness * x.view(60, 1, X))
        gradients = torch.autograd.grad(rollout.nll_TBK.mean(), list(model.parameters()))
        assert rollout.nll_TBK.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_particles_of_a_sequence_share_one_base_filter(monkeypatch):
    """It is found once for a sequence, in float64, and never with a gradient."""
    rows = []

    def counted(likelihood, samples, found=common.AdaptiveLikelihood.base_filter):
        rows.append(samples[..., 0].numel())
        parts = found(likelihood, samples)
        assert not any(part.requires_grad for part in parts)
        return parts

    monkeypatch.setattr(common.AdaptiveLikelihood, "base_filter", counted)
    model = common.VRNN(X, 3, 8, 8, 8, 8, 8, 8, ar_order=2)
    model(torch.randn(FRAMES, BATCH, X), k=7)
    assert rows == [FRAMES * BATCH]


def test_products_of_a_prediction_are_not_rounded_to_tf32_though_the_update_allows_it(monkeypatch):
    seen = []

    def einsum(*operands, found=torch.einsum):
        seen.append(torch.get_float32_matmul_precision())
        return found(*operands)

    monkeypatch.setattr(torch, "einsum", einsum)
    torch.set_float32_matmul_precision("high")
    try:
        common.VRNN(X, 0, 8, 8, 8, 8, 8, 8, ar_order=2)(torch.randn(2, 1, X))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen and set(seen) == {"highest"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_in_bfloat16_densities_are_still_float32(dtype):
    torch.manual_seed(0)
    model = common.VRNN(X, 3, 8, 8, 8, 8, 8, 8, ar_order=4)
    model.bf16 = dtype == torch.bfloat16
    rollout = model(torch.randn(FRAMES, BATCH, X))
    assert {getattr(rollout, field).dtype for field in FIELDS} == {torch.float32}
    assert {part.dtype for part in rollout.state[2:]} == {torch.float32}


def test_it_starts_at_the_base_filter_and_learns_every_part():
    torch.manual_seed(0)
    model = common.VRNN(X, 3, 8, 8, 8, 8, 8, 8, ar_order=4, components=3).double()
    for start in (model.initialise, model.mirror):
        start()
        head = model.decoder[-1]
        of_components = head.bias[2 * X :].view(3, 12)
        assert not of_components[:, [0, *range(4, 12)]].any()
        assert (of_components[:, 1] > 0.5).all()
        assert of_components[:, 2].diff().min() > 0.5
        x_TBX = torch.randn(FRAMES, 2, X).double().cumsum(2)
        vrnn_gauss.objective(model(x_TBX)).backward()
        assert head.weight.grad.any(dim=1).all()


def test_without_latent_variables_every_bound_is_the_likelihood():
    torch.manual_seed(0)
    model = common.VRNN(X, 0, 8, 8, 8, 8, 8, 8, ar_order=3).double()
    model.mirror()
    torch.nn.init.normal_(model.decoder[-1].weight)
    assert not [
        name
        for name, _ in model.named_parameters()
        if "z" in name or name.startswith(("posterior", "prior"))
    ]
    x_TBX = torch.randn(FRAMES, BATCH, X, dtype=torch.float64)
    rollout = model(x_TBX)
    exact = -rollout.nll_TBK.sum((0, 2))
    generator = torch.Generator().manual_seed(0)
    bounds = common.estimate_bounds(model, x_TBX, (2, 7), generator)
    smc, ess = common.estimate_smc(model, x_TBX, 7, generator)
    for bound in (*(bounds[name] for name in ("elbo", "elbo_7", "iwae_2", "iwae_7")), smc[-1]):
        torch.testing.assert_close(bound, exact)
    assert (
        not bounds["kl"].any()
        and (bounds["ess_iwae_7"] - 7).abs().max() < 1e-9
        and (ess == 7).all()
    )
    for script in (vrnn_gauss, vrnn_gauss_alt_nll, vrnn_gauss_iwae):
        torch.testing.assert_close(script.objective(rollout), -exact.mean() / FRAMES)
    torch.testing.assert_close(model(x_TBX, k=2).log_w_TBK, rollout.log_w_TBK.expand(-1, -1, 2))


def test_another_distribution_replaces_two_functions_where_there_is_no_filter():
    class Laplace(common.FrameLikelihood):
        def density(self, x, mean, scale):
            return torch.distributions.Laplace(mean, scale).log_prob(x).sum(-1)

        def draw(self, mean, scale, generator):
            return mean + scale * (
                torch.rand((2, *mean.shape), generator=generator).log()
                * torch.tensor([[[1.0]], [[-1.0]]])
            ).sum(0)

    class LaplaceVRNN(common.VRNN):
        Likelihood = Laplace

    torch.manual_seed(0)
    model = LaplaceVRNN(X, 3, 8, 8, 8, 8, 8, 8).double()
    x_TBX, noise = (
        torch.randn(FRAMES, BATCH, X).double(),
        torch.randn(FRAMES, 2 * BATCH, 3).double(),
    )
    assert_same_at_fixed_z(model, x_TBX, model.zero_state(2 * BATCH), noise, 2)
    x_TBX = model.generate(100, 100, torch.Generator().manual_seed(0))
    assert (
        5.5 < (x_TBX - x_TBX.mean()).pow(4).mean() / x_TBX.var() ** 2 < 6.5
    )  # 3 of a Gaussian, 6 of this one
    with pytest.raises(common.UserError, match="--ar_order=0"):
        LaplaceVRNN(X, 3, 8, 8, 8, 8, 8, 8, ar_order=2)


def test_what_is_generated_goes_on_from_a_state(case):
    model, x_TBX, state, _, k = case
    whole, start, goes_on = (
        model.generate(4, BATCH * k, torch.Generator().manual_seed(0), before)
        for before in (None, model.zero_state(BATCH * k), state)
    )
    assert torch.equal(whole, start) and (whole[0] - goes_on[0]).abs().max() > 1e-3


def test_resynthesis_follows_x_in_h_and_z_and_what_was_drawn_in_the_filter(case):
    model, x_TBX, *_ = case
    found = model.generate(FRAMES, BATCH, torch.Generator().manual_seed(0), resynthesised=x_TBX)
    generator, state, memory, x = torch.Generator().manual_seed(0), model.zero_state(BATCH), (), []
    if model.likelihood.ar_order:
        memory = (state[2],)
    for x_t in x_TBX:
        e = torch.randn(BATCH, model.z_dim, generator=generator, dtype=torch.float64)
        rollout, h = plain_rollout(model, x_t[None], state, e[None], 1), state[0]
        phi_z = model.phi_z(rollout.q_mean[0] + rollout.q_sigma[0] * e) if model.z_dim else None
        drawn, memory = model.likelihood.sample(model.p_x(phi_z, h), memory, generator)
        x.append(drawn)
        state = rollout.state
    torch.testing.assert_close(found, torch.stack(x))


pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each script at ar_order 3, that of vrnn_gauss.py without latent variables."""
    folder = tmp_path_factory.mktemp("likelihood")
    write_tiny_data(folder / "tiny.h5")
    for script, *flags in (
        ("vrnn_gauss", "--z_dim=0"),
        ("vrnn_gauss_alt_nll",),
        ("vrnn_gauss_iwae", "--dreg"),
    ):
        main_of(
            script,
            *SIZES,
            f"--data={folder / 'tiny.h5'}",
            f"--out_dir={folder / 'runs' / script}",
            "--max_updates=40",
            "--monitor_every=20",
            "--eval_recordings=2",
            "--ar_order=3",
            "--lr=0.01",
            *flags,
        )
    return folder / "runs"


def test_scripts_learn_a_filter_evaluate_and_generate_with_it(runs):
    for run in runs.iterdir():
        bounds = [
            json.loads(line)["valid"]["iwae_2"]
            for line in (run / "log.jsonl").read_text().splitlines()[1:]
        ]
        assert bounds[0]["nats_per_frame"] < bounds[1]["nats_per_frame"]
        model = torch.load(run / "best.pt", weights_only=True)["model"]
        assert (
            model["decoder.7.weight"].shape == (2 * 20 + 8 * (8 + 3), 8)
            and model["decoder.7.bias"][40:].all()
        )
        assert (run / "samples/resynthesised_1.wav").exists()


def test_a_run_without_latent_variables_reports_every_bound_and_all_are_equal(runs):
    bounds, others = (
        json.loads((runs / run / "eval.json").read_text())["bounds"]
        for run in ("vrnn_gauss", "vrnn_gauss_iwae")
    )
    assert list(bounds) == list(others)
    for name in ("elbo_6", "iwae_2", "iwae_6", "smc_6"):
        assert bounds[name]["nats_per_frame"] == pytest.approx(
            bounds["elbo"]["nats_per_frame"], rel=1e-6
        )
    assert bounds["kl"]["nats_per_frame"] == 0 and bounds["ess_smc_6"]["mean"] == 6


def test_a_run_with_a_filter_is_evaluated_again_and_drawn(runs, tmp_path, monkeypatch, capsys):
    for script in ("vrnn_gauss", "vrnn_gauss_iwae"):
        best = runs / script / "best.pt"
        main_of(
            "vrnn_gauss_alt_nll",
            f"--evaluate={best}",
            f"--out_dir={tmp_path / script}",
            "--device=cpu",
        )
        evaluations = [
            json.loads((out / "eval.json").read_text()) for out in (best.parent, tmp_path / script)
        ]
        assert evaluations[1] == evaluations[0] | dict(checkpoint=str(best))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main_of("plot_recon", str(runs))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4  # its frames are not those of the yardsticks in the data file
    assert (tmp_path / "recon.png").exists()


def test_a_checkpoint_from_before_there_was_a_filter_is_evaluated_whatever_the_script_says(
    runs, tmp_path
):
    out, h = tmp_path / "old", ["--max_updates=2", "--monitor_every=2", "--eval_recordings=0"]
    main_of("vrnn_gauss", *SIZES, f"--data={runs.parent / 'tiny.h5'}", f"--out_dir={out}", *h)
    best = torch.load(out / "best.pt", weights_only=True)
    del best["config"]["ar_order"]
    torch.save(best, tmp_path / "old.pt")

    @dataclasses.dataclass
    class Edited(vrnn_gauss.Hyperparameters):
        ar_order: int = 16

    assert common.parse(Edited, [f"--evaluate={tmp_path / 'old.pt'}"]).ar_order == 0
