"""What adapter_config.json says of a LoRA adapter: scales and ranks by module, and what is refused by name.

Facts (peft 0.21, `LoraConfig`, `get_pattern_key`, `BaseTuner._inject_parameters`):
* The scale is lora_alpha / rank, or lora_alpha / sqrt(rank) with use_rslora. rank_pattern and alpha_pattern replace r
  and lora_alpha for modules whose path ends in a key, taken as a regular expression; the first key that fits counts.
* A module that is adapted as a bare parameter (target_parameters) goes by the name of the parameter in these patterns.
* target_modules, exclude_modules, layers_to_transform and layers_pattern said what to train: the tensors say the same.
  fan_in_fan_out speaks of the base model's memory; for linear layers peft itself takes it back.
"""

import logging
import re
from collections.abc import Mapping

from ..checkpoint.header import short
from ..config.fields import Fields, shown
from ..errors import AdapterError, ConfigError

log = logging.getLogger(__name__)

# What is more than a sum of products, biases and replaced matrices, by the key that asks for it.
REFUSED = {
    "use_qalora": "it is a QA-LoRA adapter, which pools the inputs",
    "use_bdlora": "it is a BD-LoRA adapter, whose matrices are block-diagonal",
    "alora_invocation_tokens": "it is an activated LoRA, which begins in the middle of the prompt",
    "layer_replication": "it repeats layers of the model",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it is a KaSA adapter, which cuts singular values off the weights themselves",
    "monteclora_config": "it is a MonteCLoRA adapter, which samples its matrices",
    "velora_config": "it is a VeLoRA adapter, which projects the inputs",
}
# These leave part of the original weights out of the model, so that the adapter alone belongs to another model.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE = "merge it into its base model with peft (merge_and_unload), then convert the result"
# What is read here, and what changes nothing about a trained adapter: how it was trained, where it came from, which
# tensors there are to read.
KNOWN = """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern use_dora lora_bias trainable_token_indices
    target_parameters init_lora_weights
    auto_mapping base_model_name_or_path revision inference_mode task_type peft_version target_modules exclude_modules
    modules_to_save bias lora_dropout fan_in_fan_out layers_to_transform layers_pattern megatron_config megatron_core
    loftq_config eva_config corda_config lora_ga_config runtime_config qalora_group_size ensure_weight_tying
"""


class Settings:
    """The configuration of one adapter. Raises AdapterError for kinds not supported, ConfigError for wrong values."""

    def __init__(self, fields: Fields) -> None:
        self.where = fields.where
        _refuse_kinds(fields)
        self.dora = fields.flag("use_dora", False)
        self.biased = fields.flag("lora_bias", False)
        self._rank = fields.integer("r")
        self._alpha = fields.number("lora_alpha", above=-1e9)
        self._root = fields.flag("use_rslora", False)
        self._ranks = _pattern(fields, "rank_pattern")
        self._alphas = _pattern(fields, "alpha_pattern")
        self._parameters = fields.texts("target_parameters")
        self._tokens = fields.values.get("trainable_token_indices")

    def is_parameter(self, name: str) -> bool:
        """Whether the tensor of this name is adapted as a bare parameter."""
        return any(f".{name}".endswith(f".{target}") for target in self._parameters)

    def scale(self, path: str, rank: int) -> float:
        """The scale of a module whose matrices have this rank. Raises AdapterError when the file says another."""
        if self.is_parameter(f"{path}.weight"):
            path = f"{path}.weight"
        wanted = _first(self._ranks, path, self._rank)
        if rank != wanted:
            raise AdapterError(
                f"{self.where}: module {short(path)} should have rank {wanted:g}, its tensors have {rank}",
                hint="the configuration and the weights are from different adapters",
            )
        return _first(self._alphas, path, self._alpha) / (rank**0.5 if self._root else rank)

    def tokens(self, path: str, count: int) -> tuple[int, ...]:
        """The token ids whose rows of an embedding or head are retrained, in the order of the `count` rows stored."""
        given = self._tokens
        if isinstance(given, Mapping):
            given = next((ids for key, ids in given.items() if f".{path}".endswith(f".{key}")), None)
        if not isinstance(given, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in given):
            raise AdapterError(f'{self.where}: "trainable_token_indices" does not list token ids for {short(path)}')
        if len(set(given)) != len(given) or len(given) != count:
            raise AdapterError(
                f'{self.where}: "trainable_token_indices" lists {len(given)} tokens for {short(path)}, some twice or '
                f"not as many as its {count} rows"
            )
        return tuple(given)


def _pattern(fields: Fields, key: str) -> dict[re.Pattern[str], float]:
    given = fields.values.get(key) or {}
    if not isinstance(given, Mapping):
        raise fields.error(key, "an object")
    found = {}
    for text, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f'{fields.where}: "{key}" of {short(text)} must be a number, is {shown(value)}')
        try:
            found[re.compile(rf"(.*\.)?({str(text).lstrip('^')})$")] = float(value)
        except re.error as err:
            raise ConfigError(f'{fields.where}: "{key}": {short(text)} is no regular expression: {err}') from err
    return found


def _first(patterns: Mapping[re.Pattern[str], float], path: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if pattern.match(path)), default)


def _refuse_kinds(fields: Fields) -> None:
    kind = fields.values.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{fields.where}: the adapter is {shown(kind)}, only LORA is supported", hint=MERGE)
    for key, why in REFUSED.items():
        if fields.values.get(key):
            raise AdapterError(f'{fields.where}: "{key}" is set: {why}; that is not supported', hint=MERGE)
    start = fields.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise AdapterError(
            f"{fields.where}: the adapter was started by {start}, which changes the model's own weights too",
            hint="save it again with peft's path_initial_model_for_weight_conversion, which makes it an ordinary one",
        )
    known = {*KNOWN.split(), *REFUSED}
    if unknown := [short(key) for key, value in fields.values.items() if value and key not in known]:
        log.warning("%s: settings that are not known here are ignored: %s", fields.where, ", ".join(unknown))
