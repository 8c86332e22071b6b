"""The patient tools as a server of the Model Context Protocol, for language models and their hosts.

Needs the package `mcp` (`pip install 'sepsis-jax[mcp]'`), which is imported when a server is made.
"""

from __future__ import annotations

import functools
import hmac
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, ParamSpec

from sepsis_jax.pipelines.patient_tools import PatientTools
from sepsis_jax.runs import JsonDict
from worldmodel.errors import InputError

if TYPE_CHECKING:
    from mcp.server import MCPServer
    from starlette.types import ASGIApp, Receive, Scope, Send

KEY_VARIABLE = "SEPSIS_JAX_MCP_KEY"
SHORTEST_KEY = 16  # characters
HOST = "127.0.0.1"
INSTRUCTIONS = (
    "Recorded stays of patients with sepsis, and what a learned world model expects of them under "
    "treatment plans. Research software. Not for clinical use: nothing here has been validated "
    "for, or may be used in, the care of a patient. Answers of the world model are simulations and "
    "may be wrong. Records may be subject to an agreement that forbids to pass them on, as MIMIC's "
    "are; whoever connects a model that runs elsewhere is responsible for that."
)

P = ParamSpec("P")


def make_server(tools: PatientTools) -> MCPServer[object]:
    """A server with the four tools, all of them read-only.

    Raises:
      InputError: the package is not installed.
    """
    try:
        from mcp.server import MCPServer
        from mcp.types import ToolAnnotations
    except ImportError:
        raise InputError(
            "mcp: the package is not installed; pip install 'sepsis-jax[mcp]'"
        ) from None
    server: MCPServer[object] = MCPServer(
        "sepsis-jax",
        instructions=INSTRUCTIONS,
        version=version("sepsis-jax"),
        log_level="WARNING",
        subscriptions=False,
    )
    for tool in (
        tools.list_patients, tools.describe_patient, tools.simulate, tools.compare_plans,
    ):  # fmt: skip
        server.add_tool(
            _refusing(tool),
            description=inspect.getdoc(tool),
            annotations=ToolAnnotations(
                read_only_hint=True, destructive_hint=False, open_world_hint=False
            ),
        )
    return server


def serve_stdio(tools: PatientTools) -> None:
    """Serves the process that started this one, until it closes standard input."""
    make_server(tools).run("stdio")


def serve_http(tools: PatientTools, port: int, key: str) -> None:
    """Serves this machine alone, at http://127.0.0.1:port/mcp, until it is interrupted.

    Args:
      tools: to serve.
      port: to listen on.
      key: that requests must bear.

    Raises:
      InputError: the key is too short, or the package is not installed.
    """
    app = http_app(tools, key)
    import uvicorn

    uvicorn.run(app, host=HOST, port=port, log_level="warning")


def http_app(tools: PatientTools, key: str) -> ASGIApp:
    """An ASGI application that refuses whoever does not bear the key."""
    if len(key) < SHORTEST_KEY:
        raise InputError(
            f"{KEY_VARIABLE}: expected a key of at least {SHORTEST_KEY} characters, such as "
            "`openssl rand -hex 16` makes"
        )
    server = make_server(tools)
    app = server.streamable_http_app(json_response=True, stateless_http=True, host=HOST)
    wanted = f"Bearer {key}".encode()

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, wanted):
                head = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
                await send({"type": "http.response.start", "status": 401, "headers": head})
                await send({"type": "http.response.body", "body": b""})
                return
        await app(scope, receive, send)

    return checked


def _refusing(tool: Callable[P, JsonDict]) -> Callable[P, JsonDict]:
    """A tool whose bad input is told to the model in words; other errors are not."""
    from mcp.server.mcpserver.exceptions import ToolError

    @functools.wraps(tool)
    def called(*given: P.args, **named: P.kwargs) -> JsonDict:
        try:
            return tool(*given, **named)
        except InputError as error:
            raise ToolError(str(error)) from None

    return called
