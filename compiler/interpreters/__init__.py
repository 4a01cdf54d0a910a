"""One Program, many readings: float64 oracle, cost, torch, ONNX."""
