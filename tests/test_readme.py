"""The README: its numbers, its length, and its scripts of one's own, as printed."""

import json
import re
import shutil
import signal
import sys
import time

import check_readme
import pytest
from tiny import ROOT, SIZES, Fork, assert_same_run, log_of, main_of, run, write_tiny_data

import common

PRINTED = re.compile(r"`(\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)
FLAGS = (*SIZES, "--data=tiny.h5", "--max_updates=60", "--monitor_every=20", "--eval_recordings=1")


def finished(folder, script, *flags):
    result = run(folder / script, *flags, cwd=folder, brief=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The printed scripts, and a run of each beside one of ours.

    The GRU is there twice, once killed and resumed.
    """
    folder = tmp_path_factory.mktemp("readme")
    write_tiny_data(folder / "tiny.h5")
    for name, source in PRINTED.findall((ROOT / "README.md").read_text()):
        (folder / name).write_text(source)
    for example in ("stochastic_gru.py", "laplace_vrnn.py"):
        shutil.copy(ROOT / "tests/examples" / example, folder)
    finished(folder, ROOT / "vrnn_gauss", *FLAGS)
    for script, *flags in (["beta_vrnn", "--beta=0.7"], ["stochastic_gru"], ["laplace_vrnn"]):
        finished(folder, script, *FLAGS, *flags)
    kill_and_resume(folder, folder / "killed/stochastic_gru")
    return folder


def kill_and_resume(folder, out):
    flags = ("stochastic_gru", *FLAGS, f"--out_dir={out}")
    process = Fork(folder / flags[0], *flags[1:], cwd=folder)
    while not (out / "last.pt").exists():
        assert process.poll() is None, process.ended().stderr
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.ended().returncode == -signal.SIGKILL
    assert not (out / "eval.json").exists()
    finished(folder, *flags, "--resume")


def test_every_table_and_every_measured_number_is_in_the_logs():
    assert check_readme.problems() == []


@pytest.mark.parametrize(
    "text, instead, problem",
    (
        (
            "| FLAC |  |  |  | 318.74 |",
            "| FLAC |  |  |  | 318.75 |",
            "README.md: table front is not what the logs say",
        ),
        (
            "## What this does not show",
            "VRNN gains 123.45 nats.\n\n## What this does not show",
            "README.md: 123.45 is in no table and not in OTHERS",
        ),
    ),
)
def test_what_is_not_in_the_logs_is_noticed(tmp_path, monkeypatch, text, instead, problem):
    for name in check_readme.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changed = (tmp_path / "README.md").read_text()
    assert text in changed
    (tmp_path / "README.md").write_text(changed.replace(text, instead))
    monkeypatch.setattr(check_readme, "ROOT", tmp_path)
    found = check_readme.problems()
    assert len(found) == 1
    assert problem in found[0]
    check_readme.problems(write=True)
    is_in_a_table = instead.startswith("| FLAC")  # which alone can be written anew
    assert (check_readme.problems() == []) == is_in_a_table


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_scripts_of_ones_own_have_few_lines_without_their_docstrings_and_blank_lines():
    ((name, source),) = PRINTED.findall((ROOT / "README.md").read_text())
    assert name == "beta_vrnn.py"
    _, *lines = filter(None, source.splitlines())
    assert len(source.splitlines()) <= 34
    assert len(lines) <= 23


def test_a_printed_script_learns(folder):
    for name in ("beta_vrnn", "laplace_vrnn", "stochastic_gru"):
        _, *lines = log_of(folder / "runs" / name)
        bounds = [line["valid"]["iwae_2"]["nats_per_frame"] for line in lines]
        assert bounds == sorted(bounds)
        assert len(bounds) == 3


def test_a_killed_and_resumed_run_of_a_printed_model_is_as_if_it_had_never_stopped(folder):
    assert_same_run(folder / "runs/stochastic_gru", folder / "killed/stochastic_gru")


@pytest.fixture
def printed(folder, monkeypatch):
    """A function that calls the main of a printed script in this process."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    yield main_of
    for name in ("beta_vrnn", "laplace_vrnn", "stochastic_gru"):
        sys.modules.pop(name, None)


def evaluation_in(out):
    return json.loads((out / "eval.json").read_text())


def test_a_printed_hyperparameter_has_its_flag_and_its_comment_as_help(folder, printed, capsys):
    with pytest.raises(SystemExit):
        printed("beta_vrnn", "--help")
    assert "weight of the KL; 1 is VRNN (default: 0.5)" in capsys.readouterr().out
    config = json.loads((folder / "runs/beta_vrnn/config.json").read_text())
    assert config["beta"] == 0.7


@pytest.mark.parametrize("name", ("beta_vrnn", "laplace_vrnn", "stochastic_gru"))
def test_the_bounds_of_a_printed_model_are_found_again_by_evaluate(folder, name):
    checkpoint = f"runs/{name}/best.pt"
    flags = (f"--evaluate={checkpoint}", f"--out_dir=again/{name}", "--device=cpu")
    finished(folder, name, *flags)
    first = evaluation_in(folder / "runs" / name)
    assert evaluation_in(folder / "again" / name) == first | dict(checkpoint=checkpoint)
    assert not (folder / "again" / name / "log.jsonl").exists()  # nothing was trained


def test_all_runs_are_drawn_by_the_name_that_they_state(folder):
    drawn = folder / "drawn"
    shutil.copytree(folder / "runs", drawn)
    flags = ("--evaluate=runs/stochastic_gru/best.pt", "--out_dir=drawn/again")
    finished(folder, "stochastic_gru", *flags)
    result = run("plot_recon", "drawn", cwd=folder)
    assert result.returncode == 0, result.stderr
    _, *rows = (line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| "))
    assert [row[0] for row in rows] == [
        "| VRNN",
        "| beta-VRNN",
        "| Laplace VRNN",
        "| stochastic GRU",
        "| stochastic GRU, best.pt on tiny.h5",
    ]
    assert rows[3][2:] == rows[4][2:]
    for row, name in zip(rows, ("vrnn_gauss", "beta_vrnn", "laplace_vrnn", "stochastic_gru")):
        elbo = evaluation_in(drawn / name)["bounds"]["elbo"]["nats_per_frame"]
        assert row[2] == f"{elbo:.2f}"
    assert (folder / "recon.png").exists()
    assert (drawn / "beta_vrnn/samples/samples.png").exists()
    assert (drawn / "laplace_vrnn/samples/continued_1.wav").exists()
    assert not (drawn / "stochastic_gru/samples").exists()  # it cannot generate


def test_with_beta_one_the_printed_objective_is_that_of_ours(folder, printed):
    printed("beta_vrnn", *FLAGS, "--beta=1", "--out_dir=one")
    ours = evaluation_in(folder / "runs/vrnn_gauss")
    assert evaluation_in(folder / "one")["bounds"] == ours["bounds"]


@pytest.mark.parametrize(
    "script, other, model",
    (
        ("vrnn_gauss", "stochastic_gru", "VRNN"),
        ("vrnn_gauss", "laplace_vrnn", "VRNN"),  # of the same parameters
        ("laplace_vrnn", "vrnn_gauss", "LaplaceVRNN"),  # of the same parameters
        ("stochastic_gru", "vrnn_gauss", "StochasticGRU"),
    ),
)
def test_a_checkpoint_of_another_model_is_refused(folder, printed, script, other, model):
    with pytest.raises(common.UserError, match=f"holds another model than this {model}, or one"):
        printed(script, f"--evaluate=runs/{other}/best.pt", "--out_dir=no")
    assert not (folder / "no").exists()


def test_a_checkpoint_of_a_users_script_with_a_vrnn_is_evaluated_by_ours(folder, printed):
    printed("vrnn_gauss", "--evaluate=runs/beta_vrnn/best.pt", "--out_dir=by_ours", "--device=cpu")
    theirs = evaluation_in(folder / "runs/beta_vrnn")
    ours = evaluation_in(folder / "by_ours")
    assert ours == theirs | dict(checkpoint="runs/beta_vrnn/best.pt")
