"""The conversions of the architecture, by their names in recipes."""

from tersely.convert.base import AttentionSettings, Conversion, attention_settings, norm_tensors
from tersely.convert.fope import FoPE

CONVERSIONS: dict[str, type[Conversion]] = {
    "fope": FoPE,
}

__all__ = ["CONVERSIONS", "AttentionSettings", "Conversion", "attention_settings", "norm_tensors"]
