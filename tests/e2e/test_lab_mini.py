"""The smallest world of the lab, from pretraining to the comparison: the system learns what it should. A few minutes."""

import json
import sys
from pathlib import Path

import pytest

from tests import lab_claims
from trd_megatron import cli


def test_trd_repairs_and_forward_kl_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["experiment=lab", "data.world=lab_mini", "data.train_problems=1000", "method=forward_kl,trd", "seed=0,1"]
    monkeypatch.setattr(sys, "argv", ["trd", "run", "--multirun", *settings, f"run_dir={tmp_path / 'lab'}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    [section] = json.loads((tmp_path / "lab/report.json").read_text())["sections"]
    lab_claims.check(section, pass_gain=20, pass_lead=10)  # two or three steps leave the base fewer problems that it never solves
