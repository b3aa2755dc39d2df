"""An OpenAI-compatible server on this machine."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = Mapping[str, Any]
HANG_UP = 0  # in place of a status


@contextmanager
def serving(
    pages: Mapping[str, Callable[[], Body | str]],
    complete: Callable[[Body, Mapping[str, str]], tuple[int, Body]],
) -> Iterator[str]:
    """Serve within the block; its URL.

    Args:
        pages: Each is made when it is read, as JSON or text.
        complete: Status and reply to a request and its headers.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, pages[self.path]())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = complete(body, dict(self.headers))
            if status == HANG_UP:
                self.close_connection = True
            else:
                self.reply(status, content)

        def reply(self, status: int, content: Body | str) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()
