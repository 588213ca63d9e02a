"""Recordings to the HDF5 file that the training scripts read.

    python prepare_blizzard.py FILES AND FOLDERS --out data/blizzard.h5

Takes .npz (every array in it), .npy (one recording, or an array of arrays) and sound files (.wav .flac .mp3 .ogg,
resampled to 16 kHz); the first channel of each. Recordings are taken in natural order and go, whole, to the split that
is furthest below its share. Unusable files are skipped and listed.
"""

import argparse

import common


def main():
    parser = common.OneLineParser(prog="prepare_blizzard.py", description=__doc__, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files, and folders to search")
    parser.add_argument("--out", help="HDF5 file to write (default: data/blizzard.h5; data/demo.h5 with --demo)")
    parser.add_argument("--valid", type=float, default=0.05, help="fraction of samples to validate on (%(default)s)")
    parser.add_argument("--test", type=float, default=0.05, help="fraction of samples to test on (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--strict", action="store_true", help="treat an unusable recording as an error")
    parser.add_argument("--demo", action="store_true",
                        help="write five minutes of synthetic speech-like recordings to data/demo, and convert them")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic recordings (%(default)s)")
    options = parser.parse_args()
    if not 0 <= options.seed < 2 ** 32:
        parser.error(f"--seed={options.seed} is out of range")
    if options.demo == bool(options.paths):
        parser.error("give files or folders of recordings, or --demo alone")
    out = options.out or ("data/demo.h5" if options.demo else "data/blizzard.h5")
    if options.demo:
        summary = common.make_demo_data(out, seed=options.seed, force=options.force)
        print("synthetic demo data, not speech")
    else:
        summary = common.convert(options.paths, out, options.valid, options.test, options.force, options.strict)

    print(f"{out}\n{'split':6}{'recordings':>12}{'minutes':>10}{'samples':>16}")
    total = tuple(map(sum, zip(*summary.splits.values())))
    for split, (recordings, samples) in [*summary.splits.items(), ("total", total)]:
        print(f"{split:6}{recordings:12,}{samples / common.SAMPLE_RATE / 60:10.2f}{samples:16,}")
    print(f"mean {summary.mean:.4f}, standard deviation {summary.std:.4f} (of train, in 16-bit steps)")
    print(f"too short for one training excerpt of {common.EXCERPT_SECONDS:g} s: {summary.short[0]} recordings, "
          f"{summary.short[1]:.2f} s")
    ignored = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in summary.ignored.items())
    print(f"ignored, of other types: {ignored or 'none'}")
    print(f"skipped: {len(summary.skipped)}")
    for reason in summary.skipped:
        print(f"  {reason}".encode("utf-8", "backslashreplace").decode())


if __name__ == "__main__":
    common.run_as_script(main)
