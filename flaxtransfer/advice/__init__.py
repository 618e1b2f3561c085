"""Advice: which strategy fits the data, with the evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.advice.advise import Advice as Advice
    from flaxtransfer.advice.advise import Candidate as Candidate
    from flaxtransfer.advice.advise import advise as advise
    from flaxtransfer.advice.auto import Auto as Auto
    from flaxtransfer.advice.auto import Choice as Choice
    from flaxtransfer.advice.auto import auto as auto
    from flaxtransfer.advice.auto import choose as choose
    from flaxtransfer.advice.evidence import Evidence as Evidence
    from flaxtransfer.advice.evidence import HeadEvidence as HeadEvidence
    from flaxtransfer.advice.evidence import gather as gather
    from flaxtransfer.advice.race import Prior as Prior
    from flaxtransfer.advice.race import Race as Race
    from flaxtransfer.advice.race import race as race
    from flaxtransfer.advice.understanding import AttributeProfile as AttributeProfile
    from flaxtransfer.advice.understanding import Understanding as Understanding
    from flaxtransfer.advice.understanding import attribute_profile as attribute_profile
    from flaxtransfer.advice.understanding import source_distance as source_distance
    from flaxtransfer.advice.understanding import understand as understand

__getattr__, __dir__, __all__ = attach(__name__, __file__)
