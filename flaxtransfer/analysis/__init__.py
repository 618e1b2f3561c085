"""What a pre-trained network is made of, and what of it another domain can use."""

from flaxtransfer.analysis.stem import StemReport, stem_report

__all__ = ["StemReport", "stem_report"]
