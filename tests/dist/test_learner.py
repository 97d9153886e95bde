"""The learner on several layouts: the same figures everywhere, and the same logits as transformers."""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.dist import learner_cases as cases
from tests.dist.ranks import run_ranks
from trd_megatron import pipeline
from trd_megatron.builtin_models import resolve_model
from trd_megatron.config import Config, load
from tests.checkpoints import read_tensors
from trd_megatron.convert import huggingface, peft
from trd_megatron.convert.megatron import Megatron
from trd_megatron.learner.checkpoint_files import saved_steps, step_folder
from trd_megatron.learner.packing import Sample
from trd_megatron.run_dir import RunDir
from trd_megatron.stages.train import build_samples

ONE: cases.Layout = (1, False, 1)  # tensor parallel, sequence parallel, data parallel
PAIRS: list[cases.Layout] = [(2, False, 1), (2, True, 1), (1, False, 2)]
CONFIG = load(["experiment=smoke"])


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(259) for _ in range(draw.randrange(low, high))]

    return [Sample(f"p{i}", 0, ids(3, 20), ids(5, 45), ids(1, 25)) for i in range(count)]


def close(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), rtol=tolerance, atol=1e-9)


def merged_logits(folder: Path, ids: list[list[int]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([one])).logits[0] for one in ids]


def test_logits_equal_transformers(tmp_path: Path) -> None:
    folders = [tiny.make(name, tmp_path / name) for name in tiny.ARCHITECTURES]
    ids = [s.student_prompt_ids + s.response_ids for s in random_samples(3)]
    expected = [merged_logits(folder, ids) for folder in folders]
    single = run_ranks(1, cases.logits, CONFIG, folders, ids, [ONE])[0]
    first, second = run_ranks(2, cases.logits, CONFIG, folders, ids, PAIRS[:2])
    for results, wanted in ((single, expected), (first, expected * 2), (second, expected * 2)):
        assert len(results) == len(wanted)
        for model, reference in zip(results, wanted, strict=True):
            for ours, theirs in zip(model, reference, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ranks", "place"), [(1, ONE), (2, PAIRS[1])])
def test_merged_and_peft_logits_equal_the_students(ranks: int, place: cases.Layout, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = tiny.make("qwen3", tmp_path / "base")
    ids = [s.student_prompt_ids + s.response_ids for s in random_samples(3)]
    ours = run_ranks(ranks, cases.student_against_merged, CONFIG, folder, ids, tmp_path, place)[0]
    base = merged_logits(folder, ids)
    lora = CONFIG.learner.lora
    peft.write(torch.load(tmp_path / "factors.pt"), lora.rank, lora.alpha, str(folder), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter")
    for mine, merged, plain, one in zip(ours, merged_logits(tmp_path / "merged", ids), base, ids, strict=True):
        torch.testing.assert_close(mine, merged, rtol=0, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(mine, adapted(torch.tensor([one])).logits[0], rtol=0, atol=1e-4)
        assert (mine - plain).abs().max() > 0.1  # the adapter does something


@pytest.fixture(scope="module")
def method_cases(tmp_path_factory: pytest.TempPathFactory) -> list[cases.Case]:
    """Five methods, OPSD and OPD, on what one rollout and one refinement per mode gave."""
    built = []
    for mode, teacher in (("opsd", "null"), ("opd", "builtin:tiny-qwen3-teacher")):
        folder = tmp_path_factory.mktemp(mode)
        base = ["experiment=smoke", f"run_dir={folder}", f"mode={mode}", f"teacher.path={teacher}"]
        pipeline.run(load(base), RunDir(folder, "smoke"), until="refine")
        for method in ("trd", "forward_kl", "forward_kl_clip", "reverse_kl", "reverse_kl_topk"):
            # Two random models are so far apart that the recipe's cap of 0.1 would hold for every token, and no gradient be left.
            cap = ["method.divergence.clip=0.5"] if method == "forward_kl_clip" and mode == "opd" else []
            config = load([*base, f"method={method}", *cap])
            rows = build_samples(config, RunDir(folder, "smoke"), Counter())
            models = [resolve_model(path) if path else None for path in (config.model.path, config.teacher.path)]
            assert models[0] is not None
            built.append((f"{method} {mode}", config, [Sample(**row) for row in rows], models[0], models[1]))
    return built


def test_every_method_has_the_same_figures_on_every_layout(method_cases: list[cases.Case]) -> None:
    single = run_ranks(1, cases.three_steps, method_cases, [(ONE, {})])[0][0]
    assert len({rows[1] for rows in single.values()}) == len(method_cases)  # the methods differ from each other
    assert all(row[2] > 0 for rows in single.values() for row in rows)  # every step has a gradient
    for rank in run_ranks(2, cases.three_steps, method_cases, [(place, {}) for place in PAIRS]):
        for result in rank:
            for name, rows in single.items():
                close(result[name], rows)


def test_packing_recomputation_and_chunks_change_nothing(method_cases: list[cases.Case]) -> None:
    some = [case for case in method_cases if case[0] in ("trd opsd", "trd opd")]
    changes: list[dict[str, Any]] = [{}, {"max_tokens_per_micro_batch": 900}, {"recompute": "full"}, {"kl_chunk_tokens": 3}]
    plain, *others = run_ranks(1, cases.three_steps, some, [(ONE, change) for change in changes])[0]
    [together] = run_ranks(2, cases.three_steps, some, [(PAIRS[1], changes[1] | changes[2])])[0]
    for result in (*others, together):
        for name, rows in plain.items():
            close(result[name], rows, 2e-5 if result is not together else 1e-4)


def loop_case(tmp_path: Path, **learner: Any) -> cases.Case:
    config: Config = replace(CONFIG, learner=replace(CONFIG.learner, learning_rate=1e-2, keep_checkpoints=10, **learner))
    return "loop", config, random_samples(20), tiny.make("qwen3", tmp_path / "s"), None


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one_on_any_layout(trainable: str, tmp_path: Path) -> None:
    case = loop_case(tmp_path, trainable=trainable, dtype="float64", epochs=2, checkpoint_interval=4)
    _, config, *rest = case
    (tmp_path / "whole").mkdir()
    whole = run_ranks(1, cases.train_in, case, [(tmp_path / "whole", ONE)])[0][0]
    assert saved_steps(tmp_path / "whole" / "checkpoints") == [4, 8]
    resumed = {}
    layouts = {"same": cases.layout(config, *ONE), "tp2": cases.layout(config, *PAIRS[1]), "dp2": cases.layout(config, *PAIRS[2])}
    layouts["cp2"] = cases.layout(config, *ONE, context_parallel_size=2)
    for name, placed in layouts.items():  # step 8 is lost, as after a kill before it
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(step_folder(tmp_path / name / "checkpoints", 8))
        (tmp_path / name / "summary.json").unlink()
        resumed[name] = (("loop", placed, *rest), tmp_path / name)
    run_ranks(1, cases.train_each, [resumed["same"]])
    run_ranks(2, cases.train_each, [resumed["tp2"], resumed["dp2"], resumed["cp2"]], timeout_s=250)
    for name, (_, folder) in resumed.items():
        again = json.loads((folder / "summary.json").read_text())
        assert again["kl_fixed_batch_before"] == whole["kl_fixed_batch_before"]
        close(again["kl_fixed_batch_after"], whole["kl_fixed_batch_after"])
        first, second = (read_tensors(step_folder(f / "checkpoints", 8)) for f in (tmp_path / "whole", folder))
        assert first.keys() == second.keys()
        assert any(key.startswith("exp_avg_sq.") for key in first)
        for key, tensor in first.items():
            if tensor.shape != second[key].shape:  # 259 words, padded to 260 on two ranks
                assert not second[key][259:].any()
                second[key] = second[key][:259]
            torch.testing.assert_close(tensor, second[key], rtol=0, atol=0 if name == "same" else 1e-6)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 9))


def test_nothing_is_recomputed_where_there_is_no_gradient(tmp_path: Path) -> None:
    """Neither of the teacher nor of the held-out batch: Transformer Engine would keep fp8 scales for a backward that never comes."""
    case = loop_case(tmp_path, recompute="full")
    [(in_update, in_measurement)] = run_ranks(1, cases.recomputed, case)
    assert (in_update, in_measurement) == (2, 0)  # the student's two layers, one micro-batch


def test_a_fully_trained_model_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    """From two ranks: the fused and cut tensors come out whole, the vocabulary without its padding."""
    for name in ("llama3-rope", "qwen2", "qwen3"):  # tied, tied with biases, untied with norms of q and k
        base = tiny.make(name, tmp_path / name / "base")
        case = ("export", replace(CONFIG, learner=replace(CONFIG.learner, trainable="full")), random_samples(12), base, None)
        folder = tmp_path / name / "train"
        folder.mkdir()
        trained = run_ranks(2, cases.train_and_score, case, folder, PAIRS[1])[0]
        huggingface.write(Megatron(step_folder(folder / "checkpoints", saved_steps(folder / "checkpoints")[-1]), base), tmp_path / name / "hf", dtype=None)
        ids = [s.student_prompt_ids + s.response_ids for s in case[2]]
        for mine, exported, plain in zip(trained, merged_logits(tmp_path / name / "hf", ids), merged_logits(base, ids), strict=True):
            torch.testing.assert_close(mine, exported, rtol=0, atol=1e-4)
            assert (mine - plain).abs().max() > 1e-3


def test_a_loss_that_is_not_finite_stops_before_the_update_on_every_rank(tmp_path: Path) -> None:
    case = loop_case(tmp_path)
    for message, untouched in run_ranks(2, cases.poisoned, case, PAIRS[1]):
        assert "not finite, nothing was updated; samples: p0/0, p1/0, p2/0" in message
        assert untouched


def test_what_a_failed_step_needs_for_a_replay_is_kept(tmp_path: Path) -> None:
    _, config, samples, student, _ = loop_case(tmp_path)
    wild = replace(config, learner=replace(config.learner, learning_rate=1e30, warmup_ratio=0.0, clip_grad=1e30))
    folder = tmp_path / "train"
    folder.mkdir()
    with pytest.raises(RuntimeError, match="not finite, nothing was updated"):
        run_ranks(1, cases.train_in, ("wild", wild, samples, student, None), [(folder, ONE)])
    failed = json.loads((folder / "failed" / "step.json").read_text())
    [before] = saved_steps(folder / "failed")
    assert before >= 1
    named = [f"{sample['problem_id']}/{sample['sample_index']}" for sample in failed["samples"]]
    assert ", ".join(named) in failed["error"]
    assert Sample(**failed["samples"][0]) in samples
    assert any(name.startswith("exp_avg.") for name in read_tensors(step_folder(folder / "failed", before)))
