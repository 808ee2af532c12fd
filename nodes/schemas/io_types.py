"""What flows along the wires of this pack."""
from comfy_api.latest import io

GuiderType = io.Custom("PPAP_GUIDER")    # ppap_core.guider.Guider
TermsType = io.Custom("PPAP_TERMS")      # tuple[GuidanceTerm, ...]
SamplesType = io.Custom("PPAP_SAMPLES")  # Samples
ReportType = io.Custom("PPAP_REPORT")    # Report
LossesType = io.Custom("PPAP_LOSSES")    # {"interval of noise": [loss of each step]}
