"""The networks of timm, an extra that is imported only when one of its networks is named; and those of the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn

from ...console import reason
from ...errors import UserError
from ._source import NativeInput, Source, loading, unknown_network

PREFIX = "timm/"
HUB = "hf-hub:"
_INTERPOLATIONS = ("bilinear", "bicubic")


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "networks of timm need it: `pip install -e .[timm]` (or `pip install timm`) installs it "
            f"({reason(error)})"
        ) from None
    return timm


class Timm(Source):
    """Names are timm's, with or without the tag of published weights: "resnet18", "resnet18.a1_in1k"."""

    prefix = PREFIX

    def build(self, name: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
        timm, facts = _timm(), self._facts(name)
        options: dict[str, Any] = {"num_classes": num_classes}
        if image_size and facts.fixed_input_size and image_size != facts.input_size[-1]:
            options["img_size"] = image_size
        shown = self.prefix + name
        if pretrained and not (facts.url or facts.file or facts.hf_hub_id or facts.state_dict):
            raise UserError(f"{shown} has no published weights; `mdistiller models '{PREFIX}*'` lists the networks")
        try:
            if pretrained:
                with loading(shown, f"{HUB}{facts.hf_hub_id}" if facts.hf_hub_id else str(facts.url)), _quiet():
                    network = timm.create_model(self._name(name), pretrained=True, **options)
            else:
                network = timm.create_model(self._name(name), pretrained=False, **options)
        except UserError:
            raise
        except Exception as error:  # foreign constructors, to which a size or a number of classes may not do
            size = image_size or facts.input_size[-1]
            raise UserError(
                f"timm cannot make {shown} for {num_classes} classes and images of {size} pixels ({reason(error)})"
            ) from error
        network.fresh_head = pretrained and num_classes != facts.num_classes
        return network

    def native_input(self, name: str, image_size: int = 0) -> NativeInput:
        facts = self._facts(name)
        how = facts.interpolation if facts.interpolation in _INTERPOLATIONS else "bicubic"
        return NativeInput(facts.input_size[-1], tuple(facts.mean), tuple(facts.std), facts.crop_pct, how)

    def num_classes(self, name: str) -> int:
        return int(self._facts(name).num_classes)

    def names(self) -> list[str]:
        return [PREFIX + name for name in _timm().list_models()]

    def _name(self, name: str) -> str:
        """As timm takes it."""
        return name

    def _facts(self, name: str) -> Any:
        """timm's facts about the network and its published weights.

        Raises:
            UserError: no such network, or it has no weights of that tag.
        """
        timm = _timm()
        bare, _, tag = name.partition(".")
        known = timm.list_models()
        if bare not in known:
            raise unknown_network(name, PREFIX, known)
        if tag:
            tagged = timm.list_models(f"{bare}.*", pretrained=True)
            if name not in tagged:
                raise unknown_network(name, PREFIX, tagged)
        facts = timm.models.get_pretrained_cfg(name)
        return facts if facts is not None else timm.models.PretrainedCfg()


class Hub(Timm):
    """Networks of the Hugging Face hub that timm makes, by "user/repository"."""

    prefix = HUB

    def names(self) -> list[str]:
        return []

    def _name(self, name: str) -> str:
        return HUB + name

    def _facts(self, name: str) -> Any:
        timm = _timm()
        with loading(HUB + name, f"https://huggingface.co/{name}"), _quiet():
            facts, _, _ = timm.models.load_model_config_from_hf(name)
        return timm.models.PretrainedCfg(**facts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of timm and of the hub's library about what they load from where, and try again."""
    levels = {log: log.level for log in map(logging.getLogger, ("timm", "huggingface_hub"))}
    for log in levels:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)
