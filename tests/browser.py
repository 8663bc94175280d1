"""A real Chromium for tests, driven through its DevTools protocol; and a JupyterLab for it to open."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def wait_for(found, seconds: float = 90):
    """What ``found()`` returns once that is true; it is asked again and again."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return value


class Page:
    """One tab: ``open`` an address, ``js`` evaluates an expression in it, ``type`` presses keys."""

    def __init__(self, address: str):
        import websocket

        self._socket, self._last = websocket.create_connection(address, timeout=120), 0
        self.call("Page.enable")

    def call(self, method: str, **parameters):
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._last:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def js(self, expression: str):
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)


@contextmanager
def chromium(folder: Path):
    """A headless Chromium with one empty tab, which is given as a ``Page``."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--remote-debugging-port=0",
        "--remote-allow-origins=*",
        f"--user-data-dir={folder / 'chromium'}",
        "--window-size=1200,1600",
        "about:blank",
    ]
    with _running(command, folder, env=os.environ):
        ready = folder / "chromium" / "DevToolsActivePort"
        port = int(wait_for(lambda: ready.exists() and ready.read_text()).split()[0])
        tabs = wait_for(lambda: [t for t in _get(f"http://127.0.0.1:{port}/json") if t["type"] == "page"])
        yield Page(tabs[0]["webSocketDebuggerUrl"])


@contextmanager
def jupyter_lab(folder: Path):
    """A JupyterLab that serves ``folder`` and keeps all its own files there; gives its address with the token."""
    repository = str(Path(__file__).resolve().parents[1])
    env = os.environ | {
        "HOME": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "PYTHONPATH": repository,
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--allow-root",
        "--no-browser",
        "--ip=127.0.0.1",
        "--port=0",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        "--ServerApp.jpserver_extensions={'jupyter_lsp': False, 'jupyter_server_terminals': False}",
    ]
    with _running(command, folder, env=env):
        (info,) = wait_for(lambda: list((folder / "runtime").glob("jpserver-*.json")))
        server = wait_for(lambda: info.stat().st_size and json.loads(info.read_text()))
        yield lambda path: f"{server['url']}{path}?token={server['token']}"


@contextmanager
def _running(command: list[str], folder: Path, env):
    with open(folder / f"{Path(command[0]).name}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _get(url: str):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return []
