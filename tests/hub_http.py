"""Servers on localhost whose requests are remembered and can be made to fail: the part of ``hub_server`` about HTTP."""

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_repository import Refusal

DROP_REQUEST, DROP_RESPONSE, SLOW = "drop request", "drop response", "slow"


@dataclass
class Response:
    """What is sent back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any, status: int = 200, **headers: str) -> "Response":
        """:return: a response that holds the content as JSON"""
        # Dates in the metadata of a card are the reason for ``default``
        return cls(status, json.dumps(content, default=str).encode(), {"Content-Type": "application/json", **headers})


@dataclass(frozen=True)
class Request:
    """What is remembered of a request; its status is 0 where the connection ended before it was complete or answered."""

    server: str
    method: str
    path: str
    status: int
    authorized: bool


@dataclass
class Call:
    """A request that has arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    # Who asks, for servers that know accounts
    user: Any = None

    def json(self) -> dict[str, Any]:
        """:return: the body, which has to be an object"""
        try:
            content = json.loads(self.body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise Refusal(400, "The body must be a JSON object")
        return content

    def flag(self, name: str) -> bool:
        """:return: whether the query sets the parameter"""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Fault:
    """Something that goes wrong the next times that a request matches."""

    pattern: str
    how: str | int
    method: str | None
    times: int
    seconds: float

    def response(self) -> Response:
        """:return: the answer of an overloaded server"""
        headers = {"Retry-After": f"{self.seconds:.0f}"}
        if self.how == 429:
            headers["RateLimit"] = f'"api";r=0;t={self.seconds:.0f}'
            headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
        return Response(int(self.how), b"Too many requests or out of order", {"Content-Type": "text/plain", **headers})


class Service:
    """Listens on several ports, each of which is a server of another name."""

    def __init__(self, *names: str) -> None:
        """:param names: of the servers"""
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._listeners = {name: _Listener(self, name) for name in names}

    def __enter__(self) -> "Service":
        for listener in self._listeners.values():
            listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners.values():
            listener.stop()

    def address(self, name: str) -> str:
        """:return: URL of a server"""
        return f"http://127.0.0.1:{self._listeners[name].server_port}"

    def answer(self, server: str, call: Call) -> Response:
        """
        :param server: name of the server that was asked
        :param call: the request
        :return: the response, whatever the request is
        """
        raise NotImplementedError

    def fail(self, pattern: str, how: str | int, *, method: str | None = None, times: int = 1, seconds: float = 0) -> Fault:
        """
        Lets coming requests fail.

        :param pattern: regular expression that is searched in the path with its query
        :param how: status of the answer; or ``DROP_REQUEST``, to hang up halfway through the request's body and forget it;
            or ``DROP_RESPONSE``, to do what is asked and hang up halfway through the answer's body, or before the answer
            where it has none; or ``SLOW``, to wait and then do what is asked
        :param method: only requests of this method
        :param times: how many requests
        :param seconds: how long to wait, or to ask the client to wait
        :return: the fault; its ``times`` says how many requests are still to fail
        """
        self._faults.append(Fault(pattern, how, method, times, seconds))
        return self._faults[-1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        """:return: what goes wrong with this request"""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method in (None, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


def ranged(call: Call, content: bytes, headers: dict[str, str]) -> Response:
    """:return: the content, or the part of it that the request asks for"""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if not match or match.groups() == ("", ""):
        return Response(200, content, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


class _Listener(ThreadingHTTPServer):
    """One of the ports."""

    daemon_threads = True

    def __init__(self, service: Service, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.service, self.name = service, name
        self.connections: set[Any] = set()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        # Threads of connections that a client keeps open would answer for a server that is gone
        for connection in list(self.connections):
            self.shutdown_request(connection)
        self.thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Only clients that hang up lead here: ``answer`` lets no error of its own through."""


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes responses, or does not where a fault is due."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    # Headers and body in one packet: the client would wait for the second one
    wbufsize = -1

    def _handle(self) -> None:
        service, url = self.server.service, urlsplit(self.path)
        fault = service.take_fault(self.command, self.path)
        how = fault.how if fault else None
        body = self._read_body(how == DROP_REQUEST)
        if body is None or how == DROP_REQUEST:
            self._hang_up(0)
            return
        if fault and how == SLOW:
            time.sleep(fault.seconds)
        call = Call(self.command, url.path, parse_qs(url.query, keep_blank_values=True), self.headers, body)
        response = fault.response() if fault and isinstance(how, int) else service.answer(self.server.name, call)
        sent = b"" if self.command == "HEAD" else response.body
        if how == DROP_RESPONSE and not sent:
            self._hang_up(response.status)
            return
        self._remember(response.status)
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if how == DROP_RESPONSE:
            sent = sent[: len(sent) // 2]
            self.close_connection = True
        self.wfile.write(sent)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _read_body(self, half: bool) -> bytes | None:
        """
        :param half: stop halfway
        :return: the body, nothing where it is not complete
        """
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self._read_chunks(half)
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size // 2 if half else size)
        return body if len(body) == size else None

    def _read_chunks(self, half: bool) -> bytes | None:
        chunks: list[bytes] = []
        while line := self.rfile.readline():
            size = int(line, 16)
            # The end of a line follows each chunk
            chunk = self.rfile.read(size + 2)
            if half or len(chunk) < size + 2:
                return None
            if size == 0:
                return b"".join(chunks)
            chunks.append(chunk[:-2])
        return None

    def _hang_up(self, status: int) -> None:
        self._remember(status)
        self.close_connection = True

    def _remember(self, status: int) -> None:
        authorized = "Authorization" in self.headers
        self.server.service.requests.append(Request(self.server.name, self.command, self.path, status, authorized))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed: ``requests`` holds what happened."""
