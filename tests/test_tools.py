"""The tools and experiments beside the tests run, and measure what they say."""

import datetime
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import check_readme
import experiment
import filters
import gpu_check
import h5py
import mutants
import numpy as np
import particles
import published_2016
import pytest
import torch
import tyro
from tiny import ROOT, SIZES, log_of, main_of, make_updates, run, tiny_training, update_with
from torch.utils.flop_counter import FlopCounterMode

import common
import vrnn_gauss
import vrnn_gauss_iwae

CPU = torch.device("cpu")
BY_WORK = ("updates", "variants", "likelihood", "growth")
BY_WORK += tuple(f"{part}_small" for part in BY_WORK)


@pytest.fixture
def noise(tmp_path):
    """What the benchmark reads."""
    benchmark.write_corpus(tmp_path / "noise.h5", minutes=1)
    return tmp_path / "noise.h5"


@pytest.fixture
def clock(monkeypatch):
    """The benchmark's clock goes by work.

    An update takes 1 s, with bf16 3, ar_order 4, resample 5, dreg 6, and a plain rollout 9 s more;
    matrix products do 1 GFLOP in 2 s, in bf16 in 1 s. It keeps the numbers of threads at which it
    was read.
    """
    clock = SimpleNamespace(time=0.0, threads=2, seen=set())
    step = common.Training.step
    plain_rollout = benchmark.plain_rollout

    def read():
        clock.seen.add(clock.threads)
        return clock.time

    def timed_step(training, *arguments):
        h = training.h
        clock.time += 1
        clock.time += 2 * h.bf16
        clock.time += 3 * bool(h.ar_order)
        clock.time += 4 * getattr(h, "resample", False)
        clock.time += 5 * getattr(h, "dreg", False)
        step(training, *arguments)

    def timed_plain_rollout(*arguments):
        clock.time += 9
        return plain_rollout(*arguments)

    def matrix_products(device, precision, size):
        def products():
            clock.time += 1 if precision == "bf16" else 2

        return products, 1e9

    def set_threads(count):
        clock.threads = count

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=read))
    monkeypatch.setattr(common.Training, "step", timed_step)
    monkeypatch.setattr(benchmark, "plain_rollout", timed_plain_rollout)
    monkeypatch.setattr(benchmark, "matrix_products", matrix_products)
    monkeypatch.setattr(torch, "get_num_threads", lambda: clock.threads)
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    return clock


# Of an update in float32 and in bf16: seconds, those of a plain one, their ratio, and what matrix
# products there are, in GFLOP a second and as a part of what the machine does.
EXACT = dict(seconds=1, plain_seconds=10, ratio=10, gflops=6, of_products=12)
BF16 = dict(seconds=3, plain_seconds=10, ratio=pytest.approx(10 / 3), gflops=2, of_products=2)


def of_an_update(objective, batch, rows, products="float32"):
    timed = BF16 if products == "bf16" else EXACT
    return dict(objective=objective, products=products, batch=batch, rows=rows, **timed)


def without(row, names):
    return {name: value for name, value in row.items() if name not in names}


@pytest.fixture
def rows_of(noise, clock, monkeypatch):
    """A function from a part of the benchmark to its rows; it goes by work, on the right threads."""
    monkeypatch.setattr(benchmark, "flop", lambda training: 6e9)

    def rows_of(part):
        clock.seen.clear()
        rows = list(benchmark.rows_of(part, noise, CPU, repeats=1, quick=True))
        assert clock.seen == {1 if part.endswith("_small") else 2}
        assert clock.threads == 2
        return rows

    return rows_of


@pytest.mark.parametrize(
    "part, expected",
    (
        (
            "updates",
            [
                of_an_update("VRNN", 128, 128),
                of_an_update("VRNN", 128, 128, "bf16"),
                of_an_update("VAE_5", 128, 640),
                of_an_update("VAE_5", 128, 640, "bf16"),
                of_an_update("IWAE_5", 128, 640),
                of_an_update("IWAE_5", 128, 640, "bf16"),
            ],
        ),
        (
            "updates_small",
            [
                of_an_update("VRNN", 8, 8),
                of_an_update("VRNN", 16, 16),
                of_an_update("VRNN", 32, 32),
                of_an_update("VAE_5", 8, 40),
                of_an_update("IWAE_5", 8, 40),
            ],
        ),
    ),
)
def test_the_benchmark_reports_single_updates(rows_of, part, expected):
    rows = rows_of(part)
    others = ("least", "most", "times_vrnn", "peak_gib", "blizzard_epoch_hours")
    assert [without(row, others) for row in rows] == expected
    for row in rows:
        assert row["least"] == row["ratio"] == row["most"]
        assert row["times_vrnn"] == 1
        assert row["peak_gib"] > 0
        hours = 283 * 16_000 / 100 * row["seconds"] / row["batch"]
        assert row["blizzard_epoch_hours"] == pytest.approx(hours)


@pytest.mark.parametrize("size", ("", "_small"))
def test_the_benchmark_reports_the_ratios_of_neighbours(rows_of, size):
    times = ("seconds", "ratio", "least", "most")  # without a flag an update takes 1 s
    assert rows_of("likelihood" + size) + rows_of("variants" + size) == [
        dict(objective=objective, flag=flag, without_seconds=1, **dict.fromkeys(times, taken))
        for objective, flag, taken in (
            ("VRNN", "--ar_order=32", 4),
            ("IWAE_5", "--ar_order=32", 4),
            ("IWAE_5", "--resample", 5),
            ("IWAE_5", "--dreg", 6),
        )
    ]


@pytest.mark.parametrize("part", ("growth", "growth_small"))
def test_the_benchmark_lets_one_size_grow_at_a_time(rows_of, part):
    values = dict(
        seq_frames=(20, 40, 80),
        batch_size=(16, 32, 64, 128),
        k=(1, 2, 5, 10),
        rnn_dim=(3, 6, 12, 24),
    )
    expected = []
    for size in values:
        expected += [dict(size=size, value=value, seconds=1) for value in values[size]]
    assert rows_of(part) == expected


def test_variants_take_turns_after_a_warm_up_and_neighbours_are_compared(monkeypatch):
    turns = iter(range(8))
    monkeypatch.setattr(benchmark, "seconds", lambda device, function: next(turns))
    assert benchmark.alternate(CPU, dict(a=None, b=None), repeats=2) == dict(a=[4, 6], b=[5, 7])
    assert benchmark.ratios([2, 9, 4], [1, 3, 4]) == dict(ratio=2, least=1, most=3)


def operations(function):
    """The floating-point operations of the matrix products that a function really makes."""

    def addmm_activation(bias, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    mapping = {torch.ops.aten._addmm_activation: addmm_activation}
    mapping[torch.ops.aten.addmm_] = addmm_activation
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def test_the_benchmark_counts_the_operations_that_it_times(noise):
    for objective, (module, _) in benchmark.OBJECTIVES.items():
        training = benchmark.make_training(noise, CPU, objective, **benchmark.QUICK)
        training.next_window()
        count = operations(benchmark.our_update(training, module.objective))
        assert count == benchmark.flop(training)
        assert count > 0
    products, count = benchmark.matrix_products(CPU, size=8)
    assert operations(products) == count
    x_TBX = torch.randn(5, 128, 20)
    generator = torch.Generator()
    counts = [
        operations(lambda: common.estimate_bounds(training.model, x_TBX, (5, 100), generator)),
        operations(lambda: common.estimate_smc(training.model, x_TBX, 100, generator)),
    ]
    rows = benchmark.benchmark_evaluation(noise, CPU, 1, 8, **benchmark.QUICK)
    for row, count in zip(rows, counts, strict=True):
        assert row["gflops"] * 1e9 * row["seconds"] == pytest.approx(count)
        assert row["windows_per_second"] * row["seconds"] == pytest.approx(128)


def test_the_benchmark_makes_the_updates_of_the_script(data, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Training, "finish", lambda training: None)
    parameters = []
    for flag in ({}, dict(resample=True), dict(dreg=True)):
        flags = benchmark.QUICK | flag
        out = tmp_path / "-".join(["run", *flag])
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
        update = benchmark.our_update(training, vrnn_gauss_iwae.objective)
        six_updates = benchmark.on_the_next_window(training, update, 6)
        six_updates()
        of_the_script = torch.load(out / "last.pt", weights_only=True)["model"]
        for name, parameter in training.model.state_dict().items():
            assert torch.equal(parameter, of_the_script[name]), (flag, name)
        parameters.append(of_the_script["lstm_x.weight"])
    for one, other in itertools.combinations(parameters, 2):
        assert not torch.equal(one, other)


def tables_in(output):
    """{title: rows} of printed Markdown, below the line that says on what it was measured."""
    _, *parts = output.strip().split("\n\n")
    tables = {}
    for title, table in zip(parts[::2], parts[1::2], strict=True):
        columns, _, *rows = map(cells_in, table.splitlines())
        tables[title] = [dict(zip(columns, row)) for row in rows]
    return tables


def cells_in(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.usefixtures("without_filter")
def test_the_benchmark_keeps_the_tables_that_it_prints(tmp_path, capsys, monkeypatch):
    timed = [part for part in benchmark.PARTS if part not in BY_WORK]
    assert timed == ["evaluation", "evaluation_small", "loader", "conversion"]
    file = tmp_path / "kept.json"
    flags = ["--quick", "--repeats=1", "--device=cpu", f"--only={','.join(timed)}"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, f"--json={file}"])
    benchmark.main()
    kept = json.loads(file.read_text())
    printed = tables_in(capsys.readouterr().out)
    assert list(kept["tables"]) == timed
    assert list(printed) == [benchmark.PARTS[part] for part in timed]
    for rows, printed_rows in zip(kept["tables"].values(), printed.values(), strict=True):
        for row, cells in zip(rows, printed_rows, strict=True):
            assert_is_printed(row, cells)
    assert kept["commit"] == common.commit()
    assert kept["torch"] == torch.__version__
    assert kept["date"] == datetime.date.today().isoformat()
    assert "cpu" in kept["device"]


def assert_is_printed(row, cells):
    """Text as it is, and numbers, which are all above zero, to three digits."""
    assert list(row) == list(cells)
    for name, value in row.items():
        if isinstance(value, str):
            assert cells[name] == value
        else:
            assert value > 0
            assert float(cells[name]) == pytest.approx(value, rel=1e-3)


def test_the_benchmark_names_its_parts_where_one_is_unknown(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only=updates,smal"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "'smal' is none of updates,updates_small,variants," in capsys.readouterr().err


def test_the_plain_update_of_the_benchmark_is_the_same_update(data, tmp_path):
    models = []
    for make_update in (benchmark.our_update, benchmark.plain_update):
        out = tmp_path / make_update.__name__
        _, training = tiny_training(vrnn_gauss_iwae, data, out, "--k=3")
        update = make_update(training, vrnn_gauss_iwae.objective)
        turn = benchmark.on_the_next_window(training, update)
        for _ in range(3):
            turn()
        assert training.made == training.counts["made"] == 3
        models.append(training.model)
    ours, plain = models
    for p, plain_p in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, plain_p, rtol=1e-3, atol=1e-5)


def test_the_benchmark_lets_the_updates_of_two_trees_take_turns(noise, monkeypatch):
    monkeypatch.setattr(benchmark, "OBJECTIVES", {"VRNN": benchmark.OBJECTIVES["VRNN"]})
    (row,) = benchmark.compare_with(ROOT, noise, CPU, 1, quick=True)
    assert row["objective"] == "VRNN"
    assert row["here_seconds"] > 0
    assert row["ratio"] == row["least"] == row["most"] == row["there_seconds"] / row["here_seconds"]


GROUPS = (
    "objectives",
    "variants",
    "adam",
    "reader",
    "latents",
    "clip",
    "regime",
    "size",
    "likelihood",
    "likelihood_larger",
    "likelihood_z",
    "our_training",
    "our_training_long",
    "published_size",
    "without_z",
    "latent_variables",
)


def test_every_run_of_the_experiment_has_valid_flags():
    names = []
    for group, name, script, *flags in experiment.table(Path("runs"), 5000):
        assert (ROOT / f"{script}.py").exists()
        assert (group, name) not in names
        names.append((group, name))
        if [script] == experiment.PIPELINE:
            settings = [*experiment.PIPELINE_SETTINGS, *flags]
            tyro.cli(published_2016.Hyperparameters, args=settings, use_underscores=True)
            continue
        module = importlib.import_module(Path(script).name)
        settings = [*experiment.SETTINGS, *experiment.lengths(5000)]
        if flags and flags[0].startswith("--evaluate"):  # an earlier run, with its settings
            checkpoint, *flags = flags
            *_, earlier_group, earlier, _ = checkpoint.split("/")
            assert earlier == name
            assert (earlier_group, earlier) in names
            settings = [f"--evaluate={ROOT / 'data/results/objectives/vrnn_long-0/best.pt'}"]
        else:
            assert group in GROUPS
        common.parse(module.Hyperparameters, [*settings, *flags])
    assert len(names) == 306


def first_update_of_clipping(data, out, *flags):
    """The norm in the log after one update, and the two moments of Adam in one piece each."""
    flags = [*SIZES, f"--data={data}", f"--out_dir={out}", "--max_updates=1", *flags]
    result = run("tests/experiments/clipping", *flags, cwd=out.parent, brief=True)
    assert result.returncode == 0, result.stderr
    state = torch.load(out / "last.pt", weights_only=True)["optimiser"]["state"]
    first = torch.cat([moments["exp_avg"].flatten() for moments in state.values()])
    second = torch.cat([moments["exp_avg_sq"].flatten() for moments in state.values()])
    return log_of(out)[1]["grad_norm"], first, second


def test_growing_norms_scale_every_gradient_and_the_log_holds_those_before(data, tmp_path):
    norm, first, second = first_update_of_clipping(data, tmp_path / "clipped")
    assert abs(norm - 60) > 5
    assert first.norm().item() == pytest.approx(0.1 * norm, rel=1e-3)
    assert second.sum().item() == pytest.approx(0.001 * norm**2, rel=1e-3)
    growing = ("--norm=growing", "--beta2=0.99")
    same_norm, first, second = first_update_of_clipping(data, tmp_path / "growing", *growing)
    assert same_norm == pytest.approx(norm)
    assert first.norm().item() == pytest.approx(0.1 * 60, rel=1e-3)
    assert second.sum().item() == pytest.approx(0.01 * 60**2, rel=1e-3)


def test_the_norms_grow_in_lines_between_those_of_the_trial_run():
    clipping = importlib.import_module("clipping")
    norms = clipping.median_norms(torch.device("cpu"))
    assert norms[[0, 125, 250, 875]].tolist() == [60, 123, (123 + 272) / 2, 640]
    assert len(norms) == 876


def test_a_norm_is_limited_to_twice_the_median_of_the_last_ones():
    clipping = importlib.import_module("clipping")
    recent = torch.full((3,), torch.nan)
    limited = []
    for update, norm in enumerate((4.0, 1.0, 9.0, 30.0, 20.0, 20.0, 50.0)):
        limited.append(clipping.limited(torch.tensor(norm), recent, update).item())
    assert limited == [4, 1, 8, 18, 20, 20, 40]


def test_particles_prints_its_three_tables(data, tmp_path, monkeypatch, capsys):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run")
    make_updates(training, update_with(training, vrnn_gauss.objective), 2)
    sizes = dict(FRAMES=(5, 10), PARTICLES=(2, 4), GRADIENTS=[(5, 1), (10, 3)])
    for name, value in dict(**sizes, WINDOWS=4, BATCH=2, DRAWS=3).items():
        monkeypatch.setattr(particles, name, value)
    arguments = [str(tmp_path / "run/best.pt"), f"--data={data}"]
    monkeypatch.setattr(sys, "argv", ["particles.py", *arguments])
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


def test_filters_normalise_by_the_checkpoint_and_keep_runs_of_one_name_apart(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(filters, "FRAMES", 5)
    other = tmp_path / "other.h5"
    shutil.copy(data, other)
    with h5py.File(other, "a") as file:
        file.attrs["std"] *= 2
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run")
    make_updates(training, update_with(training, vrnn_gauss.objective), 2)
    best = tmp_path / "run/best.pt"
    few = ("--particles", 3, "--windows", 4)
    found = []
    for file in (data, other):
        main_of("filters", best, *few, f"--data={file}", f"--out={tmp_path / 'filters.json'}")
        found.append(json.loads((tmp_path / "filters.json").read_text())["runs"])
    assert len(found[0]["run"]["3"]) == 4
    assert found[0] == found[1]
    with pytest.raises(common.UserError, match="of one name"):
        main_of("filters", best, tmp_path / "again/run/best.pt", *few, f"--data={data}")


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


def test_the_check_for_a_first_gpu_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "VARIANTS", (["vrnn_gauss_iwae", "--ar_order=3"],))
    monkeypatch.setattr(gpu_check, "TIMED", (("IWAE_5", dict(resample=True)),))
    for step in ("versions", "equality", "benchmark"):
        folder = tmp_path / step
        folder.mkdir()
        assert gpu_check.STEPS[step](folder, "cpu", quick=True)
    said = capsys.readouterr().out
    assert "ok  vrnn_gauss_iwae --ar_order=3 | NO GRAPH | again: bit for bit" in said
    assert "IWAE_5 {'resample': True}: " in said


def test_the_check_for_a_first_gpu_notices_a_difference(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "VARIANTS", (["vrnn_gauss"],))
    worst = iter([("", 0.0), ("model", 0.1), ("", 0.0)])
    monkeypatch.setattr(gpu_check, "largest_difference", lambda one, other: next(worst))
    assert not gpu_check.equality(tmp_path, "cpu", quick=True)
    assert "BAD vrnn_gauss" in capsys.readouterr().out


def test_a_p_value_is_that_of_the_tables_of_students_t():
    for t_at_95, count in zip((12.706, 4.303, 3.182, 2.776), (2, 3, 4, 5)):
        differences = np.linspace(-1, 1, count)
        error = np.std(differences, ddof=1) / count**0.5
        assert check_readme.p_value(differences + t_at_95 * error) == pytest.approx(0.05, abs=1e-4)
        assert check_readme.p_value(differences - t_at_95 * error) == pytest.approx(0.05, abs=1e-4)


def test_holms_correction_multiplies_by_how_many_are_left_and_stops_at_the_first_that_fails():
    p_values = dict(first=0.012, second=0.02, third=0.021, fourth=0.04)
    assert check_readme.holm(p_values) == dict(first=True, second=False, third=False, fourth=False)
    assert check_readme.holm(dict(p_values, second=0.0124)) == dict.fromkeys(p_values, True)
