//! Solver operations on the CPU.
