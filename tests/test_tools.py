"""The tools and experiments beside the tests run, and measure what they say."""

import datetime
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import experiment
import mutants
import particles
import pytest
import torch
from tiny import ROOT, SIZES, log_of, main_of, make_updates, run, tiny_training, update_with
from torch.utils.flop_counter import FlopCounterMode

import common
import vrnn_gauss
import vrnn_gauss_iwae

CPU = torch.device("cpu")
BY_WORK = ("updates", "updates_small", "variants", "variants_small", "growth", "growth_small")


@pytest.fixture
def noise(tmp_path):
    """What the benchmark reads."""
    benchmark.write_corpus(tmp_path / "noise.h5", minutes=1)
    return tmp_path / "noise.h5"


@pytest.fixture
def clock(monkeypatch):
    """The benchmark's clock goes by work. An update takes 1 s, with bf16 3, ar_order 4, resample 5, dreg 6, and a plain
    rollout 9 s more; matrix products do 1 GFLOP in 2 s, in bf16 in 1 s. It keeps the numbers of threads it was read at.
    """
    clock = SimpleNamespace(time=0.0, threads=2, seen=set())
    step, plain_rollout = common.Training.step, benchmark.plain_rollout

    def read():
        clock.seen.add(clock.threads)
        return clock.time

    def timed_step(training, *arguments):
        h = training.h
        clock.time += (
            1
            + 2 * h.bf16
            + 3 * bool(h.ar_order)
            + 4 * getattr(h, "resample", 0)
            + 5 * getattr(h, "dreg", 0)
        )
        step(training, *arguments)

    def timed_plain_rollout(*arguments):
        clock.time += 9
        return plain_rollout(*arguments)

    def matrix_products(device, precision, size):
        return lambda: setattr(clock, "time", clock.time + (1 if precision == "bf16" else 2)), 1e9

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=read))
    monkeypatch.setattr(common.Training, "step", timed_step)
    monkeypatch.setattr(benchmark, "plain_rollout", timed_plain_rollout)
    monkeypatch.setattr(benchmark, "matrix_products", matrix_products)
    monkeypatch.setattr(torch, "get_num_threads", lambda: clock.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(clock, "threads", count))
    return clock


def test_the_benchmark_reports_single_updates_and_the_ratios_of_neighbours(
    noise, clock, monkeypatch
):
    monkeypatch.setattr(benchmark, "flop", lambda training: 6e9)
    rows = {}
    for part in BY_WORK:
        clock.seen.clear()
        rows[part] = list(benchmark.rows_of(part, noise, CPU, repeats=1, quick=True))
        assert clock.seen == {1 if part.endswith("_small") else 2} and clock.threads == 2
    columns = (
        "objective",
        "products",
        "batch",
        "rows",
        "seconds",
        "plain_seconds",
        "ratio",
        "gflops",
        "of_products",
    )
    exact, bf16 = (1, 10, 10, 6, 12), (3, 10, pytest.approx(10 / 3), 2, 2)
    assert [tuple(row[name] for name in columns) for row in rows["updates"]] == [
        row
        for objective, count in (("VRNN", 128), ("VAE_5", 640), ("IWAE_5", 640))
        for row in (
            (objective, "float32", 128, count, *exact),
            (objective, "bf16", 128, count, *bf16),
        )
    ]
    assert [tuple(row[name] for name in columns) for row in rows["updates_small"]] == [
        (objective, "float32", batch, count, *exact)
        for objective, batch, count in (
            ("VRNN", 8, 8),
            ("VRNN", 16, 16),
            ("VRNN", 32, 32),
            ("VAE_5", 8, 40),
            ("IWAE_5", 8, 40),
        )
    ]
    for row in rows["updates"] + rows["updates_small"]:
        assert (
            row["times_vrnn"] == 1
            and row["peak_gib"] > 0
            and row["least"] == row["ratio"] == row["most"]
        )
        assert row["blizzard_epoch_hours"] == pytest.approx(
            283 * 16_000 / 100 * row["seconds"] / row["batch"]
        )
    for part in ("variants", "variants_small"):
        assert rows[part] == [
            dict(
                objective=objective,
                flag=flag,
                seconds=taken,
                without_seconds=1,
                ratio=taken,
                least=taken,
                most=taken,
            )
            for objective, flag, taken in (
                ("VRNN", "--ar_order=16", 4),
                ("IWAE_5", "--ar_order=16", 4),
                ("IWAE_5", "--resample", 5),
                ("IWAE_5", "--dreg", 6),
            )
        ]
    for part in ("growth", "growth_small"):
        assert rows[part] == [
            dict(size=size, value=value, seconds=1)
            for size, values in dict(
                seq_frames=(20, 40, 80),
                batch_size=(16, 32, 64, 128),
                k=(1, 2, 5, 10),
                rnn_dim=(3, 6, 12, 24),
            ).items()
            for value in values
        ]


def test_variants_take_turns_after_a_warm_up_and_neighbours_are_compared(monkeypatch):
    turns = iter(range(8))
    monkeypatch.setattr(benchmark, "seconds", lambda device, function: next(turns))
    assert benchmark.alternate(CPU, dict(a=None, b=None), repeats=2) == dict(a=[4, 6], b=[5, 7])
    assert benchmark.ratios([2, 9, 4], [1, 3, 4]) == dict(ratio=2, least=1, most=3)


def operations(function):
    """The floating-point operations of the matrix products that a function really makes."""
    with FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._addmm_activation: (lambda bias, a, b, **_: 2 * a[0] * a[1] * b[1])
        },
    ) as counter:
        function()
    return counter.get_total_flops()


def test_the_benchmark_counts_the_operations_that_it_times(noise):
    for objective, (module, _) in benchmark.OBJECTIVES.items():
        training = benchmark.make_training(noise, CPU, objective, **benchmark.QUICK)
        training.next_window()
        assert (
            operations(benchmark.our_update(training, module.objective))
            == benchmark.flop(training)
            > 0
        )
    products, count = benchmark.matrix_products(CPU, size=8)
    assert operations(products) == count
    x_TBX, generator = torch.randn(5, 128, 20), torch.Generator()
    count = operations(lambda: common.estimate_bounds(training.model, x_TBX, (5, 100), generator))
    bounds, smc = benchmark.benchmark_evaluation(noise, CPU, 1, 8, **benchmark.QUICK)
    assert bounds["gflops"] * 1e9 * bounds["seconds"] == pytest.approx(count)
    assert smc["gflops"] == smc["of_products"] == ""
    for row in bounds, smc:
        assert row["windows_per_second"] * row["seconds"] == pytest.approx(128)


def test_the_benchmark_makes_the_updates_of_the_script(data, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Training, "finish", lambda training: None)
    by_flag = []
    for flag in ({}, dict(resample=True), dict(dreg=True)):
        flags, out = benchmark.QUICK | flag, tmp_path / "-".join(["run", *flag])
        main_of(
            "vrnn_gauss_iwae",
            *benchmark.flags_of(flags),
            f"--data={data}",
            f"--out_dir={out}",
            "--device=cpu",
            "--max_updates=6",
            "--eval_k=2",
            "--monitor_windows=8",
        )
        training = benchmark.make_training(data, CPU, "IWAE_5", **flags)
        benchmark.on_the_next_window(
            training, benchmark.our_update(training, vrnn_gauss_iwae.objective), 6
        )()
        by_flag.append(torch.load(out / "last.pt", weights_only=True)["model"])
        for name, parameter in training.model.state_dict().items():
            assert torch.equal(parameter, by_flag[-1][name]), (flag, name)
    plain, *others = (parameters["lstm_x.weight"] for parameters in by_flag)
    assert not any(torch.equal(plain, other) for other in others) and not torch.equal(*others)


def tables_in(output):
    """{title: rows} of printed Markdown."""
    tables = {}
    for title, table in zip(*[iter(output.strip().split("\n\n")[1:])] * 2):
        columns, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        tables[title] = [dict(zip(columns, row)) for row in rows]
    return tables


def test_the_benchmark_keeps_the_tables_that_it_prints(tmp_path, capsys, monkeypatch):
    timed = [part for part in benchmark.PARTS if part not in BY_WORK]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "benchmark.py",
            "--quick",
            "--repeats=1",
            "--device=cpu",
            f"--only={','.join(timed)}",
            f"--json={tmp_path / 'kept.json'}",
        ],
    )
    benchmark.main()
    kept, printed = (
        json.loads((tmp_path / "kept.json").read_text()),
        tables_in(capsys.readouterr().out),
    )
    assert (
        list(kept["tables"]) == timed == ["evaluation", "evaluation_small", "loader", "conversion"]
    )
    assert list(printed) == [benchmark.PARTS[part] for part in timed]
    for rows, printed_rows in zip(kept["tables"].values(), printed.values(), strict=True):
        for row, cells in zip(rows, printed_rows, strict=True):
            assert list(row) == list(cells)
            for name, value in row.items():
                is_text = isinstance(value, str)
                assert (
                    cells[name] == value
                    if is_text
                    else 0 < float(cells[name]) == pytest.approx(value, rel=1e-3)
                )
    assert (
        kept["commit"] == common.commit()
        and kept["torch"] == torch.__version__
        and "cpu" in kept["device"]
    )
    assert kept["date"] == datetime.date.today().isoformat()


def test_the_benchmark_names_its_parts_where_one_is_unknown(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only=updates,smal"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "'smal' is none of updates,updates_small,variants," in capsys.readouterr().err


def test_the_plain_update_of_the_benchmark_is_the_same_update(data, tmp_path):
    trained = []
    for name, make in dict(ours=benchmark.our_update, plain=benchmark.plain_update).items():
        h, training = tiny_training(vrnn_gauss_iwae, data, tmp_path / name, "--k=3")
        turn = benchmark.on_the_next_window(training, make(training, vrnn_gauss_iwae.objective))
        for _ in range(3):
            turn()
        assert training.made == training.counts["made"] == 3
        trained.append(training.model)
    for ours, plain in zip(*(model.parameters() for model in trained)):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_the_benchmark_lets_the_updates_of_two_trees_take_turns(noise, monkeypatch):
    monkeypatch.setattr(benchmark, "OBJECTIVES", {"VRNN": benchmark.OBJECTIVES["VRNN"]})
    (row,) = benchmark.compare_with(ROOT, noise, CPU, 1, quick=True)
    assert row["objective"] == "VRNN" and row["here_seconds"] > 0
    assert row["ratio"] == row["least"] == row["most"] == row["there_seconds"] / row["here_seconds"]


def test_every_run_of_the_experiment_has_valid_flags():
    names = []
    for group, name, script, *flags in experiment.table(Path("runs"), 5000):
        assert (ROOT / f"{script}.py").exists()
        assert group in (
            "objectives",
            "variants",
            "adam",
            "reader",
            "latents",
            "likelihood",
            "ar_settings",
            "clip",
            "regime",
            "size",
            "judges",
        )
        module = importlib.import_module(Path(script).name)
        settings = [*experiment.SETTINGS, *experiment.lengths(5000)]
        if group == "judges":
            checkpoint = Path(flags[0].removeprefix("--evaluate="))
            assert (
                checkpoint.parts[:-1] == ("runs", name.replace("_1000", ""))
                and checkpoint.parts[1] in names
            )
            settings, flags[0] = (
                [],
                f"--evaluate={ROOT / 'data/results/objectives/vrnn_long-0/best.pt'}",
            )
        common.parse(module.Hyperparameters, [*settings, *flags])
        names.append(name)
    assert len(names) == len(set(names)) == 129


def test_growing_norms_scale_every_gradient_and_the_log_holds_those_before(data, tmp_path):
    norms = []
    for flags in ([], ["--norm=growing", "--beta2=0.99"]):
        out = tmp_path / f"flags-{len(flags)}"
        result = run(
            "tests/experiments/clipping",
            *SIZES,
            f"--data={data}",
            f"--out_dir={out}",
            "--max_updates=1",
            *flags,
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        adam = torch.load(out / "last.pt", weights_only=True)["optimiser"]["state"].values()
        norms.append(
            (
                log_of(out)[1]["grad_norm"],
                torch.cat([moments["exp_avg"].flatten() for moments in adam]).norm().item(),
                torch.cat([moments["exp_avg_sq"].flatten() for moments in adam]).sum().item(),
            )
        )
    (clipped, first, second), (growing, first_growing, second_growing) = norms
    assert growing == pytest.approx(clipped) and abs(clipped - 60) > 5
    assert (first, second) == pytest.approx((0.1 * clipped, 0.001 * clipped**2), rel=1e-3)
    assert (first_growing, second_growing) == pytest.approx((0.1 * 60, 0.01 * 60**2), rel=1e-3)


def test_the_norms_grow_in_lines_between_those_of_the_trial_run():
    clipping = importlib.import_module("clipping")
    norms = clipping.median_norms(torch.device("cpu"))
    assert (
        norms[[0, 125, 250, 875]].tolist() == [60, 123, (123 + 272) / 2, 640] and len(norms) == 876
    )


def test_a_norm_is_limited_to_twice_the_median_of_the_last_ones():
    clipping = importlib.import_module("clipping")
    recent = torch.full((3,), torch.nan)
    norms = [
        clipping.limited(torch.tensor(norm), recent, update).item()
        for update, norm in enumerate((4.0, 1.0, 9.0, 30.0, 20.0, 20.0, 50.0))
    ]
    assert norms == [4, 1, 8, 18, 20, 20, 40]


def test_particles_prints_its_three_tables(data, tmp_path, monkeypatch, capsys):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run")
    make_updates(training, update_with(training, vrnn_gauss.objective), 2)
    for name, value in dict(
        FRAMES=(5, 10), PARTICLES=(2, 4), GRADIENTS=[(5, 1), (10, 3)], WINDOWS=4, BATCH=2, DRAWS=3
    ).items():
        monkeypatch.setattr(particles, name, value)
    monkeypatch.setattr(
        sys, "argv", ["particles.py", str(tmp_path / "run/best.pt"), f"--data={data}"]
    )
    particles.main()
    output = capsys.readouterr().out
    for row in (
        "| 10 | 4 | ",
        "| 10 | 5 | ",
        "| 5 | 1 | VRNN | ",
        "| 5 | 1 | VAE_1 = IWAE_1 | ",
        "| 10 | 3 | VAE_3 | ",
        "| 10 | 3 | IWAE_3 | ",
        "| 10 | 3 | IWAE_3 DReG | ",
        "| 10 | 3 | IWAE_3 resampled | ",
    ):
        assert output.count(row) == 1
    assert "nan" not in output


def test_every_mutant_still_applies():
    assert list(mutants.stale(mutants.MUTANTS)) == []
    assert len({mutant.what for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)


def test_a_mutant_that_no_longer_applies_is_named():
    twice = mutants.Mutant("twice", tests="", function="job", old="dist", new="it")
    gone = mutants.Mutant("gone", tests="", function="Training.go", old="return", new="pass")
    no_python = mutants.Mutant("no Python", tests="", function="job", old="0", new=")")
    found = list(mutants.stale([twice, gone, no_python]))
    assert found[0] == "twice: common.py, job: 'dist' occurs 3 times"
    assert found[1] == "gone: common.py, Training.go: go is defined 0 times"
    assert found[2].startswith("no Python: ")


def test_a_mutant_changes_its_function_or_statement_alone():
    lines = (ROOT / "common.py").read_text().splitlines()
    for function, old, new in (
        ("is_first", "job()[0] == 0", "job()[1] == 1"),
        ("", "SAMPLE_RATE = 16000", "SAMPLE_RATE = 8000"),
    ):
        mutant = mutants.Mutant("", tests="", function=function, old=old, new=new)
        changed = mutants.mutated(mutant, ROOT).splitlines()
        assert new in "\n".join(changed)
        added = [line.strip() for line in changed if line not in lines]
        assert len(added) == 1 and new in added[0]


SOME_MUTANTS = """
from mutants import Mutant, main
DENSITIES = "test_bounds.py::test_analytic_kl_and_densities_equal_torch_distributions"
main([
    Mutant("noticed", tests=DENSITIES, function="gaussian_kl", old="0.5", new="0.4"),
    Mutant("harmless", tests=DENSITIES, function="gaussian_kl", old="0.5", new="1 / 2"),
])
"""


def test_mutants_are_killed_or_named_as_survivors():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/tools")}
    command = [sys.executable, "-c", SOME_MUTANTS, "--jobs=1"]
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    lines = result.stdout.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in lines[:2]] == [
        ("killed", "noticed"),
        ("SURVIVED", "harmless"),
    ]
    assert lines[2:] == ["1 of 2 mutants killed", "harmless"]
    assert result.returncode == 1
