"""Which implementations the layers are made of. Transformer Engine is not installed here: specs and configurations are built, not run."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config

from tests import tiny
from trd_megatron.config import LearnerConfig, load
from trd_megatron.convert.architecture import Architecture, Experts, Rope
from trd_megatron.errors import UserError
from trd_megatron.learner.attention import SegmentedAttention
from trd_megatron.learner.model import RMSNorm, block_spec, transformer_config
from trd_megatron.learner.packing import Cut, Sample, micro_batches, pack, pieces
from trd_megatron.learner.stack import FP8_RECIPES, Installed, Stack, check_shapes, choose, precision, token_multiple
from trd_megatron.learner.train import Trainer

NOTHING = Installed(None, apex=False, wgrad_fusion=False)
EVERYTHING = Installed("2.9.0", apex=True, wgrad_fusion=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return Architecture.from_hf(tiny.make("qwen3", tmp_path_factory.mktemp("model")))


def cuda(**settings: Any) -> LearnerConfig:
    return LearnerConfig(device="cuda", **settings)


@pytest.mark.parametrize(
    ("config", "installed", "engine"),
    [
        (cuda(), EVERYTHING, True),
        (cuda(transformer_impl="transformer_engine"), EVERYTHING, True),
        (cuda(), NOTHING, False),
        (cuda(), Installed("1.13.0", apex=False, wgrad_fusion=False), False),
        (cuda(transformer_impl="local"), EVERYTHING, False),
        (cuda(dtype="float32"), EVERYTHING, False),
        (LearnerConfig(device="cpu", dtype="bfloat16"), EVERYTHING, False),
    ],
)
def test_transformer_engine_is_used_where_it_can_be_and_its_absence_is_said(
    config: LearnerConfig, installed: Installed, engine: bool
) -> None:
    stack = choose(config, installed)
    assert stack.transformer_engine is engine
    assert bool(stack.notes) is (config.device == "cuda" and not engine)


def test_what_is_asked_for_and_missing_is_an_error() -> None:
    with pytest.raises(UserError, match="is not installed: install it, or set it to auto"):
        choose(cuda(transformer_impl="transformer_engine"), NOTHING)
    with pytest.raises(UserError, match=r"learner\.fp8=current.*1\.13\.0 is older than 2\.1"):
        choose(cuda(fp8="current"), Installed("1.13.0", apex=False, wgrad_fusion=False))
    with pytest.raises(UserError, match=r"learner\.fp8=blockwise needs Transformer Engine 2\.3 or newer, not 2\.2\.0"):
        choose(cuda(fp8="blockwise"), Installed("2.2.0", apex=False, wgrad_fusion=False))
    with pytest.raises(UserError, match=r"mxfp8 needs a GPU of compute capability 10\.0 or newer, not 9\.0"):
        FP8_RECIPES["mxfp8"].check("mxfp8", "2.9.0", (9, 0))


@pytest.mark.parametrize("place", ["", "transformer_engine", "transformer_engine/wheel_lib"])
def test_transformer_engine_counts_with_its_extension_for_pytorch_alone(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its extension lies beside the package (built from source) or in it (PyPI's wheel)."""
    (tmp_path / "transformer_engine" / "wheel_lib").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('imported')")
    info = tmp_path / "transformer_engine-2.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.9.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Installed.find().transformer_engine is None
    (tmp_path / place / "transformer_engine_torch.cpython-311-x86_64-linux-gnu.so").touch()
    assert Installed.find() == Installed("2.9.0", apex=False, wgrad_fusion=False)


def test_context_parallelism_on_gpus_needs_transformer_engines_attention() -> None:
    config = cuda(context_parallel_size=2)
    assert choose(config, EVERYTHING).transformer_engine
    with pytest.raises(UserError, match=r"learner\.context_parallel_size above 1 needs Transformer Engine"):
        choose(config, NOTHING)
    assert not choose(LearnerConfig(device="cpu", context_parallel_size=2), NOTHING).transformer_engine


def test_fp8_is_refused_for_layers_that_it_cannot_do(architecture: Architecture) -> None:
    with pytest.raises(UserError, match=r"fp8_bf16_layers=1 leaves no layer of m in fp8, which has 2"):
        check_shapes(cuda(fp8="current", fp8_bf16_layers=1), architecture, "m")
    with pytest.raises(UserError, match=r"fp8=current needs layer sizes that 16 divides; q_proj of m has 40"):
        check_shapes(cuda(fp8="current"), architecture, "m")
    check_shapes(cuda(), architecture, "m")
    fitting = replace(
        architecture, num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_query_groups=2, head_dim=64
    )
    for recipe in FP8_RECIPES:
        check_shapes(cuda(fp8=recipe, fp8_bf16_layers=1), fitting, "m")
    experts = replace(fitting, experts=Experts(8, 2, 64, normalized=True, aux_loss_coefficient=0.001))
    check_shapes(cuda(fp8="current"), experts, "m")
    with pytest.raises(UserError, match="128 divides; gate_proj of m has 64 on a rank"):
        check_shapes(cuda(fp8="blockwise"), experts, "m")
    with pytest.raises(UserError, match="128 divides; k_proj of m has 64 on a rank"):
        check_shapes(cuda(fp8="blockwise", tensor_model_parallel_size=2), fitting, "m")


def test_weight_gradients_are_fused_for_full_training_with_apex_alone() -> None:
    assert choose(cuda(trainable="full"), EVERYTHING).gradient_accumulation_fusion
    assert not choose(cuda(), EVERYTHING).gradient_accumulation_fusion
    without = choose(cuda(trainable="full"), Installed("2.9.0", apex=False, wgrad_fusion=False))
    assert not without.gradient_accumulation_fusion
    assert "Apex" in without.notes[0]


def modules(architecture: Architecture, stack: Stack) -> dict[str, Any]:
    block = block_spec(architecture, stack)
    assert block.layer_specs is not None and len(block.layer_specs) == architecture.num_layers
    layer = block.layer_specs[0].submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    if architecture.experts is not None:
        mlp = mlp.experts.submodules
    return {
        "norms": {layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm, block.layer_norm},
        "column": {attention.linear_qkv, mlp.linear_fc1},
        "row": {attention.linear_proj, mlp.linear_fc2},
        "attention": {attention.core_attention},
    }


@pytest.mark.parametrize("experts", [None, Experts(6, 2, 20, normalized=True, aux_loss_coefficient=0.001)])
def test_the_layers_are_transformer_engines_or_local(experts: Experts | None, architecture: Architecture) -> None:
    architecture = replace(architecture, experts=experts)
    assert modules(architecture, choose(cuda(), EVERYTHING)) == {
        "norms": {te.TENorm},
        "column": {te.TEColumnParallelLinear},
        "row": {te.TERowParallelLinear},
        "attention": {te.TEDotProductAttention},
    }
    local = modules(architecture, choose(cuda(), NOTHING))
    assert local["norms"] == {RMSNorm}
    assert local["attention"] == {SegmentedAttention}
    assert {module.__name__ for module in local["column"] | local["row"]} == {"ColumnParallelLinear", "RowParallelLinear"}


def place(tp: int, cp: int, device: str = "cuda") -> Any:
    return SimpleNamespace(tp_size=tp, cp_size=cp, sequence_parallel=tp > 1, device=torch.device(device))


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8_reaches_megatrons_configuration(recipe: str, architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):  # Megatron looks whether they are there
        monkeypatch.setattr(rope_utils, name, lambda: None)
    ends = 0 if recipe == "delayed" else 1
    config = cuda(fp8=recipe, fp8_bf16_layers=ends, recompute="selective", tensor_model_parallel_size=2, sequence_parallel=True)
    built = transformer_config(architecture, config, place(2, 2), choose(config, EVERYTHING))
    assert (built.fp8, built.fp8_recipe) == (FP8_RECIPES[recipe].number_format, FP8_RECIPES[recipe].megatron)
    assert (built.first_last_layers_bf16, built.tp_only_amax_red, built.context_parallel_size) == (ends > 0, True, 2)
    assert (built.recompute_granularity, built.recompute_modules, built.apply_rope_fusion) == ("selective", ["mlp"], True)
    if ends:
        assert (built.num_layers_at_start_in_bf16, built.num_layers_at_end_in_bf16) == (1, 1)
    assert token_multiple(config, place(2, 2)) == 2 * FP8_RECIPES[recipe].token_multiple
    text = precision(config)
    assert recipe in text
    assert ("layers at each end" in text) is (ends > 0)


def test_yarn_and_experts_reach_megatrons_configuration(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(rope_utils, name, lambda: None)
    config = cuda()
    plain = transformer_config(architecture, config, place(1, 1), choose(config, EVERYTHING))
    assert plain.apply_rope_fusion
    assert not [name for name in dir(plain) if name.startswith("yarn_")]  # Megatron decides by their presence
    assert plain.num_moe_experts is None
    rope = Rope(1e4, "yarn", 4.0, original_max_position_embeddings=32, mscales=(1.0, 0.5))
    other = replace(architecture, rope=rope, experts=Experts(6, 2, 20, normalized=False, aux_loss_coefficient=0.001))
    built: Any = transformer_config(other, config, place(1, 1), choose(config, EVERYTHING))
    assert not built.apply_rope_fusion  # it would leave the factor out
    assert _yarn_get_concentration_factor_from_config(built) == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert (built.num_moe_experts, built.moe_router_topk, built.moe_ffn_hidden_size, built.moe_router_pre_softmax) == (6, 2, 20, True)


def test_a_student_with_experts_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path} has experts, which the learner does not train"):
        Trainer(load(["experiment=smoke"]), tiny.make("qwen3-moe", tmp_path), None, place(1, 1, "cpu"))


def test_without_fp8_nothing_of_it_is_configured(architecture: Architecture) -> None:
    config = LearnerConfig(device="cpu", dtype="float32", recompute="none")
    built = transformer_config(architecture, config, place(1, 1, "cpu"), choose(config, NOTHING))
    assert built.fp8 is None
    assert built.recompute_granularity is None
    assert not built.apply_rope_fusion
    assert token_multiple(config, place(1, 1, "cpu")) == 1


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_context_parallel_ranks_share_every_sequence_alike(cp: int, multiple: int) -> None:
    prompts, responses = [[1, 2, 3], [4], list(range(20, 41))], [[5, 6], [7, 8, 9], list(range(50, 63))]
    parts = [pack(prompts, responses, Cut(multiple, cp, rank), CPU, [11, 12, 13]) for rank in range(cp)]
    lengths = {len(part.ids) for part in parts}
    assert len(lengths) == 1
    assert lengths.pop() % multiple == 0
    flat = [token for response in responses for token in response]
    predicted = torch.cat([part.responses for part in parts])
    assert sorted(predicted.tolist()) == list(range(len(flat)))  # every response token on one rank
    for rank, part in enumerate(parts):
        assert part.targets.tolist() == [flat[i] for i in part.responses.tolist()]
        whole = pack(prompts, responses, Cut(cp * multiple), CPU, [11, 12, 13])
        assert part.response_tokens == whole.response_tokens == len(flat)
        assert part.cu_seqlens.diff().remainder(2 * cp).eq(0).all()
        assert part.rows.tolist() == sorted(part.rows.tolist())
        for start, end in zip(part.cu_seqlens[:-1].tolist(), part.cu_seqlens[1:].tolist(), strict=True):
            held = pieces(torch.tensor([start, end]), cp, rank)
            assert len(held) == (end - start) // cp
    together = torch.cat([pieces(parts[0].cu_seqlens, cp, rank) for rank in range(cp)])
    assert sorted(together.tolist()) == list(range(int(parts[0].cu_seqlens[-1])))
    assert torch.cat([part.ids for part in parts])[together.argsort()].tolist()[:5] == [1, 2, 3, 5, 6]


def test_a_value_of_every_sample_reaches_its_rows() -> None:
    samples = [Sample("a", 0, [1], [2, 3], [4, 5]), Sample("b", 0, [6, 7], [8], [9])]
    [whole] = micro_batches(samples, 20, Cut(), CPU)
    assert whole.of_rows([True, False]).tolist() == [True, True, False]
    halves = [micro_batches(samples, 20, Cut(1, 2, rank), CPU)[0] for rank in range(2)]
    joined = []
    for half in halves:
        joined += zip(half.student.responses.tolist(), half.of_rows([True, False]).tolist(), strict=True)
    assert sorted(joined) == [(0, True), (1, True), (2, False)]
