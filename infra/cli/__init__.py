"""The command line: Typer commands, their options, and how they print results and progress."""
