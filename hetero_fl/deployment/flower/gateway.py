"""Process that forwards requests of nodes on other machines to a SuperLink.

A SuperLink serves three APIs on one port. Nodes use /v1/fleet, which authenticates the nodes. The
other APIs control runs and nodes without authentication. Therefore, the SuperLink listens on this
machine only, and this process forwards only requests to /v1/fleet.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn

PREFIX = "/v1/fleet/"
# Maximum size of a request in bytes; Flower splits larger messages.
REQUEST_BYTES = 64 * 2**20
# Headers that apply to a single connection and are not forwarded.
HOP_HEADERS = {b"connection", b"content-length", b"host", b"keep-alive", b"transfer-encoding"}
# Maximum number of concurrent connections.
CONNECTIONS = 1000
# Seconds that the SuperLink may take for a response.
TIMEOUT = 120.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gateway:
    """ASGI application that forwards POST requests below `PREFIX` to a SuperLink.

    Args:
        url: Address of the SuperLink.
        authority: Certificate of the authority that signed the SuperLink's certificate.
    """

    def __init__(self, url: str, authority: Path) -> None:
        context = ssl.create_default_context(cafile=authority)
        self._client = httpx.AsyncClient(base_url=url, verify=context, timeout=TIMEOUT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to the SuperLink, or respond with an HTTP error."""
        if scope["type"] != "http":
            return
        if scope["method"] != "POST" or not scope["path"].startswith(PREFIX):
            await _respond(send, 404)
            return
        if ".." in scope["path"] or b"%" in scope["raw_path"]:
            await _respond(send, 400)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > REQUEST_BYTES:
            await _respond(send, 413)
            return
        body = bytearray()
        async for chunk in _chunks(receive):
            body += chunk
            if len(body) > REQUEST_BYTES:
                await _respond(send, 413)
                return
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP_HEADERS]
        try:
            response = await self._client.post(
                scope["path"],
                params=scope["query_string"].decode("latin-1"),
                headers=headers,
                content=bytes(body),
            )
        except (httpx.RequestError, httpx.InvalidURL):
            await _respond(send, 503)
            return
        response_headers = [
            (name.lower(), value)
            for name, value in response.headers.raw
            if name.lower() not in HOP_HEADERS
        ]
        await _respond(send, response.status_code, response_headers, response.content)


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the chunks of a request's body."""
    while (message := await receive())["type"] == "http.request":
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _respond(
    send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None, body: bytes = b""
) -> None:
    length = (b"content-length", str(len(body)).encode())
    head = {"type": "http.response.start", "status": status, "headers": [*(headers or []), length]}
    await send(head)
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Serve over TLS until the process is terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--superlink-authority", type=Path, required=True)
    arguments = parser.parse_args()
    uvicorn.run(
        Gateway(arguments.superlink, arguments.superlink_authority),
        host=arguments.host,
        port=arguments.port,
        ssl_certfile=arguments.certificate,
        ssl_keyfile=arguments.key,
        log_level="warning",
        lifespan="off",
        limit_concurrency=CONNECTIONS,
    )


if __name__ == "__main__":
    main()
