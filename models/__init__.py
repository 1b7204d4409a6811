"""The model zoo and everything that turns a torch module into a bundle: export, train step, quantize.

Laws of the room: it imports `wire` and nothing else of ours; torch and onnx live here and never on a device.
"""
