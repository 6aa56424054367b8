"""Reads Hugging Face configs for families: only fields that the model uses, each with a checked value, and without overlooking
one.

A bridge that read `sliding_window` in every config would apply it to a Llama, which ignores it; a bridge that overlooked
`clip_qkv` would ignore it in an OLMoE, which uses it. Both would silently be another model. A family therefore reads through a
`ConfigReader`:

* It returns only fields that the config's own Transformers class declares. A field that the class does not declare has no
  effect in Transformers, and is returned only by `undeclared` (for the few that a model reads all the same).
* It records which fields were read. When the family has finished, every other field must be declared to be without effect
  (`WITHOUT_EFFECT` for all families, `ignore` for one), or have its class's default value. Otherwise the model is refused, and
  the error names the field.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from mbridge_rl.bridges.blocks.versions import constant, has_constant, newest_spelling
from mbridge_rl.core.config_fields import check_value
from mbridge_rl.core.errors import CheckpointError, UnsupportedModelError

_log = logging.getLogger(__name__)

# Fields that change no logits of any family: outputs of a forward pass, generation, initialization, losses of pretraining, and
# dropout and noise, which are off, since the trained policy must be the one that sampled.
_COMMON = """
    transformers_version architectures output_hidden_states return_dict dtype
    id2label label2id problem_type chunk_size_feed_forward
    use_cache num_logits_to_keep pad_token_id bos_token_id eos_token_id pretraining_tp
    initializer_range rescale_prenorm_residual
    attention_dropout hidden_dropout residual_dropout resid_pdrop embd_pdrop
    output_router_logits router_aux_loss_coef router_jitter_noise
"""
WITHOUT_EFFECT = frozenset(_COMMON.split())

# Fields of config.json that its class does not declare and that need no warning: its origin, quantization (which is checked
# elsewhere), and other names for rotary positions and windows, which Transformers has copied into its own fields.
_ELSEWHERE = """
    model_type auto_map torch_dtype name_or_path quantization_config
    rope_theta rope_scaling rope_type partial_rotary_factor use_sliding_window max_window_layers
"""
_UNREMARKABLE = frozenset(_ELSEWHERE.split())


class ConfigReader:
    """Gives a family access to a config: `reader.hidden_size` is the checked value of a field.

    Attributes:
        architecture: the model's class, for messages.
        config: the Transformers config itself, for Transformers' own functions. A family that passes it on must read the fields
            that these functions use, too, or declare them with `ignore`.
    """

    def __init__(self, config: Any, *, architecture: str | None = None, where: str = "") -> None:
        self.config = config
        self.architecture = architecture or config.architectures[0]
        self._where = where
        self._values: dict[str, Any] = {}
        self._read: set[str] = set()
        self._nested: dict[str, ConfigReader] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if not self.declares(name):
            if has_constant(type(self.config).__name__, name):
                return self._constant(name)
            raise AttributeError(
                f"{type(self.config).__name__} declares no field {name}; a bridge may ask `get` or `undeclared`"
            )
        return self._checked(name)

    def declares(self, name: str) -> bool:
        """Whether the config's class declares the field, under this name or under the name for which it is an alias."""
        return name in self._values or self._canonical(name) in set(map(self._canonical, self._declared()))

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value if the class declares it, otherwise `default`."""
        return self._checked(name) if self.declares(name) else default

    def undeclared(self, name: str, default: Any = None) -> Any:
        """The value of a field that the config has, even if its class does not declare it. It is for the few fields that a
        model of Transformers, of vLLM or of the checkpoint's own code reads although Transformers' class does not declare
        them."""
        return self._checked(name) if self._holds(name) else default

    def ignore(self, *names: str) -> None:
        """Declares that fields have no effect on this model's logits, whatever their values."""
        self._read.update(map(self._canonical, names))

    def require(self, name: str, *admitted: Any) -> None:
        """Refuses a config in which the field, declared or not, has another value than one of `admitted`.

        Raises:
            UnsupportedModelError: it has; the message names the field and the supported values.
        """
        value = self.undeclared(name, admitted[0])
        if not any(_same(value, supported) for supported in admitted):
            raise UnsupportedModelError(
                f"{self.architecture}: {self._where}{name}={value!r} is not supported by its bridge, which needs "
                f"{' or '.join(f'{name}={supported!r}' for supported in admitted)}"
            )

    def refuse(self, name: str, reason: str) -> UnsupportedModelError:
        """Makes the error for a field with a value that the bridge does not support."""
        return UnsupportedModelError(f"{self.architecture}: {self._where}{name}: {reason}")

    def nested(self, name: str) -> ConfigReader:
        """The reader of a config inside of this one; fields that it does not read count as unread here."""
        if name not in self._nested:
            config, where = getattr(self, name), f"{self._where}{name}."
            self._nested[name] = reader_of(config, self.architecture, where)
        return self._nested[name]

    def with_values(self, **values: Any) -> ConfigReader:
        """A reader that returns these values instead of the config's own; fields that it reads count as read here."""
        other = ConfigReader.__new__(ConfigReader)
        other.__dict__.update(self.__dict__, _values={**self._values, **values})
        return other

    def unread(self) -> Iterator[tuple[str, Any, Any]]:
        """Yields the name, the value and the default of every field that was neither read nor declared to be without effect,
        and that does not have its default value."""
        for name, default in self._declared().items():
            canonical = self._canonical(name)
            if {name, canonical} & (self._read | WITHOUT_EFFECT):
                continue
            value = getattr(self.config, name)
            if not _same(value, default):
                yield f"{self._where}{name}", value, default
        for reader in self._nested.values():
            yield from reader.unread()

    def unknown(self) -> Iterator[str]:
        """Yields the names of fields in the config that its class does not declare and that were not read."""
        known = {*_attributes(type(self.config)), *self._read, *_UNREMARKABLE, *WITHOUT_EFFECT}
        for name, value in vars(self.config).items():
            if not name.startswith("_") and name not in known and value is not None:
                yield f"{self._where}{name}"
        for reader in self._nested.values():
            yield from reader.unknown()

    def _checked(self, name: str) -> Any:
        canonical = self._canonical(name)
        self._read.add(canonical)
        value = self._values[name] if name in self._values else getattr(self.config, canonical)
        check_value(name, value, f"{self.architecture}: {self._where}")
        return newest_spelling(type(self.config).__name__, canonical, value)

    def _constant(self, name: str) -> Any:
        """The value of a field that this release's class lacks, since its model computes with a constant.

        Raises:
            UnsupportedModelError: the config asks for another value, which this release's model would ignore.
        """
        value = constant(type(self.config).__name__, name)
        self.require(name, value)
        return value

    def _holds(self, name: str) -> bool:
        return self.declares(name) or self._canonical(name) in vars(self.config)

    def _canonical(self, name: str) -> str:
        """The attribute in which Transformers stores a field that has several names."""
        return type(self.config).attribute_map.get(name, name)

    def _declared(self) -> dict[str, Any]:
        return _defaults(type(self.config))


@cache
def _defaults(config_class: type[Any]) -> dict[str, Any]:
    """The fields of a Transformers config class with their default values; `None` for a default that a function makes."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config_class)
    }


@cache
def _attributes(config_class: type[Any]) -> frozenset[str]:
    """The attributes that every config of a class has: its fields, attributes that it derives from them, and class
    attributes."""
    return frozenset({*vars(config_class()), *dir(config_class)})


def _same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal; a list may equal a tuple, but true does not equal 1."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def reader_of(config: Any, architecture: str, where: str = "") -> ConfigReader:
    """The reader of a full config, or of the language model's config inside of one, which `where` names.

    Raises:
        UnsupportedModelError: the config has a feature that no family supports: an encoder, attention to later tokens, fields
            that differ by layer.
        CheckpointError: it is no Transformers config.
    """
    if not dataclasses.is_dataclass(config):
        raise CheckpointError(f"{architecture}: {where}expected a Transformers config, found a {type(config).__name__}")
    reader = ConfigReader(config, architecture=architecture, where=where)
    reader.require("is_encoder_decoder", False)
    reader.require("is_causal", True)
    if getattr(config, "is_heterogeneous", False):
        raise reader.refuse("per_layer_config", "fields that differ by layer are not supported")
    return reader


def refuse_unread(reader: ConfigReader) -> None:
    """Refuses a model whose config has a field that its bridge has not read, and warns about fields without effect.

    Raises:
        UnsupportedModelError: there is such a field; the message names the first one.
    """
    for name, value, default in reader.unread():
        raise UnsupportedModelError(
            f"{reader.architecture}: {name}={value!r} is not supported: its bridge knows the model with {name}={default!r} only"
        )
    if unknown := tuple(sorted(reader.unknown())):
        _warn_of_unknown(reader.architecture, type(reader.config).__name__, unknown)


@cache
def _warn_of_unknown(architecture: str, config_class: str, names: tuple[str, ...]) -> None:
    """Warns about fields without effect, once per process and config."""
    _log.warning(
        "%s: config fields without effect, which Transformers' %s does not know: %s",
        architecture,
        config_class,
        ", ".join(names),
    )


def rope_value(reader: ConfigReader, parameters: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A checked field of `rope_parameters`.

    Raises:
        CheckpointError: the field is missing and `default` is `...`, or its value is not allowed.
    """
    value = parameters.get(name, default)
    if value is ...:
        raise CheckpointError(
            f"{reader.architecture}: rope_parameters has no {name}, found {dict(parameters)!r}; a rope_scaling or "
            "rope_parameters that is set by hand needs all fields, those that config.json says elsewhere included"
        )
    check_value(name, value, f"{reader.architecture}: rope_parameters.")
    return value
