"""A configuration in words: what is wrong with one, and which keys there are."""

from __future__ import annotations

import difflib
import json
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One clause for each mistake in a configuration of class `model`, naming the key and what is allowed."""
    clauses = []
    for detail in error.errors():
        parts, _ = _follow(model, detail["loc"])
        where = ".".join(parts)
        if detail["type"] == "extra_forbidden":
            allowed = sorted(
                {name for section in _follow(model, detail["loc"][:-1])[1] for name in section.model_fields}
            )
            close = difflib.get_close_matches(parts[-1], allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else "allowed: " + ", ".join(allowed)
            clauses.append(f"unknown key {where} ({hint})")
        elif detail["type"] == "missing":
            clauses.append(f"{where} is missing")
        elif detail["type"] == "union_tag_invalid":
            context = detail["ctx"]
            clauses.append(f"{where}.kind: there is no {context['tag']}; allowed: {context['expected_tags']}")
        elif detail["type"] == "union_tag_not_found":
            clauses.append(f"{where}.kind is missing")
        elif detail["type"] == "value_error":
            clauses.append(": ".join(filter(None, (where, str(detail["ctx"]["error"])))))
        else:
            clauses.append(f"{where}: {detail['msg']}, got {_short(detail['input'])}")
    return clauses


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _follow(model: type[BaseModel], location: typing.Sequence[Any]) -> tuple[list[str], list[type[BaseModel]]]:
    """A pydantic location as the user writes it, and the sections that the key may be in.

    Pydantic puts the `kind` of a union's member into the location: it narrows the sections, but nobody writes it.
    """
    models: list[type[BaseModel]] = [model]
    written: list[str] = []
    expected = "key"
    for part in location:
        if expected == "kind":
            expected = "key"
            if named := [m for m in models if part in _kinds(m)]:
                models = named
                continue
        written.append(str(part))
        if expected == "name":
            expected = "kind" if len(models) > 1 else "key"
            continue
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        inside = [found for annotation in annotations for found in models_in(annotation)]
        by_name = any(map(_is_by_name, annotations))
        expected = "name" if by_name else "kind" if len(inside) > 1 else "key"
        models = inside or models
    return written, models


def _is_by_name(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict and bool(models_in(annotation))


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows: of a union several, of a plain value none."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def describe_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line for each key, with its default and meaning: the body of `--help`."""
    lines = []
    for name, entry in model.model_fields.items():
        inner = models_in(entry.annotation)
        by_name = typing.get_origin(entry.annotation) is dict
        if not inner or by_name:
            default = "required" if entry.is_required() else f"default {json.dumps(entry.default, default=str)}"
            lines.append(f"  {prefix}{name}  ({default}) {entry.description or ''}".rstrip())
            continue
        for section in inner:
            if len(inner) > 1:
                lines.append(f"  {prefix}{name}.kind={_kinds(section)[0]}:")
            lines += describe_keys(section, f"{prefix}{name}.")
    return lines
