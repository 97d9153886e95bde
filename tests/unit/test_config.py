"""Composition, the frozen set of keys, and one-line errors."""

import re
from pathlib import Path

import pytest

from trd_megatron import config as configuration
from trd_megatron.config import from_dict, get, leaves, load, options, to_dict
from trd_megatron.config_checks import check
from trd_megatron.errors import UserError

METHODS = {  # RECIPE_FACTS: trajectory, divergence, clip, top-K, teacher prompt
    "forward_kl": ("rollout", "forward", None, None, "vanilla"),
    "forward_kl_clip": ("rollout", "forward", 0.1, None, "vanilla"),
    "reverse_kl": ("rollout", "reverse", None, None, "vanilla"),
    "reverse_kl_topk": ("rollout", "reverse", None, 32, "vanilla"),
    "trd": ("refined", "forward", None, None, "refine"),
}


LAB = ["experiment=lab", "model.path=x"]
EVALUATE = ["experiment=evaluate", "model.path=x", "evaluate.benchmarks=[x.jsonl]"]
ATTACHED = ["experiment=smoke", "engine.kind=sglang", "engine.student.urls=['http://127.0.0.1:30000']"]


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes(experiment: str) -> None:
    own = {"evaluate": EVALUATE, "sft": ["experiment=sft", "model.path=x", "data.path=x.jsonl"]}
    config = load(own.get(experiment, [f"experiment={experiment}"]))
    assert config.name in (experiment, f"{experiment}_math")  # the paper's run under several tasks
    assert config.run_dir == f"runs/{config.name}"
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_the_papers(method: str) -> None:
    m = load(["experiment=smoke", f"method={method}"]).method
    assert (m.trajectory, m.divergence.kind, m.divergence.clip, m.divergence.top_k, m.teacher_prompt) == METHODS[method]
    assert m.divergence.temperature == 1.0
    assert set(options("method")) == {*METHODS, "reverse_kl_top8"}  # the last for the lab


def test_defaults_are_the_recipes() -> None:
    default = configuration.LearnerConfig()
    assert (default.lora.rank, default.lora.alpha) == (64, 128)
    assert (default.adam_beta1, default.adam_beta2, default.learning_rate, default.weight_decay) == (0.9, 0.95, 5e-6, 0.005)
    assert (default.warmup_ratio, default.min_learning_rate_ratio, default.clip_grad) == (0.1, 0.1, 1.0)
    assert (default.global_batch_size, default.epochs, default.kl_chunk_tokens) == (128, 1, 512)
    for sampling in (configuration.RolloutConfig(), configuration.RefineConfig()):
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_response_tokens) == (0.6, 0.95, 20, 16384)
    assert configuration.RolloutConfig().max_prompt_tokens == 2048
    assert (configuration.RefineConfig().max_prompt_tokens, configuration.RefineConfig().max_reference_tokens) == (22528, 4096)
    evaluate = configuration.EvaluateConfig()
    assert (evaluate.samples, evaluate.top_k, evaluate.max_prompt_tokens, evaluate.max_response_tokens) == (16, -1, 4096, 38912)


def test_the_task_chooses_budgets_and_quickstarts_problems() -> None:
    budgets = {"math": (4096, 38912), "code": (2048, 16384)}  # RECIPE_FACTS
    for task, expected in budgets.items():
        config = load(["experiment=opsd_qwen3_8b", f"task={task}"])
        assert (config.task, config.evaluate.max_prompt_tokens, config.evaluate.max_response_tokens) == (task, *expected)
        assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (2048, 16384)
    for order in (["experiment=quickstart", "task=code"], ["task=code", "experiment=quickstart"]):
        code = load(order)
        assert (code.data.source, code.data.train_problems, code.evaluate.max_response_tokens) == ("human_eval", 32, 256)
    assert (load(["experiment=quickstart"]).data.source, load(["experiment=quickstart"]).rollout.max_response_tokens) == ("arithmetic", 64)
    own = load(["experiment=quickstart", "task=code", "data=file", "data.path=x.jsonl"])
    assert (own.data.source, own.rollout.max_response_tokens) == ("file", 256)
    assert load(["experiment=opsd_qwen3_8b", "evaluate=paper_code"]).evaluate.max_response_tokens == 16384


def test_papers_benchmarks_are_kept_out_of_the_training_problems() -> None:
    assert load(["experiment=opsd_qwen3_8b"]).data.exclude_benchmarks == ["aime24", "aime25", "hmmt25", "beyondaime", "amobench"]
    code = load(["experiment=opsd_qwen3_8b", "task=code"])
    assert code.data.exclude_benchmarks == ["humaneval_plus", "mbpp_plus", "livecodebench_v6"]


def test_overrides_reach_their_key_and_keep_their_type() -> None:
    config = load(["experiment=smoke", "learner.learning_rate=1e-4", "data.prompt_format=plain", "student.chat_template_kwargs={a: 1}"])
    assert (config.learner.learning_rate, config.data.prompt_format, config.student.chat_template_kwargs) == (1e-4, "plain", {"a": 1})
    assert load(["experiment=smoke", "student.chat_template_kwargs.enable_thinking=false"]).student.chat_template_kwargs == {
        "enable_thinking": False
    }


@pytest.mark.parametrize(
    ("override", "named", "nearest"),
    [
        ("learner.learnin_rate=1", "learner.learnin_rate", "learner.learning_rate"),
        ("lerner.learning_rate=1", "lerner.learning_rate", "learner.learning_rate"),
        ("global_batch_size=1", "global_batch_size", "learner.global_batch_size"),
        ("rollout.temprature=1", "rollout.temprature", "rollout.temperature"),
        ("mode=odp", "mode", "opd"),
        ("method=trt", "method", "trd"),
        ("method.divergence.kind=foward", "method.divergence.kind", "forward"),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_right_one(override: str, named: str, nearest: str) -> None:
    message = refused("experiment=smoke", override)
    assert named in message
    assert f"did you mean {nearest}?" in message


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        (["experiment=smok"], r"smok.*did you mean smoke"),
        ([], r"experiment=NAME.*smoke"),
        (["experiment=smoke", "seed"], r"'seed' is not key=value"),
        (["experiment=smoke", "learner=3"], r"no learner named '3'.*cpu"),
        (["experiment=smoke", "rollout=3"], r"rollout is a section.*rollout\."),
        (["experiment=smoke", "+foo=3"], r"neither added nor deleted"),
        (["experiment=smoke", "seed=x"], r"^seed: .*'x'.*Integer"),
        (["experiment=smoke", "learner.learning_rate=fast"], r"^learner\.learning_rate: .*'fast'.*Float"),
        (["experiment=smoke", "learner.sequence_parallel=maybe"], r"^learner\.sequence_parallel: .*valid bool"),
        (["experiment=smoke", "learner.learning_rate=nan"], r"^learner\.learning_rate=nan: must be finite"),
        (["experiment=smoke", "learner.learning_rate=0"], r"^learner\.learning_rate=0.0: must be above 0"),
        (["experiment=smoke", "rollout.top_p=1.5"], r"^rollout\.top_p=1.5: must lie between"),
        (["experiment=smoke", "rollout.top_p=0"], r"^rollout\.top_p=0"),
        (["experiment=smoke", "learner.adam_beta2=1"], r"^learner\.adam_beta2=1"),
        (["experiment=smoke", "learner.weight_decay=-1"], r"^learner\.weight_decay=-1"),
        (["experiment=smoke", "method.divergence.beta=1"], r"^method\.divergence\.beta=1"),
        (["experiment=smoke", "student.chat_template_kwargs={tokenize: true}"], r"chat_template_kwargs\.tokenize"),
        (["experiment=smoke", "learner=cpu", "learner=gpu"], r"^learner is given twice"),
        (["experiment@x=smoke"], r"without a package"),
        (["experiment=smoke", "rollout.top_k=0"], r"^rollout\.top_k=0"),
        (["experiment=smoke", "rollout.temperature=-1"], r"^rollout\.temperature"),
        (["experiment=smoke", "mode=opd"], r"mode=opd needs a teacher: set teacher\.path"),
        (["experiment=smoke", "teacher.path=x"], r"teacher\.path=null, or mode=opd"),
        (["experiment=smoke", "data.path=null"], r"data\.path"),
        (["experiment=smoke", "data=arithmetic"], r"data\.path"),
        (["experiment=smoke", "data.test_problems=0"], r"data\.test_problems"),
        (["experiment=smoke", "learner.sequence_parallel=true"], r"learner\.tensor_model_parallel_size"),
        (["experiment=smoke", "learner.kl_backend=triton"], r"^learner\.kl_backend=triton needs learner\.device=cuda"),
        (["experiment=smoke", "learner.fp8=current"], r"^learner\.fp8=current needs learner\.device=cuda"),
        (
            ["experiment=smoke", "learner=gpu", "learner.fp8=current", "learner.transformer_impl=local"],
            r"set learner\.transformer_impl=auto",
        ),
        (["experiment=smoke", "learner=gpu", "learner.fp8=delayed", "learner.fp8_bf16_layers=1"], r"^learner\.fp8_bf16_layers needs"),
        (["experiment=smoke", "learner.transformer_impl=transformer_engine"], r"^learner\.transformer_impl=transformer_engine needs"),
        (["experiment=smoke", "learner.teacher_offload=true"], r"^learner\.teacher_offload=true needs learner\.device=cuda"),
        (["experiment=smoke", "learner=gpu", "learner.teacher_offload=true"], r"a teacher with weights of its own"),
        (["experiment=smoke", "learner.context_parallel_size=0"], r"^learner\.context_parallel_size=0: must be above 0"),
        (["experiment=smoke", "learner.max_restarts=-1"], r"^learner\.max_restarts=-1"),
        (["experiment=smoke", "learner.recompute=true"], r"^learner\.recompute=.*must be one of none, selective, full"),
        (["experiment=smoke", "learner.lora.targets=[q_proj,foo]"], r"^learner\.lora\.targets: no layer named 'foo'; known: q_proj"),
        (["experiment=smoke", "learner.lora.dropout=1"], r"^learner\.lora\.dropout=1"),
        (["experiment=smoke", "learner.max_tokens_per_micro_batch=100"], r"^learner\.max_tokens_per_micro_batch=100"),
        (["experiment=smoke", "learner.lora.rank=0"], r"learner\.lora\.rank"),
        (["experiment=smoke", "method.divergence.kind=jsd", "method.divergence.top_k=4"], r"jsd"),
        (["experiment=smoke", "export.checkpoint=newest"], r"export\.checkpoint=newest"),
        (["experiment=smoke", "evaluate.benchmarks=[test,a/x.jsonl,b/x.jsonl]"], r"two benchmarks named 'x'"),
        (["experiment=smoke", "rounds=0"], r"rounds=0"),
        (["experiment=evaluate"], r"^model\.path is not set"),
        ([*EVALUATE[:2]], r"^job=evaluate needs benchmarks: set evaluate\.benchmarks="),
        ([*EVALUATE[:2], "evaluate.benchmarks=[test]"], r"'test', the held-out problems of a training run"),
        ([*EVALUATE, "rounds=2"], r"^rounds=2: job=evaluate"),
        ([*EVALUATE[:2], "evaluate.benchmarks=[aime42]"], r"no benchmark 'aime42': aime24, "),
        (["experiment=smoke", "verify.code.memory_mb=0"], r"^verify\.code\.memory_mb=0"),
        (
            ["experiment=opd_qwen3_1_7b", "task=code", "data=deepscaler"],
            r"^data\.source=deepscaler has math problems: .*one of file, taco, human_eval",
        ),
        (["experiment=lab", "task=math"], r"^data\.source=lab has lab problems: set task=lab"),
        ([*LAB, "data=taco"], r"^data\.source=taco has code problems: set task=code, or for task=lab choose data=NAME, one of file, lab$"),
        ([*LAB, "data.path=p.jsonl"], r"^data\.source=lab makes its problems: leave data\.path out"),
        ([*LAB, "data.train_problems=null"], r"^data\.source=lab .*set data\.train_problems"),
        ([*LAB, "data.exclude_benchmarks=[aime24]"], r"set data\.exclude_benchmarks=\[\]"),
        ([*LAB, "data.world=lab_min"], r"^data\.world=lab_min: must be one of lab, lab_mini, lab_control; did you mean lab_mini"),
        (
            [*LAB, "evaluate.benchmarks=[test,aime24]"],
            r"^task=lab is evaluated on its own problems alone: set evaluate\.benchmarks=\[test\]",
        ),
        ([*EVALUATE, "task=lab"], r"^task=lab has no benchmarks"),
        (["experiment=quickstart", "data=taco"], r"^data\.source=taco has code problems: set task=code"),
        (["experiment=smoke", "data.exclude_benchmarks=[aime]"], r"no benchmark 'aime': aime24"),
        (["experiment=quickstart", "data.exclude_benchmarks=[aime24]"], r"set data\.exclude_benchmarks=\[\]"),
        (["experiment=smoke", "engine.launch=true"], r"engine\.kind=sglang"),
        ([*ATTACHED[:2]], r"engine\.student\.urls is empty"),
        ([*ATTACHED, "engine.launch=true"], r"engine\.student\.urls names servers"),
        ([*ATTACHED, "mode=opd", "teacher.path=builtin:tiny-qwen3-teacher"], r"engine\.teacher\.urls is empty"),
        ([*ATTACHED[:2], "engine.student.urls=[localhost:30000]"], r"'localhost:30000' is no URL"),
        ([*ATTACHED[:2], "engine.student.urls=http://a:1"], r"engine\.student\.urls is a list: write engine\.student\.urls=\[http://a:1\]"),
        ([*ATTACHED[:2], "engine.student.urls=['http://me:pw@a:1']"], r"names and passwords in a URL"),
        ([*ATTACHED[:2], "engine.student.urls=['http://a:1','http://a:1']"], r"names a server twice"),
        ([*ATTACHED, "engine.student.mem_fraction_static=1"], r"mem_fraction_static=1"),
        ([*ATTACHED, "engine.student.fp8=true"], r"engine\.student\.fp8=true needs engine\.device=cuda"),
        ([*ATTACHED, "engine.student.extra_args=['--port=1']"], r"--port is set by another key"),
        ([*ATTACHED, "engine.deterministic=true"], r"engine\.deterministic=true needs"),
        ([*ATTACHED, "engine.attempts=0"], r"engine\.attempts=0"),
        (["experiment=opsd_qwen3_8b", "engine.student.gpus=[0,1]"], r"names 2 GPUs, but .* needs 8"),
        (["experiment=single_gpu", "engine.keep_servers=true"], r"GPU 0 is wanted by the learner and by engine\.student"),
        (["experiment=smoke", "seed=[1"], r"cannot read 'seed=\[1'"),
    ],
)
def test_contradictions_are_refused_in_one_line(overrides: list[str], pattern: str) -> None:
    assert re.search(pattern, refused(*overrides))


def test_an_unknown_key_in_a_saved_configuration_is_named() -> None:
    values = to_dict(load(["experiment=smoke"]))
    values["learner"]["learning_rat"] = 1
    with pytest.raises(UserError, match=r"learner\.learning_rat.*did you mean learner\.learning_rate"):
        from_dict(values)


def test_the_set_of_keys_is_frozen() -> None:
    """A new setting is a promise: add it here on purpose."""
    frozen = (Path(__file__).with_name("config_keys.txt")).read_text().split()
    assert [key for key, _ in leaves()] == frozen


def test_every_key_is_read_somewhere() -> None:
    package = Path(configuration.__file__).parent
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name not in ("config.py", "config_checks.py"))
    passed_whole = {"method.divergence", "learner.lora"}  # sections that are handed on as one
    for key, _ in leaves():
        leaf = key.rsplit(".", 1)[-1]
        assert re.search(rf"\.{leaf}\b", code) or key.rsplit(".", 1)[0] in passed_whole, f"{key} is never read"


def test_every_key_has_help_and_checks_pass_on_defaults() -> None:
    config = load(["experiment=smoke"])
    check(config)
    for key, field in leaves():
        assert len(field.metadata["help"]) > 10, key
        get(config, key)
