"""Faults that users of such software met, and the other ways into each kind of them."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
from tiny import ROOT, Fork, command
from tiny import run as run_script

import common
import prepare_blizzard

pytestmark = pytest.mark.usefixtures("without_filter")

RATE = common.SAMPLE_RATE


def noise(samples, seed=0):
    return np.random.default_rng(seed).integers(-9_000, 9_000, samples).astype(np.int16)


def write_good(folder, count=12, samples=5_000):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "good.npz", **{f"rec_{i}": noise(samples, seed=i) for i in range(count)})


def skipped_of(folder, out, **options):
    skipped, _ = prepare_blizzard.convert_files([folder], out, 0.2, 0.2, **options)
    return skipped


def names_in(path):
    with h5py.File(path) as file:
        return [name.decode() for split in common.SPLITS for name in file[split]["names"]]


def one_sentence(result):
    """What an error says, of a script that ended with status 2."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert re.fullmatch("error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


# ---- writes that fail ----


@pytest.mark.parametrize("kilobytes", (0, 9, 700))
def test_a_limit_on_the_size_of_files_ends_a_conversion_in_one_sentence(tmp_path, kilobytes):
    folder = tmp_path / "in"
    write_good(folder, samples=30_000)
    soundfile.write(folder / "a.wav", noise(90_000), RATE)
    script = " ".join(command("prepare_blizzard", folder, f"--out={tmp_path}/out.h5"))
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f {kilobytes}; {script} --valid=.2 --test=.2 2>&1 | cat 1>&2; "
         "exit ${PIPESTATUS[0]}"],
        text=True,
        capture_output=True,
    )  # fmt: skip
    said = one_sentence(result)
    assert f"{tmp_path}/out.h5" in said and "give another --out" in said
    assert list(tmp_path.iterdir()) == [folder]


WITHIN_A_LIMIT = """
import os, resource, sys
sys.path.insert(0, {root!r})
import numpy as np
import common, prepare_blizzard

prepare_blizzard.fitted_filter = lambda corpus: None  # it takes a step for every sample

def convert(limit=None):
    random = np.random.default_rng(0)
    blocks = [random.integers(-99, 99, 40_000).astype(np.int16) for _ in range(3)]
    found = (common.Recording("it", f"rec_{{i}}", iter(blocks)) for i in range(9))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    shares = dict(train=0.6, valid=0.2, test=0.2)
    out = prepare_blizzard.Path({out!r})
    common.convert(found, out, shares, complete=prepare_blizzard.add_yardsticks)

convert()
size = os.path.getsize({out!r})
os.unlink({out!r})
limits = [*range(0, 16_000, 5_000), *range(16_000, size, size // 4), *range(size - 4_000, size, 1_333)]
for limit in limits:
    child = os.fork()
    if child == 0:
        try:
            convert(limit)
        except common.UserError as error:
            os._exit(0 if "File too large" in str(error) else 3)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    print(limit, "ended with", status, os.listdir(os.path.dirname({out!r})))
"""


def test_hdf5_survives_the_end_of_its_space_at_any_place(tmp_path):
    script = WITHIN_A_LIMIT.format(root=str(ROOT), out=str(tmp_path / "out.h5"))
    result = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    lines = result.stdout.splitlines()
    assert len(lines) > 10, result.stderr
    assert all(line.endswith("ended with 0 []") for line in lines), result.stdout


def test_what_a_killed_conversion_left_is_neither_in_the_way_nor_in_the_file(tmp_path):
    write_good(tmp_path / "in")
    skipped_of(tmp_path / "in", tmp_path / "out.h5")
    expected = (tmp_path / "out.h5").stat().st_size
    (tmp_path / "out.h5.partial").write_bytes(b"x" * 3 * expected)
    (tmp_path / "out.h5.decoded").mkdir()
    (tmp_path / "out.h5.decoded/0").touch()
    skipped_of(tmp_path / "in", tmp_path / "out.h5", force=True)
    assert (tmp_path / "out.h5").stat().st_size == expected
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.h5"}


def test_a_write_that_is_only_begun_is_gone_on_with(tmp_path, monkeypatch):
    class Halting(common.io.FileIO):
        def write(self, data):
            return super().write(data[: max(1, len(data) // 2)])

    class Safe(common.SafeFile, Halting):
        pass

    write_good(tmp_path / "in")
    monkeypatch.setattr(common, "SafeFile", Safe)
    skipped_of(tmp_path / "in", tmp_path / "out.h5")
    monkeypatch.undo()
    skipped_of(tmp_path / "in", tmp_path / "other.h5")
    one, other = (h5py.File(tmp_path / name) for name in ("out.h5", "other.h5"))
    with one, other:
        for split in common.SPLITS:
            for name in ("audio", "offsets", "names"):
                assert (one[split][name][:] == other[split][name][:]).all()
        assert dict(one.attrs) == dict(other.attrs)


# ---- output that cannot be printed ----


@pytest.mark.parametrize("closed", ("1>&-", "2>&-", "1>&- 2>&-", "1>/dev/full 2>/dev/full"))
def test_a_conversion_does_not_need_its_output(tmp_path, closed):
    write_good(tmp_path / "in")
    # Shorter than a window: without one no filter is fitted.
    soundfile.write(tmp_path / "in/a.wav", noise(7_000), RATE)
    script = " ".join(command("prepare_blizzard", tmp_path / "in", f"--out={tmp_path}/out.h5"))
    result = subprocess.run(["bash", "-c", f"{script} --valid=.2 --test=.2 {closed}"])
    assert result.returncode == 0
    assert len(names_in(tmp_path / "out.h5")) == 13


# ---- requests to end ----


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def processes_of_group(group):
    found = subprocess.run(["pgrep", "-g", str(group)], text=True, capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("number", (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT))
def test_a_request_to_end_to_every_process_of_a_conversion_leaves_nothing(tmp_path, number):
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "0.wav", np.tile(noise(44_100), 60), 44_100)
    for i in range(1, 200):
        os.link(folder / "0.wav", folder / f"{i}.wav")
    conversion = Fork("prepare_blizzard", folder, f"--out={tmp_path}/out.h5", cwd=ROOT, group=True)
    while not list(tmp_path.glob("out.h5.decoded/1*")):
        assert conversion.poll() is None
        time.sleep(0.05)
    os.killpg(conversion.pid, number)
    result = conversion.ended()
    deadline = time.monotonic() + 20
    while any(map(runs, processes_of_group(conversion.pid))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, processes_of_group(conversion.pid)))
    assert result.returncode == 128 + number and result.stderr == ""
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("number", prepare_blizzard.STOPS)
def test_a_decoder_leaves_requests_to_end_to_its_parent(number):
    with prepare_blizzard.new_process() as process:
        assert process.submit(signal.raise_signal, number).exception() is None


# ---- one recording in several files ----


def test_of_files_that_differ_in_their_suffix_alone_one_is_taken_and_the_others_are_named(tmp_path):
    folder = tmp_path / "in"
    write_good(folder)
    (folder / "deeper").mkdir()
    for name in ("a.wav", "a.flac", "a.ogg", "b.mp3", "b.WAV", "deeper/a.wav", "e.mp3", "a.x.mp3"):
        soundfile.write(folder / name, noise(9_000), RATE)
    for name in ("a.npy", "e.npy", "f.npy"):
        np.save(folder / name, noise(9_000))
    np.savez(folder / "f.npz", g=noise(9_000))
    skipped = skipped_of(folder, tmp_path / "out.h5")
    reasons = dict(line.removeprefix(f"{folder}/").split(": ") for line in skipped)
    assert reasons == {
        "a.npy": "the same recording as a.flac",
        "a.ogg": "the same recording as a.flac",
        "a.wav": "the same recording as a.flac",
        "b.mp3": "the same recording as b.WAV",
        "e.mp3": "the same recording as e.npy",
        "f.npy": "the same recording as f.npz",
    }
    others = {name for name in names_in(tmp_path / "out.h5") if not name.startswith("good/")}
    assert others == {"a", "b", "deeper/a", "e", "a.x", "f/g"}
    with pytest.raises(common.UserError, match="a.wav: the same recording as a.flac; .*--strict"):
        skipped_of(folder, tmp_path / "strict.h5", strict=True)


def test_files_that_are_named_one_by_one_or_through_a_link_are_compared_as_well(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    for name in ("a.wav", "a.flac", "b.wav"):
        soundfile.write(folder / name, noise(9_000), RATE)
    paths = [folder / "a.wav", tmp_path / "link/a.flac", folder / "b.wav"]
    files, unusable, _ = prepare_blizzard.find_audio(paths)
    assert {path.name for path, _ in files} == {"a.flac", "b.wav"}
    assert unusable == [(folder / "a.wav", "the same recording as a.flac")]


# ---- parts of sound files that are missing ----


def sound(suffix, tmp_path, seconds=3.0, **options):
    """The bytes of a sound file."""
    path = tmp_path / f"made.{suffix}"
    samples = prepare_blizzard.synthetic_recording(np.random.RandomState(0), seconds)
    soundfile.write(path, samples / 32768, RATE, **options)
    data = path.read_bytes()
    path.unlink()
    return data


def why_not(data, suffix, tmp_path):
    """Why a file of these bytes is refused; None if it is not, and then its samples."""
    path = tmp_path / f"it.{suffix}"
    path.write_bytes(data)
    try:
        blocks = list(prepare_blizzard.sound_file_blocks(path))
    except common.BadAudio as why:
        return str(why), None
    return None, np.concatenate(blocks)


SOUNDS = (
    ("wav", {}),
    ("wav", dict(subtype="FLOAT")),
    ("wav", dict(subtype="IMA_ADPCM")),
    ("wav", dict(format="WAVEX")),
    ("wav", dict(format="RF64")),
    ("wav", dict(format="W64")),
    ("wav", dict(format="AIFF")),
    ("wav", dict(format="AU")),
    ("flac", {}),
    ("mp3", {}),
    ("mp3", dict(bitrate_mode="CONSTANT", compression_level=0.0)),
    ("mp3", dict(bitrate_mode="VARIABLE", compression_level=0.5)),
    ("ogg", {}),
    ("ogg", dict(format="OGG", subtype="OPUS")),
)


@pytest.mark.parametrize("suffix, options", SOUNDS)
def test_a_sound_file_that_is_cut_anywhere_is_refused_and_the_whole_one_is_not(
    tmp_path, suffix, options
):
    data = sound(suffix, tmp_path, seconds=12.0, **options)
    reason, samples = why_not(data, suffix, tmp_path)
    assert reason is None and abs(len(samples) - 12 * RATE) < 2_000
    for length in (len(data) // 3, len(data) // 2, len(data) // 2 + 1, len(data) - 1):
        reason, _ = why_not(data[:length], suffix, tmp_path)
        assert reason and re.search("cut short|cannot be read", reason), length


@pytest.mark.parametrize("suffix", ("flac", "mp3", "ogg"))
def test_a_sound_file_that_is_cut_between_two_frames_or_pages_is_refused(tmp_path, suffix):
    data = sound(suffix, tmp_path, seconds=12.0)
    sync = dict(flac=b"\xff\xf8", mp3=data[:2], ogg=b"OggS")[suffix]
    for place in range(5):
        end = data.index(sync, len(data) // 4 + place * len(data) // 8)
        reason, _ = why_not(data[:end], suffix, tmp_path)
        assert reason and re.search("cut short|cannot be read", reason)


@pytest.mark.parametrize("suffix", ("wav", "flac", "mp3", "ogg"))
def test_a_second_recording_behind_the_first_is_not_lost_in_silence(tmp_path, suffix):
    first = sound(suffix, tmp_path)
    second = sound(suffix, tmp_path, 2.0)
    reason, _ = why_not(first + second, suffix, tmp_path)
    assert reason and re.search("second recording|cannot be read", reason)


def without_header(mp3):
    """MPEG frames without the one that says how many they are."""
    return mp3[prepare_blizzard.mp3_frame(mp3, 0)[0] :]


def test_mp3_files_without_a_header_or_with_tags_are_taken_whole(tmp_path):
    constant_rate = dict(bitrate_mode="CONSTANT", compression_level=0.0)
    bare = without_header(sound("mp3", tmp_path, **constant_rate))
    _, one = why_not(bare, "mp3", tmp_path)
    _, two = why_not(bare + bare, "mp3", tmp_path)
    assert len(two) == 2 * len(one) >= 6 * RATE
    id3 = b"ID3\4\0\0\0\0\1\0" + bytes(128)
    for data in (id3 + bare, bare + b"TAG" + bytes(125), id3 + sound("mp3", tmp_path), bare + id3):
        reason, samples = why_not(data, "mp3", tmp_path)
        assert reason is None and len(samples) >= 3 * RATE
    reason, _ = why_not(bare[:-1], "mp3", tmp_path)
    assert "cut short in its last frame" in reason


def test_an_mp3_whose_length_the_decoder_underestimates_is_refused(tmp_path):
    data = sound("mp3", tmp_path, seconds=12.0, bitrate_mode="VARIABLE")
    bare = without_header(data)
    reason, _ = why_not(bare, "mp3", tmp_path)
    assert re.search("its decoder would find [0-9,]+ of about [0-9,]+ samples", reason)


def test_an_mp3_with_more_frames_than_its_header_claims_is_refused(tmp_path):
    data = sound("mp3", tmp_path)
    reason, _ = why_not(data + without_header(data), "mp3", tmp_path)
    assert re.search("header claims [0-9]+ frames, but [0-9]+ are there", reason)


@pytest.mark.parametrize(
    "layer, bits, length, samples", ((1, 3, 104, 384), (2, 2, 313, 1152), (3, 1, 313, 1152))
)
def test_mpeg_frames_have_the_length_of_the_standard(layer, bits, length, samples):
    # 96, 96 and 96 kbit/s at 44,100 Hz: 12 * 96,000 / 44,100 words, 144 * 96,000 / 44,100 bytes
    rate = {1: 3, 2: 6, 3: 7}[layer]
    header = 0xFFE << 20 | 3 << 19 | bits << 17 | 1 << 16 | rate << 12
    assert prepare_blizzard.mp3_frame(header.to_bytes(4, "big"), 0) == (length, samples)


def with_sizes(wav, size):
    """A .wav file that claims to hold so many bytes."""
    at = wav.index(b"data") + 4
    claim = struct.pack("<I", size)
    return wav[:4] + claim + wav[8:at] + claim + wav[at + 4 :]


@pytest.mark.parametrize("size", (0xFFFF_FFFF, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000))
def test_a_wav_from_a_pipe_that_claims_the_largest_size_is_read_to_its_end(tmp_path, size):
    data = sound("wav", tmp_path)
    _, expected = why_not(data, "wav", tmp_path)
    reason, samples = why_not(with_sizes(data, size), "wav", tmp_path)
    assert reason is None
    np.testing.assert_array_equal(samples, expected)


def test_a_wav_that_claims_no_samples_is_refused_where_some_follow(tmp_path):
    data = sound("wav", tmp_path)
    reason, _ = why_not(with_sizes(data, 0), "wav", tmp_path)
    assert reason.startswith("its header claims no samples, but 96,000 bytes follow")
    reason, samples = why_not(with_sizes(data, 0)[:44], "wav", tmp_path)
    assert reason is None and len(samples) == 0  # and convert says that it holds none


def test_a_flac_from_a_pipe_is_read_to_its_end_and_refused_where_that_is_damaged(tmp_path):
    data = bytearray(sound("flac", tmp_path))
    data[21] &= 0xF0  # the 36 bits of the number of samples
    data[22:26] = bytes(4)
    reason, samples = why_not(bytes(data), "flac", tmp_path)
    assert reason is None and len(samples) == 3 * RATE
    reason, _ = why_not(bytes(data[:-9]), "flac", tmp_path)
    assert "cannot be read" in reason


def test_half_files_are_listed_and_an_error_with_strict(tmp_path):
    folder = tmp_path / "in"
    write_good(folder)
    for suffix in ("wav", "flac", "mp3", "ogg"):
        data = sound(suffix, tmp_path)
        (folder / f"{suffix}.{suffix}").write_bytes(data[: len(data) // 2])
    skipped = skipped_of(folder, tmp_path / "out.h5")
    assert [Path(line.split(": ")[0]).suffix for line in skipped] == [
        ".flac",
        ".mp3",
        ".ogg",
        ".wav",
    ]
    with pytest.raises(common.UserError, match="flac.flac: .*without --strict"):
        skipped_of(folder, tmp_path / "strict.h5", strict=True)


def test_a_damaged_archive_is_skipped_with_what_is_wrong_with_it(tmp_path):
    folder = tmp_path / "in"
    write_good(folder)
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:-30])
    skipped = skipped_of(folder, tmp_path / "out.h5")
    assert skipped == [f"{folder}/cut.npz: it cannot be read (File is not a zip file)"]


# ---- processes ----


def test_there_are_no_more_decoders_than_cores_that_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_blizzard, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 8, 9})
    assert prepare_blizzard.cores() == 3
    monkeypatch.setattr(os, "process_cpu_count", lambda: 5, raising=False)
    assert prepare_blizzard.cores() == 5
    for text, count in (("max 100000", 5), ("150000 100000", 2), ("50000 100000", 1), ("", 5)):
        (tmp_path / "cpu.max").write_text(text)
        assert prepare_blizzard.cores() == count
    (tmp_path / "cpu.max").unlink()
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert prepare_blizzard.cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert prepare_blizzard.cores() == 1


@pytest.mark.parametrize("cores, files, expected", ((64, 40, 16), (64, 3, 3), (2, 40, 2)))
def test_decoders_are_few_on_large_machines_and_for_few_files(
    tmp_path, monkeypatch, cores, files, expected
):
    made = []
    new_process = prepare_blizzard.new_process
    monkeypatch.setattr(prepare_blizzard, "cores", lambda: cores)
    monkeypatch.setattr(
        prepare_blizzard, "new_process", lambda: made.append(new_process()) or made[-1]
    )
    for i in range(files):
        (tmp_path / f"{i}.wav").touch()
    paths = [tmp_path / f"{i}.wav" for i in range(files)]
    decodings = prepare_blizzard.decoded(paths, tmp_path / "decoded")
    _, problem = next(decodings)
    decodings.close()
    assert len(made) == expected and "Format not recognised" in problem


# ---- where to write ----


@pytest.mark.parametrize(
    "out, reason",
    (
        ("folder", "is a folder; name a file in it"),
        ("", "is a folder; name a file in it"),
        ("file/x.h5", "cannot be made or written to"),
        ("/proc/x/y.h5", "cannot be made or written to"),
        ("/dev/null", "is no regular file"),
        ("loop", "is no regular file"),
        ("in/good.npz", "has the name of a recording"),
        ("x" * 300 + ".h5", "x.h5"),
        ("x" * 250 + ".h5", "x.h5"),
    ),
)
def test_an_output_that_cannot_be_written_is_refused_before_the_conversion(
    tmp_path, monkeypatch, out, reason
):
    monkeypatch.chdir(tmp_path)
    write_good(tmp_path / "in")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(prepare_blizzard, "recordings_in", lambda *_: (1 / 0 for _ in "x"))
    with pytest.raises((common.UserError, OSError)) as error:
        prepare_blizzard.convert_files(["in"], out, force=True)
    said = common.explanation(error.value)
    assert reason in said and "\n" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_that_is_read_only_is_refused_before_the_conversion(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prepare_blizzard.tempfile, "TemporaryFile", refuse)  # root may write all
    with pytest.raises(
        common.UserError, match=f"{tmp_path} cannot be .* .Permission denied.; give"
    ):
        prepare_blizzard.convert_files([tmp_path], tmp_path / "out.h5")


def test_an_output_through_a_link_goes_to_what_the_link_leads_to(tmp_path):
    write_good(tmp_path / "in")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.h5").symlink_to("disk/it.h5")  # nothing there yet
    for force in (False, True):
        skipped_of(tmp_path / "in", tmp_path / "link.h5", force=force)
        assert (tmp_path / "link.h5").is_symlink()
        assert len(names_in(tmp_path / "disk/it.h5")) == 12
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["it.h5"]
    with pytest.raises(common.UserError, match="link.h5 already exists; pass --force"):
        skipped_of(tmp_path / "in", tmp_path / "link.h5")


def test_a_tilde_in_the_output_is_the_home_folder(tmp_path, monkeypatch):
    write_good(tmp_path / "in")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = ("in", "--valid=.2", "--test=.2", "--out")
    result = run_script("prepare_blizzard", *flags, "~/deep/x.h5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(names_in(tmp_path / "home/deep/x.h5")) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"in", "home"}
