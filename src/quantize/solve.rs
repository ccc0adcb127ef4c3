//! The solve of one layer.
