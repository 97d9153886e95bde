"""The claims of docs/lab.md, read from what `make lab-full` has written (folder LAB, default runs/lab)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests import lab_claims

REPORT = Path(os.environ.get("LAB", "runs/lab")) / "report.json"
pytestmark = [pytest.mark.acceptance, pytest.mark.skipif(not REPORT.exists(), reason=f"{REPORT} is not there: `make lab-full` writes it")]


def sections(**wanted: Any) -> list[dict[str, Any]]:
    found = json.loads(REPORT.read_text())["sections"]
    return [section for section in found if all(section["settings"][key.replace("__", ".")] == value for key, value in wanted.items())]


@pytest.mark.parametrize(("mode", "trainable", "methods"), [("opsd", "full", 5), ("opd", "full", 5), ("opsd", "lora", 2)])
def test_trd_repairs_what_the_baselines_do_not(mode: str, trainable: str, methods: int) -> None:
    [section] = sections(mode=mode, learner__trainable=trainable, data__world="lab")
    assert len(section["methods"]) == methods
    lab_claims.check(section)


def test_there_is_no_lead_where_there_is_nothing_to_repair() -> None:
    [section] = sections(data__world="lab_control")
    lab_claims.check_control(section)
