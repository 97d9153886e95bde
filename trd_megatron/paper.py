"""Which row of the paper's tables a configuration is, and where it departs from that row."""

from trd_megatron.config import Config, get, leaves, load

PRESETS = {  # (mode, student) -> its file in conf/experiment
    ("opd", "Qwen3-1.7B"): "opd_qwen3_1_7b",
    ("opd", "Qwen3-4B-Instruct-2507"): "opd_qwen3_4b_instruct",
    ("opsd", "Qwen3-4B-Instruct-2507"): "opsd_qwen3_4b_instruct",
    ("opsd", "Qwen3-8B"): "opsd_qwen3_8b",
}
TEACHERS = {"opd": "Qwen3-8B", "opsd": None}
METHODS = {
    "forward_kl": "Forward KL", "forward_kl_clip": "Forward KL w/ Clip", "reverse_kl": "Reverse KL",
    "reverse_kl_topk": "Reverse KL w/ Top-K", "trd": "TRD",
}  # fmt: skip
FILTERED = {("forward_kl", "fail"): 6, ("forward_kl", "succ"): 6, ("reverse_kl", "fail"): 7, ("reverse_kl", "succ"): 7,
            ("trd", "fail"): 8, ("trd", "succ"): 8, ("trd", "fail_to_succ"): 8}  # fmt: skip  # table of section B.3
OWN = ("name", "seed", "data.path", "evaluate.teacher")  # may differ in the same row


def _model(path: str | None) -> str | None:
    """Qwen3-8B of a hub id or of a folder of that name."""
    return None if path is None else path.rstrip("/").rpartition("/")[2]


def preset(config: Config) -> str | None:
    """The preset with this student, mode and teacher; None: the paper trains no such student."""
    if config.job != "distill" or _model(config.teacher.path) != TEACHERS[config.mode]:
        return None
    return PRESETS.get((config.mode, _model(config.model.path) or ""))


def row(config: Config) -> str | None:
    """e.g. "tables 1 and 2: OPD, Qwen3-1.7B, math, TRD". None: such a combination is in none of the paper's tables."""
    name, method, filtered = preset(config), config.method.name, config.data.filter
    if name is None or method not in METHODS or config.task not in (("math", "code") if config.mode == "opd" else ("math",)):
        return None
    where = f"{config.mode.upper()}, {_model(config.model.path)}, {config.task}, {METHODS[method]}"
    if filtered != "all":
        table = FILTERED.get((method, filtered)) if name == "opsd_qwen3_8b" else None
        return None if table is None else f"table {table}: {where} ({filtered.replace('_', ' ')})"
    tables = "1 and 2" if config.mode == "opd" else "3 and 4"
    if method == "trd" and config.task == "math" and name.endswith("4b_instruct"):
        tables = tables.replace(" and ", ", ") + " and 5"
    return f"tables {tables}: {where}"


def departures(config: Config) -> list[str]:
    """Settings that change results and differ from those of the configuration's row, as KEY=VALUE; none if it is no row."""
    if row(config) is None:
        return []
    theirs = load(
        [f"experiment={preset(config)}", f"task={config.task}", f"method={config.method.name}", f"data.filter={config.data.filter}"]
    )
    return [
        f"{key}={get(config, key)}"
        for key, field in leaves()
        if not field.metadata["layout"] and key not in OWN and get(config, key) != get(theirs, key)
    ]


def describe(config: Config) -> str | None:
    """One line for plans, runs and reports; None for experiments that have nothing to do with the tables."""
    found, others = row(config), departures(config)
    if found is None:
        return "not in the paper" if config.name in {f"{name}_{config.task}" for name in PRESETS.values()} else None
    return f"the paper's {found}" + (f", but {', '.join(others)}" if others else "")
