"""What is wrong with a recipe, in sentences: reads pydantic's findings and the schema, and says what was expected.

A sentence names the place in the recipe's own terms (`[losses] recon`), shows the value that stands
there, describes the one that was expected, and offers the name that was probably meant. Other TOML
files with a pydantic model (facts, edit scripts) are put into words here too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from spdcli.recipe.contradiction import shown
from spdcli.recipe.rules import contradictions
from spdcli.recipe.schema import Recipe
from spdcli.recipe.toml_lines import KeyPath

Schema = Mapping[str, Any]
TARGETS = get_args(Recipe.model_fields["target"].annotation)
KINDS = [get_args(target.model_fields["kind"].annotation)[0] for target in TARGETS]
SECTIONS = "sections, at least one"


class Mistake(NamedTuple):
    """One sentence, and the keys it is about: the first one that stands somewhere is the place to name."""

    keys: tuple[KeyPath, ...]
    message: str


def mistakes(error: ValidationError, raw: Mapping[str, Any]) -> list[Mistake]:
    """Every mistake of the recipe `raw`: what pydantic found in `error`, and the contradictions it did not get to."""
    problems: list[Mistake] = []
    broken: list[KeyPath] = []
    for path, sentence in _findings(error, raw, Recipe):
        broken.append(path)
        problems.append(Mistake((path,), sentence))
    for contradiction in contradictions(_sound_part(raw, broken)):
        keys = tuple(tuple(key.split(".")) for key in contradiction.keys)
        problems.append(Mistake(keys, contradiction.message))
    return problems


def document_mistakes(error: ValidationError, raw: Mapping[str, Any], model: type[BaseModel]) -> list[Mistake]:
    """What pydantic found wrong with `raw`, the content of a TOML file that `model` describes."""
    return [Mistake((path,), sentence) for path, sentence in _findings(error, raw, model)]


def _findings(error: ValidationError, raw: Mapping[str, Any], model: type[BaseModel]) -> Iterator[tuple[KeyPath, str]]:
    seen: set[KeyPath] = set()
    for detail in error.errors(include_url=False, include_context=False):
        if detail["type"] == "value_error":  # Recipe's own check, which `contradictions` repeats with its keys
            continue
        path = _without_tag(detail["loc"])
        if detail["type"].startswith("union_tag"):
            path = (*path, "kind")
        elif "anyOf" in (_schema_at(path[:-1], raw, model) or {}):  # pydantic tells of each type that a value may have
            path = path[:-1]
        if path not in seen:
            seen.add(path)
            yield path, _sentence(detail["type"], path, raw, model)


def did_you_mean(word: str, vocabulary: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest word of `vocabulary`, or nothing."""
    near = nearest(word, vocabulary)
    return f" (did you mean '{near}'?)" if near else ""


def nearest(word: str, vocabulary: Iterable[str]) -> str | None:
    """The word of `vocabulary` that is most like `word`, whatever its case; None where none is like it."""
    lowered = {candidate.lower(): candidate for candidate in vocabulary}
    near = difflib.get_close_matches(word.lower(), list(lowered), n=1)
    return lowered[near[0]] if near else None


def known_keys(path: KeyPath, raw: Mapping[str, Any], model: type[BaseModel] = Recipe) -> list[str]:
    """The keys that may stand in the section at `path` of `raw`, a recipe or another file that `model` describes."""
    return list((_schema_at(path, raw, model) or {}).get("properties", ()))


def _without_tag(location: tuple[int | str, ...]) -> KeyPath:
    """pydantic puts the kind of a target into the path: `target.induction.layers`."""
    if location[:1] == ("target",) and location[1:2] and location[1] in KINDS:
        return (location[0], *location[2:])
    return location


def _sentence(problem: str, path: KeyPath, raw: Mapping[str, Any], model: type[BaseModel]) -> str:
    place, key = _place(path)
    if problem == "extra_forbidden":
        return _unknown(path, raw, model)
    schema = _schema_at(path, raw, model)
    expected = expectation(schema)
    if problem in ("missing", "union_tag_not_found"):
        missing = {"a section": f"section [{key}]", SECTIONS: f"section [[{key}]]"}
        return f"missing {missing[expected]}" if expected in missing else f"{place}missing key '{key}' ({expected})"
    if problem == "less_than_equal":
        expected += f" and at most {_most(schema or {}):,}"
    value = _value_at(path, raw)
    choices = (schema or {}).get("enum", ())
    meant = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"{place}{key} = {shown(value)}: expected {expected}{meant}"


def _place(path: KeyPath) -> tuple[str, str]:
    """The section and the key, in words: `[data] ` and `prompts[1]`; of `("fact", 3, "prompt")` `[[fact]] ` and
    `prompt`, the line saying which fact."""
    tables = [depth for depth in range(1, len(path) - 1) if isinstance(path[depth], int)]
    if tables and isinstance(path[tables[-1] + 1], str):
        names = [str(part) for part in path[: tables[-1]] if isinstance(part, str)]
        place, rest = f"[[{'.'.join(names)}]] ", path[tables[-1] + 1 :]
    else:
        place, rest = (f"[{path[0]}] ", path[1:]) if len(path) > 1 else ("", path)
    first, *inner = rest
    return place, str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)


def _unknown(path: KeyPath, raw: Mapping[str, Any], model: type[BaseModel]) -> str:
    *section, name = path
    name = str(name)
    is_section = not section and isinstance(raw.get(name), dict)
    keys = known_keys(tuple(section), raw, model)
    if is_section:
        near = nearest(name, keys)
        return f"unknown section [{name}]" + (f" (did you mean [{near}]?)" if near else "")
    place, _ = _place(path)
    meant = (_belongs(name) if model is Recipe else "") or did_you_mean(name, keys)
    return f"{place}unknown key '{name}'{meant}"


def _belongs(name: str) -> str:
    """Where a key that is right, but in the wrong place, should stand."""
    sections = _schema(Recipe)["properties"]
    if name in sections:
        return " (it belongs at the top, before the first section)"
    places = [f"[{section}]" for section in sections if section != "target" and name in known_keys((section,), {})]
    kinds = [kind for kind in KINDS if name in known_keys(("target",), {"target": {"kind": kind}})]
    if kinds:
        places.append("[target]" if len(kinds) > 1 else f"[target] with kind = '{kinds[0]}'")
    return f" (it belongs in {' or '.join(places)})" if places else ""


def expectation(schema: Schema | None) -> str:
    """What a JSON schema asks for, as in `a whole number of at least 1`."""
    if schema is None:
        return "nothing"
    if "anyOf" in schema:
        return " or ".join(expectation(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "const" in schema:
        return f"'{schema['const']}'"
    if "enum" in schema:
        return "one of " + ", ".join(f"'{choice}'" for choice in schema["enum"])
    if schema["type"] in ("integer", "number"):
        return {"integer": "a whole number", "number": "a number"}[schema["type"]] + _bounds(schema)
    if schema["type"] == "string":
        return "text in quotes, not empty" if "pattern" in schema else "text in quotes"
    if schema["type"] == "array" and "$ref" in schema["items"]:
        return SECTIONS if schema.get("minItems") else "sections"
    if schema["type"] == "array":
        return "a list of texts, at least one" if schema.get("minItems") else "a list of texts"
    return {"boolean": "true or false", "object": "a section"}[schema["type"]]


def _most(schema: Schema) -> int:
    """The largest number that a JSON schema allows."""
    return max(option["maximum"] for option in (schema, *schema.get("anyOf", ())) if "maximum" in option)


def _bounds(schema: Schema) -> str:
    if "exclusiveMinimum" in schema and "exclusiveMaximum" in schema:
        return f" between {schema['exclusiveMinimum']:g} and {schema['exclusiveMaximum']:g}"
    if "minimum" in schema:
        return f" of at least {schema['minimum']:g}"
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']:g}"
    return ""


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _resolved(schema: Schema, raw: Any, model: type[BaseModel]) -> Schema:
    """Follows references, picks the kind of target that `raw` asks for, and drops the `null` of an optional section or
    list."""
    if "$ref" in schema:
        return _resolved(_schema(model)["$defs"][schema["$ref"].rpartition("/")[2]], raw, model)
    if "discriminator" in schema:
        kind = raw.get("kind") if isinstance(raw, dict) else None
        mapping = schema["discriminator"]["mapping"]
        if isinstance(kind, str) and kind in mapping:
            return _resolved({"$ref": mapping[kind]}, raw, model)
        return {"type": "object", "properties": {"kind": {"enum": list(mapping)}}}
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    inner = [option for option in options if "$ref" in option or (option.get("type") == "array" and len(options) == 1)]
    return _resolved(inner[0], raw, model) if inner else schema


def _schema_at(path: KeyPath, raw: Any, model: type[BaseModel]) -> Schema | None:
    schema = _resolved(_schema(model), raw, model)
    for part in path:
        raw = _value_at((part,), raw)
        inner = schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
        if inner is None:
            return None
        schema = _resolved(inner, raw, model)
    return schema


def _value_at(path: KeyPath, raw: Any) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _sound_part(raw: Mapping[str, Any], broken: list[KeyPath]) -> dict[str, Any]:
    """`raw` without its `broken` keys, and with the defaults of the others."""
    sound = {}
    for name, schema in _schema(Recipe)["properties"].items():
        if (name,) in broken:
            continue
        if isinstance(raw.get(name), dict):
            sound[name] = _with_defaults(name, raw, broken)
        elif name in raw or "default" in schema:
            sound[name] = raw.get(name, schema.get("default"))
    return sound


def _with_defaults(section: str, raw: Mapping[str, Any], broken: list[KeyPath]) -> dict[str, Any]:
    properties = (_schema_at((section,), raw, Recipe) or {}).get("properties", {})
    defaults = {key: schema["default"] for key, schema in properties.items() if "default" in schema}
    spoiled = {path[1] for path in broken if path[0] == section and len(path) > 1}
    return {key: value for key, value in (defaults | raw[section]).items() if key not in spoiled}
