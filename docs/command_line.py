"""The help of the subcommands of `jaxweights`, as Markdown."""

import argparse
import importlib
import os


def help_of(name: str) -> str:
    """What `jaxweights NAME --help` prints."""
    os.environ["COLUMNS"] = "100"
    subparsers = argparse.ArgumentParser(prog="jaxweights").add_subparsers()
    text = importlib.import_module(f"jaxweights.command.{name}").add_parser(subparsers).format_help()
    return f"```text\n{text.strip()}\n```"
