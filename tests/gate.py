"""Record what 21 updates of every objective end in, and compare two records bit for bit. For the redesign only.

    python tests/gate.py record FILE      trains at tiny sizes, each objective through and also stopped and resumed
    python tests/gate.py compare FILE FILE

21 updates pass ten excerpt boundaries (an excerpt has two windows). A record holds parameters, averaged parameters,
21 updates pass ten excerpt boundaries (an excerpt has two windows). A record holds parameters, averaged parameters,
"""

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from tiny import SIZES, command, write_tiny_data  # noqa: E402

CASES = {
    "vrnn": ["vrnn_gauss"],
    "vae": ["vrnn_gauss_alt_nll", "--k=3"],
    "vae_published": ["vrnn_gauss_alt_nll", "--k=3", "--as_published"],
    "iwae": ["vrnn_gauss_iwae", "--k=3"],
    "iwae_published": ["vrnn_gauss_iwae", "--k=3", "--as_published", "--grad_clip=20"],
    "iwae_corrected": ["vrnn_gauss_iwae", "--k=3", "--as_published", "--corrections=sign,batch"],
    "dreg": ["vrnn_gauss_iwae", "--k=3", "--dreg"],
    "resample": ["vrnn_gauss_iwae", "--k=3", "--resample"],
    "bf16": ["vrnn_gauss", "--bf16"],
    "no_clip": ["vrnn_gauss", "--grad_clip=0", "--lr_updates=15", "--no-mirrored_init", "--x_noise=0", "--lr=3e-3"],
    "clip": ["vrnn_gauss", "--grad_clip=2", "--no-dequantize", "--ema=0.9", "--weight_norm=0.9", "--x_noise_updates=9"],
}


def run(script, out, data, updates, *flags):
    subprocess.run(command(script, *SIZES, f"--data={data}", f"--out_dir={out}", f"--max_updates={updates}",
                           "--monitor_every=7", *flags), check=True, stdout=subprocess.DEVNULL)


def record_of(out):
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    names = list(checkpoint["model"])  # parameters only, in Adam's order
    moments = {f"{names[i]}.{key}": value for i, state in checkpoint["optimiser"]["state"].items()
               for key, value in state.items()}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    evaluation = json.loads((out / "eval.json").read_text())
    return dict(model=checkpoint["model"], averaged=checkpoint["averaged"], moments=moments,
                log=[{key: value for key, value in line.items() if key != "seconds"} for line in log],
                eval={key: evaluation[key] for key in ("update", "windows", "bounds", "whole_recordings")},
                windows=(out / "windows.csv").read_text())


def case(folder, data, name, script, *flags):
    whole, parts = folder / name, folder / f"{name}-resumed"
    run(script, whole, data, 21, *flags)
    run(script, parts, data, 10, *flags)
    run(script, parts, data, 21, *flags, "--resume")
    return {name: record_of(whole), f"{name}-resumed": record_of(parts)}


def record(file):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folder = Path(folder)
        write_tiny_data(folder / "tiny.h5")
        cases = [pool.submit(case, folder, folder / "tiny.h5", name, *flags) for name, flags in CASES.items()]
        torch.save({name: record for done in cases for name, record in done.result().items()}, file)


def leaves(tree, path=""):
    if isinstance(tree, (dict, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, part in items for name, leaf in leaves(part, f"{path}/{key}").items()}
    return {path: tree}


def compare(before, after):
    before, after = (torch.load(file, weights_only=True) for file in (before, after))
    failed = False
    for name in before:
        ours, theirs = leaves(after[name]), leaves(before[name])
        differing = [path for path, value in theirs.items()
                     if path not in ours or not (torch.equal(value, ours[path]) if torch.is_tensor(value)
                                                 else value == ours[path])]
        largest = max([((theirs[path] - ours[path]).norm() / (theirs[path].norm() + 1e-30)).item() for path in differing
                       if path in ours and torch.is_tensor(theirs[path])], default=0.0)
        new = sorted({path.rsplit("/", 1)[-1] for path in ours.keys() - theirs.keys()})
        print(f"{name:24}{len(theirs) - len(differing):5} of {len(theirs)} the same, largest relative difference of a "
              f"tensor {largest:.1e}{', new: ' + ' '.join(new) if new else ''}", *differing[:3])
        failed |= bool(differing)
    sys.exit(failed)


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
