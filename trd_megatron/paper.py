"""Which row of the paper's tables a configuration is, and where it departs from that row."""

from trd_megatron.config import Config, get, leaves, load
from trd_megatron.errors import UserError

PRESETS = ("opd_qwen3_1_7b", "opd_qwen3_4b_instruct", "opsd_qwen3_4b_instruct", "opsd_qwen3_8b")  # of conf/experiment
METHODS = {
    "forward_kl": "Forward KL", "forward_kl_clip": "Forward KL w/ Clip", "reverse_kl": "Reverse KL",
    "reverse_kl_topk": "Reverse KL w/ Top-K", "trd": "TRD",
}  # fmt: skip
FILTERED = {("forward_kl", "fail"): 6, ("forward_kl", "succ"): 6, ("reverse_kl", "fail"): 7, ("reverse_kl", "succ"): 7,
            ("trd", "fail"): 8, ("trd", "succ"): 8, ("trd", "fail_to_succ"): 8}  # fmt: skip  # table of section B.3
OWN = ("name", "seed", "data.path", "evaluate.teacher")  # may differ in the same row


def preset(config: Config) -> str | None:
    """The preset that the configuration comes from; None: another experiment, which has nothing to do with the paper's tables."""
    return next((name for name in PRESETS if config.name == f"{name}_{config.task}"), None)


def row(config: Config) -> str | None:
    """e.g. "tables 1 and 2: OPD, math, +TRD". None: such a combination is in none of the paper's tables."""
    name, method = preset(config), config.method.name
    if name is None or method not in METHODS or (config.mode == "opsd" and config.task != "math"):
        return None
    where = f"{config.mode.upper()}, {config.task}, +{METHODS[method]}"
    if config.data.filter == "all":
        return f"tables {'1 and 2' if config.mode == 'opd' else '3 and 4'}: {where}"
    table = FILTERED.get((method, config.data.filter)) if name == "opsd_qwen3_8b" else None
    return None if table is None else f"table {table}: {where} ({config.data.filter.replace('_', ' ')})"


def departures(config: Config) -> list[str]:
    """Settings that change results and differ from those of the preset's row, as KEY=VALUE."""
    name = preset(config)
    if name is None:
        return []
    try:
        theirs = load([f"experiment={name}", f"task={config.task}", f"method={config.method.name}", f"data.filter={config.data.filter}"])
    except UserError:  # a method of the user's own
        return [f"method={config.method.name}"]
    return [
        f"{key}={get(config, key)}"
        for key, field in leaves()
        if not field.metadata["layout"] and key not in OWN and get(config, key) != get(theirs, key)
    ]


def describe(config: Config) -> str | None:
    """One line for plans, runs and reports; None for experiments that have nothing to do with the tables."""
    if preset(config) is None:
        return None
    found, others = row(config), departures(config)
    text = f"the paper's {found}" if found is not None else "not in the paper"
    return f"{text}, but {', '.join(others)}" if found is not None and others else text
