"""Downloads from a hub on this machine: what is fetched, what is cached, what an error says. And `trd prepare --download-only`.

The hub client reads its environment when it is imported, so the cases run in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub import LoopbackHub
from trd_megatron.data import hub
from trd_megatron.data.hub import HubFiles

DEEPSCALER = "agentica-org/DeepScaleR-Preview-Dataset"
MATH500 = [{"problem": f"What is {n} + 1?", "solution": "", "answer": str(n + 1), "unique_id": f"u{n}"} for n in range(500)]
TRAIN = [{"problem": f"What is ${n} + 1$ ?", "answer": str(n + 1), "solution": "count"} for n in range(498, 510)]
ERRORS = """
import json, sys
from trd_megatron.data import hub
from trd_megatron.data.hub import HubFiles
from trd_megatron.errors import UserError
for repository, pattern in json.loads(sys.argv[1]):
    try:
        paths = hub.locate(HubFiles(repository, (pattern,)), way_out="do without")
        print(json.dumps([[path.name, path.read_text(), hub.revision(path)] for path in paths]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def lines(rows: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def run(home: Path, url: str, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"} | variables
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)


def test_files_are_fetched_once_and_what_is_missing_is_named(tmp_path: Path) -> None:
    parts = {f"data/train-0000{n}-of-00002.parquet": b"x" for n in range(2)}
    with LoopbackHub({"a/set": {"one.txt": b"1", "code.py": b"evil"} | parts, "a/torn": {"d-00001-of-00002.txt": b""}}) as server:
        wanted = [["a/set", "one.txt"], ["a/set", "one.txt"], ["a/set", "data/train-*.parquet"], ["a/set", "two.txt"],
                  ["a/gone", "x"], ["a/torn", "d-*.txt"]]  # fmt: skip
        found = run(tmp_path, server.url, "-c", ERRORS, json.dumps(wanted))
        assert found.returncode == 0, found.stderr
        first, again, several, two, gone, torn = map(json.loads, found.stdout.splitlines())
        assert first == again == [["one.txt", "1", server.revision("a/set")]]
        assert [name for name, *_ in several] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
        assert "two.txt is missing" in two and two.endswith("do without")
        assert gone.startswith("a/gone (x) did not come from the Hugging Face hub (404") and "hf_secret" not in gone
        assert "d-00000-of-00002.txt is missing" in torn
        assert server.tokens >= {"Bearer hf_secret"}
        downloads = [path for path in server.asked if "/resolve/" in path]
        assert not [path for path in downloads if path.endswith(".py")]

        server.files["a/set"]["one.txt"] = b"2"  # the repository moves on, the cache does not
        asked = len(server.asked)
        [same] = map(json.loads, run(tmp_path, server.url, "-c", ERRORS, json.dumps([["a/set", "one.txt"]])).stdout.splitlines())
        assert same == first and "/api/datasets/a/set" not in "".join(server.asked[asked:])
    offline = run(tmp_path, server.url, "-c", ERRORS, json.dumps([["a/set", "one.txt"], ["a/new", "x"]]), HF_HUB_OFFLINE="1")
    cached, refused = map(json.loads, offline.stdout.splitlines())
    assert cached == first
    assert refused.startswith("a/new (x) did not come from") and "HF_HUB_OFFLINE is set" in refused


def test_only_paths_in_the_hubs_cache_have_a_revision(tmp_path: Path) -> None:
    assert hub.revision(Path("/c/hub/datasets--a--b/snapshots/0123/data/x.parquet")) == "0123"
    assert hub.revision(Path("/home/me/x.parquet")) is None
    with pytest.raises(FileNotFoundError, match=r"x-\* is missing"):
        hub.matching(tmp_path, HubFiles("a/b", ("x-*",)))


def test_download_only_then_the_run_without_a_network(tmp_path: Path) -> None:
    options = ["experiment=smoke", "data=deepscaler", "data.path=null", "data.test_problems=2", "data.exclude_benchmarks=[math500]",
               f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    repositories = {DEEPSCALER: {"deepscaler.json": json.dumps(TRAIN).encode()}, "HuggingFaceH4/MATH-500": {"test.jsonl": lines(MATH500)}}
    trd = ("-m", "trd_megatron.cli", "prepare")
    with LoopbackHub(repositories) as server:
        fetched = run(tmp_path / "hf", server.url, *trd, "--download-only", *options, "evaluate.benchmarks=[math500]")
        assert fetched.returncode == 0, fetched.stderr
        commit = server.revision(DEEPSCALER)
        for word in ("data.source=deepscaler", "benchmark math500", "builtin:tiny-qwen3", commit, str(tmp_path / "hf"), "HF_HUB_OFFLINE=1"):
            assert word in fetched.stdout, word
        assert not (tmp_path / "run").exists()
        assert "hf_secret" not in fetched.stdout + fetched.stderr
    prepared = run(tmp_path / "hf", server.url, *trd, *options, HF_HUB_OFFLINE="1")
    assert prepared.returncode == 0, prepared.stderr
    counts = json.loads((tmp_path / "run/problems/manifest.json").read_text())["counts"]
    assert (counts["train_problems"], counts["test_problems"]) == (8, 2)
    assert counts["in_benchmarks"] == {"math500": 2}  # 498 + 1 and 499 + 1, in spite of the dollar signs and the space
    assert counts["hub_revision"] == {f"{DEEPSCALER} (deepscaler.json)": commit}
