"""`trd convert`: parses, calls one function of operations.py, prints. tools/convert_checkpoint.py is the same."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from trd_megatron.errors import UserError
from trd_megatron.progress import output, printable

if TYPE_CHECKING:  # `trd --help` does not wait for it
    import torch

app = typer.Typer(
    name="convert", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    help="Convert checkpoints between Hugging Face and Megatron, merge adapters, look at and compare checkpoints.\n\n"
    "Everything is written to a temporary folder that becomes the output when it is whole. No GPU and no ranks are needed, and memory "
    "stays at two parameters, whatever the size of the model (docs/checkpoints.md).",
)  # fmt: skip

# Large pages for tensors, where the system gives them on request: most of a conversion is touching fresh memory. PyTorch reads this
# when it is imported.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}
DTYPES = ("float64", "float32", "float16", "bfloat16")

Dtype = Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}.", metavar="DTYPE", show_default="the source's")]
Tp = Annotated[
    int,
    typer.Option(
        min=1,
        help="Tensor parallel size to lay tensors out for (others read them too); the vocabulary is padded to its multiple.",
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model*.bin, as weights only, where there are no safetensors.")
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of one safetensors file, e.g. 500MB.")]
Model = Annotated[str, typer.Option(metavar="MODEL", help="Folder in Hugging Face layout, hub id or builtin:NAME.")]


@app.callback()
def _main() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@app.command("hf-to-megatron")
def hf_to_megatron(
    hf_path: Model,
    megatron_path: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to make.")],
    tensor_model_parallel_size: Tp = 1,
    dtype: Dtype = None,
    allow_pickle: AllowPickle = False,
    backend: Annotated[
        str, typer.Option(help="own, or bridge: Megatron-Bridge, where it is installed, for architectures that are not ours.")
    ] = "own",
) -> None:
    """Hugging Face to Megatron's distributed checkpoint (torch_dist).

    The result loads with Megatron-Core, Megatron-LM and Megatron-Bridge at any tensor, pipeline, data and expert parallel size.

    [bold]Examples[/bold]

      trd convert hf-to-megatron --hf-path Qwen/Qwen3-8B --megatron-path ckpt/qwen3-8b --tensor-model-parallel-size 4

      trd convert hf-to-megatron --hf-path builtin:smollm2-135m-instruct --megatron-path ckpt/smollm2 --dtype bfloat16
    """
    from trd_megatron.convert import bridge, operations

    if backend == "bridge":
        if dtype is not None or allow_pickle or tensor_model_parallel_size != 1:
            raise UserError("--backend bridge takes no --dtype, --allow-pickle or --tensor-model-parallel-size: leave them out")
        bridge.import_hf(hf_path, megatron_path)
    elif backend != "own":
        raise UserError(f"--backend {backend}: it is own or bridge")
    else:
        operations.hf_to_megatron(
            hf_path,
            megatron_path,
            tensor_model_parallel_size=tensor_model_parallel_size,
            dtype=_dtype(dtype),
            allow_pickle=allow_pickle,
        )
    _wrote(megatron_path)


@app.command("megatron-to-hf")
def megatron_to_hf(
    megatron_path: Annotated[Path, typer.Option(metavar="FOLDER", help="A torch_dist checkpoint, or the folder of its tracker file.")],
    hf_path: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to make.")],
    base_path: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Where config and tokenizer come from.", show_default="those beside the weights"),
    ] = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "2GB",
) -> None:
    """Megatron's distributed checkpoint to Hugging Face: safetensors with an index, config, tokenizer and chat template.

    Reads what Megatron-Core, Megatron-LM and Megatron-Bridge save, at any parallel layout, and checkpoints of `trd run` with
    learner.trainable=full. Padding of the vocabulary is cut off.

    [bold]Examples[/bold]

      trd convert megatron-to-hf --megatron-path ckpt/qwen3-8b --hf-path qwen3-8b

      trd convert megatron-to-hf --megatron-path megatron_lm_run/iter_0001000 --base-path Qwen/Qwen3-8B --hf-path trained
    """
    from trd_megatron.convert import operations

    operations.megatron_to_hf(
        megatron_path, hf_path, base_path=base_path, dtype=_dtype(dtype), max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size")
    )
    _wrote(hf_path)


@app.command("merge-lora")
def merge_lora(
    base_path: Model,
    adapter_path: Annotated[Path, typer.Option(metavar="FOLDER", help="A PEFT folder, or train/checkpoints/step_N of a run.")],
    output_path: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to make.")],
    dtype: Dtype = None,
    allow_pickle: AllowPickle = False,
    max_shard_size: ShardSize = "2GB",
) -> None:
    """Merge a LoRA adapter into its base model, in float32, as a Hugging Face folder.

    Names and shapes are checked before anything is written.

    [bold]Example[/bold]

      trd convert merge-lora --base-path Qwen/Qwen3-8B --adapter-path runs/x/adapter --output-path merged
    """
    from trd_megatron.convert import operations

    operations.merge_lora(
        base_path,
        adapter_path,
        output_path,
        dtype=_dtype(dtype),
        allow_pickle=allow_pickle,
        max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size"),
    )
    _wrote(output_path)


@app.command("export-peft")
def export_peft(
    megatron_path: Annotated[Path, typer.Option(metavar="FOLDER", help="train/checkpoints/step_N of a run.")],
    output_path: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to make.")],
    base_path: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model.", show_default="the one that the run names")
    ] = None,
) -> None:
    """The adapter in a checkpoint of a run as a PEFT folder, which peft.PeftModel.from_pretrained and SGLang load.

    [bold]Example[/bold]

      trd convert export-peft --megatron-path runs/x/train/checkpoints/step_100 --output-path adapter
    """
    from trd_megatron.convert import operations

    operations.export_peft(megatron_path, output_path, base_path=base_path)
    _wrote(output_path)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of either format, a PEFT folder, a hub id or builtin:NAME.")
    ],
    every: Annotated[bool, typer.Option("--all", help="Every tensor; without it, layers that are alike are one line.")] = False,
) -> None:
    """What a checkpoint holds: architecture, tensors with shapes and dtypes, sizes, versions, where it comes from.

    [bold]Example[/bold]

      trd convert inspect ckpt/qwen3-8b
    """
    from trd_megatron.builtin_models import local
    from trd_megatron.convert import inspect as looking

    for part in looking.describe(local(path), every=every):
        output.print(part, highlight=False)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint of either format, hub id or builtin:NAME.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with.")],
    base_path: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Config and tokenizer of a Megatron checkpoint that has none beside it.")
    ] = None,
    no_logits: Annotated[
        bool, typer.Option("--no-logits", help="Compare files alone; the logits need both whole models in memory, one after the other.")
    ] = False,
) -> None:
    """Compare two checkpoints: checksums, names, shapes, dtypes, every bit, and logits on a few prompts. Exit code 1 if they differ.

    Logits are computed in float32: of a Hugging Face folder by transformers, of a Megatron checkpoint by Megatron-Core after its own
    loader has read it.

    [bold]Example[/bold]

      trd convert verify Qwen/Qwen3-8B ckpt/qwen3-8b --no-logits
    """
    from trd_megatron.convert import verify as comparing

    report = comparing.compare(a, b, base_path=base_path, logits=not no_logits)
    output.print(report.table, highlight=False)
    output.print(report.verdict, highlight=False)
    if not report.same:
        raise typer.Exit(1)


def _wrote(folder: Path) -> None:
    output.print(Text(printable(f"wrote {folder}")), soft_wrap=True)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"--dtype {name}: it is one of {', '.join(DTYPES)}")
    import torch

    return None if name is None else getattr(torch, name)


def parse_bytes(size: str, option: str) -> int:
    """Bytes of a size such as 500MB. Raises UserError that names the option."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMG]?)B?", size.upper())
    if found is None or not float(found[1]):
        raise UserError(f"{option} {size}: give a size such as 500MB or 2GB")
    return int(float(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[found[2]])
