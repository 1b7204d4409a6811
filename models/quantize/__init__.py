"""From a trained module to two templates and their layouts: export, fold, quantize, calibrate."""
