"""What a quantized build looks at before it is written: calibration and quality."""
