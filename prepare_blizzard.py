"""Recordings to the HDF5 file that the training scripts read.

    python prepare_blizzard.py FILES AND FOLDERS --out data/blizzard.h5

Takes .npz (every array in it), .npy and sound files (.wav .flac .mp3 .ogg, resampled to 16 kHz),
the first channel of each. Arrays are (samples,) or (samples, channels). An array of arrays, the
form of the 2015 Blizzard files, is a pickle and is read with --allow_pickle only. Recordings are
taken in natural order and go, whole, to the split that is furthest below its share. Unusable files
are skipped and listed with the reason.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

import common
from common import SAMPLE_RATE, BadAudio, UserError

ARRAY_SUFFIXES = (".npz", ".npy")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
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
    files, unusable, ignored = find_audio(paths)
    folder = Path(f"{Path(out)}.decoded")
    with contextlib.closing(recordings_in(files, unusable, folder, allow_pickle)) as recordings:
        skipped = common.convert(recordings, out, valid, test, force, strict, created_by)
    return skipped, ignored


def recordings_in(files, unusable, folder, allow_pickle=False):
    """Yield (source, name, blocks) of each recording, as common.convert takes them.

    Decoded samples go through `folder`. What is unusable as a whole counts as one recording.
    """
    for path, why in unusable:
        yield path, "", why
    sound_files = [path for path, _ in files if path.suffix.lower() in AUDIO_SUFFIXES]
    with contextlib.closing(decoded(sound_files, folder)) as decoded_blocks:
        for path, name in tqdm(files, unit=" files", disable=not sys.stderr.isatty()):
            suffix = path.suffix.lower()
            if suffix in AUDIO_SUFFIXES:
                yield path, name, next(decoded_blocks)
            elif suffix in ARRAY_SUFFIXES:
                yield from recordings_in_arrays(path, name, allow_pickle)
            else:
                known = " ".join(ARRAY_SUFFIXES + AUDIO_SUFFIXES)
                yield path, name, BadAudio(f"its type is not one of {known}; convert it to .wav")


def recordings_in_arrays(path, name, allow_pickle):
    """Yield (source, name, blocks) of each recording in a .npz or .npy file."""
    try:
        for recording, blocks in common.array_recordings(path, name, allow_pickle):
            source = path if recording == name else f"{path} ({recording})"
            yield source, recording, blocks
    except Exception as error:  # a damaged file can raise anything
        yield path, name, error


# ---- finding files -------------------------------------------------------------------------------


def find_audio(paths):
    """Files among `paths` and in the folders among them, in natural order, each once, none hidden.

    Returns [(file, name)], [(file or folder, BadAudio)] of what cannot be read, and {suffix: count}
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
                    unusable.append((file, BadAudio("it is no regular file, or a broken link")))
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
    return files, unusable, ignored


def files_below(folder, unusable):
    """Files in a folder and those below it, none hidden; what cannot be listed goes to unusable."""
    files = []
    seen = set()  # folders behind all links, which may lead in a circle

    def cannot_list(error):
        unusable.append((error.filename, BadAudio(f"it cannot be listed ({error.strerror})")))

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
    """int16 blocks at 16 kHz of the first channel of a sound file."""
    with soundfile.SoundFile(os.fsencode(path)) as file:
        # else it seeks after each read, and an .mp3 of varying rate goes on out of step
        file.seekable = lambda: False
        if not 4_000 <= file.samplerate <= 384_000:
            raise BadAudio(f"its header claims {file.samplerate:,} Hz, outside 4,000 to 384,000 Hz")
        if file.samplerate == SAMPLE_RATE and file.subtype == "PCM_16":
            while len(block := file.read(common.BLOCK, dtype="int16", always_2d=True)):
                yield block[:, 0]
            return
        resample = soxr.ResampleStream(
            file.samplerate, SAMPLE_RATE, 1, dtype="float32", quality="VHQ"
        )
        is_last = False
        while not is_last:
            channels = file.read(common.BLOCK, dtype="float32", always_2d=True)
            block = np.ascontiguousarray(channels[:, 0])
            is_last = len(block) < common.BLOCK
            if not np.isfinite(block).all():
                raise BadAudio("it holds NaN or infinity; remove or repair these samples")
            peak = np.abs(block).max(initial=0)
            if peak > 2:
                raise BadAudio(f"its peak is {peak:g} times full scale; scale it to [-1, 1]")
            if file.samplerate != SAMPLE_RATE:
                block = resample.resample_chunk(block, last=is_last)
            yield common.to_int16(block * 32768.0)


# Decoders crash on some damaged files, so each file is decoded by a process that is not this one.
# Its samples come through a file, so that memory depends neither on the length of a recording nor
# on how many are decoded ahead.


def decoded(paths, folder):
    """Yield the int16 blocks of each sound file, or why it has none, decoded ahead on all cores.

    The blocks of a file hold until those of the next one are asked for. Its samples lie in
    `folder`, which is made and removed.
    """
    shutil.rmtree(folder, ignore_errors=True)  # left by a conversion that was killed
    folder.mkdir()
    waiting = collections.deque(enumerate(paths))
    ahead = collections.deque()  # (file of the samples, its decoding), in the order of paths
    processes = queue.SimpleQueue()  # those that are idle
    cores = os.cpu_count()
    for _ in range(cores):
        processes.put(new_process())
    threads = ThreadPoolExecutor(cores)
    try:
        while waiting or ahead:
            while waiting and len(ahead) <= 2 * cores:
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
    """The blocks of a sound file, by decode() in an idle process, or why there are none.

    A process that crashes is replaced, and the file tried again, which may not be the cause.
    """
    process = processes.get()
    try:
        for _ in range(2):
            try:
                process.submit(decode, path, target).result()
                return blocks_in(target)
            except BadAudio as why:
                return why
            except BrokenProcessPool:
                process.shutdown()
                process = new_process()
        return BadAudio("it crashes its decoder")
    finally:
        processes.put(process)


def decode(path, target):
    """Write the samples of a sound file to target, as int16."""
    with open(target, "wb") as file:
        for block in common.guarded(sound_file_blocks(path)):
            common.require_space(target.parent)
            # a copy, since one channel of several does not lie in one piece
            file.write(block.tobytes())


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


def end_with_parent():
    """In a decoder: leave Ctrl-C to the parent, and end when it ends, however that comes about."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_after_parent, daemon=True).start()


def exit_after_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


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


def parse_options():
    parser = common.OneLineParser(
        prog="prepare_blizzard.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="*", help="files, and folders to search")
    parser.add_argument(
        "--out", help="HDF5 file to write (default: data/blizzard.h5; data/demo.h5 with --demo)"
    )
    share = "fraction of samples to {} on (default: 0.05; 0.1 with --demo)"
    parser.add_argument("--valid", type=float, help=share.format("validate"))
    parser.add_argument("--test", type=float, help=share.format("test"))
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--strict", action="store_true", help="treat an unusable recording as an error"
    )
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read arrays of arrays as well; this executes what the file says, so only from a "
        "source that you trust",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="write five minutes of synthetic speech-like recordings to data/demo, and convert "
        "them",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the synthetic recordings (%(default)s)"
    )
    options = parser.parse_args()
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed={options.seed} is out of range")
    if options.demo == bool(options.paths):
        parser.error("give files or folders of recordings, or --demo alone")
    out, share = ("data/demo.h5", 0.1) if options.demo else ("data/blizzard.h5", 0.05)
    options.out = options.out or out
    if options.valid is None:
        options.valid = share
    if options.test is None:
        options.test = share
    return options


def main():
    options = parse_options()
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
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
    corpus = common.open_corpus(options.out)
    report_splits(corpus)
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


if __name__ == "__main__":
    common.run_as_script(main)
