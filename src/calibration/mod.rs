//! Calibration and evaluation data: conversations, images, templates, token sequences.
