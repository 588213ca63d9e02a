"""Hold the README files against the committed logs: every table, and every measured number in the text.

    python tests/experiments/check_readme.py            says what is not in the logs; exit status 1 if anything is not
    python tests/experiments/check_readme.py --write    writes the tables anew

A table stands between <!-- table: NAME --> and <!-- end -->. A number with a decimal point outside of code must be a
cell of one of these tables, or stand in OTHERS with where it comes from.
"""

import argparse
import functools
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = str(ROOT), str(ROOT / "tests/tools")

import benchmark  # noqa: E402
import numpy as np  # noqa: E402

import plot_recon  # noqa: E402
from plot_recon import mean_and_interval  # noqa: E402

RESULTS = ROOT / "data/results"
FILES = ("README.md", "data/README.md", "data/results/README.md", "tests/README.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CODE = re.compile(
    r"```.*?```|^ {4}.*?$|`[^`\n]*`|https?://[^\s)]*|arXiv \d+\.\d+", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"(?<![\w./])\d[\d,]*\.\d+(?!\w|\.\d)")
SETTINGS = "a setting, or a default in a script"
BY_HAND = "measured by hand, as the text beside it says"
OTHERS = {
    "0.003": SETTINGS,
    "0.08": SETTINGS,
    "0.1": SETTINGS,
    "0.2": SETTINGS,
    "0.3": SETTINGS,
    "0.5": SETTINGS,
    "0.63": "millions of parameters, printed by every run",
    "1.29": "the same of the runs in hostile and bf16",
    "2.54": "the same of VRNN AR-32",
    "15.89": "the same at published size",
    "1.9365": SETTINGS,
    "85.56": "minutes of recordings, printed by prepare_blizzard.py",
    "76.87": "of train",
    "30.13": "minutes of the single reader's train split, printed by prepare_blizzard.py",
    "16.3": "billions of samples in 283 hours",
    "3.10": "a version of Python",
    "3.14": "a version of Python",
    "4.0": "a licence",
    "0.995": BY_HAND,
    "1.02": BY_HAND,
    "0.98": BY_HAND,
    "1.06": BY_HAND,
}
FRONT = (("objectives",), ("objectives", "variants"), ("likelihood",), ("size",))
MAIN = "VRNN", "IWAE_5", "IWAE_5 as published"
CONTRASTS = ("IWAE_5 as published", "VRNN"), ("IWAE_5 as published", "IWAE_5"), ("IWAE_5", "VRNN")
CORRECTED = [
    f"IWAE_5 as published but for {correction}"
    for correction in ("sign", "time", "gradient", "batch")
]
LIMITED = ("VRNN", "VAE_5", "VAE_5 as published", "IWAE_5", "IWAE_5 as published", *CORRECTED)
ALIKE = (
    ("VAE_5", "VRNN"),
    ("IWAE_5", "VRNN"),
    *((name, "IWAE_5 as published") for name in (*CORRECTED[:3], "IWAE_5")),
)
SHOWN = [
    name + likelihood
    for likelihood in ("", " AR-16", " AR-32")
    for name in (
        "VRNN",
        "VAE_5",
        "VAE_5 as published",
        "IWAE_5",
        "IWAE_5 as published",
        "IWAE_5 resampled",
        "LSTM",
    )
]


# ---- tables ----


@functools.cache
def read(*groups):
    """The runs of each group of results, and those that they are compared with."""
    rows = plot_recon.read_folders([RESULTS / group for group in groups])
    return list(zip(rows, plot_recon.references(rows)))


def full_table(*groups):
    """The rows of plot_recon.py for the last of the groups, as they are when it draws all of them."""
    return plot_recon.table(*read(*groups)[-1])


def markdown(rows):
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def front_table():
    """Of the runs behind the answer: what the front page shows."""
    rows, yardsticks = [], []
    for groups in FRONT:
        runs, reference = read(*groups)[-1]
        is_large = groups == ("size",)
        for label in dict.fromkeys(run["label"] for run in runs):
            group = [run for run in runs if run["label"] == label]
            if group[0]["name"] in SHOWN:
                nats = [run["test"]["smc_100"] for run in group]
                differences = [] if is_large else plot_recon.paired(group, reference, "smc_100")
                rows.append(
                    [
                        label + ", published size" * is_large,
                        str(len(group)),
                        mean_and_interval(nats),
                        mean_and_interval(differences),
                        mean_and_interval(
                            [plot_recon.bits_of(run, run["test"]["smc_100"]) for run in group], 3
                        ),
                        minutes(group[0]["config"]),
                    ]
                )
        for name, nats in runs[0]["test"]["yardsticks"].items():
            yardsticks.append(
                [
                    plot_recon.YARDSTICKS[name],
                    "",
                    f"{nats:.2f}",
                    "",
                    f"{plot_recon.bits_of(runs[0], nats):.3f}",
                    "",
                ]
            )
    headings = (
        "objective",
        "runs",
        "nats/frame (`smc_100`)",
        "difference from VRNN",
        "bits per sample",
        "minutes",
    )
    return markdown(
        [
            dict(zip(headings, row))
            for i, row in enumerate(rows + yardsticks)
            if row not in (rows + yardsticks)[:i]
        ]
    )


def minutes(config):
    """Of one core: the updates of a run, at the benchmark's median seconds; none where it has not this size."""
    if (
        config["rnn_dim"] != benchmark.SMALL["rnn_dim"]
        or config["z_dim"] != benchmark.SMALL["z_dim"]
    ):
        return ""
    measured = json.loads((RESULTS / "benchmark.json").read_text())["tables"]
    is_single = (
        config["script"] == "vrnn_gauss"
        or config.get("as_published")
        and config["script"] != "vrnn_gauss_iwae"
    )
    objective = (
        "VRNN" if is_single else "IWAE_5" if config["script"] == "vrnn_gauss_iwae" else "VAE_5"
    )
    seconds = next(
        row["seconds"]
        for row in measured["updates_small"]
        if (row["objective"], row["batch"]) == (objective, config["batch_size"])
    )
    for row in measured["variants_small"]:
        is_on = (
            config["ar_order"] if "ar_order" in row["flag"] else config.get(row["flag"].strip("-"))
        )
        if row["objective"] == ("VRNN" if is_single else "IWAE_5") and is_on:
            seconds *= row["ratio"]
    return f"{config['max_updates'] * seconds / 60:.1f}"


def in_limit(limit):
    return plot_recon.in_words("grad_clip", dict(grad_clip=limit))


def limited(name, limit):
    """The runs of 5,000 updates of an objective under a limit on the gradient of the mean over sequences."""
    runs = [
        run
        for group, _ in read("objectives", "clip", "variants", "likelihood", "ar_settings")
        for run in group
    ]
    return [
        run
        for run in runs
        if run["test"]
        and run["config"]["max_updates"] == 5000
        and run["name"] == name
        and run["config"]["mirrored_init"]
        and run["config"]["x_noise"]
        and plot_recon.in_words("grad_clip", run["config"]) == in_limit(limit)
    ]


def difference_by_limit(limits, names, contrasts=()):
    """Rows: objectives, and contrasts of two. Columns: limits. Cells: smc_100 above that of VRNN limited to 640, or of
    the other objective under the same limit, in runs of the same seed, with the 95 % interval over the seeds, and in
    brackets their number."""

    def row_of(heading, name, other, other_limit=None):
        return {
            "nats/frame": heading,
            **{
                in_limit(limit): above(name, limit, other, other_limit or limit) for limit in limits
            },
        }

    rows = [row_of(name, name, "VRNN", 640) for name in names]
    return markdown(
        rows
        + [row_of(f"{name} above {other}, limited alike", name, other) for name, other in contrasts]
    )


def difference_by_bound():
    """Rows: an objective under two limits, and two objectives under one. Columns: the bounds they are judged by."""
    contrasts = *ALIKE, ("IWAE_5 resampled", "VRNN"), ("IWAE_5 AR-16", "VRNN AR-16")
    rows = [(name, limit, name, 640) for name in MAIN for limit in (5, 2560)]
    rows += [(name, limit, other, limit) for name, other in contrasts for limit in (5, 640, 2560)]
    differences = [
        (
            row,
            {
                f"`{bound}`": above(*row, bound)
                for bound in ("elbo", "iwae_5", "iwae_100", "smc_100")
            },
        )
        for row in rows
    ]
    return markdown(
        [
            {
                "nats/frame": f"{name} {in_limit(limit)} above "
                + (in_limit(other_limit) if name == other else f"{other}, limited alike"),
                **cells,
            }
            for (name, limit, other, other_limit), cells in differences
            if any(cells.values())
        ]
    )


def on_valid(limits):
    """The same of VRNN by what it would be chosen with: iwae_5 on valid after the last update."""

    def ends(limit):
        return {run["seed"]: run["curve"][-1, 1] for run in limited("VRNN", limit)}

    reference = ends(640)
    return markdown(
        [
            {
                "nats/frame": "VRNN, by `iwae_5` on valid",
                **{
                    in_limit(limit): with_runs(
                        [end - reference[seed] for seed, end in ends(limit).items()]
                    )
                    for limit in limits
                },
            }
        ]
    )


def above(name, limit, other, other_limit, bound="smc_100"):
    return with_runs(plot_recon.paired(limited(name, limit), limited(other, other_limit), bound))


def with_runs(differences):
    return f"{mean_and_interval(differences)} ({len(differences)})" if len(differences) else ""


def norms_and_clips():
    """Median norm at the monitored updates of the gradient of the mean over sequences, and the share of updates that
    were clipped, of runs that count them."""
    rows = {}
    for runs, _ in read("objectives", "clip", "regime"):
        for run in runs:
            _, *lines = log_of(run, "objectives", "clip", "regime")
            if "clipped" in lines[-1]:
                config = run["config"]
                of_mean = dict(
                    vrnn_gauss_iwae=1 / config["batch_size"], vrnn_gauss_alt_nll=config["k"]
                )
                is_of_mean = not config.get("as_published") or "batch" in config.get(
                    "corrections", ""
                )
                sequences = f"{config['batch_size']} sequences" + ", 2016's own regime" * (
                    config["x_noise"] == 0
                )
                found = rows.setdefault(
                    (run["name"], plot_recon.in_words("grad_clip", config), sequences), []
                )
                norm = statistics.median(line["grad_norm"] for line in lines)
                norm *= 1 if is_of_mean else of_mean[config["script"]]
                found.append((norm, 100 * lines[-1]["clipped"] / lines[-1]["update"]))
    return markdown(
        [
            {
                "objective": name,
                "limit": limit,
                "batch": sequences,
                "runs": str(len(found)),
                "median norm": f"{statistics.mean(norm for norm, _ in found):.1f}",
                "updates clipped": f"{statistics.mean(share for _, share in found):.1f} %",
            }
            for (name, limit, sequences), found in rows.items()
        ]
    )


def log_of(run, *groups):
    path = next(
        path for group in groups if (path := RESULTS / group / run["folder"] / "log.jsonl").exists()
    )
    return [json.loads(line) for line in path.read_text().splitlines()]


def regime():
    """2016's own settings: what held-out data say at the same updates."""
    rows = []
    ((runs, _),) = read("regime")
    for run in runs:
        _, *lines = log_of(run, "regime")
        at = {line["update"]: line for line in lines}
        rows.append(
            {
                "objective": run["name"],
                "limit": plot_recon.in_words("grad_clip", run["config"]),
                **{
                    f"`iwae_5` at {update:,}": f"{at[update]['valid']['iwae_5']['nats_per_frame']:.2f}"
                    if update in at
                    else ""
                    for update in (250, 500, 750, 1250, 2500)
                },
                "KL": f"{lines[-1]['valid']['kl']['nats_per_frame']:.2f}",
                "updates clipped": f"{100 * lines[-1]['clipped'] / lines[-1]['update']:.1f} %",
            }
        )
    return markdown(rows)


def size():
    """The published size beside the small one: held-out data at the same updates, and the hours that they took."""
    rows = []
    for group, of_group in dict(size=None, objectives="vrnn-0", likelihood="vrnn_ar_16-0").items():
        ((runs, _),) = read(group)
        for run in (run for run in runs if of_group in (None, run["folder"])):
            _, *lines = log_of(run, group)
            at = {line["update"]: line["valid"]["iwae_5"]["nats_per_frame"] for line in lines}
            smc, config = run["test"]["smc_100"], run["config"]
            rows.append(
                {
                    "objective": run["name"],
                    "LSTM units": f"{config['rnn_dim']:,}",
                    "sequences": str(config["batch_size"]),
                    **{
                        f"`iwae_5` at {update:,}": f"{at[update]:.2f}"
                        for update in (500, 1000, 2000, 3500, 5000)
                    },
                    "test `kl`": f"{run['test']['kl']:.2f}",
                    "test `smc_100`": f"{smc:.2f}",
                    "bits per sample": f"{plot_recon.bits_of(run, smc):.3f}",
                    "hours": f"{lines[-1]['seconds'] / 3600:.2f}",
                }
            )
    return markdown(rows)


def weights():
    """Of particles.json: what becomes of the weights as windows grow."""
    particles = json.loads((RESULTS / "particles.json").read_text())
    measured = {(row["frames"], row["k"]): row for row in particles["weights"]}
    what = {
        "standard deviation of log w, nats a window": lambda few, many: few["log_w_std"],
        "effective sample size of 5": lambda few, many: few["ess_iwae"],
        "effective sample size of 100": lambda few, many: many["ess_iwae"],
        "iwae_100 - elbo, nats/frame": lambda few, many: many["iwae"] - many["elbo"],
        "smc_100 - elbo, nats/frame": lambda few, many: many["smc"] - many["elbo"],
    }
    frames = sorted({frames for frames, _ in measured})
    rows = [
        {"frames": name, **{str(t): f"{of(measured[t, 5], measured[t, 100]):.2f}" for t in frames}}
        for name, of in what.items()
    ]
    published = {row["frames"]: row for row in particles["published"]}
    for name, key in {
        "effective sample size of 5, as published": "ess_published",
        "weight of the worst of 5, as published": "worst_published",
    }.items():
        rows.append({"frames": name, **{str(t): f"{published[t][key]:.2f}" for t in frames}})
    return markdown(rows)


def of_labels(*groups):
    """(label, runs, their eval.json) of all runs of these groups, each read alone."""
    for group in groups:
        ((runs, _),) = read(group)
        for label in dict.fromkeys(run["label"] for run in runs if run["test"]):
            of_label = [run for run in runs if run["label"] == label]
            yield (
                label,
                of_label,
                [
                    json.loads((RESULTS / group / run["folder"] / "eval.json").read_text())
                    for run in of_label
                ],
            )


def effective_sizes():
    """Of the particle filter, and of the importance weights of whole windows, on the test split."""
    columns = {
        "of 100 in the filter": ("ess_smc_100", "mean"),
        "of 100 over a window": ("ess_iwae_100", "mean"),
        "log w, standard deviation": ("log_w_std", "nats_per_sequence"),
    }
    return markdown(
        [
            {
                "objective": label,
                **{
                    heading: mean_and_interval([one["bounds"][name][unit] for one in found])
                    for heading, (name, unit) in columns.items()
                },
            }
            for label, _, found in of_labels("objectives", "variants", "likelihood")
        ]
    )


def whole_recordings():
    """smc_100 of 8 recordings from their beginning to their end, and FLAC on the same."""
    rows = []
    for label, _, found in of_labels("objectives", "likelihood"):
        bounds = [one["whole_recordings"]["smc_100"] for one in found]
        rows.append(
            {
                "objective": label,
                "nats/frame": mean_and_interval([one["nats_per_frame"] for one in bounds]),
                "bits per sample": mean_and_interval([one["bits_per_sample"] for one in bounds], 3),
            }
        )
    flac = next(
        one["whole_recordings"]["flac"]
        for _, _, found in of_labels("likelihood")
        for one in found
        if "flac" in one["whole_recordings"]
    )
    return markdown(
        [
            *rows,
            {
                "objective": "FLAC",
                "nats/frame": f"{flac['nats_per_frame']:.2f}",
                "bits per sample": f"{flac['bits_per_sample']:.3f}",
            },
        ]
    )


def judges():
    """The same checkpoints by 100 particles, as they were tested after training, and by 1,000; in brackets above the
    VRNNs of the same likelihood and seeds."""
    trained = {
        run["folder"]: run
        for runs, _ in read("objectives", "variants", "ar_settings")
        for run in runs
    }
    ((judged, _),) = read("judges")
    tests = {}
    for run in judged:
        before = trained[run["folder"].replace("_1000", "")]
        tests.setdefault(before["name"], {})[run["seed"]] = before["test"] | run["test"]

    def cell(name, bound):
        mean = mean_and_interval([test[bound] for test in tests[name].values()])
        vrnn = "VRNN AR-16" if name.endswith("AR-16") else "VRNN"
        difference = mean_and_interval(
            [test[bound] - tests[vrnn][seed][bound] for seed, test in tests[name].items()]
        )
        return mean if name == vrnn else f"{mean} ({difference})"

    bounds = "elbo", "iwae_100", "iwae_1000", "smc_100", "smc_1000"
    return markdown(
        [
            {
                "objective": name,
                "runs": str(len(tests[name])),
                **{f"`{bound}`": cell(name, bound) for bound in bounds},
            }
            for name in tests
        ]
    )


def windows():
    """How unequal the windows of the test split are."""
    columns = dict(worst=np.min, median=np.median, best=np.max)
    return markdown(
        [
            {
                "objective": label,
                **{
                    name: mean_and_interval([of(run["windows"]["smc_100"]) for run in runs])
                    for name, of in columns.items()
                },
            }
            for label, runs, _ in of_labels("likelihood")
        ]
    )


def signal_to_noise():
    """Of particles.json: the gradient of the posterior's parameters, and in brackets of all others."""
    measured, rows = json.loads((RESULTS / "particles.json").read_text())["gradients"], {}
    for found in (found for found in measured if found["k"] > 1 and found["frames"] == 40):
        name = found["objective"].replace(f"_{found['k']}", "_K")
        rows.setdefault(name, {"gradient of": name})[f"K = {found['k']}"] = (
            f"{found['snr_posterior']:.1f} ({found['snr_others']:.1f})"
        )
    return markdown(list(rows.values()))


def benchmarks(part, **shown):
    """Of the benchmark: a part of it, and the columns that are shown with their headings."""
    rows = json.loads((RESULTS / "benchmark.json").read_text())["tables"][part]
    return markdown(
        [
            {heading: benchmark.as_text(row[column]) for column, heading in shown.items()}
            for row in rows
        ]
    )


UPDATES = dict(
    objective="objective",
    batch="sequences",
    rows="rows",
    products="products",
    seconds="seconds an update",
    gflops="GFLOP/s",
    of_products="of the product rate",
    ratio="plain / ours",
)
WITH_FLAG = dict(
    objective="objective",
    flag="flag",
    seconds="seconds with",
    without_seconds="without",
    ratio="ratio",
    least="least",
    most="most",
)
EVALUATION = dict(
    estimate="estimate",
    particles="particles",
    windows_per_second="windows a second",
    gflops="GFLOP/s",
    of_products="of the product rate",
)
TABLES = dict(
    updates=lambda: benchmarks("updates", **UPDATES),
    updates_small=lambda: benchmarks("updates_small", **UPDATES),
    with_flag=lambda: benchmarks("variants", **WITH_FLAG),
    with_flag_small=lambda: benchmarks("variants_small", **WITH_FLAG),
    evaluation=lambda: benchmarks("evaluation_small", **EVALUATION),
    growth=lambda: benchmarks(
        "growth_small", size="what grows", value="to", seconds="seconds an update"
    ),
    front=front_table,
    two_by_two=lambda: difference_by_limit((5, 640, 2560, 0), MAIN, CONTRASTS),
    limits=lambda: difference_by_limit((5, 40, 160, 640, 2560, 3200, 0), LIMITED, ALIKE),
    norms=norms_and_clips,
    bounds=difference_by_bound,
    on_valid=lambda: on_valid((5, 40, 160, 2560, 0)),
    regime=regime,
    size=size,
    weights=weights,
    effective_sizes=effective_sizes,
    signal_to_noise=signal_to_noise,
    judges=judges,
    whole_recordings=whole_recordings,
    windows=windows,
    ar_settings=lambda: full_table("likelihood", "ar_settings"),
    objectives=lambda: full_table("objectives"),
    variants=lambda: full_table("objectives", "variants"),
    likelihood=lambda: full_table("likelihood"),
    reader=lambda: full_table("reader"),
    latents=lambda: full_table("objectives", "latents"),
    adam=lambda: full_table("objectives", "adam"),
    repeat=lambda: full_table("objectives", "repeat"),
    bf16=lambda: full_table("bf16"),
)


# ---- numbers in the text ----


def numbers_in(text):
    return {number.replace(",", "") for number in NUMBER.findall(text)}


def problems(write=False):
    """What is not as the logs have it, a sentence each. With write the tables are made so."""
    texts = {name: (ROOT / name).read_text() for name in FILES}
    found, tables = [], ""
    for name, text in texts.items():
        for begin, which, body, end in BLOCK.findall(text):
            made = TABLES[which]() + "\n"
            tables += made
            if made != body:
                found.append(
                    f"{name}: table {which} is not what the logs say; write it anew with --write"
                )
                texts[name] = texts[name].replace(begin + body + end, begin + made + end)
    if write:
        for name, text in texts.items():
            (ROOT / name).write_text(text)
        found = []
    known = numbers_in(tables) | set(OTHERS)
    for name, text in texts.items():
        text = CODE.sub("", BLOCK.sub("", text))
        found += [
            f"{name}: {number} is in no table and not in OTHERS"
            for number in sorted(numbers_in(text) - known)
        ]
    used = set.union(*(numbers_in(text) for text in texts.values()))
    return found + [
        f"OTHERS: {number} is nowhere in the text" for number in sorted(set(OTHERS) - used)
    ]


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
