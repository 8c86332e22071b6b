"""The server of the pages: on loopback, with a key, read-only."""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from sepsis_jax.console import DISCLAIMER
from sepsis_jax.explore.address import read_patient_address
from sepsis_jax.explore.dialogues import dialogue_page
from sepsis_jax.explore.explorer import Explorer
from sepsis_jax.explore.patient import patient_page
from sepsis_jax.explore.patients import patients_page
from sepsis_jax.report.figures import COLORS
from sepsis_jax.report.svg import css
from worldmodel.errors import InputError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
KEY_VARIABLE = "SEPSIS_JAX_EXPLORE_KEY"
_NEEDED = ("starlette", "uvicorn", "plotly")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
FRAGMENT = "x-fragment"  # header of requests for the inner part of a page
_STATIC = {
    "explore.css": "text/css",
    "explore.js": "text/javascript",
    "theme.js": "text/javascript",
}
Scope = MutableMapping[str, object]
Receive = Callable[[], Awaitable[MutableMapping[str, object]]]
Send = Callable[[MutableMapping[str, object]], Awaitable[None]]
Pages = Callable[[Explorer, Mapping[str, list[str]]], dict[str, object]]


def check_installed() -> None:
    """Makes sure that the extra `explore` is there.

    Raises:
      InputError: it is not; the message says how to install it.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"explore: needs {', '.join(missing)}; install it with: "
            "pip install -c constraints.txt -e '.[explore]'"
        )


def new_key() -> str:
    """A random key."""
    return secrets.token_urlsafe(24)


def bound_socket(port: int) -> socket.socket:
    """A listening socket on loopback.

    Args:
      port: 0 for a free one.

    Raises:
      InputError: the port is taken or not allowed.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen()
    except OSError as error:
        found.close()
        raise InputError(
            f"port {port}: cannot be used ({error.strerror}); choose another with --port, or 0 "
            "for a free one"
        ) from None
    return found


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serves until it is interrupted."""
    import uvicorn

    # Requests are not logged: the first one of a browser has the key in its address.
    config = uvicorn.Config(app, access_log=False, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def create_app(explorer: Explorer, key: str, *, port: int) -> Starlette:
    """The application.

    Args:
      explorer: that answers.
      key: that every browser must show once; kept in a cookie of its own for each port.
      port: that it is served on; names of other hosts are refused.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import FileResponse, HTMLResponse, Response
    from starlette.routing import Route

    environment = Environment(
        loader=PackageLoader("sepsis_jax.explore", "templates"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"disclaimer": DISCLAIMER}

    def rendered(request: Request, name: str, context: Mapping[str, object]) -> Response:
        whole = FRAGMENT not in request.headers
        text = environment.get_template(name).render(
            context, base="page.html.j2" if whole else "fragment.html.j2",
            has_runs=bool(explorer.runs),
        )  # fmt: skip
        return HTMLResponse(text, headers={"Vary": FRAGMENT, "Cache-Control": "no-store"})

    def page(template: str, make: Pages) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            query = {name: request.query_params.getlist(name) for name in request.query_params}
            return rendered(request, template, make(explorer, query))

        return answer

    def patient(explorer: Explorer, query: Mapping[str, list[str]]) -> dict[str, object]:
        return patient_page(explorer, read_patient_address(query, horizon=explorer.horizon))

    def refused(request: Request, error: Exception) -> Response:
        found = rendered(request, "error.html.j2", {"title": "Not found", "message": str(error)})
        found.status_code = 400
        return found

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "colors.css":
            return Response(_colors(), media_type="text/css")
        if name == "plotly.js":
            return FileResponse(plotly_file(), media_type="text/javascript",
                                headers={"Cache-Control": "max-age=86400"})  # fmt: skip
        if name not in _STATIC:
            return Response("no such file", 404, media_type="text/plain")
        content = (files("sepsis_jax.explore") / "static" / name).read_bytes()
        return Response(content, media_type=_STATIC[name], headers={"Cache-Control": "no-cache"})

    asks = environment.get_template("key.html.j2").render(title="Key needed")
    return Starlette(
        routes=[
            Route("/", page("patients.html.j2", patients_page)),
            Route("/patient", page("patient.html.j2", patient)),
            Route("/dialogue", page("dialogue.html.j2", dialogue_page)),
            Route("/static/{name}", static),
        ],
        middleware=[Middleware(Guard, key=key, port=port, asks=asks)],
        exception_handlers={InputError: refused},
    )


def plotly_file() -> Path:
    """The chart library's script, as its package for Python brings it."""
    spec = find_spec("plotly")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


def _colors() -> str:
    """The colours of plans, which reports have as well, as CSS."""
    return "".join(
        f".color-{number} {{ --plan: {css(color)}; }}\n" for number, color in enumerate(COLORS)
    )


class Guard:
    """Lets in requests for this host that show the key, and sets headers of security.

    A key in the address is put into a cookie, and the browser is sent to the address without it.

    Args:
      app: behind it.
      key: compared in constant time.
      port: of the server; other names of hosts are refused, which stops DNS rebinding.
      asks: page that asks for the key.
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], key: str, port: int, asks: str
    ):
        self.app, self.key, self.asks = app, key, asks
        self.cookie = f"sepsis-jax-explore-{port}"
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or passes on one request."""
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse

        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, object]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), text.encode()) for name, text in _HEADERS.items()]
                headers = message.get("headers", [])
                assert isinstance(headers, list)
                message["headers"] = [*headers, *added]
            await send(message)

        request = Request(scope)
        answer: Response | None = None
        query = parse_qsl(request.url.query, keep_blank_values=True)
        shown = dict(query).get("key")
        if request.headers.get("host") not in self.hosts:
            answer = PlainTextResponse("unknown host", 421)
        elif request.method not in ("GET", "HEAD"):
            answer = PlainTextResponse("read-only", 405)
        elif shown is not None and self._fits(shown):
            rest = urlencode([pair for pair in query if pair[0] != "key"], safe=",;")
            # A path that begins with two slashes would lead to another host.
            path = "/" + request.url.path.lstrip("/")
            answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
            answer.set_cookie(self.cookie, self.key, httponly=True, samesite="strict")
        elif not self._fits(request.cookies.get(self.cookie, "")):
            answer = HTMLResponse(self.asks, 403)
        await (answer or self.app)(scope, receive, guarded)

    def _fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.key.encode())
