"""Hold the README files against the committed logs: every table, every measured number in the text.

    python tests/experiments/check_readme.py            says what is not in the logs, with status 1
    python tests/experiments/check_readme.py --write    writes the tables anew

A table stands between <!-- table: NAME --> and <!-- end -->. A number with a decimal point outside
of code must be a cell of one of these tables, or stand in OTHERS with where it comes from.
"""

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = str(ROOT), str(ROOT / "tests/tools")

import benchmark  # noqa: E402

import common  # noqa: E402
import plot_recon  # noqa: E402
from plot_recon import bits_of, by_label, in_words, markdown, mean_and_interval  # noqa: E402

RESULTS = ROOT / "data/results"
FILES = ("README.md", "data/README.md", "data/results/README.md", "tests/README.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CODE = re.compile(
    r"```.*?```|^ {4}.*?$|`[^`\n]*`|https?://[^\s)]*|arXiv \d+\.\d+", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"(?<![\w./])\d[\d,]*\.\d+(?!\w|\.\d)")
SETTINGS = "a setting, or a default in a script"
OTHERS = {
    "0.003": SETTINGS,
    "0.08": SETTINGS,
    "0.1": SETTINGS,
    "0.3": SETTINGS,
    "0.5": SETTINGS,
    "0.028": "bits, of windows.csv of lstm_ar_32-0 against the adaptive filter in the data file",
    "0.045": "the same of lstm_ar_32_wide-0",
    "0.03": "a trial whose log was not kept, as the text says",
    "7.9": "a goal, in bits",
    "8.101": "bits of lstm_ar_32-0 on windows without their first frame",
    "1.4": "nats in a hundredth of a bit, 200 log(2) / 100",
    "13.8": "the loudest of a hundred seconds drawn by lstm_ar_32_wide-0",
    "0.8": "410.40 - 409.63",
    "0.2": "410.40 - 410.16; also a setting",
    "0.9": "common.SUM_OF_EXPONENTS; also the softest of a hundred seconds drawn",
    "8.8": "the loudest of them",
    "1.1": "a trial whose log was not kept, as the text says",
    "0.63": "millions of parameters, printed by every run",
    "1.29": "the same of the runs in hostile and bf16",
    "15.89": "the same at published size",
    "25.6": "640 / 25, limits of 2016",
    "2.5": "12,500 / 5,000 updates",
    "1.9365": SETTINGS,
    "85.56": "minutes of recordings, printed by prepare_blizzard.py",
    "30.13": "minutes of the single reader's train split, printed by prepare_blizzard.py",
    "16.3": "billions of samples in 283 hours",
    "3.10": "a version of Python",
    "3.14": "a version of Python",
    "4.0": "a licence",
}

# ---- runs ----------------------------------------------------------------------------------------

BOUNDS = ("elbo", "iwae_5", "iwae_100", "smc_100")  # from the loosest to the tightest


@functools.cache
def read(*groups):
    """(runs, those that they are compared with) of each group of results, labelled together."""
    rows = plot_recon.read_folders([RESULTS / group for group in groups])
    return list(zip(rows, plot_recon.references(rows)))


def runs_of(*groups):
    """All runs of these groups."""
    runs = []
    for of_group, _ in read(*groups):
        runs += of_group
    return runs


def json_of(path):
    return json.loads((RESULTS / path).read_text())


def evaluation_of(run):
    return json_of(run.folder / "eval.json")


def log_of(run):
    """What a run logged at each evaluation on valid, without the header."""
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def monitored_at(log, updates):
    """{heading: iwae_5 on valid} after these numbers of updates, as far as it was logged."""
    cells = {f"`iwae_5` at {update:,}": "" for update in updates}
    for line in log:
        heading = f"`iwae_5` at {line['update']:,}"
        if heading in cells:
            cells[heading] = f"{line['valid']['iwae_5']['nats_per_frame']:.2f}"
    return cells


def last_kl(log):
    return f"{log[-1]['valid']['kl']['nats_per_frame']:.2f}"


def percent_clipped(log):
    return 100 * log[-1]["clipped"] / log[-1]["update"]


def full_table(*groups):
    """The rows of plot_recon.py for the last of the groups, where it draws all of them."""
    return plot_recon.table(*read(*groups)[-1])


# ---- the front page ------------------------------------------------------------------------------

LATER = "benchmark_likelihood.json"  # of the adaptive likelihood
BENCHMARKED = {"vrnn_gauss": "VRNN", "vrnn_gauss_alt_nll": "VAE_5", "vrnn_gauss_iwae": "IWAE_5"}
# Of the front page: the runs of 5,000 updates under each likelihood, and the order of objectives.
FRONT = {"published": ("our_training", "without_z"), "adaptive": ("likelihood", "likelihood_z")}
OBJECTIVES = ("LSTM", "VRNN", "VAE_5", "IWAE_5", "IWAE_5 resampled")


def front_table():
    """The objectives under both likelihoods after 5,000 updates, and what has to be beaten."""
    rows = {name: {"objective": name} for name in OBJECTIVES}
    rows["LSTM"]["objective"] += ", without z"
    for likelihood, groups in FRONT.items():
        for name, runs in by_objective(runs_of(*groups)).items():
            rows[name] |= {
                f"{likelihood} likelihood: nats": mean_and_interval(filtered(runs)),
                f"{likelihood}: bits": mean_and_interval(bits_by_filter(runs), 3),
                f"{likelihood}: minutes": minutes(runs[0].config),
            }
    # The adaptive likelihood is what could beat them.
    yardsticks = plot_recon.yardstick_rows(
        runs_of("our_training"), "adaptive likelihood: nats", "adaptive: bits"
    )
    models = [row for row in rows.values() if len(row) > 1]
    return markdown(models + [row for row in yardsticks if row["objective"] != "histogram"])


def by_objective(runs):
    groups = {}
    for run in runs:
        groups.setdefault(run.objective, []).append(run)
    return groups


def filtered(runs):
    """The particle filter's bound of each run, with as many particles as it was tested with."""
    return [run.bounds[plot_recon.tightest_of(run)] for run in runs]


def bits_by_filter(runs):
    return [bits_of(run, nats) for run, nats in zip(runs, filtered(runs))]


def minutes(config):
    """Of one core: a run's updates by the benchmark's seconds; "" where it measured no such."""
    for size in ("rnn_dim", "z_dim"):
        if config[size] != benchmark.SMALL[size]:
            return ""
    measured = json_of("benchmark.json")["tables"]
    variants = measured["variants_small"] + json_of(LATER)["tables"]["likelihood_small"]
    objective = BENCHMARKED[config["script"]]
    seconds = None
    for row in measured["updates_small"]:
        if row["objective"] == objective and row["batch"] == config["batch_size"]:
            seconds = row["seconds"]
    if seconds is None:
        return ""
    # VAE_5 does with a flag what IWAE_5 does.
    like = "VRNN" if objective == "VRNN" else "IWAE_5"
    ratios = {}
    for row in variants:
        if row["objective"] == like:
            ratios[row["flag"].strip("-").partition("=")[0]] = row["ratio"]
    for setting in ("ar_order", "resample", "dreg"):
        if config.get(setting) and setting not in ratios:
            return ""  # not measured
        if config.get(setting):
            seconds *= ratios[setting]
    return f"{config['max_updates'] * seconds / 60:.1f}"


# ---- the limit on the gradient -------------------------------------------------------------------


def limited(name, limit):
    """The runs of 5,000 updates of an objective under a limit on the gradient."""
    chosen = []
    for run in runs_of("objectives", "clip", "our_training", "variants"):
        config = run.config
        is_usual = config["max_updates"] == 5000 and config["mirrored_init"] and config["x_noise"]
        if is_usual and run.bounds and run.name == name and config["grad_clip"] == limit:
            chosen.append(run)
    return chosen


def above(name, limit, other, other_limit, bound="smc_100"):
    """By how much a bound of one objective is above that of another, in runs of the same seed."""
    return with_runs(plot_recon.paired(limited(name, limit), limited(other, other_limit), bound))


def with_runs(differences):
    """Their mean with its 95 % interval over the seeds, and in brackets their number."""
    if len(differences) == 0:
        return ""
    return f"{mean_and_interval(differences)} ({len(differences)})"


def by_limit(limits, names, contrasts):
    """Rows: objectives above VRNN limited to 640, and contrasts of two that are limited alike."""
    rows = []
    for name in names:
        row = {"nats/frame": name}
        for limit in limits:
            row[in_words("grad_clip", limit)] = above(name, limit, "VRNN", 640)
        rows.append(row)
    for name, other in contrasts:
        row = {"nats/frame": f"{name} above {other}, limited alike"}
        for limit in limits:
            row[in_words("grad_clip", limit)] = above(name, limit, other, limit)
        rows.append(row)
    return markdown(rows)


def on_valid(limits):
    """The same of VRNN by what it would be chosen with: iwae_5 on valid after the last update."""
    row = {"nats/frame": "VRNN, by `iwae_5` on valid"}
    reference = last_on_valid(640)
    for limit in limits:
        ends = last_on_valid(limit)
        differences = [ends[seed] - reference[seed] for seed in ends]
        row[in_words("grad_clip", limit)] = with_runs(differences)
    return markdown([row])


def last_on_valid(limit):
    return {run.seed: run.curve[-1, 1] for run in limited("VRNN", limit)}


def by_bound():
    """Rows: an objective under two limits, and two objectives under one. Columns: the bounds."""
    rows = []
    for name in ("VRNN", "IWAE_5"):
        for limit in (5, 2560):
            heading = f"{name} {in_words('grad_clip', limit)} above {in_words('grad_clip', 640)}"
            rows.append(row_of_bounds(heading, name, limit, name, 640))
    for name in ("VAE_5", "IWAE_5", "IWAE_5 resampled"):
        for limit in (5, 640):
            heading = f"{name} {in_words('grad_clip', limit)} above VRNN, limited alike"
            rows.append(row_of_bounds(heading, name, limit, "VRNN", limit))
    return markdown([row for row in rows if row["`elbo`"]])


def row_of_bounds(heading, *contrast):
    row = {"nats/frame": heading}
    for bound in BOUNDS:
        row[f"`{bound}`"] = above(*contrast, bound)
    return row


def at_default_limit():
    """Contrasts 26 and 27: objectives above VRNN of the same seed and updates, by each bound.

    A star stands where Holm's correction for all differences of three seeds or more leaves it.
    """
    rows = []
    p_values = {}
    for group in ("our_training", "our_training_long"):
        runs = by_objective(runs_of(group))
        for name in [name for name in runs if name != "VRNN"]:
            seeds = str(len(plot_recon.paired(runs[name], runs["VRNN"], "elbo")))
            updates = f"{runs[name][0].config['max_updates']:,}"
            row = {"nats/frame above VRNN": name, "updates": updates, "seeds": seeds}
            for bound in BOUNDS:
                differences = plot_recon.paired(runs[name], runs["VRNN"], bound)
                row[f"`{bound}`"] = interval_or_values(differences)
                if len(differences) >= 3:
                    p_values[len(rows), f"`{bound}`"] = p_value(differences)
            rows.append(row)
    for (row, bound), stands in holm(p_values).items():
        if stands:
            rows[row][bound] += " *"
    return markdown(rows)


def norms_and_clips():
    """Median norm of the gradient, and the share of updates clipped, of runs that count them."""
    groups = {}
    for run in runs_of("objectives", "clip", "our_training", "regime"):
        if "clipped" in log_of(run)[-1]:
            batch = in_words("batch_size", run.config["batch_size"])
            limit = in_words("grad_clip", run.config["grad_clip"])
            updates = f"{run.config['max_updates']:,}"
            groups.setdefault((run.name, limit, batch, updates), []).append(log_of(run))
    rows = []
    for (name, limit, batch, updates), logs in groups.items():
        norms = [statistics.median(line["grad_norm"] for line in log) for log in logs]
        shares = [percent_clipped(log) for log in logs]
        rows.append(
            {
                "objective": name,
                "limit": limit,
                "batch": batch,
                "updates": updates,
                "runs": str(len(logs)),
                "median norm": f"{statistics.mean(norms):.1f}",
                "updates clipped": f"{statistics.mean(shares):.1f} %",
            }
        )
    return markdown(rows)


def regime():
    """Initialisation, batch and rate of 2016: what held-out data say at the same updates."""
    rows = []
    for run in runs_of("regime"):
        log = log_of(run)
        row = {"objective": run.name, "limit": in_words("grad_clip", run.config["grad_clip"])}
        row |= monitored_at(log, (250, 500, 750, 1250, 2500))
        row["KL"] = last_kl(log)
        row["updates clipped"] = f"{percent_clipped(log):.1f} %"
        rows.append(row)
    return markdown(rows)


def curve_of(run):
    """{update: iwae_5 on valid after so many}."""
    return dict(run.curve.tolist())


def pipeline():
    """2016 as it was, and with one ingredient exchanged: held-out data at the same updates."""
    rows = []
    variants = by_variant(runs_of("pipeline_of_2016", "pipeline_exchanged"))
    for name, by_seed in variants.items():
        group = [by_seed[seed] for seed in sorted(by_seed)]
        row = {
            "objective of 2016": PIPELINE_WORDS[name],
            "distinct windows an update": pace_of(group[0]),
            "limit": f"{group[0].config['grad_clip']:g}",
            "seeds": str(len(group)),
        }
        for update in (100, 200, 400, 500, 600):
            row[f"at {update}"] = seed_by_seed([curve_of(run)[update] for run in group], 1)
        rows.append(row)
    return markdown(rows)


def pace_of(run):
    last = log_of(run)[-1]
    return f"{last['distinct_windows'] / last['update']:g}"


PIPELINE_WORDS = {
    "vrnn": "VRNN",
    "vae": "VAE_5",
    "iwae": "IWAE_5",
    "iwae_limit_640": "IWAE_5 limited to 640",
    "iwae_limit_640_later": "IWAE_5 limited to 640 from 1,001 on",
    "iwae_early_steps": "IWAE_5 limited to 1, and to 25 from 101 on",
    "iwae_lr_1e-3": "IWAE_5 at a learning rate of 1e-3",
    "vrnn_lr_1e-3": "VRNN at a learning rate of 1e-3",
    "iwae_lr_raised": "IWAE_5 at 1e-3 in updates 101 to 300",
    "vrnn_lr_raised": "VRNN at 1e-3 in updates 101 to 300",
    "vrnn_limit_25": "VRNN limited to 25",
    "vrnn_long_steps": "VRNN limited to 25.6, and to 640 from 1,001 on",
    "vrnn_early_steps": "VRNN limited to 25.6, and to 640 from 101 on",
    "iwae_long_steps": "IWAE_5 limited to 1, and to 25 from 1,001 on",
    "iwae_ours": "IWAE_5 with our limit, order, states and weights",
    "iwae_ours_limit_25": "with 2016's limit",
    "iwae_ours_in_rows": "with 2016's rows and states",
    "iwae_ours_favoured_worst": "with 2016's sign",
    "iwae_ours_weights": "with 2016's weights",
    "iwae_ours_windows_128": "with 128 windows an update",
    "vae_ours": "VAE_5 with our limit, order and states, without replays",
    "vae_ours_limit_3200": "with 2016's limit",
    "vae_ours_in_rows": "with 2016's rows and states",
    "vae_ours_replays_5": "with five replays",
    "vae_limit_640": "VAE_5 limited to 640",
    "vrnn_excerpts": "VRNN with rows in excerpts",
    "vae_once": "VAE_5 without replays",
    "vae_by_stream": "VAE_5 with states of the window before",
    "vae_excerpts": "VAE_5 with rows in excerpts",
    "iwae_by_stream": "IWAE_5 with states of its own speech",
    "iwae_excerpts": "IWAE_5 with rows in excerpts and states of its own speech",
    "iwae_favoured_best": "IWAE_5 with the right sign",
    "iwae_correct_weights": "IWAE_5 with correct weights, limited to 640",
    "vrnn_rows_2": "VRNN with 2 rows",
    "vrnn_rows_25": "VRNN with 25 rows",
    "vrnn_rows_25_limit_25": "VRNN with 25 rows, limited to 25",
    "vrnn_rows_25_limit_640": "VRNN with 25 rows, limited to 640",
}


def by_variant(runs):
    """{name of the folder without the seed: {seed: run}}."""
    variants = {}
    for run in runs:
        variants.setdefault(run.folder.name.rpartition("-")[0], {})[run.seed] = run
    return variants


def pairs_of_seeds(variants, name, other):
    """(run, run of the other variant) for each seed that both have; variants: of by_variant."""
    seeds = sorted(variants[name].keys() & variants[other].keys())
    return [(variants[name][seed], variants[other][seed]) for seed in seeds]


def above_from_half_way(run, other):
    """By how much a run is above another, mean over the evaluations from half-way on."""
    curve, beside = curve_of(run), curve_of(other)
    later = [update for update in curve if update >= max(curve) / 2]
    return statistics.mean(curve[update] - beside[update] for update in later)


INTO = ("in 2016's VRNN", "in 2016's VAE_5", "in our VAE_5", "in 2016's IWAE_5", "in our IWAE_5")
# What is ours in place of 2016's: (with it, without it) in objectives of 2016, and in ours.
INGREDIENTS = {
    "VRNN's limit, 640": {
        "in 2016's VAE_5": ("vae_limit_640", "vae"),
        "in 2016's IWAE_5": ("iwae_limit_640", "iwae"),
        "in our VAE_5": ("vae_ours", "vae_ours_limit_3200"),
        "in our IWAE_5": ("iwae_ours", "iwae_ours_limit_25"),
    },
    "VRNN's 128 windows an update, for 25": {
        "in 2016's VRNN": ("vrnn", "vrnn_rows_25_limit_640"),
        "in our IWAE_5": ("iwae_ours_windows_128", "iwae_ours"),
    },
    "each window once": {
        "in 2016's VAE_5": ("vae_once", "vae"),
        "in our VAE_5": ("vae_ours", "vae_ours_replays_5"),
    },
    "rows in excerpts": {
        "in 2016's VRNN": ("vrnn_excerpts", "vrnn"),
        "in 2016's VAE_5": ("vae_excerpts", "vae"),
        "in 2016's IWAE_5": ("iwae_excerpts", "iwae"),  # and states of its own speech
        "in our VAE_5": ("vae_ours", "vae_ours_in_rows"),
        "in our IWAE_5": ("iwae_ours", "iwae_ours_in_rows"),
    },
    "states of the window before": {
        "in 2016's VAE_5": ("vae_by_stream", "vae"),
    },
    "states of its own speech": {
        "in 2016's IWAE_5": ("iwae_by_stream", "iwae"),
    },
    "the right sign of the weights": {
        "in 2016's IWAE_5": ("iwae_favoured_best", "iwae"),
        "in our IWAE_5": ("iwae_ours", "iwae_ours_favoured_worst"),
    },
    "correct weights, limited to 640": {
        "in 2016's IWAE_5": ("iwae_correct_weights", "iwae_limit_640"),
        "in our IWAE_5": ("iwae_ours", "iwae_ours_weights"),
    },
}


def ingredients():
    """What each ingredient of ours gains in the place of 2016's: means from half-way on."""
    groups = ("pipeline_of_2016", "pipeline_exchanged", "pipeline_from_ours")
    variants = by_variant(runs_of(*groups))
    rows = []
    for words, exchanged in INGREDIENTS.items():
        row = {"nats/frame gained by": words}
        for heading in INTO:
            row[heading] = ""
            if heading in exchanged:
                pairs = pairs_of_seeds(variants, *exchanged[heading])
                gains = [above_from_half_way(run, other) for run, other in pairs]
                row[heading] = interval_or_values(gains, 1)
        rows.append(row)
    return markdown(rows)


def pipeline_contrasts():
    """Contrasts 1 to 7, 10, 16, 17, 19, 23 to 25, 29, 31 and 35, seed by seed."""
    return contrasts(
        runs_of("pipeline_of_2016", "pipeline_exchanged"),
        ("1", "vae", 600, "vrnn", 600),
        ("1", "iwae", 600, "vrnn", 600),
        ("2", "iwae_limit_640", 600, "iwae", 600),
        ("3", "vrnn_rows_25", 600, "vrnn", 600),
        ("4", "iwae_limit_640", 600, "vrnn_rows_25", 600),
        ("5", "vae", 500, "vrnn", 100),
        ("5", "iwae", 500, "vrnn", 100),
        ("6", "vrnn_rows_25_limit_640", 600, "vrnn", 600),
        ("7", "iwae_limit_640", 600, "vrnn_rows_25_limit_640", 600),
        ("10", "iwae_correct_weights", 600, "iwae_limit_640", 600),
        ("16", "vae_once", 600, "vae", 600),
        ("16", "vae_by_stream", 600, "vae", 600),
        ("16", "vae_excerpts", 600, "vae", 600),
        ("16", "iwae_by_stream", 600, "iwae", 600),
        ("16", "iwae_excerpts", 600, "iwae", 600),
        ("17", "iwae_favoured_best", 600, "iwae", 600),
        ("19", "vae_limit_640", 600, "vrnn", 600),
        ("23", "iwae_early_steps", 600, "iwae", 600),
        ("23", "iwae_early_steps", 600, "iwae_limit_640", 600),
        ("24", "vrnn_early_steps", 600, "vrnn", 600),
        ("25", "iwae_lr_1e-3", 600, "iwae", 600),
        ("25", "vrnn_lr_1e-3", 600, "vrnn", 600),
        ("29", "iwae_lr_raised", 600, "iwae", 600),
        ("29", "vrnn_lr_raised", 600, "vrnn", 600),
        ("31", "vrnn_limit_25", 600, "vrnn", 600),
        ("31", "iwae", 600, "vrnn_limit_25", 600),
        ("35", "vrnn_rows_25_limit_25", 600, "vrnn_limit_25", 600),
        ("35", "iwae", 600, "vrnn_rows_25_limit_25", 600),
    )


def order():
    """Contrast 18, and the same of VAE_5 and IWAE_5: the gain by excerpts while training."""
    variants = by_variant(runs_of("pipeline_of_2016", "pipeline_exchanged"))
    rows = []
    for name in ("vrnn", "vae", "iwae"):
        row = {"gained by rows in excerpts, nats/frame": PIPELINE_WORDS[name]}
        for update in (50, 100, 150, 200, 300, 600):
            gains = []
            for run, other in pairs_of_seeds(variants, f"{name}_excerpts", name):
                gains.append(curve_of(run)[update] - curve_of(other)[update])
            row[f"at {update}"] = seed_by_seed(gains, 1)
        rows.append(row)
    return markdown(rows)


def longer():
    """Contrasts 13 to 15, 20, 22, 30, 32 and 34: means over a span of updates, seed by seed."""
    variants = by_variant(runs_of("copy_of_2016", "pipeline_to_2000"))
    names = (
        "vrnn",
        "vrnn_limit_25",
        "vrnn_long_steps",
        "vae",
        "vae_limit_640",
        "iwae",
        "iwae_limit_640",
        "iwae_limit_640_later",
        "iwae_long_steps",
    )
    pairs = {
        "13: IWAE_5 limited to 640, above IWAE_5": ("iwae_limit_640", "iwae"),
        "14: IWAE_5 above VRNN": ("iwae", "vrnn"),
        "15: VAE_5 above VRNN": ("vae", "vrnn"),
        "20: IWAE_5 limited to 640 from 1,001 on, above IWAE_5": ("iwae_limit_640_later", "iwae"),
        "22: IWAE_5 limited to 1, then to 25, above IWAE_5": ("iwae_long_steps", "iwae"),
        "30: VAE_5 limited to 640, above VRNN": ("vae_limit_640", "vrnn"),
        "32: VRNN limited to 25.6, then to 640, above VRNN": ("vrnn_long_steps", "vrnn"),
        "32: the same, above VRNN limited to 25": ("vrnn_long_steps", "vrnn_limit_25"),
        "34: VRNN limited to 25, above VRNN": ("vrnn_limit_25", "vrnn"),
        "34: IWAE_5 above VRNN limited to 25": ("iwae", "vrnn_limit_25"),
    }
    rows = {name: {"nats/frame": PIPELINE_WORDS[name]} for name in names}
    rows |= {words: {"nats/frame": words} for words in pairs}
    for first, last in (*itertools.pairwise((100, 200, 400, 600, 1000, 1500, 2000)), (1999, 2000)):
        heading = f"updates {first + 1:,} to {last:,}" if last > first + 1 else f"update {last:,}"
        for name in names:
            means = [mean_within(run, first, last) for run in variants[name].values()]
            rows[name][heading] = seed_by_seed(means, 1)
        for words, (name, other_name) in pairs.items():
            differences = []
            for run, other in pairs_of_seeds(variants, name, other_name):
                differences.append(mean_within(run, first, last) - mean_within(other, first, last))
            rows[words][heading] = seed_by_seed(differences, 1)
    return markdown(list(rows.values()))


def mean_within(run, first, last):
    """Of the evaluations after update `first`, up to update `last`."""
    curve = curve_of(run)
    return statistics.mean(curve[update] for update in curve if first < update <= last)


def from_ours():
    """Contrasts 21, 36 and 37: one ingredient of 2016 at a time, put into an objective with ours."""
    ours = ("iwae_ours", 600)
    vae_ours = ("vae_ours", 600)
    return contrasts(
        runs_of("pipeline_from_ours"),
        ("21", "iwae_ours_limit_25", 600, *ours),
        ("21", "iwae_ours_in_rows", 600, *ours),
        ("21", "iwae_ours_favoured_worst", 600, *ours),
        ("21", "iwae_ours_weights", 600, *ours),
        ("36", "iwae_ours_windows_128", 600, *ours),
        ("37", "vae_ours_limit_3200", 600, *vae_ours),
        ("37", "vae_ours_in_rows", 600, *vae_ours),
        ("37", "vae_ours_replays_5", 600, *vae_ours),
    )


# (group, variant) of runs that were trained again, with the same settings and seed.
REPEATED = (
    (("pipeline_of_2016", "vrnn"), ("copy_of_2016", "vrnn")),
    (("pipeline_exchanged", "iwae_limit_640"), ("pipeline_to_2000", "iwae_limit_640")),
    (("pipeline_exchanged", "iwae_correct_weights"), ("pipeline_from_ours", "iwae_ours_in_rows")),
)


def repeats():
    """By how much runs differ that were trained twice, with the same settings and seed: noise."""
    rows = []
    for once, again in REPEATED:
        variants = {each: by_variant(runs_of(each[0]))[each[1]] for each in (once, again)}
        for run, other in pairs_of_seeds(variants, once, again):
            curve, beside = curve_of(run), curve_of(other)
            apart = [curve[update] - beside[update] for update in curve if 300 <= update <= 600]
            rows.append(
                {
                    "trained twice": f"{PIPELINE_WORDS[once[1]]}, seed {run.seed}",
                    "furthest apart at one evaluation": f"{max(map(abs, apart)):.1f}",
                    "mean from update 300 to 600": f"{statistics.mean(apart):.1f}",
                }
            )
    return markdown(rows)


def pipeline_clipped():
    """The share of updates whose gradient was limited, mean over seeds."""
    variants = by_variant(runs_of("pipeline_of_2016", "pipeline_exchanged"))
    rows = []
    for name in ("vrnn", "vae", "iwae", "iwae_limit_640"):
        row = {"objective": PIPELINE_WORDS[name]}
        for first, last in itertools.pairwise((0, 50, 100, 150, 600)):
            shares = [share_limited(run, first, last) for run in variants[name].values()]
            row[f"updates {first + 1} to {last}"] = f"{100 * statistics.mean(shares):.0f} %"
        rows.append(row)
    return markdown(rows)


def share_limited(run, first, last):
    """Of the updates after update `first`, up to update `last`."""
    clipped = {line["update"]: line["clipped"] for line in log_of(run)}
    return (clipped[last] - clipped.get(first, 0)) / (last - first)


def pipeline_size():
    """Contrast 33: 2016's pipeline at the published size, one seed."""
    rows = []
    for name, by_seed in by_variant(runs_of("pipeline_size")).items():
        run = by_seed[0]
        row = {"published size": PIPELINE_WORDS[name]}
        row |= monitored_at(log_of(run), (50, 100, 150, 200))
        for first, last in ((0, 50), (50, 200)):
            share = share_limited(run, first, last)
            row[f"limited in updates {first + 1} to {last}"] = f"{100 * share:.0f} %"
        rows.append(row)
    return markdown(rows)


def fresh_contrasts():
    """Contrasts 8, at equal updates and at about equal distinct windows, and 9, seed by seed."""
    return contrasts(
        runs_of("pipeline_fresh"),
        ("8", "vae", 900, "vrnn", 900),
        ("8", "iwae", 900, "vrnn", 900),
        ("8", "vae", 900, "vrnn", 200),
        ("8", "iwae", 900, "vrnn", 200),
        ("9", "vrnn_rows_2", 900, "vrnn", 900),
        ("9", "iwae", 900, "vrnn_rows_2", 900),
    )


def chapter_contrasts():
    """Contrast 11, seed by seed."""
    return contrasts(
        runs_of("pipeline_chapters"),
        ("11", "vae", 4500, "vrnn", 4500),
        ("11", "iwae", 4500, "vrnn", 4500),
    )


def moving_together():
    """Contrast 12: do curves of different seeds change alike, once the first file is heard?"""
    runs = runs_of("pipeline_chapters")
    rows = {}
    for one, other in itertools.combinations(runs, 2):
        if one.seed != other.seed:
            pair = sorted(PIPELINE_WORDS[run.folder.name.partition("-")[0]] for run in (one, other))
            row = rows.setdefault(tuple(pair), ([], []))
            for correlations, apart in zip(row, (150, 300)):
                changes = [changes_of(run, apart) for run in (one, other)]
                correlations.append(np.corrcoef(*changes)[0, 1])
    return markdown(
        [
            {
                "changes of": one,
                "and of": other,
                "over 150 updates": seed_by_seed(over_150),
                "over 300 updates": seed_by_seed(over_300),
            }
            for (one, other), (over_150, over_300) in sorted(rows.items())
        ]
    )


def changes_of(run, apart):
    """From one evaluation to the next, where these are so many updates apart, from 900 on."""
    updates, bounds = run.curve.T
    return np.diff(bounds[(updates >= 900) & (updates % apart == 0)])


def contrasts(all_runs, *pairs):
    """pairs: (number, one, at its update, above the other, at its update)."""
    runs = by_variant(all_runs)
    rows = []
    p_values = {}
    for number, one, at_one, other, at_other in pairs:
        found = []
        means = []
        for run, beside in pairs_of_seeds(runs, one, other):
            found.append(curve_of(run)[at_one] - curve_of(beside)[at_other])
            if at_one == at_other:
                means.append(above_from_half_way(run, beside))
        if len(means) >= 3:
            p_values[len(rows)] = p_value(means)
        rows.append(
            {
                "contrast": number,
                "of": f"{PIPELINE_WORDS[one]}, update {at_one}",
                "above": f"{PIPELINE_WORDS[other]}, update {at_other}",
                "nats/frame, seed by seed": seed_by_seed(found, 1),
                "mean from half-way on": seed_by_seed(means, 1),
                "by Holm": "",
            }
        )
    for row, stands in holm(p_values).items():
        rows[row]["by Holm"] = "stands" if stands else "undecided"
    return markdown(rows)


def p_value(differences):
    """Of Student's t-test that their mean is 0, two-sided."""
    freedom = len(differences) - 1
    error = statistics.stdev(differences) / len(differences) ** 0.5
    t = abs(statistics.mean(differences)) / error
    # With t = sqrt(freedom) tan(angle) its density is a power of the cosine.
    angles = (np.arange(100_000) + 0.5) / 100_000 * math.pi / 2
    density = np.cos(angles) ** (freedom - 1)
    return density[angles > math.atan(t / freedom**0.5)].sum() / density.sum()


def holm(p_values):
    """{name: whether it is significant at 5 %, all of them together} (Holm 1979)."""
    stands = True
    found = {}
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        stands = stands and p_values[name] * (len(p_values) - rank) < 0.05
        found[name] = stands
    return found


WORDS = {
    "vrnn": "VRNN",
    "vae_5": "VAE_5",
    "iwae_5": "IWAE_5",
    "iwae_5_resample": "IWAE_5 resampled",
    "iwae_5_resample_from_prior": "IWAE_5 resampled, z of the prior",
    "lstm_40": "LSTM, 40 components",
    "lstm": "LSTM, 8 components",
}
LONG_WORDS = {
    "vrnn_long": "VRNN, 12,500 updates",
    "vae_5_long": "VAE_5, 12,500 updates",
    "iwae_5_long": "IWAE_5, 12,500 updates",
}


def latent_variables():
    """The adaptive likelihood with and without latent variables.

    The last column is of evaluations whose z comes from the prior.
    """
    rows = []
    # The active ones are of an earlier commit.
    for suffix, words in (("", ""), ("_active", ", all latents active at the start")):
        from_prior = {run.folder.name: run.bounds["elbo"] for run in runs_of("from_prior" + suffix)}
        for label, group in by_label(runs_of("latent_variables" + suffix)).items():
            names = [run.folder.name for run in group]
            rows.append(
                {
                    "objective": label + words,
                    "seeds": str(len(group)),
                    "`elbo`": seed_by_seed([run.bounds["elbo"] for run in group]),
                    "particle filter": seed_by_seed(filtered(group)),
                    "`kl`": seed_by_seed([run.kl for run in group]),
                    "bits per sample": seed_by_seed(bits_by_filter(group), 3),
                    "`elbo`, z of the prior": seed_by_seed(
                        [from_prior[name] for name in names if name in from_prior]
                    ),
                }
            )
    return markdown(rows)


def resampled():
    """What the resampled IWAE_5 gains on the LSTM, and what more components gain."""
    variants = by_variant(runs_of("latent_variables"))
    from_prior = by_variant(runs_of("from_prior"))["iwae_5_resample"]
    variants["iwae_5_resample_from_prior"] = from_prior
    rows = []
    for name, words in WORDS.items():
        if name == "lstm":
            continue
        differences = []
        for seed, run in variants[name].items():
            with_z, without_z = filtered([run, variants["lstm"][seed]])
            differences.append(with_z - without_z)
        rows.append(
            {
                "nats/frame above the LSTM with 8 components": words,
                "seed by seed": seed_by_seed(differences),
                "mean": mean_and_interval(differences) if len(differences) > 1 else "",
            }
        )
    return markdown(rows)


def filters(*files):
    """Means over windows by filters of more and more particles.

    In brackets above the first run of the file, with the 95 % interval over windows.
    """
    words = WORDS | LONG_WORDS
    rows = []
    for file in files:
        measured = json_of(file)
        runs = measured["runs"]
        first = next(iter(runs.values()))
        for name, by_particles in runs.items():
            variant, _, seed = name.rpartition("-")
            row = {f"nats/frame, {measured['windows']} windows": f"{words[variant]}, seed {seed}"}
            for k, nats in by_particles.items():
                cell = f"{statistics.mean(nats):.2f}"
                if nats is not first[k]:
                    differences = [one - other for one, other in zip(nats, first[k])]
                    cell += f" ({mean_and_interval(differences)})"
                row[f"{int(k):,} particles"] = cell
            rows.append(row)
    return markdown(rows)


def interval_or_values(values, digits=2):
    """Two seeds have an interval, but it says next to nothing."""
    return mean_and_interval(values, digits) if len(values) >= 3 else seed_by_seed(values, digits)


def seed_by_seed(values, digits=2):
    """Of two or three seeds an interval says little."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


# ---- particles and sizes -------------------------------------------------------------------------


def weights():
    """Of particles.json: what becomes of the weights as windows grow."""
    particles = json_of("particles.json")
    spread = {"frames": "standard deviation of log w, nats a window"}
    few = {"frames": "effective sample size of 5"}
    many = {"frames": "effective sample size of 100"}
    iwae = {"frames": "iwae_100 - elbo, nats/frame"}
    smc = {"frames": "smc_100 - elbo, nats/frame"}
    inverted = {"frames": "effective sample size of 5 by 2016's weights"}
    worst = {"frames": "weight of the worst of 5 by 2016's weights"}
    for measured in particles["weights"]:
        frames = str(measured["frames"])
        if measured["k"] == 5:
            spread[frames] = f"{measured['log_w_std']:.2f}"
            few[frames] = f"{measured['ess_iwae']:.2f}"
        if measured["k"] == 100:
            many[frames] = f"{measured['ess_iwae']:.2f}"
            iwae[frames] = f"{measured['iwae'] - measured['elbo']:.2f}"
            smc[frames] = f"{measured['smc'] - measured['elbo']:.2f}"
    for measured in particles["published"]:
        frames = str(measured["frames"])
        inverted[frames] = f"{measured['ess_published']:.2f}"
        worst[frames] = f"{measured['worst_published']:.2f}"
    return markdown([spread, few, many, iwae, smc, inverted, worst])


def signal_to_noise():
    """Of particles.json: the gradient of the posterior's parameters, in brackets of all others."""
    rows = {}
    for measured in json_of("particles.json")["gradients"]:
        k = measured["k"]
        if k > 1 and measured["frames"] == 40:
            name = measured["objective"].replace(f"_{k}", "_K")
            row = rows.setdefault(name, {"gradient of": name})
            row[f"K = {k}"] = f"{measured['snr_posterior']:.1f} ({measured['snr_others']:.1f})"
    return markdown(list(rows.values()))


LSTMS = ("likelihood", "likelihood_larger")


def groups_by_label(*groups):
    """(label, runs) of the tested runs of these groups, each group labelled alone."""
    for group in groups:
        yield from by_label([run for run in runs_of(group) if run.bounds]).items()


def lstms():
    """Those with the adaptive likelihood, above the one of default sizes."""
    runs = runs_of(*LSTMS)
    return plot_recon.table(runs, runs[:1])


def effective_sizes():
    """Of the particle filter, and of the importance weights of whole windows, on the test split."""
    rows = []
    for label, group in groups_by_label("objectives", "variants"):
        in_filter, of_windows, spread = [], [], []
        for evaluation in map(evaluation_of, group):
            bounds = evaluation["bounds"]
            in_filter.append(bounds["ess_smc_100"]["mean"])
            of_windows.append(bounds["ess_iwae_100"]["mean"])
            spread.append(bounds["log_w_std"]["nats_per_frame"] * evaluation["frames"])
        rows.append(
            {
                "objective": label,
                "of 100 in the filter": mean_and_interval(in_filter),
                "of 100 over a window": mean_and_interval(of_windows),
                "log w, standard deviation": mean_and_interval(spread),
            }
        )
    return markdown(rows)


def whole_recordings():
    """smc_100 of 8 recordings from their beginning to their end, and FLAC on the same."""
    rows = []
    groups = groups_by_label("objectives")
    for label, group in itertools.chain(groups, by_label(runs_of(*LSTMS)).items()):
        found = [evaluation_of(run)["whole_recordings"] for run in group]
        rows.append(row_of_recordings(label, [bounds["smc_100"] for bounds in found]))
    for name in ("flac", "adaptive_filter"):
        rows.append(row_of_recordings(plot_recon.YARDSTICKS[name], [found[0][name]]))
    return markdown(rows)


def row_of_recordings(label, found):
    nats = [one["nats_per_frame"] for one in found]
    bits = [one["bits_per_sample"] for one in found]
    return {
        "objective": label,
        "nats/frame": mean_and_interval(nats),
        "bits per sample": mean_and_interval(bits, 3),
    }


def again():
    """VRNNs of the same seeds, trained twice."""
    first_time = by_variant(runs_of("our_training"))["vrnn"]
    rows = []
    for run in runs_of("our_training_again"):
        row = {"VRNN, once and again": f"seed {run.seed}"}
        for bound in BOUNDS:
            both = first_time[run.seed].bounds[bound], run.bounds[bound]
            row[f"`{bound}`"] = seed_by_seed(both)
        rows.append(row)
    return markdown(rows)


def size():
    """The published size beside the small one of our training, to the end of the schedule."""
    small = [run for run in runs_of("our_training") if run.folder.name == "vrnn-0"]
    rows = []
    for run in runs_of("size") + small:
        log = log_of(run)
        row = of_size(run)
        row["sequences"] = str(run.config["batch_size"])
        row |= monitored_at(log, (500, 1000, 2000, 3500, 5000))
        row["KL at the end"] = last_kl(log)
        row["test, `iwae_5`"] = f"{run.bounds['iwae_5']:.2f}"
        row["hours"] = f"{log[-1]['seconds'] / 3600:.2f}"
        rows.append(row)
    return markdown(rows)


def published_size():
    """One thing at a time between the small and the published size."""
    rows = []
    for run in runs_of("published_size"):
        log = log_of(run)
        row = of_size(run) | monitored_at(log, (250, 500, 750, 1000))
        row["KL at the end"] = last_kl(log)
        row["test, filter of 5"] = f"{filtered([run])[0]:.2f}"
        rows.append(row)
    return markdown(rows)


def of_size(run):
    """Its width, its latents, how many of them are active at the start, and its learning rate."""
    # Two ways to begin are of earlier commits, which are in their logs.
    active = str(min(run.config["z_dim"], common.FrameLikelihood.active))
    if "all_active" in run.folder.name:
        active = str(run.config["z_dim"])
    if "weakly" in run.folder.name:
        active += ", heard weakly"
    return {
        "LSTM units": f"{run.config['rnn_dim']:,}",
        "latents": str(run.config["z_dim"]),
        "active at the start": active,
        "learning rate": f"{run.config['lr']:g}",
    }


def benchmarks(part, headings, file="benchmark.json"):
    """A part of the benchmark: the columns that have headings."""
    rows = []
    for measured in json_of(file)["tables"][part]:
        cells = [benchmark.as_text(measured[column]) for column in headings]
        rows.append(dict(zip(headings.values(), cells)))
    return markdown(rows)


# ---- all tables ----------------------------------------------------------------------------------

UPDATES = {
    "objective": "objective",
    "batch": "sequences",
    "rows": "rows",
    "products": "products",
    "seconds": "seconds an update",
    "gflops": "GFLOP/s",
    "of_products": "of the product rate",
    "ratio": "plain / ours",
}
WITH_FLAG = {
    "objective": "objective",
    "flag": "flag",
    "seconds": "seconds with",
    "without_seconds": "without",
    "ratio": "ratio",
    "least": "least",
    "most": "most",
}
EVALUATION = {
    "estimate": "estimate",
    "particles": "particles",
    "windows_per_second": "windows a second",
    "gflops": "GFLOP/s",
    "of_products": "of the product rate",
}
GROWTH = {"size": "what grows", "value": "to", "seconds": "seconds an update"}
BOTH_ABOVE = (("VAE_5", "VRNN"), ("IWAE_5", "VRNN"))
TABLES = {
    "updates": partial(benchmarks, "updates", UPDATES),
    "updates_small": partial(benchmarks, "updates_small", UPDATES),
    "with_flag": partial(benchmarks, "variants", WITH_FLAG),
    "with_flag_small": partial(benchmarks, "variants_small", WITH_FLAG),
    "with_likelihood": partial(benchmarks, "likelihood", WITH_FLAG, LATER),
    "with_likelihood_small": partial(benchmarks, "likelihood_small", WITH_FLAG, LATER),
    "evaluation": partial(benchmarks, "evaluation_small", EVALUATION, LATER),
    "growth": partial(benchmarks, "growth_small", GROWTH),
    "front": front_table,
    "limits": partial(
        by_limit, (5, 40, 160, 640, 2560, 0), ("VRNN", "VAE_5", "IWAE_5"), BOTH_ABOVE
    ),
    "norms": norms_and_clips,
    "bounds": by_bound,
    "on_valid": partial(on_valid, (5, 40, 160, 2560, 0)),
    "regime": regime,
    "size": size,
    "weights": weights,
    "effective_sizes": effective_sizes,
    "signal_to_noise": signal_to_noise,
    "whole_recordings": whole_recordings,
    "pipeline": pipeline,
    "pipeline_contrasts": pipeline_contrasts,
    "pipeline_clipped": pipeline_clipped,
    "pipeline_size": pipeline_size,
    "from_ours": from_ours,
    "ingredients": ingredients,
    "repeats": repeats,
    "order": order,
    "longer": longer,
    "fresh_contrasts": fresh_contrasts,
    "chapter_contrasts": chapter_contrasts,
    "moving_together": moving_together,
    "published_size": published_size,
    "latent_variables": latent_variables,
    "resampled": resampled,
    "filters": partial(filters, "filters_adaptive.json"),
    "filters_published": partial(
        filters,
        "filters_published_0.json",
        "filters_published_3.json",
        "filters_published_long.json",
    ),
    "likelihood_z": partial(full_table, "likelihood_z"),
    "our_training": partial(full_table, "our_training"),
    "our_training_long": partial(full_table, "our_training_long"),
    "at_default_limit": at_default_limit,
    "without_z": partial(full_table, "without_z"),
    "objectives": partial(full_table, "objectives"),
    "variants": partial(full_table, "objectives", "variants"),
    "likelihood": lstms,
    "reader": partial(full_table, "reader"),
    "latents": partial(full_table, "objectives", "latents"),
    "adam": partial(full_table, "objectives", "adam"),
    "again": again,
    "repeat": partial(full_table, "objectives", "repeat"),
    "bf16": partial(full_table, "bf16"),
}


# ---- numbers in the text -------------------------------------------------------------------------


def numbers_in(text):
    return {number.replace(",", "") for number in NUMBER.findall(text)}


def problems(write=False):
    """What is not as the logs have it, a sentence each. With write the tables are made so."""
    found = []
    known = set(OTHERS)
    texts = {}
    for name in FILES:
        text = (ROOT / name).read_text()
        for begin, which, body, end in BLOCK.findall(text):
            lines = TABLES[which]()
            if lines:
                lines += "\n"
            known |= numbers_in(lines)
            if lines != body and write:
                text = text.replace(begin + body + end, begin + lines + end)
            elif lines != body:
                found.append(
                    f"{name}: table {which} is not what the logs say; write it anew with --write"
                )
        if write:
            (ROOT / name).write_text(text)
        texts[name] = text
    used = set()
    for name, text in texts.items():
        in_prose = numbers_in(CODE.sub("", BLOCK.sub("", text)))
        used |= in_prose
        for number in sorted(in_prose - known):
            found.append(f"{name}: {number} is in no table and not in OTHERS")
    for number in sorted(set(OTHERS) - used):
        found.append(f"OTHERS: {number} is nowhere in the text")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the tables anew")
    found = problems(parser.parse_args().write)
    print("\n".join(found) or "every table and every number is in the logs")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
