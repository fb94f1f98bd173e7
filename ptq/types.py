"""The nouns of the library in one place: `spec.py` says how to quantize, `sites.py` where, and
`transform.py` what an input becomes before.

Adapters in `models/*/adapter.py` are built from these types and import nothing else of `ptq`.
"""

from ptq.sites import (
    LAYOUTS,
    AdaLNFold,
    Adapter,
    BlockForm,
    CalibrationSet,
    Fold,
    HeadRotation,
    MatMulSite,
    NormFold,
    Probe,
    Rows,
    RowsFold,
    Segments,
    Site,
    StreamRotation,
    Track,
)
from ptq.spec import (
    GRANULARITIES,
    OBSERVERS,
    RANGES,
    ConfigError,
    QuantSpec,
    require,
)
from ptq.transform import InputTransform, LowRank, Rotation

__all__ = [
    "GRANULARITIES",
    "LAYOUTS",
    "OBSERVERS",
    "RANGES",
    "AdaLNFold",
    "Adapter",
    "BlockForm",
    "CalibrationSet",
    "ConfigError",
    "Fold",
    "HeadRotation",
    "InputTransform",
    "LowRank",
    "MatMulSite",
    "NormFold",
    "Probe",
    "QuantSpec",
    "Rotation",
    "Rows",
    "RowsFold",
    "Segments",
    "Site",
    "StreamRotation",
    "Track",
    "require",
]
