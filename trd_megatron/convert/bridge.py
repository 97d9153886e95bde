"""Handing over to Megatron-Bridge, for architectures that are not in the name table."""

from importlib import util
from pathlib import Path

from trd_megatron.builtin_models import local
from trd_megatron.convert.output import new_folder
from trd_megatron.errors import UserError


def import_hf(hf_path: str, megatron_path: Path) -> None:
    """Converts with Megatron-Bridge's AutoBridge. Raises UserError if it is not installed or the output exists."""
    if not installed():
        raise UserError(
            "--backend bridge needs Megatron-Bridge, which needs Transformer Engine: pip install megatron-bridge on a GPU machine"
        )
    from megatron.bridge import AutoBridge

    model = local(hf_path)
    with new_folder(megatron_path, 0, {"command": "hf-to-megatron", "backend": "bridge", "source": hf_path}) as output:
        AutoBridge.import_ckpt(str(model), str(output.folder))


def installed() -> bool:
    """Whether Megatron-Bridge can be imported."""
    return util.find_spec("megatron.bridge") is not None
