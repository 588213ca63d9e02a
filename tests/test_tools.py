"""The tools and experiments beside the tests run, and measure what they say."""

import importlib
import sys
from pathlib import Path

import benchmark
import experiment
import particles
import pytest
import torch
from tiny import ROOT, SIZES, log_of, make_updates, run, tiny_training, update_with

import common
import vrnn_gauss
import vrnn_gauss_iwae


def test_the_benchmark_times_ours_and_the_plain_update_of_every_objective(tmp_path, capsys):
    benchmark.write_corpus(tmp_path / "noise.h5", minutes=1)
    where = tmp_path / "noise.h5", torch.device("cpu"), 1
    fastest = benchmark.benchmark_updates(*where, product_size=8, **benchmark.QUICK)
    benchmark.benchmark_loader(*where, min(fastest.values()), **benchmark.QUICK)
    benchmark.benchmark_growth(*where, **benchmark.QUICK)
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.startswith(("VRNN", "VAE_5", "IWAE_5"))]
    assert [row[:3] for row in rows] == [[name, precision, rows_] for name, rows_ in (
        ("VRNN", "4"), ("VAE_5", "20"), ("IWAE_5", "20")) for precision in ("float32", "bf16")]
    assert all(float(cell) >= 0 for row in rows for cell in row[3:]) and all(fastest.values())
    for line in ("Loader alone", "seq_frames      20: ", "batch_size      16: ", "k                1: "):
        assert line in output


def test_the_plain_update_of_the_benchmark_is_the_same_update(data, tmp_path):
    trained = []
    for name, make in dict(ours=benchmark.our_update, plain=benchmark.plain_update).items():
        h, training = tiny_training(vrnn_gauss_iwae, data, tmp_path / name, "--k=3")
        turn = benchmark.on_the_next_window(training, make(training, vrnn_gauss_iwae.objective))
        for _ in range(3):
            turn()
        assert training.progress["updates"] == training.counts.updates == 3
        trained.append(training.model)
    for ours, plain in zip(*(model.parameters() for model in trained)):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_the_benchmark_lets_the_updates_of_two_trees_take_turns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "OBJECTIVES", {"VRNN": benchmark.OBJECTIVES["VRNN"]})
    benchmark.write_corpus(tmp_path / "noise.h5", minutes=1)
    benchmark.compare_with(ROOT, tmp_path / "noise.h5", torch.device("cpu"), 1, quick=True)
    name, *numbers = capsys.readouterr().out.splitlines()[1].split()
    assert name == "VRNN" and len(numbers) == 5 and all(float(number) > 0 for number in numbers)


def test_every_run_of_the_experiment_has_valid_flags():
    names = []
    for group, name, script, *flags in experiment.table(Path("runs"), 5000):
        assert (ROOT / f"{script}.py").exists()
        assert group in ("objectives", "variants", "adam", "reader", "latents", "likelihood", "clip", "regime")
        module = importlib.import_module(Path(script).name)
        h = common.parse(module.Hyperparameters, [*experiment.SETTINGS, *experiment.lengths(5000), *flags])
        if module is vrnn_gauss_iwae:
            module.chosen_corrections(h)
        names.append(name)
    assert len(names) == len(set(names)) == 126


def test_growing_norms_scale_every_gradient_and_the_log_holds_those_before(data, tmp_path):
    norms = []
    for flags in ([], ["--norm=growing", "--beta2=0.99"]):
        out = tmp_path / f"flags-{len(flags)}"
        result = run("tests/experiments/clipping", *SIZES, f"--data={data}", f"--out_dir={out}", "--max_updates=1",
                     *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        adam = torch.load(out / "last.pt", weights_only=True)["optimiser"]["state"].values()
        norms.append((log_of(out)[1]["grad_norm"],
                      torch.cat([moments["exp_avg"].flatten() for moments in adam]).norm().item(),
                      torch.cat([moments["exp_avg_sq"].flatten() for moments in adam]).sum().item()))
    (clipped, first, second), (growing, first_growing, second_growing) = norms
    assert growing == pytest.approx(clipped) and abs(clipped - 60) > 5
    assert (first, second) == pytest.approx((0.1 * clipped, 0.001 * clipped ** 2), rel=1e-3)
    assert (first_growing, second_growing) == pytest.approx((0.1 * 60, 0.01 * 60 ** 2), rel=1e-3)


def test_the_norms_grow_in_lines_between_those_of_the_trial_run():
    clipping = importlib.import_module("clipping")
    norms = clipping.median_norms(torch.device("cpu"))
    assert norms[[0, 125, 250, 875]].tolist() == [60, 123, (123 + 272) / 2, 640] and len(norms) == 876


def test_particles_prints_its_three_tables(data, tmp_path, monkeypatch, capsys):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run")
    make_updates(training, update_with(training, vrnn_gauss.objective), 2)
    for name, value in dict(FRAMES=(5, 10), PARTICLES=(2, 4), GRADIENTS=[(5, 1), (10, 3)], WINDOWS=4, BATCH=2,
                            DRAWS=3).items():
        monkeypatch.setattr(particles, name, value)
    monkeypatch.setattr(sys, "argv", ["particles.py", str(tmp_path / "run/best.pt"), f"--data={data}"])
    particles.main()
    output = capsys.readouterr().out
    for row in ("| 10 | 4 | ", "| 10 | 5 | ", "| 5 | 1 | VRNN | ", "| 5 | 1 | VAE_1 = IWAE_1 | ", "| 10 | 3 | VAE_3 | ",
                "| 10 | 3 | IWAE_3 | ", "| 10 | 3 | IWAE_3 DReG | ", "| 10 | 3 | IWAE_3 resampled | "):
        assert output.count(row) == 1
    assert "nan" not in output
