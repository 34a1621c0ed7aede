"""What only a GPU can show, in one command: ``python -m benchmarks.gpu`` (or ``make gpu``), under eight minutes.

Checks the build, runs the GPU tests, the benchmarks, and compute-sanitizer on small cases. Each step is a process of
its own with a limit of time, so that one that fails, hangs or spoils the device leaves the others alone; what it
found is on disk before the next begins. ``python -m benchmarks.gpu sweep scaling`` runs these steps alone;
``--rehearse`` runs all on the CPU with a tiny network, to try the command itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pathnet
from benchmarks import baselines, results
from benchmarks.cases import PAPER, REHEARSAL, Case, module_operations
from benchmarks.timing import interleaved
from pathnet import native, scaling
from pathnet.engines.reference import ReferenceEngine, freeze

ROOT = Path(__file__).parent.parent
BATCHES_OF_THE_PAPER = 1000


class Unavailable(Exception):
    """A tool that this machine does not have or refuses."""


class Setting:
    """Where the steps run: on a GPU, or in a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.engine = "cpu" if rehearse else "cuda"
        self.precisions: tuple[Any, ...] = ("float32",) if rehearse else ("bfloat16", "float32")
        self.case = REHEARSAL if rehearse else PAPER
        self.rounds = 2 if rehearse else 7

    def recorder(self, precision: Any, case: Case | None = None) -> pathnet.Recorder:
        net = (case or self.case).net(self.device)
        return pathnet.Recorder(net, engine=self.engine, precision=precision)


# The steps. Each returns what it found as JSON, and raises where it found an error.


def build(setting: Setting) -> dict[str, Any]:
    if not native.LOADED:
        raise RuntimeError(native.WHY_NOT)
    facts = native.build_facts()
    if facts["without_cuda"] and not setting.rehearse:
        raise RuntimeError(f"CUDA is not in this build: {facts['without_cuda']}")
    return {"facts": facts, "engines": pathnet.engines.available()}


def tests(setting: Setting) -> dict[str, Any]:
    what = ["--collect-only"] if setting.rehearse else []
    done = _run([sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", *what, "tests/cuda"], 200)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        raise RuntimeError("\n".join(lines[-40:]))
    return {"summary": lines[-1] if lines else ""}


def sanitizer(setting: Setting) -> dict[str, Any]:
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = [_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "86"]
        done = _run([*command, sys.executable, "-m", "benchmarks.sanitizer_case", setting.engine], 100)
        printed = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode == 86:
            raise RuntimeError("\n".join([f"{tool}:", *printed[-60:]]))
        if done.returncode != 0:
            raise Unavailable(f"{tool} ended with {done.returncode}: {' '.join(printed[-3:])}")
        found[tool] = printed[-1]
    return found


def profile(setting: Setting) -> dict[str, Any]:
    """Where the kernels' time goes, as far as the machine lets the profiler look."""
    metrics = {
        "tensor": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
        "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "shared": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
        "l2": "lts__t_bytes.avg.pct_of_peak_sustained_elapsed",
    }
    command = [_tool("ncu"), "--metrics", ",".join(metrics.values()), "-k", "regex:routed", "-c", "4", "--csv"]
    done = _run([*command, sys.executable, "-m", "benchmarks.profile_case"], 100)
    if done.returncode != 0 or "ERR_" in done.stdout:
        raise Unavailable(" ".join((done.stdout + done.stderr).strip().splitlines()[-3:]))
    return {"metrics": metrics, "csv": done.stdout[-8000:]}


def accuracy(setting: Setting) -> dict[str, Any]:
    """Errors of norms against the float64 walk on the engine's own record, and of the recording forward."""
    case = setting.case if setting.rehearse else Case(batch=16)
    images, labels = case.images(setting.device)
    found: dict[str, Any] = {"batch": case.batch}
    limits = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 2e-2)}
    for precision in setting.precisions:
        recorder = setting.recorder(precision, case)
        tape = recorder(images, labels)
        lengths = [length for length in (0, 1, 5, 17, 27, 54) if length <= tape.n]
        b = torch.cat([pathnet.paths.sample(tape.n, length, 1) for length in lengths])
        truth = _truth(tape, b)
        own = tape.path_gradient_norms(b, per_sample=True)
        sample = float(((own - truth).abs() / truth).max())
        expected = scaling.combine(truth)
        batch = float(((scaling.combine(own) - expected).abs() / expected).max())
        exact = case.net(setting.device).double()(images.double())
        forward = float((tape.output - exact).norm() / exact.norm())
        found[precision] = {"batch_norm": batch, "sample_norm": sample, "forward": forward}
        if not (batch <= limits[precision][0] and sample <= limits[precision][1] and forward <= 1e-4):
            raise RuntimeError(f"{precision}: {found[precision]} against {limits[precision]}")
    return found


def _truth(tape: pathnet.Tape, b: Tensor) -> Tensor:
    """float64 [P, B]: the reference's norms on the tape's own ReLU bits."""
    record, reference = tape._record, ReferenceEngine()
    frozen = freeze(record.net, record.blocks.bits())  # type: ignore[attr-defined]
    prepared = reference.prepare(frozen, record.y0.shape[1:], "float64")
    _, blocks = reference.record(prepared, record.y0.double())
    routing = pathnet.paths.routing(b).to(record.grad.device, torch.float64)
    return reference.routed_backward_norms(blocks, record.grad.double(), record.exponent, routing)


def lengths(setting: Setting) -> dict[str, Any]:
    """The norm of one path of a given length: what a researcher writes, and the engine. Checked, then timed."""
    _check_baselines(setting)
    case = setting.case
    net, (images, labels) = case.net(setting.device), case.images(setting.device)
    loop, refused = baselines.DetachLoop(net, images, labels), {}
    compositions: dict[str, Callable[[Tensor], object]] = {"composition": baselines.Composition(net, images, labels)}
    if setting.device.type == "cuda":
        compositions["graphed composition"] = baselines.GraphedComposition(net, images, labels)
    batched = baselines.BatchedGradients(net, images, labels)
    tapes = {precision: setting.recorder(precision)(images, labels) for precision in setting.precisions}
    found: dict[str, Any] = {"seconds": {}, "refused": refused}
    for length in sorted({min(length, net.n) for length in (1, 5, 17, 27, 54)}):
        path = pathnet.paths.sample(net.n, length, 1)[0]
        calls: dict[str, Callable[[], object]] = {
            "detach loop": partial(loop, path),
            **{name: partial(run, path) for name, run in compositions.items()},
            "is_grads_batched": partial(batched, path),
        }
        for precision, tape in tapes.items():
            calls[f"{setting.engine} {precision}"] = partial(tape.path_gradient_norms, path[None])
        for name in list(calls):
            try:
                calls[name]()
            except RuntimeError as error:
                refused[name] = str(error).splitlines()[0]
                del calls[name]
        timed = interleaved(calls, setting.rounds, setting.device)
        found["seconds"][str(length)] = {name: timing.as_json() for name, timing in timed.items()}
    return found


def _check_baselines(setting: Setting) -> None:
    case = REHEARSAL if setting.rehearse else Case(20, 16, 32, 4)
    net, (images, labels) = case.net(setting.device), case.images(setting.device)
    path = pathnet.paths.sample(net.n, net.n // 2, 1)[0]
    truth = baselines.DetachLoop(net.double(), images.double(), labels)(path).item()
    net = net.float()
    runs: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        "detach loop": (baselines.DetachLoop(net, images, labels), 1e-2),
        "composition": (baselines.Composition(net, images, labels), 3e-2),
        "is_grads_batched": (baselines.BatchedGradients(net, images, labels), 1e-2),
    }
    if setting.device.type == "cuda":
        runs["graphed composition"] = (baselines.GraphedComposition(net, images, labels), 3e-2)
    for name, (run, tolerance) in runs.items():
        try:
            norm = float(run(path))
        except RuntimeError:
            continue
        if not abs(norm - truth) <= tolerance * truth:
            raise RuntimeError(f"{name} gives {norm} for a norm of {truth}: not timed")


def sweep(setting: Setting) -> dict[str, Any]:
    """The paper's Figure 6 whole: 1,000 batches, one path of every length on each, forwards included."""
    case, batches = setting.case, 3 if setting.rehearse else BATCHES_OF_THE_PAPER
    pool = [case.images(setting.device, seed) for seed in range(4)]
    codes = [pathnet.paths.one_of_each_length(case.n, 0, batch) for batch in range(batches)]
    found: dict[str, Any] = {"measurements": batches * case.n, "batch": case.batch}
    for precision in setting.precisions:
        recorder = setting.recorder(precision)
        recorder(*pool[0]).path_gradient_norms(codes[0])
        start = time.perf_counter()
        norms = [recorder(*pool[i % len(pool)]).path_gradient_norms(codes[i]) for i in range(batches)]
        measured = torch.stack(norms).cpu()
        seconds = time.perf_counter() - start
        if not (torch.isfinite(measured).all() and (measured > 0).all()):
            raise RuntimeError(f"{precision}: norms that are zero or not finite")
        tape = recorder(*pool[0])
        parts = interleaved(
            {"record": partial(recorder, *pool[0]), "walk": partial(tape.path_gradient_norms, codes[0])},
            setting.rounds,
            setting.device,
        )
        operations = sum(module_operations(case.net(torch.device("cpu")), case.side))
        # Every length once: each module is on half of the paths, the record runs each once with three products.
        walked = operations * case.batch * (case.n + 1) / 2
        found[precision] = {
            "seconds": seconds,
            "record": parts["record"].as_json(),
            "walk": parts["walk"].as_json(),
            "walk_teraflops": walked / parts["walk"].median / 1e12,
            "record_share": parts["record"].median / (parts["record"].median + parts["walk"].median),
        }
    found["matrix_product_teraflops"] = _matrix_product(setting)
    return found


def _matrix_product(setting: Setting) -> float:
    size = 256 if setting.rehearse else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    timed = interleaved({"product": lambda: a @ b}, setting.rounds, setting.device)
    return 2 * size**3 / timed["product"].median / 1e12


def scaling_of_the_engine(setting: Setting) -> dict[str, Any]:
    """Seconds of a walk along paths of half the blocks, by paths, batch, depth and width."""
    base = setting.case
    cases: dict[str, tuple[Case, int]] = {}
    small = setting.rehearse
    for count in (1, 4) if small else (1, 16, 64, 256, 1024):
        cases[f"{count} paths"] = base, count
    for batch in (2, 8) if small else (32, 128, 512, 1024):
        cases[f"batch {batch}"] = Case(base.depth, base.width, base.side, batch), 16
    for depth in (8, 14) if small else (20, 56, 110, 218):
        cases[f"depth {depth}"] = Case(depth, base.width, base.side, base.batch), 16
    for width in (4,) if small else (4, 8, 16):
        cases[f"width {width}"] = Case(base.depth, width, base.side, base.batch), 16
    found: dict[str, Any] = {}
    for precision in setting.precisions:
        found[precision] = {}
        for name, (case, count) in cases.items():
            tape = setting.recorder(precision, case)(*case.images(setting.device))
            b = pathnet.paths.sample(case.n, case.n // 2, count)
            call = {name: partial(tape.path_gradient_norms, b)}
            timing = interleaved(call, setting.rounds, setting.device)[name]
            found[precision][name] = {"paths": count, "batch": case.batch, **timing.as_json()}
            del tape, call
    return found


def lesions(setting: Setting) -> dict[str, Any]:
    """Every block deleted once on a batch, against as many eager forwards, and one of the whole network."""
    case = setting.case
    net, (images, _) = case.net(setting.device), case.images(setting.device)
    recorder = setting.recorder(setting.precisions[-1])
    routing = torch.ones(net.n, net.n, 2)
    routing[range(net.n), range(net.n), 1] = 0

    @torch.no_grad()
    def eager() -> None:
        for _ in range(net.n + 1):
            net(images)

    outputs = recorder.routed_outputs(images, routing[:2])
    with torch.no_grad():
        y = net.stem(images)
        for index, block in enumerate(net.blocks):
            y = block.skip(y) if index == 1 else block(y)
        error = float((outputs[1] - net.head(y)).norm() / net.head(y).norm())
    if not error < 1e-2:  # eager convolutions may use TF32
        raise RuntimeError(f"a deletion's outputs differ by {error}: not timed")
    calls = {"deletions": lambda: recorder.routed_outputs(images, routing), "eager forwards": eager}
    timed = interleaved(calls, setting.rounds, setting.device)
    return {"error": error, **{name: timing.as_json() for name, timing in timed.items()}}


STEPS: dict[str, tuple[Callable[[Setting], dict[str, Any]], int]] = {
    "build": (build, 60),
    "tests": (tests, 220),
    "accuracy": (accuracy, 60),
    "lengths": (lengths, 90),
    "sweep": (sweep, 90),
    "lesions": (lesions, 40),
    "scaling": (scaling_of_the_engine, 90),
    "sanitizer": (sanitizer, 220),
    "profile": (profile, 110),
}
"""Each step and the seconds that it may take; the benchmarks before the tools that slow everything down."""

TIME_IN_ALL = 460
"""Seconds that all steps together may take."""


def _tool(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/local/cuda/bin")
    if path is None:
        raise Unavailable(f"{name} is not on this machine")
    return path


def _run(command: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)


def facts(setting: Setting, commit: str) -> dict[str, Any]:
    """What the figures depend on."""
    own = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels": results.kernel_hashes(),
    }
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        own |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        if shutil.which(query[0]):
            own["nvidia-smi"] = _run(query, 20).stdout.strip()
    else:
        own["device"] = "rehearsal"
    return own


def _commit() -> str:
    try:
        done = _run(["git", "rev-parse", "HEAD"], 20)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def one_step(step: str, setting: Setting) -> dict[str, Any]:
    """A step's outcome: ``status`` ok, unavailable or failed, why, and what it found."""
    start = time.perf_counter()
    try:
        outcome = {"status": "ok", **STEPS[step][0](setting)}
    except Unavailable as reason:
        outcome = {"status": "unavailable", "reason": str(reason)}
    except Exception as error:
        outcome = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {**outcome, "seconds_taken": time.perf_counter() - start}


def in_its_own_process(step: str, rehearse: bool, left: float) -> dict[str, Any]:
    """The step's outcome, after at most its own limit or the seconds that are left."""
    limit = min(STEPS[step][1], int(left))
    if limit <= 0:
        return {"status": "failed", "reason": f"no time left of {TIME_IN_ALL} s", "seconds_taken": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "benchmarks.gpu", step, "--outcome", str(file)]
        try:
            done = _run([*command, *(["--rehearse"] if rehearse else [])], limit)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"took more than {limit} s", "seconds_taken": limit}
        if not file.exists():
            printed = (done.stdout + done.stderr).strip().splitlines()
            return {"status": "failed", "reason": f"ended with {done.returncode}: {' '.join(printed[-5:])}"}
        outcome: dict[str, Any] = json.loads(file.read_text())
        return outcome


def goals(steps: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, goal, measured, met) of whatever was measured."""
    rows: list[tuple[str, str, str, bool]] = []

    def row(what: str, limit: float, value: float, unit: str, at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        rows.append((what, f"{'at least' if at_least else 'at most'} {limit:g}{unit}", f"{value:.3g}{unit}", met))

    sweep = steps.get("sweep", {})
    for precision, limit in (("bfloat16", 6.0), ("float32", 20.0)):
        if precision in sweep:
            row(f"{sweep['measurements']:,} measurements, {precision}", limit, sweep[precision]["seconds"], " s")
    if "bfloat16" in sweep and "seconds" in steps.get("lengths", {}):
        row("the record's share of a sweep, bfloat16", 0.1, sweep["bfloat16"]["record_share"], "")
        timed, own = steps["lengths"]["seconds"], sweep["bfloat16"]["seconds"] / sweep["measurements"]
        loop = sum(timed[length]["detach loop"]["median"] for length in timed) / len(timed)
        row("times faster than the detach loop", 100, loop / own, "", at_least=True)
        best = [min(v["median"] for k, v in timed[length].items() if "composition" in k) for length in timed]
        row("times faster than the best composition", 5, sum(best) / len(best) / own, "", at_least=True)
    for precision, (batch, sample) in {"bfloat16": (5e-3, 2e-2), "float32": (1e-5, 1e-4)}.items():
        if precision in steps.get("accuracy", {}):
            row(f"error of a batch norm, {precision}", batch, steps["accuracy"][precision]["batch_norm"], "")
            row(f"error of a sample's norm, {precision}", sample, steps["accuracy"][precision]["sample_norm"], "")
    if "deletions" in steps.get("lesions", {}):
        share = steps["lesions"]["deletions"]["median"] / steps["lesions"]["eager forwards"]["median"]
        row("single deletions, in eager forwards' time", 0.25, share, "")
    return rows


def show(run: dict[str, Any], console: Console) -> None:
    table = Table("step", "outcome", "seconds")
    for step, outcome in run["steps"].items():
        told = outcome["status"] if outcome["status"] == "ok" else f"{outcome['status']}: {outcome['reason']}"
        table.add_row(step, told, f"{outcome.get('seconds_taken', 0):.1f}")
    console.print(table)
    timed = run["steps"].get("lengths", {}).get("seconds", {})
    if timed:
        names = list(next(iter(timed.values())))
        table = Table("one path, milliseconds", *(f"length {length}" for length in timed))
        for name in names:
            table.add_row(
                name, *(f"{own[name]['median'] * 1e3:.3g}" if name in own else "" for own in timed.values())
            )
        console.print(table)
    table = Table("goal", "", "measured", "")
    for what, goal, measured, met in goals(run["steps"]):
        table.add_row(what, goal, measured, "met" if met else "NOT MET")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="step", help=f"among {', '.join(STEPS)}; all without any")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny network")
    parser.add_argument("--commit", default="", help="where there is no .git")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="where the results file goes")
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unknown = set(given.steps) - set(STEPS)
    if unknown:
        parser.error(f"step: expected {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    setting = Setting(given.rehearse)
    if given.outcome:
        given.outcome.write_text(json.dumps(one_step(given.steps[0], setting)))
        return 0
    if not given.rehearse and not torch.cuda.is_available():
        print("this process sees no CUDA device; --rehearse tries the command on the CPU")
        return 1
    console = Console()
    run: dict[str, Any] = {"facts": facts(setting, given.commit), "steps": {}}
    own = run["facts"]
    path = given.folder / results.name(own["device"], own["started"][:10], own["commit"])
    end = time.monotonic() + TIME_IN_ALL
    for step in given.steps or STEPS:
        console.print(f"{step} ...")
        run["steps"][step] = in_its_own_process(step, given.rehearse, end - time.monotonic())
        results.write(path, run)
    show(run, console)
    console.print(str(path))
    return 1 if any(outcome["status"] == "failed" for outcome in run["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
