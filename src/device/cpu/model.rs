//! Model operations on the CPU.
