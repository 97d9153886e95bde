"""The `trd` command: reads the command line, calls one function, prints. Exit codes: 0, 1 failed, 2 wrong input, 130 interrupted."""

import errno
import os
import signal
import sys
import time
from dataclasses import MISSING
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from trd_megatron import __version__
from trd_megatron.bench.commands import app as bench
from trd_megatron.convert.commands import app as convert
from trd_megatron.errors import UserError
from trd_megatron.progress import console, fail, output, printable

if TYPE_CHECKING:
    from trd_megatron.config import Config
    from trd_megatron.pipeline import Work
    from trd_megatron.run_dir import Manifest

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
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage, with several rounds that of the first; 1/STAGE: of round 1.", metavar="STAGE")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Run this stage alone; what it reads must be done. With several rounds in all that have it; 1/STAGE: in round 1.",
            metavar="STAGE",
        ),
    ] = None,
    allow_untested: Annotated[
        bool, typer.Option("--allow-untested", help="Train with a megatron-core that the learner was not tested with.")
    ] = False,
    multirun: Annotated[
        bool,
        typer.Option(
            "--multirun",
            "-m",
            help="Settings may have several values (method=trd,forward_kl seed=0,1,2): a run for each combination, and a comparison.",
        ),
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting with its type, default and meaning, and exit.")] = False,
) -> None:
    """Run an experiment: prepare, rollout, refine, train, export, evaluate, report.

    What is done already with the same settings is skipped; an interrupted stage goes on where it stopped.

    [bold]Examples[/bold]

      trd run experiment=quickstart

      trd run experiment=quickstart method=forward_kl run_dir=runs/forward_kl

      trd run experiment=quickstart data=file data.path=my_problems.jsonl data.test_problems=50 --until refine

      trd run --multirun experiment=lab method=trd,forward_kl seed=0,1,2
    """
    if keys:
        _print_keys()
        return
    from trd_megatron.config import load

    if allow_untested:
        from trd_megatron.learner import versions

        os.environ[versions.ALLOW] = "1"
    if multirun:
        if until or only:
            raise UserError("--multirun runs everything: leave --until and --only out")
        _multirun(overrides or [])
        return
    config = load(overrides or [])
    started = time.monotonic()
    _run_stages(config, until, only)
    report = Path(config.run_dir) / "report.html"
    if report.exists() and (until is None or until == "report") and only in (None, "report"):
        console.print(f"report: {report}", highlight=False)
    console.print(f"{time.monotonic() - started:.1f} s in all", highlight=False)


def _run_stages(config: "Config", until: str | None, only: str | None) -> None:
    from trd_megatron import paper, pipeline
    from trd_megatron.run_dir import Manifest, RunDir

    run_dir = RunDir(config.run_dir, config.name)
    console.print(f"{config.name}: {_does(config)}, in {run_dir.path}", highlight=False, markup=False)
    place = paper.describe(config)
    if place is not None:
        _say(place)
    rows: list[tuple[pipeline.Work, Manifest, bool]] = []

    def on_stage(work: pipeline.Work, manifest: Manifest, skipped: bool) -> None:
        _print_stage(work, manifest, skipped)
        rows.append((work, manifest, skipped))

    pipeline.run(config, run_dir, until=until, only=only, on_stage=on_stage, say=_say)
    output.print(_summary(rows))


@app.command()
def node(
    overrides: Overrides = None,
    stages: Annotated[
        str | None, typer.Option(metavar="STAGE,...", help="Only these stages, in this order; what they read must be done. Default: all.")
    ] = None,
) -> None:
    """Take part in a run over several machines: the same command on each, started by srun, a TrainJob, or by hand.

    The first node runs the stages as `trd run` does; the others lend it their learner ranks and SGLang servers, and end with it. All see
    the run directory, and models, under the same paths. On one node it is `trd run`.

    Which node this is comes from Slurm's or Kubeflow's variables, or from TRD_NODE_RANK, TRD_NODES and TRD_HEAD (address of node 0;
    TRD_PORT, default 29400, and the port after it are used there). Ranks and servers are dealt evenly to the nodes. Servers that other
    machines reach want a key in SGLANG_API_KEY. `trd launch` writes the jobs that call this: docs/cluster.md.

    [bold]Examples[/bold]

      srun --ntasks-per-node=1 trd node experiment=opsd_qwen3_8b run_dir=/shared/runs/8b learner.data_parallel_size=8

      TRD_NODES=2 TRD_NODE_RANK=1 TRD_HEAD=10.0.0.5 trd node experiment=NAME run_dir=/shared/runs/NAME
    """
    from trd_megatron import pipeline
    from trd_megatron.config import load
    from trd_megatron.launch import node as nodes_of_a_job
    from trd_megatron.launch import slurm
    from trd_megatron.nodes import Place

    chosen = None if stages is None else stages.split(",")

    def all_stages() -> None:
        for stage in [None] if chosen is None else chosen:
            _run_stages(config, None, stage)

    try:
        config = load(overrides or [])
        place = Place.find()
        if place.rank == 0:
            nodes_of_a_job.lead(place, all_stages)
        else:
            nodes_of_a_job.follow(place, config, chosen or pipeline.GROUPS, _say)
    except UserError:
        slurm.do_not_repeat()
        raise


def _does(config: "Config") -> str:
    if config.job == "sft":
        return f"trains {config.model.path} on worked solutions"
    return f"evaluates {config.model.path}" if config.job == "evaluate" else f"method {config.method.name}, {config.mode}"


def _print_stage(work: "Work", manifest: "Manifest", skipped: bool) -> None:
    console.print(f"  {work.name}: {'done before, skipped' if skipped else f'done in {manifest.seconds:.1f} s'}", highlight=False)


def _say(line: str) -> None:
    console.print(f"  {printable(line)}", highlight=False, markup=False)


def _multirun(overrides: list[str]) -> None:
    from trd_megatron import sweep
    from trd_megatron.report import compare

    started = time.monotonic()
    folder, runs = sweep.members(overrides)
    console.print(f"{len(runs)} runs in {folder}", highlight=False, markup=False)

    def on_run(member: sweep.Member) -> None:
        console.print(f"{member.label}: {_does(member.config)}", highlight=False, markup=False)

    def on_trained(work: "Work", manifest: "Manifest", skipped: bool) -> None:
        console.print(f"{work.run_dir.path.name}:", highlight=False, markup=False)
        _print_stage(work, manifest, skipped)

    sweep.run(runs, on_run=on_run, on_stage=_print_stage, on_trained=on_trained, say=_say)
    compare.write([member.run_dir.path for member in runs], folder)
    console.print(f"report: {folder / 'report.html'}", highlight=False)
    console.print(f"{time.monotonic() - started:.1f} s in all", highlight=False)


def _summary(rows: list[tuple[Any, Any, bool]]) -> Table:
    """What came out of each stage, one line each."""
    table = Table("stage", "result", "seconds", title="Summary")
    for work, manifest, skipped in rows:
        table.add_row(work.name, _result(work.stage.name, manifest.counts), "skipped" if skipped else f"{manifest.seconds:.1f}")
    return table


def _result(stage: str, counts: dict[str, Any]) -> str:
    """The figures of a stage's manifest that a reader wants first."""
    if stage == "prepare":
        return f"{counts['train_problems']} problems to train on, {counts['test_problems']} held out"
    if stage in ("rollout", "refine"):
        skipped = f", {counts['skipped_over_budget']} over the prompt budget" if counts["skipped_over_budget"] else ""
        cut, aborted = (counts["finish_reasons"].get(reason, 0) for reason in ("length", "abort"))
        skipped = f", {aborted} aborted{skipped}" if aborted else skipped
        errors = counts["verdicts"].get("error", 0)
        skipped = f", {errors} whose grading failed{skipped}" if errors else skipped
        rate = 100 * counts["passed"] / max(counts["samples"], 1)
        return f"{counts['samples']} samples, {rate:.1f} % pass, {counts['mean_response_tokens']:.0f} tokens each, {cut} cut off{skipped}"
    if stage == "train" and "perplexity_fixed_batch_before" in counts:
        before, after = (counts[f"perplexity_fixed_batch_{when}"] for when in ("before", "after"))
        values = " -> ".join("beyond floats" if value is None else f"{value:.4g}" for value in (before, after))
        return f"{counts['steps']} steps, held-out perplexity {values}"
    if stage == "train":
        before, after = counts["kl_fixed_batch_before"], counts["kl_fixed_batch_after"]
        change = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
        return f"{counts['steps']} steps, held-out KL {before:.4f} -> {after:.4f}{change}"
    if stage.startswith("export"):
        if "adapter_parameters" not in counts:
            return f"step {counts['step']}, every parameter"
        return f"step {counts['step']}, {counts['adapter_parameters']:,} adapter parameters{' merged' if stage == 'export/hf' else ''}"
    if stage.startswith("evaluate"):
        lines = []
        for name, of in counts.items():
            errors = of["verdicts"].get("error", 0)
            note = f", {errors} samples whose grading failed" if errors else ""
            if of["skipped_over_budget"]:
                note += f", {of['skipped_over_budget']} problems left out: over evaluate.max_prompt_tokens"
            lines.append(f"{name}: Avg@{of['k']} {of['avg_at_k']:.1f}, Pass@{of['k']} {of['pass_at_k']:.1f}{note}")
        return "; ".join(lines)
    return ", ".join(f"{key} {value}" for key, value in counts.items())


@app.command()
def launch(
    overrides: Overrides = None,
    stages: Annotated[
        str | None, typer.Option(metavar="STAGE,...", help="Only the jobs of these stages; what they read must be done. Default: all.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the exact scripts, and submit nothing.")] = False,
) -> None:
    """Run an experiment on a cluster, each stage a job with nodes of its own: cluster=slurm, kubernetes, docker or local.

    Jobs are made by NeMo-Run. How many nodes each gets follows from the settings: servers take engine.student.data_parallel_size x
    tensor_parallel_size GPUs (in OPD the teacher's to refine), training takes the learner's ranks; cluster.gpus_per_node a node. A job
    begins when the one before has ended well. A job that fails, runs out of time or is preempted is put back (cluster.retries) and goes on
    where it stopped; the same command goes on after anything else. What your input causes is not tried again.

    `trd status RUN` shows the jobs. Every node must see the run directory, models and data under the same paths: docs/cluster.md.

    [bold]Examples[/bold]

      trd launch experiment=opsd_qwen3_8b cluster=slurm cluster.partition=h100 cluster.account=me --dry-run

      trd launch experiment=opd_qwen3_1_7b cluster=slurm cluster.trd=/shared/trd/.venv/bin/trd run_dir=/shared/runs/opd

      trd launch experiment=opsd_qwen3_8b cluster=kubernetes run_dir=/runs/8b cluster.mounts=\\[runs:/runs] \\
        cluster.learner_image=IMAGE cluster.rollout_image=IMAGE
    """
    from trd_megatron.config import load

    given = overrides or []
    config = load(given)
    if config.cluster.kind == "none":
        raise UserError("say where: cluster=slurm, kubernetes, docker or local")
    from trd_megatron.launch.jobs import check_trd, jobs

    todo = jobs(config, None if stages is None else stages.split(","))
    try:
        from trd_megatron.launch import launcher
    except ImportError as error:
        raise UserError(
            f"trd launch needs NeMo-Run, which is not installed here ({error}): `make launch-env` builds .venv-launch"
        ) from None
    if dry_run:
        for title, text in launcher.dry_run(config, given, todo):
            output.print(f"# === {title}\n{text}", highlight=False, markup=False, soft_wrap=True)
        return
    check_trd(config, todo)
    launched = launcher.launch(config, given, todo)
    table = Table("job", "id", "stages", "nodes", "GPUs a node", title=f"{config.name} on {config.cluster.kind}, in {config.run_dir}")
    for job in launched.jobs:
        table.add_row(job.name, job.id, ", ".join(job.stages), f"{job.nodes}", f"{job.gpus or ''}")
    output.print(table)
    console.print(f"where they stand: trd status {config.run_dir}", highlight=False, markup=False)


@app.command()
def prepare(
    overrides: Overrides = None,
    download_only: Annotated[
        bool,
        typer.Option(
            "--download-only", help="Fetch data, benchmarks and models into the caches, and stop: for clusters without a network."
        ),
    ] = False,
) -> None:
    """Put an experiment's problems into its run directory; or only fetch what the experiment needs from the network.

    Without --download-only it is `trd run ... --until prepare`. With it nothing is written to the run directory: data, the benchmarks of
    evaluate.benchmarks and data.exclude_benchmarks, and models go into the caches. It says where each lies and how to move them.

    [bold]Examples[/bold]

      trd prepare experiment=quickstart

      HF_HOME=/scratch/hub trd prepare --download-only experiment=opsd_qwen3_8b evaluate.benchmarks=\\[aime24,math500]
    """
    if not download_only:
        run(overrides, until="prepare")
        return
    from trd_megatron.config import load

    config = load(overrides or [])
    from trd_megatron import downloads

    found = list(downloads.fetch(config, lambda line: console.print(line, highlight=False, markup=False)))
    for line in [f"{each.what}: {each.size / 1e6:,.2f} MB in {each.folder}" for each in found] + downloads.how_to_move(found):
        output.print(line, highlight=False, markup=False, soft_wrap=True)


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
    """Show the stages of a run: state, counts, rates; of a launched one its jobs as well."""
    from trd_megatron.launch.records import Launched

    launched = Launched.read(run_path)
    if launched is not None:
        jobs = Table("job", "id", "state", "scripts and logs", title=f"Jobs on {launched.kind}")
        for job, state in zip(launched.jobs, launched.states(), strict=True):
            jobs.add_row(job.name, job.id, state, printable(job.folder))
        output.print(jobs)
        if not (run_path / "config.yaml").exists():
            return  # no job has begun
    from trd_megatron import planning

    output.print(planning.status(run_path))


@app.command()
def report(
    run_paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run directory; with --compare, as many as you like.")],
    compare: Annotated[bool, typer.Option("--compare", help="Put runs side by side: the paper's tables, pooled over seeds.")] = False,
    folder: Annotated[
        Path, typer.Option("--output", metavar="FOLDER", help="--compare: where report.html, report.json and report.md go.")
    ] = Path("comparison"),
) -> None:
    """Write report.html and report.json of a run anew from what lies there; or compare runs.

    [bold]--compare[/bold]: methods are the rows of the tables and seeds are pooled; any other setting in which runs differ (mode,
    model.path, learner.trainable, ...) makes tables of its own. Runs of experiment=evaluate, e.g. of the teacher, get a table too.

    [bold]Examples[/bold]

      trd report runs/quickstart

      trd report --compare runs/trd runs/forward_kl

      trd report --compare runs/opd/*/ runs/opsd/*/ --output runs/comparison
    """
    if compare:
        from trd_megatron.report import compare as comparison

        comparison.write(run_paths, folder)
        console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)
        return
    if len(run_paths) > 1:
        raise UserError("trd report writes the report of one run; --compare puts several side by side")
    [run_path] = run_paths
    from trd_megatron.config import of_run
    from trd_megatron.run_dir import RunDir

    config = of_run(run_path)
    from trd_megatron import pipeline

    pipeline.run(config, RunDir(run_path, config.name), only="report", again=True)
    console.print(f"report: {run_path / 'report.html'}", highlight=False)


@app.command()
def grade(
    run_path: RunPath,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[verify.KEY=VALUE]...", help="Other settings of the grading.")] = None,
) -> None:
    """Grade the samples of a run anew, without drawing any: rollouts, rewrites and evaluations of every round.

    The scores, and the report if there is one, follow. Nothing becomes stale: training has used the labels only for its diagnostics and for
    data.filter. Interrupted, the same command goes on.

    [bold]Examples[/bold]

      trd grade runs/quickstart

      trd grade runs/quickstart verify.timeout_s=30 verify.workers=8
    """
    from trd_megatron.config import of_run
    from trd_megatron.run_dir import RunDir

    config = of_run(run_path, overrides or [], section="verify")
    from trd_megatron import regrade

    run_dir = RunDir(run_path, config.name)
    changes = regrade.regrade(config, run_dir)
    table = Table("samples of", "graded", "verdict before", "now", "samples", title="Verdicts that changed")
    for label, old, new, count in changes.lines():
        table.add_row(label, f"{changes.of[label].total()}", old, new, f"{count}")
    if table.row_count:
        output.print(table)
    changed = sum(count for *_, count in changes.lines())
    console.print(f"{changes.samples} samples graded, {changed} verdicts changed", highlight=False)
    if changed and any(run_path.rglob("samples.parquet")):
        console.print("training is not repeated: it used the old labels, for its diagnostics only", highlight=False)


@app.command()
def doctor(
    overrides: Overrides = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Compare the log-probabilities of an experiment's engine and learner instead.")
    ] = False,
    max_difference: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, help="--engine: the most they may differ.", show_default="0.001 at most in float32, else 0.05 on average"
        ),
    ] = None,
    go_on: Annotated[bool, typer.Option("--go-on", help="--engine: exit code 0 whatever the difference.")] = False,
) -> None:
    """Show what this machine has, and what is missing for which feature. With --engine: check that engine and learner agree.

    [bold]--engine[/bold]: the engine of the student, and of the teacher in OPD, draws responses to 8 of the experiment's problems, 64
    tokens each, once as its stage samples and once greedy. The learner scores them as it does in training. Both should give every token the
    same log-probability (at temperature 1, whatever it was drawn with); where they do not, training goes wrong without any other sign.

      mean |diff|, max |diff|: size of the differences. In float32 the maximum is checked, in bfloat16 the mean

      mean diff: which of the two gives more; far from 0, one side's temperature, weights or templates are others

      mean ratio: the learner's probability over the engine's, 1 where they agree

      same top-1: how often the learner's likeliest token is the engine's

    Exit code 1 where the difference is above the bound.

    [bold]Examples[/bold]

      trd doctor

      trd doctor --engine experiment=smoke

      trd doctor --engine experiment=quickstart engine=sglang engine.launch=false engine.student.urls=\\[http://10.0.0.2:30000]

      trd doctor --engine experiment=quickstart learner.dtype=bfloat16 --max-difference 0.02
    """
    if not engine:
        if overrides or go_on or max_difference is not None:
            raise UserError("doctor takes settings, --max-difference and --go-on only with --engine: trd doctor --engine experiment=NAME")
        from trd_megatron import doctor as checks

        output.print(checks.table())
        return
    from trd_megatron.config import load

    config = load(overrides or [])
    if config.job == "evaluate":
        raise UserError("--engine compares the engine with the learner, and job=evaluate has none: name an experiment that trains")
    from trd_megatron import preflight, scoring_check

    preflight.check_devices(config)
    preflight.check_inputs(config)
    bound = scoring_check.Bound.of(config, max_difference)
    figures = scoring_check.check(config, lambda line: console.print(line, highlight=False, markup=False))
    output.print(scoring_check.table(figures, bound))
    found = scoring_check.wrong(figures, bound)
    if found and not go_on:
        fail(found, 1)
    console.print(f"going on all the same (--go-on): {found}" if found else "engine and learner agree", highlight=False, markup=False)


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
        fail("all servers are stopped", 130)


app.add_typer(convert, name="convert")
app.add_typer(bench, name="bench")


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
    if sys.argv[1:2] != ["prepare"]:  # where downloads are what takes long
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in what they start in the background
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop us with it: end as Ctrl-C does, saving what can be
    try:
        code = app(standalone_mode=False)  # returns what an Exit says, and 130 for Ctrl-C
        if code == 130:
            _interrupted()
        sys.exit(code)
    except UserError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error; typer brings click along under a private name
            if not error.format_message():  # nothing was asked, the help is printed
                sys.exit(2)
            fail(error.format_message(), 2)
        from trd_megatron.engine.base import EngineFailedError
        from trd_megatron.launch.records import JobFailedError
        from trd_megatron.learner.job import LearnerFailedError
        from trd_megatron.nodes import NodeFailedError

        if isinstance(error, EngineFailedError | LearnerFailedError | NodeFailedError | JobFailedError):
            fail(str(error), 1)
        if isinstance(error, OSError):
            full = "; free some and give the same command again" if error.errno == errno.ENOSPC else ""
            where = "" if error.filename is None else f": {error.filename}"
            fail(f"{error.strerror or type(error).__name__}{where or f' ({error})'}{full}", 1)
        raise


def _interrupted() -> None:
    command = sys.argv[1:2]
    outcome = (
        "; nothing was written" if command == ["convert"] else "; the same command goes on where it stopped" if command == ["run"] else ""
    )
    fail(f"interrupted{outcome}", 130)


if __name__ == "__main__":
    main()
