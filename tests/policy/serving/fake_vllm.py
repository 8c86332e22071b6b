"""Stands in for `python -m vllm.entrypoints.openai.api_server`; has a child, as vLLM does."""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        ok = self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"
        self.send_response(200 if ok or self.path == "/health" else 401)
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_):
        pass


mode = os.environ.get("FAKE_VLLM", "")
loyal = "" if mode == "stubborn" else "while os.getppid() == parent: time.sleep(0.05)\nsys.exit()"
code = f"import os, sys, time\nparent = {os.getpid()}\n{loyal}\ntime.sleep(60)"
child = subprocess.Popen([sys.executable, "-S", "-c", code])
print(json.dumps({"pids": [os.getpid(), child.pid], "args": sys.argv[1:]}), flush=True)
print(f"the key is {os.environ['VLLM_API_KEY']}", flush=True)
if mode == "dies":
    sys.exit("no memory left")
if mode == "hangs":
    time.sleep(60)
port = int(sys.argv[sys.argv.index("--port") + 1])
print("Loading weights took 0.01 seconds", flush=True)
ThreadingTCPServer.allow_reuse_address = True
ThreadingTCPServer(("127.0.0.1", port), Handler).serve_forever()
