"""--evaluate CHECKPOINT: the bounds of any checkpoint on any data, without an update."""

import json

import h5py
import numpy as np
import pytest
import torch
from tiny import SIZES, main_of, run, smooth_noise, write_tiny_data

import common

SCRIPTS = ("vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae")
DEVICE = ("--device=cpu",)


pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two data files, a run of each script on the first, and one of IWAE with a variant."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_data(folder / "tiny.h5")
    write_louder_data(folder)
    for script in SCRIPTS:
        train(folder, script, name=script)
    train(folder, "vrnn_gauss_iwae", "--dreg", "--seq_frames=6", name="dreg")
    return folder


def train(folder, script, *flags, name):
    where = (f"--data={folder / 'tiny.h5'}", f"--out_dir={folder / 'runs' / name}")
    length = ("--max_updates=6", "--monitor_every=3", "--eval_recordings=1")
    main_of(script, *SIZES, *where, *length, *flags)


def write_louder_data(folder):
    """Recordings of three times the standard deviation, and fewer."""
    random = np.random.default_rng(1)
    (folder / "loud").mkdir()
    recordings = {f"rec_{i}": 3 * smooth_noise(random, 2_500) for i in range(8)}
    np.savez(folder / "loud/loud.npz", **recordings)
    result = run("prepare_blizzard", "loud", "--out=loud.h5", "--valid=.2", "--test=.2", cwd=folder)
    assert result.returncode == 0, result.stderr


def evaluated(checkpoint, out, *flags, script="vrnn_gauss"):
    main_of(script, f"--evaluate={checkpoint}", f"--out_dir={out}", *DEVICE, *flags)
    return json.loads((out / "eval.json").read_text())


def contents(folder):
    return {path.name for path in folder.iterdir()}


def of_run(folder, name):
    return json.loads((folder / "runs" / name / "eval.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_best_pt_on_the_data_of_its_run_has_the_bounds_of_its_run(folder, tmp_path, script):
    run_folder = folder / "runs" / script
    checkpoint = run_folder / "best.pt"
    found = evaluated(checkpoint, tmp_path / "again", script=script)
    assert found == of_run(folder, script) | dict(checkpoint=str(checkpoint))
    speech = [f"samples/{path.name}" for path in (run_folder / "samples").iterdir()]
    assert len(speech) == 8
    for name in ("windows.csv", *speech):
        assert (run_folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_evaluation_makes_no_log_and_no_checkpoint_and_names_checkpoint_and_data(
    folder, tmp_path
):
    checkpoint = folder / "runs/vrnn_gauss/best.pt"
    found = evaluated(checkpoint, tmp_path / "loud", f"--data={folder / 'loud.h5'}")
    assert contents(tmp_path / "loud") == {"config.json", "eval.json", "windows.csv", "samples"}
    assert found["checkpoint"] == str(checkpoint)
    assert found["data"]["file"] == "loud.h5"
    assert found["update"] == torch.load(checkpoint, weights_only=True)["update"]
    assert "whole_recordings" in found
    assert list((tmp_path / "loud/samples").glob("sample_*.wav"))


def test_no_update_is_made_and_no_window_of_training_is_read(folder, tmp_path, monkeypatch):
    for name in ("window", "step", "next_window", "monitor"):
        monkeypatch.delattr(common.Training, name)
    evaluated(folder / "runs/vrnn_gauss/best.pt", tmp_path / "out")


def test_other_data_are_normalised_as_the_training_was(folder, tmp_path):
    checkpoint = folder / "runs/vrnn_gauss/best.pt"
    trained = torch.load(checkpoint, weights_only=True)
    corpus = common.open_corpus(str(folder / "loud.h5"))
    assert corpus.std > 2 * trained["std"]
    flags = (f"--data={folder / 'loud.h5'}", "--eval_recordings=0")
    found = evaluated(checkpoint, tmp_path / "loud", *flags)
    model = common.VRNN(*[trained["config"][name] for name in common.SIZES])
    model.load_state_dict(trained["model"])
    corpus.mean = trained["mean"]
    corpus.std = trained["std"]
    by_window = common.window_bounds(model, corpus, corpus.test, (2, 6), 5, smc=6)
    expected = common.summarise(by_window, 5, 20, corpus)
    assert found["bounds"] == expected
    elbo = expected["elbo"]
    bits = (np.log(trained["std"]) - elbo["nats_per_frame"] / 20) / np.log(2)
    assert elbo["bits_per_sample"] == pytest.approx(bits)


def test_any_number_of_particles_can_be_asked_for(folder, tmp_path):
    asked = ("--eval_k", "3", "4", "8")
    found = evaluated(folder / "runs/vrnn_gauss/best.pt", tmp_path / "out", *asked)
    assert {"iwae_3", "iwae_4", "iwae_8", "smc_8"} <= found["bounds"].keys()
    assert list(found["whole_recordings"]) == ["smc_8", "flac"]
    assert json.loads((tmp_path / "out/config.json").read_text())["eval_k"] == [3, 4, 8]


def test_last_pt_has_the_weights_of_the_last_update_and_best_pt_their_average(folder, tmp_path):
    last = torch.load(folder / "runs/vrnn_gauss/last.pt", weights_only=True)
    best = torch.load(folder / "runs/vrnn_gauss/best.pt", weights_only=True)
    assert last["update"] == best["update"] == 6
    found = {}
    for name in ("last", "best"):
        checkpoint = folder / f"runs/vrnn_gauss/{name}.pt"
        found[name] = evaluated(checkpoint, tmp_path / name)["bounds"]
    for name, weights in dict(last="model", best="averaged").items():
        torch.save({**best, "model": last[weights]}, tmp_path / f"{weights}.pt")
        again = evaluated(tmp_path / f"{weights}.pt", tmp_path / weights)
        assert again["bounds"] == found[name]
    assert found["last"] != found["best"]


@pytest.mark.parametrize("evaluating", SCRIPTS)
def test_a_checkpoint_of_another_script_is_welcome_and_keeps_its_name(folder, tmp_path, evaluating):
    found = evaluated(folder / "runs/dreg/best.pt", tmp_path / "out", script=evaluating)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert found["bounds"] == of_run(folder, "dreg")["bounds"]
    assert found["frames"] == 6
    assert found["script"] == found["name"] == config["script"] == "vrnn_gauss_iwae"
    assert config["dreg"] is True
    assert config["k"] == 5


def test_what_belongs_to_the_training_stays_as_the_checkpoint_has_it(folder, tmp_path):
    checkpoint = folder / "runs/dreg/best.pt"
    flags = ("--k=9", "--no-dreg", "--seed=3", "--seq_frames=7")
    evaluated(checkpoint, tmp_path / "out", *flags, script="vrnn_gauss_iwae")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["k"], config["dreg"], config["seed"], config["seq_frames"]) == (5, True, 0, 7)


def test_unknown_names_in_the_configuration_of_a_checkpoint_are_ignored(folder, tmp_path):
    checkpoint = torch.load(folder / "runs/vrnn_gauss/best.pt", weights_only=True)
    checkpoint["config"] |= dict(beta=0.5, script="mine", name="my objective")
    torch.save(checkpoint, tmp_path / "mine.pt")
    found = evaluated(tmp_path / "mine.pt", tmp_path / "out")
    assert found["bounds"] == of_run(folder, "vrnn_gauss")["bounds"]
    assert found["name"] == "my objective"


def refusal(*arguments, script="vrnn_gauss"):
    with pytest.raises(common.UserError) as error:
        main_of(script, *DEVICE, *arguments)
    return str(error.value)


# Without ar_order, components have no parameters.
@pytest.mark.parametrize("size", [size for size in common.SIZES if size != "components"])
def test_other_sizes_than_the_checkpoint_has_are_refused(folder, tmp_path, size):
    checkpoint = folder / "runs/vrnn_gauss/best.pt"
    where = (f"--evaluate={checkpoint}", f"--out_dir={tmp_path / 'out'}")
    text = refusal(*where, f"--{size}=19")
    assert f"{checkpoint} holds another model than this VRNN, or one of other sizes" in text
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_evaluated_is_refused_by_name(folder, tmp_path):
    best = folder / "runs/vrnn_gauss/best.pt"
    out = f"--out_dir={tmp_path / 'out'}"
    assert "--resume" in refusal(f"--evaluate={best}", out, "--resume")
    assert "missing.pt does not exist" in refusal("--evaluate=missing.pt", out)
    assert "missing.h5 does not exist" in refusal(f"--evaluate={best}", out, "--data=missing.h5")
    (tmp_path / "text.pt").write_text("text")
    text = refusal(f"--evaluate={tmp_path / 'text.pt'}", out)
    assert "text.pt is not a usable checkpoint" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "part, value",
    (
        ("config", None),
        ("config", [1]),
        ("mean", "1"),
        ("mean", float("nan")),
        ("std", 0.0),
        ("std", -1.0),
        ("update", None),
        ("update", -1),
        ("model", {}),
        ("model", None),
        ("config", {"odd": torch.zeros(2)}),
        ("config", {"k": "x"}),
        ("config", {"seq_frames": -1}),
        ("config", {"eval_k": [None]}),
    ),
)
def test_a_checkpoint_with_a_senseless_part_is_refused_in_one_sentence(
    folder, tmp_path, part, value
):
    checkpoint = torch.load(folder / "runs/vrnn_gauss/best.pt", weights_only=True)
    if part == "config" and isinstance(value, dict):
        value = checkpoint["config"] | value
    checkpoint[part] = value
    torch.save(checkpoint, tmp_path / "odd.pt")
    text = refusal(f"--evaluate={tmp_path / 'odd.pt'}", f"--out_dir={tmp_path / 'out'}")
    assert "\n" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", ("last.pt", "log.jsonl", "eval.json"))
def test_a_folder_that_holds_a_run_or_an_evaluation_is_refused(folder, tmp_path, kept):
    source = folder / "runs/vrnn_gauss"
    (tmp_path / kept).write_bytes((source / kept).read_bytes())
    text = refusal(f"--evaluate={source / 'best.pt'}", f"--out_dir={tmp_path}")
    assert "already holds a run" in text
    assert contents(tmp_path) == {kept}


def test_a_run_is_not_trained_into_the_folder_of_an_evaluation(folder, tmp_path):
    evaluated(folder / "runs/vrnn_gauss/best.pt", tmp_path / "out")
    where = (f"--data={folder / 'tiny.h5'}", f"--out_dir={tmp_path / 'out'}")
    assert "already holds" in refusal(*SIZES, *where)


def test_a_checkpoint_of_a_foreign_model_gets_one_sentence_and_status_2(folder, tmp_path):
    checkpoint = torch.load(folder / "runs/vrnn_gauss/best.pt", weights_only=True)
    checkpoint["model"] = torch.nn.GRUCell(3, 4).state_dict()
    torch.save(checkpoint, tmp_path / "foreign.pt")
    result = run("vrnn_gauss", "--evaluate=foreign.pt", "--out_dir=out", *DEVICE, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "foreign.pt holds another model than this VRNN, or one of other sizes" in result.stderr
    assert result.stderr.endswith("name another, or start without --evaluate\n")
    assert not (tmp_path / "out").exists()


def test_the_evaluation_can_be_repeated_on_data_of_which_a_run_knows_nothing(folder, tmp_path):
    """Its checkpoint alone suffices: no log, no data of its own."""
    (tmp_path / "alone.pt").write_bytes((folder / "runs/vrnn_gauss/best.pt").read_bytes())
    checkpoint = torch.load(tmp_path / "alone.pt", weights_only=True)
    checkpoint["config"]["data"] = "gone.h5"
    torch.save(checkpoint, tmp_path / "alone.pt")
    with h5py.File(folder / "loud.h5", locking=False) as file:
        samples = len(file["test/audio"])
    found = evaluated(tmp_path / "alone.pt", tmp_path / "out", f"--data={folder / 'loud.h5'}")
    assert found["data"]["samples"]["test"] == samples
