"""What a cloud's machines ask about themselves, on loopback: AWS and Google Cloud as their documentation has it."""

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token-of-this-machine"


class MetadataServer:
    """A context manager; `url` is where it answers."""

    def __init__(self):
        self.ends: datetime | None = None
        self.failures = 0
        self.nonsense: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                granted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.answer(200 if granted else 400, TOKEN)

            def do_GET(self) -> None:
                if outer.nonsense:
                    self.wfile.write(outer.nonsense.pop())
                elif outer.failures:
                    outer.failures -= 1
                    self.answer(503, "")
                elif self.path == "/latest/meta-data/spot/instance-action":
                    self.aws()
                elif self.path == "/computeMetadata/v1/instance/preempted":
                    told = self.headers["Metadata-Flavor"] == "Google"
                    self.answer(200 if told else 403, "TRUE" if outer.ends else "FALSE")
                else:
                    self.answer(404, "")

            def aws(self) -> None:
                if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                    self.answer(401, "")
                elif outer.ends is None:
                    self.answer(404, "<html>")
                else:
                    self.answer(200, json.dumps({"action": "terminate", "time": f"{outer.ends:%Y-%m-%dT%H:%M:%SZ}"}))

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def give_notice(self, seconds: float) -> None:
        """From now on says that the machine will be taken after so many seconds."""
        self.ends = datetime.now(UTC) + timedelta(seconds=seconds)

    def __enter__(self) -> "MetadataServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
