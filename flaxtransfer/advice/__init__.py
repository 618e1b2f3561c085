"""Advice: which strategy fits the data, with the evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.advice.advise import Advice as Advice
    from flaxtransfer.advice.advise import Candidate as Candidate
    from flaxtransfer.advice.advise import advise as advise
    from flaxtransfer.advice.evidence import Evidence as Evidence
    from flaxtransfer.advice.evidence import HeadEvidence as HeadEvidence
    from flaxtransfer.advice.evidence import gather as gather

__getattr__, __dir__, __all__ = attach(__name__, __file__)
