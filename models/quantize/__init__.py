"""From a trained module to two templates and their layouts: export, fold, quantize, calibrate.

`quantize` is the way in, `Calibrator` measures the ranges of later parameters. Steps, in order:
`inference_graph.py`, `float_graph.py`, `int8.py`, `ranges.py`; `canonical.py` makes bytes of graphs.
"""

from models.quantize.quantized import Quantized, quantize
from models.quantize.ranges import Calibrator

__all__ = ["Calibrator", "Quantized", "quantize"]
