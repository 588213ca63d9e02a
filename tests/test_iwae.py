"""What vrnn_gauss_iwae.py alone can do."""

import json

import pytest
from tiny import SIZES, run


def test_a_resampled_run_also_logs_the_bound_that_it_trains(data, tmp_path):
    result = run(
        "vrnn_gauss_iwae",
        *SIZES,
        f"--data={data}",
        f"--out_dir={tmp_path}/run",
        "--resample",
        "--k=3",
        "--max_updates=4",
        "--monitor_every=2",
        "--eval_k=4,8",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    for line in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()[1:]):
        assert line["valid"]["smc_4"]["nats_per_frame"] != line["valid"]["iwae_4"]["nats_per_frame"]


@pytest.mark.parametrize(
    "flags, words",
    (
        (["--resample", "--k=2"], ["--resample", "--k=2", "3 or more"]),
        (["--resample", "--dreg"], ["exclude each other"]),
        (["--corrections=sign"], ["--corrections=sign", "--as_published"]),
        (["--as_published", "--corrections=sing"], ["'sing'", "sign,time,gradient,batch"]),
    ),
)
def test_flags_that_make_no_sense_are_refused_in_one_sentence(data, tmp_path, flags, words):
    result = run(
        "vrnn_gauss_iwae",
        *SIZES,
        f"--data={data}",
        f"--out_dir={tmp_path}/run",
        *flags,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
    assert not (tmp_path / "run").exists()
