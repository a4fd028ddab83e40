"""A real JupyterLab on loopback, and Debian's or anybody's Chromium to drive it with, as a person would."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SECONDS = 240
"""How long a page, a kernel or a cell may take: a busy machine is slow, and nothing here measures time."""


@contextlib.contextmanager
def jupyterlab(root: Path, home: Path, python: Path | str = sys.executable) -> Iterator[str]:
    """Run an environment's JupyterLab on `root`, with nothing of this account's own settings; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = home / "settings"
    notification = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    notification.parent.mkdir(parents=True)
    notification.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    folders = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = os.environ | folders | {"HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(settings), "PEFTLAB_SHORT": "1"}
    command = [python, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + SECONDS
        while not _answers(f"{address}/api/status"):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"JupyterLab did not start:\n{(home / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(url, timeout=5).status == 200
    return False


class NotebookPage:
    """A notebook that is open in JupyterLab; a code cell is named by its id, or by something that stands in it alone."""

    def __init__(self, page: Page, address: str, path: str):
        self.page = page
        page.goto(f"{address}/lab/tree/{path}?reset")
        page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget?.sessionContext?.isReady")
        page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'")

    def cell(self, name: str) -> Locator:
        """Scroll to a cell, and make it the active one."""
        found = self.page.evaluate(
            """async name => {
                const notebook = window.jupyterapp.shell.currentWidget.content;
                const holds = cell => cell.model.type === 'code' && cell.model.sharedModel.source.includes(name);
                let index = notebook.widgets.findIndex(cell => cell.model.id === name);
                if (index < 0) index = notebook.widgets.findIndex(holds);
                if (index < 0) return false;
                notebook.activeCellIndex = index;
                notebook.deselectAll();
                await notebook.scrollToItem(index, 'center');
                return true;
            }""",
            name,
        )
        assert found, f"no cell {name}"
        active = self.page.locator(".jp-Cell.jp-mod-active")
        expect(active).to_be_visible()
        return active

    def write(self, name: str, source: str) -> None:
        """Replace what stands in a cell, by keyboard."""
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)

    def run(self, name: str) -> Locator:
        """Run a cell by keyboard; return it when it is done."""
        cell = self.cell(name)
        cell.locator(".jp-InputPrompt").click()
        before = cell.locator(".jp-InputPrompt").inner_text()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function(
            """before => {
                const prompt = document.querySelector('.jp-Cell.jp-mod-active .jp-InputPrompt');
                return prompt && /\\[\\d+\\]/.test(prompt.innerText) && prompt.innerText !== before;
            }""",
            arg=before,
        )
        return cell
