"""The frame likelihood with a filter in it, and the LSTM without latent variables. All but the runs in float64."""

import dataclasses
import json
import math

import pytest
import torch
from plain import plain_rollout
from tiny import SIZES, main_of, write_tiny_data
from torch.distributions import MultivariateNormal

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


@pytest.fixture(
    params=[(3, 1, 1), (3, 3, 1), (3, 3, 4), (3, 12, 1), (3, 12, 4), (0, 0, 1), (0, 12, 1)],
    ids=lambda sizes: "z_dim={}, P={}, K={}".format(*sizes),
)
def case(request):
    """(model, x_TBX, state of particles that have seen the same x, noise, k)"""
    z_dim, order, k = request.param
    torch.manual_seed(0)
    model = common.VRNN(X, z_dim, 8, 7, 6, 9, 10, 4, order).double()
    torch.nn.init.normal_(
        model.decoder[-1].weight
    )  # as training leaves it: no filter is there at the start
    h, c = torch.randn(2, BATCH * k, 8, dtype=torch.float64).tanh()
    recent = (
        [torch.randn(BATCH, order, dtype=torch.float64).repeat_interleave(k, dim=0)]
        if order
        else []
    )
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
        expected = 0.5 * draw(X) ** 2 + scored.x_sigma[0].log() + 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(scored.nll_TBK[0, :, 0], expected.sum(1))
        state = scored.state


def joint(parameters, recent):
    """MultivariateNormal of the T*X samples of one particle, from m, s (T, X) and a (T, P) and the P samples before.

    With the filter of its frame in each row, A x = m + C recent + s * noise.
    """
    mean, sigma, a = parameters
    frames, order = a.shape
    filters = torch.zeros(frames * X, order + frames * X, dtype=torch.float64)
    for n in range(frames * X):
        for i in range(1, order + 1):
            filters[n, order + n - i] = a[n // X, i - 1]
    eye = torch.eye(frames * X, dtype=torch.float64)
    solve = torch.linalg.solve_triangular(eye - filters[:, order:], eye, upper=False)
    scale = solve @ sigma.flatten().diag()
    return MultivariateNormal(
        solve @ (mean.flatten() + filters[:, :order] @ recent), scale_tril=scale
    )


def of_frames(order, rows, frames=2):
    """A likelihood, and parameters of (frames, rows, .) with strong filters."""
    torch.manual_seed(0)
    likelihood = common.FrameLikelihood(X, order)
    return likelihood, likelihood.parameters(
        torch.randn(frames, rows, likelihood.units, dtype=torch.float64)
    )


@pytest.mark.parametrize("order", (1, 3, 12))
def test_the_density_of_frames_is_the_gaussian_that_the_filters_imply(order):
    k, batch = 2, 3
    likelihood, parameters = of_frames(order, batch * k)
    x_TBX, recent = torch.randn(2, batch, X).double(), torch.randn(batch, order).double()
    log_px, (after,) = likelihood.log_density(
        x_TBX, parameters, (recent.repeat_interleave(k, dim=0),), k
    )
    for row in range(batch * k):
        b, j = divmod(row, k)
        expected = joint([part[:, row] for part in parameters], recent[b])
        frame_1 = MultivariateNormal(expected.mean[:X], expected.covariance_matrix[:X, :X])
        torch.testing.assert_close(log_px[0, b, j], frame_1.log_prob(x_TBX[0, b]))
        torch.testing.assert_close(log_px[:, b, j].sum(), expected.log_prob(x_TBX[:, b].flatten()))
        assert after[row].equal(torch.cat((recent[b], x_TBX[:, b].flatten()))[-order:])


@pytest.mark.parametrize("order", (1, 3, 12))
def test_samples_have_the_mean_and_covariance_that_the_filters_imply(order):
    draws = 100_000
    likelihood, parameters = of_frames(order, 1)
    recent = torch.randn(order, dtype=torch.float64)
    memory, x = (recent.expand(draws, -1),), []
    for frame in range(2):
        x_frame, memory = likelihood.sample(
            [part[frame].expand(draws, -1) for part in parameters], memory
        )
        x.append(x_frame)
    x = torch.cat(x, dim=1)
    expected = joint([part[:, 0] for part in parameters], recent)
    whitened = torch.linalg.solve(expected.scale_tril, (x - expected.mean).T)
    assert whitened.mean(1).abs().max() < 5 / draws**0.5
    assert (whitened.cov() - torch.eye(2 * X)).abs().max() < 5 * (2 / draws) ** 0.5


@pytest.mark.parametrize("order", (0, 1, 3, 12))
def test_a_frame_is_drawn_as_if_sample_by_sample(order):
    likelihood, parameters = of_frames(order, 4)
    parameters = [part if part is None else part[0] for part in parameters]
    recent = torch.randn(4, order, dtype=torch.float64)
    x, after = likelihood.sample(
        parameters, (recent,) if order else (), torch.Generator().manual_seed(0)
    )
    drawn = common.sample_gaussian(*parameters[:2], torch.Generator().manual_seed(0))
    samples = list(recent.T)
    for n in range(X):
        samples.append(
            drawn[:, n] + sum(a_i * samples[-i] for i, a_i in enumerate(parameters[2].T, start=1))
            if order
            else drawn[:, n]
        )
    torch.testing.assert_close(x, torch.stack(samples[order:], dim=1))
    if order:
        torch.testing.assert_close(after, (torch.stack(samples[-order:], dim=1),))


@pytest.mark.parametrize("order", (1, 2, 16))
def test_reflection_coefficients_stay_below_one_and_poles_inside_the_unit_circle(order):
    likelihood = common.FrameLikelihood(X, order)
    torch.manual_seed(0)

    def largest_pole_and_filter(heads):
        units = torch.cat((torch.zeros(len(heads), 2 * X, dtype=torch.float64), heads), dim=1)
        _, _, a = likelihood.parameters(units)
        companion = torch.diag(torch.ones(order - 1, dtype=torch.float64), -1).repeat(len(a), 1, 1)
        companion[:, 0] = a
        return torch.linalg.eigvals(companion).abs().max(), a

    signs = torch.randn(500, order, dtype=torch.float64).sign()
    for heads in (0.5 * signs, 0.5 * signs * torch.rand(500, order)):
        assert 0.1 < largest_pole_and_filter(heads)[0] < 1
    _, a = largest_pole_and_filter(1e3 * signs)
    assert a.isfinite().all()
    assert (
        a[:, -1].abs() < 1
    ).all()  # it is the last reflection coefficient, of as many as there are
    torch.testing.assert_close(a[:, -1], 0.9999 * signs[:, -1])


def test_it_starts_without_a_filter_and_learns_one():
    torch.manual_seed(0)
    model = common.VRNN(X, 3, 8, 8, 8, 8, 8, 8, ar_order=4).double()
    for start in (model.initialise, model.mirror):
        start()
        x_TBX = torch.randn(1, 2, X).double().cumsum(2)
        rollout = model(x_TBX)
        expected = common.gaussian_log_density(x_TBX, rollout.x_mean, rollout.x_sigma)
        torch.testing.assert_close(-rollout.nll_TBK.squeeze(2), expected)
        vrnn_gauss.objective(rollout).backward()
        assert model.decoder[-1].weight.grad[2 * X :].any(dim=1).all()


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


def test_another_distribution_about_the_prediction_replaces_two_functions():
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
    model = LaplaceVRNN(X, 3, 8, 8, 8, 8, 8, 8, ar_order=2).double()
    x_TBX, noise = (
        torch.randn(FRAMES, BATCH, X).double(),
        torch.randn(FRAMES, 2 * BATCH, 3).double(),
    )
    assert_same_at_fixed_z(model, x_TBX, model.zero_state(2 * BATCH), noise, 2)
    x_TBX = model.generate(100, 100, torch.Generator().manual_seed(0))
    assert (
        5.5 < (x_TBX - x_TBX.mean()).pow(4).mean() / x_TBX.var() ** 2 < 6.5
    )  # 3 of a Gaussian, 6 of this one


def test_what_is_generated_goes_on_from_a_state(case):
    model, x_TBX, state, _, k = case
    whole, start, goes_on = (
        model.generate(4, BATCH * k, torch.Generator().manual_seed(0), before)
        for before in (None, model.zero_state(BATCH * k), state)
    )
    assert torch.equal(whole, start) and (whole[0] - goes_on[0]).abs().max() > 1e-3


def test_resynthesis_follows_x_in_h_and_z_and_what_was_drawn_in_the_filter(case):
    model, x_TBX, *_ = case
    found = model.generate(FRAMES, BATCH, torch.Generator().manual_seed(0), heard=x_TBX)
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
            model["decoder.7.weight"].shape == (2 * 20 + 3, 8)
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
