"""How a family reads a Hugging Face config: only fields that the model obeys, each of the right kind, none overlooked.

A bridge that reads `sliding_window` of every config would obey it in a Llama, which ignores it; a bridge that overlooks
`clip_qkv` would ignore it in an OLMoE, which obeys it. Both are another model, without a word. So a family reads through a
`ConfigReader`:

* It answers fields that the config's own Transformers class declares. A field that the class doesn't know is without effect
  in Transformers, and is answered only to who asks for it as `undeclared` (the few that a model looks for all the same).
* It remembers what was read. When the family is done, every other field must be declared to be without effect
  (`WITHOUT_EFFECT` for all families, `ignore` for one), or hold what its class says if nothing is said: else the model is
  refused by the field's name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from mbridge_rl.core.config_fields import check_value
from mbridge_rl.core.errors import CheckpointError, UnsupportedModelError

_log = logging.getLogger(__name__)

# Fields that change no logit of any family: what a forward pass returns, generation, initialization, losses of pretraining, and
# dropout and noise, which are off: the policy that is trained must be the one that sampled.
_COMMON = """
    transformers_version architectures output_hidden_states return_dict dtype
    id2label label2id problem_type chunk_size_feed_forward
    use_cache num_logits_to_keep pad_token_id bos_token_id eos_token_id pretraining_tp
    initializer_range rescale_prenorm_residual
    attention_dropout hidden_dropout residual_dropout resid_pdrop embd_pdrop
    output_router_logits router_aux_loss_coef router_jitter_noise
"""
WITHOUT_EFFECT = frozenset(_COMMON.split())

# What config.json holds beside the fields of the class, without a word: where it came from, quantization (which has its own
# checks), and other spellings of rotary positions and windows, which Transformers has put into its own fields.
_ELSEWHERE = """
    model_type auto_map torch_dtype name_or_path quantization_config
    rope_theta rope_scaling rope_type partial_rotary_factor use_sliding_window max_window_layers
"""
_UNREMARKABLE = frozenset(_ELSEWHERE.split())


class ConfigReader:
    """A config, as its family may read it: `reader.hidden_size` is the checked value of a field.

    Attributes:
        architecture: the model's class, for messages.
        config: the Transformers config itself, for Transformers' own functions. Who hands it on says with `ignore`, or by
            reading them too, which fields these read.
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
            raise AttributeError(
                f"{type(self.config).__name__} declares no field {name}; a bridge may ask `get` or `undeclared`"
            )
        return self._checked(name)

    def declares(self, name: str) -> bool:
        """Whether the config's class has such a field, under this name or one that it stands for."""
        return name in self._values or self._canonical(name) in set(map(self._canonical, self._declared()))

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value where the class declares it, else `default`."""
        return self._checked(name) if self.declares(name) else default

    def undeclared(self, name: str, default: Any = None) -> Any:
        """The value of a field that the config holds, whether its class declares it or not: for the few that a model of
        Transformers, of vLLM or of the checkpoint's own code looks for though Transformers' class has no such field."""
        return self._checked(name) if self._holds(name) else default

    def ignore(self, *names: str) -> None:
        """Declares fields to be without effect on this model's logits, whatever they say."""
        self._read.update(map(self._canonical, names))

    def require(self, name: str, *admitted: Any) -> None:
        """Refuses a config whose field, declared or not, holds something else than one of `admitted`.

        Raises:
            UnsupportedModelError: naming the field and what its bridge can express.
        """
        found = self.undeclared(name, admitted[0])
        if not any(_same(found, value) for value in admitted):
            raise UnsupportedModelError(
                f"{self.architecture}: {self._where}{name}={found!r} is not supported by its bridge, which needs "
                f"{' or '.join(f'{name}={value!r}' for value in admitted)}"
            )

    def refuse(self, name: str, reason: str) -> UnsupportedModelError:
        """The error for a field that holds what the bridge can't express."""
        return UnsupportedModelError(f"{self.architecture}: {self._where}{name}: {reason}")

    def nested(self, name: str) -> ConfigReader:
        """The reader of a config inside of this one; what it leaves unread counts as unread here."""
        if name not in self._nested:
            config, where = getattr(self, name), f"{self._where}{name}."
            self._nested[name] = reader_of(config, self.architecture, where)
        return self._nested[name]

    def with_values(self, **values: Any) -> ConfigReader:
        """A reader that answers these instead of the config's own; what it reads counts as read here."""
        other = ConfigReader.__new__(ConfigReader)
        other.__dict__.update(self.__dict__, _values={**self._values, **values})
        return other

    def unread(self) -> Iterator[tuple[str, Any, Any]]:
        """Fields that nobody read or declared to be without effect, and that don't say what their class says if nothing is
        said: their name, value and that default."""
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
        """Fields that the config holds though its class doesn't know them, and that nobody asked for."""
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
        return value

    def _holds(self, name: str) -> bool:
        return self.declares(name) or self._canonical(name) in vars(self.config)

    def _canonical(self, name: str) -> str:
        """The attribute under which Transformers keeps a field that has several names."""
        return type(self.config).attribute_map.get(name, name)

    def _declared(self) -> dict[str, Any]:
        return _defaults(type(self.config))


@cache
def _defaults(config_class: type[Any]) -> dict[str, Any]:
    """The fields of a Transformers config class and what they hold if nothing is said; `None` where it is made up."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config_class)
    }


@cache
def _attributes(config_class: type[Any]) -> frozenset[str]:
    """What a config has whatever config.json says: its class's fields, what the class makes of them, and class attributes."""
    return frozenset({*vars(config_class()), *dir(config_class)})


def _same(first: Any, second: Any) -> bool:
    """Equality of JSON values, where lists and tuples are the same, and true isn't 1."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def reader_of(config: Any, architecture: str, where: str = "") -> ConfigReader:
    """The reader of a whole config, or of the language model's inside of one, which `where` names.

    Raises:
        UnsupportedModelError: what no family can express: an encoder, attention to later tokens, fields that differ by layer.
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
    """Refuses a model whose config says something that its bridge has not read, and says which fields are without effect.

    Raises:
        UnsupportedModelError: naming the first such field.
    """
    for name, value, default in reader.unread():
        raise UnsupportedModelError(
            f"{reader.architecture}: {name}={value!r} is not supported: its bridge knows the model with {name}={default!r} only"
        )
    if unknown := tuple(sorted(reader.unknown())):
        _warn_of_unknown(reader.architecture, type(reader.config).__name__, unknown)


@cache
def _warn_of_unknown(architecture: str, config_class: str, names: tuple[str, ...]) -> None:
    """Once per process and config."""
    _log.warning(
        "%s: config fields without effect, which Transformers' %s does not know: %s",
        architecture,
        config_class,
        ", ".join(names),
    )


def rope_value(reader: ConfigReader, parameters: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A checked field of `rope_parameters`.

    Raises:
        CheckpointError: it is missing, where `default` is `...`, or not of its kind.
    """
    value = parameters.get(name, default)
    if value is ...:
        raise CheckpointError(
            f"{reader.architecture}: rope_parameters has no {name}, found {dict(parameters)!r}; a rope_scaling or "
            "rope_parameters that is set by hand needs all fields, those that config.json says elsewhere included"
        )
    check_value(name, value, f"{reader.architecture}: rope_parameters.")
    return value
