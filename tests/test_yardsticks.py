"""What FLAC, a linear prediction and a histogram make of the windows of a split."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny import smooth_noise
from torch.distributions import Normal

import common
import plot_recon

A = np.array([1.6, -0.8])  # a resonance


def autoregression(random, samples, scale=300.0):
    x = np.zeros(samples + 2)
    for n, e in enumerate(random.normal(size=samples)):
        x[n + 2] = A @ x[n + 1 :: -1][:2] + scale * e
    return np.rint(x[2:]).astype(np.int16)


class Recordings:
    """A split in memory; what it holds is read as from a file."""

    def __init__(self, name, *recordings):
        self.name, self.audio = name, np.concatenate(recordings)
        self.offsets = np.cumsum([0, *map(len, recordings)])

    def read(self, starts, samples):
        return np.stack([self.audio[start : start + samples] for start in starts])


@pytest.fixture
def corpus():
    random = np.random.default_rng(0)
    splits = {
        name: Recordings(name, *(autoregression(random, 4_100) for _ in range(count)))
        for name, count in (("train", 12), ("test", 5))
    }
    train = splits["train"].audio
    return SimpleNamespace(mean=float(train.mean()), std=float(train.std()), **splits)


def plain_linear_prediction(x, a, memory, v):
    """Sample by sample."""
    total = 0.0
    for n in range(len(x)):
        mean = sum(a_i * x[n - i] for i, a_i in enumerate(a, start=1) if n >= i)
        total += Normal(mean, v**0.5).log_prob(x[n])
        v = memory * v + (1 - memory) * (x[n] - mean) ** 2
    return total


def test_the_linear_prediction_is_that_of_a_plain_loop_for_every_memory_and_first_level():
    torch.manual_seed(0)
    x, a = (
        torch.randn(2, 30, dtype=torch.float64),
        torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64),
    )
    memory, first = (
        torch.tensor([0.5, 0.9]).double().view(-1, 1, 1),
        torch.tensor([0.1, 1.0, 4.0]).double().view(-1, 1),
    )
    found = common.linear_prediction(x, a, memory, first)
    assert found.shape == (2, 3, 2)
    for i, level_memory in enumerate(memory.flatten()):
        for j, v in enumerate(first.flatten()):
            for window in range(2):
                torch.testing.assert_close(
                    found[i, j, window], plain_linear_prediction(x[window], a, level_memory, v)
                )


def test_the_fit_finds_the_process_and_its_code_length_is_the_entropy_rate(corpus):
    a, memory, first = common.fit_linear_prediction(corpus, samples=800)
    assert np.abs(a[:2].numpy() - A).max() < 0.05 and a[2:].abs().max() < 0.05  # of 45,000 samples
    assert memory == max(
        1 - 0.5 ** torch.arange(1, 9)
    )  # its level is constant, so it is averaged as long as may be
    bits = common.evaluate_yardsticks(corpus, corpus.test, seq_frames=40, x_dim=20)[
        "linear_prediction_16"
    ]
    entropy_rate = math.log2(300 * math.sqrt(2 * math.pi * math.e))
    assert entropy_rate < bits["bits_per_sample"] < entropy_rate + 0.05


def test_a_level_that_changes_is_followed_and_quiet_samples_count_as_much_as_loud_ones():
    random = np.random.default_rng(1)
    x = [0.0]
    for loudness in np.repeat(
        np.tile([30.0, 30.0, 30.0, 300.0], 5), 400
    ):  # only the quiet ones swing
        x.append(loudness * random.normal() + (0.5 if loudness > 100 else -0.5) * x[-1])
    train = Recordings("train", np.rint(x[1:]).astype(np.int16))
    corpus = SimpleNamespace(train=train, mean=0.0, std=float(train.audio.std()))
    a, memory, _ = common.fit_linear_prediction(corpus, samples=2_000)
    assert 0.7 < memory < 0.99
    assert a[0] < -0.2


def test_flac_counts_the_audio_of_each_window_and_not_its_header(corpus):
    found = common.evaluate_yardsticks(corpus, corpus.test, seq_frames=40, x_dim=20)["flac"]
    sizes = []
    for start in corpus.test.offsets[:-1]:
        for window in corpus.test.audio[start : start + 4_000].reshape(5, 800):
            file = io.BytesIO()
            soundfile.write(file, window, 16_000, format="FLAC", compression_level=1.0)
            assert (
                soundfile.read(io.BytesIO(file.getvalue()), dtype="int16")[0].tolist()
                == window.tolist()
            )
            sizes.append(len(file.getvalue()))
    assert found["header_bytes"] == 86  # "fLaC", its sizes, and who made it
    assert found["bits_per_sample"] == pytest.approx(8 * (np.mean(sizes) - 86) / 800)
    bits = (math.log(corpus.std) - found["nats_per_frame"] / 20) / math.log(
        2
    )  # by the unit of every bound
    assert bits == pytest.approx(found["bits_per_sample"])
    assert found["stderr"] == pytest.approx(8 * np.std(sizes, ddof=1) / 5 / 40 * math.log(2))


def test_the_histogram_has_the_entropy_of_the_samples_in_whole_windows(corpus):
    values = np.tile(np.array([-32768, 5, 32767, 5], np.int16), 250)
    corpus.test = Recordings("test", values, np.full(99, 7, np.int16))  # the second holds no window
    found = common.evaluate_yardsticks(corpus, corpus.test, seq_frames=5, x_dim=20)["histogram"]
    assert found["bits_per_sample"] == pytest.approx(1.5) and found["stderr"] is None


def test_speech_like_noise_is_predicted_better_than_it_is_counted():
    random = np.random.default_rng(2)
    splits = {name: Recordings(name, smooth_noise(random, 8_007)) for name in ("train", "test")}
    corpus = SimpleNamespace(mean=0.0, std=float(splits["train"].audio.std()), **splits)
    bits = {
        name: found["bits_per_sample"]
        for name, found in common.evaluate_yardsticks(corpus, corpus.test, 10, 20).items()
    }
    assert bits["linear_prediction_16"] < bits["flac"]
    assert set(bits) == set(plot_recon.YARDSTICKS)
