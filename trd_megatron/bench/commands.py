"""`trd bench`: parses, calls one function of this package, prints. tools/bench_*.py are the same."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from trd_megatron.convert.commands import parse_bytes
from trd_megatron.progress import console, fail, output


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


app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich",
    help="Measure this machine: the loss against other ways to compute it, the learner against a Hugging Face + PEFT loop, "
    "SGLang against the embedded engine and plain generate, checkpoint conversion against cp, the graders.",
)  # fmt: skip
_SIZES = {"tokens": [256, 512, 1024, 2048], "lengths": [64], "concurrency": [32]}
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.", show_default="PyTorch's own choice")]


@app.command("kl", cls=_SpacedValues)
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
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail(f"interrupted; finished tables are kept in {out}", 130)
    console.print(f"figures: {out / 'bench_kl.json'}, {out / 'bench_kl.png'}", highlight=False)


@app.command("learner")
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
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail(f"interrupted; finished tables are kept in {out}", 130)
    console.print(f"figures: {out / 'bench_learner.json'}", highlight=False)


@app.command("engine", cls=_SpacedValues)
def bench_engine(
    model: Annotated[str, typer.Option(help="Folder, hub id or builtin:NAME.")] = "builtin:smollm2-135m-instruct",
    sides: Annotated[list[str] | None, typer.Option(metavar="SIDE...", help="What to compare.", show_default="all of the above")] = None,
    concurrency: Annotated[list[int], typer.Option(metavar="N...", min=1, help="Responses drawn at once.")] = _SIZES["concurrency"],
    prompts: Annotated[int, typer.Option(min=1, help="Most distinct prompts of a round, of random ids.")] = 32,
    lengths: Annotated[list[int], typer.Option(metavar="N...", min=1, help="Prompt lengths in tokens, in turn.")] = _SIZES["lengths"],
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens drawn for each sample.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, after one that is not timed.")] = 3,
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL...", help="SGLang servers that run already, with this model.", show_default="one is launched"),
    ] = None,
    client: Annotated[
        bool, typer.Option("--client", help="Measure the client alone instead: 10,000 requests to a server that answers at once.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where bench_engine.json and .png go.")] = Path("runs/bench_engine"),
) -> None:
    """Tokens per second of SGLang, of the embedded engine and of plain model.generate.

    [bold]Sides[/bold], all with the same model, prompts, sampling and number of tokens, taking turns:

      sglang: a server, asked by the client that runs use. One is launched on this machine, or give --url

      local: the embedded engine

      plain: transformers' model.generate, in batches

    A round at a concurrency of N draws 4 N responses, fewer where there are not so many prompts. sglang has N requests in flight, the
    others decode N at once and wait for the last of them. The end of turn ends nothing, so every response has as many tokens: real ones
    differ in length, which favours sglang more than these figures show. Prompts are new in each round. Figures are medians
    (least-most) and count response tokens; the loading of models and the start of servers are not in them.

    [bold]Examples[/bold]

      trd bench engine --concurrency 1 8 32

      trd bench engine --sides local plain --prompts 8 --samples 4

      trd bench engine --client

      trd bench engine --model Qwen/Qwen3-1.7B --device cuda --dtype bfloat16 --concurrency 64 256 --prompts 1024
    """
    import torch

    from trd_megatron.bench import engine, engine_report, engine_sides

    if client:
        for name, value in engine.client_alone(out).items():
            output.print(f"{name.replace('_', ' '):<20} {value:,.3g}" if value < 1000 else f"{name.replace('_', ' '):<20} {value:,.0f}")
        console.print(f"figures: {out / 'bench_client.json'}", highlight=False)
        return
    settings = engine_sides.Settings(
        model=model,
        sides=list(dict.fromkeys(sides or engine_sides.SIDES)),
        concurrency=sorted(set(concurrency)),
        prompts=prompts,
        lengths=lengths,
        samples=samples,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        threads=threads or torch.get_num_threads(),
        device=device,
        dtype=dtype,
        urls=list(dict.fromkeys(url or [])),
    )
    try:
        rows = engine.benchmark(settings, out, lambda line: console.print(line, highlight=False, markup=False))
    except KeyboardInterrupt:
        fail(f"interrupted; figures of finished concurrencies are kept in {out}", 130)
    output.print(engine_report.table(rows, settings.title))
    console.print(f"figures: {out / 'bench_engine.json'}, {out / 'bench_engine.png'}", highlight=False)
    if not any(row.status == "measured" for row in rows):
        fail("no side could be measured", 1)


@app.command("convert")
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
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail(f"interrupted; figures of finished conversions are kept in {out}, the models are deleted", 130)
    output.print(convert_report.table(rows, settings.title))
    console.print(f"figures: {out / 'bench_convert.json'}", highlight=False)


@app.command("grade")
def bench_grade(
    math: Annotated[int, typer.Option(min=0, help="Answers to grade.")] = 10_000,
    code: Annotated[int, typer.Option(min=0, help="Programs to grade.")] = 1_000,
    workers: Annotated[int, typer.Option(min=1, help="Grading processes.")] = 2,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Measure programs where there is no full sandbox.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where bench_grade.json goes.")] = Path("runs/bench_grade"),
) -> None:
    """Answers and programs graded per second.

    Items are made: answers of ten kinds with up to 40,000 characters of reasoning before them, and programs of one or two lines with one
    test each. Half of them are wrong. The start of the workers does not count.

    [bold]Examples[/bold]

      trd bench grade

      trd bench grade --math 0 --code 200 --workers 8
    """
    from rich.table import Table

    from trd_megatron.bench import grade, record
    from trd_megatron.run_dir import write_json
    from trd_megatron.verify.grader import LIBRARIES

    record.prepare(out, "cpu")
    table = Table("graded", "items", "workers", "seconds", "items/s", "misjudged", "verdicts", title="Grading")
    figures = {}
    for name, count in (("math", math), ("code", code)):
        if count:
            console.print(f"{name}: {count} items", highlight=False)
            found = grade.measure_math(count, workers) if name == "math" else grade.measure_code(count, workers, allow_unsandboxed)
            verdicts = ", ".join(f"{verdict} {number}" for verdict, number in sorted(found["verdicts"].items()))
            cells = (f"{found['seconds']:.1f}", f"{found['items_per_s']:.1f}", f"{found['misjudged']}", verdicts)
            table.add_row(name, f"{count}", f"{workers}", *cells)
            figures[name] = found
            write_json(out / "bench_grade.json", {"versions": record.versions(LIBRARIES), "machine": record.machine("cpu")} | figures)
    output.print(table)
    console.print(f"figures: {out / 'bench_grade.json'}", highlight=False)


@app.command("memory")
def bench_memory(
    only: Annotated[str | None, typer.Option(metavar="WORDS", help="Only the cases that have these words in their name.")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where bench_memory.json goes.")] = Path("runs/bench_memory"),
) -> None:
    """What `trd plan` predicts of a learner rank's memory, beside what the learner's ranks really took at most.

    Small random models of several shapes are trained for three steps, on the CPU. The planner's two fitted constants come from
    the cases that say so. About seven minutes, up to 5 GB of memory.

    [bold]Examples[/bold]

      trd bench memory

      trd bench memory --only "every parameter"
    """
    from rich.table import Table

    from trd_megatron.bench import record
    from trd_megatron.capacity import check
    from trd_megatron.run_dir import write_json

    cases = [case for case in check.CASES if only is None or only in case.name]
    record.prepare(out, "cpu")
    columns = ("case", "fitted", "measured, GiB", "predicted, GiB", "error", "error without the interpreter")
    table = Table(*columns, title=f"Peak memory of a rank; bound {check.BOUND:.0%}")
    figures: list[dict[str, Any]] = []
    for found in check.check(cases):
        measured, predicted = found.measured / 2**30, found.predicted.total / 2**30
        errors = [f"{100 * error:+.1f} %" for error in (found.error, found.error_above)]
        table.add_row(found.case.name, "yes" if found.case.fitted else "", f"{measured:.2f}", f"{predicted:.2f}", *errors)
        console.print(f"{found.case.name}: measured {measured:.2f} GiB, predicted {predicted:.2f}", highlight=False)
        figures.append({"case": found.case.name, "fitted": found.case.fitted, "measured_gib": measured, "predicted_gib": predicted})
        write_json(out / "bench_memory.json", {"versions": record.versions(("torch", "megatron-core")), "machine": record.machine("cpu"),
                                               "cases": figures})  # fmt: skip
    output.print(table)
    console.print(f"figures: {out / 'bench_memory.json'}", highlight=False)
    inside = [figure for figure, case in zip(figures, cases, strict=True) if not case.outside]
    if any(abs(figure["predicted_gib"] / figure["measured_gib"] - 1) > check.BOUND for figure in inside):
        fail(f"a prediction is off by more than {check.BOUND:.0%}", 1)
