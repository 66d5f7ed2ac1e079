"""How fast a report's page is: written, opened, zoomed, panned, pointed at and searched, in a headless Chromium.

The trace is made up: devices that run layers of kernels with names as PyTorch's profiler writes them, three streams
each. "open" is from the navigation until the timeline is drawn; the other times are from an input until the second
frame after it, hence never below a frame or two of 17 ms; each is the longest of several. Needs chromium on the path.

    python examples/benchmarks/page_speed.py [--events 20000 200000 1500000] [--folder FOLDER] [--screenshot FILE]
"""

from __future__ import annotations

import pathlib
import random
import runpy
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from record import Recorder, make_parser, processor

from profiling import Event, Step, Trace
from profiling.reports.html import write_html
from profiling.reports.making import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
ATEN = "void at::native::vectorized_elementwise_kernel<4, at::native::"
TILE = "Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT256x{}x64_MI16x16x1_SN_LDSB1_AFC1_AFEM1_ISA942_IU1_K1"
LAYER = (
    # name, kind, group, microseconds; one after the other on the stream of its group
    ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "normalization", "compute", 9.0),
    (TILE.format(224), "GEMM", "compute", 92.0),
    ("void ck_tile::kentry<1, ck_tile::FmhaFwdKernel<ck_tile::BlockFmhaPipelineQRKSVSAsync<bf16, 128>>>", "attention",
     "compute", 118.0),
    (TILE.format(128), "GEMM", "compute", 41.0),
    ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "all-reduce", "transfer", 64.0),
    (ATEN + "CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>>", "elementwise", "compute", 6.0),
    ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1", "normalization", "compute", 9.5),
    (TILE.format(256), "GEMM", "compute", 171.0),
    (ATEN + "silu_kernel(at::TensorIteratorBase&)::{lambda()#1}, std::array<char*, 2ul>>", "elementwise",
     "compute", 14.0),
    (TILE.format(192), "GEMM", "compute", 96.0),
    ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "all-reduce", "transfer", 70.0),
    ("Memcpy DtoD (Device -> Device)", "copy", "compute", 2.5),
)  # fmt: skip
"""A layer of a language model that is sharded over the devices, as an MI300X runs it."""


def model_run(events: int, devices: int = 8, layers: int = 32, seed: int = 0) -> Trace:
    """Steps of a model until there are so many events; devices differ by jitter, all-reduces wait for the last."""
    chance = random.Random(seed)
    found: list[Event] = []
    steps: list[Step] = []
    clocks = [30.0 * device for device in range(devices)]
    while len(found) < events:
        begin = steps[-1].end if steps else min(clocks)
        for layer in range(layers):
            for name, kind, group, length in LAYER:
                facts = {"kind": kind, "group": group, "phase": "forward", "layer": layer, "step": len(steps)}
                taken = [length * chance.uniform(0.9, 1.1) for _ in clocks]
                if group == "transfer":
                    end = max(clocks) + taken[0]
                    found += [Event(device, "13", clock, end, name, **facts) for device, clock in enumerate(clocks)]
                    clocks = [end - 0.6 * taken[0]] * devices  # what does not need the sum goes on
                    continue
                lane = "21" if kind == "copy" else "7"
                found += [
                    Event(device, lane, clock, clock + own, name, **facts)
                    for device, (clock, own) in enumerate(zip(clocks, taken, strict=True))
                ]
                clocks = [clock + own + chance.expovariate(0.6) for clock, own in zip(clocks, taken, strict=True)]
        steps.append(Step("ProfilerStep", len(steps), begin, max(clocks)))
        clocks = [clock + 400.0 for clock in clocks]
    return Trace(f"A language model on {devices} devices", "kineto",
                 tuple(sorted(found[:events], key=lambda event: event.start)), tuple(steps),
                 metadata={"chip": "AMD Instinct MI300X", "SMs": 304, "backend": "nccl"})  # fmt: skip


LATENCY = """(async () => {
  const frames = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const canvas = document.getElementById("timeline"), box = canvas.getBoundingClientRect();
  const query = document.getElementById("query"), press = (id) => document.getElementById(id).click();
  const point = (share) => canvas.dispatchEvent(new PointerEvent("pointermove",
    { clientX: box.left + 168 + share * (box.width - 168), clientY: box.top + 64 + share * 80 }));
  const key = (name) => {
    canvas.focus();
    canvas.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  };
  const find = (text) => { query.value = text; query.dispatchEvent(new Event("input")); };
  const longest = async (action, count) => {
    let most = 0;
    for (let n = 0; n < count; n++) {
      await frames();
      const start = performance.now();
      action(n);
      await frames();
      most = Math.max(most, performance.now() - start);
    }
    return most;
  };
  const found = {};
  press("fit");
  found["hover, whole"] = await longest((n) => point(n / 12), 12);
  found["find"] = await longest((n) => find(["gemm", "nccl", "cijk mt256", "layer:7", ""][n]), 5);
  found["zoom, first"] = await longest(() => press("in"), 3);
  found["pan, near whole"] = await longest((n) => key(n % 2 ? "a" : "d"), 6);
  found["zoom, middle"] = await longest(() => press("in"), 8);
  found["zoom, deep"] = await longest(() => press("in"), 12);
  found["pan, deep"] = await longest((n) => key(n % 2 ? "a" : "d"), 6);
  found["hover, deep"] = await longest((n) => point(n / 12), 12);
  found["whole again"] = await longest(() => press("fit"), 1);
  return found;
})()"""


def row(count: int, folder: pathlib.Path, browser: Any, screenshot: pathlib.Path | None) -> dict[str, Any]:
    """What one size costs."""
    trace = model_run(count)
    made, _ = timed(lambda: report(trace))
    path = folder / f"{count}.html"
    _, seconds = timed(lambda: write_html(path, made))
    tracemalloc.start()
    write_html(path, made)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    browser.open(path.as_uri())
    opened = browser.evaluate("performance.now()")
    if screenshot:
        browser.screenshot(screenshot)
    found = {"events": f"{count:,}", "written, CPU s": round(seconds, 1), "peak MB": round(peak / 1e6),
             "page MB": round(path.stat().st_size / 1e6, 1), "open ms": round(opened)}  # fmt: skip
    found |= {f"{name} ms": round(value) for name, value in browser.evaluate(LATENCY).items()}
    return found | {"complaints": len(browser.problems)}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds of processor time, which other work on the machine does not change."""
    start = time.process_time()
    found = call()
    return found, time.process_time() - start


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--events", type=int, nargs="+", default=[20_000, 200_000, 1_500_000], help="of the traces")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the pages here")
    parser.add_argument("--screenshot", type=pathlib.Path, help="a picture of the last page")
    arguments = parser.parse_args()
    chromium = runpy.run_path(str(ROOT / "tests" / "profiling" / "chromium.py"))
    executable = chromium["find"]()
    if executable is None:
        parser.error("needs chromium, chromium-browser or google-chrome on the path")
    with tempfile.TemporaryDirectory() as scratch:
        browser = chromium["Browser"](executable, pathlib.Path(scratch) / "browser", timeout=300.0)
        folder = arguments.folder or pathlib.Path(scratch)
        rows = (row(count, folder, browser, arguments.screenshot) for count in arguments.events)
        formats = {"written, CPU s": ".1f", "page MB": ".1f"}
        Recorder.begin(arguments, processor(), "drawn without a GPU").table(rows, formats=formats)
        browser.close()


if __name__ == "__main__":
    main()
