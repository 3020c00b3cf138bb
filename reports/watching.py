"""``mpformer report --watch``: what changed is built again and shown on this machine alone; pages reload themselves."""

import functools
import json
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mpformer.runtime.errors import UserError
from reports.pages import script_hash
from reports.render import TEMPLATES

ADDRESS = "127.0.0.1"
CHANGES = "/.changes"
"""Where a page asks when it was last written; the rest of the address is the page's."""


class _Handler(SimpleHTTPRequestHandler):
    """Serves the report's files, pages with a script that reloads them; to requests that name this machine alone."""

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in (ADDRESS, "localhost"):
            self.send_error(403, "only by its own address")  # a page elsewhere whose name was made to lead here
        elif self.path.startswith(CHANGES):
            written = self._file(self.path.removeprefix(CHANGES))
            self._answer(json.dumps(written.stat().st_mtime_ns if written.is_file() else 0), "application/json")
        elif (page := self._file(self.path)).suffix == ".html" and page.is_file():
            self._answer(reloading(page.read_text()), "text/html; charset=utf-8")
        else:
            super().do_GET()

    def _file(self, address: str) -> Path:
        path = Path(self.translate_path(unquote(urlsplit(address).path) or "/"))
        return path / "index.html" if path.is_dir() else path

    def _answer(self, content: str, kind: str) -> None:
        body = content.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing: what is of interest is printed by the builds."""


@functools.cache
def _script() -> str:
    return (TEMPLATES / "watch.js").read_text()


def reloading(page: str) -> str:
    """A page with the script that reloads it, which its content security policy then allows, and asking its server."""
    allowed = page.replace("default-src 'none'", "default-src 'none'; connect-src 'self'", 1)
    allowed = allowed.replace("script-src '", f"script-src '{script_hash(_script())}' '", 1)
    return allowed.replace("</body>", f"<script>{_script()}</script>\n</body>")


def start(base: Path, port: int = 0) -> ThreadingHTTPServer:
    """Serve ``base`` from a thread, on the loopback address; port 0: a free one. Raises UserError if it is taken."""
    handler = functools.partial(_Handler, directory=str(base))
    try:
        server = ThreadingHTTPServer((ADDRESS, port), handler)
    except OSError as error:
        raise UserError(
            f"cannot serve on port {port}: {error.strerror or error}; choose another with --port"
        ) from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def watch(rebuild: Callable[[], object], seconds: float, warn: Callable[[str], object]) -> None:
    """Build again and again until Ctrl-C; a build that fails is said, and the next one may succeed."""
    try:
        while True:
            time.sleep(seconds)
            try:
                rebuild()
            except UserError as error:
                warn(str(error))
    except KeyboardInterrupt:
        return
