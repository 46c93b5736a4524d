"""The options that every subcommand has, before or behind its name, and what completes names of pools."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from cli.daemon import connected, socket_path
from cli.failure import EPILOG, Failure
from ipamd.client import Client

F = TypeVar("F", bound=Callable[..., Any])

_COMPLETION_TIMEOUT_S = 1.0


@dataclass
class Choices:
    """What was chosen so far on the command line; options behind the subcommand are read last and win."""

    socket: str | None = None
    as_json: bool = False

    def ipamd(self) -> AbstractContextManager[Client]:
        """A client of ipamd, to be entered with `with`."""
        return connected(self.socket_path())

    def socket_path(self) -> str:
        """Where ipamd is expected."""
        return socket_path(self.socket, os.environ)


pass_choices = click.make_pass_decorator(Choices, ensure=True)


def common(function: F) -> F:
    """Adds --socket and --json, which land in Choices."""
    function = click.option(
        "--json", is_flag=True, expose_value=False, callback=_choose("as_json"), help="Print one JSON document."
    )(function)
    return click.option(
        "--socket",
        metavar="PATH",
        type=click.Path(),
        expose_value=False,
        callback=_choose("socket"),
        help="ipamd's socket.  [default: from the configuration]",
    )(function)


def command(group: click.Group, name: str) -> Callable[[F], click.Command]:
    """A subcommand with the common options, and with the exit statuses in its help."""

    def decorate(function: F) -> click.Command:
        return group.command(name, epilog=EPILOG)(common(function))

    return decorate


def complete_pool(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The names of the pools that begin so; none where ipamd does not answer at once."""
    choices = ctx.find_object(Choices) or Choices()
    try:
        with connected(choices.socket_path(), _COMPLETION_TIMEOUT_S) as ipamd:
            pools = ipamd.list_pools()
    except Failure:
        return []
    return [CompletionItem(pool.name) for pool in pools if pool.name.startswith(incomplete)]


def complete_node(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The names of the cluster's nodes that begin so; none where ipamd does not answer at once."""
    choices = ctx.find_object(Choices) or Choices()
    try:
        with connected(choices.socket_path(), _COMPLETION_TIMEOUT_S) as ipamd:
            nodes = ipamd.list_nodes()
    except Failure:
        return []
    return [CompletionItem(node.name) for node in nodes if node.name.startswith(incomplete)]


def _choose(field: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def callback(ctx: click.Context, _param: click.Parameter, value: object) -> None:
        if value:
            setattr(ctx.ensure_object(Choices), field, value)

    return callback
