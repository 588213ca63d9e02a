"""Damage inputs of every kind at random, read them, and count what happens.

    python tests/tools/fuzz.py [--cases 3000] [--seed 0]

An input may be accepted (what was damaged does not matter, or is sound) or refused with a sentence.
Everything else is a failure: another exception, a crash, more than 60 seconds, a file left behind,
or code from the input that ran. Inputs are read by another process, which may die of one. Prints a
table; exit status 1 if there is a failure.
"""

import argparse
import collections
import contextlib
import io
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import tiny  # noqa: E402
from tiny import SIZES, smooth_noise  # noqa: E402

import common  # noqa: E402
import prepare_blizzard  # noqa: E402
import vrnn_gauss  # noqa: E402

TIME_LIMIT = 60  # seconds for one input
SOUND = ("wav", "flac", "mp3", "ogg")
CHECKPOINTS = dict(last_pt="last.pt", init_pt="best.pt", evaluate_pt="best.pt")
# What is odd before it is damaged; half of it stays as it is.
ODD_FILES = (
    "pickle_npy",
    "features_npy",
    "equal_npy",
    "several_npy",
    "other_npy",
    "other_npz",
    *(f"twice_{suffix}" for suffix in SOUND),
)
KINDS = (
    "npz",
    "npz_members",
    "npy",
    "ragged_npy",
    *ODD_FILES,
    *SOUND,
    "h5",
    *CHECKPOINTS,
    "log",
    "eval",
)


class Payload:
    """Leaves a file behind if it is unpickled by anything that executes."""

    def __reduce__(self):
        return os.system, ("touch executed",)


# ---- whole inputs, to be damaged ----


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def ragged(elements):
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def whole_input(kind, random, run):
    """The bytes of an undamaged input of this kind; of `pickle_npy`, of one that would execute."""
    arrays = [smooth_noise(random, 500) for _ in range(3)]
    if kind in ("npz", "npz_members"):
        file = io.BytesIO()
        np.savez(
            file, a=arrays[0], b=arrays[1].astype(np.float32) / 32768, c=arrays[2].astype(np.int32)
        )
        return file.getvalue()
    if kind == "npy":
        return npy([arrays[0], np.stack(arrays[:2], 1), arrays[2] / 32768][random.integers(3)])
    if kind == "ragged_npy":
        return npy(ragged(arrays))
    if kind == "pickle_npy":
        header = npy(ragged(arrays))[:128]
        return header + pickle.dumps(Payload(), protocol=int(random.integers(6)))
    if kind == "features_npy":
        shape = (int(random.integers(1, 300)), int(random.integers(2, 200)))
        return npy([random.random(shape), random.normal(size=shape)][random.integers(2)])
    if kind == "equal_npy":
        return npy(np.array(arrays[: random.integers(1, 4)], dtype=object))
    if kind == "several_npy":
        return b"".join(map(npy, arrays[: random.integers(2, 4)]))
    if kind in ("other_npy", "other_npz"):
        wav = whole_input("wav", random, run)
        others = (b"version https://git-lfs.github.com/spec/v1\noid", b"<html>404", b"", wav)
        return [*others, npy(arrays[0])[:-9], b"\x1f\x8b\x08\x00"][random.integers(6)]
    if kind.startswith("twice_"):
        once = kind.removeprefix("twice_")
        return whole_input(once, random, run) + whole_input(once, random, run)
    if kind in SOUND:
        file = io.BytesIO()
        soundfile.write(file, arrays[0], int(random.choice([16_000, 44_100])), format=kind.upper())
        return file.getvalue()
    file = dict(CHECKPOINTS, h5="../tiny.h5", log="log.jsonl", eval="eval.json")[kind]
    return (run / file).read_bytes()


# ---- damage ----


def extreme_integers(size):
    """The bytes of some, of `size` bytes each."""
    largest = 2 ** (8 * size - 1) - 1
    values = (0, -1, 1, largest, -largest - 1, 1 << (8 * size - 3))
    return [value.to_bytes(size, "little", signed=True) for value in values]


EXTREME = extreme_integers(2) + extreme_integers(4) + extreme_integers(8)


def damaged(data, random):
    """data after one to three random changes, half of them near its beginning or its end."""
    for _ in range(random.integers(1, 4)):
        if not data:
            break
        spread = [len(data), min(len(data), 200)][random.integers(2)]
        at = int(random.integers(spread))
        at = len(data) - 1 - at if random.random() < 0.25 else at
        length = int(random.integers(1, 64))
        change = random.integers(8)
        if change == 0:
            data = data[:at]
        elif change == 1:
            data = data[:at] + bytes([data[at] ^ (1 << random.integers(8))]) + data[at + 1 :]
        elif change == 2:
            data = data[:at] + random.bytes(length) + data[at + length :]
        elif change == 3:
            data = data[:at] + bytes(length) + data[at + length :]
        elif change == 4:
            data = data[:at] + data[at + length :]
        elif change == 5:
            data = (
                data[:at]
                + data[at : at + length] * int(random.integers(2, 5))
                + data[at + length :]
            )
        elif change == 6:
            data = data[:at] + random.bytes(length) + data[at:]
        else:
            field = EXTREME[random.integers(len(EXTREME))]
            data = data[:at] + field + data[at + len(field) :]
    return data


def damaged_members(data, random):
    """An archive whose members are damaged, each with a correct checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(file, "w") as out:
        for name in archive.namelist():
            out.writestr(name, damaged(archive.read(name), random))
    return file.getvalue()


ODD = (
    None,
    "x",
    -1,
    1 << 62,
    math.nan,
    math.inf,
    0.5,
    True,
    [],
    {},
    [{}],
    (1, "x"),
    torch.zeros(3),
)


def damaged_leaf(data, random):
    """A sound checkpoint with something odd in place of one of its parts, or without it."""
    checkpoint = torch.load(io.BytesIO(data), weights_only=True)
    part = checkpoint
    while True:
        name = list(part)[random.integers(len(part))]
        if not isinstance(part[name], dict) or not part[name] or random.random() < 0.2:
            break
        part = part[name]
    if random.random() < 0.1:
        del part[name]
    else:
        part[name] = ODD[random.integers(len(ODD))]
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


# ---- reading ----


def convert_beside_good_recordings(path):
    random = np.random.default_rng(1)
    np.savez(
        path.parent / "good.npz", **{f"rec_{i}": smooth_noise(random, 2_000) for i in range(12)}
    )
    skipped, _ = prepare_blizzard.convert_files([path.parent], path.parent / "out.h5", 0.2, 0.2)
    (path.parent / "good.npz").unlink()
    (path.parent / "out.h5").unlink()
    return "refused" if skipped else "accepted"


def read_corpus_whole(path):
    corpus = common.open_corpus(path)
    excerpts = common.Excerpts(corpus.train, 20, 5, 2, 4, 0)
    for batch in range(min(excerpts.batches_per_epoch, 50)):
        excerpts.batch(batch)
    common.piece_starts(corpus.valid, 100, 8)
    common.piece_starts(corpus.test, 100, 8)


def train_from(kind, path, run):
    """One update from a checkpoint, with its evaluation and the saving of a state.

    Of `evaluate_pt` the evaluation alone.
    """
    out = path.parent / "out"
    flags = [f"--data={run.parent / 'tiny.h5'}", f"--out_dir={out}"]
    if kind == "last_pt":
        shutil.copytree(run, out)
        shutil.copy(path, out / "last.pt")
        flags += [*SIZES, "--resume"]
    elif kind == "init_pt":
        flags += [*SIZES, f"--init_from={path}"]
    else:
        flags += ["--device=cpu", f"--evaluate={path}"]
    try:
        with contextlib.redirect_stdout(io.StringIO()), locks_that_end():
            h = common.parse(vrnn_gauss.Hyperparameters, flags)
            if h.evaluate:
                common.evaluate_checkpoint(h)
            else:
                training = common.Training(h, h.k)
                update = tiny.update_with(training, vrnn_gauss.objective)
                tiny.make_updates(training, update, 1)
    finally:
        shutil.rmtree(out, ignore_errors=True)


@contextlib.contextmanager
def locks_that_end():
    """A run holds its folder until its process ends; here the next one is in the same process."""
    held = []
    lock = common.lock

    def kept_lock(path):
        held.append(lock(path))
        return held[-1]

    common.lock = kept_lock
    try:
        yield
    finally:
        common.lock = lock
        for descriptor in held:
            with contextlib.suppress(OSError):  # those of files are closed already
                os.close(descriptor)


def draw_run(name, data, folder, run):
    import plot_recon  # only here: every decoder imports what this file does

    copy = folder / "runs/one"
    shutil.copytree(run, copy)
    (copy / name).write_bytes(data)
    try:
        rows = plot_recon.read_folders([folder / "runs"])
        plot_recon.draw(rows, folder / "it.png")
    finally:
        (folder / "it.png").unlink(missing_ok=True)
        shutil.rmtree(folder / "runs")


def read_input(kind, data, folder, run):
    """`accepted` or `refused`."""
    try:
        if kind in ("log", "eval"):
            draw_run(dict(log="log.jsonl", eval="eval.json")[kind], data, folder, run)
            return "accepted"
        path = folder / f"it.{kind.rsplit('_')[-1].replace('members', 'npz')}"
        path.write_bytes(data)
        if kind == "h5":
            read_corpus_whole(path)
        elif kind in CHECKPOINTS:
            train_from(kind, path, run)
        else:
            return convert_beside_good_recordings(path)
        return "accepted"
    except common.UserError as error:
        assert str(error) and "\n" not in str(error), "not one sentence"
        return "refused"


def kind_of(case):
    return KINDS[case % len(KINDS)]


def damaged_input(kind, random, run):
    """The bytes of one that is to be read."""
    data = whole_input(kind, random, run)
    if kind == "npz_members":
        return damaged_members(data, random)
    if kind in CHECKPOINTS and random.random() < 0.5:
        return damaged_leaf(data, random)
    if kind not in ODD_FILES or random.random() < 0.5:
        return damaged(data, random)
    return data


INPUTS = {f"it.{suffix}" for suffix in ("npz", "npy", *SOUND, "h5", "pt")} | {"good.npz"}


def outcome_of(kind, data, run):
    """What reading an input comes to, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        signal.alarm(TIME_LIMIT)
        try:
            outcome = read_input(kind, data, Path(folder), run)
        except BaseException as error:  # whatever it is, it is what this script looks for
            outcome = f"{type(error).__name__}: {common.first_line(error)}"
        signal.alarm(0)
        left = {path.name for path in Path(folder).iterdir()} - INPUTS
        if left:
            outcome += f", left {sorted(left)}"
        os.chdir("/")
    return outcome


def read_inputs(first, last, seed, run):
    """Print `case outcome` for each case; `case ` alone where the process ends in it."""
    for case in range(first, last):
        kind = kind_of(case)
        data = damaged_input(kind, np.random.default_rng((seed, case)), run)
        print(case, end=" ", flush=True)
        print(outcome_of(kind, data, run), flush=True)


def outcomes(cases, seed, run):
    """Outcome of each case; a process that dies costs the case it was at."""
    found = []
    while len(found) < cases:
        which = (f"--first={len(found)}", f"--cases={cases}", f"--seed={seed}")
        # The process that forks decoders loads what they need only if its path has it from the start.
        path = dict(PYTHONPATH=str(tiny.ROOT))
        reader = ("tests/tools/fuzz", f"--run={run}", *which)
        result = tiny.run(*reader, cwd=run, brief=True, environment=path)
        for line in result.stdout.splitlines():
            _, outcome = line.split(" ", 1)
            if outcome:
                found.append(outcome)
        if result.returncode:
            is_hang = result.returncode == -signal.SIGALRM
            reason = "hang" if is_hang else f"crash {result.returncode}"
            found.append(f"{reason} {result.stderr[-300:]}")
    return found


def report(found):
    """Print the table; returns the failures."""
    failures = []
    count = collections.Counter()
    for case, outcome in enumerate(found):
        kind = kind_of(case)
        if outcome not in ("accepted", "refused"):
            failures.append(f"{kind} {case}: {outcome}")
            outcome = "failed"
        count[kind, outcome] += 1
    print(f"{'kind':14}{'accepted':>9}{'refused':>9}{'failed':>9}")
    for kind in KINDS:
        cells = [f"{count[kind, outcome]:9}" for outcome in ("accepted", "refused", "failed")]
        print(f"{kind:14}" + "".join(cells))
    print(f"{len(found)} inputs, {len(failures)} failures", *failures, sep="\n")
    return failures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=3000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return read_inputs(options.first, options.cases, options.seed, options.run)

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        tiny.write_tiny_data(Path(folder) / "tiny.h5")
        where = (f"--data={folder}/tiny.h5", f"--out_dir={run}")
        lengths = ("--max_updates=4", "--monitor_every=2")
        result = tiny.run("vrnn_gauss", *SIZES, *where, *lengths, cwd=folder, brief=True)
        assert result.returncode == 0, result.stderr
        found = outcomes(options.cases, options.seed, run)
    sys.exit(bool(report(found)))


if __name__ == "__main__":
    main()
