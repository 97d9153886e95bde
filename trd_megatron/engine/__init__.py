"""Generation engines behind one protocol (base.py)."""

from pathlib import Path

from trd_megatron.config import Config
from trd_megatron.engine.base import Engine


def make_engine(config: Config, model_path: Path) -> Engine:
    """The configured engine with a model loaded."""
    from trd_megatron.engine.local import LocalEngine

    engine = config.engine
    assert engine.kind == "local"  # the only choice that config_checks lets through
    return LocalEngine(model_path, device=engine.device, dtype=engine.dtype, batch_size=engine.batch_size)  # type: ignore[arg-type]
