"""The VRNN, its data, its bounds and its training: everything that the three scripts share.

Sections, in the order in which data flows: hyperparameters, audio files, demo speech, HDF5, excerpts, model, bounds,
evaluation, checkpoints, training.

Shape suffixes: T frames, B sequences, K particles, X samples in a frame, Z latent size. Tensors of (T, B*K, .) hold
particle j of sequence b in row b*K + j. Log-densities are in nats; a bound on log p(x) is reported in nats per frame
(summed over X, averaged over T and B) unless its name says otherwise.
"""

import argparse
import ast
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tokenize
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

SAMPLE_RATE = 16_000


# ---------------------------------------------------------------------------------------------------------------------
# hyperparameters
# ---------------------------------------------------------------------------------------------------------------------

# What --demo puts in place of the values at the top of a script: small enough for two CPU cores and three minutes.
DEMO = dict(
    data="data/demo.h5", x2s_dim=128, z2s_dim=128, q_z_dim=128, p_z_dim=128, p_x_dim=128, rnn_dim=128, z_dim=32,
    batch_size=16, lr=1e-3, max_updates=1000, monitor_every=50, x_noise_updates=500,
)

# the least that each number may be; the FRACTIONS need not be whole
MINIMUM = dict(
    seed=0, x_dim=1, z_dim=1, rnn_dim=1, q_z_dim=1, p_z_dim=1, p_x_dim=1, x2s_dim=1, z2s_dim=1, k=1, seq_frames=1,
    reset_freq=1, batch_size=1, lr=0, lr_updates=0, max_updates=1, monitor_every=1, monitor_windows=1, grad_clip=0,
    weight_norm=0, ema=0, x_noise=0, x_noise_updates=1, eval_recordings=0,
)
MAXIMUM = 1_000_000_000
FRACTIONS = ("lr", "grad_clip", "weight_norm", "ema", "x_noise")


def whole_number(text):
    """'20000', '20_000' and '2e4' as an int."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def whole_numbers(text):
    """'5,100' as (5, 100)."""
    return tuple(whole_number(part) for part in text.split(","))


whole_number.__name__ = "whole number"
whole_numbers.__name__ = "comma-separated list of whole numbers"


def hyperparameters(script, argv=None):
    """The values at the top of a script, changed by its command line.

    script: the script's globals(). Every name that it assigns before its first function is a hyperparameter: its value
    is the default, the type of that value the type of the flag, and the comment behind it the flag's help.
    Returns a namespace of these, plus `script` (its name), `resume` and `demo`; the script's variables are set to them
    as well. Raises UserError.
    """
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    }
    name = Path(script["__file__"]).stem
    parser = OneLineParser(
        prog=f"{name}.py", description=script["__doc__"], allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef):
            break
        if isinstance(statement, ast.Assign):
            variable = statement.targets[0].id
            defaults[variable] = value = script[variable]
            about = f"{comments.get(statement.end_lineno, '')} (default: {value})".replace("%", "%%")
            if isinstance(value, bool):
                parser.add_argument(f"--{variable}", action=argparse.BooleanOptionalAction, help=about)
            else:
                kind = whole_numbers if variable == "eval_k" else float if variable in FRACTIONS else (
                    whole_number if variable in MINIMUM else str)
                parser.add_argument(f"--{variable}", type=kind, metavar=variable.upper(), help=about)
    parser.add_argument("--resume", action="store_true", default=False, help="go on from last.pt in out_dir")
    parser.add_argument("--demo", action="store_true", default=False,
                        help="small sizes and synthetic data, for about three minutes on two CPU cores")

    missing = [variable for variable in [*MINIMUM, "data", "out_dir", "device", "eval_k", "bf16", "dequantize",
                                         "mirrored_init", "init_from"] if variable not in defaults]
    if missing:
        raise UserError(f"{name}.py does not set {missing[0]}; write a line '{missing[0]} = ...' at its top")
    given = vars(parser.parse_args(argv))
    demo = dict(DEMO, out_dir=f"runs/demo/{name}") if given["demo"] else {}
    h = SimpleNamespace(**{"script": name, **defaults, **demo, **given})
    for option, least in MINIMUM.items():
        value = getattr(h, option)
        if not isinstance(value, (int, float)) or (option not in FRACTIONS and value % 1 != 0):
            raise UserError(f"--{option}={value!r} is not a {'' if option in FRACTIONS else 'whole '}number; give one")
        if not least <= value <= MAXIMUM:
            raise UserError(f"--{option}={value} is out of range; give a number of at least {least}, at most {MAXIMUM}")
        setattr(h, option, float(value) if option in FRACTIONS else int(value))
    if not h.lr > 0:
        raise UserError(f"--lr={h.lr} is out of range; give a number above 0")
    if not h.ema < 1:
        raise UserError(f"--ema={h.ema} is out of range; give a number of at least 0 and below 1")
    if not h.out_dir:
        raise UserError("--out_dir is empty; give the folder of the run, such as runs/first")
    if not isinstance(h.eval_k, tuple) or not h.eval_k or not all(type(k) is int and k >= 1 for k in h.eval_k):
        raise UserError(f"--eval_k={h.eval_k} is out of range; give numbers of particles of at least 1, such as 5,100")
    script.update((name, getattr(h, name)) for name in defaults)
    return h


# ---------------------------------------------------------------------------------------------------------------------
# excerpts
# ---------------------------------------------------------------------------------------------------------------------

def job():
    """(rank of this process, number of processes) under torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(count):
    """The slice of `count` things that falls to this process."""
    rank, processes = job()
    return slice(count * rank // processes, count * (rank + 1) // processes)


def from_all(value):
    """[value of every process], in the order of their ranks."""
    values = [value] * job()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


class Excerpts:
    """Training excerpts of reset_freq windows each, in an order that is a function of (seed, epoch) alone.

    Each recording is cut into as many whole excerpts as it holds, from a start that is drawn anew every epoch, so that
    all of it is seen. A group is batch_size excerpts, of which each process of a job reads its share; what an epoch
    holds beyond whole groups is left out of it.
    """

    def __init__(self, split, x_dim, seq_frames, reset_freq, batch_size, seed):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.shape = (-1, reset_freq, seq_frames, x_dim)
        self.samples = reset_freq * seq_frames * x_dim
        lengths = np.diff(split.offsets)
        self.counts, self.slack = lengths // self.samples, lengths % self.samples
        self.first = np.cumsum(self.counts) - self.counts
        self.groups_per_epoch = int(self.counts.sum()) // batch_size
        self.epoch = None
        if self.groups_per_epoch == 0:
            raise UserError(
                f"the training recordings hold {self.counts.sum()} excerpts of {self.samples / SAMPLE_RATE:g} s, fewer "
                f"than --batch_size={batch_size}; give a smaller --batch_size or --reset_freq, or more recordings")

    def shuffle(self, epoch):
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            self.epoch, self.order = epoch, random.permutation(int(self.counts.sum()))
            self.shift = random.integers(0, self.slack, endpoint=True)

    def group(self, index):
        """This process's windows of group `index`, counted from the start of training: int16 (reset_freq, T, B, X)."""
        epoch, index = divmod(index, self.groups_per_epoch)
        self.shuffle(epoch)
        chosen = self.order[index * self.batch_size:(index + 1) * self.batch_size][share(self.batch_size)]
        recording = np.searchsorted(self.first + self.counts, chosen, side="right")
        starts = (self.split.offsets[recording] + self.shift[recording]
                  + (chosen - self.first[recording]) * self.samples)
        pcm = torch.from_numpy(self.split.read(starts, self.samples))
        return pcm.view(self.shape).permute(1, 2, 0, 3)


def window_starts(split, samples, at_most=None):
    """First samples of the non-overlapping windows of every recording: all, or at_most of them evenly spread."""
    counts = np.diff(split.offsets) // samples
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(split.offsets[:-1], counts) + nth * samples
    if len(starts) == 0:
        raise UserError(f"no recording of the split {split.name} holds a window of {samples / SAMPLE_RATE:g} s; give "
                        "longer recordings or a smaller --seq_frames")
    if at_most is not None and at_most < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, at_most).round().astype(int)]
    return starts


def normalise(pcm, corpus, uniform=None):
    """int16 samples to zero mean and unit variance; with uniform noise on [0, 1), dequantised by +-1/2 LSB."""
    x = pcm.float() if uniform is None else pcm + (uniform - 0.5)
    return (x - corpus.mean) / corpus.std


# ---------------------------------------------------------------------------------------------------------------------
# HDF5
# ---------------------------------------------------------------------------------------------------------------------

FORMAT, VERSION = "vrnn-audio", 1
SPLITS = ("train", "valid", "test")
EXCERPT_SECONDS = 2.0  # a training excerpt at published sizes: reset_freq 4 of 40 frames of 200 samples
SYNTHETIC = "prepare_blizzard.py --demo: synthetic, not speech"  # so begins created_by of the demo data
REMAKE = "make it again with prepare_blizzard.py"
MIN_FREE = 16 << 20  # bytes of the disk that a conversion leaves free


class SplitWriter:
    """Appends whole recordings to one group of the HDF5 file; total and squares are sums over their samples."""

    def __init__(self, group, share):
        self.group, self.share, self.offsets, self.names, self.total, self.squares = group, share, [0], [], 0, 0
        self.audio = group.create_dataset("audio", (0,), "int16", chunks=(BLOCK,), maxshape=(None,))

    def append(self, name, blocks):
        """Append one recording; if it fails half-way nothing of it stays. Raises BadAudio."""
        start = end = self.offsets[-1]
        total = squares = 0
        try:
            for block in guarded(blocks):
                require_space(Path(self.group.file.filename).parent)
                self.audio.resize((end + len(block),))
                self.audio[end:] = block
                end += len(block)
                wide = block.astype(np.int64)
                total += int(wide.sum())
                squares += int((wide * wide).sum())
            if end == start:
                raise BadAudio("it holds no samples")
            if squares * (end - start) == total ** 2:
                raise BadAudio(f"every sample of it is {total // (end - start)}")
        except BadAudio:
            self.audio.resize((start,))
            raise
        self.offsets.append(end)
        self.names.append(name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0"))
        self.total += total
        self.squares += squares

    def mean_and_std(self):
        mean = self.total / self.offsets[-1]
        return mean, math.sqrt(max(0.0, self.squares / self.offsets[-1] - mean * mean))

    def close(self):
        self.group["offsets"] = np.array(self.offsets, np.int64)
        self.group.create_dataset("names", data=self.names, dtype=h5py.string_dtype())


def convert(recordings, out, valid=0.05, test=0.05, force=False, strict=False, created_by="prepare_blizzard.py"):
    """Write recordings to one HDF5 file, which appears under its name only when it is complete.

    recordings: an iterator over (source, name, blocks): where a recording lies, its name, and an iterator over its
    samples in 1-D int16 arrays at 16 kHz. One whose blocks raise is skipped, or with `strict` an error. Each goes,
    whole, to the split that is furthest below its share of the samples so far (train before valid before test where
    they tie), so a rerun gives the same splits. valid and test are the shares of these two.
    Returns a summary: splits {name: (recordings, samples)}, mean and std (of train, in 16-bit steps), short
    (recordings, seconds), skipped ["source: why"]. Raises UserError.
    """
    if not (0 < valid and 0 < test and valid + test < 1):
        raise UserError(f"--valid={valid} and --test={test} must be above 0 and sum to less than 1")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; name the file to write, such as {out / 'speech.h5'}")
    if out.exists() and not force:
        raise UserError(f"{out} already exists; pass --force to replace it, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with only_writer(partial), h5py.File(partial, "w", locking=False, rdcc_nbytes=1 << 20) as file:
        shares = zip(SPLITS, (1 - valid - test, valid, test), strict=True)
        writers = {split: SplitWriter(file.create_group(split), share) for split, share in shares}
        skipped = distribute(recordings, writers.values(), strict)
        splits = {split: (len(writer.names), writer.offsets[-1]) for split, writer in writers.items()}
        for split, writer in writers.items():
            if not writer.names:
                why = f" (skipped: {skipped[0]})" if skipped else ""
                raise UserError(f"{sum(count for count, _ in splits.values())} usable recordings leave none for the "
                                f"split {split}{why}; give more recordings or a larger --valid and --test")
            writer.close()
        mean, std = writers["train"].mean_and_std()
        file.attrs.update(format=FORMAT, version=VERSION, sample_rate=SAMPLE_RATE, mean=mean, std=std,
                          created_by=created_by)
        file.close()
        replace_durably(partial, out)
    lengths = np.concatenate([np.diff(writer.offsets) for writer in writers.values()])
    short = lengths[lengths < EXCERPT_SECONDS * SAMPLE_RATE]
    return SimpleNamespace(splits=splits, mean=mean, std=std, short=(len(short), short.sum() / SAMPLE_RATE),
                           skipped=skipped)


def distribute(recordings, writers, strict):
    """Append each recording to the writer that is furthest below its share; returns why some were skipped."""
    skipped = []
    for source, name, blocks in recordings:
        so_far = sum(writer.offsets[-1] for writer in writers)
        neediest = max(writers, key=lambda writer: writer.share * so_far - writer.offsets[-1])
        try:
            neediest.append(name, blocks)
        except BadAudio as why:
            skipped.append(f"{source}: {why}")
            if strict:
                raise UserError(f"{skipped[-1]}; mend or remove it, or do without --strict") from None
    return skipped


def require_space(folder):
    """Raise OSError before the disk is full, because HDF5 crashes when it meets the end of it."""
    if shutil.disk_usage(folder).free < MIN_FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@dataclasses.dataclass
class Split:
    """audio: int16 HDF5 dataset, recordings back to back; offsets: (recordings + 1,) int64."""
    name: str
    audio: h5py.Dataset
    offsets: np.ndarray

    def read(self, starts, samples):
        """(B, samples) int16 from B starting points."""
        out = np.empty((len(starts), samples), np.int16)
        try:
            for row, start in zip(out, starts, strict=True):
                self.audio.read_direct(row, np.s_[start:start + samples])
        except (OSError, RuntimeError) as error:
            raise UserError(f"data file {self.audio.file.filename} is damaged in split {self.name} "
                            f"({first_line(error)}); {REMAKE}") from None
        return out


def open_corpus(path):
    """An HDF5 file: its Splits train, valid and test, path, created_by, mean and std (int16 units, of train).

    Raises UserError.
    """
    if not Path(path).exists():
        raise UserError(f"data file {path} does not exist; make it with 'python prepare_blizzard.py FOLDER --out "
                        f"{path}', name another with --data, or try --demo")
    try:
        return read_corpus(path)
    except BadAudio as why:
        raise UserError(f"data file {path} {why}; {REMAKE}") from None
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"data file {path} is not a readable HDF5 file ({first_line(error)}); {REMAKE}") from None


def read_corpus(path):
    file = h5py.File(path, "r", rdcc_nbytes=0)  # excerpts are random: a chunk cache would only read more
    keep_metadata_small(file)
    attributes = dict(file.attrs)
    if (str(attributes.get("format")), str(attributes.get("version"))) != (FORMAT, str(VERSION)):
        raise BadAudio(f"is HDF5 but not of format {FORMAT} version {VERSION}")
    if str(attributes.get("sample_rate")) != str(SAMPLE_RATE):
        raise BadAudio(f"is not sampled at {SAMPLE_RATE:,} Hz")
    mean, std = float(attributes.get("mean", math.nan)), float(attributes.get("std", math.nan))
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise BadAudio("has no usable mean and std")
    splits = {}
    for name in SPLITS:
        audio, offsets = file[name]["audio"], file[name]["offsets"][:]
        if not (isinstance(audio, h5py.Dataset) and audio.dtype == np.int16 and audio.ndim == 1
                and offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) >= 2 and offsets[0] == 0
                and offsets[-1] == len(audio) and (np.diff(offsets) > 0).all()):
            raise BadAudio(f"has inconsistent offsets in split {name}")
        splits[name] = Split(name, audio, offsets)
    return SimpleNamespace(path=str(path), created_by=str(attributes.get("created_by")), mean=mean, std=std, **splits)


def keep_metadata_small(file):
    """Hold HDF5's cache of its chunk index at 128 KB: it would grow by 38 MB over 283 hours, and win no time."""
    cache = file.id.get_mdc_config()
    cache.set_initial_size = True
    cache.initial_size = cache.min_size = cache.max_size = 1 << 17
    file.id.set_mdc_config(cache)


# ---------------------------------------------------------------------------------------------------------------------
# arrays (.npz, .npy)
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = 1 << 16      # samples read at a time, so that memory does not depend on the length of a recording
MAX_EXPANSION = 100  # of a zip archive; speech shrinks to about a half, digital silence to a thousandth


class BadAudio(Exception):
    """Why a file or recording cannot be used."""


def natural_order(text):
    """Sort key that puts data_9 before data_10."""
    parts = re.split("([0-9]+)", str(text))
    return [(0, int(part), "") if n % 2 else (1, 0, part) for n, part in enumerate(parts) if part]


def array_recordings(path, name, allow_pickle=False):
    """Yield (name, blocks) for each recording in a .npz or .npy file; blocks iterates over 1-D int16 arrays.

    A recording is an array (samples,) or (samples, channels), whose first channel is taken. With allow_pickle it may
    be an element of an array of arrays, which NumPy reads by executing what the file says; without, nothing of a file
    is executed. What makes the whole file unusable is raised here, what makes one recording unusable by its blocks.
    """
    if path.suffix.lower() == ".npy":
        yield from npy_recordings(functools.partial(open, path, "rb"), name, allow_pickle)
        return
    with zipfile.ZipFile(path) as archive:
        members = {member for member in archive.namelist() if member.endswith(".npy")}
        if not members:
            raise BadAudio("it holds no arrays")
        expanded = sum(member.file_size for member in archive.infolist())
        if expanded > max(MAX_EXPANSION * path.stat().st_size, 1 << 20):
            raise BadAudio(f"it expands {expanded // path.stat().st_size:,}-fold, as no speech does; store what it "
                           "should hold with numpy.savez")
        for member in sorted(members, key=natural_order):
            yield from npy_recordings(functools.partial(archive.open, member), f"{name}/{member.removesuffix('.npy')}",
                                      allow_pickle)


def npy_recordings(open_file, name, allow_pickle):
    """The recordings of one array in .npy format: one, or one per element where it is an array of arrays."""
    try:
        with open_file() as file:
            header = read_npy_header(file)
        if not header[2].hasobject:
            yield name, npy_blocks(open_file, *header)
        elif not allow_pickle:
            raise BadAudio("it is an array of arrays, a pickle, and reading one executes what it says; save every "
                           "recording with numpy.savez, or pass --allow_pickle if you trust the file")
        else:
            with open_file() as file:  # latin1: Python 2 wrote some
                arrays = np.lib.format.read_array(file, allow_pickle=True, pickle_kwargs=dict(encoding="latin1"))
            for index, array in enumerate(arrays.ravel()):
                yield f"{name}/{index}", array_blocks(array)
    except Exception as error:  # a damaged header can raise anything
        yield name, raise_later(error)


def raise_later(error):
    """An iterator over blocks that fails when it is first used, so that only this recording is lost."""
    raise error
    yield


def read_npy_header(file):
    """(shape, fortran_order, dtype); the file then stands at the first byte of the data."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)  # version 3 differs from 2 in how it writes the names of fields, which no audio has


def npy_blocks(open_file, shape, fortran_order, dtype):
    """int16 blocks of a numeric array in .npy format, read in pieces."""
    samples, channels = audio_shape(shape)
    if fortran_order:
        channels = 1  # the first channel comes first, as a whole

    def stored_blocks():
        with open_file() as file:
            read_npy_header(file)
            for start in range(0, samples, BLOCK):
                size = min(BLOCK, samples - start) * channels * dtype.itemsize
                data = file.read(size)
                if len(data) < size:
                    raise BadAudio("it ends before its stated length")
                yield np.frombuffer(data, dtype)[::channels]

    yield from pcm16_blocks(dtype, stored_blocks)


def array_blocks(array):
    """int16 blocks of an array in memory."""
    array = np.asarray(array)
    samples, _ = audio_shape(array.shape)
    channel = array.reshape(samples, -1)[:, 0]
    yield from pcm16_blocks(array.dtype, lambda: (channel[start:start + BLOCK] for start in range(0, samples, BLOCK)))


def audio_shape(shape):
    """(samples, channels) of an array that holds one recording."""
    if len(shape) not in (1, 2) or 0 in shape:
        raise BadAudio(f"its shape {shape} is neither (samples,) nor (samples, channels)")
    if len(shape) == 2 and shape[1] > min(shape[0], 1024):
        raise BadAudio(f"its shape {shape} has too many channels; transpose it to (samples, channels)")
    return shape[0], 1 if len(shape) == 1 else shape[1]


def pcm16_blocks(dtype, stored_blocks):
    """int16 blocks of stored samples of any real dtype; stored_blocks() starts another pass over them.

    int16 is taken as it is. 8-bit samples are widened (uint8 around 128). Wider integers are int16 values where all fit
    and 32-bit full scale where some exceed 24 bits. Floats have full scale 1, or are int16 values where all are whole
    numbers.
    """
    if dtype.kind not in "iuf" or dtype.str[1:] == "u2":
        raise BadAudio(f"its type {dtype} is not audio; save int16, int32 or floats")
    if dtype.itemsize == 1:
        offset = 128 if dtype.kind == "u" else 0
        yield from ((block.astype(np.int16) - offset) * 256 for block in stored_blocks())
        return
    if dtype.kind == "i" and dtype.itemsize == 2:
        yield from (block.astype(np.int16, copy=False) for block in stored_blocks())
        return

    peak, whole = 0.0, True
    for block in stored_blocks():
        block = block.astype(np.float64)
        peak = np.maximum(peak, np.abs(block).max())
        whole = whole and (np.rint(block) == block).all()
    if not np.isfinite(peak):
        raise BadAudio("it holds NaN or infinity; remove or repair these samples")
    if whole and (dtype.kind != "f" or peak > 1) and peak <= 1 << 15:
        scale = 1.0
    elif dtype.kind == "f" and peak <= 2:
        scale = 32768.0
    elif dtype.kind == "i" and 1 << 23 < peak <= 1 << 31:
        scale = 2.0 ** -16
    else:
        raise BadAudio(f"its peak {peak:g} fits neither int16 nor full scale; scale it to [-1, 1] or save int16")
    yield from (to_int16(block.astype(np.float64) * scale) for block in stored_blocks())


def to_int16(samples):
    """Round and clip samples in int16 units."""
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)


# ---------------------------------------------------------------------------------------------------------------------
# processes and errors
# ---------------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something only the user can mend; its text names the file or option, the problem and the remedy."""


def run_as_script(main):
    """Call main(); what only the user can mend becomes one sentence on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|enough memory", str(error)):
            print("error: the memory does not suffice for these sizes; lower --batch_size, --k, --eval_k or the widths",
                  file=sys.stderr)
        elif dist.is_initialized():
            print(f"error: process {dist.get_rank()} of {dist.get_world_size()} lost the others "
                  f"({first_line(error)}); see what the first of them to end said, and go on with --resume",
                  file=sys.stderr)
        else:
            raise
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(2)  # no clean-up that would wait for processes that are gone
    except OSError as error:
        print(f"error: {error.filename or 'a file'} cannot be read or written ({first_line(error)}); check its path, "
              "its permissions and the free space", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def guarded(reader):
    """reader, with whatever a damaged file makes NumPy, zipfile or soundfile raise turned into BadAudio."""
    try:
        yield from reader
    except BadAudio:
        raise
    except Exception as error:
        raise BadAudio(f"it cannot be read ({first_line(error)})") from None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest valid flag where one was mistyped."""

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists what is valid")

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            self.error(f"unknown argument {unknown[0]!r}" + (f", did you mean {nearest[0]}?" if nearest else ""))
        return parsed


@contextlib.contextmanager
def only_writer(path):
    """Hold `path`, a file in the making, against other processes; in the end it is gone, unless renamed by then."""
    with open(path, "ab") as file:
        lock(file.fileno(), path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lock(descriptor, path):
    """Raise UserError where another process holds the same file or folder; the lock ends with the process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process; wait for it, or give another name") from None
    except OSError:  # some network file systems know no locks
        pass


def write_durably(path, text):
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    replace_durably(temporary, path)


def replace_durably(temporary, final):
    """Rename a complete file into place, after its bytes have reached the disk."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)  # the new name as well


def sync(path):
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Rollout:
    """What a model says of T frames of B sequences with K particles each. Nats, per frame and particle."""
    nll_TBK: torch.Tensor       # -log p(x_t | z_<=t, x_<t)
    kl_TBK: torch.Tensor        # KL(q(z_t | x_<=t, z_<t) || p(z_t | x_<t, z_<t)), analytic
    log_w_TBK: torch.Tensor     # log p(x_t | z_<=t, x_<t) + log p(z_t | .) - log q(z_t | .), at the sampled z
    q_mean: torch.Tensor        # (T, B*K, Z)
    q_sigma: torch.Tensor
    prior_mean: torch.Tensor
    prior_sigma: torch.Tensor
    x_mean: torch.Tensor        # (T, B*K, X)
    x_sigma: torch.Tensor
    state: tuple                # (h, c) after the last frame, (B*K, R) each
    log_p_fixed_TBK: torch.Tensor = None  # log p(x_t | .) + log p(z_t | .), and log q(z_t | .), as functions of the
    log_q_fixed_TBK: torch.Tensor = None  # parameters alone: no gradient flows to them through z (only on request)


def gaussian_log_density(x, mean, sigma):
    """log N(x; mean, sigma^2) summed over the last axis."""
    return (-0.5 * ((x - mean) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(q_mean, q_sigma, p_mean, p_sigma):
    """KL(N(q_mean, q_sigma^2) || N(p_mean, p_sigma^2)) summed over the last axis."""
    ratio = q_sigma / p_sigma
    return (0.5 * (ratio ** 2 + ((q_mean - p_mean) / p_sigma) ** 2 - 1) - ratio.log()).sum(-1)


SIGMA_FLOOR = 1e-4


def mean_and_sigma(network, below):
    """Mean and sigma, (., D) each, from a network that ends in a head of 2D units; the floor keeps sigma off zero.

    The head runs in the precision of its parameters, whatever that of the layers before it.
    """
    head = network[-1]
    mean, sigma = head(network[:-1](below).to(head.weight.dtype)).chunk(2, dim=-1)
    return mean, F.softplus(sigma) + SIGMA_FLOOR


def by_onednn(x):
    """Whether to ask oneDNN for a product with x: on a CPU in float32 it is 10 to 30 % faster than the library that
    PyTorch asks, most of all for few rows on several threads; tiny products are not worth its setting up."""
    return (x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() >= 1 << 12
            and torch.backends.mkldnn.is_available())


def product(x, weight, bias=None):
    """x weight^T + bias, for x of (., in) and weight of (out, in)."""
    if by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def relu_layer(x, weight, bias, out):
    """relu(x weight^T + bias), written to out; x: (rows, in)."""
    if by_onednn(x):
        return out.copy_(torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], ""))
    return torch.ops.aten._addmm_activation.out(bias, x, weight.t(), out=out)


class Product(torch.autograd.Function):
    """`product` with its gradient by products of the same speed."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        d_x = product(d, weight.t()) if ctx.needs_input_grad[0] else None
        return d_x, over_all_rows(d, x), d.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """nn.Linear in the precision of its input."""

    def forward(self, x):
        return Product.apply(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def relu_layers(*sizes):
    """Linear layers from each size to the next, each followed by a ReLU."""
    return [layer for fan_in, fan_out in zip(sizes, sizes[1:]) for layer in (Linear(fan_in, fan_out), nn.ReLU())]


def lstm_cell(gates, c):
    """One LSTM step from pre-activations (rows, 4R) in the published order: candidate, input, forget, output."""
    candidate, i, f, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * candidate.tanh()
    return o.sigmoid() * c.tanh(), c


class Recurrence(torch.autograd.Function):
    """The part of a rollout that must run frame by frame, with its gradient written out.

        a_t = from_x_t + [posterior_h | lstm_h] h_{t-1},    split into a_t^q and a_t^gates
        q_mean_t, q_sigma_t = head(ReLU layers(relu(a_t^q))),    z_t = q_mean_t + q_sigma_t * noise_t
        h_t, c_t = lstm_cell(a_t^gates + lstm_z phi_z(z_t), c_{t-1})

    The backward sweep carries only gradients of activations from frame to frame. It leaves those of pre-activations in
    `d_*` for all frames, so that the gradient of each weight is one product over all T*B*K rows. Products are in the
    precision of from_x, but for the head; noise, z, c, and mean and sigma keep their own.
    """

    @staticmethod
    def forward(ctx, k, keep, from_x, noise, h, c, h_weight, z_weight, *layers):
        """from_x: (T, B, Q + 4R); noise: (T, B*k, Z); h, c: (B*k, R). keep: whether a backward sweep will follow.

        layers: weight and bias of the posterior's second to fourth layer, of its head, and of the four of phi_z.
        Returns h_before (T, B*k, R), phi_z (T, B*k, P), q_mean, q_sigma (T, B*k, Z), and h, c after the last frame.
        """
        frames, rows, z_dim = noise.shape
        rnn_dim = h.shape[1]
        q_dim = h_weight.shape[0] - 4 * rnn_dim
        posterior, (head, head_bias), phi_z = pairs(layers[:6]), layers[6:8], pairs(layers[8:])

        def returned(width, like=from_x):
            return like.new_empty(frames, rows, width)

        def inner(width, like=from_x):  # without a backward sweep every frame writes over the one before
            return returned(width, like) if keep else like.new_empty(1, rows, width).expand(frames, -1, -1)

        h_all, c_all = from_x.new_empty(frames + 1, rows, rnn_dim), c.new_empty(frames + 1, rows, rnn_dim)
        mean, sigma, last_phi_z = returned(z_dim, c), returned(z_dim, c), returned(phi_z[-1][0].shape[0])
        pre, tanh_c, z = inner(q_dim + 4 * rnn_dim), inner(rnn_dim, c), inner(z_dim, c)
        q = [inner(weight.shape[0]) for weight, _ in posterior]
        f = [inner(weight.shape[0]) for weight, _ in phi_z[:-1]] + [last_phi_z]
        h_all[0], c_all[0] = h, c
        for t in range(frames):
            from_h = product(h_all[t], h_weight).view(-1, k, pre.shape[2])
            torch.add(from_h, from_x[t].unsqueeze(1), out=pre[t].view(from_h.shape))
            below = pre[t, :, :q_dim].relu_()
            for (weight, bias), out in zip(posterior, q):
                below = relu_layer(below, weight, bias, out[t])
            pre_mean, pre_sigma = product(below.to(head.dtype), head, head_bias).chunk(2, dim=1)
            mean[t] = pre_mean
            torch.add(F.softplus(pre_sigma), SIGMA_FLOOR, out=sigma[t])
            below = torch.addcmul(mean[t], sigma[t], noise[t], out=z[t]).to(from_x.dtype)
            for (weight, bias), out in zip(phi_z, f):
                below = relu_layer(below, weight, bias, out[t])
            gates = pre[t, :, q_dim:].add_(product(below, z_weight))
            candidate, i, forget, o = gates.chunk(4, dim=1)
            candidate.tanh_()
            gates[:, rnn_dim:].sigmoid_()
            torch.mul(forget, c_all[t], out=c_all[t + 1]).addcmul_(i, candidate)
            torch.mul(o, torch.tanh(c_all[t + 1], out=tanh_c[t]), out=h_all[t + 1])
        if keep:
            ctx.k = k
            ctx.save_for_backward(noise, h_weight, z_weight, head, sigma, h_all, c_all, tanh_c, pre, z, *q, *f,
                                  *(weight for weight, _ in posterior + phi_z))
        return h_all[:-1], last_phi_z, mean, sigma, h_all[-1].to(h.dtype, copy=True), c_all[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_h_before, d_phi_z, d_mean, d_sigma, d_h, d_c):
        noise, h_weight, z_weight, head, sigma, h_all, c_all, tanh_c, pre, z, *rest = ctx.saved_tensors
        q, f, posterior, phi_z = rest[:3], rest[3:7], rest[7:10], rest[10:]
        frames, rows, rnn_dim = tanh_c.shape
        q_dim = pre.shape[2] - 4 * rnn_dim

        d_pre, d_head = torch.empty_like(pre), head.new_empty(frames, rows, head.shape[0])
        d_q, d_f = [torch.empty_like(out) for out in q], [torch.empty_like(out) for out in f]
        d_h, d_c = d_h.clone(), d_c.clone()
        scratch = torch.empty_like(d_c)
        for t in reversed(range(frames)):
            candidate, i, forget, o = pre[t, :, q_dim:].chunk(4, dim=1)
            d_candidate, d_i, d_forget, d_o = d_pre[t, :, q_dim:].chunk(4, dim=1)
            torch.mul(d_h, o, out=scratch)
            d_c.add_(torch.ops.aten.tanh_backward(scratch, tanh_c[t]))
            sigmoid_backward(torch.mul(d_h, tanh_c[t], out=scratch), o, grad_input=d_o)
            sigmoid_backward(torch.mul(d_c, candidate, out=scratch), i, grad_input=d_i)
            sigmoid_backward(torch.mul(d_c, c_all[t], out=scratch), forget, grad_input=d_forget)
            tanh_backward(torch.mul(d_c, i, out=scratch), candidate, grad_input=d_candidate)
            d_c.mul_(forget)

            d = product(d_pre[t, :, q_dim:], z_weight.t()).add_(d_phi_z[t])
            d_z = through_relu_layers(d, phi_z, f, d_f, t).to(d_mean.dtype)
            torch.add(d_z, d_mean[t], out=d_head[t, :, :z.shape[2]])
            slope = -torch.expm1(SIGMA_FLOOR - sigma[t])  # of softplus, from its value
            torch.mul(d_z.mul_(noise[t]).add_(d_sigma[t]), slope, out=d_head[t, :, z.shape[2]:])
            d = product(d_head[t], head.t()).to(pre.dtype)
            d = through_relu_layers(d, posterior, q, d_q, t)
            threshold_backward(d, pre[t, :, :q_dim], 0, grad_input=d_pre[t, :, :q_dim])
            torch.add(product(d_pre[t], h_weight.t()), d_h_before[t], out=d_h)

        d_from_x = d_pre.view(frames, -1, ctx.k, pre.shape[2]).sum(2) if ctx.k > 1 else d_pre
        d_weights = [over_all_rows(d_pre, h_all[:-1]), over_all_rows(d_pre[:, :, q_dim:], f[-1])]
        inputs = [pre[:, :, :q_dim], *q, z, *f[:-1]]
        for d, below in zip([*d_q, d_head, *d_f], inputs):
            d_weights += over_all_rows(d, below.to(d.dtype)), d.sum((0, 1))
        return None, None, d_from_x, None, d_h, d_c, *d_weights


sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input
threshold_backward = torch.ops.aten.threshold_backward.grad_input


def pairs(flat):
    """[weight, bias, weight, bias, ...] as [(weight, bias), ...]."""
    return list(zip(flat[::2], flat[1::2]))


def through_relu_layers(d, weights, outputs, d_outputs, t):
    """Gradient at the input of ReLU layers from d at their output; those before each ReLU go into d_outputs[.][t]."""
    for weight, out, d_out in zip(reversed(weights), reversed(outputs), reversed(d_outputs)):
        d = product(threshold_backward(d, out[t], 0, grad_input=d_out[t]), weight.t())
    return d


def over_all_rows(d, below):
    """Gradient of a weight from those of its outputs and from its inputs, both (., rows, .)."""
    return d.flatten(0, -2).t() @ below.flatten(0, -2)


class VRNN(nn.Module):
    """Variational RNN (Chung et al. 2015, arXiv 1506.02216, equations 5-11) with Gaussian prior, posterior and output.

    Every network has four ReLU layers before its Gaussian head. A first layer that sees two inputs is the sum of two
    products, so that the one with phi_x(x_t) can run before the recurrence.
    """

    def __init__(self, x_dim, z_dim, rnn_dim, q_z_dim, p_z_dim, p_x_dim, x2s_dim, z2s_dim):
        super().__init__()
        self.x_dim, self.z_dim, self.rnn_dim = x_dim, z_dim, rnn_dim
        self.bf16 = False  # products in bfloat16, except for those of the Gaussian heads
        self.phi_x = nn.Sequential(*relu_layers(x_dim, *[x2s_dim] * 4))
        self.phi_z = nn.Sequential(*relu_layers(z_dim, *[z2s_dim] * 4))
        self.posterior_x = Linear(x2s_dim, q_z_dim)
        self.posterior_h = Linear(rnn_dim, q_z_dim, bias=False)
        self.posterior = nn.Sequential(nn.ReLU(), *relu_layers(*[q_z_dim] * 4), Linear(q_z_dim, 2 * z_dim))
        self.prior = nn.Sequential(*relu_layers(rnn_dim, *[p_z_dim] * 4), Linear(p_z_dim, 2 * z_dim))
        self.decoder_z = Linear(z2s_dim, p_x_dim)
        self.decoder_h = Linear(rnn_dim, p_x_dim, bias=False)
        self.decoder = nn.Sequential(nn.ReLU(), *relu_layers(*[p_x_dim] * 4), Linear(p_x_dim, 2 * x_dim))
        self.lstm_x = Linear(x2s_dim, 4 * rnn_dim)
        self.lstm_z = Linear(z2s_dim, 4 * rnn_dim, bias=False)
        self.lstm_h = Linear(rnn_dim, 4 * rnn_dim, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Published: uniform(-0.08, 0.08), zero biases, sigma biases 0.6, orthogonal recurrent blocks.

        The range is scaled with fan-in such that 600 inputs give 0.08: at a fixed 0.08 narrow four-layer stacks pass
        no signal and z stays unused.
        """
        for layer in self.modules():
            if isinstance(layer, Linear):
                bound = 0.08 * math.sqrt(600 / layer.in_features)
                layer.weight.uniform_(-bound, bound)
                if layer.bias is not None:
                    layer.bias.zero_()
        for head in (self.posterior[-1], self.prior[-1], self.decoder[-1]):
            head.bias.chunk(2)[1].fill_(0.6)
        for block in self.lstm_h.weight.chunk(4):
            nn.init.orthogonal_(block)

    @torch.no_grad()
    def mirror(self):
        """Initialise such that z is of use from the first update on.

        Every stack of ReLU layers starts as an orthogonal linear map: units come in pairs with opposite weights, and
        relu(a) - relu(-a) = a (the looks-linear initialisation of Balduzzi et al. 2017, arXiv 1702.08591). Sixteen
        layers lie between x and its reconstruction; with independent weights they map all inputs to nearly the same
        output. The posterior starts narrow, so that z tells more of x than of noise. Without either, the decoder soon
        learns to do without z.
        """
        def mirrored(layer, from_relu=True, to_relu=True, gain=1.0):
            rows, columns = layer.weight.shape
            half_rows, half_columns = (rows + 1) // 2 if to_relu else rows, (columns + 1) // 2 if from_relu else columns
            weight = nn.init.orthogonal_(torch.empty(half_rows, half_columns))
            weight *= math.sqrt(max(1, half_rows / half_columns))
            if from_relu:
                weight = torch.cat((weight, -weight), dim=1)
            if to_relu:
                weight = torch.cat((weight, -weight), dim=0)
            layer.weight.copy_(gain * weight[:rows, :columns])

        for stack, sees_relu in ((self.phi_x, False), (self.phi_z, False), (self.posterior[:-1], True),
                                 (self.prior[:-1], False), (self.decoder[:-1], True)):
            first, *others = (layer for layer in stack if isinstance(layer, Linear))
            mirrored(first, from_relu=sees_relu)
            for layer in others:
                mirrored(layer)
        for layer in (self.posterior_x, self.decoder_z):
            mirrored(layer)
        for layer in (self.posterior_h, self.decoder_h):
            mirrored(layer, from_relu=False)
        for layer in (self.lstm_x, self.lstm_z):
            mirrored(layer, to_relu=False)
        for head in (self.posterior[-1], self.prior[-1], self.decoder[-1]):
            mirrored(head, to_relu=False, gain=0.3)
            head.weight.chunk(2)[1].mul_(0.1)
        self.posterior[-1].bias.chunk(2)[1].fill_(-1.5)  # a sigma of 0.2

    def zero_state(self, rows):
        zeros = self.lstm_h.weight.new_zeros(rows, self.rnn_dim)
        return zeros, zeros

    def forward(self, x_TBX, state=None, noise=None, k=1, fixed_z=False, uniform_TB=None):
        """Sample z from the posterior along x and score both.

        x_TBX: (T, B, X). state: (h, c) of (B*k, R), zeros if None. noise: standard normal (T, B*k, Z), drawn if None.
        Only what depends on h_{t-1} or z_t runs inside the loop; the k particles of a sequence share phi_x(x_t).
        fixed_z: whether the Rollout holds log_p_fixed_TBK and log_q_fixed_TBK. With uniform_TB, (T, B) on [0, 1), the
        particles are resampled by it along the way, and what returns is the Filtering of particle_filter.
        """
        if uniform_TB is not None:
            return particle_filter(self, x_TBX, state, noise, uniform_TB, k)
        frames, batch, _ = x_TBX.shape
        h, c = self.zero_state(batch * k) if state is None else state
        if noise is None:
            noise = torch.randn(frames, batch * k, self.z_dim, dtype=h.dtype, device=h.device)
        x = x_TBX.bfloat16() if self.bf16 else x_TBX
        *layers, head, head_bias = self.posterior.parameters()
        weights = [torch.cat((self.posterior_x.weight, self.lstm_x.weight)),
                   torch.cat((self.posterior_x.bias, self.lstm_x.bias)),
                   torch.cat((self.posterior_h.weight, self.lstm_h.weight)),
                   self.lstm_z.weight, *layers, *self.phi_z.parameters()]
        x_weight, x_bias, h_weight, z_weight, *layers = (weight.to(x.dtype) for weight in weights)
        phi_x = self.phi_x(x)
        h_before, phi_z, q_mean, q_sigma, next_h, next_c = Recurrence.apply(
            k, torch.is_grad_enabled(), Product.apply(phi_x, x_weight, x_bias), noise, h, c, h_weight, z_weight,
            *layers[:6], head, head_bias, *layers[6:])
        prior_mean, prior_sigma = mean_and_sigma(self.prior, h_before)
        x_mean, x_sigma = mean_and_sigma(self.decoder, self.decoder_z(phi_z) + self.decoder_h(h_before))
        by_particle = (frames, batch, k)
        log_px = gaussian_log_density(x_TBX.unsqueeze(2), x_mean.view(*by_particle, -1), x_sigma.view(*by_particle, -1))
        log_pz = gaussian_log_density(q_mean + q_sigma * noise, prior_mean, prior_sigma)
        log_qz = (-0.5 * noise ** 2 - q_sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        fixed = {}
        if fixed_z:
            z = (q_mean + q_sigma * noise).detach()
            fixed["log_p_fixed_TBK"], fixed["log_q_fixed_TBK"] = self.at_fixed_z(x_TBX, phi_x, z, (h, c), k)
        return Rollout(
            nll_TBK=-log_px, kl_TBK=gaussian_kl(q_mean, q_sigma, prior_mean, prior_sigma).view(by_particle),
            log_w_TBK=log_px + (log_pz - log_qz).view(by_particle), q_mean=q_mean, q_sigma=q_sigma,
            prior_mean=prior_mean, prior_sigma=prior_sigma, x_mean=x_mean, x_sigma=x_sigma, state=(next_h, next_c),
            **fixed)

    def at_fixed_z(self, x_TBX, phi_x, z, state, k):
        """log p(x_t, z_t | .) and log q(z_t | .), (T, B, k) each, of a given z (T, B*k, Z), by the networks of forward.

        phi_x: of x_TBX, (T, B, .), which the k particles share.
        """
        def for_each_particle(shared):
            return shared.repeat_interleave(k, dim=1)

        by_particle = (*x_TBX.shape[:2], k)
        h, c = state
        phi_z = self.phi_z(z.to(phi_x.dtype))
        gates, h_before = for_each_particle(self.lstm_x(phi_x)) + self.lstm_z(phi_z), []
        for t in range(len(gates)):
            h_before.append(h)
            h, c = lstm_cell(gates[t] + self.lstm_h(h), c)
        h_before = torch.stack(h_before).to(phi_x.dtype)
        q = mean_and_sigma(self.posterior, for_each_particle(self.posterior_x(phi_x)) + self.posterior_h(h_before))
        x_mean, x_sigma = mean_and_sigma(self.decoder, self.decoder_z(phi_z) + self.decoder_h(h_before))
        log_p = (gaussian_log_density(for_each_particle(x_TBX), x_mean, x_sigma)
                 + gaussian_log_density(z, *mean_and_sigma(self.prior, h_before)))
        return log_p.view(by_particle), gaussian_log_density(z, *q).view(by_particle)

    @torch.no_grad()
    def generate(self, frames, batch, generator=None):
        """Sample x (frames, batch, X) from the model itself: z_t from the prior given h_{t-1}, x_t from the decoder."""
        h, c = self.zero_state(batch)
        x = []
        for _ in range(frames):
            z = sample_gaussian(*mean_and_sigma(self.prior, h), generator)
            phi_z = self.phi_z(z)
            decoded = mean_and_sigma(self.decoder, self.decoder_z(phi_z) + self.decoder_h(h))
            x.append(sample_gaussian(*decoded, generator))
            h, c = lstm_cell(self.lstm_x(self.phi_x(x[-1])) + self.lstm_z(phi_z) + self.lstm_h(h), c)
        return torch.stack(x)

    @torch.no_grad()
    def constrain_weights(self, max_norm):
        """Rescale the incoming weights of each unit to norm at most max_norm, as published for W (not U, not b)."""
        for name, layer in self.named_modules():
            if isinstance(layer, Linear) and name != "lstm_h":
                norm = layer.weight.norm(dim=1, keepdim=True)
                is_longer = norm > max_norm * (1 + 1e-6)  # but for rounding: to constrain twice is to constrain once
                layer.weight.mul_(torch.where(is_longer, max_norm / norm, 1.0))


def sample_gaussian(mean, sigma, generator=None):
    return mean + sigma * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


def published_names(model):
    """{our parameter: published names}, several where we hold side by side what the 2016 scripts held apart."""
    names = {}

    def layer(ours, *weights, biases):
        names[f"{ours}.weight"] = weights
        names[f"{ours}.bias"] = biases

    def stack(ours, unit, first_layer, last_layer, first_index, inputs):
        for n in range(first_layer, last_layer + 1):
            source = inputs if n == 1 else f"{unit}_{n - 1}"
            layer(f"{ours}.{first_index + 2 * (n - first_layer)}", f"W_{source}__{unit}_{n}", biases=[f"b_{unit}_{n}"])

    def head(ours, unit):
        layer(ours, f"W_{unit}_4__{unit}_mu", f"W_{unit}_4__{unit}_sig", biases=[f"b_{unit}_mu", f"b_{unit}_sig"])

    stack("phi_x", "x", 1, 4, 0, "x_t")
    stack("phi_z", "z", 1, 4, 0, "z_t")
    layer("posterior_x", "W_x_4__phi_1", biases=["b_phi_1"])
    names["posterior_h.weight"] = ["W_s_tm1__phi_1"]
    stack("posterior", "phi", 2, 4, 1, None)
    head("posterior.7", "phi")
    stack("prior", "prior", 1, 4, 0, "s_tm1")
    head("prior.8", "prior")
    layer("decoder_z", "W_z_4__theta_1", biases=["b_theta_1"])
    names["decoder_h.weight"] = ["W_s_tm1__theta_1"]
    stack("decoder", "theta", 2, 4, 1, None)
    head("decoder.7", "theta")
    layer("lstm_x", "W_x_4__rnn", biases=["b_rnn"])
    names["lstm_z.weight"] = ["W_z_4__rnn"]
    names["lstm_h.weight"] = ["U_rnn__rnn"]
    return names


def from_published(model, arrays):
    """{our parameter: array (out, in)} from arrays under the published names, stored (in, out)."""
    return {ours: np.concatenate([np.asarray(arrays[name]).T for name in theirs])
            for ours, theirs in published_names(model).items()}


@torch.no_grad()
def load_published_parameters(model, arrays):
    """Copy the parameters of a published script into model.

    arrays: published name (W_x_t__x_1, b_x_1, U_rnn__rnn, ...) to array stored (in, out); LSTM column blocks candidate,
    input, forget, output. A missing name raises KeyError, a wrong shape ValueError.
    """
    parameters = dict(model.named_parameters())
    for ours, array in from_published(model, arrays).items():
        if parameters[ours].shape != array.shape:
            raise ValueError(f"{ours} has shape {tuple(parameters[ours].shape)}, the published array {array.shape}")
        parameters[ours].copy_(torch.as_tensor(array))


# ---------------------------------------------------------------------------------------------------------------------
# bounds
# ---------------------------------------------------------------------------------------------------------------------

EVAL_ROWS = 1280    # particles at once in an evaluation


def importance_weighted(log_w_BK):
    """log of the mean weight of K particles, (B,): the bound of Burda et al. 2015 (arXiv 1509.00519), equation 8."""
    return log_w_BK.logsumexp(dim=1) - math.log(log_w_BK.shape[1])


@torch.no_grad()
def estimate_bounds(model, x_TBX, ks, generator, max_rows=EVAL_ROWS):
    """Lower bounds on log p(x) of each sequence from a zero state, by max(ks) particles each.

    model: anything with `z_dim` and model(x_TBX, state, noise, k) -> Rollout, such as VRNN. Returns {name: (B,) float64
    tensor in nats per sequence}: `elbo` (analytic KL) and its `kl`, averaged over all particles; `elbo_K` (the same
    bound by sampled log-weights, K = max(ks)) and `log_w_std` (their standard deviation over the particles); and for k
    in ks `iwae_k`, averaged over the K // k disjoint groups of k particles, so that it never falls as k grows through
    divisors of K, and `ess_iwae_k`, the effective sample size in these groups. Memory is bounded by max_rows particles.
    """
    frames, batch, _ = x_TBX.shape
    particles = max(ks)
    at_once = max(1, max_rows // batch)
    log_w, elbo, kl = [], [], []
    for start in range(0, particles, at_once):
        k = min(at_once, particles - start)
        noise = torch.randn(frames, batch * k, model.z_dim, generator=generator, dtype=x_TBX.dtype, device=x_TBX.device)
        rollout = model(x_TBX, noise=noise, k=k)
        log_w.append(rollout.log_w_TBK.double().sum(0))
        kl.append(rollout.kl_TBK.double().sum(0))
        elbo.append(-rollout.nll_TBK.double().sum(0) - kl[-1])
    log_w_BK, elbo_BK, kl_BK = (torch.cat(parts, dim=1) for parts in (log_w, elbo, kl))
    bounds = {"elbo": elbo_BK.mean(1), "kl": kl_BK.mean(1), f"elbo_{particles}": log_w_BK.mean(1),
              "log_w_std": log_w_BK.std(1, correction=0)}
    for k in sorted(ks):
        groups = log_w_BK[:, :particles // k * k].reshape(-1, k)
        bounds[f"iwae_{k}"] = importance_weighted(groups).view(batch, -1).mean(1)
        bounds[f"ess_iwae_{k}"] = effective_sample_size(groups).view(batch, -1).mean(1)
    return bounds


def effective_sample_size(log_w_BK):
    """(sum_k w_k)^2 / sum_k w_k^2 of each sequence, (B,): K for equal weights, 1 where one particle has them all."""
    return (2 * log_w_BK.logsumexp(dim=1) - (2 * log_w_BK).logsumexp(dim=1)).exp()


def systematic_ancestors(log_w_BK, uniform_B):
    """Whom each of K new particles copies, (B, K): particle j comes up floor or ceil of K w_j / sum w times."""
    k = log_w_BK.shape[1]
    points = (torch.arange(k, device=log_w_BK.device) + uniform_B.unsqueeze(1)) / k
    return torch.searchsorted(log_w_BK.softmax(dim=1).cumsum(dim=1), points).clamp(max=k - 1)


@dataclasses.dataclass
class Filtering:
    """What a particle filter says of T frames of B sequences."""
    log_likelihood_TB: torch.Tensor  # log of an unbiased estimate of p(x_1..x_t), nats
    ess_TB: torch.Tensor             # effective sample size of the weights gathered since the last resampling
    state: tuple                     # (h, c) of the particles after the last frame, (B*K, R) each


def particle_filter(model, x_TBX, state, noise, uniform_TB, k):
    """Sample z of k particles frame by frame, and resample them whenever their effective sample size falls under k / 2.

    The log-mean-weights at each resampling and after the last frame add up to the bound of Maddison et al. 2017 (FIVO,
    arXiv 1705.09279, algorithm 1); without a resampling it is the importance-weighted bound. Gradients flow through
    weights and states, not through the choice of ancestors. model: as in estimate_bounds; x_TBX and state: as in
    VRNN.forward; noise: T standard normal tensors (B*k, Z); uniform_TB: on [0, 1), for the resampling.
    """
    first_rows = k * torch.arange(x_TBX.shape[1], device=x_TBX.device).unsqueeze(1)
    log_w_BK = gathered_B = 0.0
    log_likelihood, effective = [], []
    for x, frame_noise, uniform_B in zip(x_TBX.split(1), noise, uniform_TB):
        rollout = model(x, state, frame_noise.unsqueeze(0), k)
        log_w_BK = log_w_BK + rollout.log_w_TBK[0]
        log_likelihood.append(gathered_B + importance_weighted(log_w_BK))
        effective.append(effective_sample_size(log_w_BK.detach()))
        collapsed_B = effective[-1] < k / 2
        gathered_B = torch.where(collapsed_B, log_likelihood[-1], gathered_B)
        collapsed_B1 = collapsed_B.unsqueeze(1)
        ancestors = torch.where(collapsed_B1, systematic_ancestors(log_w_BK.detach(), uniform_B),
                                torch.arange(k, device=x.device))
        log_w_BK = torch.where(collapsed_B1, 0.0, log_w_BK)
        state = tuple(part[(first_rows + ancestors).flatten()] for part in rollout.state)
    return Filtering(torch.stack(log_likelihood), torch.stack(effective), state)


@torch.no_grad()
def estimate_smc(model, x_TBX, k, generator, max_rows=EVAL_ROWS):
    """The particle filter's log of an unbiased estimate of p(x_1..x_t) from a zero state, nats; its mean is a bound.

    model: as in estimate_bounds. Returns two float64 tensors (T, B): the estimate, and the effective sample size of the
    k particles. Memory is bounded by max_rows particles, but no less than k.
    """
    frames = len(x_TBX)
    estimates, effective = [], []
    for x in x_TBX.split(max(1, max_rows // k), dim=1):
        def draw(distribution, *shape):
            return distribution(shape, generator=generator, dtype=x.dtype, device=x.device)

        noise = (draw(torch.randn, x.shape[1] * k, model.z_dim) for _ in range(frames))
        filtering = particle_filter(model, x, None, noise, draw(torch.rand, frames, x.shape[1]), k)
        estimates.append(filtering.log_likelihood_TB.double())
        effective.append(filtering.ess_TB.double())
    return torch.cat(estimates, dim=1), torch.cat(effective, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------------------------------

EVAL_BATCH = 128    # windows; fixed, because the evaluation noise is drawn batch by batch
EVAL_SEED = 2015    # not the training seed: every run is evaluated with the same noise


def bits_per_sample(nats_per_frame, x_dim, std):
    """Upper bound on the bits per 16-bit sample of a code made from the model; std is that of the data, in LSB."""
    return (math.log(std) - nats_per_frame / x_dim) / math.log(2)


def frames_at(split, starts, frames, model, corpus, generator):
    """Dequantised audio from each start on, normalised, on the device of the model: (frames, len(starts), X)."""
    pcm = torch.from_numpy(split.read(starts, frames * model.x_dim)).to(generator.device)
    pcm = pcm.view(len(pcm), frames, model.x_dim).transpose(0, 1)
    return normalise(pcm, corpus, torch.rand(pcm.shape, generator=generator, device=generator.device))


def window_bounds(model, corpus, split, ks, seq_frames, at_most=None, smc=0):
    """Bounds on each non-overlapping window of a split, from a zero state: {name: (windows,) tensor}.

    Names and units are those of estimate_bounds; with smc > 0 particles also `smc_k` and `ess_smc_k` (mean over
    frames). The windows, the dequantisation noise and the latent noise are the same for every model of one size, and
    for any number of processes, which share the work.
    """
    device = next(model.parameters()).device
    starts = window_starts(split, seq_frames * model.x_dim, at_most)
    rank, processes = job()
    mine = {}
    for batch in range(rank, math.ceil(len(starts) / EVAL_BATCH), processes):
        generator = torch.Generator(device).manual_seed(EVAL_SEED + batch)
        first = batch * EVAL_BATCH
        x_TBX = frames_at(split, starts[first:first + EVAL_BATCH], seq_frames, model, corpus, generator)
        bounds = estimate_bounds(model, x_TBX, ks, generator)
        if smc:
            estimate_TB, ess_TB = estimate_smc(model, x_TBX, smc, generator)
            bounds |= {f"smc_{smc}": estimate_TB[-1], f"ess_smc_{smc}": ess_TB.mean(0)}
        mine[batch] = {name: bound.cpu() for name, bound in bounds.items()}
    by_batch = dict(sorted(item for part in from_all(mine) for item in part.items()))
    return {name: torch.cat([bounds[name] for bounds in by_batch.values()]) for name in by_batch[0]}


def evaluate(model, corpus, split, ks, seq_frames, at_most=None):
    """Means of the window bounds: {bound: {nats_per_frame, stderr, nats_per_sequence, bits_per_sample}}.

    stderr is over windows, in nats per frame. What is no bound is {mean, stderr} (effective sample sizes, in particles)
    or has no bits (kl and log_w_std).
    """
    return summarise(window_bounds(model, corpus, split, ks, seq_frames, at_most), seq_frames, model.x_dim, corpus)


def summarise(by_window, seq_frames, x_dim, corpus):
    result = {}
    for name, values in by_window.items():
        mean, stderr = values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
        if name.startswith("ess"):
            result[name] = dict(mean=mean, stderr=stderr)
            continue
        result[name] = dict(nats_per_frame=mean / seq_frames, stderr=stderr and stderr / seq_frames,
                            nats_per_sequence=mean)
        if name not in ("kl", "log_w_std"):
            result[name]["bits_per_sample"] = bits_per_sample(mean / seq_frames, x_dim, corpus.std)
    return result


def evaluate_recordings(model, corpus, split, k, at_most):
    """smc_k on whole recordings from a zero state, at_most of them evenly spread.

    Returns {recordings, frames, nats_per_frame, stderr, bits_per_sample, ess}: means over all frames; stderr over
    recordings, of the ratio of their nats to their frames.
    """
    device = next(model.parameters()).device
    lengths = np.diff(split.offsets) // model.x_dim
    usable = np.flatnonzero(lengths)
    chosen = usable[np.linspace(0, len(usable) - 1, min(at_most, len(usable))).round().astype(int)]
    chosen = chosen[lengths[chosen].argsort(kind="stable")]  # so that little of a batch lies after the end
    generator = torch.Generator(device).manual_seed(EVAL_SEED)
    nats, ess = [], []
    for batch in np.array_split(chosen, math.ceil(len(chosen) / max(1, EVAL_ROWS // k))):
        ends = torch.from_numpy(lengths[batch])
        x_TBX = torch.zeros(int(ends.max()), len(batch), model.x_dim, device=device)
        for i, recording in enumerate(batch):
            start, end = split.offsets[[recording]], int(ends[i])
            x_TBX[:end, i:i + 1] = frames_at(split, start, end, model, corpus, generator)
        estimate_TB, ess_TB = (part.cpu() for part in estimate_smc(model, x_TBX, k, generator))
        nats += estimate_TB[ends - 1, range(len(batch))].tolist()
        ess += [ess_TB[:end, i].sum().item() for i, end in enumerate(ends)]
    nats, frames = np.array(nats), lengths[chosen]
    mean = nats.sum() / frames.sum()
    deviations = (nats - mean * frames) / frames.mean()
    return dict(recordings=len(chosen), frames=int(frames.sum()), nats_per_frame=mean,
                stderr=deviations.std(ddof=1) / len(chosen) ** 0.5 if len(chosen) > 1 else None,
                bits_per_sample=bits_per_sample(mean, model.x_dim, corpus.std), ess=sum(ess) / frames.sum())


def write_samples(model, corpus, split, folder, seconds=4.0, count=4):
    """Generated speech as folder/sample_N.wav, and beside real excerpts of the split in folder/samples.png."""
    import soundfile
    folder.mkdir(exist_ok=True)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(EVAL_SEED)
    x_TBX = model.generate(math.ceil(seconds * SAMPLE_RATE / model.x_dim), count, generator)
    generated = to_int16((x_TBX.double() * corpus.std + corpus.mean).transpose(0, 1).reshape(count, -1).cpu().numpy())
    for i, samples in enumerate(generated):
        soundfile.write(folder / f"sample_{i}.wav", samples, SAMPLE_RATE)
    lengths = np.diff(split.offsets)
    real = [split.read(split.offsets[i:i + 1], min(lengths[i], generated.shape[1]))[0] for i in lengths.argsort()[-2:]]
    draw_speech([("real", samples) for samples in real] + [("generated", samples) for samples in generated[:2]],
                folder / "samples.png")


def draw_speech(titled, path):
    """Waveform over spectrogram of each (title, int16 samples), side by side."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, len(titled), figsize=(3.4 * len(titled), 4.4), sharex=True, sharey="row",
                                layout="constrained")
    for (title, samples), (wave, spectrum) in zip(titled, axes.T):
        wave.plot(np.arange(len(samples)) / SAMPLE_RATE, samples, linewidth=0.3, color="black")
        wave.set(title=title, xlim=(0, len(samples) / SAMPLE_RATE))
        padded = np.pad(samples / 32768, (0, max(0, 512 - len(samples))))
        pieces = np.lib.stride_tricks.sliding_window_view(padded, 512)[::128] * np.hanning(512)
        power = 20 * np.log10(np.abs(np.fft.rfft(pieces)).T + 1e-4)
        image = spectrum.imshow(power, origin="lower", aspect="auto", cmap="magma", vmin=-70, vmax=30,
                                extent=(0, len(samples) / SAMPLE_RATE, 0, SAMPLE_RATE / 2000))
        spectrum.set(xlabel="seconds")
    axes[0, 0].set_ylabel("amplitude (int16)")
    axes[1, 0].set_ylabel("kHz")
    figure.colorbar(image, ax=axes[1], label="dB", pad=0.01)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints
# ---------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def written_whole(path):
    """A name to write a checkpoint under, which then becomes path: it holds the old or the new checkpoint, whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        replace_durably(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({first_line(error)}); the one before it is kept: make room and go "
                        "on with --resume") from None


def load_checkpoint(path, option, *parts):
    """Read a checkpoint with these parts, executing nothing in it. Raises UserError, naming the option that asked."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if archive.testzip():
                raise ValueError("its checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = [part for part in parts if part not in checkpoint]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        return checkpoint
    except FileNotFoundError:
        raise UserError(f"{option}: {path} does not exist; name a checkpoint, or start without {option}") from None
    except Exception as error:  # a damaged checkpoint can raise anything
        raise UserError(f"{option}: {path} is not a readable checkpoint ({first_line(error)}); name another, or start "
                        f"without {option}") from None


def load_parameters(model, parameters, path, option):
    try:
        model.load_state_dict(parameters)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"{option}: {path} holds parameters that are not finite; name another")
    except (TypeError, RuntimeError, AttributeError):
        raise UserError(f"{option}: {path} holds a model of other sizes; give the sizes it was trained with") from None


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------

MAX_SKIPPED_IN_A_ROW = 10
BATCH_AXIS = dict(pcm=1, h=0, c=0, next_h=0, next_c=0)  # of the tensors that the processes of a job hold parts of
FREE_ON_RESUME = {"max_updates", "monitor_every", "device", "out_dir"}  # nothing in the state of a run depends on them


def choose_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and job()[1] > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name} cannot be used ({first_line(error)}); try --device=cpu") from None
    return device


def describe(device):
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"


def commit():
    """The commit of this code, with + where a Python file differs from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    is_changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return head.stdout.strip() + ("+" if is_changed else "")


class StopRequest:
    """Remembers the first Ctrl-C or SIGTERM, so that training can finish its update; the second one kills."""

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, frame):
        self.signal = number
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Run:
    """A run folder: config.json, log.jsonl, last.pt, previous.pt (the last.pt before), best.pt, eval.json, windows.csv
    (bounds of every test window), samples/."""

    def __init__(self, h):
        self.folder = Path(h.out_dir)
        self.config, self.log, self.last, self.previous, self.best, self.eval, self.windows = (
            self.folder / name for name in ("config.json", "log.jsonl", "last.pt", "previous.pt", "best.pt",
                                            "eval.json", "windows.csv"))
        has_state = self.last.exists() or self.previous.exists()
        if has_state and not h.resume:
            raise UserError(f"{self.folder} already holds a run; pass --resume to go on with it, or another --out_dir")
        if h.resume and not has_state:
            raise UserError(f"--resume: there is no {self.last} to go on from; start without --resume")

    def keep_others_out(self):
        """Lock the folder for as long as this process lives."""
        self.descriptor = os.open(self.folder, os.O_RDONLY)
        lock(self.descriptor, self.folder)

    def start(self, header):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keep_others_out()
        write_durably(self.config, json.dumps(header["config"], indent=1) + "\n")
        write_durably(self.log, json.dumps(header) + "\n")

    def check_unchanged(self, header):
        """Raise UserError where the saved state does not fit the hyperparameters, the data or the kind of device."""
        try:
            before = json.loads(self.log.read_text().splitlines()[0])
            for name, value in header["config"].items():
                if name not in FREE_ON_RESUME and before["config"].get(name) != value:
                    raise UserError(f"--resume: --{name} was {before['config'].get(name)} and is now {value}, which "
                                    "does not fit the saved state; give the old value, or start another --out_dir")
            if before["data"] != header["data"]:
                raise UserError(f"--resume: {header['config']['data']} is not the file that this run began with; give "
                                "that file with --data, or start another --out_dir")
            if before["device"].startswith("cuda") != header["device"].startswith("cuda"):
                raise UserError(f"--resume: this run began on {before['device']}, whose random numbers "
                                f"{header['device']} cannot continue; give that --device, or start another --out_dir")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"--resume: {self.log} does not begin with the header of a run; start another --out_dir "
                            "(with --init_from best.pt to keep what was learnt)") from None

    def append(self, **line):
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, checkpoint):
        """Write last.pt, and keep the one before as previous.pt."""
        with written_whole(self.last) as partial:
            torch.save(checkpoint, partial)
            sync(partial)
            if self.last.exists():
                os.replace(self.last, self.previous)

    def restore(self, trainer):
        """Restore the state in last.pt; where that is missing or damaged, the one before."""
        parts = trainer.checkpoint().keys()
        try:
            trainer.restore(load_checkpoint(self.last, "--resume", *parts), self.last)
        except UserError:
            if not self.previous.exists():
                raise
            trainer.restore(load_checkpoint(self.previous, "--resume", *parts), self.previous)
            if job()[0] == 0:
                print(f"{self.last} is missing or damaged; going on from {self.previous}", flush=True)

    def go_on(self, config, update):
        """Name the hyperparameters that hold from now on, and drop log lines that the checkpoint has not seen."""
        header, *lines = self.log.read_text().splitlines()
        header = json.dumps({**json.loads(header), "config": config})
        kept = [line for line in lines if update_of(line) <= update]
        write_durably(self.config, json.dumps(config, indent=1) + "\n")
        write_durably(self.log, "\n".join([header, *kept]) + "\n")


def keep_freed_memory():
    """Let glibc keep what is freed: every update needs the same large blocks again, and faulting them in page by page
    costs a tenth of its time on a CPU. Does nothing under another C library."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_mmap_max, m_trim_threshold = -4, -1
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


class Trainer:
    """A model in training, with everything that a resumed run needs to go on as if it had never stopped.

    What an update reads and writes stays in place on the device, and nothing there waits for the host, so that on a GPU
    the whole update is one CUDA graph.
    """

    def __init__(self, h, objective, particles, replays, as_published, fixed_z=False, resample=False):
        self.h, self.objective, self.particles = h, objective, particles
        self.replays, self.as_published = replays, as_published
        self.fixed_z, self.resample = fixed_z, resample
        self.processes = job()[1]
        if h.batch_size % self.processes or as_published and self.processes > 1:
            raise UserError(f"{self.processes} processes cannot share --batch_size={h.batch_size} evenly"
                            f"{' as published' * as_published}; start as many as divide it"
                            f"{', or one' * as_published}")
        self.device = choose_device(h.device)
        self.corpus = open_corpus(h.data)
        self.excerpts = Excerpts(self.corpus.train, h.x_dim, h.seq_frames, h.reset_freq, h.batch_size, h.seed)
        self.reader, self.groups = ThreadPoolExecutor(max_workers=1), {}
        torch.manual_seed(h.seed)
        self.model = VRNN(h.x_dim, h.z_dim, h.rnn_dim, h.q_z_dim, h.p_z_dim, h.p_x_dim, h.x2s_dim, h.z2s_dim)
        if h.mirrored_init:
            self.model.mirror()
        self.model.to(self.device)
        self.averaged = copy.deepcopy(self.model)  # what is evaluated, saved as best.pt and generates
        self.model.bf16 = h.bf16
        self.forward = DistributedDataParallel(self.model) if self.processes > 1 else self.model
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=torch.tensor(h.lr, device=self.device),
                                          fused=True, capturable=self.device.type == "cuda")
        create_state(self.optimiser)
        self.generator = torch.Generator(self.device).manual_seed(h.seed)  # of dequantisation and latent noise
        self.progress = dict(update=0, seconds=0.0, best=-math.inf)

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        batch = h.batch_size // self.processes
        rows = batch * particles
        self.tensors = SimpleNamespace(
            pcm=zeros(h.seq_frames, batch, h.x_dim, dtype=torch.int16),
            h=zeros(rows, h.rnn_dim), c=zeros(rows, h.rnn_dim),             # before the window
            next_h=zeros(rows, h.rnn_dim), next_c=zeros(rows, h.rnn_dim),   # after it
            updates=zeros(dtype=torch.int64), skipped=zeros(dtype=torch.int64),
            skipped_in_a_row=zeros(dtype=torch.int64), loss_sum=zeros(), losses=zeros(), grad_norm=zeros())

    def checkpoint(self):
        """The state of the whole job, however many processes share it; each of them must ask."""
        tensors = {name: self.whole_batch(name, tensor) for name, tensor in vars(self.tensors).items()}
        return dict(model=self.model.state_dict(), averaged=self.averaged.state_dict(),
                    optimiser=self.optimiser.state_dict(), generator=self.generator.get_state(),
                    tensors=tensors, progress=self.progress)

    def whole_batch(self, name, tensor):
        if name not in BATCH_AXIS or self.processes == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        dist.all_gather([part.view(torch.uint8) for part in parts], tensor.view(torch.uint8))  # gloo knows no int16
        return torch.cat(parts, BATCH_AXIS[name])

    def restore(self, checkpoint, path):
        """Go on from a state, in place. Raises UserError, naming path, where it is of another model or damaged."""
        load_parameters(self.model, checkpoint["model"], path, "--resume")
        load_parameters(self.averaged, checkpoint["averaged"], path, "--resume")
        try:
            self.generator.set_state(checkpoint["generator"])
            for name, tensor in vars(self.tensors).items():
                values = checkpoint["tensors"][name]
                if name in BATCH_AXIS:
                    rows = share(values.shape[BATCH_AXIS[name]])
                    values = values[:, rows] if BATCH_AXIS[name] else values[rows]
                copy_same(values, tensor)
            saved = checkpoint["optimiser"]["state"]
            for i, state in enumerate(self.optimiser.state.values()):
                for name, tensor in state.items():
                    copy_same(saved[i][name], tensor)
            for name, value in self.progress.items():
                self.progress[name] = type(value)(checkpoint["progress"][name])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"--resume: {path} does not hold the state of this run ({first_line(error)}); give its "
                            "--out_dir, or start another") from None

    def start_from(self, path):
        parameters = load_checkpoint(path, "--init_from", "model")["model"]
        for model in (self.model, self.averaged):
            load_parameters(model, parameters, path, "--init_from")

    def group(self, index):
        """Windows of group `index`, read ahead by a thread; in pinned memory where a GPU will copy them."""
        if index + 1 not in self.groups:
            self.groups = {i: self.groups.get(i) or self.reader.submit(self.read_group, i) for i in (index, index + 1)}
        return self.groups[index].result()

    def read_group(self, index):
        group = self.excerpts.group(index)
        return group.pin_memory() if self.device.type == "cuda" else group

    def update(self):
        """One step of the optimiser on the next window, or once more on the same one where windows are replayed."""
        batch, replay = divmod(self.progress["update"], self.replays)
        if replay == 0:
            group, window = divmod(batch, self.h.reset_freq)
            self.tensors.pcm.copy_(self.group(group)[window], non_blocking=True)
            for carried, after in (self.tensors.h, self.tensors.next_h), (self.tensors.c, self.tensors.next_c):
                carried.zero_() if window == 0 else carried.copy_(after)
        self.step()
        self.progress["update"] += 1

    def noise(self, distribution, rows, width):
        """(T, rows of this process, width); drawn for all rows, so that it is the same for any number of processes."""
        noise = distribution(self.h.seq_frames, rows, width, generator=self.generator, device=self.device)
        return noise[:, share(rows)]

    def step(self):
        """What an update does on the device. A loss or gradient that is not finite changes no parameter."""
        h, model, tensors = self.h, self.model, self.tensors
        uniform = self.noise(torch.rand, h.batch_size, h.x_dim) if h.dequantize else None
        x_TBX = normalise(tensors.pcm, self.corpus, uniform)
        if h.x_noise:
            x_TBX = x_TBX + self.x_noise() * self.noise(torch.randn, h.batch_size, h.x_dim)
        noise = self.noise(torch.randn, h.batch_size * self.particles, h.z_dim)
        uniform_TB = self.noise(torch.rand, h.batch_size, 1).squeeze(2) if self.resample else None
        rollout = self.forward(x_TBX, (tensors.h, tensors.c), noise, self.particles, self.fixed_z, uniform_TB)
        loss = self.objective(rollout)
        self.optimiser.zero_grad()
        loss.backward()
        loss = self.mean_of_all(loss.detach())
        with torch.no_grad():
            divisor = h.batch_size if self.as_published else 1
            divide_gradients(model, divisor)
            grad_norm = divisor * nn.utils.clip_grad_norm_(model.parameters(), (h.grad_clip or math.inf) / divisor)
            is_finite = grad_norm.isfinite() & loss.isfinite()
            if h.lr_updates:
                self.optimiser.param_groups[0]["lr"].copy_(self.lr())
            if self.as_published:
                replace_gradients(model, ~is_finite)
            else:
                self.optimiser.found_inf = (~is_finite).float()  # Adam then leaves everything as it is
            self.optimiser.step()
            if h.weight_norm:
                model.constrain_weights(h.weight_norm)
            self.average()
            for after, part in zip((tensors.next_h, tensors.next_c), rollout.state):
                after.copy_(torch.where(is_finite, part, 0.0))
            tensors.updates += 1
            tensors.skipped += ~is_finite
            tensors.skipped_in_a_row.add_(1).mul_(~is_finite)
            tensors.loss_sum += torch.where(is_finite, loss, 0.0)
            tensors.losses += is_finite
            tensors.grad_norm.copy_(grad_norm)

    def x_noise(self):
        """Standard deviation of the noise on x: from h.x_noise down to a hundredth of it, then none."""
        done = self.tensors.updates / self.h.x_noise_updates
        return torch.where(done < 1, self.h.x_noise * 0.01 ** done, 0.0)

    def lr(self):
        """Adam's learning rate: from h.lr down in a line to a hundredth of it, and no further."""
        return self.h.lr * (1 - self.tensors.updates / self.h.lr_updates).clamp(min=0.01)

    def mean_of_all(self, loss):
        if self.processes > 1:
            dist.all_reduce(loss)
        return loss / self.processes

    def average(self):
        """Exponential moving average of the parameters: single updates throw the held-out bound up and down by tens of
        nats, their average does not. Early on it is shorter, so that it forgets the initial values."""
        decay = ((1 + self.tensors.updates) / (10 + self.tensors.updates)).clamp(max=self.h.ema)
        for averaged, p in zip(self.averaged.parameters(), self.model.parameters()):
            averaged.lerp_(p, 1 - decay)

    def capture(self):
        """Record step as one CUDA graph: launching its thousands of small kernels takes longer than running them.

        The parameters, and all else that a checkpoint holds, end as they began. Where it fails, updates are launched
        kernel by kernel, with the same results.
        """
        before = copy.deepcopy(self.checkpoint())
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            self.optimiser.zero_grad()
            with torch.cuda.graph(graph):
                self.step()
            self.step = graph.replay
        except RuntimeError as error:
            print(f"no CUDA graph ({first_line(error)}); updates are launched kernel by kernel", flush=True)
        self.restore(before, None)

    def monitor(self):
        """Held-out bounds and what else a log line holds; also starts the next interval."""
        h, progress, tensors = self.h, self.progress, self.tensors
        bounds = evaluate(self.averaged, self.corpus, self.corpus.valid, h.eval_k[:1], h.seq_frames, h.monitor_windows)
        line = dict(
            update=progress["update"], sequences=progress["update"] * h.batch_size, seconds=progress["seconds"],
            train_loss=(tensors.loss_sum / tensors.losses).item(), grad_norm=tensors.grad_norm.item(),
            skipped=tensors.skipped.item(), valid=bounds)
        tensors.loss_sum.zero_()
        tensors.losses.zero_()
        return line


def copy_same(values, tensor):
    if values.shape != tensor.shape or values.dtype != tensor.dtype:
        raise ValueError(f"{tuple(values.shape)} in place of {tuple(tensor.shape)}")
    tensor.copy_(values)


def create_state(optimiser):
    """Give Adam the state that its first step would create, so that it can be restored in place."""
    for group in optimiser.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimiser.step()
    for state in optimiser.state.values():
        state["step"].zero_()


def divide_gradients(model, divisor):
    """The 2016 scripts divided the gradient once more by the batch size, before clipping it at 5."""
    if divisor != 1:
        for p in model.parameters():
            p.grad /= divisor


def replace_gradients(model, condition):
    """The 2016 scripts put 0.1 times the parameters in place of a gradient that is not finite."""
    for p in model.parameters():
        p.grad.copy_(torch.where(condition, 0.1 * p, p.grad))


def tracked_bound(eval_k):
    """The bound that is drawn, and that chooses best.pt, for every objective alike."""
    return f"iwae_{eval_k[0]}"


def progress_line(h, line):
    valid, bound = line["valid"], tracked_bound(h.eval_k)
    rate = line["update"] / line["seconds"]
    left = int((h.max_updates - line["update"]) / rate)
    skipped = f" | {line['skipped']} updates skipped as not finite" if line["skipped"] else ""
    return (f"update {line['update']:,} | {line['sequences']:,} sequences | valid {bound} "
            f"{valid[bound]['nats_per_frame']:.2f} elbo {valid['elbo']['nats_per_frame']:.2f} "
            f"kl {valid['kl']['nats_per_frame']:.2f} nats/frame | {valid[bound]['bits_per_sample']:.3f} bits/sample | "
            f"{rate:.2f} updates/s | {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left{skipped}")


def resume_command():
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", f"--nproc_per_node={processes}"] if job()[1] > 1 else [sys.executable]
    return shlex.join([*start, *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def train(h, objective, particles, replays=1, as_published=False, fixed_z=False, resample=False):
    """Train a VRNN on excerpts of h.data, then evaluate its best checkpoint on the test split; all goes to h.out_dir.

    objective: Rollout -> scalar loss in nats per frame. particles: copies of each sequence. replays: updates in a row
    on each window, all from the same state. as_published: gradients treated as in the 2016 scripts. fixed_z: the
    rollout holds the densities at fixed z. resample: the objective gets the Filtering of particles that are resampled
    in place of a rollout. Raises UserError.
    """
    keep_freed_memory()
    torch.set_flush_denormal(True)  # the gradients of particles that have lost their weight are denormal, and slow
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group()  # gloo between CPUs, NCCL between GPUs
    writes = job()[0] == 0  # one process of a job writes and speaks for all
    run = Run(h)
    if h.data == DEMO["data"] and not Path(h.data).exists() and writes:
        print(f"making synthetic demo data in {h.data}", flush=True)
        script = Path(__file__).with_name("prepare_blizzard.py")
        subprocess.run([sys.executable, script, "--demo", f"--out={h.data}"], check=True, stdout=subprocess.DEVNULL)
    from_all("ready")  # all have looked at the run folder, and the data is there
    trainer = Trainer(h, objective, particles, replays, as_published, fixed_z, resample)
    progress, config = trainer.progress, as_config(h)
    header = dict(
        config=config, particles=particles, replays=replays, processes=trainer.processes, commit=commit(),
        device=describe(trainer.device), data=describe_corpus(trainer.corpus),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    if h.resume:
        run.check_unchanged(header)
        if writes:
            run.keep_others_out()
        run.restore(trainer)
        from_all("restored")
        if writes:
            run.go_on(config, progress["update"])
    else:
        if h.init_from:
            trainer.start_from(h.init_from)
        if writes:
            run.start(header)
    if trainer.device.type == "cuda" and trainer.processes == 1:
        trainer.capture()
    if writes:
        print(f"{h.script}: {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters on "
              f"{trainer.processes} x {describe(trainer.device)}; {trainer.excerpts.groups_per_epoch} groups of "
              f"{h.batch_size} excerpts of {trainer.excerpts.samples / SAMPLE_RATE:g} s an epoch; log in {run.log}",
              flush=True)

    bar = tqdm(total=h.max_updates, initial=progress["update"], unit=" updates",
               disable=not (writes and sys.stderr.isatty()))
    with StopRequest() as stop, bar:
        began = time.monotonic()
        while progress["update"] < h.max_updates:
            trainer.update()
            bar.update()
            if progress["update"] % MAX_SKIPPED_IN_A_ROW == 0 and (
                    trainer.tensors.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW):
                raise UserError(f"the loss or its gradient was not finite in {MAX_SKIPPED_IN_A_ROW} updates in a row, "
                                f"up to update {progress['update']}; start again with a lower --lr or --grad_clip")
            if progress["update"] % h.monitor_every == 0 or progress["update"] >= h.max_updates:
                trainer.tensors.updates.item()  # wait for the device
                progress["seconds"] += time.monotonic() - began
                line = trainer.monitor()
                tracked = line["valid"][tracked_bound(h.eval_k)]["nats_per_frame"]
                is_best = tracked > progress["best"]
                if is_best:
                    progress["best"] = tracked
                checkpoint = trainer.checkpoint()
                if writes:
                    run.append(**line)
                    tqdm.write(progress_line(h, line))  # above the bar, where there is one
                    sys.stdout.flush()
                    if is_best:
                        with written_whole(run.best) as partial:
                            torch.save(dict(model=trainer.averaged.state_dict(), config=config,
                                            update=progress["update"]), partial)
                    run.save(checkpoint)
                began = time.monotonic()
            if signal_number := max(from_all(stop.signal)):
                progress["seconds"] += time.monotonic() - began
                checkpoint = trainer.checkpoint()
                if writes:
                    run.save(checkpoint)
                    print(f"stopped after update {progress['update']}; go on with: {resume_command()}", flush=True)
                sys.exit(128 + signal_number)
    finish(h, run, trainer, writes)
    if dist.is_initialized():
        dist.destroy_process_group()


def update_of(line):
    """The update of a log line; infinity for one that was torn when the machine stopped."""
    try:
        return json.loads(line)["update"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def as_config(h):
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(h).items() if name not in ("resume", "demo")}


def describe_corpus(corpus):
    return dict(file=Path(corpus.path).name, created_by=corpus.created_by, mean=corpus.mean, std=corpus.std,
                samples={split: len(getattr(corpus, split).audio) for split in SPLITS})


def windows_table(by_window, seq_frames):
    """A line per window of the test split, in order: its bounds in nats per frame, for paired comparisons of runs."""
    names = [name for name in by_window if name == "kl" or name.startswith(("elbo", "iwae", "smc"))]
    rows = torch.stack([by_window[name] / seq_frames for name in names], dim=1).tolist()
    return "\n".join([",".join(names), *(",".join(f"{value:.3f}" for value in row) for row in rows)]) + "\n"


def finish(h, run, trainer, writes):
    """Evaluate best.pt on every window of the test split, write eval.json, and generate speech from it."""
    model, corpus = trainer.averaged, trainer.corpus
    if not run.best.exists():
        raise UserError(f"{run.folder} has no best.pt, because no held-out bound was finite; start again with a lower "
                        "--lr")
    best = load_checkpoint(run.best, "--resume", "model", "update")
    load_parameters(model, best["model"], run.best, "--resume")
    if writes:
        print(f"evaluating {run.best} (update {best['update']:,}) on the test split", flush=True)
    smc = max(h.eval_k)
    by_window = window_bounds(model, corpus, corpus.test, h.eval_k, h.seq_frames, smc=smc)
    if not writes:
        return
    bounds = summarise(by_window, h.seq_frames, h.x_dim, corpus)
    result = dict(script=h.script, split="test", update=best["update"], windows=len(by_window["elbo"]),
                  frames=h.seq_frames, bounds=bounds)
    if h.eval_recordings:
        whole = evaluate_recordings(model, corpus, corpus.test, smc, h.eval_recordings)
        result["whole_recordings"] = {f"smc_{smc}": whole}
    write_durably(run.windows, windows_table(by_window, h.seq_frames))
    write_durably(run.eval, json.dumps(result, indent=1) + "\n")
    for name, bound in bounds.items():
        bits = f", {bound['bits_per_sample']:.3f} bits/sample" if "bits_per_sample" in bound else ""
        mean, stderr = bound.get("nats_per_frame", bound.get("mean")), bound["stderr"]
        stderr = "" if stderr is None else f" +- {stderr:.2f}"  # one window has none
        nats = f" nats/frame, {bound['nats_per_sequence']:.0f} nats/sequence" if "nats_per_sequence" in bound else ""
        print(f"test {name:12} {mean:8.2f}{stderr}{nats}{bits}")
    if h.eval_recordings:
        print(f"test smc_{smc} of {whole['recordings']} whole recordings: {whole['nats_per_frame']:.2f} nats/frame, "
              f"{whole['bits_per_sample']:.3f} bits/sample")
    write_samples(model, corpus, corpus.test, run.folder / "samples")
    print(f"{run.eval}, {run.folder / 'samples'}", flush=True)
