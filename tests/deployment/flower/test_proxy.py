"""The proxy in front of a SuperLink forwards requests of nodes only, and survives idle clients."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.cases import each_case
from tests.support.nodes import until

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "deployment"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in ("openssl", "ssh-keygen")),
        reason="openssl or OpenSSH is not installed",
    ),
]
PROXIES = [
    pytest.param(
        name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed")
    )
    for name in ("nginx", "caddy")
]


class Upstream(BaseHTTPRequestHandler):
    """In the role of the SuperLink: answer each request with its path."""

    def do_POST(self) -> None:
        # A proxy closes the connection of a request that its client does not finish.
        with suppress(OSError):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module", params=PROXIES)
def proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, ssl.SSLContext]]:
    """Start a proxy with its example file, and yield its port and a context to trust it."""
    folder = tmp_path_factory.mktemp("proxy")
    keys = folder / "net"
    command = [EXAMPLES / "make_keys.sh", keys, "127.0.0.1", "north"]
    subprocess.run(command, check=True, capture_output=True)
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.pem", keys / "server.key")
    upstream.socket = context.wrap_socket(upstream.socket, server_side=True)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changes = {
        "/srv/fl/net": keys,
        "9092": port,
        "127.0.0.1:8000": f"127.0.0.1:{upstream.server_port}",
    }
    prepare = {"nginx": nginx_command, "caddy": caddy_command}[request.param]
    command = prepare(folder, changes)
    with (
        open(folder / "log", "ab") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):

        def listens() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(listens)
        yield port, ssl.create_default_context(cafile=str(keys / "authority.pem"))
        process.terminate()
    upstream.shutdown()
    upstream.server_close()


def nginx_command(folder: Path, changes: Mapping[str, object]) -> list[str]:
    """Return the command that runs nginx, with its temporary files in a folder."""
    text = example("nginx.conf", changes)
    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        text = text.replace("http {", f"http {{\n  {name}_temp_path {folder}/{name};", 1)
    (folder / "nginx.conf").write_text(
        f"user root;\npid {folder}/pid;\nerror_log {folder}/log;\ndaemon off;\n"
        + text.replace("http {", "http {\n  access_log off;", 1)
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "log")]


def caddy_command(folder: Path, changes: Mapping[str, object]) -> list[str]:
    """Return the command that runs Caddy."""
    (folder / "Caddyfile").write_text(example("Caddyfile", changes))
    return ["caddy", "run", "--config", str(folder / "Caddyfile")]


def example(name: str, changes: Mapping[str, object]) -> str:
    """Return an example file with other paths and ports."""
    text = (EXAMPLES / name).read_text()
    for old, new in changes.items():
        text = text.replace(old, str(new))
    return text


def send(
    proxy: tuple[int, ssl.SSLContext], method: str, path: str, size: int = 0
) -> tuple[int, bytes]:
    """Send a request with a body of `size` bytes; return the status and the body of the answer."""
    port, context = proxy
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
    with closing(connection):
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Length", str(size))
        connection.endheaders(bytes(min(size, 1000)))
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_requests_of_nodes_are_forwarded(proxy: tuple[int, ssl.SSLContext]) -> None:
    assert send(proxy, "POST", "/v1/fleet/pull-messages", 10) == (
        200,
        b"/v1/fleet/pull-messages",
    )


@each_case(
    ("method", "path", "size"),
    [
        ("POST", "/v1/control/start-run", 10),
        ("GET", "/v1/fleet/pull-messages", 0),
        ("POST", "/v1/fleet/../control/start-run", 10),
        ("POST", "/v1/fleet/%2e%2e/control/start-run", 10),
        ("POST", "/v1/control/..%2ffleet/x", 10),
        ("POST", "//v1/control/start-run", 10),
        ("POST", "/v1/fleet/push-object", 2**30),
    ],
)
def test_other_requests_are_refused(
    method: str, path: str, size: int, proxy: tuple[int, ssl.SSLContext]
) -> None:
    assert send(proxy, method, path, size)[0] in (400, 403, 404, 413)


def test_idle_connections_and_unfinished_requests_do_not_block_nodes(
    proxy: tuple[int, ssl.SSLContext],
) -> None:
    port, context = proxy
    with ExitStack() as stack:
        for number in range(1100):
            plain = socket.create_connection(("127.0.0.1", port))
            connection = stack.enter_context(
                context.wrap_socket(plain, server_hostname="127.0.0.1")
            )
            if number % 3 == 1:
                connection.sendall(b"POST /v1/fleet/x HTTP/1.1\r\nHost: a\r\n")
            if number % 100 == 2:
                connection.sendall(
                    b"POST /v1/fleet/x HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\nabc"
                )

        assert send(proxy, "POST", "/v1/fleet/x", 10) == (200, b"/v1/fleet/x")

        connection.settimeout(60)
        assert connection.recv(1) == b"", "an idle connection is closed"
