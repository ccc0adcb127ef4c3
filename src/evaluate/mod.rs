//! What a model makes of questions: greedy decoding, log-likelihood, divergence, metrics, and what is told of them.

mod comparison;
pub mod generate;
pub mod likelihood;
pub mod metrics;
pub mod paths;
pub mod presets;
mod report;
pub mod seen;

pub use comparison::{ComparedAnswer, ComparedScores, Comparison};
pub use report::{Answer, Conditions, Evaluation, GroupResult, SampleResult};
