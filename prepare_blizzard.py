"""Recordings to the HDF5 file that the training scripts read.

    python prepare_blizzard.py FILES AND FOLDERS --out data/blizzard.h5

Takes .npz (every array in it), .npy and sound files (.wav .flac .mp3 .ogg, resampled to 16 kHz),
the first channel of each. Arrays are (samples,) or (samples, channels). An array of arrays, the
form of the 2015 Blizzard files, is a pickle and is read with --allow_pickle only. Recordings are
taken in natural order and go, whole, to the split that is furthest below its share. Unusable files
are skipped and listed with the reason. The file also says what a model has to beat on its test
split: FLAC, an adaptive filter and the histogram of the samples.
"""

import collections
import contextlib
import io
import math
import mmap
import multiprocessing
import multiprocessing.resource_tracker
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from tqdm import tqdm
from tyro.conf import Positional

import common
from common import SAMPLE_RATE, BadAudio, Recording, UserError

ARRAY_SUFFIXES = (".npz", ".npy")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
# of files that differ in this alone the first is taken: what loses nothing before what does
PREFERRED = (".flac", ".wav", ".npz", ".npy", ".ogg", ".mp3")
# a training excerpt at published sizes: reset_freq 4 of 40 frames of 200 samples
EXCERPT_SECONDS = 2.0


def convert_files(
    paths,
    out,
    valid=0.05,
    test=0.05,
    force=False,
    strict=False,
    allow_pickle=False,
    created_by="prepare_blizzard.py",
):
    """Convert the recordings in files and folders to one HDF5 file.

    Returns what was skipped, ["source: why"], and {suffix: count} of the files in folders that are
    of no known type. Raises UserError.
    """
    if not (0 < valid and 0 < test and valid + test < 1):
        raise UserError(f"--valid={valid} and --test={test} must be above 0 and sum to less than 1")
    shares = dict(train=1 - valid - test, valid=valid, test=test)
    out = output_file(out, force)
    files, unusable, ignored = find_audio(paths)
    folder = Path(f"{out}.decoded")
    with contextlib.closing(recordings_in(files, unusable, folder, allow_pickle)) as recordings:
        skipped = common.convert(recordings, out, shares, strict, created_by, add_yardsticks)
    return skipped, ignored


def output_file(out, force):
    """The file of --out behind all links, in a folder that is there. Raises UserError."""
    # through a link to what it leads to, which would otherwise be replaced itself
    path = Path(os.path.realpath(os.path.expanduser(out)))
    if path.is_dir():
        raise UserError(f"--out={out} is a folder; name a file in it, as {path}/blizzard.h5")
    if path.suffix.lower() in ARRAY_SUFFIXES + AUDIO_SUFFIXES:
        raise UserError(f"--out={out} has the name of a recording; let it end in .h5")
    if os.path.lexists(path):
        if not path.is_file():
            raise UserError(f"--out={out} is no regular file; give the name of one")
        if not force:
            raise UserError(
                f"{out} already exists; pass --force to replace it, or give another --out"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # as soon as possible, not after hours
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written: {path.parent} cannot be made or written to "
            f"({error.strerror}); give another --out"
        ) from error
    return path


def recordings_in(files, unusable, folder, allow_pickle=False):
    """Yield a Recording for each, and for each file that is unusable as a whole.

    Decoded samples go through `folder`.
    """
    shutil.rmtree(folder, ignore_errors=True)  # left by a conversion that was killed
    for path, why in unusable:
        yield Recording(path, "", problem=why)
    sound_files = [path for path, _ in files if path.suffix.lower() in AUDIO_SUFFIXES]
    with contextlib.closing(decoded(sound_files, folder)) as decodings:
        for path, name in tqdm(files, unit=" files", disable=not is_terminal(sys.stderr)):
            suffix = path.suffix.lower()
            if suffix in AUDIO_SUFFIXES:
                blocks, problem = next(decodings)
                yield Recording(path, name, blocks, problem)
            elif suffix in ARRAY_SUFFIXES:
                yield from recordings_in_arrays(path, name, allow_pickle)
            else:
                known = " ".join(ARRAY_SUFFIXES + AUDIO_SUFFIXES)
                problem = f"its type is not one of {known}; convert it to .wav"
                yield Recording(path, name, problem=problem)


def is_terminal(stream):
    return stream is not None and stream.isatty()


def recordings_in_arrays(path, name, allow_pickle):
    """Yield a Recording for each in a .npz or .npy file."""
    try:
        for recording in common.array_recordings(path, name, allow_pickle):
            if recording.name != name:
                recording.source = f"{path} ({recording.name})"
            yield recording
    except BadAudio as why:
        yield Recording(path, name, problem=str(why))
    except OSError as error:
        yield Recording(path, name, problem=cannot_be_read(error))


def cannot_be_read(error):
    return f"it cannot be read ({common.first_line(error)})"


# ---- finding files -------------------------------------------------------------------------------


def find_audio(paths):
    """Files among `paths` and in the folders among them, in natural order, each once, none hidden.

    Returns [(file, name)], [(file or folder, why)] of what cannot be read, and {suffix: count}
    of the files in folders that are of no known type. The name is the path below the folder,
    without its suffix. Linked folders are followed, each once. Raises UserError where a path does
    not exist.
    """
    if "" in paths:
        raise UserError("a path is empty; give files or folders of recordings")
    found = {}  # by the file behind all links, so that each is taken once
    unusable = []
    ignored = collections.Counter()
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(files_below(path, unusable), key=common.natural_order):
                if file.suffix.lower() not in ARRAY_SUFFIXES + AUDIO_SUFFIXES:
                    ignored[file.suffix] += 1
                elif not file.is_file():
                    unusable.append((file, "it is no regular file, or a broken link"))
                else:
                    name = file.relative_to(path).with_suffix("").as_posix()
                    found.setdefault(file.resolve(), (file, name))
        elif path.is_file():
            found.setdefault(path.resolve(), (path, path.stem))
        elif path.exists():
            raise UserError(
                f"{path} is neither a file nor a folder; give files or folders of recordings"
            )
        else:
            raise UserError(f"{path} does not exist; give files or folders of recordings")
    files = sorted(found.values(), key=lambda one: common.natural_order(one[0]))
    return one_of_each(files, unusable), unusable, ignored


def one_of_each(files, unusable):
    """One of the files in a folder that differ in their suffix alone; others go to unusable."""
    alike = collections.defaultdict(list)
    for path, name in files:
        alike[os.path.realpath(path.parent), path.stem].append((path, name))
    chosen = []
    for same in alike.values():
        same.sort(key=lambda one: preference(one[0]))
        first, *others = same
        chosen.append(first)
        for path, _ in others:
            unusable.append((path, f"the same recording as {first[0].name}"))
    return chosen


def preference(path):
    """Sort key."""
    suffix = path.suffix.lower()
    return PREFERRED.index(suffix) if suffix in PREFERRED else len(PREFERRED)


def files_below(folder, unusable):
    """Files in a folder and those below it, none hidden; what cannot be listed goes to unusable."""
    files = []
    seen = set()  # folders behind all links, which may lead in a circle

    def cannot_list(error):
        unusable.append((error.filename, f"it cannot be listed ({error.strerror})"))

    for where, folders, names in os.walk(folder, onerror=cannot_list, followlinks=True):
        # os.walk goes on with what this list holds afterwards
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            files += [Path(where, name) for name in names if not name.startswith(".")]
    return files


# ---- sound files ---------------------------------------------------------------------------------


def sound_file_blocks(path):
    """int16 blocks at 16 kHz of the first channel of a sound file. Raises BadAudio."""
    try:
        file = soundfile.SoundFile(os.fsencode(path))
    except Exception as error:  # a damaged file can raise anything
        raise BadAudio(cannot_be_read(error)) from error
    with file:
        if problem := missing_part(path, file):
            raise BadAudio(problem)
        if not 4_000 <= file.samplerate <= 384_000:
            raise BadAudio(f"its header claims {file.samplerate:,} Hz, outside 4,000 to 384,000 Hz")
        # else it seeks after each read, and an .mp3 of varying rate goes on out of step
        file.seekable = lambda: False
        if file.samplerate == SAMPLE_RATE and file.subtype == "PCM_16":
            yield from first_channel(file, "int16")
            return
        resample = soxr.ResampleStream(
            file.samplerate, SAMPLE_RATE, 1, dtype="float32", quality="VHQ"
        )
        for block in first_channel(file, "float32"):
            if not np.isfinite(block).all():
                raise BadAudio("it holds NaN or infinity; remove or repair these samples")
            peak = np.abs(block).max(initial=0)
            if peak > 2:
                raise BadAudio(f"its peak is {peak:g} times full scale; scale it to [-1, 1]")
            if file.samplerate != SAMPLE_RATE:
                block = resample.resample_chunk(block, last=len(block) < common.BLOCK)
            yield common.to_int16(block * 32768.0)


def first_channel(file, dtype):
    """Blocks of the first channel of an open sound file; the last is shorter than the others."""
    samples = 0
    length = common.BLOCK
    while length == common.BLOCK:
        try:
            channels = file.read(common.BLOCK, dtype=dtype, always_2d=True)
        except Exception as error:  # a damaged file can raise anything
            raise BadAudio(cannot_be_read(error)) from error
        length = len(channels)
        samples += length
        yield np.ascontiguousarray(channels[:, 0])
    # where the header does not tell, frames is nearly 2^63
    if file.format == "FLAC" and samples < file.frames < 1 << 62:
        raise BadAudio(
            f"it is cut short: of {file.frames:,} samples {samples:,} are there; {AGAIN}"
        )


# ---- parts of sound files that are missing -------------------------------------------------------

# The decoders make the best of half a file, and leave out what follows a first recording. Both
# would be lost without a word.

AGAIN = "copy or convert it again"
# sizes that programs give to what they write to a pipe, whose length they do not know beforehand
UNKNOWN_SIZE = range(0x7FFF_F000, 0x8000_0001), range(0xFFFF_F000, 0x1_0000_0000)


def missing_part(path, file):
    """What a sound file says to hold and the decoder does not find or read; None if nothing."""
    if file.format not in ("MP3", "OGG"):
        return missing_in_wav(path, file)
    with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return missing_in_mp3(data, file.frames) if file.format == "MP3" else missing_in_ogg(data)


def missing_in_wav(path, file):
    """Of .wav and its relatives (AIFF, AU, W64), from what the decoder notes about the header."""
    names = "data|SSND|Data Size|Riff size|riff"
    notes = re.findall(rf"(?m)^ *(?:{names}) *: (\d+) \(should be (\d+)\)", file.extra_info)
    for claimed, present in notes:
        is_known = not any(int(claimed) in sizes for sizes in UNKNOWN_SIZE)
        if is_known and int(claimed) > int(present):
            return f"it is cut short: of {int(claimed):,} bytes {int(present):,} are there; {AGAIN}"
    if file.frames == 0 and re.search(r"(?m)^data : 0$", file.extra_info):
        following = os.path.getsize(path) - 44  # the shortest header
        if following > 0:
            return (
                f"its header claims no samples, but {following:,} bytes follow; if it comes from a "
                "pipe, convert it again, as sox --ignore-length does"
            )
    return None


def missing_in_ogg(data):
    """Of Ogg pages: 27 bytes, of which the 6th holds flags, the lengths of the parts, the parts."""
    first_page, last_page = 2, 4  # flags of a stream's
    begins = True
    flags = last_page
    at = 0
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        flags = data[at + 5]
        if flags & first_page and not begins:
            return "a second recording follows the first in it; split it, or convert it"
        begins = bool(flags & first_page)
        lengths = data[at + 27 : at + 27 + data[at + 26]]
        at += 27 + len(lengths) + sum(lengths)
    if at > len(data) or not flags & last_page:
        return f"it is cut short, without its last page; {AGAIN}"
    return None


def missing_in_mp3(data, found):
    """Of MPEG frames. A header in the first may say how many follow. found: by the decoder."""
    claimed = None
    frames = samples = 0
    at = 0
    while length := mp3_frame(data, at)[0] or id3_length(data, at):
        if data[at : at + 3] != b"ID3":
            count = mp3_frames_claimed(data[at : at + 48])
            if count is None:
                frames += 1
                samples += mp3_frame(data, at)[1]
            elif frames:
                return "a second recording follows the first in it; split it, or convert it"
            else:
                claimed = count
        at += length
    if at > len(data):
        return f"it is cut short in its last frame; {AGAIN}"
    if claimed and frames < claimed - 1:
        return f"it is cut short: of {claimed:,} frames {frames:,} are there; {AGAIN}"
    if claimed and frames > claimed + 2:
        return f"its header claims {claimed:,} frames, but {frames:,} are there; {AGAIN}"
    # without a header the decoder estimates
    if found < 0.99 * samples - 4_000:
        return f"its decoder would find {found:,} of about {samples:,} samples; convert it again"
    return None


def id3_length(data, at):
    """Bytes of a tag of this kind; 0 where there is none."""
    if data[at : at + 3] != b"ID3" or at + 10 > len(data):
        return 0
    length = 10
    for shift, byte in zip((21, 14, 7, 0), data[at + 6 : at + 10]):
        length += (byte & 127) << shift
    return length


# kbit/s of MPEG 1, layers I, II, III, and of MPEG 2, layers I, and II and III
MP3_RATES = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)


def mp3_frame(data, at):
    """(bytes, samples) of the MPEG frame there, from its header of 32 bits (ISO 11172-3).

    (0, 0) where there is none, or one whose length is free, and so in no header.
    """
    header = int.from_bytes(data[at : at + 4], "big")
    version = header >> 19 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    layer = 4 - (header >> 17 & 3)
    rate = header >> 12 & 15
    frequency = header >> 10 & 3
    padding = header >> 9 & 1
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or rate in (0, 15) or frequency == 3:
        return 0, 0
    hertz = (44_100, 48_000, 32_000)[frequency] >> {3: 0, 2: 1, 0: 2}[version]
    row = layer - 1 if version == 3 else min(layer, 2) + 2
    bits = 1000 * MP3_RATES[row][rate - 1]
    if layer == 1:
        return (12 * bits // hertz + padding) * 4, 384
    samples = 576 if layer == 3 and version != 3 else 1152
    return samples // 8 * bits // hertz + padding, samples


def mp3_frames_claimed(frame):
    """How many frames follow that hold samples, of one that holds none but this; else None."""
    found = re.match(rb"(?s)....\0{9,32}(?:Xing|Info)...(.)(....)", frame)
    if found is None:
        return None
    flags, count = found.groups()
    return int.from_bytes(count, "big") if flags[0] & 1 else 0


# ---- decoding in other processes -----------------------------------------------------------------

# Decoders crash on some damaged files, so each file is decoded by a process that is not this one.
# Its samples come through a file, so that memory depends neither on the length of a recording nor
# on how many are decoded ahead.

MOST_DECODERS = 16  # each takes about 100 MB
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # of common.stop_requests
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of the container: microseconds in each so many, or max


def cores():
    """How many processes may run at once."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        count = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    count = count or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, CPU_MAX.read_text().split())
        count = min(count, math.ceil(quota / period))
    return count


def decoded(paths, folder):
    """Yield (blocks, problem) of each sound file, as of a Recording, decoded ahead on all cores.

    The blocks of a file hold until those of the next one are asked for. Its samples lie in
    `folder`, which is made and removed.
    """
    waiting = collections.deque(enumerate(paths))
    ahead = collections.deque()  # (file of the samples, its decoding), in the order of paths
    processes = queue.SimpleQueue()  # those that are idle
    decoders = max(1, min(cores(), MOST_DECODERS, len(paths)))
    threads = ThreadPoolExecutor(decoders, initializer=hold_back_stops)
    open_standard_streams()
    folder.mkdir()
    try:
        for _ in range(decoders):
            processes.put(threads.submit(new_process).result())
        while waiting or ahead:
            while waiting and len(ahead) <= 2 * decoders:
                n, path = waiting.popleft()
                target = folder / str(n)
                ahead.append((target, threads.submit(decode_elsewhere, processes, path, target)))
            target, decoding = ahead.popleft()
            yield decoding.result()
            target.unlink(missing_ok=True)
    finally:
        threads.shutdown(cancel_futures=True)
        while not processes.empty():
            processes.get().shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def decode_elsewhere(processes, path, target):
    """(blocks, problem) of a sound file, by decode() in an idle process.

    A process that crashes is replaced, and the file tried again, which may not be the cause.
    """
    process = processes.get()
    try:
        for _ in range(2):
            try:
                process.submit(decode, path, target).result()
                return blocks_in(target), None
            except BadAudio as why:
                return None, str(why)
            except BrokenProcessPool:
                process.shutdown()
                process = new_process()
        return None, "it crashes its decoder"
    finally:
        processes.put(process)


def decode(path, target):
    """Write the samples of a sound file to target, as int16."""
    try:
        with open(target, "wb") as file:
            for block in sound_file_blocks(path):
                file.write(block.tobytes())
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({common.first_line(error)}); make room, raise the limit "
            "on the size of files, or give another --out"
        ) from error


def blocks_in(target):
    """Yield the int16 blocks of a file that decode() wrote."""
    with open(target, "rb") as file:
        while len(block := np.fromfile(file, np.int16, common.BLOCK)):
            yield block


def new_process():
    """A process that can decode, as an executor."""
    # no fork of this process, which would copy the locks of its threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prepare_blizzard"])
    return ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)


def open_standard_streams():
    """Let decoders inherit descriptors 0 to 2, all of them open.

    Where one is closed, another file gets its number.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    for descriptor in range(3):
        os.set_inheritable(descriptor, True)


def hold_back_stops():
    """In a thread that starts decoders: leave requests to end to the main thread.

    What a process starts inherits this, so that a request to the whole group of processes, as of a
    terminal that closes, ends none of them before the main thread has tidied up.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    multiprocessing.resource_tracker.ensure_running()  # which lets some through again
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def end_with_parent():
    """In a decoder: leave requests to end to the parent, and end when it ends, however it does."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    # C libraries print what they think of a file, in the midst of our lines
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=exit_after_parent, daemon=True).start()


def exit_after_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


# ---- yardsticks ----------------------------------------------------------------------------------

# What a model of the recordings has to beat, in bits. All of it depends on the recordings alone, so
# it is computed here, once, and kept in the HDF5 file.

WINDOW = 8_000  # samples: the 0.5 s on which models are evaluated at published sizes
FRAME = 200  # samples: models take whole recordings frame by frame, and leave what remains
MOST_WINDOWS = 2_048  # of test
MOST_RECORDINGS = 100  # of test
MOST_FILTERED = 40 * SAMPLE_RATE  # samples of a recording, which take one step of the filter each
FITTED_WINDOWS = 128  # of train, from which the filter has its prior and its density
NOISE_SEED = 2015  # fixed, so that the same recordings give the same bits
YARDSTICKS = {  # with their titles in the report
    "flac": "FLAC",
    "adaptive_filter": "adaptive filter",
    "histogram": "histogram",
}


def add_yardsticks(path):
    """Compute the yardsticks of a whole data file, and add them to it as the group `yardsticks`."""
    with common.SafeFile(path, "r+") as safe, h5py.File(safe, "r+") as file:
        corpus = SimpleNamespace(mean=file.attrs["mean"], std=file.attrs["std"])
        for name in ("train", "test"):
            split = common.Split(name, file[name]["audio"], file[name]["offsets"][:])
            setattr(corpus, name, split)
        windows = file.create_group("yardsticks/windows")
        windows.attrs["samples"] = WINDOW
        fitted = fitted_filter(corpus)
        for name, values in window_yardsticks(corpus, fitted).items():
            windows[name] = values
        recordings = file.create_group("yardsticks/recordings")
        for name, values in recording_yardsticks(corpus, fitted).items():
            recordings[name] = values


def window_yardsticks(corpus, fitted):
    """Where the windows of test start, and the bits that each takes: {name: (windows,)}."""
    starts = window_starts(corpus.test, MOST_WINDOWS)
    windows = windows_at(corpus.test, starts)
    found = {
        "starts": starts,
        "flac": np.array([flac_bits(window) for window in windows]),
        "histogram": np.full(len(starts), WINDOW * entropy(windows)),
    }
    if len(starts) and fitted:
        found["adaptive_filter"] = filter_bits(windows, corpus, fitted)
    return found


def recording_yardsticks(corpus, fitted):
    """Which recordings of test, the samples of each in whole frames, and the bits they take.

    The filter has none of a recording that is too long for it: NaN.
    """
    split = corpus.test
    lengths = np.diff(split.offsets) // FRAME * FRAME
    index = common.evenly_spread(np.flatnonzero(lengths), MOST_RECORDINGS)
    flac = []
    short = []
    for i in index:
        (recording,) = split.read(split.offsets[[i]], lengths[i])
        flac.append(flac_bits(recording))
        if len(recording) <= MOST_FILTERED:
            short.append(recording)
    found = {"index": index, "samples": lengths[index], "flac": np.array(flac)}
    if fitted:
        bits = np.full(len(index), np.nan)
        if short:
            bits[lengths[index] <= MOST_FILTERED] = filter_bits(short, corpus, fitted)
        found["adaptive_filter"] = bits
    return found


def window_starts(split, at_most):
    """First samples of windows of every recording, without overlap: all, or at_most evenly spread.

    None where every recording is too short.
    """
    if np.diff(split.offsets).max() < WINDOW:
        return np.zeros(0, np.int64)
    return common.piece_starts(split, WINDOW, at_most)


def windows_at(split, starts):
    """int16 (len(starts), WINDOW), from each start on."""
    return split.read(starts, WINDOW) if len(starts) else np.zeros((0, WINDOW), np.int16)


def flac_bits(samples):
    """Bits of int16 samples in FLAC frames of 1,024 samples, at the highest compression.

    libsndfile makes frames of 4,096, which are too long for speech. No frame depends on another,
    so each is coded as a file of its own here, of which the frame alone counts.
    """
    return sum(frame_bits(samples[n : n + 1024]) for n in range(0, len(samples), 1024))


def frame_bits(samples):
    """Bits of at most 4,096 samples as one frame of FLAC."""
    file = io.BytesIO()
    soundfile.write(
        file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0
    )
    coded = file.getvalue()
    # A FLAC file is its name (4 bytes), the sizes of the stream with a checksum (38), a text that
    # names the encoder, and then frames of audio. Every frame begins with its sync code: 14 bits
    # that are 1, one that is 0, and one that is 0 where all frames are of a size, so ff f8. The
    # checksum may hold these bytes, hence the search after it; text, which is ASCII, cannot.
    first_frame = coded.index(b"\xff\xf8", 42)
    return 8.0 * (len(coded) - first_frame)


def entropy(windows):
    """Bits per sample of a code made for the histogram of all samples in the windows; 0 of none."""
    counts = np.bincount(windows.ravel().astype(np.int64) + (1 << 15))
    p = counts[counts > 0] / counts.sum()
    return (p * np.log2(1 / p)).sum()


# The adaptive filter predicts a sample from the 32 before it, by the coefficients a that would have
# done best so far (recursive least squares): before sample n they minimise
#
#     sum_{m<n} FORGETTING^(n-m) e_m^2 / rms_m    +    a prior, forgotten as fast
#
# where e_m is the error at sample m and rms_m that of the errors just before. The sample is a
# Student's t about its prediction, with a scale that follows the errors over three spans:
#
#     log scale_n = offset + sum_i weight_i log rms_in
#
# Prior, weights, offset and degrees of freedom are of train. FORGETTING and the form of the weights
# were chosen on valid.

ORDER = 32
FORGETTING = 0.993
KEPT = (3 / 4, 15 / 16, 63 / 64)  # of a mean of squares, at each sample: about 4, 16 and 64 samples
FIRST_SQUARE = 1e-3  # of normalised samples: the mean before the first error
STEPS_AT_ONCE = 2_000


@dataclass
class Filter:
    """What the filter has from train."""

    a: torch.Tensor  # (ORDER,), in the order of the samples: the last one's comes last
    covariance: torch.Tensor  # (ORDER, ORDER), of a
    density: torch.Tensor  # (5,): weights of the three spans, offset, log of the degrees of freedom


def fitted_filter(corpus):
    """The Filter for a corpus; None where no recording of train has a window."""
    starts = window_starts(corpus.train, FITTED_WINDOWS)
    if len(starts) == 0:
        return None
    x = dequantised(windows_at(corpus.train, starts), corpus)
    a, covariance = prior(x)
    errors, squares = (torch.cat(part) for part in zip(*filtered(x, a, covariance)))
    return Filter(a, covariance, fit_density(errors, squares))


def prior(x):
    """Least squares over windows x (W, N) of equal loudness: a, and the inverse of the moments."""
    loudness = x.square().mean(1, keepdim=True).sqrt()
    lags = F.pad(x / loudness, (ORDER, 0)).unfold(1, ORDER + 1, 1).flatten(0, 1)
    moments = lags.T @ lags / len(lags)
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(moments[:-1, :-1]))
    return covariance @ moments[:-1, -1], covariance


def filtered(x, a, covariance):
    """Yield errors (n, W) and squares (n, W, 3) for every n samples of x (W, N), in order.

    The squares are what the means over three spans were before each sample.
    """
    a = a.repeat(len(x), 1)
    covariance = covariance.repeat(len(x), 1, 1)
    square = x.new_full((len(x), 3), FIRST_SQUARE)
    kept = x.new_tensor(KEPT)
    samples = F.pad(x, (ORDER, 0)).T.contiguous()
    errors, squares = [], []
    for n in range(x.shape[1]):
        past = samples[n : n + ORDER].T
        error = samples[n + ORDER] - (a * past).sum(1)
        errors.append(error)
        squares.append(square)

        gain = (covariance @ past.unsqueeze(2)).squeeze(2)
        variance = square[:, 0].sqrt() + (past * gain).sum(1)
        a = a + gain * (error / variance).unsqueeze(1)
        # By a vector times itself: the covariance must stay symmetric to the last bit, or it
        # explodes.
        gain = gain / variance.sqrt().unsqueeze(1)
        covariance = torch.baddbmm(covariance, gain.unsqueeze(2), gain.unsqueeze(1), alpha=-1)
        covariance = covariance / FORGETTING
        # With the noise of dequantisation a square is 1e-11 on average at least.
        square = torch.lerp(error.square().clamp(min=1e-12).unsqueeze(1), square, kept)
        if len(errors) == STEPS_AT_ONCE or n == x.shape[1] - 1:
            yield torch.stack(errors), torch.stack(squares)
            errors, squares = [], []


def log_density(errors, squares, density):
    """Log of Student's density of each error (n, W)."""
    weights, offset, log_freedom = density.split((3, 1, 1))
    log_scale = offset + 0.5 * squares.log() @ weights
    return torch.distributions.StudentT(log_freedom.exp(), 0.0, log_scale.exp()).log_prob(errors)


def fit_density(errors, squares):
    """The most likely parameters of log_density."""
    density = errors.new_tensor([0.4, 0.3, 0.3, 0.0, math.log(4.0)]).requires_grad_()
    optimiser = torch.optim.LBFGS([density], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        nll = -log_density(errors, squares, density).mean()
        nll.backward()
        return nll

    optimiser.step(loss)
    return density.detach()


def filter_bits(recordings, corpus, fitted):
    """Bits of each of some int16 recordings, by the filter begun anew in each."""
    lengths = torch.tensor([len(recording) for recording in recordings])
    longest = int(lengths.max())
    # Shorter ones are repeated up to the length of the longest; that does not count.
    x = dequantised(np.stack([np.resize(samples, longest) for samples in recordings]), corpus)
    nats = torch.zeros(len(x), dtype=x.dtype)
    first = 0
    for errors, squares in filtered(x, fitted.a, fitted.covariance):
        n = first + torch.arange(len(errors)).unsqueeze(1)
        counted = n < lengths
        nats += (log_density(errors, squares, fitted.density) * counted).sum(0)
        first += len(errors)
    # A density of normalised samples: log(std) takes it to steps of 16 bits.
    bits = (lengths * math.log(corpus.std) - nats) / math.log(2)
    return bits.numpy()


def dequantised(pcm, corpus):
    """float64 of int16 (W, N), normalised and dequantised with fixed noise."""
    pcm = torch.from_numpy(pcm)
    uniform = torch.rand(pcm.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    return common.normalise(pcm, corpus, uniform).double()


# ---- demo speech ---------------------------------------------------------------------------------

# formant frequencies in Hz of /a e i o u/ for an average adult (Peterson and Barney 1952, rounded)
VOWELS = np.array(
    [[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]]
)
HOP = 80  # samples between spectral frames, 5 ms
SPAN = 512  # samples in one
# share of all phones, loudness of the voice and of friction
PHONES = (
    (0.65, 1, 0.01),  # vowels
    (0.12, 0, 0.5),  # fricatives
    (0.08, 0.6, 0.2),  # voiced fricatives
    (0.15, 0, 0),  # pauses
)


def make_demo_data(
    out="data/demo.h5", folder="data/demo", seed=0, force=False, valid=0.1, test=0.1
):
    """Synthetic recordings through the same conversion as any other.

    Returns what convert_files returns.
    """
    write_demo(folder, seed)
    created_by = f"{common.SYNTHETIC}, seed {seed}"
    return convert_files([folder], out, valid, test, force, created_by=created_by)


def write_demo(folder, seed=0, minutes=5):
    """Write synthetic recordings of 5 s as .npz files into folder, the same for the same seed."""
    # frozen by NumPy: the same stream in every version
    random = np.random.RandomState(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for minute in range(minutes):
        recordings = {
            f"demo_{minute}_{i:02}": synthetic_recording(random, seconds=5.0) for i in range(12)
        }
        np.savez(folder / f"demo_{minute}.npz", **recordings)


def synthetic_recording(random, seconds):
    """Speech-like int16 audio: pulses and noise through moving formants, with pauses."""
    frames = int(seconds * SAMPLE_RATE) // HOP
    formants, voiced, fricative = phones(random, frames)
    time_s = np.arange(frames * HOP) / SAMPLE_RATE

    # the pitch in Hz rises and falls over a phrase, and trembles at 5 Hz
    middle = random.uniform(90, 220)
    phrase = 0.15 * np.sin(2 * np.pi * random.uniform(0.3, 0.8) * time_s)
    tremble = 0.02 * np.sin(2 * np.pi * 5 * time_s)
    pitch = middle * (1 + phrase + tremble)
    pulses = np.diff(np.floor(np.cumsum(pitch) / SAMPLE_RATE), prepend=0)
    noise = random.uniform(-1, 1, frames * HOP)

    speech = resonate(pulses, voiced, formants, (80, 100, 150))
    speech = np.diff(speech, prepend=0)  # lips radiate the change
    speech *= 1 / (abs(speech).max() + 1e-9)
    hiss = resonate(noise, fricative, np.full((frames, 1), 5200.0), (1500,))
    hiss *= 0.25 / (abs(hiss).max() + 1e-9)
    room = 4e-4 * random.uniform(-1, 1, frames * HOP)
    loudness = random.uniform(0.15, 0.6)
    return common.to_int16(loudness * 32768 * (speech + hiss + room))


def phones(random, frames):
    """Phones in a random order, each fading into the next.

    Returns formants in Hz (frames, 3), and loudness of the voice and of friction (frames,).
    """
    formants = np.zeros((frames, 3))
    voiced = np.zeros(frames)
    fricative = np.zeros(frames)
    level = np.zeros(frames)
    shares = [share for share, _, _ in PHONES]
    start = 0
    while start < frames:
        length = random.randint(16, 60)  # 80 to 300 ms
        segment = slice(start, start + length)
        _, voice, friction = PHONES[random.choice(len(PHONES), p=shares)]
        formants[segment] = VOWELS[random.randint(len(VOWELS))] * random.uniform(0.9, 1.1)
        voiced[segment] = voice
        fricative[segment] = friction
        level[segment] = random.uniform(0.4, 1.0)
        start += length

    window = np.hanning(13) / np.hanning(13).sum()
    for curve in formants.T:
        curve[:] = np.convolve(np.pad(curve, 6, "edge"), window, "valid")
    voiced = np.convolve(voiced, window, "same")
    fricative = np.convolve(fricative, window, "same")
    level = np.convolve(level, window, "same")
    return formants, voiced * level, fricative * level


def resonate(source, gain, resonances, widths):
    """source (frames * HOP,) through resonators that move from frame to frame.

    gain: (frames,); resonances (frames, count) and their widths (count,) in Hz.
    """
    frames = len(gain)
    padded = np.pad(source, SPAN // 2)
    pieces = np.lib.stride_tricks.sliding_window_view(padded, SPAN)[::HOP][:frames]
    pieces = pieces * np.hanning(SPAN)

    # each resonator is a pair of conjugate poles
    omega = np.exp(-2j * np.pi * np.arange(SPAN // 2 + 1) / SPAN)
    response = np.ones((frames, SPAN // 2 + 1), complex)
    for frequency, width in zip(resonances.T, widths, strict=True):
        pole = np.exp((-np.pi * width + 2j * np.pi * frequency) / SAMPLE_RATE)[:, None]
        response *= (1 - abs(pole)) / ((1 - pole * omega) * (1 - pole.conj() * omega))
    pieces = np.fft.irfft(np.fft.rfft(pieces) * response, SPAN) * gain[:, None]

    out = np.zeros(len(padded) + HOP)
    for i, piece in enumerate(pieces):
        out[i * HOP : i * HOP + SPAN] += piece
    return out[SPAN // 2 : SPAN // 2 + frames * HOP] * 2 * HOP / SPAN


# ---- command line --------------------------------------------------------------------------------


@dataclass
class Flags:
    """Flags of this script."""

    paths: Positional[tuple[str, ...]] = ()  # files, and folders to search
    out: str = "data/blizzard.h5"  # HDF5 file to write; data/demo.h5 with --demo
    valid: float = 0.05  # fraction of samples to validate on; 0.1 with --demo
    test: float = 0.05  # fraction of samples to test on; 0.1 with --demo
    force: bool = False  # replace the file if it exists
    strict: bool = False  # treat an unusable recording as an error
    # read arrays of arrays as well; this executes what the file says: only if you trust its source
    allow_pickle: bool = False
    demo: bool = False  # write five minutes of synthetic recordings to data/demo, and convert them
    seed: int = 0  # of the synthetic recordings


def parse_options():
    """The flags, with what depends on --demo in place. Raises UserError."""
    options = common.parse_flags(Flags())
    if options.demo:
        options = common.parse_flags(Flags(out="data/demo.h5", valid=0.1, test=0.1))
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed={options.seed} is out of range; give one from 0 to {2**32 - 1}")
    if options.demo == bool(options.paths):
        raise UserError("give files or folders of recordings, or --demo alone; --help says more")
    return options


def main():
    options = parse_options()
    if options.demo:
        skipped, ignored = make_demo_data(
            options.out, "data/demo", options.seed, options.force, options.valid, options.test
        )
        print("synthetic demo data, not speech")
    else:
        skipped, ignored = convert_files(
            options.paths,
            options.out,
            options.valid,
            options.test,
            options.force,
            options.strict,
            options.allow_pickle,
        )
    print(options.out)
    corpus = common.open_corpus(os.path.expanduser(options.out))
    report_splits(corpus)
    report_yardsticks(corpus.test.audio.file["yardsticks"])
    others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.items())
    print(f"ignored, of other types: {others or 'none'}")
    print(f"skipped: {len(skipped)}")
    for reason in skipped:
        print(f"  {reason}")


def report_splits(corpus):
    """Print how much each split holds."""
    lengths = {split: np.diff(getattr(corpus, split).offsets) for split in common.SPLITS}
    total = np.concatenate(list(lengths.values()))
    lengths["total"] = total
    print(f"{'split':6}{'recordings':>12}{'minutes':>10}{'samples':>16}")
    for split, samples in lengths.items():
        minutes = samples.sum() / SAMPLE_RATE / 60
        print(f"{split:6}{len(samples):12,}{minutes:10.2f}{samples.sum():16,}")
    print(
        f"mean {corpus.mean:.4f}, standard deviation {corpus.std:.4f} (of train, in 16-bit steps)"
    )
    short = total[total < EXCERPT_SECONDS * SAMPLE_RATE]
    print(
        f"too short for one training excerpt of {EXCERPT_SECONDS:g} s: {len(short)} recordings, "
        f"{short.sum() / SAMPLE_RATE:.2f} s"
    )


def report_yardsticks(group):
    """Print the bits per sample of each yardstick, on windows and on whole recordings of test."""
    windows = group["windows"]
    recordings = group["recordings"]
    print(f"{'test, bits per sample':24}{'0.5 s windows':>16}{'whole recordings':>20}")
    print(f"{'number of them':24}{len(windows['starts']):16,}{len(recordings['index']):20,}")
    window_samples = windows.attrs["samples"] * len(windows["starts"])
    recording_samples = recordings["samples"][:].sum()
    for name, title in YARDSTICKS.items():
        on_windows = bits_per_sample(windows, name, window_samples)
        on_recordings = bits_per_sample(recordings, name, recording_samples)
        print(f"{title:24}{on_windows:>16}{on_recordings:>20}")


def bits_per_sample(group, name, samples):
    """The text of it; "-" where there is no such yardstick, or nothing to measure it on."""
    if name not in group or samples == 0:
        return "-"
    return f"{group[name][:].sum() / samples:.3f}"


if __name__ == "__main__":
    common.run_as_script(main)
