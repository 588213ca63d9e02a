"""The checkpoints that come with the repository, on synthetic recordings that do too."""

import json

import pytest
from tiny import ROOT, main_of

import prepare_blizzard


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "speech_like.h5"
    prepare_blizzard.convert_files(
        [ROOT / "tests/reference/speech_like.npz"], out, valid=0.25, test=0.25
    )
    return out


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(
    "run, update, expected",
    (
        ("objectives/vrnn_long-0", 12_500, dict(elbo=52.973, iwae_5=53.870, smc_5=56.702)),
        ("likelihood/lstm_ar_32-0", 5_000, dict(elbo=350.800, iwae_5=350.800, smc_5=350.800)),
    ),
)
def test_a_checkpoint_has_the_bounds_that_it_had_when_it_was_committed(
    data, tmp_path, run, update, expected
):
    checkpoint = ROOT / "data/results" / run / "best.pt"
    assert checkpoint.stat().st_size < 3e6
    main_of(
        "vrnn_gauss",
        f"--evaluate={checkpoint}",
        f"--data={data}",
        f"--out_dir={tmp_path / 'out'}",
        "--eval_k=5",
        "--eval_recordings=1",
        "--device=cpu",
    )
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert (found["windows"], found["update"]) == (4, update)
    bounds = {name: found["bounds"][name]["nats_per_frame"] for name in expected}
    assert bounds == pytest.approx(expected, rel=1e-3)
