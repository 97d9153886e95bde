"""The learner in float64 against another program: Hugging Face models with PEFT adapters, one sequence at a time, whole logits.

Nothing of trd_megatron computes the oracle's figures; it only takes over the adapters' starting values.
"""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.dist import learner_cases as cases
from tests.dist.ranks import run_ranks
from trd_megatron.config import Config, load
from trd_megatron.learner.packing import Sample

METHODS = ("trd", "forward_kl", "forward_kl_clip", "reverse_kl", "reverse_kl_topk")
STEPS = 10
RATES = [1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / STEPS))) for step in range(STEPS)]
ONE: cases.Layout = (1, False, 1)
TEACHER = {"hidden_size": 48, "intermediate_size": 88, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}


def config_of(method: str, **learner: Any) -> Config:
    config = load(["experiment=smoke", f"method={method}"])
    divergence = config.method.divergence
    if divergence.clip is not None:  # two random models differ more than the recipe's 0.1 at every token
        divergence = replace(divergence, clip=2.0)
    if divergence.top_k is not None:
        divergence = replace(divergence, top_k=5)
    return replace(
        config,
        method=replace(config.method, divergence=divergence),
        learner=replace(config.learner, dtype="float64", weight_decay=0.05, clip_grad=0.5, **learner),
    )


def random_samples(seed: int) -> list[Sample]:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(259) for _ in range(draw.randrange(low, high))]

    return [Sample(f"p{i}", 0, ids(3, 20), ids(5, 45), ids(1, 25), (True, False, None)[i % 3]) for i in range(4 * STEPS)]


def supervised(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, teacher_prompt_ids=[]) for sample in samples]


class Oracle:
    """A transformers model in float64. Its RMSNorm computes in float32 whatever the model's dtype, so torch's own takes its place."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                    norm.weight.data.copy_(child.weight.data)
                    setattr(parent, name, norm)

    def logits(self, prompt: list[int], response: list[int]) -> Tensor:
        """[response, V]: row i predicts response token i."""
        return self.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def per_token(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """[response] from logits [response, V], as the paper writes them."""
    divergence = config.method.divergence
    if divergence.top_k is not None:
        kept = teacher.topk(divergence.top_k).indices  # random models have no ties
        student, teacher = student.gather(1, kept), teacher.gather(1, kept)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    target, other = (log_p, log_q) if divergence.kind == "forward" else (log_q, log_p)
    value = (target.exp() * (target - other)).sum(-1)
    return value if divergence.clip is None else value.clamp(max=divergence.clip)


def figures_of(student: Tensor, teacher: Tensor, ids: Tensor, passed: bool | None, config: Config) -> Tensor:
    """[response, 5]: KL before the clip, both log-probabilities, epistemic mass, whether the rollout passed (1, 0 or -1)."""
    plain = replace(config, method=replace(config.method, divergence=replace(config.method.divergence, clip=None)))
    logprobs = [logits.log_softmax(-1).gather(1, ids[:, None])[:, 0] for logits in (student, teacher)]
    mass = teacher.softmax(-1)[:, [3, 5, 258]].sum(-1)
    outcome = torch.full_like(mass, -1.0 if passed is None else float(passed))
    return torch.stack([per_token(student, teacher, plain), *logprobs, mass, outcome], dim=1)


def metrics_of(figures: Tensor, config: Config) -> dict[str, float]:
    kl, student, teacher, mass, passed = figures.unbind(1)
    clip = config.method.divergence.clip or math.inf
    ordered = kl.sort().values
    quantiles = {f"kl_{name}": ordered[math.ceil(q * len(kl)) - 1].item() for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
    return quantiles | {
        "loss": kl.clamp(max=clip).mean().item(), "kl": kl.mean().item(), "kl_max": kl.max().item(),
        "student_nll": -student.mean().item(), "teacher_nll": -teacher.mean().item(),
        "kl_passed": kl[passed == 1].mean().item(), "kl_failed": kl[passed == 0].mean().item(),
        "perplexity_gap": math.exp(-student.mean()) - math.exp(-teacher.mean()),
        "epistemic_mass": mass.mean().item(), "clipped_share": (kl > clip).double().mean().item(),
    }  # fmt: skip


def oracle_steps(case: cases.Case, start: dict[str, Tensor]) -> cases.Steps:
    _, config, samples, student_path, teacher_path = case
    learner = config.learner
    student = Oracle(student_path)
    teacher = None if teacher_path is None else Oracle(teacher_path)
    if learner.trainable == "full":
        teacher = teacher or Oracle(student_path)
    else:
        lora = LoraConfig(r=learner.lora.rank, lora_alpha=int(learner.lora.alpha), lora_dropout=0.0, target_modules=learner.lora.targets)
        student.model = get_peft_model(student.model, lora, autocast_adapter_dtype=False)
    factors = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in student.model.named_parameters()
        if parameter.requires_grad
    }
    assert factors.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(start[name])
    groups = [
        {"params": [p for p in factors.values() if p.dim() > 1], "weight_decay": learner.weight_decay},
        {"params": [p for p in factors.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW([group for group in groups if group["params"]], betas=(learner.adam_beta1, learner.adam_beta2), eps=1e-8)
    trace: cases.Steps = {"metrics": [], "loss": [], "gradients": [], "adapters": [start]}
    for step, rate in enumerate(RATES):
        batch = samples[4 * step : 4 * step + 4]
        losses, figures, supervised_nll = [], [], []
        for sample in batch:
            if cases.objective(samples) == "sft":
                logits = student.logits(sample.student_prompt_ids, sample.response_ids)
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.response_ids), reduction="sum"))
                supervised_nll.append(losses[-1].item())
                continue
            with torch.no_grad():
                if teacher is not None:
                    target = teacher.logits(sample.teacher_prompt_ids, sample.response_ids)
                else:
                    with student.model.disable_adapter():
                        target = student.logits(sample.teacher_prompt_ids, sample.response_ids)
            logits = student.logits(sample.student_prompt_ids, sample.response_ids)
            losses.append(per_token(logits, target, config).sum())
            ids = torch.tensor(sample.response_ids)
            figures.append(figures_of(logits.detach(), target, ids, sample.rollout_passed, config))
        if figures:
            trace["metrics"].append(metrics_of(torch.cat(figures), config))
        else:
            nll = sum(supervised_nll) / sum(len(sample.response_ids) for sample in batch)
            trace["metrics"].append({"loss": nll, "student_nll": nll, "perplexity": math.exp(nll)})
        loss = torch.stack(losses).sum() / sum(len(sample.response_ids) for sample in batch)
        adam.zero_grad()
        loss.backward()
        trace["loss"].append(loss.item())
        gradients = {name: parameter.grad.clone() for name, parameter in factors.items() if parameter.grad is not None}
        trace["gradients"].append(gradients)
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        for parameter in factors.values():
            assert parameter.grad is not None
            parameter.grad.mul_(min(1.0, learner.clip_grad / norm.item()))
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        trace["adapters"].append({name: parameter.detach().clone() for name, parameter in factors.items()})
    return trace


def distance(got: cases.Steps, want: cases.Steps) -> dict[str, float]:
    """Largest relative difference of a loss; of all gradients and all adapters of a step, in norm."""
    result = {"loss": max(abs(a - b) / abs(b) for a, b in zip(got["loss"], want["loss"], strict=True))}
    for what in ("gradients", "adapters"):
        ratios = []
        for ours, theirs in zip(got[what], want[what], strict=True):
            assert ours.keys() == theirs.keys()
            gap = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
            ratios.append(math.sqrt(gap / sum(float(tensor.double().square().sum()) for tensor in theirs.values())))
        result[what] = max(ratios)
    return result


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_ten_steps_equal_transformers_and_peft(architecture: str, tmp_path: Path) -> None:
    student = tiny.make(architecture, tmp_path / "student")
    teacher = tiny.make(architecture, tmp_path / "teacher", seed=1, **TEACHER)
    methods = METHODS if architecture == "qwen3" else ("trd",)  # the loss knows nothing of the architecture
    built: list[cases.Case] = [
        (f"{method} {mode}", config_of(method), random_samples(7), student, path)
        for method in methods
        for mode, path in (("opsd", None), ("opd", teacher))
    ]
    some = replace(config_of("trd").learner.lora, targets=["q_proj", "v_proj", "down_proj"])
    built += [
        ("trd opsd, three targets", config_of("trd", lora=some), random_samples(7), student, None),
        ("trd opsd, every parameter", config_of("trd", trainable="full"), random_samples(7), student, None),
    ]
    if architecture == "qwen3":
        built += [(f"sft {kind}", config_of("trd", trainable=kind), supervised(random_samples(7)), student, None) for kind in ("lora", "full")]
        built.append(("reverse_kl opd, every parameter", config_of("reverse_kl", trainable="full"), random_samples(7), student, teacher))
    [ours] = run_ranks(1, cases.traced_steps, built, [(ONE, {})], RATES)[0]
    for case, got in zip(built, ours, strict=True):
        want = oracle_steps(case, got["adapters"][0])
        for mine, theirs in zip(got["metrics"], want["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)  # the quantiles are kept in float32
        for name, gap in distance(got, want).items():
            assert gap < 1e-8, (case[0], name, gap)
        moved = distance({**got, "adapters": got["adapters"][:1] * (STEPS + 1)}, got)["adapters"]
        assert moved > 0.01, (case[0], moved)  # the ten steps go somewhere


UNPACKED = {"max_tokens_per_micro_batch": 72}  # the longest sample has 44 + 24 tokens: about one sample per micro-batch
Runs = list[tuple[cases.Layout, dict[str, Any]]]
LAYOUTS: dict[str, tuple[int, Runs]] = {  # in parts, each with a time limit of its own
    "1": (1, [(ONE, UNPACKED), (ONE, {"max_tokens_per_micro_batch": 150, "recompute": "full", "teacher_offload": True})]),
    "2": (2, [((2, False, 1), {}), ((2, True, 1), UNPACKED), ((1, False, 2), UNPACKED)]),
    "2, context": (2, [(ONE, {"context_parallel_size": 2}), (ONE, {"context_parallel_size": 2, "recompute": "full"} | UNPACKED)]),
    "3": (3, [((3, False, 1), UNPACKED), ((3, True, 1), {"recompute": "full"}), ((1, False, 3), {})]),
    "3, context": (3, [(ONE, {"context_parallel_size": 3, "recompute": "selective"})]),
    "4": (4, [((4, True, 1), {}), ((2, False, 2), UNPACKED)]),
    "4, tensor and data": (4, [((2, True, 2), {"recompute": "full"}), ((1, False, 4), {})]),
    "4, context and tensor": (4, [((2, True, 1), {"context_parallel_size": 2, "recompute": "full"})]),
    "4, context and data": (4, [((1, False, 2), {"context_parallel_size": 2} | UNPACKED)]),
}


Built = tuple[list[cases.Case], list[cases.Steps]]  # with the steps of one rank


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"num_attention_heads": 24, "num_key_value_heads": 12, "head_dim": 6}  # 12 groups: tensor parallel over 1, 2, 3 or 4
    student = tiny.make("qwen3", folder / "student", **sizes)
    teacher = tiny.make("qwen3", folder / "teacher", seed=1, **sizes | {"hidden_size": 48})
    methods = ("trd", "forward_kl_clip", "reverse_kl_topk")
    built: list[cases.Case] = [(f"{method} opsd", config_of(method), random_samples(3), student, None) for method in methods]
    some = replace(config_of("trd").learner.lora, targets=["v_proj", "o_proj", "up_proj"], dropout=0.3)
    built.append(("trd opsd, three targets, dropout", config_of("trd", lora=some), random_samples(3), student, None))
    built.append(("trd opsd, every parameter", config_of("trd", trainable="full"), random_samples(3), student, None))
    built.append(("trd opd", config_of("trd"), random_samples(3), student, teacher))
    built += [(f"sft {kind}", config_of("trd", trainable=kind), supervised(random_samples(3)), student, None) for kind in ("lora", "full")]
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    sizes |= {"moe_intermediate_size": 24, "rope_parameters": yarn, "max_position_embeddings": 128}
    experts = tiny.make("qwen3-moe", folder / "experts", **sizes)
    built.append(("trd opd, experts and YaRN", config_of("trd"), random_samples(3), student, experts))
    single = replace(config_of("trd"), learner=replace(config_of("trd").learner, dtype="float32"))
    built.append(("trd opsd float32", single, random_samples(3), student, None))
    return built, run_ranks(1, cases.traced_steps, built, [(ONE, {})], RATES[:2])[0][0]


@pytest.mark.parametrize(("ranks", "runs"), LAYOUTS.values(), ids=LAYOUTS)
def test_no_layout_and_no_packing_changes_anything(ranks: int, runs: Runs, plain: Built) -> None:
    built, expected = plain
    for rank in run_ranks(ranks, cases.traced_steps, built, runs, RATES[:2], timeout_s=280):
        for (place, changes), traces in zip(runs, rank, strict=True):
            for case, got, want in zip(built, traces, expected, strict=True):
                if "float32" in case[0]:  # the first step: after it Adam has blown rounding up to the size of an update
                    got, want = ({name: values[:1] for name, values in trace.items()} for trace in (got, want))
                for mine, theirs in zip(got["metrics"], want["metrics"], strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-4 if "float32" in case[0] else 1e-6, abs=1e-6)
                for name, gap in distance(got, want).items():
                    assert gap < (1e-5 if "float32" in case[0] else 1e-8), (case[0], place, changes, name, gap)
