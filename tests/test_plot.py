"""plot_recon.py on the files of runs: names, tables, differences, pictures, and damage."""

import json
import os

import numpy as np
import pytest
import soundfile
from matplotlib.axes import Axes
from tiny import main_of

import common
import plot_recon

CONFIG = dict(
    script="vrnn_gauss",
    name="vrnn_gauss",
    data="data/a.h5",
    out_dir="x",
    seed=0,
    device="cpu",
    x_dim=200,
    seq_frames=40,
    k=5,
    eval_k=[5, 100],
    init_from="",
    rnn_dim=128,
)
DATA = dict(
    file="a.h5",
    created_by="prepare_blizzard.py",
    mean=0.0,
    std=2000.0,
    samples=dict(train=1_920_000, valid=96_000, test=96_000),
)
BOUNDS = dict(elbo=100.0, iwae_5=101.0, iwae_100=102.0, smc_100=110.0, kl=40.0)


def write_evaluation(folder, shift, data, config, bounds, windows=4, **more):
    folder.mkdir(parents=True, exist_ok=True)
    bounds = {name: bound + shift * (name != "kl") for name, bound in bounds.items()}
    evaluation = dict(
        split="test",
        update=30,
        windows=windows,
        frames=config["seq_frames"],
        data=data,
        **more,
        bounds={name: dict(nats_per_frame=bound, stderr=1.0) for name, bound in bounds.items()},
    )
    (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "config.json").write_text(json.dumps(config))


def write_run(folder, shift=0.0, data=DATA, bounds=BOUNDS, **config):
    """A run whose bounds are those above and shift."""
    config = CONFIG | config
    write_evaluation(folder, shift, data, config, bounds, checkpoint="best.pt")
    header = dict(config=config, data=data)
    lines = [
        dict(update=10 * i, sequences=10 * i, valid=dict(iwae_5=dict(nats_per_frame=50.0 + i)))
        for i in (1, 2, 3)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, [header, *lines])) + "\n")


def evaluation_of(
    folder, shift=0.0, data=DATA, bounds=BOUNDS, windows=4, checkpoint="runs/x/best.pt", **config
):
    """What --evaluate leaves: no log."""
    write_evaluation(folder, shift, data, CONFIG | config, bounds, windows, checkpoint=checkpoint)


@pytest.fixture
def plot(tmp_path, monkeypatch, capsys):
    """A function that draws folders below tmp_path; the rows of its tables, as lists of cells."""
    monkeypatch.chdir(tmp_path)

    def plot(*arguments):
        main_of("plot_recon", *(arguments or ["runs"]))
        rows = []
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("| ") and not line.startswith("| objective"):
                cells = line.strip("|").split("|")
                rows.append([cell.strip() for cell in cells])
        return rows

    return plot


def test_a_run_is_named_by_its_objective_or_by_what_its_script_states(tmp_path, plot):
    iwae = dict(script="vrnn_gauss_iwae", name="vrnn_gauss_iwae")
    runs = dict(
        a=dict(script="mine", name="my objective"),
        b=dict(script="other", name="other"),
        c=dict(iwae, dreg=True),
        d=dict(iwae, name="2016's IWAE_5"),
        e=dict(iwae, resample=True, k=7),
        f=dict(script="vrnn_gauss_alt_nll", name="vrnn_gauss_alt_nll"),
        g=dict(init_from="x.pt"),
        h=dict(name="changed"),
        i=dict(z_dim=0, ar_order=16),
    )
    for name, config in runs.items():
        write_run(tmp_path / "runs" / name, **config)
    assert [row[0] for row in plot()] == [
        "changed",
        "VRNN warm",
        "VAE_5",
        "2016's IWAE_5",
        "IWAE_5 DReG",
        "IWAE_7 resampled",
        "LSTM adaptive",
        "my objective",
        "other",
    ]


def test_settings_in_which_runs_of_a_name_differ_are_said_in_words_in_all_folders_alike(
    tmp_path, plot
):
    vae = dict(script="vrnn_gauss_alt_nll", name="vrnn_gauss_alt_nll")
    iwae = dict(script="vrnn_gauss_iwae", name="vrnn_gauss_iwae")
    first = dict(
        a=dict(grad_clip=640.0, max_updates=5000, lr_updates=4000),
        b=dict(vae, batch_size=8),
        c=dict(iwae, bf16=True),
    )
    second = dict(
        d=dict(grad_clip=0.0, max_updates=5000, lr_updates=4000),
        e=dict(grad_clip=640.0, max_updates=12500, lr_updates=10000),
        f=dict(vae, batch_size=128),
        g=dict(iwae, bf16=False),
    )
    for folder, runs in dict(runs=first, others=second).items():
        for name, config in runs.items():
            write_run(tmp_path / folder / name, **config)
    assert [row[0] for row in plot("runs", "others")] == [
        "VRNN, clipped at 640, 5,000 updates",
        "VAE_5, batch of 8",
        "IWAE_5, bf16",
        "VRNN, clipped at 640, 12,500 updates",
        "VRNN, not clipped, 5,000 updates",
        "VAE_5, batch of 128",
        "IWAE_5, no bf16",
    ]


@pytest.mark.parametrize(
    "off", (dict(as_published=False), dict(corrections=""), dict(ar_order=0), dict(x_noise=None))
)
def test_a_setting_that_is_off_is_as_good_as_one_that_an_older_log_lacks(tmp_path, plot, off):
    write_run(tmp_path / "runs/old")
    write_run(tmp_path / "runs/new", seed=1, **off)
    assert [row[:2] for row in plot()] == [["VRNN", "2"]]


def test_runs_that_differ_only_in_what_another_setting_stands_for_are_told_apart_all_the_same(
    tmp_path, plot
):
    for name, config in dict(
        a=dict(rnn_dim=128, z_dim=8), b=dict(rnn_dim=256, z_dim=8), c=dict(z_dim=9)
    ).items():
        write_run(tmp_path / "runs" / name, **config)
    assert [row[0] for row in plot()] == [
        "VRNN, 128 units, z_dim 8",
        "VRNN, 128 units, z_dim 9",
        "VRNN, 256 units",
    ]


def test_intervals_are_those_of_student_and_differences_are_paired_by_seed(tmp_path, plot):
    for seed, (shift, other) in enumerate(((0.0, 1.0), (2.0, 4.0), (4.0, 9.0))):
        write_run(tmp_path / f"runs/a{seed}", shift=shift, seed=seed)
        write_run(tmp_path / f"runs/b{seed}", shift=other, seed=seed, script="mine", name="mine")
    write_run(tmp_path / "runs/b9", shift=50.0, seed=9, script="mine", name="mine")
    vrnn, mine = plot()
    assert vrnn[:3] == ["VRNN", "3", "102.00 ± 4.97"] and vrnn[-1] == ""  # 4.303 times 2 / sqrt(3)
    assert mine[:2] == ["mine", "4"] and mine[-1] == "2.67 ± 5.17"  # of 1, 2 and 5


@pytest.mark.parametrize("degrees, t", ((1, 12.706), (9, 2.262), (10, 2.228), (63, 1.998)))
def test_student_is_that_of_the_tables(degrees, t):
    assert plot_recon.t_95(degrees) == pytest.approx(t, abs=0.003)


def test_runs_are_compared_with_those_of_the_first_folder_but_for_another_likelihood(
    tmp_path, plot
):
    write_run(tmp_path / "first/a")
    write_run(tmp_path / "second/b", shift=3.0, init_from="x.pt")
    for name, shift, config in (("c", 100.0, {}), ("d", 104.0, dict(init_from="x.pt"))):
        write_run(tmp_path / "third" / name, shift=shift, ar_order=16, **config)
    assert [(row[0], row[-1]) for row in plot("first", "second", "third")] == [
        ("VRNN", ""),
        ("VRNN warm", "3.00"),
        ("VRNN adaptive", ""),
        ("VRNN warm adaptive", "4.00"),
    ]


def test_a_log_without_names_is_drawn_by_its_script(tmp_path, plot):
    write_run(tmp_path / "runs/old")
    log = tmp_path / "runs/old/log.jsonl"
    log.write_text(log.read_text().replace('"name": "vrnn_gauss", ', ""))
    assert '"name"' not in log.read_text().splitlines()[0]
    write_run(tmp_path / "runs/new", seed=1)
    assert [row[:2] for row in plot()] == [["VRNN", "2"]]  # one kind


def test_runs_of_two_scripts_with_one_name_are_told_apart(tmp_path, plot):
    for script in ("mine", "yours"):
        write_run(tmp_path / "runs" / script, script=script, name="beta")
    assert [row[0] for row in plot()] == ["beta, script mine", "beta, script yours"]


def test_an_evaluation_is_a_row_that_names_its_checkpoint_and_its_data(tmp_path, plot):
    other = DATA | dict(file="b.h5")
    write_run(tmp_path / "runs/a")
    evaluation_of(
        tmp_path / "runs/b", shift=3.0, script="vrnn_gauss_iwae", name="vrnn_gauss_iwae", dreg=True
    )
    evaluation_of(tmp_path / "runs/c", shift=5.0, data=other, windows=6, checkpoint="last.pt")
    run, of_other, same = plot()
    assert run[0] == "VRNN" and run[-1] == ""
    assert same[0] == "IWAE_5 DReG, best.pt on a.h5" and same[2] == "103.00" and same[-1] == "3.00"
    assert of_other[0] == "VRNN, last.pt on b.h5" and of_other[2] == "105.00" and of_other[-1] == ""
    assert (tmp_path / "recon.png").exists()


@pytest.mark.parametrize(
    "what",
    (
        dict(data=DATA | dict(std=1000.0)),
        dict(data=DATA | dict(file="b.h5")),
        dict(windows=5),
        dict(seq_frames=80),
        dict(data=DATA | dict(samples=DATA["samples"] | dict(test=1))),
        dict(seed=1),
    ),
)
def test_no_difference_is_formed_on_other_windows_in_another_unit_or_between_seeds(
    tmp_path, plot, what
):
    write_run(tmp_path / "runs/a")
    evaluation_of(tmp_path / "runs/b", shift=3.0, **what)
    evaluation_of(tmp_path / "runs/c", shift=4.0, checkpoint="last.pt")
    assert {row[0].split(", ")[1]: row[-1] for row in plot()[1:]} == {
        f"best.pt on {what.get('data', DATA)['file']}": "",
        "last.pt on a.h5": "4.00",
    }


def test_bits_of_an_evaluation_are_in_the_unit_of_its_training(tmp_path, plot):
    evaluation_of(tmp_path / "runs/a", data=DATA | dict(std=500.0))
    assert plot()[0][-2] == f"{(np.log(500.0) - 110 / 200) / np.log(2):.3f}"


def test_evaluations_alone_are_a_table_without_a_picture(tmp_path, plot):
    evaluation_of(tmp_path / "runs/a")
    evaluation_of(tmp_path / "runs/b", shift=1.0, seed=1)
    evaluation_of(tmp_path / "runs/c", shift=1.0, checkpoint="last.pt")
    assert [row[:2] for row in plot()] == [
        ["VRNN, best.pt on a.h5", "2"],
        ["VRNN, last.pt on a.h5", "1"],
    ]
    assert not (tmp_path / "recon.png").exists()


def test_evaluations_on_files_of_one_name_and_by_other_particles_are_told_apart(tmp_path, plot):
    for name, config in (("a", dict(data="x/a.h5")), ("b", dict(data="y/a.h5", seed=1))):
        write_evaluation(
            tmp_path / "runs" / name, 0.0, DATA, CONFIG | config, BOUNDS, checkpoint="best.pt"
        )
    assert [row[0] for row in plot()] == [
        "VRNN, best.pt on a.h5, data x/a.h5",
        "VRNN, best.pt on a.h5, data y/a.h5",
    ]
    few = dict(elbo=1.0, iwae_3=2.0, smc_3=3.0, kl=4.0)
    evaluation_of(tmp_path / "few/a", bounds=few, eval_k=[3])
    evaluation_of(tmp_path / "few/b")
    assert [row[0] for row in plot("few")] == [
        "VRNN, best.pt on a.h5, eval_k [3]",
        "VRNN, best.pt on a.h5, eval_k [5, 100]",
    ]


def test_runs_from_before_the_class_of_the_model_was_noted_are_of_one_label_with_later_ones(
    tmp_path, plot
):
    write_run(tmp_path / "runs/old")
    write_run(tmp_path / "runs/new", seed=1, model_class="VRNN")
    assert [row[:2] for row in plot()] == [["VRNN", "2"]]


def test_a_setting_that_a_log_does_not_know_is_not_said_of_its_run(tmp_path, plot):
    write_run(tmp_path / "runs/old")
    write_run(tmp_path / "runs/new", beta2=0.99)
    assert [row[0] for row in plot()] == ["VRNN", "VRNN, beta2 0.99"]


def test_names_are_shown_as_they_are(tmp_path, plot):
    write_run(tmp_path / "runs/a", name="price $5 and $6 |\n or $\\frac$")
    assert plot()[0][0] == r"price \$5 and \$6 / or \$\frac\$" and (tmp_path / "recon.png").exists()


def test_runs_are_compared_with_those_that_have_been_tested(tmp_path, plot):
    write_run(tmp_path / "runs/a", lr=0.1)
    (tmp_path / "runs/a/eval.json").unlink()
    write_run(tmp_path / "runs/b", shift=1.0, lr=0.5)
    write_run(tmp_path / "runs/c", shift=3.0, lr=0.25)
    assert [row[-1] for row in plot()] == ["", "2.00"]
    write_run(tmp_path / "untested/d")
    (tmp_path / "untested/d/eval.json").unlink()
    assert [row[-1] for row in plot("untested", "runs")] == ["", "2.00"]


def test_runs_without_a_finite_bound_are_named(tmp_path, plot):
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "unfinished/b")
    log = tmp_path / "unfinished/b/log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    with pytest.raises(
        common.UserError, match="^no finite held-out bound yet in b; .* leave the folder out"
    ):
        plot("runs", "unfinished")


def test_data_that_differ_in_the_last_digit_of_a_sum_are_the_same(tmp_path, plot):
    write_run(tmp_path / "runs/a", data=DATA | dict(std=2148.5122937382107))
    write_run(tmp_path / "runs/b", shift=2, data=DATA | dict(std=2148.5122937382102), rnn_dim=64)
    assert [row[-1] for row in plot()] == ["", "-2.00"]


def test_runs_on_other_data_are_not_drawn_on_one_axis(tmp_path, plot):
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", data=DATA | dict(std=1000.0))
    with pytest.raises(common.UserError, match="runs/b and runs/a differ in their data"):
        plot()


def test_the_picture_of_generated_speech_is_drawn_beside_it(tmp_path, plot):
    write_run(tmp_path / "runs/a")
    evaluation_of(tmp_path / "runs/b")
    write_run(tmp_path / "runs/silent")
    random = np.random.default_rng(0)
    for run, length in (("a", 8_000), ("b", 100)):
        samples = tmp_path / "runs" / run / "samples"
        samples.mkdir()
        for name, scale in (
            ("real_0", 1000),
            ("sample_0", 500),
            ("sample_1", 20),
            ("continued_0", 0),
        ):
            soundfile.write(
                samples / f"{name}.wav",
                (scale * random.normal(size=length)).astype(np.int16),
                16_000,
            )
    plot()
    pictures = sorted(tmp_path.glob("runs/*/samples/samples.png"))
    assert [path.parts[-3] for path in pictures] == ["a", "b"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_yardsticks_are_rows_below_the_runs_in_the_unit_of_their_data(tmp_path, plot):
    yardsticks = dict(flac=dict(nats_per_frame=280.0), histogram=dict(nats_per_frame=-170.0))
    other = DATA | dict(file="b.h5", std=500.0)
    write_run(tmp_path / "runs/old")
    write_run(tmp_path / "runs/new", seed=1)
    damage(
        tmp_path / "runs/new/eval.json",
        '"split"',
        f'"yardsticks": {json.dumps(yardsticks)}, "split"',
    )
    _, flac, histogram = plot()
    bits = [f"{(np.log(2000.0) - nats / 200) / np.log(2):.3f}" for nats in (280, -170)]
    assert flac == ["FLAC", "", "", "", "", "280.00", "", bits[0], ""]
    assert histogram == ["histogram", "", "", "", "", "-170.00", "", bits[1], ""]
    evaluation_of(tmp_path / "runs/other", data=other)
    damage(
        tmp_path / "runs/other/eval.json",
        '"split"',
        f'"yardsticks": {json.dumps(yardsticks)}, "split"',
    )
    rows = {row[0]: row[-2] for row in plot()}
    assert rows["FLAC on a.h5"] == bits[0]
    assert rows["FLAC on b.h5"] == f"{(np.log(500.0) - 280 / 200) / np.log(2):.3f}"


def test_yardsticks_are_drawn_for_each_data_file(tmp_path, plot, monkeypatch):
    flac = json.dumps(dict(flac=dict(nats_per_frame=280.0)))
    for folder, data in (("first/a", DATA), ("second/b", DATA | dict(file="b.h5", std=500.0))):
        write_run(tmp_path / folder, data=data)
        damage(tmp_path / folder / "eval.json", '"split"', f'"yardsticks": {flac}, "split"')
    drawn = []
    monkeypatch.setattr(Axes, "axvline", lambda axis, x, label, **look: drawn.append(label))
    plot("first", "second")
    nats_in_bits = 280 / 200 / np.log(2)
    assert drawn == [
        f"FLAC on a.h5: {np.log2(2000) - nats_in_bits:.2f}",
        f"FLAC on b.h5: {np.log2(500) - nats_in_bits:.2f}",
    ]


def test_no_yardstick_is_drawn_where_the_data_file_has_none(tmp_path, plot, monkeypatch):
    write_run(tmp_path / "runs/a")
    damage(tmp_path / "runs/a/eval.json", '"split"', '"yardsticks": {}, "split"')
    lines = []
    monkeypatch.setattr(Axes, "axvline", lambda axis, x, **look: lines.append(x))
    assert [row[0] for row in plot()] == ["VRNN"]
    assert lines == []


def test_an_objective_has_its_colour_whatever_is_drawn_beside_it(tmp_path, plot, monkeypatch):
    """IWAE_5 first, as in the folder of 2016's pipeline, VRNN after it."""
    write_run(tmp_path / "runs/a", name="IWAE_5 of 2016")
    write_run(tmp_path / "runs/b", name="VRNN of 2016")
    drawn = {}
    draw_bits = plot_recon.draw_bits

    def remember(axis, tested, colours):
        drawn.update({run.name: colours[run.objective] for run in tested})
        draw_bits(axis, tested, colours)

    monkeypatch.setattr(plot_recon, "draw_bits", remember)
    plot()
    vrnn, _, iwae, *_ = plot_recon.COLOURS
    assert drawn == {"IWAE_5 of 2016": iwae, "VRNN of 2016": vrnn}


def test_a_long_label_leaves_the_panels_their_room(tmp_path, plot, monkeypatch):
    drawn = []
    draw = plot_recon.draw_bits

    def remember(axis, *arguments):
        draw(axis, *arguments)
        drawn.append(axis)

    write_run(tmp_path / "runs/a")
    settings = dict(batch_size=16, lr=0.01, grad_clip=640.0, x_noise=0.0, ema=0.0, rnn_dim=24)
    write_run(tmp_path / "runs/b", **settings, weight_norm=2.5, lr_updates=12_345)
    monkeypatch.setattr(plot_recon, "draw_bits", remember)
    plot()
    for axis in drawn[0].figure.axes:
        assert axis.get_position().width > 0.2


def test_an_error_of_our_own_is_not_taken_for_a_damaged_file(tmp_path, plot, monkeypatch):
    write_run(tmp_path / "runs/a")
    for name in ("read_curve", "read_test", "checked_data"):
        with monkeypatch.context() as patch:
            patch.setattr(plot_recon, name, lambda *arguments: {}["a typo"])
            with pytest.raises(KeyError, match="a typo"):
                plot()


def test_a_folder_without_runs_is_refused(tmp_path, plot):
    (tmp_path / "runs/empty").mkdir(parents=True)
    with pytest.raises(common.UserError, match="runs holds no runs"):
        plot()


def damage(path, text, instead):
    before = path.read_text()
    assert text in before
    path.write_text(before.replace(text, instead, 1))


@pytest.mark.parametrize(
    "file, text, instead, words",
    (
        ("log.jsonl", '{"update": 30', "", "--resume"),
        ("log.jsonl", '"nats_per_frame": 5', '"nats": 5', "--resume"),
        ("log.jsonl", '"seed"', '"sead"', "header"),
        ("log.jsonl", '"std"', '"sd"', "header"),
        ("log.jsonl", '"std": ', '"std": -', "header"),
        ("log.jsonl", '"script"', '"scrip"', "header"),
        ("log.jsonl", '{"config"', '[{"config"', "header"),
        ("log.jsonl", '"eval_k": [5, 100]', '"eval_k": []', "header"),
        ("eval.json", '"elbo": {', '"elbow": {', "anew"),
        ("eval.json", '"windows": 4', '"windows": "x"', "anew"),
        ("eval.json", "{", "", "anew"),
    ),
)
def test_a_damaged_file_of_a_run_is_named_with_a_remedy_that_fits(
    tmp_path, plot, file, text, instead, words
):
    write_run(tmp_path / "runs/damaged")
    damage(tmp_path / "runs/damaged" / file, text, instead)
    with pytest.raises(
        common.UserError, match=f"^runs/damaged holds no readable {file} .*{words}"
    ) as error:
        plot()
    assert "\n" not in str(error.value) and ("torn" in str(error.value)) == (words == "--resume")


@pytest.mark.parametrize(
    "file, text, instead",
    (
        ("eval.json", '"checkpoint"', '"point"'),
        ("eval.json", '"data": {', '"date": {'),
        ("eval.json", "{", ""),
        ("config.json", '"seed"', '"sead"'),
        ("config.json", "{", "["),
        ("eval.json", '"file": "a.h5", ', ""),
    ),
)
def test_a_damaged_file_of_an_evaluation_is_named(tmp_path, plot, file, text, instead):
    evaluation_of(tmp_path / "runs/damaged")
    damage(tmp_path / "runs/damaged" / file, text, instead)
    with pytest.raises(
        common.UserError, match=f"^runs/damaged holds no readable {file} .*--evaluate"
    ) as error:
        plot()
    assert "\n" not in str(error.value) and "torn" not in str(error.value)


@pytest.mark.parametrize("content", (b"", b"[" * 100_000, b"\xff\xfe", b"null", b"{}", b"3"))
@pytest.mark.parametrize("file", ("log.jsonl", "eval.json", "config.json"))
def test_a_file_of_something_else_is_named(tmp_path, plot, file, content):
    evaluation_of(tmp_path / "runs/damaged")
    (tmp_path / "runs/damaged" / file).write_bytes(content)
    with pytest.raises(common.UserError, match=f"^runs/damaged holds no readable {file} "):
        plot()


def test_a_damaged_sound_file_is_named(tmp_path, plot):
    write_run(tmp_path / "runs/a")
    (tmp_path / "runs/a/samples").mkdir()
    (tmp_path / "runs/a/samples/sample_0.wav").write_bytes(os.urandom(100))
    with pytest.raises(common.UserError, match="^runs/a/samples holds no readable sample_0.wav"):
        plot()
