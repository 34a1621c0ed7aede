"""Tables of the cpu engine's benchmarks, from the files of `benchmarks.cpu`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.tables.markdown import file_names, number, percent, table

__all__ = ["TABLES", "TITLES", "WITH", "figure", "from_files", "processor", "sentence"]

Results = dict[str, Any]

WITHOUT, WITH = "walks", "counted"
TITLES = {
    ("loop", "running", "float32"): "the loop, float32",
    ("loop", "running", "bfloat16"): "the loop in float32, engine in bfloat16",
    ("composition", "running", "float32"): "the composition, float32",
    ("composition", "running", "bfloat16"): "the composition, bfloat16",
    ("composition", "batch", "float32"): "the composition, mode `batch`, float32",
    ("composition", "batch", "bfloat16"): "the composition, mode `batch`, bfloat16",
}


def processor(results: Results) -> str:
    """Return the processor, its instruction set and the number of cores used, in words."""
    facts = results["facts"]
    name = facts["processor"].replace("(R)", "").replace(" Processor", "")
    cores = "one core" if facts["threads"] == 1 else f"{facts['threads']} cores"
    return f"{cores} of an {name} ({facts['instruction_set']})"


def figure(results: Results, rival: tuple[str, str, str], part: str, together: bool = False) -> str:
    """Return one ratio of a file as text.

    Args:
        results: the file.
        rival: the competitor, the BN mode and the engine's precision.
        part: ``walks`` without the forward pass, or ``counted`` with it.
        together: whether one path of each length runs in one call.
    """
    title = f"times faster than the {', '.join(rival)}{', one call' if together else ''}"
    return number(next(entry[part] for entry in results["figures"] if entry["figure"] == title))


def ratios(files: Mapping[str, Results]) -> str:
    """Return how many times faster the engine is than the loop and the composition, from one file."""
    ((file, results),) = files.items()
    parts = ("backward passes only", "with the forward pass")
    header = ["faster than", *(f"one path a call, {part}" for part in parts)]
    header += [f"one path of every length a call, {part}" for part in parts]
    rows = [
        [title, *(figure(results, rival, part, together) for together in (False, True) for part in (WITHOUT, WITH))]
        for rival, title in TITLES.items()
    ]
    lengths = results["found"]["lengths"]
    return (
        f"{sentence(results)}, {lengths['blocks']} blocks, batch {lengths['batch']}, means over all lengths "
        f"({file_names([file])}):\n\n{table(header, rows)}"
    )


def sentence(results: Results) -> str:
    """Return the processor, version and date of a file as the beginning of a sentence."""
    place = processor(results)
    return f"{place[0].upper()}{place[1:]}, torch {results['facts']['torch'].split('+')[0]}, {results['date']}"


def _by_file(files: Mapping[str, Results], columns: Mapping[str, Callable[[Results], str]]) -> str:
    """Return a table with a row for each file, and the files' names below it."""
    rows = [
        [f"{processor(results)}, {_revision(file)}", *(cell(results) for cell in columns.values())]
        for file, results in files.items()
    ]
    return f"{table(['measured on', *columns], rows)}\n\n{from_files(files)}"


def _revision(file: str) -> str:
    """Return the date and commit at the end of a file's name, as code."""
    return f"`...{file.removesuffix('.json')[-21:]}`"


def from_files(files: Mapping[str, Results]) -> str:
    """Return the names of the files as a sentence."""
    return f"Files: {file_names(list(files))}."


def sums(files: Mapping[str, Results]) -> str:
    """Return the seconds of exact sums by length, and their share of those of as many modules one by one."""

    def cell(bn: str, precision: str, batch: int) -> Callable[[Results], str]:
        def of(results: Results) -> str:
            row = next(row for row in rows_of(results) if (row["bn"], row["precision"], row["batch"]) == which)
            return f"{number(row['timings']['sums']['median_s'])} s ({number(row['share'])})"

        which = bn, precision, batch
        return of

    def rows_of(results: Results) -> list[dict[str, Any]]:
        return list(results["found"]["sums"]["rows"])

    settings = [(row["bn"], row["precision"], row["batch"]) for row in rows_of(next(iter(files.values())))]
    return _by_file(
        files,
        {f"`{bn}`, {precision}, {batch} images": cell(bn, precision, batch) for bn, precision, batch in settings},
    )


def lesions(files: Mapping[str, Results]) -> str:
    """Return the shares of single deletions and of a training step with fewer modules."""
    steps = [results["found"]["deletions"] for results in files.values()]
    deletions, forward = steps[0]["deletions"], steps[0]["eager_forward_passes"]

    def training(results: Results) -> str:
        step = results["found"].get("training")
        return f"{number(step['share'])} ({step['drawn']} of {step['modules']})" if step else "not measured"

    return _by_file(
        files,
        {
            f"{deletions} single deletions, share of {forward} eager forward passes": lambda results: number(
                results["found"]["deletions"]["share_of_eager"]["float32"]
            ),
            "training step with some modules drawn, share of a full step": training,
        },
    )


def limits(files: Mapping[str, Results]) -> str:
    """Return what bounds the engine: arithmetic without tiles, paths, batch and memory."""

    def memory(results: Results) -> str:
        grown = [entry for entry in results["found"]["memory"].values() if isinstance(entry, dict)]
        return "; ".join(f"{number(entry['growth_bytes'] / 1e6)} MB ({entry['paths']} paths)" for entry in grown)

    def line(results: Results, varied: str) -> str:
        fitted = results["found"]["fits"][varied]["line"]
        return f"{number(1e3 * fitted['slope'])} ms (R² {number(fitted['r_squared'], 4)})"

    def share(results: Results, precision: str) -> str:
        return percent(results["found"]["peak_share"]["share_of_peak"][precision])

    return _by_file(
        files,
        {
            "share of the measured peak of multiply-adds without tiles, float32": lambda r: share(r, "float32"),
            "time for each path more": lambda results: line(results, "paths"),
            "time for each sample more": lambda results: line(results, "batch"),
            "growth of the peak of memory": memory,
            "error of norms, float32; bfloat16": lambda results: "; ".join(
                number(results["found"]["checks"]["float64"][f"pathnet, running, {precision}"]["norm"], 2)
                for precision in ("float32", "bfloat16")
            ),
        },
    )


TABLES = {"ratios": ratios, "sums": sums, "lesions": lesions, "limits": limits}
"""Tables by name."""
