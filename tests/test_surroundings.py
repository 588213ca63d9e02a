"""Terminals, disks, signals and names that are not as they should be: none is worth a run."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import SIZES, command, make_updates, run, tiny_training, update_with

import common
import vrnn_gauss

pytestmark = pytest.mark.usefixtures("without_filter")

RUN = [*SIZES, "--max_updates=4", "--monitor_every=2"]


def finished(folder):
    """Whether a run is whole: its last state, and its evaluation."""
    last = torch.load(folder / "last.pt", weights_only=True)
    return last["update"] == 4 and (folder / "eval.json").exists()


# ---- what is printed -----------------------------------------------------------------------------


def test_a_closed_pipe_behind_the_output_ends_no_run(data, tmp_path):
    arguments = command("vrnn_gauss", *RUN, f"--data={data}", "--out_dir=run")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(arguments, cwd=tmp_path, **pipes) as process:
        process.stdout.close()  # as head does when it has seen enough
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert finished(tmp_path / "run")


def test_a_full_disk_behind_the_output_and_the_errors_ends_no_run(data, tmp_path):
    arguments = command("vrnn_gauss", *RUN, f"--data={data}", "--out_dir=run")
    with open("/dev/full", "w") as full:
        status = subprocess.run(arguments, cwd=tmp_path, stdout=full, stderr=full).returncode
    assert status == 0
    assert finished(tmp_path / "run")


def test_an_output_that_is_closed_from_the_start_ends_no_run(data, tmp_path):
    arguments = command("vrnn_gauss", *RUN, f"--data={data}", "--out_dir=run")
    shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *arguments]
    assert subprocess.run(shell, cwd=tmp_path).returncode == 0
    assert finished(tmp_path / "run")


def test_the_log_and_the_checkpoint_come_before_the_line_that_is_printed(
    data, tmp_path, monkeypatch
):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run", "--monitor_every=1")
    seen = []

    def look(text):
        saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["update"]
        logged = (tmp_path / "run/log.jsonl").read_text().count("\n") - 1
        seen.append((saved, logged))

    monkeypatch.setattr(common.tqdm, "write", look)
    make_updates(training, update_with(training, vrnn_gauss.objective), 2)
    assert seen == [(1, 1), (2, 2)]


# ---- signals -------------------------------------------------------------------------------------


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with common.stop_requests() as received:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- disks ---------------------------------------------------------------------------------------


def test_data_are_read_without_a_lock(data):
    """Some network file systems have none; here another holds it."""
    with open(data) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert len(common.open_corpus(data).train.audio) > 0


def unreadable(code):
    """An audio dataset whose reading fails as HDF5 says it."""

    class Audio:
        def __init__(self, audio):
            self.file = audio.file

        def __getitem__(self, chosen):
            name = os.strerror(code) if code else "Success"
            raise OSError(f"Can't read data (file read failed: errno = {code}, message = '{name}')")

    return Audio


def test_an_input_error_in_training_is_named_and_keeps_what_is_learnt(data, tmp_path):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run", "--monitor_every=100")
    make_updates(training, update_with(training, vrnn_gauss.objective), 3)
    learnt = {name: part.clone() for name, part in training.model.state_dict().items()}
    (tmp_path / "run/last.pt").unlink()
    training.read_ahead.clear()
    training.corpus.train.audio = unreadable(errno.ESTALE)(training.corpus.train.audio)
    with pytest.raises(common.UserError, match="cannot be read .*Stale.*go on with --resume"):
        make_updates(training, update_with(training, vrnn_gauss.objective), 20)
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["update"] >= 3
    if saved["update"] == 3:
        assert all(torch.equal(part, saved["model"][name]) for name, part in learnt.items())


def test_damage_is_told_from_an_input_error(data):
    split = common.open_corpus(data).train
    split.audio = unreadable(0)(split.audio)
    with pytest.raises(common.UserError, match="is damaged in split train .*make it again"):
        split.read([0], 5)


def test_a_first_checkpoint_that_cannot_be_written_is_not_to_be_resumed(tmp_path, monkeypatch):
    def fail(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    path = tmp_path / "last.pt"
    with pytest.raises(common.UserError, match="make room and start again"):
        common.save_checkpoint({}, path)
    path.write_text("an older one")
    with pytest.raises(common.UserError, match="make room and --resume"):
        common.save_checkpoint({}, path)


# ---- names and surroundings ----------------------------------------------------------------------


@pytest.mark.parametrize("size", ("2", ""))
def test_a_plain_run_does_not_wait_for_others_that_the_environment_names(
    data, tmp_path, monkeypatch, size
):
    monkeypatch.setenv("WORLD_SIZE", size)
    flags = (*RUN, f"--data={data}", "--out_dir=run")
    result = run("vrnn_gauss", *flags, cwd=tmp_path, brief=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert finished(tmp_path / "run")


def test_run_folders_and_data_files_may_have_names_that_are_no_text(data, tmp_path):
    odd_data = os.fsdecode(b"data\xff.h5")
    odd_run = os.fsdecode(b"run\xff")
    (tmp_path / odd_data).write_bytes(data.read_bytes())
    flags = [f"--data={odd_data}", f"--out_dir=runs/{odd_run}"]
    result = run("vrnn_gauss", *RUN, *flags, cwd=tmp_path, brief=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert finished(tmp_path / "runs" / odd_run)
    drawn = run("plot_recon", "runs", cwd=tmp_path)
    assert (drawn.returncode, drawn.stderr) == (0, "")


def test_a_table_is_printed_where_the_terminal_knows_ascii_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    print_it = "import common; common.run_as_script(lambda: print('1 \\u00b1 2'))"
    result = subprocess.run(
        [sys.executable, "-c", print_it],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(vrnn_gauss.__file__.rpartition("/")[0])},
    )
    assert (result.returncode, result.stdout) == (0, "1 \\xb1 2\n")


def test_a_home_folder_in_a_flag_is_that_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    flags = ["--out_dir=~/run", "--data=a~/b", "--init_from", "x"]
    h = common.parse(vrnn_gauss.Hyperparameters, flags)
    assert (h.out_dir, h.data, h.init_from) == ("/home/anna/run", "a~/b", "x")


def test_the_first_line_says_about_how_much_memory_an_update_takes(data, tmp_path, capsys):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run")
    assert "GB of memory" in capsys.readouterr().out
    # of 15.9 M parameters and 128 sequences: 0.3 GB of the former, and what the rows keep
    weights = sum(p.numel() for p in training.model.parameters() if p.dim() == 2)
    outputs = sum(p.shape[0] for p in training.model.parameters() if p.dim() == 2)
    rows = 4 * 5
    assert training.memory_in_gb() == pytest.approx(4e-9 * (5 * weights + 3 * rows * outputs))


# ---- arrays --------------------------------------------------------------------------------------

WAVE = (np.sin(np.arange(4_000) / 7) * 9_000).astype(np.int16)


def found_in(path, allow_pickle=False):
    """{name: number of samples, or why there are none} of an array file."""
    found = {}
    try:
        for recording in common.array_recordings(path, "x", allow_pickle):
            try:
                found[recording.name] = sum(map(len, common.blocks_of(recording)))
            except common.BadAudio as why:
                found[recording.name] = str(why)
    except common.BadAudio as why:
        found["file"] = str(why)
    return found


def saved(path, array):
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    "array, why",
    (
        (np.zeros((188, 80)) - 1, "its shape (188, 80) is neither"),
        (np.zeros((2_000, 800)) - 1, "its shape (2000, 800) is neither"),
        (np.zeros((500, 9), np.int16), "at most 8 channels"),
        (np.linspace(0, 1, 5_000), "none of its values is negative"),
        (np.linspace(0, 1, 5_000, dtype=np.float32), "none of its values is negative"),
    ),
)
def test_features_are_not_taken_for_audio(tmp_path, array, why):
    assert why in found_in(saved(tmp_path / "mel.npy", array))["x"]


def test_a_recording_shorter_than_a_frame_is_skipped_with_its_reason(tmp_path):
    """As a row of features is, which has as many values as there are frames."""
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/short.npy", WAVE[:199])
    for i in range(3):
        np.save(tmp_path / f"in/{i}.npy", WAVE[: 200 + i])
    flags = ["in", "--out=out.h5", "--valid=.3", "--test=.3"]
    result = run("prepare_blizzard", *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "skipped: 1" in result.stdout
    assert "short.npy: its 199 samples are fewer than a frame's 200" in result.stdout


def objects(*members, shape=None):
    """An array of arrays, as it is made on purpose."""
    array = np.empty(len(members), object)
    array[:] = members
    return array if shape is None else array.reshape(shape)


@pytest.mark.parametrize(
    "array, lengths",
    (
        (np.array([WAVE], dtype=object), [4_000]),  # (1, 4000) of Python integers
        (np.array([WAVE, WAVE], dtype=object), [4_000, 4_000]),
        (np.array([[WAVE], [WAVE]], dtype=object), [4_000, 4_000]),  # (2, 1, 4000)
        (np.array(WAVE.tolist(), dtype=object), [4_000]),
        (np.array(np.stack([WAVE, WAVE], 1), dtype=object), [4_000]),  # two channels
        (objects(WAVE, WAVE[:3_000]), [4_000, 3_000]),
        (objects(WAVE.tolist(), WAVE[:3_000]), [4_000, 3_000]),
        (objects(WAVE, WAVE[:3_000], shape=(2, 1)), [4_000, 3_000]),
    ),
)
def test_each_member_of_an_array_of_arrays_is_a_recording(tmp_path, array, lengths):
    found = found_in(saved(tmp_path / "x.npy", array), allow_pickle=True)
    assert list(found.values()) == lengths
    np.savez(tmp_path / "x.npz", a=array)
    assert list(found_in(tmp_path / "x.npz", allow_pickle=True).values()) == lengths


def test_an_array_of_no_arrays_is_named(tmp_path):
    path = saved(tmp_path / "x.npy", np.empty(0, object))
    assert found_in(path, allow_pickle=True) == {"x": "it holds no recordings"}


@pytest.mark.parametrize("allow_pickle", (False, True))
@pytest.mark.parametrize(
    "content",
    (
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html><body>404</body></html>",
        b"\x1f\x8b\x08\x00gzip",
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"",
        b"\x80\x04\x95a pickle",
    ),
)
@pytest.mark.parametrize("suffix", ("npy", "npz"))
def test_what_is_no_array_file_is_called_so_and_nobody_is_told_to_trust_it(
    tmp_path, suffix, content, allow_pickle
):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    assert list(found_in(path, allow_pickle).values()) == [f"it is no .{suffix} file"]


def test_an_array_file_of_the_other_kind_is_called_no_file_of_its_kind(tmp_path):
    saved(tmp_path / "x.npy", WAVE).rename(tmp_path / "x.npz")
    assert found_in(tmp_path / "x.npz") == {"file": "it is no .npz file"}
    np.savez(tmp_path / "y.npz", a=WAVE)
    (tmp_path / "y.npz").rename(tmp_path / "y.npy")
    assert found_in(tmp_path / "y.npy") == {"x": "it is no .npy file"}


@pytest.mark.parametrize("allow_pickle", (False, True))
def test_a_torn_end_is_no_pickle(tmp_path, allow_pickle):
    path = saved(tmp_path / "x.npy", WAVE)
    path.write_bytes(path.read_bytes()[:3_000])
    np.savez(tmp_path / "y.npz", a=WAVE)
    (tmp_path / "y.npz").write_bytes((tmp_path / "y.npz").read_bytes()[:3_000])
    for torn in (path, tmp_path / "y.npz"):
        (why,) = found_in(torn, allow_pickle).values()
        assert "cannot be read" in why
        assert "pickle" not in why


@pytest.mark.parametrize("array", (WAVE, np.array([WAVE], dtype=object)))
def test_arrays_after_the_first_in_one_file_are_not_lost_in_silence(tmp_path, array):
    with open(tmp_path / "x.npy", "wb") as file:
        for _ in range(3):
            np.save(file, array, allow_pickle=True)
    (why,) = found_in(tmp_path / "x.npy", allow_pickle=True).values()
    assert "bytes follow its first array; save every array in a file of its own" in why
    if array is WAVE:
        assert found_in(tmp_path / "x.npy") == found_in(tmp_path / "x.npy", allow_pickle=True)


def test_evaluations_say_where_the_yardsticks_are(data, tmp_path):
    flags = (*RUN, f"--data={data}", "--out_dir=run")
    result = run("vrnn_gauss", *flags, cwd=tmp_path, brief=True)
    assert "no yardsticks" in result.stdout
    assert json.loads((tmp_path / "run/eval.json").read_text())["yardsticks"] == {}
