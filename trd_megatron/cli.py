"""The `trd` command: reads the command line, calls one function, prints. Exit codes: 0, 1 failed, 2 wrong input, 130 interrupted."""

import os
import signal
import sys
import time
from dataclasses import MISSING
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import typer.core
from rich.table import Table
from rich.text import Text

from trd_megatron import __version__
from trd_megatron.convert.commands import app as convert
from trd_megatron.convert.commands import parse_bytes
from trd_megatron.errors import UserError
from trd_megatron.progress import console, output, printable

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Distil a language model on its own attempts, repaired first (Trajectory-Refined Distillation).\n\n"
    "Start with: trd run experiment=smoke   (the whole pipeline in a minute, on a CPU)",
)  # fmt: skip

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="experiment=NAME [KEY=VALUE]...", help="The experiment, then any settings, e.g. learner.learning_rate=1e-5."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/smoke.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.", metavar="STAGE")] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone; what it reads must be done.", metavar="STAGE")] = None,
    allow_untested: Annotated[
        bool, typer.Option("--allow-untested", help="Train with a megatron-core that the learner was not tested with.")
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting with its type, default and meaning, and exit.")] = False,
) -> None:
    """Run an experiment: prepare, rollout, refine, train, export, evaluate, report.

    What is done already with the same settings is skipped; an interrupted stage goes on where it stopped.

    [bold]Examples[/bold]

      trd run experiment=quickstart

      trd run experiment=quickstart method=forward_kl run_dir=runs/forward_kl

      trd run experiment=quickstart data=file data.path=my_problems.jsonl data.test_problems=50 --until refine
    """
    if keys:
        _print_keys()
        return
    from trd_megatron.config import load

    config = load(overrides or [])
    from trd_megatron import pipeline
    from trd_megatron.learner import versions
    from trd_megatron.run_dir import Manifest, RunDir

    if allow_untested:
        os.environ[versions.ALLOW] = "1"
    run_dir = RunDir(config.run_dir, config.name)
    console.print(f"[bold]{config.name}[/bold]: method {config.method.name}, {config.mode}, in {run_dir.path}")
    started = time.monotonic()
    rows: list[tuple[str, Manifest, bool]] = []

    def on_stage(stage: pipeline.Stage, manifest: Manifest, skipped: bool) -> None:
        console.print(f"  {stage.name}: {'done before, skipped' if skipped else f'done in {manifest.seconds:.1f} s'}", highlight=False)
        rows.append((stage.name, manifest, skipped))

    pipeline.run(config, run_dir, until=until, only=only, on_stage=on_stage)
    output.print(_summary(rows))
    report = run_dir.path / "report.html"
    if report.exists() and (until is None or until == "report") and only in (None, "report"):
        console.print(f"report: {report}", highlight=False)
    console.print(f"{time.monotonic() - started:.1f} s in all", highlight=False)


def _summary(rows: list[tuple[str, Any, bool]]) -> Table:
    """What came out of each stage, one line each."""
    table = Table("stage", "result", "seconds", title="Summary")
    for name, manifest, skipped in rows:
        table.add_row(name, _result(name, manifest.counts), "skipped" if skipped else f"{manifest.seconds:.1f}")
    return table


def _result(stage: str, counts: dict[str, Any]) -> str:
    """The figures of a stage's manifest that a reader wants first."""
    if stage == "prepare":
        return f"{counts['train_problems']} problems to train on, {counts['test_problems']} held out"
    if stage in ("rollout", "refine"):
        skipped = f", {counts['skipped_over_budget']} over the prompt budget" if counts["skipped_over_budget"] else ""
        cut = counts["finish_reasons"].get("length", 0)
        rate = 100 * counts["passed"] / max(counts["samples"], 1)
        return f"{counts['samples']} samples, {rate:.1f} % pass, {counts['mean_response_tokens']:.0f} tokens each, {cut} cut off{skipped}"
    if stage == "train":
        before, after = counts["kl_fixed_batch_before"], counts["kl_fixed_batch_after"]
        change = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
        return f"{counts['steps']} steps, held-out KL {before:.4f} -> {after:.4f}{change}"
    if stage.startswith("export"):
        if "adapter_parameters" not in counts:
            return f"step {counts['step']}, every parameter"
        return f"step {counts['step']}, {counts['adapter_parameters']:,} adapter parameters{' merged' if stage == 'export/hf' else ''}"
    if stage.startswith("evaluate"):
        return "; ".join(f"{name}: Avg@{c['k']} {c['avg_at_k']:.1f}, Pass@{c['k']} {c['pass_at_k']:.1f}" for name, c in counts.items())
    return ", ".join(f"{key} {value}" for key, value in counts.items())


@app.command()
def plan(
    overrides: Overrides = None,
    show_sample: Annotated[bool, typer.Option("--show-sample", help="Print one training sequence: prompt dim, response green.")] = False,
) -> None:
    """Show what a run would do: stages and what is cached, sizes, disk and memory. Runs nothing."""
    from trd_megatron.config import load

    config = load(overrides or [])
    from trd_megatron import planning

    for table in planning.tables(config):
        output.print(table)
    if show_sample:
        output.print(planning.sample(config))


@app.command()
def status(run_path: RunPath) -> None:
    """Show the stages of a run: state, counts, rates."""
    from trd_megatron import planning

    output.print(planning.status(run_path))


@app.command()
def report(run_path: RunPath) -> None:
    """Write report.html and report.json of a run anew from what lies there."""
    from trd_megatron.config import from_dict
    from trd_megatron.run_dir import RunDir, read_config

    config = from_dict(read_config(run_path))
    from trd_megatron import pipeline

    pipeline.run(config, RunDir(run_path, config.name), only="report", again=True)
    console.print(f"report: {run_path / 'report.html'}", highlight=False)


@app.command()
def doctor() -> None:
    """Show what this machine has, and what is missing for which feature."""
    from trd_megatron import doctor as checks

    output.print(checks.table())


class Role(StrEnum):
    """Whose servers."""

    student = "student"
    teacher = "teacher"
    both = "both"


@app.command()
def serve(
    overrides: Overrides = None,
    role: Annotated[Role, typer.Option(help="Whose servers to start. In mode=opsd there is only the student.")] = Role.both,
    host: Annotated[str, typer.Option(help="Where they listen. Other than this machine's own needs SGLANG_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the first server; the others follow.")] = 30000,
) -> None:
    """Start the SGLang servers of an experiment and keep them running, for runs that attach to them.

    A run starts servers of its own with engine.launch=true. Servers that outlive a run save the start at every run, and may stand on
    another machine. Where they are and how a run attaches to them is printed when all are healthy; one that dies is started again.
    Ctrl-C stops all.

    Models are model.path and teacher.path; how they are served say engine.device, engine.dtype, engine.student.* and
    engine.teacher.* (`trd run --keys`). Logs go to servers/ in the run directory.

    SGLang is in an environment of its own: `make sglang-cpu` builds one for machines without a GPU, engine.python names another.
    An API key comes from the environment (SGLANG_API_KEY), here and where `trd run` is started.

    [bold]Examples[/bold]

      trd serve experiment=smoke

      trd serve experiment=quickstart --port 31000 engine.student.data_parallel_size=2

      SGLANG_API_KEY=... trd serve experiment=NAME engine=sglang --role teacher --host 0.0.0.0
    """
    from trd_megatron.config import load

    config = load(overrides or [])
    from trd_megatron.engine import serve as serving

    try:
        serving.serve(config, role.value, host, port)
    except KeyboardInterrupt:
        _fail("all servers are stopped", 130)


class _SpacedValues(typer.core.TyperCommand):
    """Reads `--tokens 32 64` as `--tokens 32 --tokens 64`. For commands without arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        words: list[str] = []
        option, values = "", 0
        for word in args:
            if word.startswith("--"):
                option, values = word, 0
            elif option in repeatable:
                words += [option] if values else []
                values += 1
            words.append(word)
        return super().parse_args(ctx, words)


app.add_typer(convert, name="convert")
bench = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich",
    help="Measure this machine: the loss against other ways to compute it, the learner against a Hugging Face + PEFT loop, "
    "the embedded engine against plain generate, checkpoint conversion against cp.",
)  # fmt: skip
app.add_typer(bench, name="bench")
_SIZES = {"tokens": [256, 512, 1024, 2048], "lengths": [64]}
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.", show_default="PyTorch's own choice")]


@bench.command("kl", cls=_SpacedValues)
def bench_kl(
    sides: Annotated[list[str] | None, typer.Option(metavar="SIDE...", help="What to compare.", show_default="all of the above")] = None,
    tokens: Annotated[list[int], typer.Option(metavar="T...", min=1, help="Numbers of tokens, one table each.")] = _SIZES["tokens"],
    hidden: Annotated[int, typer.Option(help="Size of the hidden states, of student and teacher.")] = 1024,
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 151_936,
    chunk: Annotated[int, typer.Option(help="Tokens per chunk of the products; linear_kl keeps its own default.")] = 256,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each side, after one that is not timed.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    ranks: Annotated[int, typer.Option(help="If above 1, also linear_kl over so many ranks, each with its part of the vocabulary.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where bench_kl.json and bench_kl.png go.")] = Path("runs/bench_kl"),
) -> None:
    """Time and memory of the distillation loss: forward KL over the vocabulary and its gradient in the student's hidden states.

    [bold]Sides[/bold], all with the same data, sizes, threads and frozen output layers:

      products: only the three matrix products of each chunk, with torch.mm: the floor

      products_fast: the same products as linear_kl calls them

      linear_kl: this package's loss, with its default arguments

      plain: log_softmax of whole logits, kl_div, autograd

      trl: TRL's GKDTrainer.generalized_jsd_loss on whole logits

      liger, liger_eager: Liger's LigerFusedLinearJSDLoss, compiled as it ships and not compiled

      top64, linear_kl_top64: KL over the teacher's 64 likeliest ids, from whole logits (as NeMo-RL does) and with linear_kl

    TRL and Liger: pip install -e '.\\[bench]'. Without them the tables say so.

    Sides run one at a time in processes of their own and take turns; time is the median of the timed calls. Memory is the highest
    moment above what was there before the first call. Sides that compute the same loss must agree on it. At the default sizes
    trl needs 11 GB.

    [bold]Examples[/bold]

      trd bench kl

      trd bench kl --tokens 256 512 --sides linear_kl plain --ranks 2

      trd bench kl --device cuda --dtype bfloat16 --tokens 4096
    """
    import torch

    from trd_megatron.bench import kl, kl_report

    settings = kl.Settings(
        sides=list(dict.fromkeys(sides or kl.SIDES)),
        tokens=sorted(set(tokens)),
        hidden=hidden,
        vocab=vocab,
        chunk=chunk,
        threads=threads or torch.get_num_threads(),
        repeats=repeats,
        dtype=dtype,
        device=device,
        ranks=ranks,
    )
    console.print(settings.title, highlight=False)
    try:
        kl.benchmark(settings, out, lambda rows: output.print(kl_report.table(rows)))
    except kl.DisagreementError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail(f"interrupted; finished tables are kept in {out}", 130)
    console.print(f"figures: {out / 'bench_kl.json'}, {out / 'bench_kl.png'}", highlight=False)


@bench.command("learner")
def bench_learner(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Folder, hub id or builtin:NAME; may be given again.", show_default="SmolLM2-135M and a 4-layer Qwen3"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps of each side, after one that is not timed.")] = 3,
    threads: Threads = None,
    batch: Annotated[int, typer.Option(help="Samples of one step.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    profile: Annotated[
        bool | None,
        typer.Option("--profile/--no-profile", help="Show where the time of one more of our steps goes.", show_default="--profile on cpu"),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where bench_learner.json goes.")] = Path("runs/bench_learner"),
) -> None:
    """Training tokens per second and peak memory of the learner, beside a Hugging Face + PEFT loop.

    The work is an optimizer step of self-distillation: adapters on all seven projections, the teacher is the student without them,
    forward KL over the whole vocabulary on the response tokens. Token ids are random; lengths are those of real trajectories.

    [bold]Sides[/bold], with the same samples, adapters at the start, dtype, threads and most tokens in one forward:

      ours: the learner in one process, packed sequences, full recomputation

      transformers + PEFT: padded batches, gradient checkpointing, whole logits (trd_megatron/bench/learner_peer.py)

    Each runs in a process of its own and they take turns. Time is the median of the timed steps; tokens are those of the student's
    sequences, without padding. Memory is the highest moment of training above what was there before the model was loaded. Loss and
    gradient norm of the first step must agree. The 4-layer Qwen3 is made at first use and kept (870 MB); with it the two
    sides need about 5 GB.

    [bold]Examples[/bold]

      trd bench learner --threads 2

      trd bench learner --model builtin:smollm2-135m-instruct --batch 16

      trd bench learner --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16
    """
    import torch

    from trd_megatron.bench import learner, learner_report
    from trd_megatron.bench.learner_work import MODELS

    settings = learner.Settings(
        models=list(dict.fromkeys(model or MODELS)),
        batch=batch,
        repeats=repeats,
        threads=threads or torch.get_num_threads(),
        device=device,
        dtype=dtype,
        profile=device == "cpu" if profile is None else profile,
    )
    console.print(settings.title, highlight=False)

    def show(result: learner.Result) -> None:
        output.print(learner_report.table(result.rows, f"{100 * result.peer_padding:.0f} % of their tokens are padding"))
        if result.profile:
            output.print(learner_report.profile_table(result.rows[0].model, result.profile))

    try:
        learner.benchmark(settings, out, show)
    except learner.DisagreementError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail(f"interrupted; finished tables are kept in {out}", 130)
    console.print(f"figures: {out / 'bench_learner.json'}", highlight=False)


@bench.command("engine", cls=_SpacedValues)
def bench_engine(
    model: Annotated[str, typer.Option(help="Folder, hub id or builtin:NAME.")] = "builtin:smollm2-135m-instruct",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once, of both.")] = 32,
    prompts: Annotated[int, typer.Option(min=1, help="Distinct prompts, of random ids.")] = 32,
    lengths: Annotated[list[int], typer.Option(metavar="N...", min=1, help="Prompt lengths in tokens, in turn.")] = _SIZES["lengths"],
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens drawn for each sample.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, after a short one that is not timed.")] = 3,
    threads: Threads = None,
) -> None:
    """Tokens per second of the embedded engine and of plain model.generate: same model, prompts, sampling and number of tokens.

    Float32 on the CPU, in one process, taking turns; the figures are medians over the rounds.

    [bold]Examples[/bold]

      trd bench engine

      trd bench engine --prompts 8 --samples 4

      trd bench engine --lengths 20 40 60 80 --threads 2
    """
    from trd_megatron.bench import engine

    engine.run(model, batch_size, prompts, lengths, samples, max_new_tokens, repeats, threads)


@bench.command("convert")
def bench_convert(
    size: Annotated[str, typer.Option(metavar="SIZE", help="Least bytes of the model's weights, e.g. 500MB.")] = "8GB",
    repeats: Annotated[int, typer.Option(help="Runs of each conversion, and of cp beside it.")] = 3,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where bench_convert.json goes; its disk is the one that is measured.")
    ] = Path("runs/bench_convert"),
) -> None:
    """Time and peak memory of hf-to-megatron, megatron-to-hf and merge-lora, beside cp of the same files on the same disk.

    The model is a random Llama in bfloat16 with layers of Llama-3.1-8B (narrower ones below 4 GB), made for this and deleted
    afterwards, also on Ctrl-C. Three times its size must be free in --out.

    Before each run the source is taken out of the page cache. Conversions sync every file and write its sha256; cp is followed by a sync
    of its files ("cp alone" is the time before that). The two take turns. Time is the median of the runs (least-most), without the start
    of Python and imports, which has a column of its own. Memory is the highest resident set of the whole process, libraries included;
    pages of files that it reads and writes belong to the system and are not in it. After megatron-to-hf the model must be bit-equal.

    [bold]Examples[/bold]

      trd bench convert

      trd bench convert --size 500MB --out /data/bench_convert
    """
    from trd_megatron.bench import children, convert_report
    from trd_megatron.bench import convert as converting

    settings = converting.Settings(size=parse_bytes(size, "--size"), repeats=repeats)
    console.print(settings.title, highlight=False)
    try:
        rows = converting.benchmark(settings, out)
    except (converting.DisagreementError, children.ChildFailedError) as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail(f"interrupted; figures of finished conversions are kept in {out}, the models are deleted", 130)
    output.print(convert_report.table(rows, settings.title))
    console.print(f"figures: {out / 'bench_convert.json'}", highlight=False)


def _print_keys() -> None:
    from trd_megatron.config import conf_dir, groups, leaves, options

    for group in groups():
        typer.echo(f"{group}={'|'.join(options(group))}   (files in {conf_dir() / group})")
    typer.echo("")
    for key, field in leaves():
        default = field.default if field.default_factory is MISSING else field.default_factory()
        kind = field.type.__name__ if isinstance(field.type, type) and not get_args(field.type) else field.type
        choices = field.metadata["choices"]
        values = f" ({' | '.join(choices)})" if choices else ""
        typer.echo(f"{key}: {kind} = {default}{values}\n    {field.metadata['help']}")


def main() -> None:
    """Entry point: maps exceptions to exit codes, one line each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our bars show what takes long
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in what they start in the background
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop us with it: end as Ctrl-C does, saving what can be
    try:
        code = app(standalone_mode=False)  # returns what an Exit says, and 130 for Ctrl-C
        if code == 130:
            _interrupted()
        sys.exit(code)
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error; typer brings click along under a private name
            if not error.format_message():  # nothing was asked, the help is printed
                sys.exit(2)
            _fail(error.format_message(), 2)
        from trd_megatron.engine.base import EngineFailedError
        from trd_megatron.learner.job import LearnerFailedError

        if isinstance(error, EngineFailedError | LearnerFailedError | OSError):
            _fail(f"{type(error).__name__}: {error}", 1)
        raise


def _interrupted() -> None:
    converting = sys.argv[1:2] == ["convert"]
    _fail(f"interrupted; {'nothing was written' if converting else 'the same command goes on where it stopped'}", 130)


def _fail(message: str, code: int) -> None:
    lines = message.splitlines() if code == 1 else [message]  # what the user did wrong is one line, whatever names are in it
    shown = "\n".join(map(printable, lines))
    text = Text("" if code == 130 else "error: ", style="red").append(shown, style="default")  # Text: no markup in messages
    console.print(text, highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
