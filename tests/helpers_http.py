"""Servers on a free port of this machine, in threads: an ASGI application, and a stub."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def served(api, port=0, **options):
    """(address, server) of the application in a thread; options as of `Server`."""
    from rewards.connections import Server

    server = Server(api, port=port, log_level="error", **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join()


def slow(images, prompts):
    """A reward that takes as many seconds as the first prompt says."""
    time.sleep(float(prompts[0]))
    return images.mean((1, 2, 3))


def until(condition, seconds=20):
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def stub(answer):
    """Address of a server whose replies are answer(path, payload, headers) -> (status, JSON)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", -1

        def do_POST(self):
            size = int(self.headers.get("content-length", 0))
            payload = json.loads(self.rfile.read(size) or "null")
            status, reply = answer(self.path, payload, self.headers)
            body = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
