//! How likely two residual streams behind the last block hold given tokens, and how far their predictions are apart. Behind the last
//! block only the last norm and some rows at a time of the output head are missing.

use crate::checkpoint::Checkpoint;
use crate::device::ModelOps;
use crate::model::families::ModelConfig;
use crate::model::language_model::{last_norm, parts_of_head};
use crate::model::source::Weights;
use crate::parallel::each_chunk;
use crate::progress::Stop;
use crate::tensor::Matrix;
use anyhow::Result;

/// Rows of both paths' residual streams behind the last block, and the tokens that come next.
pub struct Paths<T> {
    /// Rows of the float path, `[tokens, hidden]`.
    pub float: T,
    /// Rows of the quantized path, `[tokens, hidden]`.
    pub quantized: T,
    /// The token behind each row.
    pub next: Vec<u32>,
}

/// What both paths make of some tokens: means over tokens, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PathComparison {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// `−ln p` of the token on the float path.
    pub nll_float: f64,
    /// `−ln p` of the token on the quantized path.
    pub nll_quantized: f64,
    /// `−ln p` of the token to one who guesses: `ln` of the vocabulary's size.
    pub nll_guess: f64,
    /// Divergence of the quantized path's distribution from the float path's, `KL(float ‖ quantized)`.
    pub kl: f64,
    /// Divergence of guessing from the float path's distribution.
    pub kl_guess: f64,
    /// Share of the tokens at which both paths hold the same one most likely.
    pub agreement: f64,
}

/// Compares both paths' predictions over the whole vocabulary. Errors where the head's tensors cannot be read.
pub fn compare<D: ModelOps>(
    device: &D,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    paths: Paths<D::Tensor>,
    stop: &Stop,
) -> Result<PathComparison> {
    let decoder = &config.decoder;
    let Paths { float, quantized, next } = paths;
    let norm = last_norm(&Weights::new(device, checkpoint), config)?;
    let [float, quantized] = [float, quantized].map(|x| device.rms_norm(&x, &norm, decoder.norm_eps));
    let (float, quantized) = (float?, quantized?);

    let mut sums: Vec<Sums> = next.into_iter().map(Sums::new).collect();
    parts_of_head(device, checkpoint, config, |first, part| {
        stop.check()?;
        let logits = |x: &D::Tensor| -> Result<Matrix> { device.download(&device.linear(x, part, None)?) };
        let (p, q) = (logits(&float)?, logits(&quantized)?);
        each_chunk(&mut sums, 1, |i, sums| sums[0].add(p.row(i), q.row(i), first));
        Ok(())
    })?;
    let mean = |of: &dyn Fn(&Sums) -> f64| sums.iter().map(of).sum::<f64>() / sums.len() as f64;
    let nll_guess = (decoder.vocab as f64).ln();
    Ok(PathComparison {
        tokens: sums.len(),
        nll_float: mean(&|sums| sums.float.log_sum() - sums.of_next[0]),
        nll_quantized: mean(&|sums| sums.quantized.log_sum() - sums.of_next[1]),
        nll_guess,
        kl: mean(&Sums::divergence),
        kl_guess: nll_guess - mean(&Sums::entropy),
        agreement: mean(&|sums| if sums.float.at == sums.quantized.at { 1.0 } else { 0.0 }),
    })
}

/// The largest of some logits, and `Σ exp(logit − largest)`.
#[derive(Clone, Copy, Debug)]
struct Exponentials {
    largest: f64,
    at: usize,
    sum: f64,
}

impl Exponentials {
    /// Takes in the largest of some more logits; what was summed before is to be multiplied by what comes back.
    fn raise(&mut self, logits: &[f32], first: usize) -> f64 {
        let before = self.largest;
        for (i, &logit) in logits.iter().enumerate().filter(|(_, logit)| f64::from(**logit) > before) {
            if f64::from(logit) > self.largest {
                (self.largest, self.at) = (f64::from(logit), first + i);
            }
        }
        let factor = if before == self.largest { 1.0 } else { (before - self.largest).exp() };
        self.sum *= factor;
        factor
    }

    fn log_sum(&self) -> f64 {
        self.largest + self.sum.ln()
    }
}

/// What is known of one token's distributions after some of the vocabulary.
#[derive(Clone, Copy, Debug)]
struct Sums {
    next: usize,
    /// The next token's logits, of the float and the quantized path.
    of_next: [f64; 2],
    float: Exponentials,
    quantized: Exponentials,
    /// `Σ exp(p − largest)·p`, p being the float path's logits.
    float_logits: f64,
    /// `Σ exp(p − largest)·(p − q)`.
    differences: f64,
}

impl Sums {
    fn new(next: u32) -> Self {
        let none = Exponentials { largest: f64::NEG_INFINITY, at: usize::MAX, sum: 0.0 };
        let (of_next, float_logits, differences) = ([f64::NAN; 2], 0.0, 0.0);
        Self { next: next as usize, of_next, float: none, quantized: none, float_logits, differences }
    }

    /// Adds the logits of some more of the vocabulary, from its token `first` on.
    fn add(&mut self, p: &[f32], q: &[f32], first: usize) {
        if let Some(place) = self.next.checked_sub(first).filter(|place| *place < p.len()) {
            self.of_next = [f64::from(p[place]), f64::from(q[place])];
        }
        let factor = self.float.raise(p, first);
        self.float_logits *= factor;
        self.differences *= factor;
        self.quantized.raise(q, first);
        for (&p, &q) in p.iter().zip(q) {
            let (p, q) = (f64::from(p), f64::from(q));
            let weight = (p - self.float.largest).exp();
            self.float.sum += weight;
            self.float_logits += weight * p;
            self.differences += weight * (p - q);
            self.quantized.sum += (q - self.quantized.largest).exp();
        }
    }

    fn divergence(&self) -> f64 {
        self.differences / self.float.sum - self.float.log_sum() + self.quantized.log_sum()
    }

    fn entropy(&self) -> f64 {
        self.float.log_sum() - self.float_logits / self.float.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_in_parts_are_those_of_the_whole() {
        // (1/8, 1/4, 1/2, 1/8) and (1/8, 1/2, 1/4, 1/8), shifted by constants that must not matter.
        let p = [0.125f32, 0.25, 0.5, 0.125].map(|p| p.ln() - 40.0);
        let q = [0.125f32, 0.5, 0.25, 0.125].map(|q| q.ln() + 70.0);
        let kl = 0.25 * 2f64.ln();
        for cut in 0..=4 {
            let mut sums = Sums::new(2);
            sums.add(&p[..cut], &q[..cut], 0);
            sums.add(&p[cut..], &q[cut..], cut);
            assert!((sums.divergence() - kl).abs() < 1e-5, "{cut}: {}", sums.divergence());
            assert!((sums.entropy() - 1.75 * 2f64.ln()).abs() < 1e-5, "{cut}: {}", sums.entropy());
            assert!((sums.float.log_sum() - sums.of_next[0] - 2f64.ln()).abs() < 1e-5);
            assert!((sums.quantized.log_sum() - sums.of_next[1] - 4f64.ln()).abs() < 1e-5);
            assert_eq!((sums.float.at, sums.quantized.at), (2, 1));
        }
    }
}
