"""What vrnn_gauss_iwae.py alone can do."""

import pytest
from tiny import SIZES, lines_of, run


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
        *("--eval_k", 4, 8),
        cwd=tmp_path,
        brief=True,
    )
    assert result.returncode == 0, result.stderr
    _, *lines = lines_of(tmp_path / "run/log.jsonl")
    assert len(lines) == 2
    for line in lines:
        valid = line["valid"]
        assert valid["smc_4"]["nats_per_frame"] != valid["iwae_4"]["nats_per_frame"]


@pytest.mark.parametrize(
    "flags, words",
    (
        (["--resample", "--k=2"], ["--resample", "--k=2", "3 or more"]),
        (["--resample", "--dreg"], ["--resample", "--dreg", "exclude each other"]),
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
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "run").exists()
