"""A loopback server that answers by script, and the faults that it can play."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def scripted(*answers):
    """A server that gives these answers in turn, the last one for ever: functions of the request handler."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, dict(self.headers), body, time.monotonic()))
            with suppress(OSError):  # the client gave up
                answers[min(len(asked), len(answers)) - 1](self)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/retrieve", asked
        running.shutdown()


def answer(body, status=200, headers=(), cut=0):
    """Give this JSON (or these bytes); with ``cut`` close the connection that many bytes before the end."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def give(handler):
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) - cut])
        handler.close_connection = bool(cut)

    return give


FAULTS = {
    "500": answer({}, 500),
    "503": answer({}, 503),
    "cut off": answer({"result": [[]]}, cut=10),
    "half a JSON": answer(b'{"result": [['),
    "connection closed": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "no HTTP": lambda handler: handler.wfile.write(b"what?\r\n\r\n") and handler.connection.shutdown(socket.SHUT_RDWR),
}


def sleeping(handler):
    time.sleep(8)
