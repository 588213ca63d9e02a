import functools
import io
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ROOT, Fork, command

import common
import prepare_blizzard

pytestmark = pytest.mark.usefixtures("without_filter")

RATE = common.SAMPLE_RATE


def noise(samples, seed=0):
    return np.random.default_rng(seed).integers(-20_000, 20_000, samples).astype(np.int16)


def recordings(count=12, samples=5_000):
    return {f"rec_{i}": noise(samples + 37 * i, seed=i) for i in range(count)}


def convert(folder, tmp_path, valid=0.2, test=0.2, **options):
    """The file that a folder becomes, and why recordings were skipped."""
    out = tmp_path / "out.h5"
    skipped, _ = prepare_blizzard.convert_files([folder], out, valid, test, **options)
    return out, skipped


def sizes(path):
    """{split: (recordings, samples)} of a converted file."""
    corpus = common.open_corpus(path)
    found = {}
    for name in common.SPLITS:
        split = getattr(corpus, name)
        found[name] = (len(split.offsets) - 1, len(split.audio))
    return found


def count(path):
    return sum(recordings for recordings, _ in sizes(path).values())


def read_back(path):
    """{name: samples} and {split: names} of a converted file."""
    audio = {}
    names = {}
    with h5py.File(path, locking=False) as file:
        for split in common.SPLITS:
            group = file[split]
            names[split] = [name.decode() for name in group["names"]]
            recordings = np.split(group["audio"][:], group["offsets"][1:-1])
            audio |= zip(names[split], recordings, strict=True)
    return audio, names


def numbers_in(name):
    """Key of the natural order of names whose words are all the same."""
    return [int(number) for number in re.findall("[0-9]+", name)]


def converted_array(tmp_path, array):
    """The samples that an array becomes, converted among good recordings, or why it is skipped."""
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    np.savez(folder / "good.npz", **recordings())
    np.save(folder / "it.npy", array)
    out, skipped = convert(folder, tmp_path, force=True)
    return skipped[0] if skipped else read_back(out)[0]["it"]


def test_int16_round_trips_exactly_in_natural_order_and_whole(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    stored = {}
    for file in ("data_10", "data_9"):
        arrays = {f"{file}_{i}": noise(4_000 + 11 * i, seed=i) for i in range(11)}
        np.savez(folder / f"{file}.npz", **arrays)
        stored |= {f"{file}/{key}": array for key, array in arrays.items()}
    out, _ = convert(folder, tmp_path)
    audio, splits = read_back(out)
    assert audio.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(audio[name], array)
    assert sum(map(len, splits.values())) == len(stored)
    for names in splits.values():
        assert names == sorted(names, key=numbers_in)
    assert splits["train"][0] == "data_9/data_9_0"


def test_a_recording_goes_whole_to_the_split_that_is_furthest_below_its_share_of_samples(tmp_path):
    lengths = dict(a=40_000, b=10_000, c=10_000, d=30_000, e=10_000, f=32_000)
    items = [(f"file of {name}", name, [noise(length)]) for name, length in lengths.items()]
    fails_after_its_first_block = (noise(9_000) if i == 0 else [][0] for i in range(2))
    items.append(("file of g", "g", fails_after_its_first_block))
    shares = dict(train=0.5, valid=0.25, test=0.25)
    found = (common.Recording(*item) for item in items)
    skipped = common.convert(found, tmp_path / "out.h5", shares)
    assert skipped == ["file of g: it cannot be read (list index out of range)"]
    assert len(common.open_corpus(tmp_path / "out.h5").test.audio) == 20_000  # nothing of it stays
    assert read_back(tmp_path / "out.h5")[1] == dict(
        train=["a", "f"], valid=["b", "d"], test=["c", "e"]
    )
    assert sizes(tmp_path / "out.h5") == dict(
        train=(2, 72_000), valid=(2, 40_000), test=(2, 20_000)
    )


def test_splits_follow_their_shares_and_repeat(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "a.npz", **recordings(60))
    out, _ = convert(folder, tmp_path, valid=0.1, test=0.2)
    first = read_back(out)[1]
    total = sum(samples for _, samples in sizes(out).values())
    for split, share in dict(train=0.7, valid=0.1, test=0.2).items():
        assert abs(sizes(out)[split][1] / total - share) < 0.02
    convert(folder, tmp_path, valid=0.1, test=0.2, force=True)
    assert read_back(out)[1] == first


def test_statistics_are_those_of_train_alone(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "a.npz", **recordings())
    out, _ = convert(folder, tmp_path)
    with h5py.File(out, locking=False) as file:
        train = file["train/audio"][:].astype(float)
        assert file.attrs["mean"] == pytest.approx(train.mean(), rel=1e-12)
        assert file.attrs["std"] == pytest.approx(train.std(), rel=1e-12)
        assert file.attrs["format"] == "vrnn-audio"
        assert file.attrs["version"] == 1
        assert file.attrs["sample_rate"] == 16_000


def test_pcm_of_every_type_becomes_the_same_int16(tmp_path):
    x = noise(200_000)
    x[:2] = -32768, 32767
    same = [
        x,
        x.astype(">i2"),
        x.astype(np.int32),
        x.astype(np.int64),
        x.astype(np.float32),
        x / 32768.0,
        (x / 32768.0).astype(np.float32),
        x.astype(np.int32) * 65536,
        np.stack([x, x[::-1]], 1),
        np.asfortranarray(np.stack([x, x[::-1]], 1)),
        x[:, None],
    ]
    for array in same:
        np.testing.assert_array_equal(converted_array(tmp_path, array), x)


@pytest.mark.parametrize(
    "array, reason",
    (
        (np.zeros(0, np.int16), "no samples"),
        (np.zeros((2, 3, 4), np.int16), "shape"),
        (np.int16(3), "shape"),
        (np.zeros((2, 5000), np.int16), "transpose"),
        (np.zeros(9, complex), "not audio"),
        (np.array(["a"] * 9), "not audio"),
        (np.array([0.0, np.nan]), "NaN or infinity"),
        (np.array([0.0, np.inf]), "NaN or infinity"),
        (np.array([0.5, 70.2]), "peak"),
        (np.array([2**40]), "peak"),
        (np.zeros(9, bool), "not audio"),
        (np.zeros(9, [("a", "i2")]), "not audio"),
        (np.full(9, 32768, np.uint16), "not audio"),
        (np.arange(9, dtype=np.int8), "not audio"),
        (np.arange(9, dtype=np.uint8), "not audio"),
        (np.full(9, 1 << 20), "peak"),
        (np.array([1, 32_769]), "peak"),
        (np.zeros((5000, 1025), np.int16), "channels"),
    ),
)
def test_an_array_that_is_no_audio_is_skipped_with_its_reason(tmp_path, array, reason):
    skipped = converted_array(tmp_path, array)
    assert isinstance(skipped, str)
    assert reason in skipped
    assert "it.npy" in skipped


def ragged(arrays):
    out = np.empty(len(arrays), object)
    out[:] = arrays
    return out


def save_pickled(path, array, pickler=pickle._Pickler):
    """An array of objects as .npy, or as a member `a` of .npz."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, dict(descr="|O", fortran_order=False, shape=array.shape)
    )
    pickler(file, protocol=2).dump(array)
    if path.suffix == ".npy":
        path.write_bytes(file.getvalue())
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", file.getvalue())


class AsPython2(pickle._Pickler):
    """Writes bytes as the str of Python 2, which wrote the 2015 Blizzard files."""

    def save_text(self, data):
        self.write(pickle.BINSTRING + struct.pack("<I", len(data)) + data)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_text}


@pytest.mark.parametrize("pickler", (pickle._Pickler, AsPython2))
@pytest.mark.parametrize("suffix", ("npy", "npz"))
def test_an_array_of_arrays_is_refused_but_for_allow_pickle(tmp_path, suffix, pickler):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "good.npz", **recordings())
    arrays = [
        noise(2_900),
        noise(3_000, 1),
        noise(3_100, 2).astype(np.float32) / 32768,
        np.array(["not audio"]),
    ]
    save_pickled(folder / f"it.{suffix}", ragged(arrays), pickler)
    out, skipped = convert(folder, tmp_path)
    (why,) = skipped
    assert f"it.{suffix}" in why
    assert "--allow_pickle" in why
    assert all(name.startswith("good/") for name in read_back(out)[0])

    out, skipped = convert(folder, tmp_path, force=True, allow_pickle=True)
    audio, _ = read_back(out)
    name = "it" if suffix == "npy" else "it/a"
    assert len(audio) == 15
    assert skipped == [
        f"{folder}/it.{suffix} ({name}/3): its type <U9 is not audio; save int16, int32 or floats"
    ]
    for index, samples in enumerate([*arrays[:2], noise(3_100, 2)]):
        np.testing.assert_array_equal(audio[f"{name}/{index}"], samples)


def test_an_element_that_is_no_array_is_skipped_alone(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    elements = ragged([noise(2_900), [[1, 2], [3]], noise(3_000, 1)])
    np.savez(folder / "it.npz", **recordings(), a=elements)
    out, skipped = convert(folder, tmp_path, allow_pickle=True)
    audio, _ = read_back(out)
    assert len(audio) == 14
    assert {"it/a/0", "it/a/2"} <= audio.keys()
    (why,) = skipped
    assert why.startswith(f"{folder}/it.npz (it/a/1): it cannot be read (")


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", ("npy", "npz"))
@pytest.mark.parametrize("header", ("object", "damaged"))
def test_nothing_that_a_file_says_is_executed_without_allow_pickle(tmp_path, suffix, header):
    folder = tmp_path / "in"
    harm = tmp_path / "harm"
    folder.mkdir()
    np.savez(folder / "good.npz", **recordings())
    evil = folder / f"evil.{suffix}"
    save_pickled(evil, ragged([Exploit(str(harm)), noise(100)]))
    if header == "damaged":
        # numpy.load takes a file without a header for a pickle
        evil.write_bytes(pickle.dumps(Exploit(str(harm))))
    _, skipped = convert(folder, tmp_path)
    (why,) = skipped
    assert str(evil) in why
    assert not harm.exists()
    if header == "object":
        convert(folder, tmp_path, force=True, allow_pickle=True)
        assert harm.exists()  # so it would have


def test_a_checkpoint_that_would_execute_is_refused(tmp_path):
    harm = str(tmp_path / "harm")
    torch.save(dict(model=Exploit(harm)), tmp_path / "evil.pt")
    with pytest.raises(common.UserError, match="not a usable checkpoint"):
        common.read_checkpoint(tmp_path / "evil.pt", "--init_from")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Exploit(harm)))
    with pytest.raises(common.UserError, match="not a usable checkpoint"):
        common.read_checkpoint(tmp_path / "evil.pt", "--init_from")
    assert not os.path.exists(harm)


def test_names_that_are_no_unicode_are_no_obstacle(tmp_path):
    np.savez(tmp_path / "good.npz", **recordings())
    for name in (b"caf\xe9.wav", b"notes.\xe9"):
        soundfile.write(os.fsencode(tmp_path) + b"/" + name, noise(3_000), RATE, format="WAV")
    result = subprocess.run(
        command("prepare_blizzard", ".", "--valid=.2", "--test=.2"),
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert result.returncode == 0, result.stderr
    assert r"ignored, of other types: 1 .\udce9" in result.stdout
    assert count(tmp_path / "data/blizzard.h5") == 13


def test_an_mp3_of_varying_rate_is_read_as_in_one_piece(tmp_path):
    speech = prepare_blizzard.synthetic_recording(np.random.RandomState(0), 10.0) / 32768
    soundfile.write(tmp_path / "it.mp3", soxr.resample(speech, RATE, 48_000), 48_000)
    whole, rate = soundfile.read(tmp_path / "it.mp3", dtype="float32")
    expected = common.to_int16(32768 * soxr.resample(whole, rate, RATE, quality="VHQ"))
    found = np.concatenate(list(prepare_blizzard.sound_file_blocks(tmp_path / "it.mp3")))
    assert len(found) == len(expected)
    assert abs(found.astype(int) - expected).max() <= 1


def test_floats_far_above_full_scale_are_refused_in_a_sound_file_as_in_an_array(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "good.npz", **recordings())
    soundfile.write(folder / "loud.wav", noise(9_000).astype(np.float32), RATE, subtype="FLOAT")
    _, skipped = convert(folder, tmp_path)
    (why,) = skipped
    assert re.search("loud.wav: its peak is .* times full scale; scale it", why)


def test_the_splits_depend_on_names_alone(tmp_path):
    """Not on the order of arguments, of a folder's listing or of the members of an archive."""
    names = ["a_1", "a_01", "a_001"]
    in_order = sorted(names, key=common.natural_order)
    assert sorted(names[::-1], key=common.natural_order) == in_order
    for name in ("a_10", "a_2", "a_02"):
        np.save(tmp_path / f"{name}.npy", noise(3_000))
    paths = [tmp_path / f"{name}.npy" for name in ("a_10", "a_2", "a_02")]
    for wanted in (paths, paths[::-1], [tmp_path]):
        found, *_ = prepare_blizzard.find_audio(wanted)
        assert [name for _, name in found] == ["a_02", "a_2", "a_10"]


@pytest.mark.parametrize("suffix", ("wav", "flac", "mp3", "ogg"))
def test_sound_files_are_resampled_to_16_khz_mono(tmp_path, suffix):
    rate, hertz = 44_100, 440.0
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(2 * rate) / rate)
    soundfile.write(tmp_path / f"tone.{suffix}", np.stack([tone, 0 * tone], 1), rate)
    blocks = prepare_blizzard.sound_file_blocks(tmp_path / f"tone.{suffix}")
    audio = np.concatenate(list(blocks)) / 32768
    assert len(audio) == pytest.approx(2 * RATE, abs=0.1 * RATE if suffix == "mp3" else 2)
    middle = audio[RATE // 2 : RATE // 2 + RATE]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == hertz
    assert middle.std() == pytest.approx(0.5 / math.sqrt(2), rel=0.02)


def test_16_khz_pcm16_sound_files_are_taken_exactly(tmp_path):
    x = noise(3 * common.BLOCK)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"x.{suffix}", x, RATE)
        blocks = list(prepare_blizzard.sound_file_blocks(tmp_path / f"x.{suffix}"))
        assert max(map(len, blocks)) <= common.BLOCK  # so that memory does not depend on the length
        np.testing.assert_array_equal(np.concatenate(blocks), x)


def test_the_first_of_two_channels_at_16_khz_is_taken_exactly(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        channels = np.stack([noise(9_000, i), noise(9_000, 9)], axis=1)
        soundfile.write(folder / f"{i}.wav", channels, RATE)
    out, skipped = convert(folder, tmp_path)
    audio, _ = read_back(out)
    assert not skipped
    assert len(audio) == 6
    for name, samples in audio.items():
        np.testing.assert_array_equal(samples, noise(9_000, int(name)))


def test_a_damaged_recording_is_skipped_whole_and_the_others_stay(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    stored = recordings()
    np.savez(folder / "a.npz", **stored)
    np.save(folder / "b.npy", noise(300_000))
    (folder / "b.npy").write_bytes((folder / "b.npy").read_bytes()[:400_000])
    (folder / "c.wav").write_bytes(b"RIFF")
    (folder / "d.npz").write_bytes(b"PK\3\4nothing")
    (folder / "notes.txt").write_text("no audio")
    (folder / ".hidden.wav").write_text("no audio")
    out, skipped = convert(folder, tmp_path)
    assert read_back(out)[0].keys() == {f"a/{name}" for name in stored}
    damaged = [Path(why.split(":")[0]).name for why in skipped]
    assert damaged == ["b.npy", "c.wav", "d.npz"]
    _, _, ignored = prepare_blizzard.find_audio([folder])
    assert ignored == {".txt": 1}
    with pytest.raises(common.UserError, match="b.npy: it cannot be read .mmap length.*--strict"):
        convert(folder, tmp_path, force=True, strict=True)
    assert read_back(out)[0].keys() == {f"a/{name}" for name in stored}  # the old file stays
    assert not list(tmp_path.glob("*.partial"))


def test_linked_folders_are_followed_once_and_what_cannot_be_read_is_reported(tmp_path):
    folder = tmp_path / "in"
    elsewhere = tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    np.savez(elsewhere / "a.npz", **recordings())
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    (folder / "dangling.wav").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "fifo.wav")
    out, skipped = convert(folder, tmp_path)
    assert count(out) == 12
    unreadable = [why.split(": ")[0] for why in skipped]
    assert unreadable == [str(folder / "dangling.wav"), str(folder / "fifo.wav")]
    with pytest.raises(common.UserError, match="dangling.wav.*without --strict"):
        convert(folder, tmp_path, force=True, strict=True)


def test_an_archive_that_expands_beyond_measure_is_refused(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "good.npz", **recordings())
    np.savez_compressed(folder / "bomb.npz", a=np.zeros(20_000_000, np.int16), b=noise(1_000))
    _, skipped = convert(folder, tmp_path)
    (why,) = skipped
    assert re.search("bomb.npz: it expands [0-9,]+-fold", why)


def test_constant_recordings_are_skipped(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(
        folder / "a.npz",
        silence=np.zeros(4_000, np.int16),
        offset=np.full(5_000, 7, np.int16),
        **recordings(),
        none=noise(0),
        none_either=np.zeros(0),
    )
    soundfile.write(folder / "b.wav", noise(0), RATE)
    _, skipped = convert(folder, tmp_path)
    assert skipped == [
        f"{folder}/a.npz (a/none): it holds no samples",
        f"{folder}/a.npz (a/none_either): it holds no samples",
        f"{folder}/a.npz (a/offset): all of its 5,000 samples are the same",
        f"{folder}/a.npz (a/silence): all of its 4,000 samples are the same",
        f"{folder}/b.wav: it holds no samples",
    ]


def crash(path, target):
    if path.stem in ("13", "14"):
        os.abort()
    prepare_blizzard.decode(path, target)


def crash_once(path, target):
    """As where a file leaves damage behind in its decoder that another one meets."""
    crashed = target.with_suffix(".crashed")
    if path.stem == "13" and not crashed.exists():
        crashed.touch()
        os.abort()
    prepare_blizzard.decode(path, target)


def meet_a_full_disk(error, path, target):
    raise error("No space left")


@pytest.mark.parametrize(
    "decode, lost", ((prepare_blizzard.decode, []), (crash, ["13", "14"]), (crash_once, []))
)
def test_sound_files_decoded_ahead_keep_their_order_and_a_crash_costs_its_own_file(
    tmp_path, monkeypatch, decode, lost
):
    folder = tmp_path / "in"
    folder.mkdir()
    lengths = {str(i): 2 * common.BLOCK if i == 0 else 2_000 + i for i in range(40)}
    for name, length in lengths.items():
        soundfile.write(folder / f"{name}.wav", noise(length, int(name)), RATE)
    np.savez(folder / "5b.npz", **recordings(1))  # arrays in between lose nothing either
    monkeypatch.setattr(prepare_blizzard, "decode", decode)
    out, skipped = convert(folder, tmp_path)
    assert skipped == [f"{folder}/{name}.wav: it crashes its decoder" for name in lost]
    audio, splits = read_back(out)
    np.testing.assert_array_equal(audio.pop("5b/rec_0"), recordings(1)["rec_0"])
    for names in splits.values():
        assert names == sorted(names, key=numbers_in)
    assert audio.keys() == lengths.keys() - set(lost)
    for name, samples in audio.items():
        np.testing.assert_array_equal(samples, noise(lengths[name], int(name)))
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["out.h5"]


def test_few_sound_files_are_decoded_ahead_so_that_the_disk_holds_few_of_their_samples(tmp_path):
    for i in range(40):
        soundfile.write(tmp_path / f"{i}.wav", noise(100, i), RATE)
    paths = [tmp_path / f"{i}.wav" for i in range(40)]
    blocks = prepare_blizzard.decoded(paths, tmp_path / "decoded")
    for i in range(20):
        of_recording, _ = next(blocks)
        np.testing.assert_array_equal(np.concatenate(list(of_recording)), noise(100, i))
    time.sleep(0.2)
    held = [int(path.name) for path in (tmp_path / "decoded").iterdir()]
    assert min(held) >= 19
    assert max(held) <= 20 + 2 * os.cpu_count()
    blocks.close()
    assert not (tmp_path / "decoded").exists()


def test_conversion_ends_before_the_disk_is_full_and_leaves_no_file(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    out = tmp_path / "out"
    folder.mkdir()
    np.savez(folder / "a.npz", **recordings())
    with monkeypatch.context() as patch:
        patch.setattr(common, "MIN_FREE", 1 << 60)
        with pytest.raises(common.UserError, match=f"the disk of {out} is nearly full; make room"):
            prepare_blizzard.convert_files([folder], out / "out.h5")
    soundfile.write(folder / "b.wav", noise(5_000), RATE)
    for error in (OSError, common.UserError):  # and does not skip what it had no space for
        monkeypatch.setattr(prepare_blizzard, "decode", functools.partial(meet_a_full_disk, error))
        with pytest.raises(error, match="No space left"):
            prepare_blizzard.convert_files([folder], out / "out.h5")
    assert not list(out.iterdir())


def processes_below(pid):
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout
    found = []
    for child in map(int, listed.split()):
        found += [child, *processes_below(child)]
    return found


def runs(pid):
    """Whether there is such a process, and it is no zombie."""
    try:
        _, after_its_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)
    except OSError:
        return False
    return after_its_name.split()[0] != "Z"


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGKILL))
def test_decoders_end_with_a_conversion_that_is_stopped_and_it_can_be_started_again(
    tmp_path, number
):
    """Stopped alone; test_faults.py stops it with its decoders, as Ctrl-C does."""
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "0.wav", np.tile(noise(44_100), 30), 44_100)
    for i in range(1, 400):
        os.link(folder / "0.wav", folder / f"{i}.wav")
    conversion = Fork("prepare_blizzard", folder, f"--out={tmp_path}/out.h5", cwd=ROOT)
    while not list(tmp_path.glob("out.h5.decoded/1*")):
        assert conversion.poll() is None, conversion.ended().stderr
        time.sleep(0.05)
    decoders = processes_below(conversion.pid)
    assert len(decoders) >= min(2, os.cpu_count())
    conversion.send_signal(number)
    result = conversion.ended()
    deadline = time.monotonic() + 20
    while any(map(runs, decoders)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in decoders if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, result.stderr
    assert "Traceback" not in result.stderr
    if number != signal.SIGKILL:
        assert result.returncode == 128 + number
        assert list(tmp_path.iterdir()) == [folder]
    for i in range(12, 400):
        (folder / f"{i}.wav").unlink()
    convert(folder, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.h5"}


def test_a_decoder_leaves_ctrl_c_to_its_parent():
    with prepare_blizzard.new_process() as process:
        assert process.submit(signal.raise_signal, signal.SIGINT).exception() is None


def test_two_conversions_cannot_write_the_same_file(tmp_path):
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/a.npz", **recordings())
    (tmp_path / "out.h5.partial").touch()
    other = common.lock(tmp_path / "out.h5.partial")
    with pytest.raises(
        common.UserError, match="out.h5.partial is being written by another process"
    ):
        convert(tmp_path / "in", tmp_path)
    os.close(other)
    convert(tmp_path / "in", tmp_path)


def test_a_recording_named_twice_is_taken_once(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "a.npz", **recordings())
    thrice = [folder, folder, folder / "a.npz"]
    prepare_blizzard.convert_files(thrice, tmp_path / "out.h5", 0.2, 0.2)
    assert count(tmp_path / "out.h5") == 12


@pytest.mark.parametrize(
    "header",
    (
        "{'descr': '<i2', 'shape': (",
        "{[]: 1}",
        "{'descr': '<i2', 'fortran_order': False, 'shape': (1099511627776, 9), }",
    ),
)
def test_a_hostile_header_costs_its_own_file_only(tmp_path, header):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "good.npz", **recordings())
    text = header.encode().ljust(117) + b"\n"
    magic = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
    (folder / "it\u00b2.npy").write_bytes(magic + text)
    _, skipped = convert(folder, tmp_path)
    (why,) = skipped
    assert "it\u00b2.npy" in why


def test_convert_refuses_what_it_cannot_do_and_leaves_no_file(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "a.npz", **recordings(3))
    with pytest.raises(common.UserError, match="leave none for the split test"):
        convert(folder, tmp_path, valid=0.05, test=0.05)
    with pytest.raises(common.UserError, match="does not exist"):
        convert(folder / "missing", tmp_path)
    with pytest.raises(common.UserError, match="must be above 0"):
        convert(folder, tmp_path, valid=0.6, test=0.5)
    np.savez(folder / "a.npz", **{f"silence_{i}": np.zeros(5_000, np.int16) for i in range(9)})
    with pytest.raises(common.UserError, match="all of its 5,000 samples are the same"):
        convert(folder, tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


def write_corpus(path, change=lambda file: None):
    with h5py.File(path, "w") as file:
        file.attrs.update(format="vrnn-audio", version=1, sample_rate=RATE, mean=0.0, std=1.0)
        for split in common.SPLITS:
            file[f"{split}/audio"] = noise(1_000)
            file[f"{split}/offsets"] = np.array([0, 400, 1_000])
        change(file)
    return path


@pytest.mark.parametrize(
    "change, reason",
    (
        (lambda file: file.attrs.update(format="other"), "not of format vrnn-audio"),
        (lambda file: file.attrs.update(version=2), "not of .* version 1"),
        (lambda file: file.attrs.update(std=0.0), "mean and std"),
        (lambda file: file.attrs.update(sample_rate=44_100), "not of .* sample_rate 16000"),
        (lambda file: file.attrs.__delitem__("sample_rate"), "not of .* sample_rate 16000"),
        (lambda file: file.__delitem__("test"), "not readable HDF5 .*test"),
        (
            lambda file: file["valid/offsets"].write_direct(np.array([0, 400, 900])),
            "inconsistent offsets",
        ),
        (
            lambda file: file["valid/offsets"].write_direct(np.array([0, 1_400, 1_000])),
            "inconsistent offsets",
        ),
    ),
)
def test_an_inconsistent_hdf5_file_is_refused_by_name(tmp_path, change, reason):
    path = write_corpus(tmp_path / "x.h5", change)
    with pytest.raises(common.UserError, match=reason) as error:
        common.open_corpus(path)
    assert str(path) in str(error.value)
    assert "prepare_blizzard.py" in str(error.value)


class InMemory:
    """A Split of numbered samples: sample i of the split is i."""

    def __init__(self, lengths):
        self.name = "train"
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])

    def read(self, starts, samples):
        return np.asarray(starts)[:, None] + np.arange(samples)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=20),
    batch=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_excerpts_lie_inside_one_recording_overlap_nowhere_and_depend_on_seed_and_epoch_alone(
    lengths, batch, epoch
):
    x_dim, frames, reset_freq = 5, 3, 2
    sizes = (x_dim, frames, reset_freq, batch)
    samples = x_dim * frames * reset_freq
    split = InMemory(lengths)
    if sum(length // samples for length in lengths) < batch:
        with pytest.raises(common.UserError, match="--batch_size"):
            common.Excerpts(split, *sizes, seed=7)
        return
    excerpts = common.Excerpts(split, *sizes, seed=7)
    first = epoch * excerpts.batches_per_epoch
    groups = [excerpts.batch(first + i) for i in range(excerpts.batches_per_epoch)]
    again = common.Excerpts(split, *sizes, seed=7)
    for i in reversed(range(len(groups))):
        assert torch.equal(again.batch(first + i), groups[i])

    assert groups[0].shape == (reset_freq, frames, batch, x_dim)
    # (excerpts, samples), windows back in order
    runs = torch.cat(groups, dim=2).permute(2, 0, 1, 3).flatten(1)
    assert (runs.diff(dim=1) == 1).all()
    recording = np.searchsorted(split.offsets, runs.numpy(), side="right")
    assert (recording == recording[:, :1]).all()
    assert len(runs.flatten().unique()) == runs.numel()


def test_epochs_differ_in_order_and_offset():
    excerpts = common.Excerpts(InMemory([1_000, 1_017]), 5, 3, 2, 4, seed=0)
    starts = []
    for epoch in range(3):
        batch = excerpts.batch(epoch * excerpts.batches_per_epoch)
        starts.append(batch[0, 0, :, 0])
    offsets = [set((of_epoch % 30).tolist()) for of_epoch in starts]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
    assert offsets[0] != offsets[1]


def test_held_out_windows_tile_every_recording():
    starts = common.piece_starts(InMemory([25, 9, 10, 31]), 10)
    assert starts.tolist() == [0, 10, 34, 44, 54, 64]
    assert common.piece_starts(InMemory([1_000]), 10, at_most=3).tolist() == [0, 500, 990]


def test_normalisation_and_dequantisation():
    corpus = SimpleNamespace(mean=3.0, std=2.0)
    pcm = torch.randint(-100, 100, (50, 40)).short()
    torch.testing.assert_close(common.normalise(pcm, corpus), (pcm.float() - 3) / 2)
    uniform = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
    spread = common.normalise(pcm, corpus, uniform) * 2 + 3 - pcm
    assert spread.min() >= -0.5
    assert spread.max() <= 0.5
    assert abs(spread.mean()) < 0.02
    assert spread.var() == pytest.approx(1 / 12, rel=0.05)


def test_demo_speech_is_the_same_every_time_and_sounds_and_pauses(tmp_path):
    prepare_blizzard.write_demo(tmp_path / "a", minutes=1)
    prepare_blizzard.write_demo(tmp_path / "b", minutes=1)
    first = np.load(tmp_path / "a/demo_0.npz")
    second = np.load(tmp_path / "b/demo_0.npz")
    assert len(first.files) == 12
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])
    audio = np.concatenate([first[name] for name in first.files]).astype(float)
    level = audio.reshape(-1, 400).std(1)
    assert np.quantile(level, 0.05) < 50
    assert np.quantile(level, 0.5) > 300
    assert audio.std() > 800
    assert abs(audio).max() < 32_767


def test_demo_data_say_in_the_file_that_they_are_synthetic(tmp_path, monkeypatch):
    of_one_minute = functools.partial(prepare_blizzard.write_demo, minutes=1)
    monkeypatch.setattr(prepare_blizzard, "write_demo", of_one_minute)
    prepare_blizzard.make_demo_data(tmp_path / "demo.h5", tmp_path / "demo", seed=3)
    assert count(tmp_path / "demo.h5") == 12
    created_by = common.open_corpus(tmp_path / "demo.h5").created_by
    assert created_by == f"{common.SYNTHETIC}, seed 3"
    assert "not speech" in created_by


def test_the_splits_of_demo_data_have_the_shares_that_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of_one_minute = functools.partial(prepare_blizzard.write_demo, minutes=1)
    monkeypatch.setattr(prepare_blizzard, "write_demo", of_one_minute)
    for flags, shares in (("", (9, 2, 1)), ("--valid=.25 --test=.5 --force", (3, 3, 6))):
        monkeypatch.setattr(sys, "argv", ["prepare_blizzard.py", "--demo", *flags.split()])
        prepare_blizzard.main()
        counts = [recordings for recordings, _ in sizes("data/demo.h5").values()]
        assert tuple(counts) == shares


@pytest.fixture
def outcome(tmp_path, monkeypatch, capsys):
    """A function from flags to status, output and errors of the script, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["prepare_blizzard.py", *flags])
        try:
            status = common.run_as_script(prepare_blizzard.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


SHARES = ("--valid=.2", "--test=.2")


def write_pickled_recordings(folder):
    """Twelve recordings, one that is a sample short of a training excerpt, and one that is not."""
    arrays = [*recordings().values(), noise(31_999), noise(32_000)]
    save_pickled(folder / "it.npy", ragged(arrays))


def test_the_command_line_has_help(outcome):
    status, output, _ = outcome("--help")
    assert not status
    assert "executes what the file says" in " ".join(output.replace("│", " ").split())


def test_the_command_line_refuses_a_pickle_but_for_allow_pickle(tmp_path, outcome):
    write_pickled_recordings(tmp_path)
    (tmp_path / "notes.txt").touch()
    status, output, errors = outcome("it.npy", *SHARES)
    assert status == 2
    assert output == ""
    assert re.fullmatch("error: 0 usable .*it.npy: .*--allow_pickle .*\n", errors)
    status, output, _ = outcome(".", *SHARES, "--allow_pickle")
    assert not status
    assert "skipped: 0" in output
    assert re.search("total +14 .* 126,441\n", output)
    assert "of 2 s: 13 recordings, 5.90 s\n" in output
    assert "ignored, of other types: 1 .txt\n" in output
    assert count(tmp_path / "data/blizzard.h5") == 14


@pytest.mark.parametrize(
    "flags",
    (
        ["nowhere"],
        ["it.npy", "--demo"],
        [],
        ["it.npy", "--allow_pickles"],
        ["it.npy", "--valid=half"],
        ["it.npy", "--valid"],
        ["--demo", "--seed=-1"],
        ["--demo", "--seed=4294967296"],
        ["it.npy", "--allow_pickle", "--out=there.h5", *SHARES],
    ),
)
def test_the_command_line_answers_bad_input_in_one_sentence(tmp_path, outcome, flags):
    write_pickled_recordings(tmp_path)
    (tmp_path / "there.h5").touch()
    status, output, errors = outcome(*flags)
    assert status == 2
    assert output == ""
    assert re.fullmatch("error: [^\n]+\n", errors)
