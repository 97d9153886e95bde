"""The embedded engine: exactness against plain transformers, independence of shards, sampling, end of turn, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MambaForCausalLM, Qwen2Config, Qwen3Config

from trd_megatron.builtin_models import resolve_model
from trd_megatron.engine import local
from trd_megatron.engine.base import Generation, Request, SamplingParams
from trd_megatron.engine.cpu_linear import PackedLinear
from trd_megatron.engine.local import LocalEngine, draw
from trd_megatron.errors import UserError

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
GREEDY = SamplingParams(0, 1, -1, 12)
SAMPLED = SamplingParams(0.8, 0.95, 20, 24)
PROMPTS = [[5, 9, 2], list(range(10, 31)), [7], [3, 1, 4, 1, 5, 9, 2, 6], [88, 3], list(range(40, 53))]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One folder for each model family."""
    made = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


@pytest.fixture
def qwen3(folders):
    return LocalEngine(folders["qwen3"], batch_size=4)


def requests(prompts: list[list[int]]) -> list[Request]:
    return [Request(prompt, 1000 + i) for i, prompt in enumerate(prompts)]


def run(engine: LocalEngine, shard: list[Request], sampling: SamplingParams) -> list[Generation]:
    ((index, generations),) = engine.generate([shard], sampling)
    assert index == 0
    return generations


def ids(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_of_mixed_lengths_are_those_of_generate_one_by_one(folders, family):
    plain = AutoModelForCausalLM.from_pretrained(folders[family])
    expected = [plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)  # the model does look at its prompt
    for batch_size in (1, 4, 32):
        assert ids(run(LocalEngine(folders[family], batch_size=batch_size), requests(PROMPTS), GREEDY)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_plain_forward(folders, family):
    plain = AutoModelForCausalLM.from_pretrained(folders[family])
    for prompt, generation in zip(PROMPTS, run(LocalEngine(folders[family]), requests(PROMPTS), SAMPLED), strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        assert len(generation.logprobs) == 24
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def test_a_shard_gives_the_same_ids_whatever_ran_before(folders, qwen3):
    shards = [requests(PROMPTS[:3]), requests(PROMPTS[3:]), [Request([1, 2], 5)]]
    together = dict(qwen3.generate(shards, SAMPLED))
    assert sorted(together) == [0, 1, 2]
    for index, shard in enumerate(shards):
        alone = run(LocalEngine(folders["qwen3"], batch_size=4), shard, SAMPLED)
        assert alone == together[index]


def test_a_draw_depends_on_the_seed_and_not_on_the_neighbours(qwen3):
    shard = [Request(PROMPTS[3], seed) for seed in (1, 2, 3, 1, -4)]
    drawn = ids(run(qwen3, shard, SAMPLED))
    assert drawn[0] == drawn[3]
    assert len({tuple(row) for row in drawn}) == 4
    mixed = ids(run(qwen3, [Request(PROMPTS[1], 9), Request(PROMPTS[3], 2), Request([4], 8)], SAMPLED))
    assert mixed[1] == drawn[1]
    longer = ids(run(qwen3, shard, SamplingParams(0.8, 0.95, 20, 40)))
    assert [row[:24] for row in longer] == drawn  # the token budget changes no draw


def test_identical_prompts_are_prefilled_once(qwen3, monkeypatch):
    rows = []
    forward = qwen3._model.forward
    monkeypatch.setattr(qwen3._model, "forward", lambda **kwargs: rows.append(kwargs["input_ids"].shape[0]) or forward(**kwargs))
    run(qwen3, [Request(PROMPTS[0], seed) for seed in range(4)], SamplingParams(1, 1, -1, 3))
    assert rows == [1, 4, 4]


def test_the_end_of_turn_token_ends_a_row_and_is_kept(folders, tmp_path, monkeypatch):
    shard = requests(PROMPTS * 2)
    full = ids(run(LocalEngine(folders["qwen3"]), shard, SAMPLED))
    ends = [full[0][4], full[1][9]]  # one from the generation config's list, one from the config
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen3"], folder)
    for file, value in (("generation_config.json", [ends[0]]), ("config.json", ends[1])):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"eos_token_id": value}))
    engine = LocalEngine(folder)
    assert engine.eos_token_ids == set(ends)
    rows = []
    forward = engine._model.forward
    monkeypatch.setattr(engine._model, "forward", lambda **kwargs: rows.append(kwargs["input_ids"].shape[0]) or forward(**kwargs))
    heard: list[int] = []
    ((_, generations),) = engine.generate([shard], SAMPLED, heard.append)
    lengths = []
    for generation, row in zip(generations, full, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in ends), None)
        assert generation.token_ids == row[:end]
        assert len(generation.logprobs) == len(generation.token_ids)
        assert generation.finish_reason == ("length" if end is None else "stop")
        lengths.append(len(generation.token_ids))
    assert {generation.finish_reason for generation in generations} == {"stop", "length"}
    assert len(set(lengths)) > 3  # rows left at different times
    assert sum(heard) == sum(lengths)
    assert rows[1:] == [sum(length > step for length in lengths) for step in range(1, 24)]  # ended rows left the batch


def test_all_rows_ending_ends_the_batch(qwen3):
    first = ids(run(qwen3, requests(PROMPTS[:2]), GREEDY))
    qwen3.eos_token_ids = frozenset(row[0] for row in first)
    assert [g.finish_reason for g in run(qwen3, requests(PROMPTS[:2]), GREEDY)] == ["stop", "stop"]
    on = run(qwen3, requests(PROMPTS[:2]), replace(GREEDY, ignore_eos=True))
    assert [(g.finish_reason, len(g.token_ids)) for g in on] == [("length", GREEDY.max_new_tokens)] * 2


def test_chunked_prefill_and_cache_growth_change_nothing(qwen3, monkeypatch):
    expected = run(qwen3, requests(PROMPTS), SAMPLED)
    monkeypatch.setattr(local, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(local, "FIRST_CAPACITY", 1)
    changed = run(qwen3, requests(PROMPTS), SAMPLED)
    assert ids(changed) == ids(expected)


def reference(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities [V] after temperature, top-k, then top-p, by sorting the whole vocabulary."""
    values, order = (logits.double() / sampling.temperature).sort(descending=True)
    if sampling.top_k != -1:
        values[sampling.top_k :] = -torch.inf
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (0.6, 0.95, 20),
        (1.0, 1.0, 20),
        (0.6, 0.5, 50),
        (1.0, 0.9, -1),
        (0.7, 1.0, -1),
        (1.0, 0.999, -1),
        (1.0, 0.01, 5),
        (1.0, 0.9, 9999),
    ],
)
def test_draws_follow_top_k_then_top_p_over_the_full_vocabulary(spread, temperature, top_p, top_k):
    sampling = SamplingParams(temperature, top_p, top_k, 1)
    logits = spread * torch.randn(5000, generator=torch.Generator().manual_seed(3))
    expected = reference(logits, sampling)
    points = 4000
    uniforms = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    drawn = torch.cat([draw(logits.expand(500, -1), sampling, part) for part in uniforms.split(500)])
    share = torch.bincount(drawn, minlength=5000) / points
    assert (share - expected).abs().max() <= 1.01 / points  # an even grid of points meets each token's interval to one point
    assert not share[expected == 0].any()


def test_every_probability_is_reachable_and_no_impossible_token_is_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 0.75, 1 - 2**-53], dtype=torch.float64)
    for top_k in (-1, 2, 4):
        for top_p in (1.0, 0.99):
            assert set(draw(logits, SamplingParams(1, top_p, top_k, 1), uniforms).tolist()) == {0, 2}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (3, 50)])
def test_packed_linear_is_linear(bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    x = torch.randn(*shape, 24)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=1e-5, rtol=1e-5)


def test_bfloat16_gives_the_logprobs_of_a_bfloat16_forward(folders):
    engine = LocalEngine(folders["qwen3"], dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(folders["qwen3"], dtype=torch.bfloat16)
    (generation,) = run(engine, requests(PROMPTS[1:2]), SAMPLED)
    with torch.no_grad():
        logits = plain(torch.tensor([PROMPTS[1] + generation.token_ids])).logits[0, len(PROMPTS[1]) - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=0.3, rtol=0)


def test_builtin_tiny_models_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRD_CACHE", str(tmp_path))
    engine = LocalEngine(resolve_model("builtin:tiny-qwen3"))
    assert [len(g.token_ids) <= 24 for g in run(engine, requests([[72, 105], [33]]), SAMPLED)] == [True, True]


def test_an_empty_prompt_is_refused(qwen3):
    with pytest.raises(ValueError, match="no tokens"):
        run(qwen3, requests([[1], []]), GREEDY)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(-1, 1, -1, 4),
        SamplingParams(1, 0, -1, 4),
        SamplingParams(1, 1.1, -1, 4),
        SamplingParams(1, 1, 0, 4),
        SamplingParams(1, 1, -1, 0),
    ],
)
def test_impossible_sampling_parameters_are_refused(qwen3, sampling):
    with pytest.raises(ValueError, match=r"needs temperature|top_k must"):
        qwen3.generate([requests(PROMPTS)], sampling)


@pytest.mark.parametrize("prompt", [[VOCAB], [3, -1]])
def test_ids_beyond_the_vocabulary_are_refused(qwen3, prompt):
    with pytest.raises(UserError, match="tokenizer of the same model"):
        run(qwen3, requests([prompt]), GREEDY)


def test_a_prompt_that_exceeds_the_context_is_refused(qwen3):
    with pytest.raises(UserError, match="512 positions"):
        run(qwen3, requests([[1] * 501]), GREEDY)


def test_non_finite_logits_stop_the_run(qwen3):
    qwen3._model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        run(qwen3, requests(PROMPTS), SAMPLED)


def test_close_twice_and_use_after_close(qwen3):
    qwen3.close()
    qwen3.close()
    with pytest.raises(RuntimeError, match="closed"):
        qwen3.generate([], GREEDY)


def test_batch_size_and_device_are_checked(folders, monkeypatch):
    with pytest.raises(ValueError, match="batch_size"):
        LocalEngine(folders["llama"], batch_size=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"engine.device=cpu"):
        LocalEngine(folders["llama"], device="cuda")


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif kind == "tensor missing":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "tensor of another shape":
        tensors = load_file(weights)
        tensors["model.norm.weight"] = torch.ones(5)
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "no config.json"),
        ("no weights", "cannot be loaded"),
        ("truncated", "cannot be loaded"),
        ("tensor missing", r"1 weights .*up_proj"),
        ("tensor of another shape", r"cannot be loaded|model.norm.weight"),
        ("mamba", "engine=sglang"),
    ],
)
def test_a_model_that_cannot_run_is_refused(folders, tmp_path, kind, message):
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen3"], folder)
    damage(folder, kind)
    with pytest.raises(UserError, match=message) as caught:
        LocalEngine(folder)
    assert "\n" not in str(caught.value)
