"""The commands on single models: train, prune, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lodeset.infra import api
from lodeset.infra.cli.options import Json, Set, err, out, print_json, safe

models = typer.Typer()


@models.command()
def train(
    folder: Annotated[Path, typer.Argument(help="folder for checkpoints, metrics and the exported model")],
    shards: Annotated[
        list[str],
        typer.Argument(help="WebDataset tars (globs, URLs, `{000..099}`), folders of images, or an index.parquet"),
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file with the keys of `training`")] = None,
    overrides: Set = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="number of cores [default: all]")] = None,
    ray_address: Annotated[str, typer.Option(help="address of a Ray cluster to join; local: start one")] = "local",
    as_json: Json = False,
) -> None:
    """Train on existing shards or images, without curation; run again to continue after an interruption."""
    from lodeset.infra.cli.progress import watching

    with watching(err) as watch:
        summaries = api.train(shards, folder, config, tuple(overrides or ()), ray_address, cpus, watch)
    if as_json:
        print_json(summaries)
        return
    for name, summary in summaries.items():
        seen = f"{summary['images_seen']:,} images seen of {summary['images']:,}, {summary['skipped']} skipped"
        line = f"{name}: {seen} -> {summary['folder']}"
        out.print(safe(line), highlight=False, soft_wrap=True)


@models.command()
def prune(
    model: Annotated[Path, typer.Argument(help="folder with model.safetensors and config.json or graph.json")],
    folder: Annotated[Path, typer.Argument(help="folder for pruned models and report.json")],
    shards: Annotated[
        list[str],
        typer.Argument(
            help="images to calibrate on: WebDataset tars (globs, URLs, `{000..099}`), folders of images, or an "
            "index.parquet"
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file with the keys of a job of `pruning`")] = None,
    overrides: Set = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="side of the model's images, pixels [default: that of a transformer's positions]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="labeled images to evaluate on: folder, tar or Parquet with the fields `label` and `split` (gallery "
            "or test)"
        ),
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="number of cores [default: all]")] = None,
    ray_address: Annotated[str, typer.Option(help="address of a Ray cluster to join; local: start one")] = "local",
    as_json: Json = False,
) -> None:
    """Prune a model, without labels unless a method learns from them; run again to continue after an interruption."""
    from lodeset.infra.cli.progress import watching

    with watching(err) as watch:
        report = api.prune(
            model, folder, shards, config, tuple(overrides or ()), size, target, ray_address, cpus, watch
        )
    if as_json:
        print_json(report)
        return
    first = report["variants"][0]
    at = next(key for key in ("eps_w", "remove", "round", "lr") if key in first)
    ks = {name: min(by_k, key=int) for name, by_k in first["knn"].items()}
    scores = [f"kNN, k={k}" for k in ks.values()] or ["agreement"]
    table = Table(
        "method", at, "density", "parameters", "MACs", "ms, batch 1", *map(safe, scores), box=None, pad_edge=False
    )
    for row in report["variants"]:
        judged = [f"{row['knn'][name][k]:.3f}" for name, k in ks.items()]
        agreement = row.get("agreement")
        table.add_row(
            safe(row["method"]),
            f"{row[at]:g}",
            f"{row['density']:.1%}",
            f"-{row['parameters_removed']:.1%}",
            f"-{row['macs_removed']:.1%}",
            f"{row['latency_ms']['batch_1']['median']:.2f}",
            *(judged or ["" if agreement is None else f"{agreement:.4f}"]),
        )
    out.print(table)
    for overlap in report.get("overlaps", []):
        masks = f"round {overlap['round']}: masks of {overlap['one']} and {overlap['other']}"
        line = f"{masks} overlap by {overlap['jaccard']:.3f}, by chance {overlap['by_chance']:.3f}"
        out.print(safe(line), highlight=False, soft_wrap=True)
    (parent,) = {str(Path(row["model"]).parent) for row in report["variants"]}
    out.print(safe(f"models: {folder / parent}"), highlight=False, soft_wrap=True)
    for name, why in report["skipped_modules"].items():
        err.print(f"left whole: {safe(name)}: {safe(why)}", highlight=False, soft_wrap=True)


@models.command()
def export(
    folder: Annotated[
        str, typer.Argument(help="folder (a path or a URL) with the model.safetensors of a trained or pruned model")
    ],
    path: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="file to write")],
    size: Annotated[
        int | None, typer.Option(min=1, help="side of the model's images, pixels [default: the model's own]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a trained or pruned model as an ONNX network; a transformer outputs CLS and patch features."""
    from lodeset.infra.quiet import others_quiet

    with others_quiet():
        made = api.export(folder, path, size)
    if as_json:
        print_json(made)
    else:
        gives = f" -> embedding [B, {made['dim']}], patches" if "dim" in made else ""
        sides = f"{made['size']}, {made['size']}"
        free = f" (made for {sides.replace(', ', ' x ')})" if made["any_size"] else ""
        line = f"wrote {made['path']}: image [B, 3, {'height, width' if free else sides}]{free}{gives}"
        out.print(safe(line), highlight=False, soft_wrap=True)
