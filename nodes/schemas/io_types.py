"""Types of this pack's sockets."""
from comfy_api.latest import io

GuiderType = io.Custom("PPAP_GUIDER")    # ppap_core.Guider
TermsType = io.Custom("PPAP_TERMS")      # tuple[bridge.terms.GuidanceTerm, ...]
SamplesType = io.Custom("PPAP_SAMPLES")  # bridge.distillation.Samples
ReportType = io.Custom("PPAP_REPORT")    # bridge.reports.Report
LossesType = io.Custom("PPAP_LOSSES")    # {"interval of noise levels": [loss of each step]}
