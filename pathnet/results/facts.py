"""``run.json``: identity, attempts, planned amounts and results of a run, checked field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathnet.checks import check_integer, check_number, described
from pathnet.files import replacing

__all__ = ["DIGEST", "check_facts", "plain_object", "read_facts", "write_facts"]

DIGEST = "sha256"
JSON_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def read_facts(file: Path) -> dict[str, Any]:
    """Read a ``run.json`` and verify its digest and its fields.

    Raises:
        ValueError: the file cannot be read, was edited or is damaged.
    """
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        digest = facts.pop(DIGEST, None) if isinstance(facts, dict) else None
        damaged = digest is not None and digest != _digest(facts)
        if not damaged:
            check_facts(facts)
    except RecursionError:
        raise ValueError(f"run: {file} is not the run.json of a run (it is nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"run: {file} is not the run.json of a run ({error})") from None
    if damaged:
        raise ValueError(
            f"run: {file} was edited or damaged after it was written (its {DIGEST} does not match its content); "
            "restore it from a copy, or measure into another folder"
        )
    return dict(facts)


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Write a ``run.json`` with its digest, durably.

    Raises:
        ValueError: JSON cannot hold a fact.
        OSError: the file cannot be written.
    """
    plain = plain_object("results", facts)
    plain[DIGEST] = _digest(plain)
    lost = "the parts on the disk are intact, and the same command resumes from them"
    with replacing(file, "run", lost) as handle:
        handle.write((json.dumps(plain, indent=2) + "\n").encode())


def plain_object(name: str, value: object) -> dict[str, Any]:
    """Return an object as it would be read back from a file: with strings for keys, and lists for tuples.

    Raises:
        ValueError: ``value`` is not an object, or not one that JSON can hold.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected an object, got {described(value)}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected an object that JSON can hold, got one that it cannot ({error})") from None
    return plain


def check_facts(facts: Any) -> None:
    """Check the type of every field that is read later.

    Raises:
        ValueError: a field is missing or has another type.
    """
    _field({"content": facts}, "", "content", dict)
    identity = _field(facts, "", "identity", dict)
    _field(identity, "identity.", "experiment", str)
    attempts = _field(facts, "", "attempts", list)
    if not attempts:
        raise ValueError("attempts: expected at least one, got none")
    for number, attempt in enumerate(attempts):
        _field({f"attempts.{number}": attempt}, "", f"attempts.{number}", dict)
        if "seconds" in attempt:
            check_number(f"attempts.{number}.seconds", attempt["seconds"], 0)
    for name in facts.keys() - {"identity", "attempts", "results"}:
        check_integer(name, facts[name], 0)
    if "results" in facts:
        _field(facts, "", "results", dict)
    for name in {"blocks", "modules"} & identity.keys():
        check_integer(f"identity.{name}", identity[name], 1)
    if "data" in identity:
        data = _field(identity, "identity.", "data", dict)
        _field(data, "identity.data.", "name", str)
        if "classes" in data:
            check_integer("identity.data.classes", data["classes"], 1)
    if "model" in identity:
        _check_network(_field(identity, "identity.", "model", dict), "identity.model.")
    for kind, networks in (_field(identity, "identity.", "networks", dict) if "networks" in identity else {}).items():
        where = f"identity.networks.{kind}"
        _field({where: networks}, "", where, list)
        if not networks:
            raise ValueError(f"{where}: expected at least one network, got none")
        for number, network in enumerate(networks):
            name = f"{where}.{number}"
            _check_network(_field({name: network}, "", name, dict), f"{name}.")


def _check_network(network: Mapping[str, Any], where: str) -> None:
    blocks = check_integer(f"{where}blocks", network.get("blocks"), 1)
    if "config" not in network or network["config"] is not None:
        config = _field(network, where, "config", dict)
        if "model" in config:
            _field(config, f"{where}config.", "model", str)
    if "survival" in network:
        survival = _field(network, where, "survival", list)
        if len(survival) != blocks:
            raise ValueError(f"{where}survival: expected {blocks} probabilities (one per block), got {len(survival)}")
        for probability in survival:
            check_number(f"{where}survival", probability, 0, 1)
    if "downsampling" in network:
        for block in _field(network, where, "downsampling", list):
            check_integer(f"{where}downsampling", block, 0, blocks - 1)


def _field(owner: Mapping[str, Any], where: str, name: str, kind: type) -> Any:
    """Return one field of a JSON object.

    Raises:
        ValueError: the field is missing or has another type than ``kind``.
    """
    if not isinstance(owner.get(name), kind):
        value = described(owner[name]) if name in owner else "none"
        raise ValueError(f"{where}{name}: expected {JSON_NAMES[kind]}, got {value}")
    return owner[name]


def _digest(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of a ``run.json``, whatever its layout."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
