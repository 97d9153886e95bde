"""`make acceptance`: the quickstart end to end, twice, and its report in a browser. Takes as long as the quickstart; not in `make test`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    trd(run_dir)
    return run_dir


def trd(run_dir: Path) -> str:
    command = [sys.executable, "-m", "trd_megatron.cli", "run", "experiment=quickstart", f"run_dir={run_dir}"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # all cores, as for a user
    return subprocess.run(command, env=environment, check=True, stderr=subprocess.PIPE, text=True).stderr


def counts(run: Path, folder: str) -> dict:  # type: ignore[type-arg]
    return json.loads((run / folder / "manifest.json").read_text())["counts"]


@pytest.mark.timeout(1800)
def test_rewrites_are_better_than_attempts(run: Path) -> None:
    rollouts, refined = counts(run, "rollouts"), counts(run, "refined")
    assert 0.15 <= rollouts["passed"] / rollouts["samples"] <= 0.6
    assert refined["passed"] / refined["samples"] > rollouts["passed"] / rollouts["samples"]


def test_the_held_out_kl_falls_by_a_tenth(run: Path) -> None:
    summary = json.loads((run / "train/summary.json").read_text())
    assert summary["kl_fixed_batch_after"] < 0.9 * summary["kl_fixed_batch_before"]


def test_a_second_run_skips_everything(run: Path) -> None:
    assert trd(run).count("done before, skipped") == 9


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH")
@pytest.mark.parametrize("scheme", ["0", "1"], ids=["dark", "light"])
def test_the_report_opens_without_console_messages(run: Path, tmp_path: Path, scheme: str) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", f"--user-data-dir={tmp_path}"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={tmp_path}/page.png", "--window-size=1200,3600"]
    result = subprocess.run([*command, f"file://{run}/report.html"], capture_output=True, text=True, timeout=120, check=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000
    assert "CONSOLE" not in result.stderr
