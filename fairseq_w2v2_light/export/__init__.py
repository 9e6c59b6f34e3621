"""Models for use elsewhere: a folder for the runtime, Hugging Face, ONNX."""
