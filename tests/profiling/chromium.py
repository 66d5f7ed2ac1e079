"""A headless Chromium, driven over two pipes by its DevTools protocol: JSON messages, each ended by a zero."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--force-color-profile=srgb", "--disable-background-networking", "--disable-component-update", "--mute-audio",
    "--remote-debugging-pipe",
)  # fmt: skip


def find():
    """Path of a browser, None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page at a time.

    Attributes:
      problems: what the page said on its console as a warning or an error, threw, was refused or failed to load.
    """

    def __init__(self, executable, profile, timeout=60.0):
        self.timeout = timeout
        self.numbers = itertools.count(1)
        self.problems = []
        self.buffer = b""
        self.session = None
        self.waiting = set()
        theirs_in, self.write_end = os.pipe()
        self.read_end, theirs_out = os.pipe()
        # The browser reads its commands from descriptor 3 and answers on 4.
        line = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", line, executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def open(self, url, width=1400, height=900, dark=False, touch=False):
        """Loads a page of this size, with an empty record of problems."""
        if self.session:
            self.send("Target.closeTarget", targetId=self.target)
            self.session = None
        self.target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.problems.clear()
        self.waiting = {"Page.loadEventFired"}
        self.send("Page.navigate", url=url)
        while self.waiting:
            self._receive()
        self.settle()

    def settle(self):
        """Waits until what has been asked for is drawn."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def evaluate(self, expression):
        """The value of a JavaScript expression, promises awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def mouse(self, kind, x, y, **options):
        """A pointer event; kind is "mouseMoved", "mousePressed", "mouseReleased" or "mouseWheel"."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)
        self.settle()

    def key(self, key, text=None):
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text or (key if len(key) == 1 else ""))
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def screenshot(self, path, whole=False):
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        with open(path, "wb") as file:
            file.write(base64.b64decode(found["data"]))

    def close(self):
        if self.process.poll() is None:
            self.send("Browser.close", everywhere=True)
        os.close(self.write_end)
        os.close(self.read_end)
        self.process.wait(self.timeout)

    def send(self, method, everywhere=False, **parameters):
        """One command; what happens until it is answered is kept.

        Raises:
          RuntimeError: the browser refused it, said nothing in time, or is gone.
        """
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session and not everywhere and not method.startswith("Target."):
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _clip(self, whole):
        if not whole:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _receive(self):
        deadline = time.monotonic() + self.timeout
        while b"\0" not in self.buffer:
            if not select.select([self.read_end], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"the browser said nothing for {self.timeout} s")
            more = os.read(self.read_end, 1 << 16)
            if not more:
                raise RuntimeError(f"the browser ended with status {self.process.wait(self.timeout)}")
            self.buffer += more
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        self._record(message.get("method"), message.get("params", {}))
        return message

    def _record(self, method, parameters):
        self.waiting.discard(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("warning", "error", "assert"):
            self.problems.append(parameters["args"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("warning", "error"):
            self.problems.append(parameters["entry"])
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(parameters["request"]["url"])
