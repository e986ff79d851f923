"""A process in a vLLM server's place that fails when told: `python frail_server.py PORT FOLDER`.

A file in FOLDER makes it fail: `exit` holds how many servers exit with code 3 at their next
request, `fail` how many requests are answered 500 then; `hang` lets a server answer nothing any
more, and goes. Each answer's ids name its process.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
hangs: list[bool] = []


def take_one(name: str) -> bool:
    """Whether the file `name` held a number above zero, which is now one less."""
    file = FOLDER / name
    left = int(file.read_text()) if file.exists() else 0
    if left:
        file.write_text(str(left - 1))
    return left > 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        while hangs:
            time.sleep(1)
        self._send({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if take_one("exit"):
            print("RuntimeError: told to exit", flush=True)
            os._exit(3)
        if take_one("fail"):
            self._send({}, 500)
            return
        if (FOLDER / "hang").exists():
            (FOLDER / "hang").unlink()
            hangs.append(True)
        while hangs:
            time.sleep(1)
        choice = {
            "token_ids": [os.getpid()],
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [-1.0]},
            "finish_reason": "length",
        }
        self._send({"choices": [choice]})

    def _send(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
