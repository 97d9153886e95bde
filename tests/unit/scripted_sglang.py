"""Poses as `python LAUNCHER ...` for tests/unit/test_servers.py: an HTTP server that does what the file at $SCRIPT says.

Each start appends {"argv", "environment", "pid", "pids"} to $SCRIPT.starts. The script is JSON: "die" (a line written before exit
code 1), "exit" (the code, if another), "silent" (never listens), "child" (a child that ignores SIGTERM, and so does the server).
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

root = Path(os.environ["SCRIPTED_ROOT"])
spec = importlib.util.spec_from_file_location("processes", root / "trd_megatron" / "processes.py")
assert spec is not None and spec.loader is not None
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)
processes.die_with_parent()

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--weight-version")
known, _ = parser.parse_known_args()
file = Path(os.environ["SCRIPT"])
script = json.loads(file.read_text())
pids = [os.getpid()]
if script.get("child"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    child.stdout.readline()  # type: ignore[union-attr]
    pids.append(child.pid)
with file.with_suffix(".starts").open("a") as starts:
    starts.write(json.dumps({"argv": sys.argv, "environment": dict(os.environ), "label": known.weight_version, "pids": pids}) + "\n")
print(f"the key is {os.environ.get('SGLANG_API_KEY')}", flush=True)
if "die" in script:
    print(script["die"], flush=True)
    sys.exit(script.get("exit", 1))
while script.get("silent"):
    time.sleep(1)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


try:
    HTTPServer((known.host, known.port), Handler).serve_forever()
except OSError as error:
    print(f"ERROR: {error}", flush=True)
    time.sleep(600)  # SGLang does not end either
