"""Kill a training process at random moments, resume it, and compare it with one never killed.

    python tests/tools/kill.py [--kills 30] [--seed 0]

Every second kill waits for a checkpoint that is being written. Prints a line per kill; exit status
1 if a run differs.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from tiny import SIZES, Fork, assert_same_run, run, write_tiny_data  # noqa: E402


def training(out, data, updates, *more):
    return (
        "vrnn_gauss_iwae",
        *SIZES,
        f"--data={data}",
        f"--out_dir={out}",
        f"--max_updates={updates}",
        "--monitor_every=5",
        "--k=3",
        *more,
    )


def train(out, data, updates, *more):
    result = run(*training(out, data, updates, *more), cwd=out.parent, brief=True)
    assert result.returncode == 0, result.stderr


def lines_in(log):
    return log.read_text().count("\n") if log.exists() else 0


def kill_once(out, data, updates, in_checkpoint, fraction):
    """Start the run in out, or resume it, and kill it.

    Returns how many lines its log has, and the files left half-written.
    """
    resume = ["--resume"] if (out / "last.pt").exists() else []
    process = Fork(*training(out, data, updates, *resume), cwd=out.parent, brief=True)
    lines = 0
    while process.poll() is None and lines < fraction * updates / 5:
        lines = lines_in(out / "log.jsonl")
    while process.poll() is None and in_checkpoint and not (out / "last.pt.partial").exists():
        pass
    if not in_checkpoint:
        time.sleep(random.random() * 0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.ended()
    return lines, [path.name for path in out.glob("*.partial")]


def kill_and_compare(folder, kills, seed=0, updates=300):
    """Whether each of `kills` runs, killed once and resumed, equals the undisturbed one."""
    random.seed(seed)
    data, whole = folder / "tiny.h5", folder / "whole"
    write_tiny_data(data)
    train(whole, data, updates)
    same = []
    for i in range(kills):
        out = folder / f"killed-{i}"
        in_checkpoint, fraction = i % 2 == 1, random.random()
        lines, partial = kill_once(out, data, updates, in_checkpoint, fraction)
        resume = ["--resume"] if (out / "last.pt").exists() else []
        train(out, data, updates, *resume)
        try:
            assert_same_run(whole, out)
            same.append(True)
        except AssertionError as error:
            print(error)
            same.append(False)
        found = "an identical run" if same[-1] else "ANOTHER RUN"
        print(
            f"kill {i + 1}: after {lines} log lines, half-written: "
            f"{', '.join(partial) or 'nothing'}; resumed to {found}",
            flush=True,
        )
    return same


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        same = kill_and_compare(Path(folder), options.kills, options.seed)
    print(f"{sum(same)} of {len(same)} identical")
    sys.exit(not all(same))


if __name__ == "__main__":
    main()
