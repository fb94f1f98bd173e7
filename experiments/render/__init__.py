"""Results to tables, pictures and pages: CSV, Markdown, LaTeX, PNG, one HTML report, the README's generated blocks."""

from experiments.render.files import table_files

__all__ = ["NAMES", "table_files"]

NAMES = {  # of the methods in `conf/method`, where no table gives a row its own label
    "fp": "FP32", "rtn": "RTN", "rtn_minmax": "RTN (min-max)", "rtn_dynamic": "RTN dynamic",
    "smoothquant": "SmoothQuant", "stwq": "STWQ alone", "sq_stwq": "SmoothQuant + STWQ",
    "gps_only": "GPS + STWQ, no pre-steps", "ptq4arvg": "PTQ4ARVG", "ptq4arvg_released": "PTQ4ARVG as released",
    "smoothquant_paper": "SmoothQuant (paper)", "os_plus": "OS+", "repq": "RepQ*", "repq_stwq": "RepQ* + STWQ",
    "sq_repq": "SmoothQuant, RepQ*", "omniquant": "OmniQuant", "omniquant_paper": "OmniQuant (paper)",
    "quarot": "QuaRot", "quarot_paper": "QuaRot (paper)", "quarot_stwq": "QuaRot + STWQ",
    "svdquant": "SVDQuant", "svdquant_paper": "SVDQuant (paper)", "gptq": "RTN + GPTQ",
    "ptq4arvg_gptq": "PTQ4ARVG + GPTQ",
}
