"""Analysis of networks: stem, probes, frequencies, saliency, curvature, distances, transfer."""

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
    from flaxtransfer.analysis.frequency import FrequencyResponse as FrequencyResponse
    from flaxtransfer.analysis.frequency import StageResponse as StageResponse
    from flaxtransfer.analysis.frequency import filter_transfer as filter_transfer
    from flaxtransfer.analysis.frequency import frequency_response as frequency_response
    from flaxtransfer.analysis.map_checks import Faithfulness as Faithfulness
    from flaxtransfer.analysis.map_checks import RandomizationTest as RandomizationTest
    from flaxtransfer.analysis.map_checks import faithfulness as faithfulness
    from flaxtransfer.analysis.map_checks import impute as impute
    from flaxtransfer.analysis.map_checks import randomization_test as randomization_test
    from flaxtransfer.analysis.profile import DepthSet as DepthSet
    from flaxtransfer.analysis.profile import ErrorSplit as ErrorSplit
    from flaxtransfer.analysis.profile import LabelSuspects as LabelSuspects
    from flaxtransfer.analysis.profile import Profile as Profile
    from flaxtransfer.analysis.profile import error_split as error_split
    from flaxtransfer.analysis.profile import greedy_depths as greedy_depths
    from flaxtransfer.analysis.profile import label_suspects as label_suspects
    from flaxtransfer.analysis.profile import probe_profile as probe_profile
    from flaxtransfer.analysis.saliency import PooledHead as PooledHead
    from flaxtransfer.analysis.saliency import Saliency as Saliency
    from flaxtransfer.analysis.saliency import logits_function as logits_function
    from flaxtransfer.analysis.saliency import saliency_maps as saliency_maps
    from flaxtransfer.analysis.similarity import debiased_cka as debiased_cka
    from flaxtransfer.analysis.similarity import proxy_a_distance as proxy_a_distance
    from flaxtransfer.analysis.spectrum import Bottleneck as Bottleneck
    from flaxtransfer.analysis.spectrum import SpectralFeatures as SpectralFeatures
    from flaxtransfer.analysis.spectrum import bottleneck as bottleneck
    from flaxtransfer.analysis.spectrum import octave_features as octave_features
    from flaxtransfer.analysis.spectrum import spectral_features as spectral_features
    from flaxtransfer.analysis.stem import StemReport as StemReport
    from flaxtransfer.analysis.stem import stem_report as stem_report
    from flaxtransfer.analysis.transferability import h_score as h_score
    from flaxtransfer.analysis.transferability import leep as leep
    from flaxtransfer.analysis.transferability import logme as logme

__getattr__, __dir__, __all__ = attach(__name__, __file__)
