"""A headless Firefox, driven over Marionette: the protocol of WebDriver that Firefox itself speaks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from conftest import until

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that WebDriver gives to a reference to an element
QUIET = {  # it looks for nothing outside the page
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "marionette.port": 0,  # any that is free
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
}


class Firefox:
    """A browser with a profile in `folder`. Preferences such as ui.systemUsesDarkTheme stand for what a system has.

    `select` arguments are CSS selectors.
    """

    def __init__(self, folder: Path, **preferences: Any) -> None:
        all = QUIET | preferences
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in all.items()]
        (folder / "user.js").write_text("\n".join(lines))
        options = ["--headless", "--profile", str(folder), "--marionette", "--remote-allow-system-access"]
        silent = subprocess.DEVNULL
        environ = os.environ | {"HOME": str(folder)}
        self.process = subprocess.Popen([str(FIREFOX), *options], stdout=silent, stderr=silent, env=environ)
        self._asked = 0
        port = folder / "MarionetteActivePort"
        until(lambda: port.exists() and port.read_text().strip(), 60)
        self._socket = socket.create_connection(("127.0.0.1", int(port.read_text())))
        self._socket.settimeout(30)
        self._stream = self._socket.makefile("rb")
        self._read()  # its greeting
        self.ask("WebDriver:NewSession", capabilities={"alwaysMatch": {"acceptInsecureCerts": True}})

    def __enter__(self) -> Firefox:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()
        self.process.terminate()
        self.process.wait(20)

    def _read(self) -> Any:
        length = b""
        while not length.endswith(b":"):
            length += self._stream.read(1)
        return json.loads(self._stream.read(int(length[:-1])))

    def ask(self, command: str, **parameters: Any) -> Any:
        """Send a command and return its answer."""
        self._asked += 1
        message = json.dumps([0, self._asked, command, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, number, error, answer = self._read()
        assert number == self._asked
        assert error is None, error
        return answer

    def open(self, url: str) -> None:
        self.ask("WebDriver:Navigate", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script as the body of a function, and return what it returns."""
        return self.ask("WebDriver:ExecuteScript", script=script, args=arguments)["value"]

    def find(self, select: str) -> Any:
        """Wait for an element and return a reference to it."""
        what = {"using": "css selector", "value": select}
        found = until(lambda: self.ask("WebDriver:FindElements", **what))
        return found[0][ELEMENT]

    def click(self, select: str) -> None:
        self.ask("WebDriver:ElementClick", id=self.find(select))

    def type(self, select: str, text: str) -> None:
        self.ask("WebDriver:ElementSendKeys", id=self.find(select), text=text)

    def shows(self, *texts: str) -> None:
        """Wait until the page shows all of these texts."""
        for text in texts:
            until(lambda text=text: text in self.run("return document.body.innerText"))

    def run_inside(self, script: str, *arguments: Any) -> Any:
        """Run a script in the window of the browser itself."""
        self.ask("Marionette:SetContext", value="chrome")
        try:
            return self.run(script, *arguments)
        finally:
            self.ask("Marionette:SetContext", value="content")

    def resize(self, width: int, height: int) -> None:
        """Make the page that large. A window cannot be that narrow."""
        script = "const [w, h] = arguments, { style } = gBrowser.selectedBrowser; "
        script += "style.minWidth = style.maxWidth = `${w}px`; style.minHeight = style.maxHeight = `${h}px`"
        self.run_inside(script, width, height)
        until(lambda: self.run("return [innerWidth, innerHeight]") == [width, height])

    def errors(self) -> list[str]:
        """Return the errors of pages from this machine, among them violations of their policy."""
        script = "return Services.console.getMessageArray().filter(m => m instanceof Ci.nsIScriptError &&"
        script += " m.sourceName.startsWith('http://127.0.0.1') && !(m.flags & m.warningFlag)).map(m => m.errorMessage)"
        found: list[str] = self.run_inside(script)
        return found
