"""`lodeset inspect`: the dashboard of a configuration, for the browser of this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lodeset.infra import api
from lodeset.infra.cli.options import Set, err, out, safe
from lodeset.pipeline.errors import ConfigError, HeldError, LodesetError

if TYPE_CHECKING:
    from lodeset.infra.dashboard.making import Inspected
    from lodeset.infra.session import Opened

inspect_commands = typer.Typer()

TOKEN_VARIABLE = "LODESET_DASHBOARD_TOKEN"
TOKEN_LETTERS = 16  # at least

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="configuration file (`lodeset init` writes one)")]


@inspect_commands.command()
def inspect(
    config: ConfigPath,
    number: Annotated[
        int | None, typer.Option("--run", min=1, metavar="N", help="show run N instead of the last one")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="port on 127.0.0.1 [0: a free one]")] = 0,
    base_path: Annotated[
        str, typer.Option("--base-path", metavar="/PATH", help="path under which a proxy shows it")
    ] = "",
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="host name that a proxy gives it; may be repeated"),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open/--no-open", help="open it in a browser, where there is a screen")
    ] = True,
    thumbnails: Annotated[
        bool,
        typer.Option("--thumbnails/--no-thumbnails", help="make thumbnails of all images, which reads their sources"),
    ] = True,
    make_only: Annotated[
        bool, typer.Option("--make-only", help="make what pages show of the run, and start no dashboard")
    ] = False,
    set_: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="of the runs with this --limit")] = None,
) -> None:
    """Show the runs of a configuration in the browser.

    The first time that a run is shown, tables and thumbnails for the pages are made of it in the store.
    """
    from lodeset.infra.dashboard.data import opened as opened_data
    from lodeset.infra.dashboard.serving import listening, server
    from lodeset.infra.dashboard.site import Site, base_path_of

    opened = api.open_store(config, tuple(set_ or ()), limit)
    if number is not None:
        opened.store.run(number)  # there is such a run
    token, path = _token(), base_path_of(base_path)
    with contextlib.ExitStack() as left:
        # First: a taken port is no work lost.
        listener = None if make_only else left.enter_context(contextlib.closing(listening(port)))
        made = made_of(opened, number, thumbnails)
        if listener is None:
            count = made.artifact.rows.kept if made is not None else 0
            out.print(f"{count:,} images are ready for the dashboard", highlight=False)
            return
        data = left.enter_context(opened_data(opened.store, made)) if made is not None else None
        if data is not None:  # what most pages need is read while the browser starts
            threading.Thread(target=data.warm, daemon=True).start()
        site = Site(
            opened=opened,
            data=data,
            token=token,
            port=listener.getsockname()[1],
            run=number,
            base_path=path,
            allowed_hosts=tuple(allowed_host or ()),
        )
        address = f"http://127.0.0.1:{site.port}{path}/?token={token}"
        # Printed whole: what looks like a secret is otherwise hidden, and this one is for the reader.
        print(address, flush=True)
        err.print(f"[dim]the dashboard of {safe(opened.store.url)}; Ctrl-C ends it[/]", soft_wrap=True)
        if open_ and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):  # the server raises it again once it has ended
            server(site).run(sockets=[listener])
    out.print("the dashboard has ended")


def made_of(opened: Opened, run: int | None = None, thumbnails: bool = True) -> Inspected | None:
    """What pages read of the run, made now if it is not there yet; None if no run has ingested the pool."""
    from lodeset.infra.cli.progress import watching
    from lodeset.infra.dashboard.making import found, inspect
    from lodeset.infra.looking.looking import held

    if "ingest/pool" not in held(opened, run).artifacts:
        return None
    try:
        with watching(err) as watch:
            return inspect(opened, watch, run, thumbnails)
    except HeldError as error:
        err.print(f"[yellow]warning:[/] {safe(error)}", soft_wrap=True)
        return found(opened, run)
    except LodesetError as error:
        if not thumbnails:
            raise
        err.print(f"[yellow]warning:[/] there are no thumbnails: {safe(error)}", soft_wrap=True)
        with watching(err) as watch:
            return inspect(opened, watch, run, thumbnails=False)


def _token() -> str:
    """The secret of this start; a proxy that adds it to requests gives it in the environment.

    Raises:
        ConfigError: the one in the environment is too short, or cannot be in an address.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return secrets.token_urlsafe(32)
    if len(given) < TOKEN_LETTERS or not all(
        letter.isascii() and (letter.isalnum() or letter in "-_") for letter in given
    ):
        raise ConfigError(
            f"{TOKEN_VARIABLE} needs at least {TOKEN_LETTERS} letters, digits, `-` or `_`; "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one"
        )
    return given
