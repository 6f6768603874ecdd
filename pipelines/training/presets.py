"""Presets: trees of settings in YAML, which extend each other and are overridden from the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from infra.errors import BadRequest
from infra.storage import ERRORS, is_remote, read_bytes, run_root

PRESETS = Path(__file__).resolve().parents[1] / "configs"


def read_preset(name: str) -> dict[str, Any]:
    """A YAML file by path or s3:// URL, or by its name among the presets; `extends: NAME` begins with the values of
    that one."""
    tree = read_yaml(name, PRESETS, "preset")
    if not isinstance(tree, dict):
        raise BadRequest(f"{name} must hold a mapping of sections (run, data, objective, …)")
    base = tree.pop("extends", None)
    return tree if base is None else _merged(read_preset(str(base)), tree)


def read_yaml(name: str, known_in: Path, what: str) -> Any:
    """What a YAML file holds: by path, by s3:// URL, or by its name in a folder. Raises BadRequest."""
    path: str | Path = name
    if not is_remote(name) and not (path := Path(name)).is_file():
        path = known_in / (name if name.endswith(".yaml") else f"{name}.yaml")
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in known_in.glob("*.yaml")))
            raise BadRequest(f"there is no {what} {name!r}: give a YAML file, or one of {known}")
    try:
        return yaml.safe_load(read_bytes(str(path)).decode())
    except (*ERRORS, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRequest(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `tree` in place of its own; a section of another `kind` is replaced whole."""
    merged = dict(base)
    for key, value in tree.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            value = _merged(old, value)
        merged[key] = value
    return merged


def override(tree: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Merge `dotted.key=value` into a tree; values are YAML."""
    tree = copy.deepcopy(tree)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise BadRequest(f"{assignment!r} is not an override: write dotted.key=value, for example run.steps=1000")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            value = text
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise BadRequest(f"{assignment!r}: {parent!r} is a value, not a section")
        node[leaf] = value
    return tree


def with_run_root(tree: Any) -> Any:
    """${RUN_ROOT} in any text becomes the run root of the driver."""
    if isinstance(tree, dict):
        return {key: with_run_root(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_run_root(value) for value in tree]
    return tree.replace("${RUN_ROOT}", str(run_root())) if isinstance(tree, str) else tree
