"""The scripts as a user runs them: as processes, on tiny data."""

import copy
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time

import fuzz
import h5py
import numpy as np
import pytest
import soundfile
import torch
from kill import kill_and_compare
from tiny import (
    ROOT,
    SIZES,
    Fork,
    assert_same_run,
    lines_of,
    log_of,
    make_updates,
    run,
    tiny_training,
    update_with,
    write_quiet_data,
    write_recordings,
)

import common
import vrnn_gauss
import vrnn_gauss_iwae

SCRIPTS = ("vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae")
RUN_FILES = {
    "config.json",
    "log.jsonl",
    "last.pt",
    "best.pt",
    "eval.json",
    "windows.csv",
    "samples",
}


BOUNDS = (
    "elbo",
    "kl",
    "elbo_6",
    "log_w_std",
    "iwae_2",
    "ess_iwae_2",
    "iwae_6",
    "ess_iwae_6",
    "smc_6",
    "ess_smc_6",
)
SPEECH = ("real", "sample", "continued", "resynthesised")
THIRTY_UPDATES = ("--data=data/tiny.h5", "--max_updates=30", "--monitor_every", "10")


def trained(script, *arguments, cwd, brief=True):
    result = run(script, *SIZES, *arguments, cwd=cwd, brief=brief)
    assert result.returncode == 0, result.stderr
    return result


def assert_refused(result, *words):
    """In one sentence, with status 2."""
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def evaluation_in(out):
    return json.loads((out / "eval.json").read_text())


def bounds_in(out):
    return evaluation_in(out)["bounds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with data/tiny.h5, converted by the script from smooth noise in data/in."""
    folder = tmp_path_factory.mktemp("work")
    write_recordings(folder / "data/in")
    flags = ("data/in", "--out=data/tiny.h5", "--valid=.2", "--test=.2")
    result = run("prepare_blizzard", *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "total           12" in result.stdout
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """A folder with a run of each script."""
    for script in SCRIPTS:
        flags = (*THIRTY_UPDATES, f"--out_dir=runs/{script}")
        trained(script, *flags, cwd=folder, brief=False)
    return folder / "runs"


def check_run(out):
    assert {path.name for path in out.iterdir()} == RUN_FILES
    check_log(out)
    check_evaluation(out)
    check_windows(out)
    check_speech(out / "samples")


def check_log(out):
    _, *lines = log_of(out)
    assert [line["update"] for line in lines] == [10, 20, 30]
    assert [line["sequences"] for line in lines] == [40, 80, 120]
    first, _, last = (line["valid"]["iwae_2"]["nats_per_frame"] for line in lines)
    assert last > first


def check_evaluation(out):
    bounds = bounds_in(out)
    assert tuple(bounds) == BOUNDS
    nats = [bounds[name]["nats_per_frame"] for name in ("elbo_6", "iwae_2", "iwae_6")]
    assert nats == sorted(nats)
    assert 1 <= bounds["ess_iwae_6"]["mean"] <= 6
    assert 1 <= bounds["ess_smc_6"]["mean"] <= 6
    whole = evaluation_in(out)["whole_recordings"]["smc_6"]
    assert whole["frames"] == whole["recordings"] * (2_993 // 20)
    assert whole["nats_per_frame"] == pytest.approx(bounds["smc_6"]["nats_per_frame"], abs=5)
    header, *_ = log_of(out)
    nats = bounds["elbo"]["nats_per_frame"]
    bits = (np.log(header["data"]["std"]) - nats / 20) / np.log(2)
    assert bounds["elbo"]["bits_per_sample"] == pytest.approx(bits)


def check_windows(out):
    windows = np.genfromtxt(out / "windows.csv", delimiter=",", names=True)
    assert len(windows) == evaluation_in(out)["windows"]
    for name in ("elbo", "kl", "iwae_2", "smc_6"):
        nats = bounds_in(out)[name]["nats_per_frame"]
        assert windows[name].mean() == pytest.approx(nats, abs=1e-3)


def check_speech(samples):
    expected = {f"{kind}_{i}.wav" for kind, i in itertools.product(SPEECH, range(2))}
    assert {path.name for path in samples.iterdir()} == expected
    audio, rate = soundfile.read(samples / "sample_0.wav", dtype="int16")
    assert rate == 16_000
    assert len(audio) == 400 * 20
    assert audio.std() > 0
    real, rate = soundfile.read(samples / "real_0.wav", dtype="int16")
    assert rate == 16_000
    assert len(real) == 2_980  # whole frames of a recording of 2,993 samples
    assert real.std() > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_evaluates_and_generates(runs, script):
    check_run(runs / script)


@pytest.mark.parametrize("flag", ("--dreg", "--resample"))
def test_variants_of_iwae_train_and_evaluate(folder, flag):
    out = folder / f"variant{flag}"
    flags = (*THIRTY_UPDATES, f"--out_dir={out}", flag)
    trained("vrnn_gauss_iwae", *flags, cwd=folder, brief=False)
    check_run(out)


def test_recon_png_and_the_table_are_made_from_logs_alone(folder, runs):
    result = run("plot_recon", "runs", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "recon.png").read_bytes().startswith(b"\x89PNG")
    assert all(script in result.stdout for script in SCRIPTS)
    for script, name in zip(SCRIPTS, ("VRNN", "VAE_5", "IWAE_5")):
        bounds = bounds_in(runs / script)
        row = []
        for bound in ("elbo", "iwae_2", "iwae_6", "smc_6", "kl"):
            row.append(f"{bounds[bound]['nats_per_frame']:.2f}")
        assert f"| {name} | 1 | " in result.stdout
        assert " | ".join(row) in result.stdout


def test_the_table_tells_runs_apart_and_averages_those_of_one_kind(folder, runs, tmp_path):
    elbo = bounds_in(runs / "vrnn_gauss")["elbo"]["nats_per_frame"]
    for name, setting, better in (
        ("one", dict(seed=0), 0),
        ("two", dict(seed=1), 2),
        ("wide", dict(rnn_dim=24), 0),
    ):
        out = tmp_path / "three" / name
        shutil.copytree(runs / "vrnn_gauss", out)
        header, *lines = lines_of(out / "log.jsonl")
        header["config"] |= setting
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, [header, *lines])))
        evaluation = evaluation_in(out)
        evaluation["bounds"]["elbo"]["nats_per_frame"] += better
        (out / "eval.json").write_text(json.dumps(evaluation))
    result = run("plot_recon", tmp_path / "three", cwd=tmp_path)
    assert f"| VRNN, 12 units | 2 | {elbo + 1:.2f} ± 12.71 | " in result.stdout
    assert f"| VRNN, 24 units | 1 | {elbo:.2f} | " in result.stdout
    assert result.stdout.count("| 0.00 |") == 1  # of the wide run and the other of its seed


def test_runs_of_two_folders_are_compared_though_their_labels_are_equal(runs, tmp_path):
    for folder, better in (("one", 0), ("two", 3)):
        out = tmp_path / folder / "vrnn"
        shutil.copytree(runs / "vrnn_gauss", out)
        evaluation = evaluation_in(out)
        evaluation["bounds"]["smc_6"]["nats_per_frame"] += better
        (out / "eval.json").write_text(json.dumps(evaluation))
    result = run("plot_recon", "one", "two", cwd=tmp_path)
    one, two = (line for line in result.stdout.splitlines() if line.startswith("| VRNN |"))
    assert one.endswith("|  |")
    assert two.endswith("| 3.00 |")


@pytest.mark.parametrize(
    "file, text, instead",
    (
        ("eval.json", '"elbo": {', '"elbow": {'),
        ("log.jsonl", '"seed"', '"sead"'),
        ("log.jsonl", '"std"', '"sd"'),
        ("log.jsonl", '"std": ', '"std": -'),
        ("log.jsonl", '"update": 30', ""),
    ),
)
def test_a_damaged_run_is_named_by_the_plot_in_one_sentence(runs, tmp_path, file, text, instead):
    shutil.copytree(runs / "vrnn_gauss", tmp_path / "runs/damaged")
    damaged = tmp_path / "runs/damaged" / file
    assert text in damaged.read_text()
    damaged.write_text(damaged.read_text().replace(text, instead, 1))
    assert_refused(run("plot_recon", "runs", cwd=tmp_path), "runs/damaged holds no")


def test_the_bound_of_a_model_does_not_depend_on_the_script(folder, runs):
    best = runs / "vrnn_gauss/best.pt"
    flags = ("--data=data/tiny.h5", f"--init_from={best}", "--max_updates=1", "--lr=1e-30")
    for script in SCRIPTS:
        out = folder / "same" / script
        trained(script, *flags, f"--out_dir={out}", cwd=folder)
        assert bounds_in(out) == bounds_in(best.parent)


@pytest.mark.parametrize(
    "script, flags",
    (
        ("vrnn_gauss_iwae", ["--resample", "--k=3"]),
        ("vrnn_gauss_alt_nll", ["--k=3"]),
    ),
)
def test_stopping_and_resuming_equals_never_stopping(folder, script, flags):
    flags = ("--data=data/tiny.h5", "--monitor_every=7", *flags)
    whole = folder / f"whole-{script}"
    parts = folder / f"parts-{script}"
    trained(script, *flags, "--max_updates=21", f"--out_dir={whole}", cwd=folder)
    trained(script, *flags, "--max_updates=7", f"--out_dir={parts}", cwd=folder)
    trained(script, *flags, "--max_updates=21", f"--out_dir={parts}", "--resume", cwd=folder)
    assert_same_run(whole, parts)
    config = lines_of(whole / "log.jsonl")[0]["config"]
    config_of_parts = lines_of(parts / "log.jsonl")[0]["config"]
    assert config == config_of_parts | dict(out_dir=str(whole))
    assert config_of_parts == json.loads((parts / "config.json").read_text())


def copy_of_a_run(runs, tmp_path):
    """A folder that holds a run of 30 updates, and the flags that take it to 40."""
    out = tmp_path / "copy"
    shutil.copytree(runs / "vrnn_gauss", out)
    flags = f"--data=data/tiny.h5 --out_dir={out} --monitor_every=10 --resume --max_updates=40"
    return out, flags.split()


@pytest.mark.parametrize(
    "damage",
    (
        lambda log: log + '{"update": 31, "sequ',
        lambda log: log + '{"update": 31}\n',
        lambda log: "",
        lambda log: "{}\n",
    ),
)
def test_a_damaged_log_is_made_whole_on_resume(folder, runs, tmp_path, damage):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    before = log_of(folder_copy)
    log = folder_copy / "log.jsonl"
    log.write_text(damage(log.read_text()))
    trained("vrnn_gauss", *flags, cwd=folder)
    *seen, last = log_of(folder_copy)
    assert seen == before
    assert [line["update"] for line in seen[1:]] == [10, 20, 30]
    assert last["update"] == 40


def flip_a_bit(path):
    """The bytes of a checkpoint, with another bit in the middle of a tensor."""
    state = path.read_bytes()
    weight = torch.load(path, weights_only=True)["model"]["lstm_h.weight"].numpy().tobytes()
    middle = state.index(weight) + len(weight) // 2
    return state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    (
        lambda out: b"no checkpoint",
        lambda out: (out / "best.pt").read_bytes(),
        lambda out: flip_a_bit(out / "last.pt"),
    ),
)
def test_a_damaged_last_pt_is_refused_on_resume_with_a_remedy(folder, runs, tmp_path, damage):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    (folder_copy / "last.pt").write_bytes(damage(folder_copy))
    result = run("vrnn_gauss", *SIZES, *flags, cwd=folder)
    remedy = "start another --out_dir, with --init_from best.pt"
    assert_refused(result, "last.pt is not a usable checkpoint", remedy)


@pytest.mark.parametrize(
    "part, value",
    (
        ("states", {}),
        ("counts", {}),
        ("generator", torch.zeros(3)),
        ("log", []),
        ("log", [{}]),
        ("seconds", None),
        ("best", "x"),
        ("update", "x"),
        ("update", -30),
    ),
)
def test_a_state_with_a_senseless_part_is_refused_by_name(folder, runs, tmp_path, part, value):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    state = torch.load(folder_copy / "last.pt", weights_only=True)
    torch.save(state | {part: value}, folder_copy / "last.pt")
    assert_refused(run("vrnn_gauss", *SIZES, *flags, cwd=folder), "last.pt")


def test_a_run_that_goes_on_has_no_evaluation_of_what_it_was(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    flags += [f"--data={folder / 'data/tiny.h5'}"]
    training = common.Training(common.parse(vrnn_gauss.Hyperparameters, [*SIZES, *flags]), 1)
    assert training.made == 30
    assert not (folder_copy / "eval.json").exists()


def test_a_run_is_not_resumed_to_fewer_updates_than_it_has_made(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    before = (folder_copy / "config.json").read_text()
    result = run("vrnn_gauss", *SIZES, *flags, "--max_updates=29", cwd=folder)
    assert_refused(result)
    assert result.stderr == "error: --max_updates=29: 30 are made; give no fewer\n"
    assert (folder_copy / "config.json").read_text() == before
    assert (folder_copy / "eval.json").exists()


def test_a_run_without_its_best_checkpoint_is_told_so(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    (folder_copy / "best.pt").unlink()
    result = run("vrnn_gauss", *SIZES, *flags, "--max_updates=30", cwd=folder)
    assert_refused(result, f"{folder_copy / 'best.pt'} is missing")


def test_a_held_out_split_without_a_window_is_refused_before_the_training(tmp_path):
    write_quiet_data(tmp_path / "it.h5", train=[3_000] * 8, valid=[3_000], test=[99])
    flags = ("--data=it.h5", "--out_dir=out", "--max_updates=9")
    result = run("vrnn_gauss", *SIZES, *flags, cwd=tmp_path)
    assert_refused(result, "no recording of the split test holds a window")
    assert not (tmp_path / "out").exists()


def test_speech_is_written_where_a_recording_is_shorter_than_a_frame(tmp_path):
    write_quiet_data(tmp_path / "it.h5", train=[3_000] * 8, valid=[3_000], test=[19, 3_000])
    trained("vrnn_gauss", "--data=it.h5", "--out_dir=out", "--max_updates=2", cwd=tmp_path)
    assert len(list((tmp_path / "out/samples").glob("real_*.wav"))) == 1


def test_a_run_folder_is_written_by_one_process_at_a_time(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    other = common.lock(folder_copy)
    result = run("vrnn_gauss", *SIZES, *flags, cwd=folder)
    assert_refused(result, "is being written by another process")
    os.close(other)
    trained("vrnn_gauss", *flags, cwd=folder)


def test_a_failed_write_keeps_the_last_good_state(folder, runs, tmp_path, monkeypatch):
    folder_copy, _ = copy_of_a_run(runs, tmp_path)
    before = (folder_copy / "last.pt").read_bytes()

    def disk_full(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(common.UserError, match="last.pt cannot be written"):
        common.save_checkpoint({}, folder_copy / "last.pt")
    assert before == (folder_copy / "last.pt").read_bytes()
    assert not list(folder_copy.glob("*.partial"))


def test_runs_that_are_killed_and_resumed_equal_one_that_was_not(tmp_path):
    assert kill_and_compare(tmp_path, kills=2, updates=100) == [True] * 2


def test_damaged_inputs_are_accepted_or_refused_and_nothing_else(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", f"--cases={len(fuzz.KINDS)}", "--seed=1"])
    with pytest.raises(SystemExit) as end:
        fuzz.main()
    assert end.value.code == 0, capsys.readouterr().out


def test_other_data_under_the_same_name_is_refused_on_resume(folder, runs, tmp_path):
    _, flags = copy_of_a_run(runs, tmp_path)
    other = tmp_path / "tiny.h5"
    shutil.copy(folder / "data/tiny.h5", other)
    with h5py.File(other, "a") as file:
        file.attrs["mean"] = 1.0
    result = run("vrnn_gauss", *SIZES, *flags, f"--data={other}", cwd=folder)
    assert_refused(result, "--data was {'file': 'tiny.h5', ")


@pytest.mark.parametrize(
    "number, status",
    (
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 138),
    ),
)
def test_a_signal_saves_and_the_same_command_resumes(folder, number, status):
    flags = [*SIZES, "--data=data/tiny.h5", "--max_updates=80", "--monitor_every=20"]
    whole = folder / "unstopped"
    stopped = folder / f"stopped-{status}"
    if not whole.exists():
        unstopped = (*flags, f"--out_dir={whole}")
        assert run("vrnn_gauss", *unstopped, cwd=folder, brief=True).returncode == 0
    flags.append(f"--out_dir={stopped}")
    process = Fork("vrnn_gauss", *flags, cwd=folder)
    while not (stopped / "last.pt").exists():
        assert process.poll() is None, process.ended().stderr
        time.sleep(0.01)
    process.send_signal(number)
    result = process.ended()
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[-1].endswith("; go on with the same command and --resume")
    assert run("vrnn_gauss", *flags, "--resume", cwd=folder, brief=True).returncode == 0
    assert_same_run(whole, stopped)


@pytest.mark.parametrize(
    "arguments, words",
    (
        (["--rnn_dim=abc"], ["--rnn_dim", "abc"]),
        (["--rnn_dims=3"], ["--rnn_dims", "did you mean --rnn_dim?"]),
        (["--qqq"], ["--qqq", "--help"]),
        (["--data=missing.h5"], ["missing.h5", "does not exist", "prepare_blizzard.py"]),
        (["--data=other.h5"], ["other.h5", "not of format"]),
        (["--data=text.h5"], ["text.h5", "is not readable HDF5", "prepare_blizzard.py"]),
        (["--k=0"], ["--k=0", "a whole number from 1"]),
        (["--lr=nan"], ["--lr=nan"]),
        (["--eval_k=5,100"], ["--eval_k", "5,100"]),
        (["--eval_k", "5", "0"], ["--eval_k=(5, 0)", "a whole number from 1"]),
        (["--batch_size=9999"], ["--batch_size=9999", "smaller"]),
        (["--device=cuda:99"], ["--device=cuda:99", "--device=cpu"]),
        (["--init_from=missing.pt"], ["--init_from", "missing.pt"]),
        (["--resume"], ["--resume", "last.pt"]),
        (["--out_dir=runs/vrnn_gauss"], ["runs/vrnn_gauss", "--resume"]),
        (
            ["--out_dir=runs/vrnn_gauss", "--resume", "--rnn_dim=13"],
            ["--rnn_dim was 12 and is now 13"],
        ),
        (["--out_dir=runs/vrnn_gauss", "--resume", "--eval_k=3"], ["--eval_k was", "is now"]),
        (["--seed=1e30"], ["--seed", "1e30"]),
        ([f"--seed={10**30}"], ["--seed", "from 0 to 1000000000"]),
        (["--rnn_dim=1000000000"], ["the memory does not suffice", "widths"]),
        (["--device=meta"], ["--device=meta", "--device=cpu"]),
        (["--device=hpu"], ["--device=hpu", "--device=cpu"]),
        (["--out_dir="], ["--out_dir or", "is empty"]),
    ),
)
def test_bad_input_gets_one_sentence_and_status_2(folder, runs, arguments, words):
    (folder / "text.h5").write_text("not HDF5")
    with h5py.File(folder / "other.h5", "w") as file:
        file["audio"] = np.zeros(9)
    flags = (*SIZES, "--data=data/tiny.h5", "--out_dir=new", *arguments)
    assert_refused(run("vrnn_gauss", *flags, cwd=folder), *words)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "script, arguments, words",
    (
        (
            "prepare_blizzard",
            ["data/in", "--out=data/tiny.h5"],
            ["data/tiny.h5", "already exists", "--force"],
        ),
        ("prepare_blizzard", ["nowhere"], ["nowhere", "does not exist"]),
        ("prepare_blizzard", [], ["--demo"]),
        ("plot_recon", ["nowhere"], ["nowhere", "no runs"]),
        ("prepare_blizzard", ["data/in", "--vald=.1"], ["--vald", "did you mean --valid?"]),
        ("prepare_blizzard", ["--demo", "--seed=x"], ["--seed", "'x'"]),
        ("plot_recon", ["runs", "--out=nowhere/x.png"], ["nowhere/x.png"]),
        ("plot_recon", ["runs", "--out=x.txt"], ["--out=x.txt", ".png, .pdf or .svg"]),
        ("plot_recon", ["--demo", "--out=x.txt"], ["--out=x.txt", ".png, .pdf or .svg"]),
        ("plot_recon", ["runs", "--dem"], ["--dem", "did you mean --demo?"]),
    ),
)
def test_other_scripts_refuse_in_one_sentence(folder, runs, script, arguments, words):
    assert_refused(run(script, *arguments, cwd=folder), *words)
    assert not (folder / "runs/demo").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_hyperparameter_with_its_comment_and_the_published_default(script):
    result = run(script, "--help", cwd=ROOT)
    assert result.returncode == 0
    assert result.stderr == ""
    text = " ".join(result.stdout.split())
    for name in (
        "data out_dir seed device x_dim z_dim rnn_dim q_z_dim p_z_dim p_x_dim x2s_dim z2s_dim "
        "ar_order components k seq_frames reset_freq batch_size lr max_updates monitor_every grad_clip "
        "weight_norm dequantize init_from evaluate resume demo"
    ).split():
        assert f"--{name}" in text
    for shown in (
        importlib.import_module(script).__doc__.split(" (")[0],
        "LSTM units (default: 1000)",
        "(default: 0.0003)",
        "(default: 128)",
        "--no_dequantize",
    ):
        assert shown in text


@pytest.mark.parametrize(
    "script, shown",
    (
        (
            "prepare_blizzard",
            ("files, and folders to search", "executes what the file says", "--demo"),
        ),
        (
            "plot_recon",
            ("of runs (default: runs;", "picture to write (default: recon.png)", "--demo"),
        ),
    ),
)
def test_other_scripts_have_help_too(script, shown):
    result = run(script, "--help", cwd=ROOT)
    assert result.returncode == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    for words in shown:
        assert words in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.reload(importlib.import_module(script))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def training(folder, tmp_path):
    """A function from flags to the Training of vrnn_gauss.py."""

    def make(*flags):
        _, training = tiny_training(vrnn_gauss, folder / "data/tiny.h5", tmp_path / "run", *flags)
        return training

    return make


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def are_equal(tensors, others):
    return all(itertools.starmap(torch.equal, zip(tensors, others, strict=True)))


def scaled(factor):
    """An objective that is not finite where the factor is not."""
    return lambda rollout: rollout.nll_TBK.mean() * factor


def test_steps_that_are_not_finite_change_nothing_and_are_counted(training):
    training = training("--weight_norm=0.5")
    factors = iter((1, float("nan"), float("inf"), 1))
    update = update_with(training, lambda rollout: scaled(next(factors))(rollout))
    parameters = []
    in_a_row = []
    carries = []

    def update_and_keep():
        update()
        parameters.append(parameters_of(training.model))
        in_a_row.append(training.counts["skipped_in_a_row"].item())
        assert all(part.isfinite().all() for part in training.next_state)
        carries.append(training.next_state[0].any().item())

    make_updates(training, update_and_keep, 4)
    first, second, third, fourth = parameters
    assert are_equal(first, second)
    assert are_equal(second, third)
    assert not are_equal(third, fourth)
    assert all(p.isfinite().all() for p in fourth)
    assert carries == [True, False, False, True]
    assert in_a_row == [0, 1, 2, 0]
    assert training.counts["skipped"] == 2
    assert log_of(training.folder)[-1]["skipped"] == 2


def test_restoring_leaves_a_training_in_place(training):
    training = training()
    before = copy.deepcopy(training.checkpoint())

    def tensors():
        return [
            *training.model.parameters(),
            *training.averaged.parameters(),
            *training.counts.values(),
            training.pcm,
            *training.state,
            *training.next_state,
        ]

    places = tensors()
    make_updates(training, update_with(training, vrnn_gauss.objective), 3)
    assert training.made == 3
    assert training.seconds > 0
    assert training.best > -math.inf
    training.restore(before)
    assert training.made == 0
    assert training.seconds == 0
    assert training.best == -math.inf
    assert are_equal(before["model"].values(), training.model.state_dict().values())
    assert are_equal(before["averaged"].values(), training.averaged.state_dict().values())
    assert before["counts"].keys() == training.counts.keys()
    assert are_equal(before["counts"].values(), training.counts.values())
    assert are_equal(before["states"].values(), training.state + training.next_state)
    assert torch.equal(training.generator.get_state(), before["generator"])
    assert all(a is b for a, b in zip(places, tensors(), strict=True))
    for moments in training.optimiser.state.values():
        assert moments["step"] == 0
        assert not moments["exp_avg"].any()
        assert not moments["exp_avg_sq"].any()


def test_training_stops_with_a_sentence_after_many_steps_that_are_not_finite(training):
    training = training()
    update = update_with(training, scaled(float("nan")))
    why = "not finite in 10 updates in a row, up to update 10;"
    with pytest.raises(common.UserError, match=why):
        make_updates(training, update, 100)


def test_noise_on_x_fades_to_a_hundredth_and_ends(training):
    training = training("--x_noise=0.5", "--x_noise_updates=100", "--no-dequantize")
    training.draw = lambda *drawn: 1.0
    found = []
    for made in (0, 50, 99, 100, 1000):
        training.counts["made"].fill_(made)
        noise_TBX = training.window() - common.normalise(training.pcm, training.corpus)
        found.append(noise_TBX.mean().item())
    assert found == pytest.approx([0.5, 0.05, 0.5 * 0.01**0.99, 0, 0])


@pytest.mark.parametrize(
    "made, expected", [(0, 0.02), (50, 0.01), (99, 0.0002), (100, 0.0002), (1000, 0.0002)]
)
def test_the_learning_rate_falls_to_a_hundredth(training, made, expected):
    training = training("--lr=0.02", "--lr_updates=100", "--weight_norm=0")
    training.counts["made"].fill_(made)
    bias = training.model.decoder[-1].bias
    before = bias.detach().clone()
    make_updates(training, update_with(training, vrnn_gauss.objective), 1)
    # The first step of Adam has the length of the learning rate in every direction.
    moved = (bias.detach() - before).abs()
    assert moved.median().item() == pytest.approx(expected, rel=1e-2)


def test_averaged_weights_follow_the_trained_ones(training):
    training = training("--ema=0.5")
    update = update_with(training, scaled(1))
    expected = parameters_of(training.model)

    def update_and_average():
        update()
        made = training.made
        decay = min(0.5, (1 + made) / (10 + made))
        for average, p in zip(expected, parameters_of(training.model)):
            average.mul_(decay).add_((1 - decay) * p)

    make_updates(training, update_and_average, 20)
    for averaged, p in zip(training.averaged.parameters(), expected):
        torch.testing.assert_close(averaged, p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("objective", (vrnn_gauss.objective, vrnn_gauss_iwae.objective))
def test_updates_of_the_cuda_graph_equal_updates_launched_one_by_one(folder, tmp_path, objective):
    flags = ("--device=cuda", "--k=3", "--grad_clip=2", "--lr_updates=30")
    models = []
    for captures in (False, True):
        out = tmp_path / f"captured-{captures}"
        _, training = tiny_training(vrnn_gauss_iwae, folder / "data/tiny.h5", out, *flags)
        update = update_with(training, objective)
        before = parameters_of(training.model)
        captured = training.captured(update) if captures else update
        assert (captured.__name__ == "replay") == captures
        assert are_equal(before, training.model.parameters()), "to capture it was an update"
        make_updates(training, captured, 20)
        assert training.counts["made"] == 20
        assert training.counts["skipped"] == 0
        models.append(training.model)
    one_by_one, graph = models
    for p, p_of_graph in zip(one_by_one.parameters(), graph.parameters(), strict=True):
        torch.testing.assert_close(p, p_of_graph, rtol=1e-4, atol=1e-5)
