"""The `netloom` command: its groups, and the one place where it ends."""

import contextlib
import os
import sys
from collections.abc import Sequence

import click

from cli import output
from cli.addresses import addresses
from cli.attach import attach, detach
from cli.check import check
from cli.completion import PROGRAM, VARIABLE, completion
from cli.doctor import doctor
from cli.failure import EPILOG, Failure, Status
from cli.gc import gc
from cli.import_flannel import take_over
from cli.import_host_local import imports
from cli.networks import networks
from cli.nodes import nodes
from cli.options import common
from cli.pools import pools
from cli.route import route
from cli.status import status
from cli.store import store
from cli.topology import topology
from cli.trace import trace
from kernel.version import VERSION

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name=PROGRAM, message="%(prog)s %(version)s")
@common
def netloom() -> None:
    """Container networking on this host: which addresses there are, who holds them, and is all well?

    Tables are for people, --json is for programs: one document with stable keys.
    """


for _command in (
    status,
    route,
    topology,
    doctor,
    gc,
    trace,
    attach,
    detach,
    addresses,
    pools,
    networks,
    nodes,
    store,
    take_over,
    completion,
):
    netloom.add_command(_command)
addresses.add_command(imports)
addresses.add_command(check)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. Errors become one line on standard error."""
    # gRPC's own notes on standard error would stand between ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    output.prepare_streams()
    try:
        result = netloom.main(arguments, PROGRAM, complete_var=VARIABLE, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return Status.USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else PROGRAM
        return _fail(f"{error.format_message()} (see '{path} --help')", Status.USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), error.status if isinstance(error, Failure) else error.exit_code)
    except OSError as error:
        # What could not be written is still in the buffer, and would fail once more at the end of the process.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return _fail(f"cannot write the answer: {error.strerror or error}", Status.FAILED)
    except click.Abort:
        return _fail("interrupted", _INTERRUPTED)
    # click returns the status of its own early ends (--help) and of Exit, else what the subcommand returned.
    return result if isinstance(result, int) else Status.DONE


def _fail(message: str, status_code: int) -> int:
    text = " ".join(message.split("\n"))
    click.echo(f"{PROGRAM}: {output.visible(text)}", err=True)
    return status_code
