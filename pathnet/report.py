"""Report of a study: one self-contained page with every figure, and the paper's claims compared with measurements."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape as escape_markup
from pathlib import Path
from string import Template
from typing import Any

from pathnet import results
from pathnet.checks import check_path, described
from pathnet.experiments.claims import Claim, in_words
from pathnet.experiments.run import title
from pathnet.files import replacing
from pathnet.paper import EXPERIMENTS, claims, draw
from pathnet.printable import printable

__all__ = ["write"]

CLASSES = {"held": "held", "did not hold": "not", "open": "open"}

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
p.about { color: #555; margin-top: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
a { color: inherit; text-decoration-color: #bbb; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.6rem; border-bottom: 1px solid #ddd; }
th { font-weight: 600; white-space: nowrap; }
td.held, td.not, td.open { white-space: nowrap; font-weight: 600; }
td.held { color: #1f5a94; }
td.not { color: #a3480f; }
td.open { color: #555; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; font-size: 0.85rem; color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="about">Veit, Wilber and Belongie, <em>Residual Networks Behave Like Ensembles of Relatively Shallow
Networks</em> (2016), reproduced with pathnet $version. Of $claims claims, $verdicts.</p>
$body
</body>
</html>
""")


def write(runs: Sequence[results.Run], heading: str, file: Path) -> Path:
    """Draw the figures of all runs, write the report, and return its path.

    Args:
        runs: complete runs, in the order of the page.
        heading: title of the page.
        file: path of the page.

    Raises:
        ValueError: an argument has the wrong type, or a run belongs to an unknown experiment or is incomplete.
        OSError: the page or a figure cannot be written.
    """
    if not isinstance(runs, Sequence) or isinstance(runs, str | bytes):
        raise ValueError(f"runs: expected a sequence of runs, got {described(runs)}")
    if not isinstance(heading, str):
        raise ValueError(f"heading: expected text, got {described(heading)}")
    file = check_path("file", file)
    tested = [(run, claims(run)) for run in runs]
    all_claims = [claim for _, run_claims in tested for claim in run_claims]
    text = PAGE.substitute(
        title=escape(heading),
        version=escape(_last_attempt(runs[0], "pathnet")[0]) if runs else "",
        claims=len(all_claims),
        verdicts=in_words(all_claims),
        body="\n".join([_overview(tested), *(_section(run, run_claims) for run, run_claims in tested)]),
    )
    kept = "the measurements are on the disk, and the same command resumes from them"
    with replacing(file, "report", kept) as html:
        html.write(text.encode())
    return file


def escape(text: str) -> str:
    """Return text that shows as it is in HTML."""
    return escape_markup(printable(text))


def _overview(tested: Sequence[tuple[results.Run, Sequence[Claim]]]) -> str:
    rows = "".join(
        f'<tr><td>{escape(claim.where)}</td><td><a href="#{_anchor(run)}">{escape(claim.paper)}</a></td>'
        f"{_verdict(claim)}</tr>"
        for run, run_claims in tested
        for claim in run_claims
    )
    return f'<div class="scroll"><table><tr><th>paper</th><th>claim</th><th>here</th></tr>{rows}</table></div>'


def _section(run: results.Run, run_claims: Sequence[Claim]) -> str:
    experiment = EXPERIMENTS[run.experiment]
    images = "\n".join(_image(file) for file in draw(run) if file.suffix == ".svg")
    rows = "".join(
        f"<tr><td>{escape(claim.paper)}</td><td>{escape(claim.measured)}</td><td>{escape(claim.bound)}</td>"
        f"{_verdict(claim)}</tr>"
        for claim in run_claims
    )
    heads = "".join(f"<th>{name}</th>" for name in ("the paper's claim", "measured", "holds if", "here"))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(run).items())
    return (
        f'<h2 id="{_anchor(run)}">{escape(run.experiment)}: {escape(experiment.paper)}</h2>\n'
        f'<p class="about">{escape(experiment.about)}</p>\n{images}\n'
        f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>\n<dl>{facts}</dl>'
    )


def _anchor(run: results.Run) -> str:
    return escape("-".join([run.experiment, run.folder.name]))


def _verdict(claim: Claim) -> str:
    return f'<td class="{CLASSES[claim.verdict]}">{claim.verdict}</td>'


def _image(file: Path) -> str:
    encoded = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(file.stem)}" src="data:image/svg+xml;base64,{encoded}">'


def _last_attempt(run: results.Run, *names: str) -> list[str]:
    """Return facts about the last process that added to a run."""
    last = run.facts["attempts"][-1]
    for name in names:
        if name not in last:
            raise ValueError(f"run: {run.folder / 'run.json'}: expected {name!r} in the last attempt, got none")
    return [str(last[name]) for name in names]


def _facts(run: results.Run) -> dict[str, str]:
    """Return the facts of a run by name: networks and data, settings, time and device, and folder."""
    identity: dict[str, Any] = run.identity
    settings = {key: value for key, value in identity.items() if not isinstance(value, dict) and key != "experiment"}
    started, device, torch = _last_attempt(run, "started", "device", "torch")
    described = {"networks and data": title(identity)} if identity.get("networks") or "model" in identity else {}
    return {
        **described,
        "settings": ", ".join(f"{key} {value}" for key, value in {**settings, **run.planned}.items()) or "none",
        "measured": f"{started}, {device}, torch {torch}",
        "folder": run.folder.name,
    }
