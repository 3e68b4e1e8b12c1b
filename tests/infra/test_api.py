"""Every command is a function too, and asking for help loads neither torch nor an engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import picture, write_folder
from typer.testing import CliRunner

from lodeset.infra import api
from lodeset.infra.cli import main as cli
from lodeset.infra.config import read
from lodeset.pipeline.errors import ConfigError, LodesetError


def lodeset(*arguments: str | Path) -> dict[str, object]:
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    told: dict[str, object] = json.loads(done.stdout)
    return told


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_folder(tmp_path / "images", [(f"{n}.png", picture(n)) for n in range(3)])
    return api.init(tmp_path)


def test_every_command_is_a_function() -> None:
    registered = [
        *cli.app.registered_commands,
        *cli.models.registered_commands,
        *cli.status_commands.registered_commands,
        *cli.reject_commands.registered_commands,
        *cli.store_commands.registered_commands,
        *cli.gates_commands.registered_commands,
        *cli.card_commands.registered_commands,
    ]
    commands = {command.callback.__name__ for command in registered if command.callback}
    assert commands == {
        "init", "schema", "plan", "run", "status", "report", "trace", "dedup_preview", "compact", "forget", "demo", "train", "prune",
        "export", "doctor", "table", "verify", "gc", "rejects", "metrics", "gates", "accept", "rollback", "card",
    }  # fmt: skip
    for name in commands:
        assert (
            getattr(api, name).__module__
            in (
                "lodeset.infra.api",
                "lodeset.infra.gates.commands",
                "lodeset.infra.looking.looking",
                "lodeset.infra.models",
                "lodeset.infra.session",
            )
            and getattr(api, name).__doc__
        )


def test_starting_loads_neither_torch_nor_an_engine() -> None:
    heavy = "import sys, lodeset.infra.cli.main; print([m for m in ('torch', 'ray', 'apache_beam', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_command_line_prints_what_the_functions_return(config: Path, tmp_path: Path) -> None:
    opened = api.open_config(config)
    planned = [(d.stage.name, d.stage.set, d.action, e.images) for d, e in api.plan(opened)]
    told = lodeset("plan", config, "--json")["stages"]
    assert isinstance(told, list)
    assert [(t["stage"], t["set"], t["action"], t["images"]) for t in told] == planned
    assert planned[0] == ("ingest", "pool", "run", 3)
    told = lodeset("status", config, "--json")
    assert told.pop("artifacts") == api.status(opened)
    now = told.pop("now")
    assert (now["state"], now["safe_to_run"], now["next"]) == ("never run", True, f"lodeset plan {config}")
    assert told == {**api.summary(opened).to_json(), "models": []} and told["run"] is None
    assert lodeset("schema") == api.schema()
    assert lodeset("report", config, "--out", tmp_path / "a.html", "--json") == {"path": str(tmp_path / "a.html")}
    assert api.report(opened, tmp_path / "b.html").read_bytes() == (tmp_path / "a.html").read_bytes()
    with pytest.raises(LodesetError, match=r"knows an image 0{32}"):
        api.trace(opened, "0" * 32)


def test_a_trained_model_becomes_an_onnx_network(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    from lodeset.training.config import ModelConfig
    from lodeset.training.export import export
    from lodeset.training.vit import DinoVisionTransformer

    export(DinoVisionTransformer(ModelConfig(dim=16, depth=1, heads=2), 32), tmp_path / "model")
    told = lodeset("export", tmp_path / "model", tmp_path / "model.onnx", "--size", 24, "--json")
    path = tmp_path / "model.onnx"
    assert told == {"path": str(path), "size": 24, "any_size": True, "dim": 16, "size_bytes": path.stat().st_size}
    with pytest.raises(LodesetError, match="size 20 is not a multiple of patch size 8: use 16"):
        api.export(tmp_path / "model", path, 20)
    with pytest.raises(LodesetError, match="holds no model: looked for"):
        api.export(tmp_path / "nowhere", path)


def test_pruned_models_become_onnx_networks(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    import onnxruntime
    from networks import LeNet, images, replaced_at_random, shaken, vit

    from lodeset.pruning.formats.saving import save_pruned
    from lodeset.pruning.units.groups import find_groups, outputs_of
    from lodeset.pruning.units.removal import apply

    for name, model in (("vit", vit(registers=2, heads=4)), ("lenet", shaken(LeNet()))):
        groups = find_groups(model, images(2)).prunable
        pruned, _ = apply(model, groups, replaced_at_random(model, groups, 3), images(2))
        save_pruned(pruned, tmp_path / name, images(2))
        told = lodeset("export", tmp_path / name, tmp_path / f"{name}.onnx", "--size", 16, "--json")
        assert told["size"] == 16
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
        found = session.run(None, {session.get_inputs()[0].name: images(3).numpy()})
        expected = [one.detach().numpy() for one in outputs_of(pruned(images(3)))]
        assert max(abs(a - b).max() for a, b in zip(found, expected, strict=False)) < 1e-4
    with pytest.raises(LodesetError, match="give --size"):
        api.export(tmp_path / "lenet", tmp_path / "lenet.onnx")


def test_init_writes_a_configuration_that_is_valid_and_overwrites_none(tmp_path: Path) -> None:
    path = api.init(tmp_path / "my.yaml")
    assert read(path).pool[0].uri == str(tmp_path / "images")
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists: give another name, or --force"):
        api.init(path)
    assert path.read_text() == "mine"
    assert api.init(path, force=True).read_text() != "mine"
    with pytest.raises(LodesetError, match=r"cannot write .*/none/my\.yaml: No such file"):
        api.init(tmp_path / "none" / "my.yaml")
