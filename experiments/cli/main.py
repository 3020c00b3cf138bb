"""The ``mpformer`` command. Everything heavy is imported inside the command that needs it."""

import contextlib
import errno
import os
import sys
from pathlib import Path

import click

from experiments.cli import (  # noqa: F401
    config_commands,
    data_commands,
    launch_commands,
    model_commands,
    own_packages,
    profile_commands,
    run_commands,
    suite_commands,
    unwritable,
)
from experiments.cli.console import silence
from experiments.cli.group import cli
from experiments.cli.options import json_option, root_options
from mpformer.runtime.disk import DISK
from mpformer.runtime.errors import RunFailure, UserError

__all__ = ["cli", "main"]

_DISK = DISK | {errno.ENOTDIR}


def main() -> None:
    """Entry point: exit code 0 fine, 1 runs failed, 2 a mistake the user can mend (one line), 130 Ctrl-C."""
    try:
        own_packages.check()
        sys.exit(cli.main(standalone_mode=False) or 0)
    except (UserError, RunFailure) as error:
        _exit(str(error), error.exit_code)
    except click.exceptions.Abort:
        _exit("interrupted", 130)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        silence()  # `mpformer … | head`
        sys.exit(0)
    except OSError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # what it had to say found a closed terminal
            os._exit(130)
        if error.errno not in _DISK:
            raise
        _exit(unwritable.line(error, sys.argv[1:]), 2)


def _exit(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        click.echo(f"mpformer: {message}", err=True)
    sys.exit(code)


@cli.command()
@root_options
@json_option
def doctor(root: Path, data_root: Path, as_json: bool) -> int:
    """Say what is installed and in use, train two iterations, and what to do about what is missing."""
    from experiments.cli import doctor as checks

    return int(checks.run(root=root, data_root=data_root, as_json=as_json) or 0)


if __name__ == "__main__":
    main()
