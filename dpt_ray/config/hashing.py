"""Which settings are part of an artifact's identity: each field of a section says so by itself.

A field that says nothing is hashed. An option must say which of the marks below holds for it, so that
neither a stale result is reused nor a finished training made again by oversight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Mark:
    """How a field takes part in the identity; written as `Annotated[type, mark]`."""

    meaning: str


# Decides when to save or look, when to give up, or where a hashed file lies, but not the result.
NotHashed = Mark("never hashed")
# An option: at its default the result is what it was before the option existed.
HashedIfSet = Mark("hashed unless it has its default")
# Always hashed, also where it is None.
Hashed = Mark("always hashed")


@dataclass(frozen=True)
class HashedFile(Mark):
    """The file counts by its content, as `sha256`; `key` is the user's name of the setting."""

    meaning: str = "hashed by its content"
    key: str = ""


# (key, path or URI) -> digest of the content
Content = Callable[[str, str], str]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys and wrong types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # An unknown key stays, to be refused.
        return {key: v for key, v in values.items() if v is not None or key not in cls.model_fields}


class Settings(Section):
    """A section that an artifact is made from. An option (default None) without a mark is refused."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        for name, field in cls.model_fields.items():
            if field.default is None and mark(field) is None:
                raise TypeError(
                    f"{cls.__name__}.{name}: an option must say how it is hashed: annotate it with "
                    "HashedIfSet (None is what was done before), NotHashed, HashedFile or Hashed"
                )


def mark(field: FieldInfo) -> Mark | None:
    """Return the mark of a field, None where it has none."""
    return next((item for item in field.metadata if isinstance(item, Mark)), None)


def split(settings: Settings, content: Content) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hashed and the other settings as JSON values; together they are all of them.

    A file that is set counts as `sha256`, its `content(key, source)`, whose errors are the caller's.
    """
    fields = type(settings).model_fields
    hashed: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in settings.model_dump(mode="json").items():
        how = mark(fields[name])
        is_default = getattr(settings, name) == fields[name].default
        if isinstance(how, HashedFile):
            others[name] = value
            if value:
                hashed["sha256"] = content(how.key, value)
        elif how == NotHashed or (how == HashedIfSet and is_default):
            others[name] = value
        else:
            hashed[name] = value
    return hashed, others


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return what differs between two sets of hashed settings, a line each."""
    return [
        "the file's content differs"
        if key == "sha256"
        else f"{key} is {now.get(key)!r}, published with {before.get(key)!r}"
        for key in {**now, **before}
        if now.get(key) != before.get(key)
    ]
