"""What is evaluated, on what, with whose weights, and the summaries, computed by hand."""

import copy
import json
import math
import sys

import h5py
import numpy as np
import pytest
import torch
from tiny import SIZES, make_updates, tiny_training, update_with, write_quiet_data
from torch import nn

import common
import vrnn_gauss

LENGTHS = dict(train=(530, 310, 870, 90, 450), valid=(350, 280), test=(310, 470, 1250, 130, 690))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("quiet") / "quiet.h5"
    write_quiet_data(path, **LENGTHS)
    return path


@pytest.fixture(scope="module")
def corpus(data):
    return common.open_corpus(data)


# ---- bounds and their summaries ----


class GivenWeights:
    """Whose particles have these nll, kl and log w, (T, B, K), whatever x and z are."""

    z_dim = 1

    def __init__(self, nll_TBK, kl_TBK, log_w_TBK):
        self.given = nll_TBK, kl_TBK, log_w_TBK

    def __call__(self, x_TBX, state, noise, k):
        return common.Rollout(
            *(part[:, :, :k] for part in self.given), *[None] * 6, state=(), phi_x=None
        )


def test_bounds_and_spread_of_five_particles_equal_those_computed_by_hand():
    w_BK = torch.tensor([[1, 2, 3, 4, 5], [8, 1, 1, 1, 1]], dtype=torch.float64)
    log_w_TBK = torch.stack((w_BK.log() / 4 + 7, w_BK.log() * 3 / 4 - 7))  # over two frames
    nll_TBK = torch.arange(20, dtype=torch.float64).view(2, 2, 5)
    model = GivenWeights(nll_TBK, 10 * nll_TBK, log_w_TBK)
    bounds = common.estimate_bounds(model, torch.zeros(2, 2, 1), (2, 5), torch.Generator())
    log = math.log
    expected = dict(
        elbo=[-11 * (2 + 12), -11 * (7 + 17)],
        kl=[10 * (2 + 12), 10 * (7 + 17)],
        elbo_5=[log(120) / 5, log(8) / 5],
        log_w_std=[np.std(np.log([1, 2, 3, 4, 5])), log(8) * math.sqrt(1 / 5 - 1 / 25)],
        iwae_2=[
            (log(3 / 2) + log(7 / 2)) / 2,
            (log(9 / 2) + log(2 / 2)) / 2,
        ],  # the fifth is left out
        ess_iwae_2=[(9 / 5 + 49 / 25) / 2, (81 / 65 + 4 / 2) / 2],
        iwae_5=[log(15 / 5), log(12 / 5)],
        ess_iwae_5=[225 / 55, 144 / 68],
    )
    assert list(bounds) == list(expected)
    for name, values in expected.items():
        assert bounds[name].tolist() == pytest.approx(values, rel=1e-12), name


def test_summaries_of_three_windows_equal_those_computed_by_hand(corpus):
    values = torch.tensor([10.0, 20.0, 60.0], dtype=torch.float64)  # deviations -20, -10, 30
    found = common.summarise(
        dict.fromkeys(("elbo", "kl", "log_w_std", "iwae_2", "ess_iwae_2"), values), 5, 20, corpus
    )
    stderr = math.sqrt((400 + 100 + 900) / 2) / math.sqrt(3)
    bound = pytest.approx(dict(nats_per_frame=6, nats_per_sequence=30, stderr=stderr / 5))
    assert found["kl"] == found["log_w_std"] == bound
    bits = (math.log(corpus.std) - 6 / 20) / math.log(2)
    for name in ("elbo", "iwae_2"):
        assert found[name].pop("bits_per_sample") == pytest.approx(bits)
        assert found[name] == bound
    assert found["ess_iwae_2"] == pytest.approx(dict(mean=30, stderr=stderr))
    assert common.summarise(dict(elbo=values[:1]), 5, 20, corpus)["elbo"]["stderr"] is None


def test_the_table_of_windows_holds_bounds_alone_in_nats_per_frame():
    by_window = {
        name: torch.tensor([first, -2.5])
        for name, first in dict(
            elbo=10.0,
            kl=1.0,
            log_w_std=9.0,
            iwae_2=11.0,
            ess_iwae_2=9.0,
            smc_6=12.3456,
            ess_smc_6=9.0,
        ).items()
    }
    assert common.windows_table(by_window, 5) == (
        "elbo,kl,iwae_2,smc_6\n2.000,0.200,2.200,2.469\n-0.500,-0.500,-0.500,-0.500\n"
    )


# ---- what the model is given ----


class Listener(nn.Module):
    """Keeps x and noise. Its log w is minus the sum over the samples of a frame of their 16-bit values."""

    x_dim, z_dim = 20, 4

    def __init__(self, corpus):
        super().__init__()
        self.anything, self.corpus, self.heard = nn.Parameter(torch.zeros(1)), corpus, []

    def forward(self, x_TBX, state=None, noise=None, k=1):
        self.heard.append((x_TBX, noise))
        pcm_TBX = (x_TBX.double() * self.corpus.std + self.corpus.mean).round()
        nll_TBK = pcm_TBX.sum(2, keepdim=True).expand(-1, -1, k)
        return common.Rollout(
            nll_TBK, 0 * nll_TBK, -nll_TBK, *[None] * 6, state=(noise[0],), phi_x=None
        )


def audio_of(path, split):
    """The recordings of a split."""
    with h5py.File(path) as file:
        return np.split(file[f"{split}/audio"][:].astype(float), file[f"{split}/offsets"][1:-1])


def test_every_batch_of_windows_is_dequantised_with_noise_of_its_own(data, corpus, monkeypatch):
    monkeypatch.setattr(common, "EVAL_BATCH", 3)
    model = Listener(corpus)
    bounds = common.window_bounds(model, corpus, corpus.valid, (2, 6), seq_frames=5)
    windows = [
        audio[start : start + 100].reshape(5, 20)
        for audio in audio_of(data, "valid")
        for start in range(0, len(audio) - 99, 100)
    ]
    assert len(windows) == 5 and len(model.heard) == 2
    for batch, (x_TBX, noise) in enumerate(model.heard):
        generator = torch.Generator().manual_seed(2015 + batch)
        pcm_TBX = torch.from_numpy(np.stack(windows[3 * batch : 3 * batch + 3], axis=1))
        uniform = torch.rand(pcm_TBX.shape, generator=generator)
        expected = (pcm_TBX + uniform - 0.5 - corpus.mean) / corpus.std
        torch.testing.assert_close(x_TBX.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(noise, torch.randn(5, 6 * pcm_TBX.shape[1], 4, generator=generator))
    assert bounds["iwae_6"].tolist() == pytest.approx([-window.sum() for window in windows])


def test_the_particle_filter_of_a_window_counts_all_of_its_frames(data, corpus):
    bounds = common.window_bounds(Listener(corpus), corpus, corpus.valid, (2,), seq_frames=5, smc=6)
    assert bounds["smc_6"].tolist() == pytest.approx(
        bounds["iwae_2"].tolist()
    )  # the same for all particles
    assert bounds["ess_smc_6"].tolist() == pytest.approx([6] * 5)


@pytest.mark.parametrize("at_most, chosen", ((10, [0, 1, 2, 3, 4]), (3, [0, 2, 4])))
def test_the_standard_error_over_recordings_is_that_of_a_ratio(data, corpus, at_most, chosen):
    found = common.evaluate_recordings(Listener(corpus), corpus, corpus.test, k=4, at_most=at_most)[
        "smc_4"
    ]
    recordings = [audio_of(data, "test")[i] for i in chosen]
    frames = np.array([len(audio) // 20 for audio in recordings])
    nats = np.array([-audio[: 20 * n].sum() for audio, n in zip(recordings, frames)])
    ratio, count = nats.sum() / frames.sum(), len(chosen)
    stderr = math.sqrt(((nats - ratio * frames) ** 2).sum() / (count - 1) / count) / frames.mean()
    bits = (math.log(corpus.std) - ratio / 20) / math.log(2)
    assert found == pytest.approx(
        dict(
            recordings=count,
            frames=frames.sum(),
            nats_per_frame=ratio,
            stderr=stderr,
            bits_per_sample=bits,
            ess=4,
        )
    )
    alone = common.evaluate_recordings(Listener(corpus), corpus, corpus.test, 4, 1)["smc_4"]
    assert stderr > 0.1 and alone["stderr"] is None


# ---- with whose weights ----


def main(monkeypatch, *flags):
    monkeypatch.setattr(
        sys, "argv", ["vrnn_gauss", *SIZES, "--lr=0.01", "--ema=0.5", *map(str, flags)]
    )
    vrnn_gauss.main()


def parameters_in(path, part="model"):
    return torch.load(path, weights_only=True)[part]


def model_of(parameters):
    model = common.VRNN(20, 4, 12, 8, 8, 8, 8, 8)
    model.load_state_dict(parameters)
    return model


def evaluated(parameters, corpus, split, ks, at_most=math.inf, smc=0):
    by_window = common.window_bounds(model_of(parameters), corpus, split, ks, 5, at_most, smc)
    return common.summarise(by_window, 5, 20, corpus)


def are_equal(parameters, others):
    return all(map(torch.equal, parameters.values(), others.values()))


def test_the_bounds_in_the_log_are_those_of_the_averaged_weights(
    data, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(common.Training, "finish", lambda training: None)
    main(
        monkeypatch,
        f"--data={data}",
        f"--out_dir={tmp_path / 'run'}",
        "--max_updates=4",
        "--monitor_every=2",
        "--monitor_windows=3",
    )
    logged = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["valid"]
    averaged, raw = (
        evaluated(
            parameters_in(tmp_path / "run/last.pt", part), corpus, corpus.valid, (2,), at_most=3
        )
        for part in ("averaged", "model")
    )
    assert logged == averaged
    assert abs(logged["elbo"]["nats_per_frame"] - raw["elbo"]["nats_per_frame"]) > 1e-3


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(folder of a run whose update 2 is the best by iwae_2, parameters that were monitored, those that generated).

    By the elbo its update 4 would be the best.
    """
    folder, monitored, generated = tmp_path_factory.mktemp("runs") / "run", [], []
    scripted, window_bounds = (
        iter(zip([1.0, 3.0, 2.0, 2.5], [1.0, 2.0, 3.0, 4.0])),
        common.window_bounds,
    )

    def scripted_bounds(model, corpus, split, ks, *others, **options):
        if split is not corpus.valid:
            return window_bounds(model, corpus, split, ks, *others, **options)
        assert ks == (2,)
        monitored.append(copy.deepcopy(model.state_dict()))
        iwae, elbo = next(scripted)
        return {
            name: torch.tensor([5 * value])
            for name, value in dict(iwae_2=iwae, elbo=elbo, kl=0.0).items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "window_bounds", scripted_bounds)
        patch.setattr(
            common, "write_samples", lambda model, *others: generated.append(model.state_dict())
        )
        main(patch, f"--data={data}", f"--out_dir={folder}", "--max_updates=4", "--monitor_every=1")
    return folder, monitored, generated


class Counting(common.VRNN):
    """Of a user, with what differs in training, and a buffer."""

    def __init__(self):
        super().__init__(20, 4, 12, 8, 8, 8, 8, 8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, *given):
        self.seen += self.training
        return super().forward(*given)


def test_a_model_is_evaluated_as_such_and_with_its_buffers_as_they_are(data, tmp_path):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run", model=Counting())
    make_updates(training, update_with(training, vrnn_gauss.objective), 3)
    assert training.model.seen == training.averaged.seen == 3
    assert torch.load(tmp_path / "run/best.pt", weights_only=True)["model"]["seen"] == 3


def test_best_pt_holds_the_averaged_weights_of_the_highest_iwae(run):
    folder, monitored, _ = run
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["update"] == 2
    assert are_equal(best["model"], monitored[1])
    assert are_equal(parameters_in(folder / "last.pt", "averaged"), monitored[3])
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["best"] == 3.0


def test_the_test_split_is_evaluated_with_the_weights_of_best_pt(run, corpus):
    folder, monitored, (generated,) = run
    written = json.loads((folder / "eval.json").read_text())
    assert (written["update"], written["split"], written["checkpoint"]) == (2, "test", "best.pt")
    best, last = (evaluated(monitored[n], corpus, corpus.test, (2, 6), smc=6) for n in (1, 3))
    assert written["bounds"] == best
    assert abs(best["elbo"]["nats_per_frame"] - last["elbo"]["nats_per_frame"]) > 1e-3
    whole = common.evaluate_recordings(model_of(monitored[1]), corpus, corpus.test, 6, 100)
    assert written["whole_recordings"] == whole
    assert written["yardsticks"] == common.evaluate_yardsticks(corpus, corpus.test, 5, 20)
    windows = np.genfromtxt(folder / "windows.csv", delimiter=",", names=True)
    assert windows["iwae_6"].mean() == pytest.approx(best["iwae_6"]["nats_per_frame"], abs=1e-3)
    assert are_equal(generated, monitored[1])
