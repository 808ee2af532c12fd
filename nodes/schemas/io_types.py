"""What flows along the wires of this pack."""
from comfy_api.latest import io

PPAPGuider = io.Custom("PPAP_GUIDER")    # ppap_core.guider.Guider
PPAPTerms = io.Custom("PPAP_TERMS")      # tuple[GuidanceTerm, ...]
PPAPSamples = io.Custom("PPAP_SAMPLES")  # Samples
PPAPReport = io.Custom("PPAP_REPORT")    # Report
PPAPLosses = io.Custom("PPAP_LOSSES")    # {"interval of noise": [loss of each step]}
