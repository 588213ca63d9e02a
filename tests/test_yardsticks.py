"""What FLAC, a linear prediction and a histogram make of the test split."""

import io
import math
import signal
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import soundfile
import torch
from tiny import smooth_noise
from torch.distributions import Normal

import common
import plot_recon
import prepare_blizzard

A = np.array([1.6, -0.8])  # a resonance
FLAC_HEADER = 86  # bytes: "fLaC", its sizes, and who made it


def autoregression(random, samples, scale=300.0):
    x = np.zeros(samples + 2)
    for n, e in enumerate(random.normal(size=samples)):
        x[n + 2] = A @ x[n + 1 :: -1][:2] + scale * e
    return np.rint(x[2:]).astype(np.int16)


class Recordings:
    """A split in memory; what it holds is read as from a file."""

    def __init__(self, name, *recordings):
        self.name = name
        self.audio = np.concatenate(recordings)
        self.offsets = np.cumsum([0, *map(len, recordings)])

    def read(self, starts, samples):
        return np.stack([self.audio[start : start + samples] for start in starts])


def corpus_of(train, test):
    """Lists of recordings as a corpus."""
    train = Recordings("train", *train)
    test = Recordings("test", *test)
    return SimpleNamespace(
        train=train, test=test, mean=float(train.audio.mean()), std=float(train.audio.std())
    )


@pytest.fixture
def corpus():
    random = np.random.default_rng(0)
    train = [autoregression(random, 4_100) for _ in range(12)]
    test = [autoregression(random, 4_100) for _ in range(5)]
    return corpus_of(train, test)


@pytest.fixture
def short_windows(monkeypatch):
    """Windows of 800 samples in place of 8,000."""
    monkeypatch.setattr(prepare_blizzard, "WINDOW", 800)


def flac_bits(samples):
    """Bits of a FLAC file without its header; it must hold the samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="FLAC", compression_level=1.0)
    decoded, rate = soundfile.read(io.BytesIO(file.getvalue()), dtype="int16")
    np.testing.assert_array_equal(decoded, samples)
    return 8 * (len(file.getvalue()) - FLAC_HEADER)


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
    x = torch.randn(2, 30, dtype=torch.float64)
    a = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
    memories = torch.tensor([0.5, 0.9], dtype=torch.float64)
    levels = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    found = prepare_blizzard.linear_prediction(x, a, memories.view(-1, 1, 1), levels.view(-1, 1))
    assert found.shape == (2, 3, 2)
    for i, memory in enumerate(memories):
        for j, level in enumerate(levels):
            for window in range(2):
                plain = plain_linear_prediction(x[window], a, memory, level)
                torch.testing.assert_close(found[i, j, window], plain)


def test_the_fit_finds_the_process_and_its_code_length_is_the_entropy_rate(corpus, short_windows):
    starts = prepare_blizzard.window_starts(corpus.train, at_most=256)
    x = torch.cat(list(prepare_blizzard.dequantised_windows(corpus.train, starts, corpus)))
    a, memory, _ = prepare_blizzard.fit_linear_prediction(x)
    assert np.abs(a[:2].numpy() - A).max() < 0.05  # of 45,000 samples
    assert a[2:].abs().max() < 0.05
    assert memory == 1 - 0.5**8  # its level is constant, so it is averaged as long as may be
    bits = prepare_blizzard.window_yardsticks(corpus)["linear_prediction_16"]
    entropy_rate = math.log2(300 * math.sqrt(2 * math.pi * math.e))
    assert entropy_rate < bits.mean() / 800 < entropy_rate + 0.05


def test_a_level_that_changes_is_followed_and_quiet_samples_count_as_much_as_loud_ones():
    random = np.random.default_rng(1)
    loudness_of_samples = np.repeat(np.tile([30.0, 30.0, 30.0, 300.0], 5), 400)
    x = [0.0]
    for loudness in loudness_of_samples:  # only the quiet ones swing
        a_1 = 0.5 if loudness > 100 else -0.5
        x.append(loudness * random.normal() + a_1 * x[-1])
    x = np.array(x[1:])
    windows = torch.from_numpy(x / x.std()).view(-1, 2_000)
    a, memory, _ = prepare_blizzard.fit_linear_prediction(windows)
    assert 0.7 < memory < 0.99
    assert a[0] < -0.2


def test_the_bits_of_the_linear_prediction_are_those_of_16_bit_samples(corpus, short_windows):
    starts = prepare_blizzard.window_starts(corpus.train, at_most=256)
    x = torch.cat(list(prepare_blizzard.dequantised_windows(corpus.train, starts, corpus)))
    a, memory, first = prepare_blizzard.fit_linear_prediction(x)
    bits = prepare_blizzard.window_yardsticks(corpus)["linear_prediction_16"]

    # by hand, of the second window of the third recording, in steps of 16 bits
    nth = 5 * 2 + 1
    pcm = torch.from_numpy(corpus.test.audio[2 * 4_100 + 800 :][:800].astype(float))
    uniform = torch.rand(25, 800, generator=torch.Generator().manual_seed(2015))[nth]
    dequantised = pcm + uniform - 0.5 - corpus.mean
    nats = plain_linear_prediction(dequantised, a, memory, first * corpus.std**2)
    assert bits[nth] == pytest.approx(-nats.item() / math.log(2), rel=1e-5)


def test_each_batch_of_windows_is_dequantised_with_its_own_fixed_noise(
    corpus, short_windows, monkeypatch
):
    monkeypatch.setattr(prepare_blizzard, "WINDOWS_AT_ONCE", 2)
    starts = np.array([0, 900, 4_100])
    first, second = prepare_blizzard.dequantised_windows(corpus.test, starts, corpus)
    for x, batch_starts, seed in ((first, starts[:2], 2015), (second, starts[2:], 2016)):
        pcm = corpus.test.read(batch_starts, 800)
        uniform = torch.rand(pcm.shape, generator=torch.Generator().manual_seed(seed)).numpy()
        plain = (pcm + uniform - 0.5 - corpus.mean) / corpus.std
        np.testing.assert_allclose(x, plain, atol=1e-6)


def test_flac_counts_the_audio_of_each_window_and_not_its_header(corpus, short_windows):
    found = prepare_blizzard.window_yardsticks(corpus)["flac"]
    assert found.dtype == np.float64
    bits = []
    for start in corpus.test.offsets[:-1]:
        for window in corpus.test.audio[start : start + 4_000].reshape(5, 800):
            bits.append(flac_bits(window))
    assert found.tolist() == bits
    assert len(set(bits)) > 10


def test_the_histogram_has_the_entropy_of_the_samples_in_whole_windows(corpus, monkeypatch):
    monkeypatch.setattr(prepare_blizzard, "WINDOW", 100)
    values = np.tile(np.array([-32768, 5, 32767, 5], np.int16), 250)
    too_short = np.full(99, 7, np.int16)
    corpus.test = Recordings("test", values, too_short)
    found = prepare_blizzard.window_yardsticks(corpus)["histogram"]
    assert found == pytest.approx(np.full(10, 100 * 1.5))


def test_speech_like_noise_is_predicted_better_than_it_is_counted(monkeypatch):
    monkeypatch.setattr(prepare_blizzard, "WINDOW", 200)
    random = np.random.default_rng(2)
    corpus = corpus_of([smooth_noise(random, 8_007)], [smooth_noise(random, 8_007)])
    found = prepare_blizzard.window_yardsticks(corpus)
    assert found["linear_prediction_16"].mean() < found["flac"].mean()
    assert {*found} - {"starts"} == {*prepare_blizzard.YARDSTICKS} == {*plot_recon.YARDSTICKS}


@pytest.mark.parametrize("value", (0, 7, -32_768))
def test_constant_windows_have_yardsticks_as_all_others(corpus, short_windows, value):
    silence = np.full(4_000, value, np.int16)
    loud = autoregression(np.random.default_rng(3), 1_600)
    for train, test in (([silence, loud], [silence]), ([loud], [silence, loud])):
        found = prepare_blizzard.window_yardsticks(corpus_of(train, test))
        for name in prepare_blizzard.YARDSTICKS:
            assert np.isfinite(found[name]).all()
            assert len(found[name]) == len(found["starts"])
        assert found["flac"][0] < 200
    assert prepare_blizzard.window_yardsticks(corpus_of([loud], [silence]))["histogram"].max() == 0


def test_exact_silence_can_be_fitted_and_predicted():
    x = torch.zeros(9, 2_000, dtype=torch.float64)  # so long that the level would come down to 0
    a, memory, first = prepare_blizzard.fit_linear_prediction(x)
    assert (a == 0).all()
    assert prepare_blizzard.linear_prediction(x, a, memory, first).isfinite().all()


@pytest.mark.parametrize("at_most", (1, 3, 17, 18, 19, 2_048))
def test_windows_are_those_of_the_evaluation_and_evenly_spread(short_windows, at_most):
    lengths = (2_500, 799, 800, 1, 12_001, 30)  # 3, 0, 1, 0, 15 and no windows
    split = Recordings("test", *(np.zeros(length, np.int16) for length in lengths))
    starts = prepare_blizzard.window_starts(split, at_most)
    assert starts.tolist() == common.piece_starts(split, 800, at_most).tolist()
    assert len(starts) == min(at_most, 19)
    assert starts.dtype == np.int64


# ---- in the file ---------------------------------------------------------------------------------

LENGTHS = [1_500, 150, 2_000, 800, 3_100, 1_799, 200, 2_345, 999, 1_234, 1_000, 4_321, 777]


def write_recordings(folder, lengths=LENGTHS):
    """Recordings of different lengths and loudness, as a folder of arrays."""
    folder.mkdir()
    random = np.random.default_rng(4)
    recordings = {}
    for i, length in enumerate(lengths):
        louder = smooth_noise(random, length + 7) * (1 + i / 5)
        recordings[f"rec_{i}"] = louder.astype(np.int16)
    np.savez(folder / "in.npz", **recordings)
    return folder


def converted(tmp_path):
    """The corpus, and the group `yardsticks` of its file."""
    folder = write_recordings(tmp_path / "in")
    prepare_blizzard.convert_files([folder], tmp_path / "out.h5", valid=0.1, test=0.5)
    corpus = common.open_corpus(tmp_path / "out.h5")
    return corpus, corpus.test.audio.file["yardsticks"]


@pytest.mark.parametrize("at_most", (4, 100))
def test_the_file_holds_the_windows_of_test_and_the_bits_of_each(
    tmp_path, monkeypatch, short_windows, at_most
):
    monkeypatch.setattr(prepare_blizzard, "MOST_WINDOWS", at_most)
    corpus, yardsticks = converted(tmp_path)
    windows = yardsticks["windows"]
    assert windows.attrs["samples"] == 800
    starts = []
    for start, end in zip(corpus.test.offsets, corpus.test.offsets[1:]):
        starts += range(start, end - 800 + 1, 800)
    assert len(starts) > 6
    if at_most == 4:
        last = len(starts) - 1
        starts = [starts[round(last * third / 3)] for third in range(4)]
    assert windows["starts"][:].tolist() == starts

    audio = corpus.test.audio[:]
    pcm = [audio[start : start + 800] for start in starts]
    bits = [flac_bits(window) for window in pcm]
    assert windows["flac"][:].tolist() == bits
    assert len(set(bits)) > len(bits) // 2

    _, counts = np.unique(np.concatenate(pcm), return_counts=True)
    p = counts / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    assert windows["histogram"][:] == pytest.approx(np.full(len(starts), 800 * entropy))

    predicted = prepare_blizzard.window_yardsticks(corpus)["linear_prediction_16"]
    assert windows["linear_prediction_16"][:].tolist() == predicted.tolist()
    for name, dataset in windows.items():
        assert dataset.dtype == (np.int64 if name == "starts" else np.float64)


@pytest.mark.parametrize("at_most", (3, 100))
def test_the_file_holds_the_bits_of_whole_recordings_in_whole_frames(
    tmp_path, monkeypatch, at_most
):
    monkeypatch.setattr(prepare_blizzard, "MOST_RECORDINGS", at_most)
    monkeypatch.setattr(common, "SHORTEST", 1)  # as in a file that was made otherwise
    corpus, yardsticks = converted(tmp_path)
    recordings = yardsticks["recordings"]
    lengths = np.diff(corpus.test.offsets)
    usable = [i for i, length in enumerate(lengths) if length >= 200]
    assert 4 < len(usable) < len(lengths)  # one is too short
    if at_most == 3:
        last = len(usable) - 1
        usable = [usable[0], usable[round(last / 2)], usable[last]]
    assert recordings["index"][:].tolist() == usable

    samples = [lengths[i] - lengths[i] % 200 for i in usable]
    assert recordings["samples"][:].tolist() == samples
    bits = []
    for i, count in zip(usable, samples):
        start = corpus.test.offsets[i]
        bits.append(flac_bits(corpus.test.audio[start : start + count]))
    assert recordings["flac"][:].tolist() == bits
    assert len(set(bits)) == len(bits)
    assert recordings["index"].dtype == recordings["samples"].dtype == np.int64
    assert recordings["flac"].dtype == np.float64
    assert "linear_prediction_16" not in recordings


def test_recordings_without_a_window_have_no_yardsticks_on_windows(tmp_path):
    _, yardsticks = converted(tmp_path)  # windows of 8,000 samples
    windows = yardsticks["windows"]
    assert {*windows} == {"starts", "flac", "histogram"}
    assert windows.attrs["samples"] == 8_000
    for dataset in windows.values():
        assert dataset.shape == (0,)
    assert len(yardsticks["recordings"]["flac"]) > 4


def test_without_a_window_in_train_there_is_no_linear_prediction(corpus, short_windows):
    corpus = corpus_of([corpus.train.audio[:799]], [corpus.test.audio])
    assert {*prepare_blizzard.window_yardsticks(corpus)} == {"starts", "flac", "histogram"}


def test_yardsticks_that_fail_midway_leave_nothing(tmp_path, monkeypatch, short_windows):
    folder = write_recordings(tmp_path / "in")
    calls = []

    def fail_at_the_third(samples):
        calls.append(len(samples))
        if len(calls) == 3:
            raise OSError("no FLAC")
        return 1.0

    monkeypatch.setattr(prepare_blizzard, "flac_bits", fail_at_the_third)
    with pytest.raises(OSError, match="no FLAC"):
        prepare_blizzard.convert_files([folder], tmp_path / "out.h5", valid=0.1, test=0.5)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_conversion_that_is_stopped_in_its_yardsticks_leaves_nothing(
    tmp_path, monkeypatch, number
):
    folder = write_recordings(tmp_path / "in")

    def stopped(path):
        assert path.name == "out.h5.partial"
        with h5py.File(path, locking=False) as file:  # whole, and closed
            assert file.attrs["std"] > 0
        signal.raise_signal(number)

    monkeypatch.setattr(prepare_blizzard, "add_yardsticks", stopped)
    with pytest.raises(SystemExit) as end:
        prepare_blizzard.convert_files([folder], tmp_path / "out.h5", valid=0.1, test=0.5)
    assert end.value.code == 128 + number
    assert list(tmp_path.iterdir()) == [folder]


def reported(tmp_path, monkeypatch, capsys):
    """The words of each line of the table that a conversion prints."""
    folder = write_recordings(tmp_path / "in")
    flags = [folder, f"--out={tmp_path}/out.h5", "--valid=.1", "--test=.5"]
    monkeypatch.setattr(sys, "argv", ["prepare_blizzard.py", *map(str, flags)])
    prepare_blizzard.main()
    lines = capsys.readouterr().out.splitlines()
    (first,) = (n for n, line in enumerate(lines) if line.startswith("test, bits per sample"))
    return [line.rsplit(maxsplit=2) for line in lines[first + 1 : first + 5]]


def test_the_report_has_the_bits_per_sample_on_windows_and_recordings(
    tmp_path, monkeypatch, capsys, short_windows
):
    table = reported(tmp_path, monkeypatch, capsys)
    yardsticks = common.open_corpus(tmp_path / "out.h5").test.audio.file["yardsticks"]
    windows = yardsticks["windows"]
    recordings = yardsticks["recordings"]

    def on_windows(name):
        return f"{windows[name][:].mean() / 800:.3f}"

    flac = f"{recordings['flac'][:].sum() / recordings['samples'][:].sum():.3f}"
    assert table == [
        ["number of them", str(len(windows["starts"])), str(len(recordings["index"]))],
        ["FLAC", on_windows("flac"), flac],
        ["linear prediction", on_windows("linear_prediction_16"), "-"],
        ["histogram", on_windows("histogram"), "-"],
    ]


def test_the_report_says_where_there_is_no_window(tmp_path, monkeypatch, capsys):
    table = reported(tmp_path, monkeypatch, capsys)
    assert [row[1] for row in table] == ["0", "-", "-", "-"]
    assert float(table[1][2]) > 5
