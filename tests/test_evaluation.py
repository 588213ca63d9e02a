"""What is evaluated, on what, with whose weights, and the summaries, computed by hand."""

import copy
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch
from tiny import SIZES, lines_of, make_updates, tiny_training, update_with, write_quiet_data
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
        nll_TBK, kl_TBK, log_w_TBK = [part[:, :, :k] for part in self.given]
        return common.Rollout(nll_TBK, kl_TBK, log_w_TBK, *[None] * 6, state=(), phi_x=None)


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
        # the fifth is left out
        iwae_2=[(log(3 / 2) + log(7 / 2)) / 2, (log(9 / 2) + log(2 / 2)) / 2],
        ess_iwae_2=[(9 / 5 + 49 / 25) / 2, (81 / 65 + 4 / 2) / 2],
        iwae_5=[log(15 / 5), log(12 / 5)],
        ess_iwae_5=[225 / 55, 144 / 68],
    )
    assert list(bounds) == list(expected)
    for name, values in expected.items():
        assert bounds[name].tolist() == pytest.approx(values, rel=1e-12), name


def test_summaries_of_three_windows_equal_those_computed_by_hand(corpus):
    values = torch.tensor([10.0, 20.0, 60.0], dtype=torch.float64)  # deviations -20, -10, 30
    names = ("elbo", "kl", "log_w_std", "iwae_2", "ess_iwae_2")
    found = common.summarise(dict.fromkeys(names, values), 5, 20, corpus)
    stderr = math.sqrt((400 + 100 + 900) / 2) / math.sqrt(3)
    bound = pytest.approx(dict(nats_per_frame=6, stderr=stderr / 5))
    assert found["kl"] == found["log_w_std"] == bound
    bits = (math.log(corpus.std) - 6 / 20) / math.log(2)
    for name in ("elbo", "iwae_2"):
        assert found[name].pop("bits_per_sample") == pytest.approx(bits)
        assert found[name] == bound
    assert found["ess_iwae_2"] == pytest.approx(dict(mean=30, stderr=stderr))
    of_one_window = common.summarise(dict(elbo=values[:1]), 5, 20, corpus)
    assert of_one_window["elbo"]["stderr"] is None


def test_the_table_of_windows_holds_bounds_alone_in_nats_per_frame(tmp_path):
    of_first = dict(elbo=10.0, kl=1.0, log_w_std=9.0, iwae_2=11.0, ess_iwae_2=9.0)
    of_first |= dict(smc_6=12.3456, ess_smc_6=9.0)
    by_window = {name: torch.tensor([first, -2.5]) for name, first in of_first.items()}
    common.write_windows(by_window, 5, tmp_path / "windows.csv")
    lines = ["elbo,kl,iwae_2,smc_6", "2.000,0.200,2.200,2.469", "-0.500,-0.500,-0.500,-0.500"]
    assert (tmp_path / "windows.csv").read_text() == "\n".join(lines) + "\n"


# ---- what the model is given ----


class Listener(nn.Module):
    """Keeps x and noise. Its log w is minus the sum of the 16-bit values of a frame."""

    x_dim, z_dim = 20, 4

    def __init__(self, corpus):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.corpus = corpus
        self.heard = []

    def forward(self, x_TBX, state=None, noise=None, k=1):
        self.heard.append((x_TBX, noise))
        pcm_TBX = (x_TBX.double() * self.corpus.std + self.corpus.mean).round()
        nll_TBK = pcm_TBX.sum(2, keepdim=True).expand(-1, -1, k)
        terms = (nll_TBK, 0 * nll_TBK, -nll_TBK)
        return common.Rollout(*terms, *[None] * 6, state=(noise[0],), phi_x=None)


def audio_of(path, split):
    """The recordings of a split."""
    with h5py.File(path, locking=False) as file:
        audio = file[f"{split}/audio"][:].astype(float)
        return np.split(audio, file[f"{split}/offsets"][1:-1])


def windows_of(path, split):
    """Of five frames of twenty samples."""
    windows = []
    for audio in audio_of(path, split):
        for start in range(0, len(audio) - 99, 100):
            windows.append(audio[start : start + 100].reshape(5, 20))
    return windows


def test_every_batch_of_windows_is_dequantised_with_noise_of_its_own(data, corpus, monkeypatch):
    monkeypatch.setattr(common, "EVAL_BATCH", 3)
    model = Listener(corpus)
    bounds = common.window_bounds(model, corpus, corpus.valid, (2, 6), seq_frames=5)
    windows = windows_of(data, "valid")
    assert len(windows) == 5
    assert len(model.heard) == 2
    for batch, (x_TBX, noise) in enumerate(model.heard):
        generator = torch.Generator().manual_seed(2015 + batch)
        pcm_TBX = torch.from_numpy(np.stack(windows[3 * batch : 3 * batch + 3], axis=1))
        uniform = torch.rand(pcm_TBX.shape, generator=generator)
        expected = (pcm_TBX + uniform - 0.5 - corpus.mean) / corpus.std
        torch.testing.assert_close(x_TBX.double(), expected, rtol=0, atol=1e-6)
        expected_noise = torch.randn(5, 6 * pcm_TBX.shape[1], 4, generator=generator)
        assert torch.equal(noise, expected_noise)
    assert bounds["iwae_6"].tolist() == pytest.approx([-window.sum() for window in windows])


def test_the_particle_filter_of_a_window_counts_all_of_its_frames(data, corpus):
    bounds = common.window_bounds(Listener(corpus), corpus, corpus.valid, (2,), seq_frames=5, smc=6)
    # the same for all particles
    assert bounds["smc_6"].tolist() == pytest.approx(bounds["iwae_2"].tolist())
    assert bounds["ess_smc_6"].tolist() == pytest.approx([6] * 5)


@pytest.mark.parametrize("at_most, chosen", ((10, [0, 1, 2, 3, 4]), (3, [0, 2, 4])))
def test_the_standard_error_over_recordings_is_that_of_a_ratio(data, corpus, at_most, chosen):
    found = common.evaluate_recordings(Listener(corpus), corpus, corpus.test, 4, at_most)
    recordings = [audio_of(data, "test")[i] for i in chosen]
    frames = np.array([len(audio) // 20 for audio in recordings])
    nats = np.array([-audio[: 20 * n].sum() for audio, n in zip(recordings, frames)])
    ratio = nats.sum() / frames.sum()
    count = len(chosen)
    deviations = nats - ratio * frames
    stderr = math.sqrt((deviations**2).sum() / (count - 1) / count) / frames.mean()
    expected = dict(
        recordings=count,
        frames=frames.sum(),
        nats_per_frame=ratio,
        stderr=stderr,
        bits_per_sample=(math.log(corpus.std) - ratio / 20) / math.log(2),
    )
    assert found.keys() == {"smc_4"}  # the file has no yardsticks
    assert found["smc_4"] == pytest.approx(expected)
    assert stderr > 0.1
    alone = common.evaluate_recordings(Listener(corpus), corpus, corpus.test, 4, 1)
    assert alone["smc_4"]["stderr"] is None


# ---- speech ----


def heard_in(path):
    """Samples of a .wav file of 16 bits."""
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == 16_000
    return samples


def test_continued_speech_begins_as_real_speech_and_goes_on_from_the_state_after_it(
    corpus, tmp_path, monkeypatch
):
    """Recordings 2 and 4 are the longest; 34 frames of the second of them are whole."""
    torch.manual_seed(0)
    model = common.VRNN(20, 4, 12, 8, 8, 8, 8, 8, 3)
    model.mirror()
    starts = []
    generate = model.generate

    def remember(frames, batch, generator=None, state=None, resynthesised=None):
        x_TBX = generate(frames, batch, generator, state, resynthesised)
        starts.append((state, resynthesised, x_TBX))
        return x_TBX

    monkeypatch.setattr(model, "generate", remember)
    monkeypatch.setattr(model, "forward", without_posterior_noise(model.forward))
    common.write_samples(model, corpus, corpus.test, tmp_path, frames=60, given=7)

    continuing = [
        state for state, resynthesised, _ in starts if state is not None and resynthesised is None
    ]
    (state,) = continuing
    (goes_on,) = [x_TBX for before, _, x_TBX in starts if before is state]
    for i, recording in enumerate((2, 4)):
        real = heard_in(tmp_path / f"real_{i}.wav")
        continued = heard_in(tmp_path / f"continued_{i}.wav")
        first, last = corpus.test.offsets[recording : recording + 2]
        assert len(real) == 34 * 20
        # but for dequantisation, which may round the other way
        assert np.abs(real - corpus.test.audio[first:last][: len(real)]).max() <= 1
        assert len(continued) == 60 * 20
        assert np.array_equal(continued[: 7 * 20], real[: 7 * 20])
        generated = goes_on[:, i].double().flatten() * corpus.std + corpus.mean
        assert np.array_equal(continued[7 * 20 :], generated.round().numpy())
    # The state is that after the given frames: with the same noise, it is found from their audio.
    given = np.stack([heard_in(tmp_path / f"real_{i}.wav")[: 7 * 20] for i in range(2)])
    x_TBX = torch.from_numpy((given - corpus.mean) / corpus.std).float().view(2, 7, 20)
    expected = model(x_TBX.transpose(0, 1)).state
    for part, expected_part in zip(state, expected, strict=True):
        assert part.abs().max() > 0.01
        assert (part - expected_part).norm() < 0.1 * expected_part.norm()


def without_posterior_noise(forward):
    """The same call, with noise of zeros."""

    def call(x_TBX, state=None, noise=None, k=1):
        frames, batch, _ = x_TBX.shape
        return forward(x_TBX, state, torch.zeros(frames, batch * k, 4), k)

    return call


# ---- with whose weights ----


def main(monkeypatch, *flags):
    given = ["--lr=0.01", "--ema=0.5", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", ["vrnn_gauss", *SIZES, *given])
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
    out = tmp_path / "run"
    length = ("--max_updates=4", "--monitor_every=2", "--monitor_windows=3")
    main(monkeypatch, f"--data={data}", f"--out_dir={out}", *length)
    logged = lines_of(out / "log.jsonl")[-1]["valid"]
    averaged = parameters_in(out / "last.pt", "averaged")
    raw = parameters_in(out / "last.pt", "model")
    assert logged == evaluated(averaged, corpus, corpus.valid, (2,), at_most=3)
    of_raw = evaluated(raw, corpus, corpus.valid, (2,), at_most=3)
    assert abs(logged["elbo"]["nats_per_frame"] - of_raw["elbo"]["nats_per_frame"]) > 1e-3


@dataclasses.dataclass
class Watched:
    """A run of four updates, each monitored with made-up bounds on valid."""

    folder: Path
    monitored: list  # parameters at each monitoring
    generated: list  # parameters whenever samples were written

    @property
    def best(self):
        return torch.load(self.folder / "best.pt", weights_only=True)

    @property
    def last(self):
        return torch.load(self.folder / "last.pt", weights_only=True)


def watched_run(data, folder, iwae, elbo):
    """iwae, elbo: their values, in nats per frame, at each monitoring."""
    run = Watched(folder, monitored=[], generated=[])
    window_bounds = common.window_bounds

    def made_up(model, corpus, split, ks, *others, **options):
        if split is not corpus.valid:
            return window_bounds(model, corpus, split, ks, *others, **options)
        assert ks == (2,)
        n = len(run.monitored)
        run.monitored.append(copy.deepcopy(model.state_dict()))
        values = dict(iwae_2=iwae[n], elbo=elbo[n], kl=0.0)
        return {name: torch.tensor([5 * value]) for name, value in values.items()}

    def remember(model, *others):
        run.generated.append(model.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "window_bounds", made_up)
        patch.setattr(common, "write_samples", remember)
        length = ("--max_updates=4", "--monitor_every=1")
        main(patch, f"--data={data}", f"--out_dir={folder}", *length)
    return run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """One whose update 2 is the best by iwae_2, and update 4 by the elbo."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return watched_run(data, folder, iwae=[1.0, 3.0, 2.0, 2.5], elbo=[1.0, 2.0, 3.0, 4.0])


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
    assert parameters_in(tmp_path / "run/best.pt")["seen"] == 3


def test_best_pt_holds_the_averaged_weights_of_the_highest_iwae(run):
    assert run.best["update"] == 2
    assert are_equal(run.best["model"], run.monitored[1])
    assert are_equal(run.last["averaged"], run.monitored[3])
    assert run.last["best"] == 3.0


def test_of_negative_bounds_too_the_highest_is_the_best(data, tmp_path):
    values = [-50.0, -20.0, -30.0, -40.0]
    run = watched_run(data, tmp_path / "run", iwae=values, elbo=values)
    assert run.best["update"] == 2
    assert are_equal(run.best["model"], run.monitored[1])
    assert run.last["best"] == -20.0


def test_the_test_split_is_evaluated_with_the_weights_of_best_pt(run, corpus):
    written = json.loads((run.folder / "eval.json").read_text())
    assert written["update"] == 2
    assert written["split"] == "test"
    assert written["checkpoint"] == "best.pt"
    best = evaluated(run.monitored[1], corpus, corpus.test, (2, 6), smc=6)
    last = evaluated(run.monitored[3], corpus, corpus.test, (2, 6), smc=6)
    assert written["bounds"] == best
    assert abs(best["elbo"]["nats_per_frame"] - last["elbo"]["nats_per_frame"]) > 1e-3
    whole = common.evaluate_recordings(model_of(run.monitored[1]), corpus, corpus.test, 6, 100)
    assert written["whole_recordings"] == whole
    windows = np.genfromtxt(run.folder / "windows.csv", delimiter=",", names=True)
    assert windows["iwae_6"].mean() == pytest.approx(best["iwae_6"]["nats_per_frame"], abs=1e-3)
    (generated,) = run.generated
    assert are_equal(generated, run.monitored[1])


# ---- yardsticks ----


def test_yardsticks_are_those_of_the_data_file_for_windows_of_that_length(
    data, tmp_path, monkeypatch
):
    """Mean bits of a window over its 100 samples; 1.5 and 2 are those of two of three windows."""
    with_yardsticks = tmp_path / "yardsticks.h5"
    shutil.copy(data, with_yardsticks)
    with h5py.File(with_yardsticks, "a") as file:
        windows = file.create_group("yardsticks/windows")
        windows.attrs["samples"] = 100
        windows["starts"] = [0, 100, 200]
        windows["flac"] = [150.0, 200.0, 400.0]
        windows["histogram"] = [500.0, 500.0, 500.0]
        recordings = file.create_group("yardsticks/recordings")
        recordings["index"] = [0, 2, 4]
        recordings["samples"] = [300, 1250, 680]
        recordings["flac"] = [900.0, 3000.0, 1000.0]
        recordings["adaptive_filter"] = [math.nan, 2000.0, 900.0]

    monkeypatch.setattr(common, "write_samples", lambda *_: None)

    def evaluation(name, *flags):
        length = ("--max_updates=1", "--monitor_every=1", "--eval_recordings=3")
        where = (f"--data={with_yardsticks}", f"--out_dir={tmp_path / name}")
        main(monkeypatch, *where, *length, *flags)
        return json.loads((tmp_path / name / "eval.json").read_text())

    found = evaluation("run")
    std = common.open_corpus(data).std
    assert found["yardsticks"] == dict(flac=in_nats(2.5, std), histogram=in_nats(5.0, std))
    flac = found["whole_recordings"]["flac"]
    assert flac == in_nats((900 + 3000 + 1000) / (300 + 1250 + 680), std)
    assert "adaptive_filter" not in found["whole_recordings"]
    assert evaluation("shorter", "--seq_frames=4")["yardsticks"] == {}


def in_nats(bits, std):
    """A yardstick of so many bits per sample, for frames of twenty."""
    nats = pytest.approx(20 * (math.log(std) - bits * math.log(2)))
    return dict(nats_per_frame=nats, stderr=None, bits_per_sample=pytest.approx(bits))
