"""Handing over to Megatron-Bridge, for architectures that are not in the name table."""

from importlib import util
from pathlib import Path

from trd_megatron.errors import UserError


def import_hf(hf_path: str, megatron_path: Path, trust_remote_code: bool) -> None:
    """Converts with Megatron-Bridge's AutoBridge. Raises UserError if it is not installed or the output exists."""
    if not installed():
        raise UserError(
            "--backend bridge needs Megatron-Bridge, which needs Transformer Engine: pip install megatron-bridge on a GPU machine"
        )
    if megatron_path.exists():
        raise UserError(f"{megatron_path} exists: give another path, or delete it")
    from megatron.bridge import AutoBridge

    options = {"trust_remote_code": True} if trust_remote_code else {}
    AutoBridge.import_ckpt(hf_path, str(megatron_path), **options)


def installed() -> bool:
    """Whether Megatron-Bridge can be imported."""
    return util.find_spec("megatron.bridge") is not None
