"""Generation engines behind one protocol (base.py)."""

from trd_megatron.config import Config
from trd_megatron.engine.base import Engine, Weights


def make_engine(config: Config, weights: Weights) -> Engine:
    """The configured engine with a model loaded."""
    from trd_megatron.engine.local import LocalEngine

    engine = config.engine
    assert engine.kind == "local"  # the only choice that config_checks lets through
    return LocalEngine(
        weights.path,
        device=engine.device,  # type: ignore[arg-type]
        dtype=engine.dtype,  # type: ignore[arg-type]
        batch_size=engine.batch_size,
        weight_version=weights.version,
    )
