"""Distillation methods: a pure function on tensors and a loss class for each, and wrappers that vary any of them."""

from kdlit.losses.at import ATLoss, at_loss
from kdlit.losses.base import DistillationLoss, LossWrapper, WeightedLoss
from kdlit.losses.catkd import CATKDLoss, catkd_loss
from kdlit.losses.cc import CCLoss
from kdlit.losses.confidence import ConfidenceSelection
from kdlit.losses.crd import CRDLoss, contrast_scores, crd_loss, log_normalizer
from kdlit.losses.crld import CRLDLoss, crld_loss
from kdlit.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from kdlit.losses.ctkd import (
    GlobalTemperature,
    InstanceTemperature,
    instance_temperature_kd_loss,
    reversal_coefficient,
)
from kdlit.losses.dist import DISTLoss, dist_loss
from kdlit.losses.dkd import DKDLoss, dkd_loss
from kdlit.losses.dkd_auto import AutoBetaDKDLoss, logit_gap
from kdlit.losses.dml import DMLLoss, dml_loss
from kdlit.losses.ea import EntropyWeighting, entropy_weight
from kdlit.losses.feature import FeatureLoss
from kdlit.losses.fitnet import FitNetLoss
from kdlit.losses.head import OnHead
from kdlit.losses.itrd import ITRDLoss, itrd_loss
from kdlit.losses.kd import KDLoss, kd_loss
from kdlit.losses.la import LALoss, la_loss, swap_label_logit
from kdlit.losses.lr import (
    LRLoss,
    TeacherRightCrossEntropyLoss,
    lr_loss,
    revised_labels,
    teacher_right_cross_entropy_loss,
)
from kdlit.losses.lskd import LogitStandardization, standardize_logits
from kdlit.losses.mlkd import (
    MLKDLoss,
    MLKDSingleViewLoss,
    MLKDTwoViewLoss,
    batch_relation_loss,
    class_relation_loss,
    mlkd_loss,
    mlkd_single_view_loss,
    mlkd_two_view_loss,
)
from kdlit.losses.nkd import NKDLoss, nkd_loss
from kdlit.losses.nst import NSTLoss, nst_loss
from kdlit.losses.ofd import OFDLoss, ofd_loss
from kdlit.losses.pkt import PKTLoss, pkt_loss
from kdlit.losses.rc import RCLoss, rc_loss
from kdlit.losses.renyi import RenyiEntropyLoss, renyi_entropy, renyi_entropy_loss
from kdlit.losses.reviewkd import ReviewKDLoss, hierarchical_context_loss
from kdlit.losses.rkd import RKDLoss, rkd_loss
from kdlit.losses.rld import RLDLoss, rld_loss
from kdlit.losses.simkd import SimKDLoss
from kdlit.losses.sp import SPLoss, sp_loss
from kdlit.losses.srrl import SRRLLoss, srrl_loss
from kdlit.losses.ttm import TTMLoss, WTTMLoss, power_sum, ttm_loss, wttm_loss
from kdlit.losses.vid import VIDLoss
from kdlit.losses.vitkd import ViTKDLoss
from kdlit.losses.wkd import WKDLoss, class_distance, wkd_loss

__all__ = [
    "ATLoss",
    "AutoBetaDKDLoss",
    "CATKDLoss",
    "CCLoss",
    "CRDLoss",
    "CRLDLoss",
    "ConfidenceSelection",
    "CrossEntropyLoss",
    "DISTLoss",
    "DKDLoss",
    "DMLLoss",
    "DistillationLoss",
    "EntropyWeighting",
    "FeatureLoss",
    "FitNetLoss",
    "GlobalTemperature",
    "ITRDLoss",
    "InstanceTemperature",
    "KDLoss",
    "LALoss",
    "LRLoss",
    "LogitStandardization",
    "LossWrapper",
    "MLKDLoss",
    "MLKDSingleViewLoss",
    "MLKDTwoViewLoss",
    "NKDLoss",
    "NSTLoss",
    "OFDLoss",
    "OnHead",
    "PKTLoss",
    "RCLoss",
    "RKDLoss",
    "RLDLoss",
    "RenyiEntropyLoss",
    "ReviewKDLoss",
    "SPLoss",
    "SRRLLoss",
    "SimKDLoss",
    "TTMLoss",
    "TeacherRightCrossEntropyLoss",
    "VIDLoss",
    "ViTKDLoss",
    "WKDLoss",
    "WTTMLoss",
    "WeightedLoss",
    "at_loss",
    "batch_relation_loss",
    "catkd_loss",
    "class_distance",
    "class_relation_loss",
    "contrast_scores",
    "crd_loss",
    "crld_loss",
    "cross_entropy_loss",
    "dist_loss",
    "dkd_loss",
    "dml_loss",
    "entropy_weight",
    "hierarchical_context_loss",
    "instance_temperature_kd_loss",
    "itrd_loss",
    "kd_loss",
    "la_loss",
    "log_normalizer",
    "logit_gap",
    "lr_loss",
    "mlkd_loss",
    "mlkd_single_view_loss",
    "mlkd_two_view_loss",
    "nkd_loss",
    "nst_loss",
    "ofd_loss",
    "pkt_loss",
    "power_sum",
    "rc_loss",
    "renyi_entropy",
    "renyi_entropy_loss",
    "reversal_coefficient",
    "revised_labels",
    "rkd_loss",
    "rld_loss",
    "sp_loss",
    "srrl_loss",
    "standardize_logits",
    "swap_label_logit",
    "teacher_right_cross_entropy_loss",
    "ttm_loss",
    "wkd_loss",
    "wttm_loss",
]
