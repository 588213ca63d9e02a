"""The scripts as a user runs them: as processes, on tiny data."""

import copy
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import soundfile
import torch
from kill import kill_and_compare
from tiny import (
    ROOT,
    SIZES,
    assert_same_run,
    command,
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


def trained(script, *arguments, cwd):
    result = run(script, *SIZES, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with data/tiny.h5, converted by the script from smooth noise in data/in."""
    folder = tmp_path_factory.mktemp("work")
    write_recordings(folder / "data/in")
    result = run(
        "prepare_blizzard", "data/in", "--out=data/tiny.h5", "--valid=.2", "--test=.2", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    assert "total           12" in result.stdout
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """A folder with a run of each script."""
    for script in SCRIPTS:
        trained(
            script,
            "--data=data/tiny.h5",
            f"--out_dir=runs/{script}",
            "--max_updates=30",
            "--monitor_every",
            "10",
            cwd=folder,
        )
    return folder / "runs"


def check_run(out):
    assert {path.name for path in out.iterdir()} == RUN_FILES
    header, *lines = log_of(out)
    assert [line["update"] for line in lines] == [10, 20, 30]
    assert [line["sequences"] for line in lines] == [40, 80, 120]
    assert (
        lines[-1]["valid"]["iwae_2"]["nats_per_frame"]
        > lines[0]["valid"]["iwae_2"]["nats_per_frame"]
    )
    evaluation = json.loads((out / "eval.json").read_text())
    bounds = evaluation["bounds"]
    assert list(bounds) == [
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
    ]
    nats = [bounds[name]["nats_per_frame"] for name in ("elbo_6", "iwae_2", "iwae_6")]
    assert nats == sorted(nats)
    assert 1 <= bounds["ess_iwae_6"]["mean"] <= 6 and 1 <= bounds["ess_smc_6"]["mean"] <= 6
    whole = evaluation["whole_recordings"]["smc_6"]
    assert whole["frames"] == whole["recordings"] * (2_993 // 20)
    assert whole["nats_per_frame"] == pytest.approx(bounds["smc_6"]["nats_per_frame"], abs=5)
    windows = np.genfromtxt(out / "windows.csv", delimiter=",", names=True)
    assert len(windows) == evaluation["windows"]
    for name in ("elbo", "kl", "iwae_2", "smc_6"):
        assert windows[name].mean() == pytest.approx(bounds[name]["nats_per_frame"], abs=1e-3)
    elbo = bounds["elbo"]
    assert elbo["nats_per_sequence"] == pytest.approx(5 * elbo["nats_per_frame"])
    assert elbo["bits_per_sample"] == pytest.approx(
        (np.log(header["data"]["std"]) - elbo["nats_per_frame"] / 20) / np.log(2)
    )
    audio, rate = soundfile.read(out / "samples/sample_0.wav", dtype="int16")
    assert rate == 16_000 and len(audio) == 800 * 20 and audio.std() > 0
    assert {path.name for path in (out / "samples").iterdir()} == {
        f"{kind}_{i}.wav"
        for kind in ("real", "sample", "continued", "resynthesised")
        for i in range(2)
    }
    real, rate = soundfile.read(out / "samples/real_0.wav", dtype="int16")
    assert (
        rate == 16_000 and len(real) == 2_980 and real.std() > 0
    )  # whole frames of a recording of 2,993 samples


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_evaluates_and_generates(runs, script):
    check_run(runs / script)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_script_trains_as_published(folder, script):
    out = folder / "published" / script
    trained(
        script,
        "--data=data/tiny.h5",
        f"--out_dir={out}",
        "--max_updates=30",
        "--monitor_every=10",
        "--as_published",
        "--ema=0",
        cwd=folder,
    )
    check_run(out)


@pytest.mark.parametrize(
    "flags", ("--dreg", "--resample", "--as_published --corrections=sign,time")
)
def test_variants_of_iwae_train_and_evaluate(folder, flags):
    out = folder / f"variant{flags.split()[0]}"
    trained(
        "vrnn_gauss_iwae",
        "--data=data/tiny.h5",
        f"--out_dir={out}",
        "--max_updates=30",
        "--monitor_every=10",
        *flags.split(),
        cwd=folder,
    )
    check_run(out)


def test_recon_png_and_the_table_are_made_from_logs_alone(folder, runs):
    result = run("plot_recon", "runs", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "recon.png").read_bytes().startswith(b"\x89PNG")
    assert all(script in result.stdout for script in SCRIPTS)
    for script, name in zip(SCRIPTS, ("VRNN", "VAE_5", "IWAE_5")):
        bounds = json.loads((runs / script / "eval.json").read_text())["bounds"]
        row = [
            f"{bounds[bound]['nats_per_frame']:.2f}"
            for bound in ("elbo", "iwae_2", "iwae_6", "smc_6", "kl")
        ]
        assert f"| {name} | 1 | " in result.stdout and " | ".join(row) in result.stdout


def test_the_table_tells_runs_apart_and_averages_those_of_one_kind(folder, runs, tmp_path):
    elbo = json.loads((runs / "vrnn_gauss/eval.json").read_text())["bounds"]["elbo"][
        "nats_per_frame"
    ]
    for name, setting, better in (
        ("one", dict(seed=0), 0),
        ("two", dict(seed=1), 2),
        ("wide", dict(rnn_dim=24), 0),
    ):
        out = tmp_path / "three" / name
        shutil.copytree(runs / "vrnn_gauss", out)
        header, *lines = (out / "log.jsonl").read_text().splitlines()
        header, evaluation = json.loads(header), json.loads((out / "eval.json").read_text())
        header["config"] |= setting
        evaluation["bounds"]["elbo"]["nats_per_frame"] += better
        (out / "log.jsonl").write_text("\n".join([json.dumps(header), *lines]))
        (out / "eval.json").write_text(json.dumps(evaluation))
    result = run("plot_recon", tmp_path / "three", cwd=tmp_path)
    assert f"| VRNN, 12 units | 2 | {elbo + 1:.2f} ± 12.71 | " in result.stdout
    assert f"| VRNN, 24 units | 1 | {elbo:.2f} | " in result.stdout
    assert result.stdout.count("| 0.00 |") == 1  # of the wide run and the other of its seed


def test_runs_of_two_folders_are_compared_though_their_labels_are_equal(runs, tmp_path):
    for folder, better in (("one", 0), ("two", 3)):
        shutil.copytree(runs / "vrnn_gauss", tmp_path / folder / "vrnn")
        windows = tmp_path / folder / "vrnn/windows.csv"
        names, *rows = windows.read_text().splitlines()
        windows.write_text(
            "\n".join(
                [
                    names,
                    *(
                        ",".join(str(float(cell) + better) for cell in row.split(","))
                        for row in rows
                    ),
                ]
            )
        )
    result = run("plot_recon", "one", "two", cwd=tmp_path)
    one, two = (line for line in result.stdout.splitlines() if line.startswith("| VRNN |"))
    assert one.endswith("|  |") and two.endswith("| 3.00 |")


@pytest.mark.parametrize(
    "file, text, instead",
    (
        ("eval.json", '"elbo": {', '"elbow": {'),
        ("eval.json", '"windows": ', '"windows": 1'),
        ("log.jsonl", '"seed"', '"sead"'),
        ("log.jsonl", '"std"', '"sd"'),
        ("log.jsonl", '"std": ', '"std": -'),
        ("log.jsonl", '"update": 30', ""),
        ("windows.csv", "elbo", "elbo,x"),
    ),
)
def test_a_damaged_run_is_named_by_the_plot_in_one_sentence(runs, tmp_path, file, text, instead):
    shutil.copytree(runs / "vrnn_gauss", tmp_path / "runs/damaged")
    damaged = tmp_path / "runs/damaged" / file
    assert text in damaged.read_text()
    damaged.write_text(damaged.read_text().replace(text, instead, 1))
    result = run("plot_recon", "runs", cwd=tmp_path)
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "runs/damaged holds no" in result.stderr
    )


def test_the_bound_of_a_model_does_not_depend_on_the_script(folder, runs):
    best = runs / "vrnn_gauss/best.pt"
    found = []
    for script in SCRIPTS:
        out = folder / "same" / script
        trained(
            script,
            "--data=data/tiny.h5",
            f"--out_dir={out}",
            f"--init_from={best}",
            "--max_updates=1",
            "--lr=1e-30",
            cwd=folder,
        )
        found.append(json.loads((out / "eval.json").read_text())["bounds"])
    assert (
        found[0]
        == found[1]
        == found[2]
        == json.loads((best.parent / "eval.json").read_text())["bounds"]
    )


@pytest.mark.parametrize(
    "script, flags",
    (
        ("vrnn_gauss_iwae", []),
        ("vrnn_gauss_alt_nll", ["--as_published", "--k=3"]),
    ),
)
def test_stopping_and_resuming_equals_never_stopping(folder, script, flags):
    common_flags = [script, "--data=data/tiny.h5", "--monitor_every=7", *flags]
    whole, parts = folder / f"whole-{script}", folder / f"parts-{script}"
    trained(*common_flags, "--max_updates=21", f"--out_dir={whole}", cwd=folder)
    trained(*common_flags, "--max_updates=7", f"--out_dir={parts}", cwd=folder)
    trained(*common_flags, "--max_updates=21", f"--out_dir={parts}", "--resume", cwd=folder)
    assert_same_run(whole, parts)
    configs = [
        json.loads((out / "log.jsonl").read_text().splitlines()[0])["config"]
        for out in (whole, parts)
    ]
    assert configs[0] == configs[1] | dict(out_dir=str(whole))
    assert configs[1] == json.loads((parts / "config.json").read_text())


def copy_of_a_run(runs, tmp_path):
    shutil.copytree(runs / "vrnn_gauss", tmp_path / "copy")
    flags = f"--data=data/tiny.h5 --out_dir={tmp_path / 'copy'} --monitor_every=10 --resume --max_updates=40"
    return tmp_path / "copy", flags.split()


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
    (folder_copy / "log.jsonl").write_text(damage((folder_copy / "log.jsonl").read_text()))
    trained("vrnn_gauss", *flags, cwd=folder)
    *seen, last = log_of(folder_copy)
    assert (
        seen == before
        and [line["update"] for line in seen[1:]] == [10, 20, 30]
        and last["update"] == 40
    )


def flip_a_bit(state):
    """In the middle of a tensor."""
    middle = len(state) // 2
    return state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]


@pytest.mark.parametrize(
    "file, damage",
    (
        ("last.pt", lambda out: b"no checkpoint"),
        ("last.pt", lambda out: (out / "best.pt").read_bytes()),
        ("last.pt", lambda out: flip_a_bit((out / "last.pt").read_bytes())),
    ),
)
def test_damaged_run_files_are_refused_on_resume_with_a_remedy(
    folder, runs, tmp_path, file, damage
):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    (folder_copy / file).write_bytes(damage(folder_copy))
    result = run("vrnn_gauss", *SIZES, *flags, cwd=folder)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and file in result.stderr
    assert "start another --out_dir, with --init_from best.pt" in result.stderr


def test_a_state_of_another_run_is_refused_by_name(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    state = torch.load(folder_copy / "last.pt", weights_only=True)
    for part, value in (
        ("states", {}),
        ("counts", {}),
        ("generator", torch.zeros(3)),
        ("log", []),
        ("log", [{}]),
        ("progress", dict(updates="x", seconds=0.0, best=0.0)),
        ("update", -30),
        ("progress", dict(updates=-30, seconds=0.0, best=0.0)),
    ):
        torch.save(dict(state, **{part: value}), folder_copy / "last.pt")
        result = run("vrnn_gauss", *SIZES, *flags, cwd=folder)
        assert (
            result.returncode == 2 and result.stderr.count("\n") == 1 and "last.pt" in result.stderr
        )


def test_a_run_that_goes_on_has_no_evaluation_of_what_it_was(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    flags += [f"--data={folder / 'data/tiny.h5'}"]
    training = common.Training(common.parse(vrnn_gauss.Hyperparameters, [*SIZES, *flags]), 1)
    assert training.progress["updates"] == 30 and not (folder_copy / "eval.json").exists()


def test_a_run_is_not_resumed_to_fewer_updates_than_it_has_made(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    before = (folder_copy / "config.json").read_text()
    result = run("vrnn_gauss", *SIZES, *flags, "--max_updates=29", cwd=folder)
    assert (
        result.returncode == 2
        and result.stderr == "error: --max_updates=29: 30 are made; give no fewer\n"
    )
    assert (folder_copy / "config.json").read_text() == before and (
        folder_copy / "eval.json"
    ).exists()


def test_a_run_without_its_best_checkpoint_is_told_so(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    (folder_copy / "best.pt").unlink()
    result = run("vrnn_gauss", *SIZES, *flags, "--max_updates=30", cwd=folder)
    assert result.returncode == 2 and f"{folder_copy / 'best.pt'} is missing" in result.stderr


def test_a_held_out_split_without_a_window_is_refused_before_the_training(tmp_path):
    write_quiet_data(tmp_path / "it.h5", train=[3_000] * 8, valid=[3_000], test=[99])
    result = run(
        "vrnn_gauss", *SIZES, "--data=it.h5", "--out_dir=out", "--max_updates=9", cwd=tmp_path
    )
    assert (
        result.returncode == 2 and "no recording of the split test holds a window" in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_speech_is_written_where_a_recording_is_shorter_than_a_frame(tmp_path):
    write_quiet_data(tmp_path / "it.h5", train=[3_000] * 8, valid=[3_000], test=[19, 3_000])
    trained("vrnn_gauss", "--data=it.h5", "--out_dir=out", "--max_updates=2", cwd=tmp_path)
    assert len(list((tmp_path / "out/samples").glob("real_*.wav"))) == 1


def test_a_run_folder_is_written_by_one_process_at_a_time(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    other = common.lock(folder_copy)
    result = run("vrnn_gauss", *SIZES, *flags, cwd=folder)
    assert result.returncode == 2 and "is being written by another process" in result.stderr
    os.close(other)
    trained("vrnn_gauss", *flags, cwd=folder)


def test_a_failed_write_keeps_the_last_good_state(folder, runs, tmp_path, monkeypatch):
    folder_copy, _ = copy_of_a_run(runs, tmp_path)
    before = (folder_copy / "last.pt").read_bytes()

    def disk_full(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    run_folder = common.RunFolder(SimpleNamespace(out_dir=folder_copy, resume=True, evaluate=""))
    with pytest.raises(common.UserError, match="last.pt cannot be written"):
        run_folder.save(run_folder.last, {})
    assert before == (folder_copy / "last.pt").read_bytes()
    assert not list(folder_copy.glob("*.partial"))


def test_runs_that_are_killed_and_resumed_equal_one_that_was_not(tmp_path):
    assert kill_and_compare(tmp_path, kills=2) == [True] * 2


def test_damaged_inputs_are_accepted_or_refused_and_nothing_else():
    result = subprocess.run(
        [sys.executable, ROOT / "tests/tools/fuzz.py", "--cases=150", "--seed=1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_other_data_under_the_same_name_is_refused_on_resume(folder, runs, tmp_path):
    folder_copy, flags = copy_of_a_run(runs, tmp_path)
    shutil.copy(folder / "data/tiny.h5", tmp_path / "tiny.h5")
    with h5py.File(tmp_path / "tiny.h5", "a") as file:
        file.attrs["mean"] = 1.0
    result = run("vrnn_gauss", *SIZES, *flags, f"--data={tmp_path / 'tiny.h5'}", cwd=folder)
    assert result.returncode == 2 and "--data was {'file': 'tiny.h5', " in result.stderr


@pytest.mark.parametrize("number, status", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_signal_saves_and_the_same_command_resumes(folder, number, status):
    flags = [*SIZES, "--data=data/tiny.h5", "--max_updates=300", "--monitor_every=50"]
    whole, stopped = folder / "unstopped", folder / f"stopped-{status}"
    if not whole.exists():
        assert run("vrnn_gauss", *flags, f"--out_dir={whole}", cwd=folder).returncode == 0
    arguments = command("vrnn_gauss", *flags, f"--out_dir={stopped}")
    process = subprocess.Popen(
        arguments, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (stopped / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert output.splitlines()[-1].endswith("; go on with the same command and --resume")
    assert subprocess.run([*arguments, "--resume"], cwd=folder, capture_output=True).returncode == 0
    assert_same_run(whole, stopped)


@pytest.mark.parametrize(
    "arguments, words",
    (
        (["--rnn_dim=abc"], ["--rnn_dim", "abc"]),
        (["--rnn_dims=3"], ["--rnn_dims", "did you mean --rnn_dim?"]),
        (["--qqq"], ["--qqq", "--help"]),
        (["--data=missing.h5"], ["missing.h5", "does not exist", "prepare_blizzard.py"]),
        (["--data=other.h5"], ["other.h5", "not of format"]),
        (["--data=text.h5"], ["text.h5", "not a readable HDF5 file"]),
        (["--k=0"], ["--k=0", "at least 1"]),
        (["--lr=nan"], ["--lr=nan"]),
        (["--eval_k=5,0"], ["--eval_k"]),
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
        (["--seed=1e30"], ["--seed", "at most"]),
        (["--device=meta"], ["--device=meta", "--device=cpu"]),
        (["--device=hpu"], ["--device=hpu", "--device=cpu"]),
        (["--out_dir="], ["--out_dir is empty"]),
    ),
)
def test_bad_input_gets_one_sentence_and_status_2(folder, runs, arguments, words):
    (folder / "text.h5").write_text("not HDF5")
    with h5py.File(folder / "other.h5", "w") as file:
        file["audio"] = np.zeros(9)
    result = run(
        "vrnn_gauss", *SIZES, "--data=data/tiny.h5", "--out_dir=new", *arguments, cwd=folder
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
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
        ("plot_recon", ["runs", "--out=nowhere/x.png"], ["nowhere/x.png"]),
    ),
)
def test_other_scripts_refuse_in_one_sentence(folder, runs, script, arguments, words):
    result = run(script, *arguments, cwd=folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_hyperparameter_with_its_comment_and_the_published_default(script):
    result = run(script, "--help", cwd=ROOT)
    text = " ".join(result.stdout.split())
    for name in (
        "data out_dir seed device x_dim z_dim rnn_dim q_z_dim p_z_dim p_x_dim x2s_dim z2s_dim ar_order k "
        "seq_frames reset_freq batch_size lr max_updates monitor_every grad_clip weight_norm dequantize "
        "init_from resume demo"
    ).split() + ["as_published"] * (script != "vrnn_gauss"):
        assert f"--{name}" in text
    for shown in (
        "LSTM units (default: 1000)",
        "(default: 0.0003)",
        "(default: 128)",
        "--no-dequantize",
    ):
        assert shown in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.reload(importlib.import_module(script))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def training(folder, tmp_path):
    """A function from flags to the Training of vrnn_gauss.py."""
    return lambda *flags: tiny_training(
        vrnn_gauss, folder / "data/tiny.h5", tmp_path / "run", *flags
    )[1]


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def test_steps_that_are_not_finite_change_nothing_and_are_counted(training):
    training, kept = training("--weight_norm=0.5"), []
    poison = iter([1, float("nan"), float("inf"), 1])
    update = update_with(training, lambda rollout: rollout.nll_TBK.mean() * next(poison))

    def update_and_keep():
        update()
        kept.append((parameters_of(training.model), training.counts.skipped_in_a_row.item()))
        is_finite = all(part.isfinite().all() for part in training.next_state)
        assert is_finite and training.next_state[0].any() == (len(kept) in (1, 4))

    make_updates(training, update_and_keep, 4)
    same = [all(map(torch.equal, one, other)) for (one, _), (other, _) in zip(kept, kept[1:])]
    assert same == [True, True, False]
    assert [in_a_row for _, in_a_row in kept] == [0, 1, 2, 0]
    assert training.counts.skipped == 2 and log_of(training.folder.folder)[-1]["skipped"] == 2
    assert all(p.isfinite().all() for p in kept[-1][0])


def test_restoring_leaves_a_training_and_its_progress_in_place(training):
    training = training()
    progress, before = training.progress, copy.deepcopy(training.checkpoint())

    def tensors():
        return [
            *vars(training.counts).values(),
            training.pcm,
            *training.state,
            *training.next_state,
        ]

    places = [*training.model.parameters(), *training.averaged.parameters(), *tensors()]
    make_updates(training, update_with(training, vrnn_gauss.objective), 3)
    assert progress["updates"] == 3 and progress["best"] > -math.inf
    training.restore(before)
    assert training.progress is progress and progress == dict(
        updates=0, seconds=0.0, best=-math.inf
    )
    for part, model in dict(model=training.model, averaged=training.averaged).items():
        assert all(map(torch.equal, before[part].values(), model.state_dict().values()))
    assert all(
        torch.equal(before["counts"][name], count) for name, count in vars(training.counts).items()
    )
    assert all(map(torch.equal, before["states"].values(), [*training.state, *training.next_state]))
    assert torch.equal(training.generator.get_state(), before["generator"])
    now = [*training.model.parameters(), *training.averaged.parameters(), *tensors()]
    assert all(a is b for a, b in zip(places, now, strict=True))
    assert all(
        state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        for state in training.optimiser.state.values()
    )


def test_training_stops_with_a_sentence_after_many_steps_that_are_not_finite(training):
    training = training()
    with pytest.raises(
        common.UserError, match="not finite in 10 updates in a row, up to update 10;"
    ):
        make_updates(
            training,
            update_with(training, lambda rollout: rollout.nll_TBK.mean() * float("nan")),
            100,
        )


def test_noise_on_x_fades_to_a_hundredth_and_ends(training):
    training, found = training("--x_noise=0.5", "--x_noise_updates=100", "--no-dequantize"), []
    training.draw = lambda *drawn: 1.0
    for updates in (0, 50, 99, 100, 1000):
        training.counts.updates.fill_(updates)
        noise_TBX = training.window() - common.normalise(training.pcm, training.corpus)
        found.append(noise_TBX.mean().item())
    assert found == pytest.approx([0.5, 0.05, 0.5 * 0.01**0.99, 0, 0])


@pytest.mark.parametrize(
    "updates, expected", [(0, 0.02), (50, 0.01), (99, 0.0002), (100, 0.0002), (1000, 0.0002)]
)
def test_the_learning_rate_falls_to_a_hundredth(training, updates, expected):
    training = training("--lr=0.02", "--lr_updates=100", "--weight_norm=0")
    training.counts.updates.fill_(updates)
    (before,) = parameters_of(training.model.decoder[-1])[1:]
    make_updates(training, update_with(training, vrnn_gauss.objective), 1)
    (after,) = parameters_of(training.model.decoder[-1])[1:]
    moved = (
        after - before
    ).abs()  # the first step of Adam has the length of the learning rate in every direction
    assert moved.median().item() == pytest.approx(expected, rel=1e-2)


def test_averaged_weights_follow_the_trained_ones(training):
    training = training("--ema=0.5")
    update, expected = (
        update_with(training, lambda rollout: rollout.nll_TBK.mean()),
        parameters_of(training.model),
    )

    def update_and_average():
        update()
        done = training.progress["updates"]
        decay = min(0.5, (1 + done) / (10 + done))
        expected[:] = [
            decay * old + (1 - decay) * new
            for old, new in zip(expected, training.model.parameters())
        ]

    make_updates(training, update_and_average, 20)
    for averaged, p in zip(training.averaged.parameters(), expected):
        torch.testing.assert_close(averaged, p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("objective", (vrnn_gauss.objective, vrnn_gauss_iwae.objective))
def test_updates_of_the_cuda_graph_equal_updates_launched_one_by_one(folder, tmp_path, objective):
    trainings = []
    for captures in (False, True):
        h, training = tiny_training(
            vrnn_gauss_iwae,
            folder / "data/tiny.h5",
            tmp_path / f"captured-{captures}",
            "--device=cuda",
            "--k=3",
            "--grad_clip=2",
            "--lr_updates=30",
        )
        update = update_with(training, objective)
        before = parameters_of(training.model)
        captured = training.captured(update) if captures else update
        assert (captured.__name__ == "replay") == captures
        assert all(map(torch.equal, before, training.model.parameters())), (
            "to capture it was an update"
        )
        make_updates(training, captured, 20)
        assert training.counts.updates == 20 and training.counts.skipped == 0
        trainings.append(training)
    for one_by_one, graph in zip(*(training.model.parameters() for training in trainings)):
        torch.testing.assert_close(one_by_one, graph, rtol=1e-4, atol=1e-5)
