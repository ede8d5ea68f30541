"""How the page is served: what the command line said, checked."""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whitetuner.errors import UserError

if TYPE_CHECKING:
    from whitetuner.gui.pickers import Roots

#: Environment variable of the page's password, where a file does not suit (containers).
PASSWORD_VARIABLE = "WHITETUNER_PASSWORD"
SHORTEST_PASSWORD = 8


@dataclass(frozen=True)
class Settings:
    """host, port: where the page is; tensorboard_port: on loopback; password: None only where nobody else can reach the page;
    made_up: the password was generated (it is shown in a one-time link); server: no dialogs, paths confined to roots."""

    host: str = "127.0.0.1"
    port: int = 7860
    tensorboard_port: int = 6006
    open_browser: bool = True
    server: bool = False
    password: str | None = None
    made_up: bool = False
    roots: tuple[Path, ...] = ()

    @property
    def local(self) -> bool:
        """Only this machine reaches the page."""
        return is_loopback(self.host)

    def paths(self) -> Roots:
        """Where the page may look and write: everywhere for the user at this machine, inside the roots with --server."""
        from whitetuner.gui.pickers import Roots

        return Roots.of(self.roots if self.server else None, native=self.local and not self.server)


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1 and the name localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def password_for(host: str, file: Path | None) -> tuple[str | None, bool]:
    """(password, was it made up): from the file, else from the environment, else generated where others can reach the page.

    Raises UserError for a file that cannot be read and for a password that is too short to be one.
    """
    given = os.environ.get(PASSWORD_VARIABLE) or None
    where = PASSWORD_VARIABLE
    if file is not None:
        where = str(file)
        try:
            given = file.read_text(encoding="utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "the password file cannot be read ({reason})",
                where=where,
                mend="write the password into a text file and give its path",
                reason=getattr(error, "strerror", None) or "it is no UTF-8 text",
            ) from error
    if given is None:
        return (None, False) if is_loopback(host) else (secrets.token_urlsafe(12), True)
    if len(given) < SHORTEST_PASSWORD:
        raise UserError(
            "the password is too short",
            where=where,
            mend="use at least {least} characters",
            least=SHORTEST_PASSWORD,
        )
    return given, False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `whitetuner gui`."""
    add = parser.add_argument
    add(
        "--listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where others reach the page, e.g. 0.0.0.0 (a password is then needed; default: %(default)s)",
    )
    add("--port", type=int, default=7860, help="a taken one gives way to the next (default: %(default)s)")
    add(
        "--tensorboard",
        type=int,
        default=6006,
        metavar="PORT",
        help="TensorBoard's own port on this machine (default: %(default)s)",
    )
    add("--no-browser", action="store_true", help="do not open a browser")
    add("--server", action="store_true", help="no dialogs; paths stay inside the --root folders")
    add(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="with --server: a folder that may be used (may be repeated; default: the current one)",
    )
    add(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="holds the page's password (or WHITETUNER_PASSWORD; else one is made up where it is needed)",
    )


def from_arguments(given: argparse.Namespace) -> Settings:
    """Raises UserError for a password that is none."""
    password, made_up = password_for(given.listen, given.password_file)
    roots = tuple(root.resolve() for root in given.root or [Path.cwd()]) if given.server else ()
    return Settings(
        host=given.listen,
        port=given.port,
        tensorboard_port=given.tensorboard,
        open_browser=not given.no_browser,
        server=given.server,
        password=password,
        made_up=made_up,
        roots=roots,
    )
