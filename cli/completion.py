"""`netloom completion`: the script that makes a shell complete the command's words, also names of pools."""

import click
from click.shell_completion import ShellComplete, get_completion_class

from cli.failure import EPILOG

PROGRAM = "netloom"
VARIABLE = "_NETLOOM_COMPLETE"  # what click looks for in the environment of a program of that name


@click.command("completion", epilog=EPILOG, short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash:  netloom completion bash > /etc/bash_completion.d/netloom
    zsh:   netloom completion zsh > "${fpath[1]}/_netloom"
    fish:  netloom completion fish > ~/.config/fish/completions/netloom.fish
    """
    kind = get_completion_class(shell)
    if kind is None:  # click knows all three
        raise click.UsageError(f"there is no completion for {shell}")
    # The class's own `source` runs bash to warn of an old one, but the script may be made for another machine.
    click.echo(ShellComplete.source(kind(ctx.find_root().command, {}, PROGRAM, VARIABLE)))
