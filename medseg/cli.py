"""The command line: arguments to one verb."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from medseg import __version__
from medseg.display import console
from medseg.errors import WorkflowError
from medseg.outcome import (
    REFUSED,
    SOME_CASES_FAILED,
    WORSE,
    OneMessage,
    print_result,
    stdout_kept_free,
    training_summary,
)

# Nothing above loads torch, MONAI or MLflow, and verbs are imported where they are called: `--help` is instant.

app = typer.Typer(
    cls=OneMessage,
    help="Segment organs and lesions in medical images: train, predict, evaluate, compare.",
    epilog="Exit codes: 0 done, 1 worse (compare --fail-if-worse), 2 refused before work began, 3 some cases failed, 4 internal error, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes break long paths in messages, and read [brackets] as markup
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="List, convert and make data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the network runs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
TrackingUri = Annotated[
    str | None,
    typer.Option("--uri", help="MLflow store.  [default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db]"),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medseg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="MEDSEG_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Segment organs and lesions in medical images: train, predict, evaluate, compare."""


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="WORKFLOW|MANIFEST|FOLDER", help="What to check.")],
    *,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Empty folder for a corrected description of the data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find every problem with a data set before any work."""
    with stdout_kept_free():
        from medseg.check import check, check_table

        result = check(path, fix=fix)
    print_result(result, as_json, check_table)
    if result["fixed"]["remaining_errors"] if result["fixed"] else result["errors"]:
        raise typer.Exit(REFUSED)


@app.command()
def train(
    workflow: Annotated[Path, typer.Argument(metavar="WORKFLOW", help="Workflow YAML.")],
    *,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. train.iterations=100."),
    ] = None,
    fold: Annotated[str | None, typer.Option(metavar="N|all", help="Fold to validate on, or all in turn.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder.  [default: runs/NAME/TIME-ID]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a model as a workflow says, with its run in MLflow."""
    with stdout_kept_free():
        from medseg.workflow import Workflow

        Workflow.load(workflow, overrides or ())  # tells its mistakes before torch is loaded, which takes seconds
        from medseg.train import train

        result = train(
            workflow,
            overrides=overrides or (),
            fold=fold,
            output=output,
            resume=resume,
            device=device,
            dry_run=dry_run,
        )
    print_result(result, as_json, training_summary)


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run folder (of folds: all of them), model folder, MLflow run id, or models:/NAME@ALIAS.",
        ),
    ],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Files, folders, or a manifest.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the segmentations.")],
    format: Annotated[Literal["nii.gz", "nrrd", "mha", "png"], typer.Option(help="File format.")] = "nii.gz",
    split: Annotated[str | None, typer.Option(help="Part of a manifest, e.g. test.")] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Share of a window the next one covers.  [default: the model's]")
    ] = None,
    crop: Annotated[
        Literal["air", "body", "none"] | None,
        typer.Option(
            help="Of CT and MR, pass over windows of air; or put them on the box around the body, which are fewer but "
            "stand elsewhere.  [default: the model's]"
        ),
    ] = None,
    tta: Annotated[
        bool | None,
        typer.Option(
            "--tta/--no-tta",
            help="Average over mirrored inputs (along all axes, where the model names none); or not.",
            show_default="the model's",
        ),
    ] = None,
    prune: Annotated[
        int | None, typer.Option(metavar="LEVEL", min=1, help="Stop a UNet++ at this level, which is faster.")
    ] = None,
    others: Annotated[
        list[str] | None, typer.Option("--with", metavar="MODEL", help="Another model to be averaged with; repeatable.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write the probabilities too.")] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Say how unsure each segmentation is, and which to look at first.")
    ] = False,
    entropy: Annotated[bool, typer.Option("--entropy", help="Write each voxel's entropy too, in percent.")] = False,
    device: Device = "auto",
    workers: Annotated[
        int,
        typer.Option(min=0, help="Processes that segment at once, each with the model.  [default: one a GPU, or one]"),
    ] = 0,
    executor: Annotated[
        Literal["local", "ray", "slurm"],
        typer.Option(help="Who does the work: processes of this machine, or a cluster."),
    ] = "local",
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of a Ray cluster.  [default: a new one on this machine]")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of the Slurm jobs: partition=gpu, gpus=1, mem_gb=16, timeout_min=60 …"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier call ended; try again what failed.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew, and overwrite; take scans of any modality.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Of several scans, make a page of all in the end.")
    ] = True,
    dry_run: DryRun = False,
    uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Segment scans on their own grid."""
    with stdout_kept_free():
        from medseg.predict import predict
        from medseg.reporting.prediction import prediction_summary

        result = predict(
            [model, *(others or [])],
            inputs,
            output=output,
            format=format,
            split=split,
            overlap=overlap,
            crop=crop,
            tta=tta,
            prune=prune,
            probabilities=probabilities,
            uncertainty=uncertainty or entropy,
            entropy=entropy,
            device=device,
            workers=workers,
            executor=executor,
            address=address,
            slurm=_pairs(slurm or [], "--slurm"),
            resume=resume,
            force=force,
            report=report,
            dry_run=dry_run,
            tracking_uri=uri,
        )
    print_result(result, as_json, prediction_summary)
    if result.get("failed"):
        raise typer.Exit(SOME_CASES_FAILED)


def _pairs(arguments: list[str], option: str) -> dict[str, str]:
    """What ``KEY=VALUE`` arguments say."""
    for argument in arguments:
        if "=" not in argument:
            raise WorkflowError("E-ARGUMENT", f"{argument!r} must be KEY=VALUE", where=option)
    return dict(argument.split("=", 1) for argument in arguments)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="File or folder of segmentations.")],
    references: Annotated[
        Path, typer.Argument(metavar="REFERENCES", help="File or folder of references, or a manifest.")
    ],
    *,
    labels: Annotated[
        Path | None, typer.Option(help="Manifest, nnU-Net's dataset.json, or model that names the labels.")
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(
            "--map",
            metavar="FILE",
            help="YAML or JSON: which label values (liver: 5, kidneys: [2, 3]) or files (liver: liver, of "
            "CASE/liver.nii.gz) of the predictions stand for each label. Only what it names is scored.",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="See `medseg metrics`; or groups: all, overlap, surface, volume, lesion, image."
        ),
    ] = "dice,iou",
    resample: Annotated[bool, typer.Option("--resample", help="Bring predictions to the references' grid.")] = False,
    missing_as_empty: Annotated[
        bool, typer.Option("--missing-as-empty", help="Count references without prediction as missed.")
    ] = False,
    skip_failed: Annotated[
        bool,
        typer.Option(
            "--skip-failed", help="Score the rest where cases cannot be scored (exit code 3), rather than none (2)."
        ),
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the tables.")] = None,
    split: Annotated[str | None, typer.Option(help="Part of a manifest, e.g. test.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that score at once.  [default: one a core, up to 8]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare segmentations with references, per case and organ."""
    with stdout_kept_free():
        from medseg.batch.parallel import num_cores
        from medseg.evaluate import evaluate
        from medseg.reporting.evaluation import evaluation_table

        result = evaluate(
            predictions,
            references,
            labels=labels,
            label_map=label_map,
            metrics=tuple(name.strip() for name in metrics.split(",") if name.strip()),
            resample=resample,
            missing_as_empty=missing_as_empty,
            skip_failed=skip_failed,
            output=output,
            split=split,
            workers=num_cores() if workers is None else workers,
        )
    print_result(result, as_json, evaluation_table)
    if result.get("failed"):
        raise typer.Exit(SOME_CASES_FAILED)


@app.command()
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN RUN...",
            help="Run folders, folders of `medseg evaluate`, CSV tables, or MLflow run ids; the first is held to.",
        ),
    ] = None,
    *,
    metric: Annotated[str, typer.Option(help="What to compare by: a column of the runs' per_case.csv.")] = "dice",
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rank all finished runs of an MLflow experiment instead.")
    ] = None,
    uri: TrackingUri = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the tables, the figure and the page.")
    ] = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit with 1 if a run is worse than the first on average.")
    ] = False,
    log: Annotated[
        bool, typer.Option("--log/--no-log", help="Put the comparison beside the artifacts of runs named by MLflow id.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Compare runs, paired by case and organ, with intervals and tests."""
    if experiment is not None and (runs or fail_if_worse):
        raise WorkflowError(
            "E-COMPARE-RUNS", "ranks all its runs; give neither runs nor --fail-if-worse", "--experiment"
        )
    with stdout_kept_free():
        from medseg.compare import compare, rank_experiment
        from medseg.reporting.comparison_table import comparison_table, ranking_table

        if experiment is not None:
            result = rank_experiment(experiment, metric=metric, tracking_uri=uri, output=output)
        else:
            result = compare(runs or [], metric=metric, tracking_uri=uri, output=output, log=log)
    print_result(result, as_json, comparison_table if experiment is None else ranking_table)
    if fail_if_worse and (worse := [found for found in result["comparisons"] if found["worse"]]):
        told = "; ".join(f"{found['label']} ({', '.join(found['why_worse'])})" for found in worse)
        console().print(f"worse than {result['baseline_label']} in {metric}: {told}", markup=False, soft_wrap=True)
        raise typer.Exit(WORSE)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, MLflow run id, or a folder of segmentations.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PAGE", help="File to write, or folder for report.html.  [default: RUN]"
        ),
    ] = None,
    scans: Annotated[
        Path | None, typer.Option(help="Scans that segmentations were made from: a folder, a file or a manifest.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Model, run folder or manifest that names the labels of segmentations.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part of the manifest of scans, e.g. test.")] = None,
    uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Make one HTML page of a run, or of segmentations, to look at and to show."""
    with stdout_kept_free():
        from medseg.report import report, report_summary

        result = report(run, output=output, scans=scans, labels=labels, split=split, tracking_uri=uri)
    print_result(result, as_json, report_summary)
    if result.get("failed"):
        raise typer.Exit(SOME_CASES_FAILED)


@app.command()
def nets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One network.")] = None,
    *,
    spatial_dims: Annotated[
        int | None, typer.Option(min=2, max=3, help="Only those for 2D or 3D; of one, this form is told and drawn.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the network there.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the networks, or tell all of one."""
    with stdout_kept_free():
        from medseg.nets import NETS
        from medseg.nets.describe import describe, drawn, explain
        from medseg.nets.listing import net_page, nets_table

    if picture is not None:
        from medseg.files import write_atomically

        if name is None:
            raise WorkflowError("E-ARGUMENT", "shows one network; say which: medseg nets NAME", where="--picture")
        if picture.suffix.lower() != ".svg":
            raise WorkflowError(
                "E-SUFFIX", f"{str(picture)!r} is drawn as SVG; name it so: FILE.svg", where="--picture"
            )
        write_atomically(picture, drawn(name, spatial_dims=spatial_dims).encode())
    if name is not None:
        told = {"picture": str(picture)} if picture else {}
        print_result({"name": name, **explain(name, spatial_dims=spatial_dims), **told}, as_json, net_page)
        return
    chosen = [key for key, entry in NETS.items() if spatial_dims in (None, *entry.spatial_dims)]
    print_result({key: describe(key, spatial_dims=spatial_dims) for key in chosen}, as_json, nets_table)


@app.command()
def losses(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One loss.")] = None, *, as_json: AsJson = False
) -> None:
    """List the losses, or tell all of one."""
    with stdout_kept_free():
        from medseg.losses import LOSSES
        from medseg.parts import described, documented, part_page, parts_table

    if name is not None:
        print_result({"name": name, **described(LOSSES[name]), **documented(LOSSES[name])}, as_json, part_page)
        return
    table = partial(parts_table, caption="medseg losses NAME tells paper and arguments")
    print_result({key: described(entry) for key, entry in LOSSES.items()}, as_json, table)


@app.command()
def metrics(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One metric.")] = None, *, as_json: AsJson = False
) -> None:
    """List the metrics, or tell all of one."""
    with stdout_kept_free():
        from medseg.metrics import METRICS
        from medseg.metrics.groups import groups_of, groups_text
        from medseg.parts import described, documented, part_page, parts_table

    told = {key: {**described(entry), "groups": groups_of(key)} for key, entry in METRICS.items()}
    if name is not None:
        METRICS[name]  # which tells what is wrong with it
        key = name.partition(":")[0]  # the metric itself, whatever its number
        print_result({"name": key, **told[key], **documented(METRICS[key].score)}, as_json, part_page)
        return
    caption = (
        "medseg metrics NAME tells paper and arguments; medseg evaluate --metrics also takes all and these groups:"
    )
    print_result(told, as_json, partial(parts_table, caption=f"{caption}\n{groups_text()}"))


@data_app.command("list")
def list_scans(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Searched recursively.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Show the DICOM series of a folder, and what is wrong with them."""
    with stdout_kept_free():
        from medseg.data_tools import list_scans, scan_table

        result = list_scans(folder)
    print_result(result, as_json, scan_table)


@data_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A scan or a label map: file, or DICOM folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .nii.gz, .nrrd, .mha, .png.")],
    *,
    image: Annotated[
        Path | None, typer.Option(metavar="SCAN", help="The scan that IN, a label map, belongs to or is drawn on.")
    ] = None,
    manifest: Annotated[Path | None, typer.Option(help="Names the labels of a SEG or an RTSTRUCT.")] = None,
    resample: Annotated[bool, typer.Option("--resample", help="Bring a label map on another grid to SCAN's.")] = False,
    allow_missing_slices: Annotated[
        bool, typer.Option("--allow-missing-slices", help="Interpolate slices that a series lacks.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite OUT; convert a picture that may name the patient.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a scan or a label map in another format, on its own grid; a tilted one is straightened."""
    with stdout_kept_free():
        from medseg.data_tools import conversion_text, convert

        result = convert(
            source,
            target,
            image=image,
            manifest=manifest,
            resample=resample,
            force=force,
            allow_missing_slices=allow_missing_slices,
        )
    print_result(result, as_json, conversion_text)


@data_app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    *,
    cases: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same scans.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make synthetic abdominal CTs with exact labels, and their manifest."""
    with stdout_kept_free():
        from medseg.data_tools import make_phantom

        result = make_phantom(folder, num_cases=cases, seed=seed)
    print_result(result, as_json)


@app.command()
def schema(
    *, output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of stdout.")] = None
) -> None:
    """Write the JSON Schema of a workflow, for completion in editors."""
    from medseg.workflow import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        from medseg.files import write_atomically

        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text.encode())


@app.command()
def ui(
    *,
    uri: TrackingUri = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need --auth.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    auth: Annotated[bool, typer.Option("--auth", help="Ask for users and passwords; needs mlflow[auth].")] = False,
) -> None:
    """Open MLflow's pages on this project's runs; Ctrl-C ends it."""
    from medseg.tracking.ui import serve_ui

    raise typer.Exit(serve_ui(uri, host, port, auth=auth))


@app.command()
def register(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or MLflow run id.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the model is called, e.g. liver.")],
    *,
    alias: Annotated[
        str | None, typer.Option(help="Given to this version, and taken from the one that had it: champion.")
    ] = None,
    uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Put a run's model into MLflow's registry, for `medseg predict models:/NAME@ALIAS`."""
    with stdout_kept_free():
        from medseg.tracking.models import register

        result = register(run, name, alias=alias, tracking_uri=uri)
    print_result(result, as_json)


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    *,
    uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Send what a tracking server missed while it was away."""
    with stdout_kept_free():
        from medseg.tracking.mlflow_tracker import sync

        sent = sync(run, uri=uri)
    print_result({"run_dir": run, "sent": sent}, as_json)


def main() -> None:
    """Entry point of the ``medseg`` command."""
    app()


if __name__ == "__main__":
    main()
