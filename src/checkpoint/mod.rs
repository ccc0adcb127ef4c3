//! Checkpoints in and out: Hugging Face folders of safetensors files.
