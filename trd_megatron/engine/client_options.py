"""How patient and how busy the SGLang client is."""

from dataclasses import dataclass

from trd_megatron.config import EngineConfig


@dataclass(frozen=True)
class ClientOptions:
    """Times in seconds. See EngineConfig for the fields that have a key there.

    health_interval_s: between two looks at a server. health_timeout_s: a server that does not answer is noticed within it.
    """

    max_outstanding: int = 256
    attempts: int = 5
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    request_timeout_s: float = 3600.0
    give_up_after_s: float = 600.0
    health_interval_s: float = 5.0
    health_timeout_s: float = 30.0

    @staticmethod
    def from_config(engine: EngineConfig) -> "ClientOptions":
        return ClientOptions(
            max_outstanding=engine.max_outstanding,
            attempts=engine.attempts,
            connect_timeout_s=engine.connect_timeout_s,
            read_timeout_s=engine.read_timeout_s,
            request_timeout_s=engine.request_timeout_s,
            give_up_after_s=engine.give_up_after_s,
        )
