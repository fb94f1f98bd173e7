"""Names of metrics, methods and models in tables, and of their counterparts in the paper."""

from __future__ import annotations

METRIC_HEADINGS = {  # what a table of runs may show: heading and digits of each metric
    "kl": ("KL to FP", 4),
    "nll": ("NLL", 4),
    "fid2fp": ("FID to FP", 3),
    "fid": ("FID", 3),
    "sfid": ("sFID", 3),
    "is": ("IS", 2),
    "precision": ("Prec.", 3),
    "recall": ("Rec.", 3),
    "agreement": ("Agree.", 3),
}
COST_HEADINGS = {"calibration_s": ("Calibration [s]", 1), "calibration_peak_mb": ("Peak [MiB]", 0)}
PAPER_MODELS = {  # the preset's name in the paper, and the twin's counterpart there
    "var_d16": "VAR-d16",
    "var_d20": "VAR-d20",
    "var_d24": "VAR-d24",
    "var_d30": "VAR-d30",
    "rar_b": "RAR-B",
    "rar_l": "RAR-L",
    "rar_xl": "RAR-XL",
    "rar_xxl": "RAR-XXL",
    "par_xl_4x": "PAR-XL-4x",
    "par_xxl_4x": "PAR-XXL-4x",
    "par_3b_4x": "PAR-3B-4x",
    "par_3b_16x": "PAR-3B-16x",
    "mar_b": "MAR-B",
    "mar_l": "MAR-L",
    "mar_h": "MAR-H",
    "var_twin": "VAR-d16",
    "rar_twin": "RAR-B",
    "par_twin": "PAR-XL-4x",
    "mar_twin": "MAR-B",
}
# the column of quality.csv for our name of the metric
PAPER_METRICS = {"is": "IS", "fid": "FID", "sfid": "sFID", "precision": "precision"}
METHOD_LABELS = {  # of the methods in `conf/method`, where no table gives a row its own label
    "fp": "FP32",
    "rtn": "RTN",
    "rtn_minmax": "RTN (min-max)",
    "rtn_dynamic": "RTN dynamic",
    "smoothquant": "SmoothQuant",
    "stwq": "STWQ alone",
    "sq_stwq": "SmoothQuant + STWQ",
    "gps_only": "GPS + STWQ, no pre-steps",
    "ptq4arvg": "PTQ4ARVG",
    "ptq4arvg_released": "PTQ4ARVG as released",
    "smoothquant_paper": "SmoothQuant (paper)",
    "os_plus": "OS+",
    "repq": "RepQ*",
    "repq_stwq": "RepQ* + STWQ",
    "sq_repq": "SmoothQuant, RepQ*",
    "omniquant": "OmniQuant",
    "omniquant_paper": "OmniQuant (paper)",
    "quarot": "QuaRot",
    "quarot_paper": "QuaRot (paper)",
    "quarot_stwq": "QuaRot + STWQ",
    "svdquant": "SVDQuant",
    "svdquant_paper": "SVDQuant (paper)",
    "gptq": "RTN + GPTQ",
    "ptq4arvg_gptq": "PTQ4ARVG + GPTQ",
    "staq": "STAQ",
}
