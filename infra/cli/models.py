"""The commands on models by themselves: train, prune, export."""

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
    folder: Annotated[Path, typer.Argument(help="where checkpoints, metrics and the exported model go")],
    shards: Annotated[
        list[str],
        typer.Argument(help="WebDataset tars (globs, URLs, `{000..099}`), folders of images, or an index.parquet"),
    ],
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of `training`")] = None,
    overrides: Set = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="cores [default: all]")] = None,
    ray_address: Annotated[str, typer.Option(help="a Ray cluster to join; local: one of its own")] = "local",
    as_json: Json = False,
) -> None:
    """Train on shards or images that are there already, without curation; run again, it goes on where it was."""
    from lodeset.infra.cli.progress import following

    with following(err, folder, "reading the shards, starting workers"):
        told = api.train(shards, folder, config, tuple(overrides or ()), ray_address, cpus)
    if as_json:
        print_json(told)
        return
    for name, one in told.items():
        line = f"{name}: {one['images_seen']:,} images seen of {one['images']:,}, {one['skipped']} skipped -> {one['folder']}"
        out.print(safe(line), highlight=False, soft_wrap=True)


@models.command()
def prune(
    model: Annotated[
        Path, typer.Argument(help="where model.safetensors lies, with config.json or graph.json beside it")
    ],
    folder: Annotated[Path, typer.Argument(help="where pruned models and report.json go")],
    shards: Annotated[
        list[str],
        typer.Argument(
            help="images to calibrate on: WebDataset tars (globs, URLs, `{000..099}`), folders of images, or an index.parquet"
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of a job of `pruning`")] = None,
    overrides: Set = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="side of its images, pixels [default: a transformer's own]")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="labelled images to judge on: folder, tar or Parquet with the fields `label` and `split` (gallery or test)"
        ),
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="cores [default: all]")] = None,
    ray_address: Annotated[str, typer.Option(help="a Ray cluster to join; local: one of its own")] = "local",
    as_json: Json = False,
) -> None:
    """Prune a model, without labels but where a method is told to learn from them; run again, it goes on where it was."""
    from lodeset.infra.cli.progress import following

    with following(err, folder, "reading the model and the shards, starting workers"):
        told = api.prune(model, folder, shards, config, tuple(overrides or ()), size, target, ray_address, cpus)
    if as_json:
        print_json(told)
        return
    first = told["variants"][0]
    at = next(key for key in ("eps_w", "remove", "round", "lr") if key in first)
    ks = {name: min(by_k, key=int) for name, by_k in first["knn"].items()}
    scores = [f"kNN, k={k}" for k in ks.values()] or ["agreement"]
    table = Table(
        "method", at, "density", "parameters", "MACs", "ms, batch 1", *map(safe, scores), box=None, pad_edge=False
    )
    for one in told["variants"]:
        judged = [f"{one['knn'][name][k]:.3f}" for name, k in ks.items()]
        agreement = one.get("agreement")
        table.add_row(
            safe(one["method"]),
            f"{one[at]:g}",
            f"{one['density']:.1%}",
            f"-{one['parameters_removed']:.1%}",
            f"-{one['macs_removed']:.1%}",
            f"{one['latency_ms']['batch_1']['median']:.2f}",
            *(judged or ["" if agreement is None else f"{agreement:.4f}"]),
        )
    out.print(table)
    for one in told.get("overlaps", []):
        line = f"round {one['round']}: masks of {one['one']} and {one['other']} overlap by {one['jaccard']:.3f}, by chance {one['by_chance']:.3f}"
        out.print(safe(line), highlight=False, soft_wrap=True)
    (parent,) = {str(Path(one["model"]).parent) for one in told["variants"]}
    out.print(safe(f"models: {folder / parent}"), highlight=False, soft_wrap=True)
    for name, why in told["skipped_modules"].items():
        err.print(f"left whole: {safe(name)}: {safe(why)}", highlight=False, soft_wrap=True)


@models.command()
def export(
    folder: Annotated[Path, typer.Argument(help="where model.safetensors lies, of a trained or a pruned model")],
    path: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="file to write")],
    size: Annotated[
        int | None, typer.Option(min=1, help="side of its images, pixels [default: the model's own]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a trained or pruned model as an ONNX network; of a transformer, CLS and patch features come out."""
    from lodeset.infra.quiet import others_quiet

    with others_quiet():
        made = api.export(folder, path, size)
    if as_json:
        print_json(made)
    else:
        gives = f" -> embedding [B, {made['dim']}], patches" if "dim" in made else ""
        sides = f"{made['size']}, {made['size']}"
        free = f" (made for {sides.replace(', ', ' x ')})" if made["any_size"] else ""
        told = f"wrote {made['path']}: image [B, 3, {'height, width' if free else sides}]{free}{gives}"
        out.print(safe(told), highlight=False, soft_wrap=True)
