"""What FLAC, an adaptive filter and a histogram make of the test split."""

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
    """Bits of FLAC files of 1,024 samples without their headers; they must hold the samples."""
    bits = 0
    for part in np.split(samples, range(1_024, len(samples), 1_024)):
        file = io.BytesIO()
        soundfile.write(file, part, 16_000, format="FLAC", compression_level=1.0)
        decoded, rate = soundfile.read(io.BytesIO(file.getvalue()), dtype="int16")
        np.testing.assert_array_equal(decoded, part)
        bits += 8 * (len(file.getvalue()) - FLAC_HEADER)
    return bits


def plain_filter(x, a, covariance):
    """(error, means of squares) at each sample of x (N,), from the definition, in NumPy."""
    order = len(a)
    information = np.linalg.inv(covariance)
    target = information @ a
    squares = np.full(3, 1e-3)
    padded = np.concatenate((np.zeros(order), x))
    for n, x_n in enumerate(x):
        past = padded[n : n + order]
        error = x_n - np.linalg.solve(information, target) @ past
        yield error, squares
        weight = 1 / np.sqrt(squares[0])
        information = 0.993 * (information + weight * np.outer(past, past))
        target = 0.993 * (target + weight * x_n * past)
        kept = np.array([3 / 4, 15 / 16, 63 / 64])
        squares = kept * squares + (1 - kept) * error**2


def plain_log_density(error, squares, density):
    log_scale = density[3] + sum(w * math.log(v**0.5) for w, v in zip(density, squares))
    freedom = math.exp(density[4])
    z = error / math.exp(log_scale)
    log_t = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    log_t -= 0.5 * math.log(freedom * math.pi) + (freedom + 1) / 2 * math.log(1 + z * z / freedom)
    return log_t - log_scale


@pytest.fixture
def short_filter(monkeypatch):
    """Of order 3, and in steps that end in the midst of the windows."""
    monkeypatch.setattr(prepare_blizzard, "ORDER", 3)
    monkeypatch.setattr(prepare_blizzard, "STEPS_AT_ONCE", 37)


def a_prior():
    a = torch.tensor([0.2, -0.8, 1.5]).double()
    return a, torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]]).double()


def test_the_filter_is_least_squares_over_all_samples_before(short_filter):
    x = torch.from_numpy(np.stack([autoregression(np.random.default_rng(i), 100) for i in (0, 1)]))
    x = x.double() / 1_000
    parts = zip(*prepare_blizzard.filtered(x, *a_prior()))
    errors, squares = (torch.cat(part) for part in parts)
    assert errors.shape == (100, 2)
    for window in (0, 1):
        plain = plain_filter(x[window].numpy(), *(part.numpy() for part in a_prior()))
        for n, (error, mean_squares) in enumerate(plain):
            assert errors[n, window] == pytest.approx(error, rel=1e-6, abs=1e-9)
            assert squares[n, window].tolist() == pytest.approx(mean_squares.tolist(), rel=1e-6)


def test_its_density_is_students_and_the_fit_finds_the_most_likely():
    torch.manual_seed(0)
    density = torch.tensor([0.5, 0.2, 0.3, -0.1, math.log(5)]).double()
    squares = torch.randn(4_000, 5, 3).double().exp()
    scale = (density[3] + 0.5 * squares.log() @ density[:3]).exp()
    errors = scale * torch.distributions.StudentT(5.0).sample(scale.shape).double()
    found = prepare_blizzard.log_density(errors, squares, density)
    for n in (0, 7):
        plain = plain_log_density(errors[n, 1].item(), squares[n, 1].tolist(), density.tolist())
        assert found[n, 1].item() == pytest.approx(plain)
    fitted = prepare_blizzard.fit_density(errors, squares)
    assert (fitted - density).abs().max() < 0.1
    best = prepare_blizzard.log_density(errors, squares, fitted).mean()
    assert best >= found.mean()
    for i in range(5):
        other = fitted.clone()
        other[i] += 0.05
        assert prepare_blizzard.log_density(errors, squares, other).mean() < best


def test_its_code_is_not_much_longer_than_the_entropy_of_a_process(corpus, short_windows):
    entropy_rate = math.log2(300 * math.sqrt(2 * math.pi * math.e))
    fitted = prepare_blizzard.fitted_filter(corpus)
    bits = prepare_blizzard.window_yardsticks(corpus, fitted)["adaptive_filter"] / 800
    assert entropy_rate < bits.mean() < entropy_rate + 0.3  # the price of adapting


def test_the_bits_of_the_filter_are_those_of_16_bit_samples_by_what_train_says(
    corpus, short_windows
):
    fitted = prepare_blizzard.fitted_filter(corpus)
    bits = prepare_blizzard.window_yardsticks(corpus, fitted)["adaptive_filter"]

    # by hand, of the second window of the third recording
    nth = 5 * 2 + 1
    pcm = corpus.test.audio[2 * 4_100 + 800 :][:800].astype(float)
    uniform = torch.rand(25, 800, generator=torch.Generator().manual_seed(2015))[nth].numpy()
    x = (pcm + uniform - 0.5 - corpus.mean) / corpus.std
    nats = 0.0
    for error, squares in plain_filter(x, fitted.a.numpy(), fitted.covariance.numpy()):
        nats += plain_log_density(error, squares, fitted.density.tolist())
    by_hand = (800 * math.log(corpus.std) - nats) / math.log(2)
    assert bits[nth] == pytest.approx(by_hand, rel=1e-4)

    windows = np.stack([window for window in corpus.train.audio.reshape(12, 4_100)[:, :4_000]])
    windows = windows.reshape(60, 800)
    uniform = torch.rand(60, 800, generator=torch.Generator().manual_seed(2015)).numpy()
    x = (windows + uniform - 0.5 - corpus.mean) / corpus.std
    x /= np.sqrt((x**2).mean(1, keepdims=True))
    padded = np.pad(x, ((0, 0), (32, 0)))
    past = np.concatenate([padded[:, n : n + 32] for n in range(800)])
    a, *_ = np.linalg.lstsq(past, x.T.ravel(), rcond=None)
    np.testing.assert_allclose(fitted.a, a, atol=1e-4)


def test_recordings_of_different_lengths_are_filtered_as_each_alone(corpus, monkeypatch):
    def without_noise(pcm, corpus):
        return torch.from_numpy(pcm / corpus.std)

    monkeypatch.setattr(prepare_blizzard, "dequantised", without_noise)
    monkeypatch.setattr(prepare_blizzard, "STEPS_AT_ONCE", 300)
    monkeypatch.setattr(prepare_blizzard, "WINDOW", 800)
    fitted = prepare_blizzard.fitted_filter(corpus)
    recordings = [corpus.test.audio[:length] for length in (1_000, 200, 610)]
    together = prepare_blizzard.filter_bits(recordings, corpus, fitted)
    alone = [prepare_blizzard.filter_bits([each], corpus, fitted).item() for each in recordings]
    assert together == pytest.approx(alone)


def test_flac_counts_the_audio_of_each_window_and_not_its_header(corpus, short_windows):
    found = prepare_blizzard.window_yardsticks(corpus, None)["flac"]
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
    found = prepare_blizzard.window_yardsticks(corpus, None)["histogram"]
    assert found == pytest.approx(np.full(10, 100 * 1.5))


def test_speech_like_noise_is_predicted_better_than_it_is_counted(monkeypatch):
    monkeypatch.setattr(prepare_blizzard, "WINDOW", 200)
    random = np.random.default_rng(2)
    corpus = corpus_of([smooth_noise(random, 8_007)], [smooth_noise(random, 8_007)])
    fitted = prepare_blizzard.fitted_filter(corpus)
    found = prepare_blizzard.window_yardsticks(corpus, fitted)
    assert found["adaptive_filter"].mean() < found["flac"].mean()
    assert {*found} - {"starts"} == {*prepare_blizzard.YARDSTICKS} == {*plot_recon.YARDSTICKS}


@pytest.mark.parametrize("value", (0, 7, -32_768))
def test_constant_windows_have_yardsticks_as_all_others(corpus, short_windows, value):
    silence = np.full(4_000, value, np.int16)
    loud = autoregression(np.random.default_rng(3), 1_600)
    for train, test in (([silence, loud], [silence]), ([loud], [silence, loud])):
        corpus = corpus_of(train, test)
        fitted = prepare_blizzard.fitted_filter(corpus)
        found = prepare_blizzard.window_yardsticks(corpus, fitted)
        for name in prepare_blizzard.YARDSTICKS:
            assert np.isfinite(found[name]).all()
            assert len(found[name]) == len(found["starts"])
        assert found["flac"][0] < 200
    corpus = corpus_of([loud], [silence])
    assert prepare_blizzard.window_yardsticks(corpus, None)["histogram"].max() == 0


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

    filtered = prepare_blizzard.filter_bits(
        np.stack(pcm), corpus, prepare_blizzard.fitted_filter(corpus)
    )
    assert windows["adaptive_filter"][:].tolist() == filtered.tolist()
    for name, dataset in windows.items():
        assert dataset.dtype == (np.int64 if name == "starts" else np.float64)


@pytest.mark.parametrize("at_most", (3, 100))
def test_the_file_holds_the_bits_of_whole_recordings_in_whole_frames(
    tmp_path, monkeypatch, at_most
):
    monkeypatch.setattr(prepare_blizzard, "MOST_RECORDINGS", at_most)
    monkeypatch.setattr(common, "SHORTEST", 1)  # as in a file that was made otherwise
    monkeypatch.setattr(prepare_blizzard, "MOST_FILTERED", 1_500)
    monkeypatch.setattr(prepare_blizzard, "WINDOW", 800)
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
    audio = []
    for i, count in zip(usable, samples):
        start = corpus.test.offsets[i]
        audio.append(corpus.test.audio[start : start + count])
    bits = list(map(flac_bits, audio))
    assert recordings["flac"][:].tolist() == bits
    assert len(set(bits)) == len(bits)
    assert recordings["index"].dtype == recordings["samples"].dtype == np.int64
    assert recordings["flac"].dtype == np.float64
    fitted = prepare_blizzard.fitted_filter(corpus)
    short = [each for each in audio if len(each) <= 1_500]
    assert 0 < len(short) < len(audio)  # the filter takes no long ones
    filtered = recordings["adaptive_filter"][:]
    expected = prepare_blizzard.filter_bits(short, corpus, fitted)
    assert filtered[np.array(samples) <= 1_500].tolist() == expected.tolist()
    assert np.isnan(filtered[np.array(samples) > 1_500]).all()


def test_recordings_without_a_window_have_no_yardsticks_on_windows(tmp_path):
    _, yardsticks = converted(tmp_path)  # windows of 8,000 samples
    windows = yardsticks["windows"]
    assert {*windows} == {"starts", "flac", "histogram"}
    assert windows.attrs["samples"] == 8_000
    for dataset in windows.values():
        assert dataset.shape == (0,)
    assert len(yardsticks["recordings"]["flac"]) > 4


def test_without_a_window_in_train_there_is_no_filter(corpus, short_windows):
    corpus = corpus_of([corpus.train.audio[:799]], [corpus.test.audio])
    fitted = prepare_blizzard.fitted_filter(corpus)
    assert fitted is None
    found = prepare_blizzard.window_yardsticks(corpus, fitted)
    assert {*found} == {"starts", "flac", "histogram"}
    assert "adaptive_filter" not in prepare_blizzard.recording_yardsticks(corpus, fitted)


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

    def on_recordings(name):
        return f"{recordings[name][:].sum() / recordings['samples'][:].sum():.3f}"

    assert table == [
        ["number of them", str(len(windows["starts"])), str(len(recordings["index"]))],
        ["FLAC", on_windows("flac"), on_recordings("flac")],
        ["adaptive filter", on_windows("adaptive_filter"), on_recordings("adaptive_filter")],
        ["histogram", on_windows("histogram"), "-"],
    ]


def test_the_report_says_where_there_is_no_window(tmp_path, monkeypatch, capsys):
    table = reported(tmp_path, monkeypatch, capsys)
    assert [row[1] for row in table] == ["0", "-", "-", "-"]
    assert float(table[1][2]) > 5
