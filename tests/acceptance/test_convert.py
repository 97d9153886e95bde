"""A real model to Megatron and back: bit-equal, with transformers' logits. Run with `make acceptance`."""

from pathlib import Path

import pytest

from trd_megatron.convert import operations, verify

MODEL = "builtin:smollm2-135m-instruct"


@pytest.mark.acceptance
def test_smollm2_comes_back_bit_equal_and_its_megatron_logits_match(tmp_path: Path) -> None:
    operations.hf_to_megatron(MODEL, tmp_path / "megatron", tensor_model_parallel_size=3)
    operations.megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    report = verify.compare(MODEL, str(tmp_path / "megatron"))
    assert report.same and report.checks[-1].name == "logits (float32)" and report.checks[-1].compared, report.checks
    assert verify.compare(MODEL, str(tmp_path / "hf")).same
