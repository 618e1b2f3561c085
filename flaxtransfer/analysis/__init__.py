"""Analysis of pre-trained networks: stem, probes, curvature, distances, transferability."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.analysis.curvature import Curvature as Curvature
    from flaxtransfer.analysis.curvature import curvature_by_part as curvature_by_part
    from flaxtransfer.analysis.curvature import fisher_diagonal as fisher_diagonal
    from flaxtransfer.analysis.curvature import mean_gradient as mean_gradient
    from flaxtransfer.analysis.curvature import relative_gradient_norms as relative_gradient_norms
    from flaxtransfer.analysis.distances import bures_wasserstein as bures_wasserstein
    from flaxtransfer.analysis.distances import class_distance as class_distance
    from flaxtransfer.analysis.distances import frechet_distance as frechet_distance
    from flaxtransfer.analysis.distances import sliced_wasserstein as sliced_wasserstein
    from flaxtransfer.analysis.profile import Profile as Profile
    from flaxtransfer.analysis.profile import probe_profile as probe_profile
    from flaxtransfer.analysis.similarity import debiased_cka as debiased_cka
    from flaxtransfer.analysis.similarity import proxy_a_distance as proxy_a_distance
    from flaxtransfer.analysis.stem import StemReport as StemReport
    from flaxtransfer.analysis.stem import stem_report as stem_report
    from flaxtransfer.analysis.transferability import h_score as h_score
    from flaxtransfer.analysis.transferability import leep as leep
    from flaxtransfer.analysis.transferability import logme as logme

__getattr__, __dir__, __all__ = attach(__name__, __file__)
